"""Summarise a sweep: its runs, the keys in which they differ, mean ± std over seeds, and tables.

Everything is read from the run directories, so the launcher, processes and machines of the sweep do not matter.
Settings are ranked by validation accuracy, then by validation loss. The test accuracy is shown for the best setting
only.
"""

import contextlib
import hashlib
import itertools
import json
import math
import shutil
import statistics
import textwrap
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zfnet.config.errors import UserError
from zfnet.config.schema import flatten, result_keys
from zfnet.runs.compare import environment_values
from zfnet.runs.directory import RunDirectory, find_folders
from zfnet.runs.statistics import LEVEL, difference, holm
from zfnet.runs.tables import format_table

ABSENT = "–"  # in place of a value that a job does not have, such as momentum with Adam
STATES = ("done", "running", "killed", "stopped", "pruned", "failed", "none")
MOST_ROWS = 40  # on the terminal
_NOT_SETTINGS = ("job", "run", "runs", "parent", "images", "imports", "logger")


# -- reading


@dataclass(frozen=True)
class Trained:
    """One training, as its directory records it. Damaged or missing records are empty.

    config, environment: as recorded, by flat dotted keys
    settings: the keys that its result depends on, without the seed
    typed: the keys that its command line set
    """

    name: str
    state: str
    error: str | None
    config: dict[str, Any]
    settings: dict[str, Any]
    seed: int | None
    environment: dict[str, Any]
    results: dict[str, Any]
    history: list[dict[str, float | None]]
    typed: frozenset[str] = frozenset()

    def metric(self, split: str = "validation", name: str = "accuracy") -> float | None:
        """Return a result on `validation` or `test`; None if there is none, or if it is not finite."""
        metrics = self.results.get(split)
        value = metrics.get(name) if isinstance(metrics, dict) else None
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


@dataclass(frozen=True)
class Setting:
    """Jobs that differ only in the seed. `values`: the swept keys with their values."""

    values: dict[str, Any]
    jobs: list[Trained]

    def scores(self, split: str = "validation") -> list[float]:
        """Return the accuracies of the finished jobs; a seed that was trained twice counts once."""
        return list(self.scores_by_seed(split).values())

    def scores_by_seed(self, split: str = "validation") -> dict[Any, float]:
        """Return the accuracy of each finished job, by seed."""
        return {job.seed: a for job in self.jobs if (a := job.metric(split)) is not None}

    def order(self) -> tuple[float, float]:
        """Return the key that sorts settings, best first: by validation accuracy, then by validation loss."""
        losses = [loss for job in self.jobs if (loss := job.metric(name="loss")) is not None]
        return -statistics.fmean(self.scores() or [-1]), statistics.fmean(losses or [math.inf])

    def mean_and_std(self, split: str = "validation") -> tuple[float | None, float | None]:
        """Return mean and sample standard deviation over the seeds; None if there are too few."""
        scores = self.scores(split)
        mean = statistics.fmean(scores) if scores else None
        return mean, statistics.stdev(scores) if len(scores) > 1 else None

    def score_text(self, split: str = "validation") -> str:
        """Return `71.23 ± 0.45%`, without the deviation if there is only one seed."""
        mean, std = self.mean_and_std(split)
        if mean is None:
            return ABSENT
        return f"{mean:.2%}" if std is None else f"{100 * mean:.2f} ± {std:.2%}"


@dataclass(frozen=True)
class Sweep:
    """A whole sweep. `settings` is sorted by validation accuracy and loss, best first, and without results last."""

    jobs: list[Trained]
    keys: list[str]
    settings: list[Setting]


def read_sweep(folder: Path) -> Sweep:
    """Read every training run below a sweep directory. A run that cannot be read counts as one without results."""
    runs = [RunDirectory(path) for path in find_folders(folder, "status.json", 3)]
    runs = [run for run in runs if run.job in ("train", None)]  # None: not readable
    jobs = [read_training(run, run.folder.relative_to(folder).as_posix()) for run in runs]
    jobs = [job if job.state == "done" else replace(job, results={}) for job in jobs]
    add_data_roots(jobs)
    keys = swept_keys([job.settings for job in jobs if job.settings])
    groups: dict[str, list[Trained]] = {}
    for job in sorted(jobs, key=lambda job: -1 if job.seed is None else job.seed):
        if job.settings:
            groups.setdefault(settings_key(job), []).append(job)
    settings = [
        Setting({key: members[0].settings.get(key, ABSENT) for key in keys}, members) for members in groups.values()
    ]
    return Sweep(jobs, keys, sorted(settings, key=Setting.order))


def p_against_best(settings: Sequence[Setting]) -> list[float | None]:
    """Return the p-value of each setting's difference from the first, the best one; None if no test is possible.

    Holm's correction covers all pairs of settings, not only the pairs with the best one, because the same accuracies
    determined the best one.
    """
    scores = [setting.scores_by_seed() for setting in settings]
    pairs = itertools.combinations(range(len(settings)), 2)
    p = {(i, j): test.p for i, j in pairs if (test := difference(scores[i], scores[j]))}
    corrected = dict(zip(p, holm(list(p.values())), strict=True))
    return [corrected.get((0, i)) for i in range(len(settings))]


def read_training(run: RunDirectory, name: str) -> Trained:
    """Read the record of a training; `name` is its name in tables."""
    recorded = run.plain_config()
    history: list[dict[str, float | None]] = []
    results: Any = {}
    with contextlib.suppress(UserError):
        history = run.read_history()
        results = run.read_json("results.json")
    seed, parent = recorded.get("seed"), _parent_settings(recorded)
    return Trained(
        name,
        *run.state_and_error(),
        flatten({key: value for key, value in recorded.items() if key not in _NOT_SETTINGS}) | parent,
        _result_settings(recorded),
        seed if isinstance(seed, int) else None,
        environment_values(run),
        results if isinstance(results, dict) else {},
        history,
        frozenset(override.partition("=")[0].lstrip("+~") for override in run.overrides),
    )


def _result_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the result of a config depends on, by flat dotted keys, without the seed."""
    settings = flatten(result_keys({key: value for key, value in plain.items() if key not in ("seed", "parent")}))
    return settings | _parent_settings(plain)


def _parent_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the epoch, the schedule and a hash of the parent's settings (without its seed) of a branched run."""
    parent = plain.get("parent")
    if not isinstance(parent, Mapping) or not isinstance(parent.get("config"), Mapping):
        return {}
    settings = json.dumps(_result_settings(parent["config"]), sort_keys=True, default=str)
    known = {f"parent.{key}": parent.get(key) for key in ("epoch", "schedule")}
    return known | {"parent.settings": hashlib.sha256(settings.encode()).hexdigest()[:12]}


def add_data_roots(jobs: Sequence[Trained]) -> None:
    """Add `data.root` to the settings if the jobs were trained on several data sets.

    The content of the data counts, not its path: a moved folder is one data set; a folder with other content in another
    job is two data sets, distinguished by their fingerprints.
    """
    fingerprints = [_text(job.environment.get("data_fingerprint")) for job in jobs]
    roots = [_text(job.config.get("data.root")) for job in jobs]
    root_of: dict[str | None, str | None] = {}
    for fingerprint, root in zip(fingerprints, roots, strict=True):
        root_of.setdefault(fingerprint, root)
    roots = [root if digest is None else root_of[digest] for digest, root in zip(fingerprints, roots, strict=True)]
    places = [(settings_key(job), root) for job, root in zip(jobs, roots, strict=True)]
    sets: dict[tuple[str, str | None], set[str]] = {place: set() for place in places}
    for place, fingerprint in zip(places, fingerprints, strict=True):
        sets[place].update([fingerprint] if fingerprint else [])
    names = [
        f"{place[1] or 'data'} ({str(fingerprint)[:8]})" if len(sets[place]) > 1 else place[1]
        for place, fingerprint in zip(places, fingerprints, strict=True)
    ]
    if len(set(names)) > 1:
        for job, name in zip(jobs, names, strict=True):
            job.settings.update({"data.root": name} if job.settings else {})


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def settings_key(run: Trained) -> str:
    """Return a text that is equal for runs that differ only in the seed."""
    return json.dumps(run.settings, sort_keys=True, default=str)


def swept_keys(settings: Sequence[Mapping[str, Any]], typed: Collection[str] = ()) -> list[str]:
    """Return the keys in which these flat configs differ, without keys that only follow another key.

    A key follows a key of another group if both always have the same value (`scheduler.max_lr: ${optimizer.lr}`). It
    follows its group's choice if that determines it: `model=small,zfnet` does not sweep the number of maps in conv1.

    typed: keys to return even if they follow another key
    """
    columns = {
        key: [repr(setting.get(key, ABSENT)) for setting in settings]
        for key in dict.fromkeys(key for setting in settings for key in setting)
    }
    kept: dict[str, list[str]] = {}
    seen: list[tuple[str, list[str]]] = []
    for key, column in columns.items():
        group = key.partition(".")[0]
        choices = [kept[name] for name in (f"{group}.name", f"{group}._target_") if name in kept]
        follows = any(len(set(zip(choice, column, strict=True))) == len(set(choice)) for choice in choices) or any(
            column == other and (group != others or repr(ABSENT) in column)  # all of a null layer's keys are absent
            for others, other in seen
        )
        if len(set(column)) > 1 and (key in typed or not follows):
            kept[key] = column
        seen.append((group, column))
    return list(kept)


def group_name(key: str) -> str:
    """Return a dotted key as on the command line: the `name` or `_target_` of a group becomes the group's name."""
    return key.removesuffix(".name").removesuffix("._target_")


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return for each dotted key the shortest ending that no other key has, such as `lr` or `conv1.kernel_size`."""
    plain = {key: group_name(key) for key in keys}
    short = {}
    for key, text in plain.items():
        words = text.split(".")
        for count in range(1, len(words) + 1):
            short[key] = ".".join(words[-count:])
            if sum(f".{other}".endswith(f".{short[key]}") for other in plain.values()) == 1:
                break
    return short


def format_value(value: Any) -> str:
    """Return a setting's value as on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):  # four digits if it has more than six, as in a search
        return f"{value:.6g}" if float(f"{value:.6g}") == value else f"{value:.4g}"
    if isinstance(value, str) and value.startswith(("torch.optim.", "zfnet.training.")):
        return value.rpartition(".")[2]
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False, default=str).replace('"', "")
    return str(value)


# -- tables: one row per job in summary.csv, one row per setting in summary.md and on the terminal


def job_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Return one row per job, best setting first, without test results: nobody may choose a setting by them."""
    jobs = [(setting.values, job) for setting in sweep.settings for job in setting.jobs]
    jobs += [({}, job) for job in sweep.jobs if not job.settings]
    return [
        {"directory": job.name, "state": job.state}
        | {key: values.get(key) for key in sweep.keys}
        | {"seed": job.seed, "validation_accuracy": job.metric(), "validation_loss": job.metric(name="loss")}
        | {key: job.results.get(key) for key in ("best_epoch", "epochs", "seconds")}
        | {"error": job.error}
        for values, job in jobs
    ]


def setting_rows(sweep: Sweep, keys: Sequence[str], states: bool = True) -> list[list[str]]:
    """Return the header and one row per setting.

    With several seeds, one column says whether the difference from the best exceeds the spread of the seeds. If a job
    is not done, one column names the states, unless `states` is false.
    """
    names = short_names(sweep.keys)
    counts = [Counter(job.state for job in setting.jobs) for setting in sweep.settings]
    not_done = states and any(set(count) != {"done"} for count in counts)
    p = p_against_best(sweep.settings)
    tested = any(value is not None for value in p)
    accuracy = "validation accuracy" + " ± std" * any(len(s.scores()) > 1 for s in sweep.settings)
    rows = [[*(names[key] for key in keys), accuracy, "n"] + ["against the best"] * tested]
    rows[0] += ["state"] * not_done
    for rank, (setting, count) in enumerate(zip(sweep.settings, counts, strict=True)):
        state = _count_states(count) if len(setting.jobs) > 1 else setting.jobs[0].state
        values = [format_value(setting.values[key]) for key in keys]
        row = [*values, setting.score_text(), str(len(setting.scores()))]
        rows.append(row + [_describe_test(rank, p[rank])] * tested + [state] * not_done)
    return rows


def _describe_test(rank: int, p: float | None) -> str:
    if p is None:
        return ABSENT if rank else "best"
    return f"{'lower' if p < LEVEL else 'unclear'}, p {p:.2g}"


def to_markdown(sweep: Sweep) -> str:
    """Return the table over settings, the test accuracy of the best one, and the failed jobs."""
    header, *rows = setting_rows(sweep, sweep.keys)
    table = [header, ["---"] * len(header), *rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    lines = [f"# {count_line(sweep)}", "", *lines, "", *_test_line(sweep), ""]
    lines += [f"- failed: `{job.name}`: {job.error}" for job in sweep.jobs if job.state == "failed"]
    return "\n".join(lines).rstrip() + "\n"


def to_text(sweep: Sweep, width: int | None = None) -> str:
    """Return the table for a terminal of `width` columns (None: this one), best first.

    Columns of swept keys are shortened. If the table is still too wide, it has no states, which the first line counts,
    and then only the first keys; the others are named below. Rows after the best MOST_ROWS are counted. summary.csv
    contains all of them.
    """
    width = width or shutil.get_terminal_size().columns
    keys, states = list(sweep.keys), True
    while True:
        rows = setting_rows(sweep, keys, states)[: MOST_ROWS + 1]
        table = format_table(rows, "<" * len(rows[0]), width, range(len(keys)))
        if max(map(len, table)) <= width or (not states and len(keys) < 2):
            break
        if states:
            states = False
        else:
            del keys[-1]
    lines = [count_line(sweep), *table]
    if (more := len(sweep.settings) - MOST_ROWS) > 0:
        lines.append(f"… and {more} more, in summary.csv")
    if hidden := sweep.keys[len(keys) :]:
        names = ", ".join(short_names(sweep.keys)[key] for key in hidden)
        lines += textwrap.wrap(f"not shown, but in summary.csv: {names}", width)
    return "\n".join([*lines, *_test_line(sweep)])


def count_line(sweep: Sweep) -> str:
    """Return `2 settings, 4 jobs: 3 done, 1 failed`."""
    states = _count_states(Counter(job.state for job in sweep.jobs))
    return f"{_count_text(len(sweep.settings), 'setting')}, {_count_text(len(sweep.jobs), 'job')}: {states}"


def _count_states(states: Counter[str]) -> str:
    return ", ".join(f"{states[s]} {s}" for s in STATES if states[s])


def _count_text(number: int, thing: str) -> str:
    return f"{number} {thing}" + "s" * (number != 1)


def _test_line(sweep: Sweep) -> list[str]:
    if any(job.results for job in sweep.jobs) and not any(setting.scores() for setting in sweep.settings):
        return ["Not ranked: no validation images. job=compare runs=[DIR] tests on test images"]
    scores = sweep.settings[0].scores("test") if sweep.settings and sweep.settings[0].scores() else []
    text = sweep.settings[0].score_text("test") if scores else ""
    return [f"Test accuracy of the best setting by validation: {text} (n = {len(scores)})"] if scores else []
