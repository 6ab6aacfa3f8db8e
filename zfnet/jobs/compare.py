"""job=compare: a sweep's table and figures, from its run directories."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zfnet.config.errors import UserError
from zfnet.config.schema import Config, Job
from zfnet.sweeps.callback import summarize


@dataclass(kw_only=True)
class CompareJob(Job):
    sweep: str  # the directory of a sweep

    def main(self, config: Config, output: Path) -> None:
        """Write summary.csv, summary.md and the figures, and print the table; raise UserError without a training."""
        folder = Path(self.sweep)
        text = summarize(folder, figures=True) if folder.is_dir() else ""
        if not text:
            raise UserError(f"job.sweep={folder}: there is no training run in it")
        print(text)
