"""Launch the jobs of a sweep: skip finished jobs, continue after a failed one, and overwrite nothing.

Parallel jobs on one machine use one GPU each. joblib divides the CPU threads among its workers.
"""

import contextlib
import io
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.runs.command import read_command
from zfnet.runs.console import explain
from zfnet.runs.directory import RunDirectory, objective, write_atomically
from zfnet.training.build import check_recipe

TRIAL = "ZFNET_TRIAL"  # key of `hydra.job.env_set`: the number of the trial that a job belongs to


class NoObjective(UserError):
    """A job of a search has no validation accuracy."""

    def __init__(
        self,
        message: str = "hydra/sweeper=optuna searches by validation accuracy, and this job has none: train with images "
        "held out (data.validation), in a new sweep directory",
    ) -> None:
        super().__init__(message)


class SweepFailed(UserError):
    """Some jobs of a sweep failed; the message names them, one per line. The others are finished."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended. `value`: its objective, None if it has none; `error`: why it failed."""

    name: str
    state: str
    value: float | None = None
    error: Exception | None = None


class SweepJobs:
    """Launches jobs, given as overrides, with the launcher that the config names, and keeps their outcomes by name."""

    def __init__(self, context: HydraContext, launcher: Launcher, config: DictConfig) -> None:
        self.context, self.launcher, self.config = context, launcher, config
        self.folder = Path(str(config.hydra.sweep.dir))
        self.outcomes: dict[str, Outcome] = {}
        self.for_all_jobs: list[str] = []  # overrides of every job
        self.composed: dict[tuple[str, ...], DictConfig] = {}  # a cache: composing is slower than checking
        # `${hydra:…}` needs a running job; within Hydra's own config `${hydra.…}` gives the same value
        unresolved = OmegaConf.to_container(config.hydra.sweep, resolve=False)
        self.subdir = str(unresolved["subdir"]).replace("${hydra:", "${hydra.")  # type: ignore[index,call-overload]
        setup_globals()

    def leave_out_of_names(self, keys: Sequence[str]) -> None:
        """Leave these keys out of the names of the jobs' directories."""
        excluded = self.config.hydra.job.config.override_dirname.exclude_keys
        names = ",".join(f"'{key}'" for key in dict.fromkeys([*excluded, *keys]))
        self.for_all_jobs = [f"hydra.job.config.override_dirname.exclude_keys=[{names}]"]

    def compose(self, overrides: Sequence[str], number: int = 0) -> DictConfig:
        """Return the config of one job; raise HydraException if a key or a choice does not exist."""
        config = self.composed.pop(tuple(overrides), None)  # `check` has composed it; only its number differs
        if config is None:
            config = self.context.config_loader.load_sweep_config(self.config, [*self.for_all_jobs, *overrides])
        with open_dict(config), read_write(config.hydra):
            config.hydra.job.num = number
            config.hydra.job.id = str(number)
            config.hydra.sweep.subdir = self.subdir
        return config

    def check(self, jobs: Sequence[Sequence[str]]) -> None:
        """Compose and check the config of every job before any job starts; raise UserError for the first error."""
        before = HydraConfig.instance().cfg
        names: dict[str, Sequence[str]] = {}
        try:
            for number, overrides in enumerate(jobs):
                try:
                    config = self.compose(overrides, number)
                    self.composed[tuple(overrides)] = config
                    HydraConfig.instance().set_config(config)  # `${hydra:…}` then has this job's values
                    checked = _checked_config(config)
                    if checked.job.trains:
                        check_recipe(checked)
                    name = str(config.hydra.sweep.subdir)
                    if names.setdefault(name, overrides) != overrides:
                        raise UserError(f"hydra.sweep.subdir={name}: is also another job's; name all swept keys in it")
                except (UserError, HydraException, OmegaConfBaseException, ValueError) as error:
                    shared = set(overrides).intersection(*jobs)
                    own = " ".join(each for each in overrides if each not in shared)
                    argv = (*self.config.hydra.overrides.hydra, *overrides)
                    problem = f"no job has started: {explain(error, argv, self.context.config_loader)}"
                    raise UserError(f"{problem} (the job {own})" if own else problem) from error
        finally:
            HydraConfig.instance().cfg = before

    def launch(self, batch: Sequence[Sequence[str]], first: int) -> list[Outcome]:
        """Run one job for each list of overrides; job n of the batch has the number `first` + n.

        Raises HydraException if a config cannot be composed, before any job starts. A failed job is an Outcome.
        """
        configs = [self.compose(overrides, first + n) for n, overrides in enumerate(batch)]
        self._write_record()
        # launchers number jobs consecutively, so no job may be skipped if directory names depend on numbers
        numbered = re.search(r"job\.(num|id)\b", self.subdir)
        finished = {n: o for n, c in enumerate(configs) if not numbered and (o := self._finished(c))}
        for outcome in finished.values():
            print(f"finished already: {outcome.name}")
        unfinished = [n for n in range(len(batch)) if n not in finished]
        returns: Sequence[JobReturn | Exception] = []
        if unfinished:
            jobs = [[*self.for_all_jobs, *batch[n]] for n in unfinished]
            try:
                returns = self.launcher.launch(jobs, initial_job_idx=first + unfinished[0])
            except KeyboardInterrupt:
                self._report()
                raise
            except Exception as error:  # a job's process died, so the launcher returned no results at all
                returns = [error] * len(jobs)
        ended = {n: self._outcome(configs[n], r) for n, r in zip(unfinished, returns, strict=True)}
        outcomes = [(finished | ended)[n] for n in range(len(batch))]
        self.outcomes |= {outcome.name: outcome for outcome in outcomes}
        return outcomes

    def finish(self) -> None:
        """Raise SweepFailed if any job failed."""
        failed = [f"  {o.name}: {explain(o.error)}" for o in self.outcomes.values() if o.error is not None]
        if failed:
            self._report()
            raise SweepFailed("\n".join([f"{len(failed)} of {len(self.outcomes)} jobs failed", *failed]))

    def _report(self) -> None:
        """Call `on_multirun_end` of the callbacks, because Hydra skips it when a sweeper raises."""
        self.context.callbacks.on_multirun_end(config=self.config, config_name=None)

    def _write_record(self) -> None:
        """Write the sweep's config to multirun.yaml, or to multirun-2.yaml … if another sweep has written that file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text, path = OmegaConf.to_yaml(self.config), self.folder / "multirun.yaml"
        numbers = itertools.count(2)
        while path.exists() and path.read_text(encoding="utf-8") != text:
            path = self.folder / f"multirun-{next(numbers)}.yaml"
        if not path.exists():
            write_atomically(path, text)

    def _finished(self, config: DictConfig) -> Outcome | None:
        """Return the outcome of a finished training with this config; None for all other jobs."""
        name = str(config.hydra.sweep.subdir)
        run = RunDirectory(self.folder / name)
        if run.state != "done" or config.job.name != "train":
            return None
        try:
            recorded, wanted = run.read_config(), _checked_config(config)
            if (recorded.identity(), recorded.data.root) != (wanted.identity(), wanted.data.root):
                return None  # if only the data's path differs, the job compares the content
            return Outcome(name, "done", objective(run.read_json("results.json")))
        except (UserError, KeyError, TypeError):
            return None  # the job itself will report the problem

    def _outcome(self, config: DictConfig, returned: JobReturn | Exception) -> Outcome:
        name = str(config.hydra.sweep.subdir)
        state = RunDirectory(self.folder / name).state
        if isinstance(returned, Exception):
            error = None if state in ("done", "pruned") else returned
            return self._finished(config) or Outcome(name, state, error=error)
        result = outcome_of_job(returned)
        if isinstance(result, Exception):
            return Outcome(name, "failed", error=result)
        return Outcome(name, state, result)


def _checked_config(config: DictConfig) -> Config:
    """Return the checked config of a job that Hydra composed; raise UserError."""
    raw = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return read_command(raw, config.hydra.overrides.task, config.hydra.runtime.config_sources)


def outcome_of_job(returned: JobReturn) -> float | Exception | None:
    """Return what a job returned, or the error that it raised."""
    with contextlib.redirect_stderr(io.StringIO()):  # the property raises a job's error and also prints it
        try:
            return returned.return_value
        except Exception as error:
            return error


_gpu: FileLock | None = None  # locked until this process ends


def take_one_gpu(parallel: int, folder: Path) -> None:
    """Make only one GPU visible to this process, if `parallel` processes run at the same time; -1 means one per core.

    Call it before the process first uses CUDA, which reads CUDA_VISIBLE_DEVICES once. Locks in `folder` assign the
    GPUs; the system releases them when a process ends. A process keeps its GPU for all its jobs.
    """
    global _gpu
    if parallel in (0, 1) or _gpu is not None:
        return
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    all_gpus = ",".join(map(str, range(torch.cuda.device_count()))) if named is None else named
    devices = [name.strip() for name in all_gpus.split(",") if name.strip()]
    if len(devices) < 2:
        return
    (folder / ".gpus").mkdir(parents=True, exist_ok=True)
    for number in itertools.count():  # find the first number that no running process has locked
        lock = FileLock(folder / ".gpus" / str(number))
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            _gpu = lock
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
            return
