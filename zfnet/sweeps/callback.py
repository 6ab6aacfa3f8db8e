"""What Hydra calls around the jobs of a sweep: tables after each, figures and the table at the end.

Jobs may run in other processes or on other machines; there this object is a copy, and everything it needs it
reads from the sweep's directory.
"""

from __future__ import annotations

import logging
import textwrap
import time
import traceback
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from zfnet.plots.sweep import read_sweep
from zfnet.plots.sweep_tables import to_text, write_tables
from zfnet.runs.console import explain
from zfnet.runs.directory import RunDirectory, write_atomically
from zfnet.runs.hydra_record import register_resolvers
from zfnet.sweeps.sharing import share_machine

log = logging.getLogger("zfnet")

# in the process of a parallel launcher this module is imported before a job's directory is named
register_resolvers()


class SweepReport(Callback):
    """Keeps a sweep's summary up to date."""

    def __init__(self) -> None:
        self._not_before = 0.0  # summaries of long sweeps are not rewritten after every short job

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Give a parallel job its share of the machine, and say which job begins."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        share_machine(config.hydra.launcher.get("n_jobs", 1), Path(str(config.hydra.sweep.dir)))
        # what all jobs share need not be said
        shared = config.hydra.job.config.override_dirname.exclude_keys
        own = [w for w in config.hydra.overrides.task if w.partition("=")[0].lstrip("+~") not in shared]
        head = f"job {config.hydra.job.num}: "
        print("\n" + textwrap.fill(head + " ".join(own), 80, subsequent_indent=" " * len(head)), flush=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Note a failure that came before the run began, and bring the tables up to date."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir)
        if job_return.status == JobStatus.FAILED:
            error = job_return._return_value
            print(f"failed: {explain(error)}", flush=True)
            _note_failure(RunDirectory(folder), error)
        elif folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()  # Hydra made it, and the job had nothing to write
        if time.monotonic() >= self._not_before:
            began = time.monotonic()
            summarize(Path(str(config.hydra.sweep.dir)))
            self._not_before = time.monotonic() + 10 * (time.monotonic() - began)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write tables and figures, and show the table."""
        text = summarize(Path(str(config.hydra.sweep.dir)), figures=True)
        if text:
            print("\n" + text, flush=True)


def summarize(folder: Path, figures: bool = False) -> str:
    """Write a sweep's summary into its directory and return the terminal's table; nothing if it holds no training."""
    sweep = read_sweep(folder)
    if not sweep.jobs:
        return ""
    write_tables(sweep)
    if figures:
        # imported here: Hydra builds the callback for every command, and few of them draw
        from zfnet.plots.figures import save_figure
        from zfnet.plots.sweep_figures import draw_sweep

        for name, figure in draw_sweep(sweep).items():
            save_figure(figure, folder / "figures" / f"{name}.png")
    return to_text(sweep) + f"\nwritten to {folder}"


def _note_failure(run: RunDirectory, error: Exception) -> None:
    """Leave an account of a job whose config was refused; a directory that holds a run is not touched."""
    kept = {path.name for path in run.folder.iterdir()} if run.folder.is_dir() else set()
    if kept - {".lock", "status.json", "train.log"}:
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    run.set_status("failed", explain(error))
    write_atomically(run.folder / "train.log", "".join(traceback.format_exception(error)))
