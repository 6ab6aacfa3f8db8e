"""What a sweep directory says: its runs, the keys in which they differ, and mean ± std over seeds.

Everything is read from the run directories, so it does not matter which launcher, process or machine made
them. The objective is validation accuracy. The test set is looked at for one setting only, the one that
validation has chosen.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zfnet.config.errors import UserError
from zfnet.config.schema import flatten, result_keys
from zfnet.runs.directory import RunDirectory

ABSENT = "–"  # in place of a value that a job does not have, such as the momentum of an Adam


@dataclass(frozen=True)
class SweepJob:
    """One run of a sweep. `settings`: what its result depends on, as flat dotted keys, without the seed."""

    run: RunDirectory
    name: str
    state: str
    error: str | None
    settings: dict[str, Any]
    seed: int | None
    results: dict[str, Any]
    history: list[dict[str, float | None]]

    @property
    def objective(self) -> float | None:
        """Validation accuracy of the finished run; None for a run that is not finished, or has no validation."""
        return self.accuracy("validation")

    def accuracy(self, part: str) -> float | None:
        """Return the final accuracy on `validation` or `test`."""
        if self.state != "done":
            return None
        figures = self.results.get(part)
        return figures.get("accuracy") if isinstance(figures, dict) else None


@dataclass(frozen=True)
class Setting:
    """Jobs that differ in nothing but the seed. `values`: the swept keys and what they are here."""

    values: dict[str, Any]
    jobs: list[SweepJob]

    def scores(self, part: str = "validation") -> list[float]:
        """Return the accuracies of the finished jobs."""
        return [a for job in self.jobs if (a := job.accuracy(part)) is not None]

    def mean_and_std(self, part: str = "validation") -> tuple[float | None, float | None]:
        """Return mean and sample standard deviation over the seeds; None where there are too few."""
        scores = self.scores(part)
        mean = statistics.fmean(scores) if scores else None
        return mean, statistics.stdev(scores) if len(scores) > 1 else None


@dataclass(frozen=True)
class Sweep:
    """A whole sweep. `settings` is sorted by the objective, best first; those without one come last."""

    folder: Path
    jobs: list[SweepJob]
    keys: list[str]
    settings: list[Setting]

    @property
    def failed(self) -> list[SweepJob]:
        return [job for job in self.jobs if job.state == "failed"]


def read_sweep(folder: Path) -> Sweep:
    """Read every training run below a sweep directory. A run that cannot be read counts as one without results."""
    found = {path.parent for depth in (1, 2, 3) for path in folder.glob("*/" * depth + "status.json")}
    jobs = [job for path in sorted(found) if (job := _read_job(folder, path)) is not None]
    known = [job for job in jobs if job.settings]
    keys = swept_keys([job.settings for job in known])
    groups: dict[str, list[SweepJob]] = {}
    for job in known:
        groups.setdefault(json.dumps(job.settings, sort_keys=True), []).append(job)
    settings = [
        Setting(
            {key: members[0].settings.get(key, ABSENT) for key in keys},
            sorted(members, key=lambda job: -1 if job.seed is None else job.seed),
        )
        for members in groups.values()
    ]

    def rank(setting: Setting) -> float:
        mean, _ = setting.mean_and_std()
        return float("inf") if mean is None else -mean

    return Sweep(folder, jobs, keys, sorted(settings, key=rank))


def _read_job(sweep: Path, folder: Path) -> SweepJob | None:
    run = RunDirectory(folder)
    plain = run.plain_config()
    if plain and run.job != "train":
        return None
    state, error = run.state_and_error()
    results: Any = {}
    history: list[dict[str, float | None]] = []
    try:
        history = run.read_history()
        results = run.read_json("results.json")
    except (UserError, ValueError):
        pass  # not there yet
    settings = flatten(result_keys(plain))
    seed = settings.pop("seed", None)
    name = folder.relative_to(sweep).as_posix()
    return SweepJob(
        run, name, state, error, settings, seed, results if isinstance(results, dict) else {}, history
    )


def swept_keys(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys in which these flat configs differ, without those that only follow another.

    A key follows another if it always has the same value (`scheduler.max_lr: ${optimizer.lr}`), or if the choice
    of its group's file decides it: whoever sweeps `model=small,zfnet` has not swept the number of maps in conv1.
    """
    columns: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for setting in settings for key in setting):
        column = [repr(setting.get(key, ABSENT)) for setting in settings]
        if len(set(column)) > 1:
            columns[key] = column
    kept: list[str] = []
    seen: list[list[str]] = []
    for key, column in columns.items():
        group = key.partition(".")[0]
        leaders = [columns[name] for name in (f"{group}.name", f"{group}._target_") if name in kept]
        if column not in seen and not any(_decides(leader, column) for leader in leaders):
            kept.append(key)
        seen.append(column)
    return kept


def _decides(leader: Sequence[str], column: Sequence[str]) -> bool:
    """Whether equal values of `leader` always come with equal values of `column`."""
    return len(set(zip(leader, column, strict=True))) == len(set(leader))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return for each dotted key its last parts, as few as tell it from the others: `lr`, `conv1.kernel_size`.

    The `name` or `_target_` of a group is called like the group.
    """
    plain = {key: key.removesuffix(".name").removesuffix("._target_") for key in keys}
    short = {}
    for key, text in plain.items():
        parts = text.split(".")
        for count in range(1, len(parts) + 1):
            short[key] = ".".join(parts[-count:])
            alike = [o for o in plain.values() if o == short[key] or o.endswith("." + short[key])]
            if len(alike) == 1:
                break
    return short


def say(value: Any) -> str:
    """Return a setting's value as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and value.startswith("torch.optim."):
        return value.rpartition(".")[2]
    return str(value)
