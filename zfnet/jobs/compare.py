"""job=compare: a sweep's table and figures, from its run directories."""

from __future__ import annotations

from pathlib import Path

from zfnet.config import Config
from zfnet.errors import UserError
from zfnet.sweeps.callback import summarize


def main(config: Config, output: Path, overrides: list[str]) -> None:
    """Write summary.csv, summary.md and the figures, and print the table; raise UserError where no training is."""
    folder = Path(config.job.sweep)
    text = summarize(folder, figures=True) if folder.is_dir() else ""
    if not text:
        raise UserError(f"job.sweep={folder}: there is no training run in it")
    print(text)
