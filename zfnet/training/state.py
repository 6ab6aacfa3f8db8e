"""The state that checkpoints save and resumes restore: model, optimizer, schedule, metrics and counters."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zfnet.config.errors import UserError, describe_fault, log, one_line
from zfnet.config.instantiate import is_number
from zfnet.config.schema import Config
from zfnet.runs.directory import HISTORY_COLUMNS
from zfnet.runs.session import Pruned
from zfnet.training.checkpoint import Checkpoint, load_optimizer, pack, strip_prefix, unpack
from zfnet.training.device import Runtime
from zfnet.training.metrics import Evaluation, RunningMetrics
from zfnet.training.processes import World
from zfnet.training.schedule import SCHEDULED, Schedule, schedule_span

LOWER_RATE = "lower optimizer.lr, or try scheduler.warmup_epochs=1 or trainer.clip_norm=1"
# keys of `data` that do not affect validation
_TRAINING_ONLY_KEYS = (
    *("batch_size", "sampler", "subset", "device_memory", "max_pixels", "draft", "cache_dir", "on_error", "test"),
)


class Callback:
    """Base class of callbacks. Override the hooks that you need; each receives the `TrainingState`.

    name: the callback's key in the config; checkpoints store the result of `state_dict` under this name
    monitor: a column of history.csv that it needs in each epoch, such as validation_loss; a run that does not measure
        it stops before its first step
    columns: names of additional columns of history.csv; `measure` returns their values

    A callback must be a function of the config, the step and its own state, so that a resumed run equals an
    uninterrupted one. Return the values that it keeps between steps (numbers, lists, tensors) from `state_dict`.
    """

    name = ""
    monitor: str | None = None
    columns: Sequence[str] = ()

    def on_fit_start(self, state: TrainingState) -> None:
        """Called before the first step of this process, before a checkpoint is loaded.

        If a branched run loads its parent's weights and has no state for this callback, it is called again.
        """

    def on_epoch_start(self, state: TrainingState) -> None:
        """Called before the first step of an epoch, and again after a resume in the middle of the epoch."""

    def on_before_optimizer_step(self, state: TrainingState) -> None:
        """Called in each step with the gradients of the whole batch, before they are clipped and used."""

    def on_optimizer_step(self, state: TrainingState) -> None:
        """Called in each step after the optimizer has changed the weights; a callback can change them further.

        The gradients are already cleared.
        """

    def on_step_end(self, state: TrainingState) -> None:
        """Called after each step; `state.step` includes it. Set `state.should_stop` to end after this epoch."""

    def measure(self, state: TrainingState, results: Mapping[str, Evaluation]) -> Mapping[str, float]:
        """Return a number for each of `columns`, for history.csv, the loggers and the `monitor` of other callbacks.

        Called after each epoch if there are `columns`, in the main process only. results: predictions, probabilities
        and labels of the evaluated sets, by name (validation, test)
        """
        raise NotImplementedError

    def on_epoch_end(self, state: TrainingState, row: Mapping[str, Any]) -> None:
        """Called after each epoch with its row of history.csv, to read. Set `state.should_stop` to end the training."""

    def on_fit_end(self, state: TrainingState) -> None:
        """Called after the last epoch."""

    def on_exception(self, state: TrainingState, error: BaseException) -> None:
        """Called when an error, a signal or pruning ends the training, before the error is raised again."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save in checkpoints: tensors, numbers, text, and lists, tuples and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict()` returned."""


def measured_columns(sets: Iterable[str]) -> list[str]:
    """Return the columns of history.csv that contain metrics, if these sets are evaluated after each epoch."""
    return [f"{name}_{metric}" for name in ("train", *sets) for metric in ("loss", "accuracy")]


def check_columns(callbacks: Iterable[Callback], measured: Iterable[str]) -> None:
    """Raise UserError if a callback adds a column that exists already, or monitors a column that is not measured.

    measured: the columns of the program's own metrics
    """
    callbacks, columns = list(callbacks), list(measured)
    for callback in callbacks:
        slot = f"callbacks.{callback.name}"
        if isinstance(callback.columns, str) or (callback.columns and type(callback).measure is Callback.measure):
            raise UserError(f"{slot}: columns must be a list of the names of the values that measure() returns")
        if not callback.columns and type(callback).measure is not Callback.measure:
            raise UserError(f"{slot}: has measure(), but columns does not name the values that it returns")
        if taken := [name for name in callback.columns if name in (*HISTORY_COLUMNS, *columns)]:
            raise UserError(f"{slot}: history.csv already has a column {taken[0]}; choose another")
        columns += callback.columns
    for callback in callbacks:
        name, monitor = callback.name, callback.monitor
        if monitor is not None and monitor not in columns:
            raise UserError(f"callbacks.{name}.monitor={monitor}: is not measured; known: {', '.join(columns)}")


def set_optimizer_mode(optimizer: Optimizer, mode: str) -> None:
    """Call the optimizer's `train` or `eval`, if it has them.

    Schedule-free optimizers then switch between the weights to train and the average of the weights to evaluate.
    """
    if hasattr(optimizer, mode):
        getattr(optimizer, mode)()


@dataclass(eq=False, repr=False)
class TrainingState:
    """One training: model, optimizer, schedule, metrics and progress.

    There is no random state: order, augmentation and dropout are functions of (seed, epoch, step).

    callbacks: called in this order; checkpoints save their `state_dict`s
    eval_model: the network to evaluate and save: `model`, unless a callback averages its weights
    new_weights: names of weights that `trainer.init_from` did not set
    folder: the run directory; None in job=benchmark
    """

    config: Config
    runtime: Runtime
    model: nn.Module
    criterion: nn.Module
    optimizer: Optimizer
    schedule: Schedule
    steps_per_epoch: int
    world: World
    callbacks: list[Callback]
    new_weights: list[str]
    folder: Path | None = None
    epoch: int = 0  # the epoch in progress, counted from 0
    step: int = 0  # optimizer steps since the beginning
    should_stop: bool = False  # set by a callback to end the training before its last epoch
    best: dict[str, Any] | None = None  # epoch and metrics of the best validation so far
    history: list[dict[str, Any]] = field(default_factory=list)  # one row per finished epoch
    last_reading: tuple[float, float] | None = None  # mean loss and accuracy, when last read
    seconds: float = 0.0  # spent in earlier processes
    epoch_seconds: float = 0.0  # spent training in this epoch, also before a resume

    def __post_init__(self) -> None:
        # wrapping and compiling create new modules; checkpoints always use the plain model's state dict
        self.parallel = self.world.wrap(self.model, self.runtime.device, self.config.trainer.gradients)
        self.use_compiled(self.runtime.compile)
        self.metrics = RunningMetrics(self.runtime.device)
        self.eval_model = self.model
        self._started = time.perf_counter()
        for name, count in Counter(callback.name for callback in self.callbacks).items():
            if name and count > 1:  # in a checkpoint, the state of one would replace the other's
                raise UserError(f"callbacks.{name}: {count} callbacks have this name; give each its own")
        self.call("on_fit_start")

    def call(self, hook: str, *arguments: Any) -> None:
        """Call a hook of all callbacks, in their order."""
        for callback in self.callbacks:
            try:
                with self._convert_errors(callback):
                    getattr(callback, hook)(self, *arguments)
            except UserError as error:
                if hook != "on_exception" or callback.name not in self.config.callbacks:
                    raise
                log.warning(error)  # do not raise, because the other callbacks must still save

    def callback_metrics(self, results: Mapping[str, Evaluation]) -> dict[str, float | None]:
        """Return the callbacks' metrics of the epoch that ends, by column; None for numbers that are not finite."""
        row: dict[str, float | None] = {}
        for callback in self.callbacks:
            if callback.columns:
                with self._convert_errors(callback):
                    values = callback.measure(self, results)
                    if missing := [name for name in callback.columns if name not in values]:
                        raise ValueError(f"measure() did not return {missing[0]}, which is one of its columns")
                    for name in callback.columns:
                        row[name] = number if math.isfinite(number := float(values[name])) else None
        return row

    @contextlib.contextmanager
    def _convert_errors(self, callback: Callback) -> Iterator[None]:
        """Within this block, convert an error of a callback from the config to a UserError with the callback's name."""
        try:
            yield
        except Exception as error:  # user code can raise any exception
            if callback.name not in self.config.callbacks or isinstance(error, (UserError, Pruned)):
                raise
            raise UserError(describe_fault(f"callbacks.{callback.name}", callback, error)) from error

    def use_compiled(self, wanted: bool) -> None:
        """Train with torch.compile from now on, or without it; each batch size is compiled separately."""
        self.compiled = wanted
        self.forward: Callable[..., Tensor] = torch.compile(self.parallel, dynamic=False) if wanted else self.parallel

    def train(self) -> None:
        """Put the model, and an optimizer that has modes, into training mode; frozen layers stay in evaluation mode."""
        self.model.train()
        for name in self.config.trainer.freeze:
            self.model.get_submodule(name).eval()
        set_optimizer_mode(self.optimizer, "train")

    def grad_sync(self, last: bool) -> contextlib.AbstractContextManager:
        """Return the context of a backward pass: processes average their gradients only in a step's last pass."""
        if last or self.world.size == 1:
            return contextlib.nullcontext()
        return self.parallel.no_sync()  # type: ignore[operator]

    @property
    def step_in_epoch(self) -> int:
        return self.step - self.epoch * self.steps_per_epoch

    def elapsed(self) -> float:
        """Return the seconds of this run, including the time before a resume."""
        return self.seconds + time.perf_counter() - self._started

    def read_metrics(self) -> tuple[float, float]:
        """Return the epoch's mean loss and accuracy so far (waits for the device); raise UserError if it diverged."""
        loss, accuracy, bad = self.metrics.read()
        if bad is not None:
            raise UserError(
                f"training diverged: the loss at step {bad} (epoch {bad // self.steps_per_epoch + 1}, learning rate "
                f"{self.schedule.lr(bad):g}) is not finite or too large: {LOWER_RATE}"
            )
        self.last_reading = loss, accuracy
        return loss, accuracy

    def end_epoch(self, measured: Mapping[str, float | None], images: int) -> dict[str, Any]:
        """Add the epoch to the history, update the best epoch, advance the learning rate; return the row.

        measured: validation_loss, validation_accuracy …, if they are measured; images: number of training images
        """
        loss, accuracy = self.read_metrics()
        row: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            # version 1 recorded the rate after the schedule had advanced, and its runs must still reproduce
            "lr": (self.schedule.lr if self.config.trainer.version > 1 else self.schedule.lr_now)(self.step - 1),
            "train_loss": loss,
            "train_accuracy": accuracy,
            "validation_loss": None,
            "validation_accuracy": None,
            **measured,
            "seconds": round(self.epoch_seconds, 3),
            "images_per_second": round(images / self.epoch_seconds, 1),
        }
        self.history.append(row)
        measured_now = row["validation_accuracy"] is not None
        if measured_now and (self.best is None or self.is_better(row, self.best)):
            self.best = {k: row[k] for k in ("epoch", "validation_accuracy", "validation_loss")}
        self.schedule.epoch(row[self.config.trainer.monitor])
        self.metrics.reset()
        self.epoch += 1
        self.epoch_seconds = 0.0
        return row

    def is_better(self, row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Return whether an epoch has a higher validation accuracy than another, or the same with a lower loss."""
        accuracy, others = row["validation_accuracy"], other.get("validation_accuracy", -1)
        if accuracy != others or self.config.trainer.version == 1:
            return bool(accuracy > others)
        return bool(row["validation_loss"] < other["validation_loss"])

    def checkpoint(self) -> Checkpoint:
        """Return everything that a resume needs."""
        set_optimizer_mode(self.optimizer, "train")
        tensors = {**self.model.state_dict(prefix="model."), "metrics": self.metrics.sums}
        optimizer = self.optimizer.state_dict()
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer["param_groups"]]
        callbacks: dict[str, Any] = {}
        for callback in self.callbacks:
            with self._convert_errors(callback):
                callbacks[callback.name] = callback.state_dict()
        metadata = {
            "identity": self.config.identity(),
            "epoch": self.epoch,
            "step": self.step,
            "should_stop": self.should_stop,
            "optimizer": pack({"state": optimizer["state"], "param_groups": groups}, "optimizer", tensors),
            "callbacks": pack({k: v for k, v in callbacks.items() if k and v}, "callbacks", tensors),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "history": self.history,
            "seconds": self.elapsed(),
            "epoch_seconds": self.epoch_seconds,
            "compiled": self.compiled,
        }
        return Checkpoint(tensors, metadata)

    def restore(self, saved: Checkpoint, images: str | None = None) -> None:
        """Restore a checkpoint of this run or, if it is a branch, of its parent.

        images: the hash of the run's images, which a branch compares with its parent's

        Raises UserError if the checkpoint does not fit the run; a valid checksum does not say which run wrote it.
        """
        try:
            self._restore(saved, images)
        except torch.OutOfMemoryError:
            raise
        except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {one_line(error, -1)}"
            if "branches" in saved.metadata:
                raise UserError(
                    f"the run cannot begin with its parent's state ({reason}): for other classes, train a new run with "
                    "trainer.init_from=<weights>"
                ) from error
            raise UserError(
                f"step {saved.metadata.get('step')}: the checkpoint does not fit this run ({reason}): delete it "
                "to use the one before it"
            ) from error

    def _restore(self, saved: Checkpoint, images: str | None) -> None:
        metadata = saved.metadata
        self.model.load_state_dict(strip_prefix("model", saved.tensors))
        self.metrics.sums.copy_(saved.tensors["metrics"])
        self.epoch, self.step, self.best = metadata["epoch"], metadata["step"], metadata["best"]
        self.should_stop = metadata.get("should_stop", False)
        self.history = metadata["history"]
        self.seconds, self.epoch_seconds = float(metadata["seconds"]), float(metadata["epoch_seconds"])
        optimizer, callbacks = (unpack(metadata[key], saved.tensors) for key in ("optimizer", "callbacks"))
        if "branches" in metadata:
            optimizer, callbacks = self._branch(optimizer, callbacks, images)
        else:
            self.schedule.load_state_dict(metadata["schedule"])
        # a file from elsewhere can have a valid checksum and any content
        epochs = [row["epoch"] for row in self.history]
        if len(epochs) != self.epoch or not 0 <= self.step_in_epoch <= self.steps_per_epoch:
            raise ValueError(f"epoch {self.epoch!r}, step {self.step!r}, {len(epochs)} epochs in its history")
        if self.best is not None:
            self.is_better(self.best, self.best)
        if optimizer is not None:
            load_optimizer(self.optimizer, optimizer)
        for callback in self.callbacks:
            if callback.name in callbacks:
                with self._convert_errors(callback):
                    callback.load_state_dict(callbacks[callback.name])
            elif "branches" in metadata and callback.name in self.config.callbacks:
                with self._convert_errors(callback):
                    callback.on_fit_start(self)  # again, because the weights are now the parent's

    def _branch(
        self, optimizer: dict[str, Any], callbacks: dict[str, Any], images: str | None
    ) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Return the parent's optimizer and callback states, adapted to this run; its weights are already restored.

        The optimizer's settings and the learning rate are those of this run. The optimizer's state (such as momentum)
        is kept unless the optimizer or trainer.freeze differs. A callback from the config keeps its state if its
        settings are unchanged and no callback had stopped the parent early. If the validation images or their
        preprocessing may differ, such callbacks start without state and the parent's best epoch does not count.
        """
        assert self.config.parent is not None
        before, others = self.config.parent.config, self.config.parent.data_hash
        self.step = self.epoch * self.steps_per_epoch  # the parent's batch size can differ
        data = self.config.to_dict()["data"]
        keys = [k for k in data if k not in _TRAINING_ONLY_KEYS and before["data"].get(k) != data[k]]
        changed = [f"data.{key} is" for key in keys]
        if None not in (images, others):  # compare the content of the images, not their path
            changed = [each for each in changed if each != "data.root is"] + ["the images are"] * (images != others)
        if changed:
            log.warning(
                "%s not the parent's: the parent's best epoch does not count, and the parent may have trained on "
                "validation images of this run",
                changed[0],
            )
            self.best = None
        first, _ = schedule_span(self.config.to_dict())
        monitor = self.config.monitored
        if monitor is not None and any(row.get(monitor) is None for row in self.history[first:]):
            raise UserError(f"trainer.monitor={monitor}: the parent did not measure it")
        self.schedule.replay([row[self.config.trainer.monitor] for row in self.history[first:]])
        unchanged = {k for k, v in self.config.callbacks.items() if before["callbacks"].get(k) == v}
        kept = set() if self.should_stop or changed else unchanged
        callbacks = {k: v for k, v in callbacks.items() if k in kept or k not in self.config.callbacks}
        self.should_stop = False
        settings = [_without_numbers(c) for c in (before["optimizer"], self.config.optimizer)]
        same = settings[0] == settings[1]
        if not same or before["trainer"].get("freeze", []) != self.config.trainer.freeze:
            log.info("the optimizer starts without state: %s is not the parent's", "trainer.freeze" if same else "it")
            return None, callbacks
        # values in an optimizer's groups, such as a step count, are state, except its settings and the schedule's keys
        not_state = {*before["optimizer"], *self.config.optimizer, *SCHEDULED}
        groups = [{k: v for k, v in group.items() if k not in not_state} for group in optimizer["param_groups"]]
        return {**optimizer, "param_groups": groups}, callbacks


def _without_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's settings except numbers: they determine which state the optimizer has."""

    def of_numbers(value: Any) -> bool:
        return all(map(of_numbers, value)) if isinstance(value, list) else is_number(value)

    return {k: v for k, v in settings.items() if not of_numbers(v)}
