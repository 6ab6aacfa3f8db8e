"""job=runs: list the runs below outputs/, newest first."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zfnet.config.errors import UserError
from zfnet.config.schema import Config, Job
from zfnet.runs.directory import RunDirectory, list_runs
from zfnet.runs.tables import format_table, shorten


@dataclass(frozen=True)
class Row:
    """One run. changed: seconds since 1970; accuracy: None where none is recorded; size: bytes on disk."""

    state: str
    changed: float
    job: str
    accuracy: float | None
    size: int
    folder: str


@dataclass(kw_only=True)
class RunsJob(Job):
    root: str

    def main(self, config: Config, output: Path) -> None:
        """Print the table; a damaged run is a line like any other. Raises UserError where there is no such folder."""
        root = Path(self.root).expanduser()
        if not root.is_dir():
            raise UserError(f"job.root={root}: there is no such folder")
        rows = sorted((describe(run) for run in list_runs(root)), key=lambda row: row.changed, reverse=True)
        if not rows:
            print(f"no runs below {root}")
            return
        # into a file or another program directories go whole
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print("\n".join(run_table(rows, time.time(), width)))


def describe(run: RunDirectory) -> Row:
    """Look at one directory, of which any file may be missing or damaged."""
    state = run.state
    if state == "running" and not run.in_use():
        state = "killed"
    changed, size = _on_disk(run.folder)
    return Row(state, changed, run.job or "?", _accuracy(run), size, str(run.folder))


def _accuracy(run: RunDirectory) -> float | None:
    with contextlib.suppress(UserError):
        results: Any = run.read_json("results.json")
        for split in ("test", "validation", "train", "all"):
            metrics = results.get(split) if isinstance(results, dict) else None
            value = metrics.get("accuracy") if isinstance(metrics, dict) else None
            if isinstance(value, (int, float)) and math.isfinite(value):
                return float(value)
    return None


def _on_disk(folder: Path) -> tuple[float, int]:
    """Return when anything in the folder changed last, and the size of all files in it."""
    changed, size = 0.0, 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(place, name))
            except OSError:  # gone meanwhile
                continue
            size += stat.st_size
            if name != ".lock":  # its time changes with each look at who holds it
                changed = max(changed, stat.st_mtime)
    return changed, size


def run_table(rows: list[Row], now: float, width: int | None) -> list[str]:
    """Return a header and a line a run; directories are shortened to fit `width`."""
    cells = [("state", "age", "job", "acc.", "size", "directory")]
    for row in rows:
        accuracy = "" if row.accuracy is None else f"{row.accuracy:.2%}"
        texts = (shorten(row.state, 8), _age(now - row.changed), shorten(row.job, 14), accuracy, _size(row.size))
        cells.append((*texts, row.folder))
    return format_table(cells, "<><>><", width, shrink=[5], gap=1)


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
