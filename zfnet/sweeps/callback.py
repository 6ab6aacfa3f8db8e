"""The part of a sweep that runs in each job: Hydra's callback, and a trial's report to its study.

Jobs can run in other processes or on other machines. There the callback is a copy, so it reads everything that it
needs from the sweep's directory.
"""

import functools
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from zfnet.config.errors import UserError
from zfnet.config.trust import parse_overrides
from zfnet.runs.console import explain
from zfnet.runs.directory import BEFORE_RUN, RunDirectory, remove_if_empty, sweep_folder, write_atomically
from zfnet.runs.hydra_record import register_resolvers
from zfnet.sweeps.launch import TRIAL, outcome_of_job, take_one_gpu
from zfnet.sweeps.summary import job_rows, read_sweep, to_markdown, to_text

# a parallel launcher's process imports this module before Hydra names a job's directory, which needs the resolvers
register_resolvers()


def _warn_on_error(method: Callable[..., None]) -> Callable[..., None]:
    """Print a UserError of a callback as one line; Hydra would print a Python warning with two lines."""

    @functools.wraps(method)
    def wrapped(*arguments: Any, **keywords: Any) -> None:
        try:
            method(*arguments, **keywords)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)

    return wrapped


class SweepReport(Callback):
    """Writes a sweep's tables after each job, and tables and figures at its end."""

    def __init__(self) -> None:
        self._next_summary = 0.0  # the earliest time to rewrite the summary, which is slow in long sweeps

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Assign a GPU to a parallel job, and print the job's number and overrides."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        take_one_gpu(config.hydra.launcher.get("n_jobs", 1), sweep_folder(config.hydra))
        shared = config.hydra.job.config.override_dirname.exclude_keys
        overrides = parse_overrides(config.hydra.overrides.task)
        own = [str(each.input_line).removeprefix("++") for each in overrides if each.key_or_group not in shared]
        head = f"job {config.hydra.job.num}: "
        print("\n" + textwrap.fill(head + " ".join(own), 80, subsequent_indent=" " * len(head)), flush=True)

    @_warn_on_error
    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Record a failure from before the run began, and update the tables."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir)
        result = outcome_of_job(job_return)
        if isinstance(result, Exception):
            print(f"failed: {explain(result)}", flush=True)
            _record_failure(RunDirectory(folder), result)
        else:
            remove_if_empty(folder)  # Hydra created it, and some jobs write nothing
        began = time.monotonic()
        if began >= self._next_summary:
            summarize(sweep_folder(config.hydra))
            self._next_summary = time.monotonic() + 10 * (time.monotonic() - began)

    @_warn_on_error
    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Write tables and figures, and print the table."""
        if text := summarize(Path(str(config.hydra.sweep.dir)), figures=True):
            print("\n" + text, flush=True)


def _record_failure(run: RunDirectory, error: Exception) -> None:
    """Write the status and the log of a job that failed before its run began; do not change a run's directory."""
    names = {path.name for path in run.folder.iterdir()} if run.folder.is_dir() else set()
    if names - set(BEFORE_RUN):
        return
    run.folder.mkdir(parents=True, exist_ok=True)
    run.set_status("failed", explain(error))
    write_atomically(run.folder / "train.log", "".join(traceback.format_exception(error)))


def in_search() -> bool:
    """Return whether this process runs a trial of a search; Hydra's own config says so on every machine."""
    return HydraConfig.initialized() and TRIAL in HydraConfig.get().job.env_set


def trial_report() -> Callable[[float, int], bool] | None:
    """Return a function that reports (validation accuracy, epoch) to this job's trial and returns whether to prune.

    Return None unless the job is a trial of a search that prunes.
    """
    if not in_search():
        return None
    from zfnet.sweeps.optuna_search import report_to_trial  # optuna is an optional dependency

    return report_to_trial(HydraConfig.get())


def summarize(folder: Path, figures: bool = False) -> str:
    """Write a sweep's summary into its directory, and return the terminal's table; empty if there is no training."""
    sweep = read_sweep(folder)
    if not sweep.jobs:
        return ""
    if (folder / "figures").is_symlink():
        raise UserError(f"{folder / 'figures'}: is a link: figures would be written elsewhere; replace it")
    RunDirectory(folder).write_csv("summary.csv", job_rows(sweep))
    write_atomically(folder / "summary.md", to_markdown(sweep))
    if figures:
        # import here, because Hydra imports this module for every command and few commands draw
        from zfnet.plots.figures import save_figure
        from zfnet.sweeps.figures import draw_sweep

        for name, figure in draw_sweep(sweep).items():
            save_figure(figure, folder / "figures" / f"{name}.png")
    return to_text(sweep) + f"\nwritten to {folder}"
