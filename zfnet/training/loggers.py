"""Loggers, besides history.csv: TensorBoard, a CSV file, Weights & Biases, MLflow, Trackio, or your own."""

import contextlib
import csv
import importlib
import io
import logging
import os
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from zfnet.config.errors import UserError, describe_fault, log, one_line
from zfnet.config.schema import flatten
from zfnet.model.layers import evaluation_mode
from zfnet.runs.directory import RunDirectory, write_atomically


@dataclass(frozen=True)
class LoggedRun:
    """Describes the run for a logger's `start`.

    folder: the run directory; config: as recorded, nested; step: 0, or the step at which a resumed run continues;
    model: on the CPU or a GPU, read-only; image_size: side of its input in pixels; samples: images, uint8 [N, h, w, 3]
    """

    folder: Path
    config: Mapping[str, Any]
    step: int
    model: nn.Module
    image_size: int
    samples: Tensor


class Logger:
    """Base class of loggers. Override the methods that you need, and name your class in `conf/logger`.

    Metrics are named `step/…` within an epoch (means since the epoch began), `epoch/…` at its end, and `result/…` at
    the end of the run. Only the main process has loggers, and they do not affect the training.
    """

    def start(self, run: LoggedRun) -> None:
        """Called before the first step of this process."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Called with the metrics of a step (`step/…`: counted in optimizer steps) or an epoch (`epoch/…`)."""

    def figure(self, name: str, path: Path, step: int) -> None:
        """Called with each figure that the run draws, a PNG file."""

    def finish(self, results: Mapping[str, float]) -> None:
        """Called with the final results, after a run that was not stopped."""

    def close(self) -> None:
        """Called at the end, however the run ended."""


def call_loggers(loggers: dict[str, Logger], method: str, *arguments: Any) -> None:
    """Call a method of all loggers. A logger that fails is closed and removed, with a warning."""
    for name, logger in [*loggers.items()]:
        try:
            getattr(logger, method)(*arguments)
        except Exception as error:  # a service can raise any exception, which must not end a training
            end = "" if method == "close" else "; the run continues without this logger"
            log.warning("%s%s", describe_fault(f"logger.{name}", logger, error), end)
            del loggers[name]
            if method != "close":
                with contextlib.suppress(Exception):
                    logger.close()


STEP_COLUMNS = ("step", "train_loss", "train_accuracy", "lr")


class CSVLogger(Logger):
    """Writes metrics within epochs to `steps.csv` in the run directory. A resumed run drops rows that it repeats."""

    def start(self, run: LoggedRun) -> None:
        path = run.folder / "steps.csv"
        rows: list[dict[str, Any]] = []
        if run.step and path.is_file():
            try:
                with open(path, newline="", encoding="utf-8") as file:
                    # a crash of the system can cut the last line, which then has no `lr`
                    rows = [row for row in csv.DictReader(file) if row["lr"] and int(row["step"]) <= run.step]
            except (LookupError, TypeError, ValueError, csv.Error) as error:
                raise UserError(f"{path} is damaged: delete it to continue") from error
        RunDirectory(run.folder).write_csv(path.name, rows, STEP_COLUMNS)  # atomic: if it fails, the old file stays
        self.file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 (open until `close`)
        self.writer = csv.DictWriter(self.file, STEP_COLUMNS, lineterminator="\n")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        row = {key.removeprefix("step/"): value for key, value in values.items() if key.startswith("step/")}
        if row:
            self.writer.writerow({"step": step, **row})
            self.file.flush()

    def close(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


class TensorBoardLogger(Logger):
    """Writes event files to `tensorboard/` in the run directory: scalars, graph, images and hyperparameters."""

    def start(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # the import takes a second

        self.config, previous = run.config, threading.excepthook

        def hook(failure: threading.ExceptHookArgs) -> None:
            # print no traceback for an error of the writer's thread, which the next call of the writer raises again
            if not type(failure.thread).__module__.startswith("tensorboard."):
                previous(failure)

        threading.excepthook, self.hooks = hook, (hook, previous)
        # hides the events that an interrupted process wrote after this step
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step + 1)
        if run.step == 0:
            self._graph(run)
            self.writer.add_images("train/samples", run.samples, dataformats="NHWC")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def figure(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as file:
            self.writer.add_image(name, np.asarray(file.convert("RGB")), step, dataformats="HWC")

    def finish(self, results: Mapping[str, float]) -> None:
        # TensorBoard accepts plain values only, so lists and nulls become text
        plain = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flatten(self.config).items()}
        # run_name="." writes them to this run; by default `add_hparams` creates a second run
        self.writer.add_hparams(plain, dict(results), run_name=".")

    def close(self) -> None:
        try:
            if hasattr(self, "writer"):
                with contextlib.closing(self.writer):
                    self.writer.flush()  # raises the error of the writer's thread; `close` would lose it
        finally:
            if hasattr(self, "hooks") and threading.excepthook is self.hooks[0]:
                threading.excepthook = self.hooks[1]

    def _graph(self, run: LoggedRun) -> None:
        """Draw the network's graph, without changing the model's mode or weights."""
        device = next(run.model.parameters()).device
        try:
            with warnings.catch_warnings(), torch.no_grad(), evaluation_mode(run.model):
                warnings.simplefilter("ignore")
                self.writer.add_graph(run.model, torch.zeros(1, 3, run.image_size, run.image_size, device=device))
        except Exception as error:  # PyTorch's tracer can fail; a missing graph must not stop a training
            log.warning("TensorBoard: the graph could not be drawn (%s)", one_line(error))


class WandbLogger(Logger):
    """Writes to Weights & Biases: offline to `wandb/` in the run directory, unless `mode` is online.

    A resumed run continues with the same id. The axis of `step/…` metrics is the step, that of `epoch/…` the epoch.
    """

    def __init__(self, project: str = "zfnet", entity: str | None = None, mode: str = "offline") -> None:
        if mode not in ("offline", "online"):
            raise ValueError(f"mode={mode} must be offline or online")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.wandb = _import("wandb")
        self.project, self.entity, self.mode = project, entity, mode

    def start(self, run: LoggedRun) -> None:
        quiet = {"console": "off", "silent": True, "disable_git": True, "save_code": False}
        # do not record the computer, because environment.json describes it
        quiet |= dict.fromkeys(("x_disable_stats", "x_disable_meta", "x_disable_machine_info"), True)
        self.run = self.wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            dir=str(run.folder),
            name=run.folder.name,
            id=_stored_id(run.folder / "wandb" / "run_id", lambda: uuid.uuid4().hex[:12]),
            resume="allow" if self.mode == "online" else None,
            config=dict(run.config),
            settings=self.wandb.Settings(**quiet),
        )
        for axis in ("step", "epoch"):
            self.run.define_metric(f"{axis}/*", step_metric=axis)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, next(iter(values)).split("/")[0]: step})

    def figure(self, name: str, path: Path, step: int) -> None:
        self.run.log({f"figures/{name}": self.wandb.Image(str(path))})

    def finish(self, results: Mapping[str, float]) -> None:
        self.run.summary.update(dict(results))

    def close(self) -> None:
        if hasattr(self, "run"):
            self.run.finish()


class MLflowLogger(Logger):
    """Writes to MLflow: to the database `mlflow/mlflow.db` in the run directory, or to the server `tracking_uri`.

    A resumed run continues the same MLflow run.
    """

    def __init__(self, experiment: str = "zfnet", tracking_uri: str | None = None) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        self.mlflow = _import("mlflow")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.experiment, self.uri, self.status = experiment, tracking_uri, "KILLED"

    def start(self, run: LoggedRun) -> None:
        folder = run.folder.absolute() / "mlflow"
        folder.mkdir(exist_ok=True)
        client = self.mlflow.MlflowClient(self.uri or f"sqlite:///{folder / 'mlflow.db'}")

        def create() -> str:
            known = client.get_experiment_by_name(self.experiment)
            artifacts = None if self.uri else (folder / "artifacts").as_uri()
            number = known.experiment_id if known else client.create_experiment(self.experiment, artifacts)
            made = str(client.create_run(number, run_name=run.folder.name).info.run_id)
            param = self.mlflow.entities.Param
            settings = [param(key, str(value)[:500]) for key, value in flatten(run.config).items()]
            for first in range(0, len(settings), 100):  # a server's limit per request
                client.log_batch(made, params=settings[first : first + 100])
            return made

        self.id, self.client = _stored_id(folder / "run_id", create), client
        client.update_run(self.id, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self.mlflow.entities.Metric(k, v, now, step) for k, v in values.items()]
        self.client.log_batch(self.id, metrics=metrics)

    def figure(self, name: str, path: Path, step: int) -> None:
        self.client.log_artifact(self.id, str(path), "figures")

    def finish(self, results: Mapping[str, float]) -> None:
        self.log(0, results)
        self.status = "FINISHED"

    def close(self) -> None:
        if hasattr(self, "client"):
            self.client.set_terminated(self.id, self.status)


class TrackioLogger(Logger):
    """Writes to Trackio's database on this computer, which `trackio show` displays, or to a Hugging Face Space.

    The user's runs share one database (the environment variable TRACKIO_DIR sets its folder). A resumed run continues
    under the same name.
    """

    def __init__(self, project: str = "zfnet", space_id: str | None = None) -> None:
        if space_id is None:
            os.environ.setdefault("HF_HUB_OFFLINE", "1")  # otherwise Trackio looks for a login on this computer
        self.trackio = _import("trackio")
        self.project, self.space_id = project, space_id

    def start(self, run: LoggedRun) -> None:
        path = run.folder / "trackio" / "run_name"
        name = _stored_id(path, lambda: f"{run.folder.name}-{uuid.uuid4().hex[:8]}")
        quiet: dict[str, Any] = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
        with contextlib.redirect_stdout(io.StringIO()):
            self.run = self.trackio.init(
                project=self.project,
                name=name,
                resume="allow",
                space_id=self.space_id,
                config=flatten(run.config),
                **quiet,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if any(key.startswith("step/") for key in values):
            self.run.log(dict(values), step)
        else:  # Trackio has one axis only; without a step, an epoch comes after its steps
            self.run.log({**values, "epoch": step})

    def figure(self, name: str, path: Path, step: int) -> None:
        self.run.log({f"figures/{name}": self.trackio.Image(str(path))}, step)

    def finish(self, results: Mapping[str, float]) -> None:
        self.run.log(dict(results))

    def close(self) -> None:
        if hasattr(self, "run"):
            with contextlib.redirect_stdout(io.StringIO()):
                self.trackio.finish()


def _import(package: str) -> Any:
    """Import an optional package; raise UserError that names the extra of pyproject.toml that installs it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(f"this needs {error.name}: pip install -e '.[{package}]'") from error


def _stored_id(path: Path, create: Callable[[], str]) -> str:
    """Return the content of a file; if it does not exist, write the result of `create` to it first."""
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, create())
    return path.read_text(encoding="utf-8")


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """Return one line about an epoch, within 80 columns unless test is measured."""
    parts = [f"epoch {row['epoch']:{len(str(epochs))}d}/{epochs}"]
    for name in ("train", "validation", "test"):
        if row.get(f"{name}_loss") is not None:
            parts.append(f"{name} {row[f'{name}_loss']:.4f} {row[f'{name}_accuracy']:.2%}")
    parts += [f"lr {row['lr']:.2g}", f"{row['images_per_second']:.0f}/s"]
    return "  ".join(parts)
