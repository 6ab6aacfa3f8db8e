"""job=compare: show where runs or settings differ, side by side, or write a sweep's table and figures again."""

import base64
import glob
import html
import itertools
import os
import re
import shutil
import statistics
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Optional

from matplotlib.ticker import PercentFormatter

from zfnet.config.errors import UserError
from zfnet.config.schema import Config, Job
from zfnet.plots.figures import CSS, PALETTE, Figure, epoch_axis, new_figure, plain, plot_history, save_figure, styled
from zfnet.runs.compare import first_difference
from zfnet.runs.directory import RunDirectory, find_run, list_runs, remove_if_empty, write_atomically
from zfnet.runs.session import own_directory
from zfnet.runs.statistics import LEVEL, Difference, difference, holm
from zfnet.runs.tables import format_table, shorten
from zfnet.sweeps.callback import summarize
from zfnet.sweeps.summary import ABSENT, Trained, add_data_roots, format_value, read_training, settings_key, swept_keys

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_PAIRS = 10  # tests shown; if there are more, only those of the best group
_BARS = "▁▂▃▄▅▆▇█"


@dataclass(kw_only=True)
class CompareJob(Job):
    sweep: Optional[str]  # the directory of a sweep
    split: Literal["auto", "validation", "test"]

    def main(self, config: Config, output: Path) -> None:
        """Compare the runs in `runs=[…]`, print the comparison and write a page; or write a sweep's summary again.

        Raises UserError if there is no training run to compare.
        """
        if (self.sweep is None) is (config.runs is None):
            raise UserError(
                "job=compare needs runs to compare, as in 'runs=[outputs/train/a,outputs/train/b]', or job.sweep=<dir>"
            )
        if config.runs is None:
            remove_if_empty(output)
            folder = Path(os.path.expanduser(str(self.sweep)))
            text = summarize(folder, figures=True) if folder.is_dir() else ""
            if not text:
                raise UserError(f"job.sweep={folder}: there is no training run in it")
            print(text)
            return
        groups = group([read_training(run, str(run.folder)) for run in find_trainings(config.runs)])
        comparison = compare(groups, self.split)
        with own_directory(config, output) as run:
            figure = draw_comparison(groups, comparison.split)
            picture = save_figure(figure, run.figures / "curves.png")
            run.write_json("comparison.json", comparison.to_dict())
            write_atomically(run.folder / "index.html", to_page(comparison, picture))
            print(to_text(comparison, shutil.get_terminal_size().columns, bold=sys.stdout.isatty()))
            print(f"open {run.folder / 'index.html'} in a browser")


# -- runs and groups of runs


@dataclass(frozen=True)
class Group:
    """A single run, or runs that differ only in the seed, and the group's letter."""

    letter: str
    runs: list[Trained]

    def values(self, split: str, name: str = "accuracy") -> dict[Any, float]:
        """Return {seed: metric} for the runs that have the metric."""
        return {r.seed: value for r in self.runs if (value := r.metric(split, name)) is not None}


def _shared(values: Iterable[Any]) -> Any:
    """Return the value that all runs of a group have, or `varies`."""
    first, *others = values
    return first if all(other == first for other in others) else "varies"


def find_trainings(items: Sequence[str]) -> list[RunDirectory]:
    """Return the training runs that `runs=[…]` names: run directories, folders of runs such as sweeps, and patterns.

    Raises UserError for an item without a training run, and if there are fewer than two runs.
    """
    by_path: dict[Path, RunDirectory] = {}
    for item in items:
        folders = [Path(os.path.expanduser(item))]
        if not os.path.exists(folders[0]) and glob.has_magic(item):
            folders = [Path(path) for path in sorted(glob.glob(str(folders[0])))]
        runs = [find_run(item)] if item == "last" else []
        for folder in [] if runs else folders:
            runs += [RunDirectory(folder)] if os.path.isfile(folder / "config.yaml") else list_runs(folder)
        runs = [run for run in runs if os.path.isfile(run.folder / "history.csv")]
        if not runs:
            split = "=" in item and not (folders and os.path.exists(folders[0]))
            hint = """; quote names with commas: 'runs=["a,seed=0",b]'""" if split else ""
            raise UserError(f"runs: {item}: there is no training run (no history.csv){hint}")
        by_path |= {run.folder.resolve(): run for run in runs}
    if len(by_path) < 2:
        raise UserError(f"runs: {', '.join(items)}: names one training run; a comparison needs two")
    return list(by_path.values())


def group(runs: Sequence[Trained]) -> list[Group]:
    """Group runs that differ only in the seed, if there are at least two settings; otherwise each run is a group.

    Runs with the same settings and seed, such as a run and its reproduction, are compared one by one if no setting has
    several seeds; otherwise only the first of them counts. Raises UserError if there are more groups than letters.
    """
    add_data_roots(runs)
    settings: dict[str, dict[int, list[Trained]]] = {}
    for run in runs:
        # a run that cannot be read is a group of its own
        known = settings_key(run) if run.settings and run.seed is not None else run.name
        settings.setdefault(known, {}).setdefault(run.seed or 0, []).append(run)
    groups = [[same[0] for same in seeds.values()] for seeds in settings.values()]
    left_out = [run for seeds in settings.values() for same in seeds.values() for run in same[1:]]
    if len(groups) < 2 or (left_out and max(map(len, groups)) == 1):
        groups, left_out = [[run] for run in runs], []
    for run in left_out:
        print(f"{run.name} is left out: another run has the same settings and seed", file=sys.stderr)
    if len(groups) > len(LETTERS):
        raise UserError(
            f"runs: {len(groups)} settings are named, and at most {len(LETTERS)} can be compared; "
            "job=compare job.sweep=<dir> ranks a whole sweep"
        )
    return [Group(letter, members) for letter, members in zip(LETTERS, groups, strict=False)]


# -- the comparison


@dataclass(frozen=True)
class Section:
    """A part of the comparison: a title, an optional table with a header, the numbers of its bold rows, and notes."""

    title: str
    rows: list[list[str]]
    bold: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """The result. `split`: the split of the accuracies; `tests`: one for each pair (better, other), with Holm's p."""

    split: str
    sections: list[Section]
    tests: list[dict[str, Any]]
    by_epoch: str  # the split of the curves
    curves: list[tuple[str, list[float | None]]]

    def to_dict(self) -> dict[str, Any]:
        sections = [{"title": s.title, "rows": s.rows, "notes": s.notes} for s in self.sections]
        return {"split": self.split, "sections": sections, "tests": self.tests}


def compare(groups: Sequence[Group], split: str = "auto") -> Comparison:
    """Compare groups. `split`: validation, test, or auto, which is validation unless a run has only test results."""
    if split == "auto":
        runs = [r for g in groups for r in g.runs]
        only_tested = [r for r in runs if r.metric("validation") is None and r.metric("test") is not None]
        split = "test" if only_tested else "validation"  # runs without results do not count
    letters = ["", *(g.letter for g in groups)]
    configs = [{key: _shared(r.config.get(key, ABSENT) for r in g.runs) for key in g.runs[0].config} for g in groups]
    if any(len(g.runs) > 1 for g in groups):
        for config in configs:
            config.pop("seed", None)
    typed = {key for g in groups for r in g.runs for key in r.typed}
    settings = [[key, *(format_value(c.get(key, ABSENT)) for c in configs)] for key in swept_keys(configs, typed)]
    keys = dict.fromkeys(key for g in groups for r in g.runs for key in r.environment)
    environments = [{key: _shared(r.environment.get(key, ABSENT) for r in g.runs) for key in keys} for g in groups]
    for key in keys:  # of lists, such as untracked files, show only the items that not all have
        lists = [each[key] for each in environments]
        if all(isinstance(items, list) for items in lists):
            for each, items in zip(environments, lists, strict=True):
                each[key] = [item for item in items if any(item not in others for others in lists)]
    environment = [
        [key, *(re.sub("([0-9a-f]{10})[0-9a-f]{22,}", r"\1", format_value(each[key])) for each in environments)]
        for key in keys
        if len({repr(each[key]) for each in environments}) > 1
    ]
    tests, table = _tests(groups, split)
    sections = [
        Section("Runs", [[g.letter, _describe(g)] for g in groups]),
        Section("Settings that differ", [letters, *settings] if settings else [], notes=() if settings else ("none",)),
        Section("Results", [letters, *_results(groups, split)], notes=tuple(_first_differences(groups))),
        table,
    ]
    if environment:
        sections.insert(2, Section("Environment that differs", [letters, *environment]))
    by_epoch = _by_epoch(groups, split)
    curves = [(g.letter, _curve(g, f"{by_epoch}_accuracy")) for g in groups]
    return Comparison(split, sections, tests, by_epoch, curves)


def _by_epoch(groups: Sequence[Group], split: str) -> str:
    """Return the split for the accuracy curves: `split` if epochs measured it, else validation (as usual for test)."""
    rows = [row for g in groups for r in g.runs for row in r.history]
    return split if any(row.get(f"{split}_accuracy") is not None for row in rows) else "validation"


def _describe(g: Group) -> str:
    if len(g.runs) == 1:
        state = g.runs[0].state
        return g.runs[0].name + ("" if state == "done" else f" ({state})")
    seeds = ", ".join(f"{r.seed}" + ("" if r.state == "done" else f" ({r.state})") for r in g.runs)
    return f"{g.runs[0].name} and {len(g.runs) - 1} more: seeds {seeds}"


def _results(groups: Sequence[Group], split: str) -> list[list[str]]:
    """Return the rows of results: accuracy always, the other metrics only if the groups differ."""
    rows = [[f"{split} accuracy", *(_spread(g.values(split), 100, 2, "%") for g in groups)]]
    rows.append([f"{split} loss", *(_spread(g.values(split, "loss"), 1, 4) for g in groups)])
    for key in ("best_epoch", "epochs", "seconds", "images_per_second"):
        columns = [
            _spread({n: v for n, r in enumerate(g.runs) if isinstance(v := r.results.get(key), (int, float))}, 1, 1)
            for g in groups
        ]
        rows.append([key.replace("_", " "), *columns])
    weights = [_shared(str(r.results.get("weights_sha256", ABSENT))[:10] for r in g.runs) for g in groups]
    rows.append(["hash of the weights", *map(str, weights)])
    return [row for n, row in enumerate(rows) if n == 0 or len(set(row[1:])) > 1]


def _spread(values: dict[Any, float], scale: float, digits: int, unit: str = "") -> str:
    """Return mean ± standard deviation as text; for a single value, only the value."""
    scaled = [scale * value for value in values.values()]
    if not scaled:
        return ABSENT
    mean = f"{statistics.fmean(scaled):.{digits}f}"
    if digits == 1:
        mean = mean.removesuffix(".0")
    return mean + (f" ± {statistics.stdev(scaled):.{digits}f}" if len(scaled) > 1 else "") + unit


def _first_differences(groups: Sequence[Group]) -> list[str]:
    """Return a line per other group: where its history first differs from the first's, at a common seed if any."""
    lines, first = [], groups[0]
    for other in groups[1:]:
        pairs = [(a, b) for a in first.runs for b in other.runs if a.seed == b.seed] or [(first.runs[0], other.runs[0])]
        a, b = pairs[0]
        of_seed = f" (seed {a.seed})" if len(first.runs) + len(other.runs) > 2 and a.seed == b.seed else ""
        divergence = first_difference(a.history, b.history)
        if divergence is None:
            same = a.results.get("weights_sha256") == b.results.get("weights_sha256")
            weights = "" if not a.results or not b.results else f", {'and' if same else 'but not'} in the weights"
            lines.append(f"{other.letter} equals {first.letter} in all {len(a.history)} epochs{of_seed}{weights}")
        else:
            was, now = (ABSENT if v is None else f"{v:.6g}" for v in (divergence["recorded"], divergence["now"]))
            lines.append(
                f"{other.letter} first differs from {first.letter} in epoch {divergence['epoch']}{of_seed}: "
                f"{divergence['metric']} {was} and {now}"
            )
    return lines


def _tests(groups: Sequence[Group], split: str) -> tuple[list[dict[str, Any]], Section]:
    """Test every pair of groups; return the tests and their table, in which significant differences are bold."""
    title = f"Differences of {split} accuracy, in percentage points"
    ranked = sorted((g for g in groups if g.values(split)), key=lambda g: -statistics.fmean(g.values(split).values()))
    pairs: list[tuple[Group, Group, Difference]] = []
    for better, other in itertools.combinations(ranked, 2):
        if (result := difference(better.values(split), other.values(split))) is not None:
            pairs.append((better, other, result))
    if not pairs:
        note = "not tested: a test needs two or more seeds of each setting, as in -m seed=0,1,2"
        if sum(len(g.values(split)) > 1 for g in ranked) > 1:
            note = "not tested: the differences do not vary from seed to seed"
        return [], Section(title, [], notes=(note,))
    corrected = holm([result.p for _, _, result in pairs])
    tests = [
        {"better": better.letter, "other": other.letter, **asdict(result), "p_holm": p, "holds": p < LEVEL}
        for (better, other, result), p in zip(pairs, corrected, strict=True)
    ]
    shown = tests if len(tests) <= MOST_PAIRS else [t for t in tests if t["better"] == ranked[0].letter]
    rows = [["", "difference", "95% interval", "test", "p"]]
    for t in shown:
        count = f"n = {t['n'][0]}" if t["paired"] else f"n = {t['n'][0]}, {t['n'][1]}"
        rows.append(
            [
                f"{t['better']} beats {t['other']}" if t["holds"] else f"{t['better']} ? {t['other']}",
                f"{100 * t['mean']:+.2f}",
                f"{100 * t['low']:+.2f} … {100 * t['high']:+.2f}",
                f"{'paired' if t['paired'] else 'Welch'}, {count}",
                f"{t['p_holm']:.2g}",
            ]
        )
    notes = [f"? means not significant: p is {LEVEL} or more"] if any(not t["holds"] for t in shown) else []
    if len(tests) > 1:
        notes.append(f"p is corrected for {len(tests)} tests (Holm); the intervals are not")
    if len(shown) < len(tests):
        notes.append(f"shown: the best against the others; comparison.json has all {len(tests)} pairs")
    bold = tuple(n for n, t in enumerate(shown, start=1) if t["holds"])
    return tests, Section(title, rows, bold, tuple(notes))


def _curve(g: Group, key: str) -> list[float | None]:
    """Return the mean of a history column over the group's finished runs for each epoch; None if one has no value."""
    runs = [r for r in g.runs if r.state == "done"] or g.runs
    columns = ([row.get(key) for row in r.history] for r in runs)
    return [None if None in v else statistics.fmean(v) for v in zip(*columns, strict=False)]


# -- text, page and figure


def to_text(comparison: Comparison, width: int, bold: bool = False) -> str:
    """Return the comparison for a terminal of `width` columns; `bold` adds escape codes for bold text."""
    lines: list[str] = []
    for section in comparison.sections:
        lines += ["", section.title]
        lines += _table(section, width, bold)
        for note in section.notes:
            lines += textwrap.wrap(shorten(note, 1000), width, initial_indent="  ", subsequent_indent="    ")
        if section.title == "Results" and any(len(_measured_values(curve)) > 1 for _, curve in comparison.curves):
            lines += ["", *_sparklines(comparison, width)]
    return "\n".join(lines[1:])


def _table(section: Section, width: int, bold: bool) -> list[str]:
    if not section.rows:
        return []
    rows = [[f"  {row[0]}", *row[1:]] for row in section.rows]
    columns = len(rows[0]) - 1
    # do not shorten the names of metrics, because two shortened names can be equal
    shrink = [0, 1] if columns == 1 else [] if section.title == "Results" else [0]
    for count in range(columns, min(columns, 2) - 1, -1):  # as many columns side by side as fit, the others below them
        blocks = [[[row[0], *row[n : n + count]] for row in rows] for n in range(1, columns + 1, count)]
        lines = [line for block in blocks for line in format_table(block, "<" * len(block[0]), width, shrink)]
        if max(map(len, lines)) <= width:
            break
    else:  # one line per cell
        header, *others = section.rows
        cells = [
            [f"  {row[0]}" if n == 0 else "", name, value]
            for row in others
            for n, (name, value) in enumerate(zip(header[1:], row[1:], strict=True))
        ]
        return format_table(cells, "<<<", width, shrink=[0, 2])
    if bold:
        lines = [f"\x1b[1m{line}\x1b[0m" if n % len(rows) in section.bold else line for n, line in enumerate(lines)]
    return lines


def _measured_values(curve: Sequence[float | None]) -> list[float]:
    return [value for value in curve if value is not None]


def _sparklines(comparison: Comparison, width: int) -> list[str]:
    """Draw each group's curve as a line of bars, all on one scale; long curves show every k-th epoch."""
    values = [v for _, curve in comparison.curves for v in _measured_values(curve)]
    low, high = min(values), max(values)
    longest = max(len(curve) for _, curve in comparison.curves)
    every = -(-longest // max(1, width - 20))
    lines = [f"  {comparison.by_epoch} accuracy by epoch, ▁ {low:.1%} to █ {high:.1%}"]
    for letter, curve in comparison.curves:
        scale = (len(_BARS) - 1) / ((high - low) or 1)
        bars = [" " if v is None else _BARS[round(scale * (v - low))] for v in curve[every - 1 :: every]]
        last = _measured_values(curve)[-1:]
        lines.append(f"  {letter}  {''.join(bars)}" + (f"  {last[0]:.1%}" if last else ABSENT))
    return lines


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:var(--ink)}
table{border-collapse:collapse;margin:.5em 0}th,td{border:1px solid var(--pale);padding:.2em .7em;text-align:left}
th{background:var(--palest)}td:first-child{font-weight:500}tr.bold td{font-weight:700}tr:not(.bold) td{font-weight:400}
p{margin:.2em 0;color:var(--soft)}img{max-width:100%}h2{font-size:1.1em;margin-top:1.6em}.wide{overflow-x:auto}"""


def to_page(comparison: Comparison, picture: bytes) -> str:
    """Return the comparison as one HTML page that has no script, loads nothing and escapes every name."""
    parts = []
    for section in comparison.sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        rows = []
        for n, row in enumerate(section.rows):
            mark = "th" if n == 0 and row[0] == "" else "td"
            cells = "".join(f"<{mark}>{html.escape(cell)}</{mark}>" for cell in row)
            rows.append(f"<tr{' class=bold' if n in section.bold else ''}>{cells}</tr>")
        if rows:
            parts.append(f"<div class=wide><table>{''.join(rows)}</table></div>")
        parts += [f"<p>{html.escape(note)}</p>" for note in section.notes]
        if section.title == "Results":
            data = base64.b64encode(picture).decode()
            parts.append(f'<img alt="training loss and accuracy by epoch" src="data:image/png;base64,{data}">')
    names = ", ".join(letter for letter, _ in comparison.curves)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">"
        f'<meta name="viewport" content="width=device-width"><title>Comparison of {names}</title>'
        f"<style>{CSS}{_STYLE}</style></head><body><h1>Comparison of {names}</h1>{''.join(parts)}</body></html>\n"
    )


@styled()
def draw_comparison(groups: Sequence[Group], split: str) -> Figure:
    """Draw training loss and accuracy of every run by epoch; a colour for each group."""
    figure = new_figure(figsize=(11, 3.6 + 0.21 * len(groups)))  # the legend has a line for each group
    axes = figure.subplots(1, 2)
    split = _by_epoch(groups, split)
    for number, g in enumerate(groups):
        style: dict[str, Any] = {"color": PALETTE[number % len(PALETTE)], "label": g.letter}
        style["linestyle"] = ("-", "--", ":")[number // len(PALETTE)]
        for run in g.runs:
            plot_history(axes, run.history, ("train_loss", f"{split}_accuracy"), **style)
            style.pop("label", None)  # one legend entry for all seeds
    axes[0].set(title="Training loss", ylabel="training loss")
    axes[1].set(title=f"{split.capitalize()} accuracy", ylabel="correctly classified images")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    for axis in axes:
        epoch_axis(axis, [row["epoch"] for g in groups for run in g.runs for row in run.history])
    names = plain(f"{g.letter}  {shorten(_describe(g), 90)}" for g in groups)
    figure.legend(axes[0].get_legend_handles_labels()[0], names, loc="outside lower center")
    return figure
