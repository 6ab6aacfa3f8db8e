"""Launching the jobs of a sweep: what is finished is skipped, what fails stops nobody, nothing is overwritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from zfnet.config.errors import UserError
from zfnet.runs.command import read_command
from zfnet.runs.console import explain
from zfnet.runs.directory import RunDirectory, objective, write_atomically


class SweepFailed(UserError):
    """Some jobs of a sweep failed; says which, a line each. The others are finished."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `value`: its objective, None where it has none; `error`: why it failed."""

    name: str
    state: str
    value: float | None
    error: Exception | None = None


class Jobs:
    """Launches jobs by their overrides, with whatever launcher the config names, and remembers which failed."""

    def __init__(self, context: HydraContext, launcher: Launcher, config: DictConfig) -> None:
        self.context, self.launcher, self.config = context, launcher, config
        self.folder = Path(str(config.hydra.sweep.dir))
        self.outcomes: dict[str, Outcome] = {}
        setup_globals()

    def _record(self) -> None:
        """Write the sweep's own config to multirun.yaml, or to multirun-2.yaml … if it is not the first one here."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text, number = OmegaConf.to_yaml(self.config), 1
        while True:
            path = self.folder / ("multirun.yaml" if number == 1 else f"multirun-{number}.yaml")
            if not path.exists():
                write_atomically(path, text)
                return
            if path.read_text(encoding="utf-8") == text:
                return
            number += 1

    def launch(self, batch: Sequence[Sequence[str]], first: int) -> list[Outcome]:
        """Run one job for each list of overrides; the n-th has the number `first` + n.

        Raises HydraException if one cannot be composed, before any has started. A job that fails is an Outcome.
        """
        composed = [self.compose(overrides, first + n) for n, overrides in enumerate(batch)]
        self._record()
        folders = [job_folder(config) for config in composed]
        outcomes: list[Outcome | None] = [
            self._finished(config, folder) for config, folder in zip(composed, folders, strict=True)
        ]
        open_ones = [n for n, outcome in enumerate(outcomes) if outcome is None]
        if open_ones:
            returns = self._launch([list(batch[n]) for n in open_ones], first + open_ones[0])
            for n, returned in zip(open_ones, returns, strict=True):
                outcomes[n] = self._outcome(folders[n], returned)
        found = [outcome for outcome in outcomes if outcome is not None]
        self.outcomes |= {outcome.name: outcome for outcome in found}
        return found

    def finish(self) -> None:
        """Have the sweep reported, and raise SweepFailed if any job failed."""
        failed = [o for o in self.outcomes.values() if o.error is not None]
        if failed:
            self._report()
            lines = [f"{len(failed)} of {len(self.outcomes)} jobs failed"]
            raise SweepFailed(
                "\n".join([*lines, *(f"  {o.name}: {explain(o.error)}" for o in failed if o.error)])
            )

    def _report(self) -> None:
        """Have the callbacks report the sweep, which Hydra leaves out when a sweeper raises."""
        self.context.callbacks.on_multirun_end(config=self.config, config_name=None)

    def compose(self, overrides: Sequence[str], number: int = 0) -> DictConfig:
        """Return the config of one job; raise HydraException if a key or a choice does not exist."""
        config = self.context.config_loader.load_sweep_config(self.config, list(overrides))
        with open_dict(config):
            config.hydra.job.num = number
            config.hydra.job.id = str(number)
        return config

    def _name(self, folder: Path) -> str:
        return folder.relative_to(self.folder).as_posix()

    def _finished(self, config: DictConfig, folder: Path) -> Outcome | None:
        """Return the outcome of a job that need not be run again; None for all others."""
        run = RunDirectory(folder)
        pattern = str(config.hydra.sweep._get_node("subdir"))
        if run.state != "done" or config.job.name != "train" or "job.num" in pattern or "job.id" in pattern:
            return None  # launchers number their jobs one after another: none may be left out if names depend on it
        try:
            task = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            if run.read_config().identity() != read_command(task, config.hydra.overrides.task).identity():
                return None
            value = objective(run.read_json("results.json"))
        except (UserError, KeyError, TypeError):
            return None  # whatever it is, the job itself will say so
        print(f"finished already: {self._name(folder)}")
        return Outcome(self._name(folder), "done", value)

    def _launch(self, batch: list[list[str]], first: int) -> Sequence[JobReturn | Exception]:
        try:
            return self.launcher.launch(batch, initial_job_idx=first)
        except KeyboardInterrupt:
            self._report()
            raise
        except Exception as error:  # a launcher in which a job's process died cannot answer for any of them
            return [error] * len(batch)

    def _outcome(self, folder: Path, returned: JobReturn | Exception) -> Outcome:
        name, state = self._name(folder), RunDirectory(folder).state
        if isinstance(returned, Exception):
            value = _objective_of(folder) if state == "done" else None
            return Outcome(name, state, value, None if state in ("done", "pruned") else returned)
        result: Any = returned._return_value  # the property raises a job's error, and prints
        if returned.status == JobStatus.FAILED:
            return Outcome(name, "failed", None, result)
        return Outcome(name, state, result)


def _objective_of(folder: Path) -> float | None:
    try:
        return objective(RunDirectory(folder).read_json("results.json"))
    except (UserError, KeyError, TypeError):
        return None


def job_folder(config: DictConfig) -> Path:
    """Return the directory that Hydra will give to the job with this composed config."""
    hydra: Any = HydraConfig.instance()
    before = hydra.cfg
    hydra.cfg = config  # `${hydra:…}` looks there
    try:
        return Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
    finally:
        hydra.cfg = before
