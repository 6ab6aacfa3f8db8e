"""The jobs, one a file. `run_job` finds the one that the config names."""

from __future__ import annotations

import importlib
from pathlib import Path

from zfnet.config import Config


def run_job(config: Config, output: Path, overrides: list[str]) -> float | None:
    """Run the job that `config.job.name` names; `output` is the directory that Hydra made for it.

    Returns what a sweep may optimise: a training's validation accuracy. Each job's module is imported only
    when it runs, so that a small one starts quickly.
    """
    job = importlib.import_module(f"zfnet.jobs.{config.job.name}")
    result: float | None = job.main(config, output, overrides)
    return result
