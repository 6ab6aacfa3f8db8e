"""job=runs: list the runs below outputs/."""

import difflib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zfnet.config.errors import UserError, did_you_mean, printable
from zfnet.config.schema import Config, Job, flatten
from zfnet.runs.directory import RunDirectory, list_runs
from zfnet.runs.tables import cut, format_table, shorten
from zfnet.runs.weights import recorded_accuracy

# jobs that train; "?" is a damaged run. A run of any other job counts as a training if it has a history.csv
_TRAININGS = ("train", "extend", "fork", "reproduce", "?")


@dataclass(frozen=True)
class Row:
    """One run.

    changed: seconds since 1970; model, data: empty for a comparison of runs; size: bytes on disk
    accuracy: the split and the accuracy on it; None if none is recorded
    overrides: the overrides of the command, without those of Hydra and of the job
    """

    state: str
    changed: float
    job: str
    model: str
    data: str
    accuracy: tuple[str, float] | None
    size: int
    overrides: str
    folder: str


@dataclass(kw_only=True)
class RunsJob(Job):
    root: str
    all: bool
    sort: Literal["age", "accuracy", "size", "state", "model", "data", "directory"]
    where: list[str]

    def main(self, config: Config, output: Path) -> None:
        """Print the table, which lists damaged runs, too.

        Raises UserError if the folder does not exist, and for a key of `where` that no run has.
        """
        root = Path(os.path.expanduser(self.root))
        if not root.is_dir():
            raise UserError(f"job.root={root}: there is no such folder")
        pairs = [re.split("[:=]", each, maxsplit=1) for each in self.where]
        if bad := [each for each, pair in zip(self.where, pairs, strict=True) if len(pair) < 2]:
            raise UserError(f"job.where={bad[0]}: must be key:value, as in 'job.where=[state:done,optimizer.lr:0.01]'")
        known: set[str] = set()
        rows, hidden = [], 0
        for run in list_runs(root):
            plain = run.plain_config()
            job = _name(plain.get("job"))
            if not self.all and job not in _TRAININGS and not (run.folder / "history.csv").is_file():
                hidden += 1
                continue
            row = describe(run, plain)
            values = flatten(plain) | {key: getattr(row, key) for key in ("state", "job", "model", "data")}
            known |= values.keys()
            if all(key in values and _equal(values[key], wanted) for key, wanted in pairs):
                rows.append(row)
        for key, _ in pairs if known else ():
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
                advice = did_you_mean(key, close) or "; known: state, job, model, data, or a key of --cfg job"
                raise UserError(f"job.where: no run has a key {key}{advice}"[:500])
        if rows:
            rows.sort(key=lambda row: (_rank(row, self.sort), -row.changed))
            # do not shorten directories in a file or a pipe
            width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
            print("\n".join(run_table(rows, time.time(), width)))
        else:
            print(f"no {'such ' if self.where and known else ''}runs below {root}")
        if hidden:
            print(f"not shown: {hidden} of other jobs, such as predictions and figures (job.all=true)", file=sys.stderr)


def _rank(row: Row, by: str) -> Any:
    """Return a sort key: the newest, best or largest run first, names from a to z."""
    if by == "accuracy":  # rank each split separately
        split, value = row.accuracy or ("", 0.0)
        return split != "validation", not split, split, -value
    if by in ("age", "size"):
        return -(row.changed if by == "age" else row.size)
    return row.folder if by == "directory" else getattr(row, by)


def describe(run: RunDirectory, plain: Mapping[str, Any]) -> Row:
    """Describe one directory, in which any file can be missing or damaged; `plain` is its config."""
    changed, size = _on_disk(run.folder)
    one_network = plain.get("runs") is None  # only job=compare sets `runs`, and its model and data are unused
    return Row(
        run.state,
        changed,
        _name(plain.get("job")),
        _name(plain.get("model")) if one_network else "",
        _name(plain.get("data")) if one_network else "",
        recorded_accuracy(run),
        size,
        " ".join(run.overrides),
        str(run.folder),
    )


def _name(group: Any) -> str:
    """Return the name of a recorded config group, or the class that its `_target_` names."""
    name = group.get("name") or str(group.get("_target_", "?")).rpartition(".")[2] if isinstance(group, dict) else "?"
    return str(name)


def _equal(value: Any, wanted: str) -> bool:
    """Return whether a recorded value equals the value of the text `wanted`: 1e-3 equals 0.001, null equals None."""
    try:
        return float(value) == float(wanted) and not isinstance(value, bool)
    except (TypeError, ValueError):
        plain = json.dumps(value) if value is None or isinstance(value, bool) else str(value)  # null, true, false
        return plain == wanted.strip()


def _on_disk(folder: Path) -> tuple[float, int]:
    """Return (time of the last change in the folder, total size of its files in bytes)."""
    changed, size = 0.0, 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(place, name))
            except OSError:  # another process has removed it
                continue
            size += stat.st_size
            if name != ".lock":  # `in_use` changes its time
                changed = max(changed, stat.st_mtime)
    return changed, size


def run_table(rows: list[Row], now: float, width: int | None) -> list[str]:
    """Return a header and two lines per run, shortened to `width`; without a width (file, pipe), one long line each."""
    cells = [("state", "age", "job", "accuracy", "size", "directory")]
    for row in rows:
        split, value = row.accuracy or ("", 0.0)
        accuracy = f"{value:.2%} {split.replace('validation', 'val.')}" if split else ""
        texts = (shorten(row.state, 8), _age(now - row.changed), shorten(row.job, 14), accuracy, _size(row.size))
        cells.append((*texts, row.folder))
    what = [("model", "data", "changed"), *((row.model, row.data, row.overrides) for row in rows)]
    if width is None:
        wide = [(*cell[:-1], *words, cell[-1]) for cell, words in zip(cells, what, strict=True)]
        return format_table(wide, "<><<><<<<", gap=1)
    align = "<><<><"
    if len({row.job for row in rows}) == 1:  # without this column, more directories fit
        cells, align = [(*cell[:2], *cell[3:]) for cell in cells], "<><><"  # type: ignore[misc]
    lines = format_table(cells, align, width, shrink=[len(align) - 1], gap=1)
    below = ["  " + ": ".join(filter(None, (model and f"{model} on {data}", changed))) for model, data, changed in what]
    pairs = zip(lines, (cut(printable(text), width) for text in below), strict=True)
    return [line for pair in pairs for line in pair if line.strip()]


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{max(0, seconds):.0f}s"


def _size(count: int) -> str:
    for unit, bytes_each in (("K", 2**10), ("M", 2**20)):
        if count < 1000 * bytes_each:
            return f"{count / bytes_each:.0f}{unit}"
    return f"{count / 2**30:.1f}G"
