"""job=resume: continue a stopped run, in its own directory."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from zfnet.config.errors import UserError
from zfnet.config.schema import NOT_IDENTITY, Config, Job
from zfnet.jobs.reproduce import reproduce
from zfnet.jobs.train import run_as_worker, train
from zfnet.runs.directory import RunDirectory

_CHANGEABLE_DATA_KEYS = tuple(f"data.{key}" for key in (*NOT_IDENTITY["data"], "on_error"))


@dataclass(kw_only=True)
class ResumeJob(Job):
    reads_run: ClassVar[str] = "needed"
    trains: ClassVar[bool] = True

    def main(self, config: Config, output: Path) -> float | None:
        """Continue `run=<dir>` with that run's own config."""
        # trusted packages, loggers, the number of processes and the location of the data do not change the result; the
        # content of the data is compared with the record
        free = ("job", "run", "imports", "logger", "trainer.devices", *_CHANGEABLE_DATA_KEYS)
        for key, override in config.overridden.items():
            if key not in free and not key.startswith("logger."):
                raise UserError(
                    f"job=resume uses the run's own settings and accepts no others, such as {override}: "
                    "start a new run for other settings"
                )
        run = RunDirectory(str(config.run))
        if run_as_worker(config, output):
            return None
        recorded = run.read_config()
        if recorded.job.name == "reproduce":
            reproduce(replace(config, job=recorded.job, run=recorded.run), run)
            return None
        if recorded.job.name != "train":
            raise UserError(f"run={run.folder} was made by job={recorded.job.name}: only a training can be continued")
        return train(config, run)
