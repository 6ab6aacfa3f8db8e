"""The learning-rate schedule: a PyTorch scheduler with warm-up and a state of plain numbers.

A run that branches from an epoch of another run (job=extend, job=fork) chooses its schedule: see docs/continue.md. The
rate is always a function of the config, the step and the recorded metrics; `replay` repeats the parent's epochs.
"""

import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from zfnet.config.errors import UserError
from zfnet.config.instantiate import is_number

# keys of conf/scheduler that `Schedule` reads; the scheduler does not get them
OWN_KEYS = ("interval", "warmup_epochs")
# keys that PyTorch's schedulers set in the optimizer's parameter groups
SCHEDULED = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "momentum", "betas", "max_momentum", "base_momentum")


class Schedule:
    """Steps a scheduler at the interval that its config names.

    During warm-up each group's rate is the scheduler's rate times a factor that rises linearly to 1. Schedulers that
    compute a rate from the previous one must not see the product, so `step` restores the scheduler's own rates after
    the optimizer's step.

    length: the run's length in the schedule's unit (epochs or steps); first_step: the step where the schedule begins
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        scheduler: LRScheduler,
        optimizer: Optimizer,
        length: int,
        steps_per_epoch: int,
        first_step: int = 0,
    ) -> None:
        self.optimizer, self.scheduler, self.length = optimizer, scheduler, length
        self.steps_per_epoch, self.first_step = steps_per_epoch, first_step
        self.by_step = steps_by_batch(settings)
        self.warmup_steps = round(settings.get("warmup_epochs", 0) * steps_per_epoch)
        ends = getattr(scheduler, "total_steps", length)
        if ends < length:
            run = f"{length} {'steps' if self.by_step else 'epochs'}"
            raise UserError(f"scheduler.total_steps={ends}: the schedule ends before the run ({run}); write auto")
        self.count = 0  # the scheduler's steps so far
        self._rates: list[float] | None = None  # the scheduler's own rates, while warm-up replaces them
        self._recent_rates: deque[tuple[int, float]] = deque(maxlen=1000)  # the last steps and their rates

    def lr(self, step: int) -> float:
        """Return the learning rate (of the first parameter group) that `step` used or, if unknown, would use now."""
        recent = dict(self._recent_rates)
        return recent[step] if step in recent else self.lr_now(step)

    def lr_now(self, step: int) -> float:
        """Return the learning rate that step `step` would use now, after the schedule has advanced."""
        return float(self.optimizer.param_groups[0]["lr"]) * self._warmup_factor(step)

    def _warmup_factor(self, step: int) -> float:
        return min(1.0, (step - self.first_step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    def set_lr(self, step: int) -> None:
        """Set the optimizer's rates for this step."""
        factor = self._warmup_factor(step)
        if factor != 1.0:
            self._rates = [group["lr"] for group in self.optimizer.param_groups]
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
        self._recent_rates.append((step, float(self.optimizer.param_groups[0]["lr"])))

    def step(self) -> None:
        """End an optimizer step: undo warm-up, and advance a schedule that counts steps."""
        if self._rates is not None:
            for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate
            self._rates = None
        if self.by_step:
            self._advance(None)

    def epoch(self, monitored: float | None) -> None:
        """End an epoch: advance a schedule that counts epochs; `monitored` is the metric of a plateau schedule."""
        if not self.by_step:
            self._advance(monitored)

    def _advance(self, monitored: float | None) -> None:
        self.count += 1
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(monitored)  # type: ignore[arg-type]
        elif self.count < self.length:  # no rate is needed after the last step
            self.scheduler.step()

    def replay(self, monitored: Sequence[float | None]) -> None:
        """Advance over epochs that the parent trained; `monitored`: a plateau schedule's metric after each epoch."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lr_scheduler.step() without optimizer.step() warns
            for value in monitored:
                for _ in range(self.steps_per_epoch if self.by_step else 1):
                    self._advance(value)

    def state_dict(self) -> dict[str, Any]:
        """Return the values that change as the schedule advances, as plain numbers. The config determines the rest."""
        last = [list(pair) for pair in self._recent_rates][-1:]  # the row of an epoch that has just ended needs it
        return {"taken": self.count, "scheduler": _plain_state(self.scheduler), "used": last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict()` returned; the rates themselves are in the optimizer's state."""
        self.count = state["taken"]
        self._recent_rates.clear()
        self._recent_rates.extend((step, rate) for step, rate in state.get("used", []))
        _load_plain_state(self.scheduler, state["scheduler"])


def _plain_state(scheduler: LRScheduler) -> dict[str, Any]:
    """Return the plain values of a scheduler's attributes, and those of the schedulers that it chains."""
    state = {k: v for k, v in vars(scheduler).items() if _is_plain(v)}
    inner = getattr(scheduler, "_schedulers", None)
    if inner is not None:
        state["_schedulers"] = [_plain_state(s) for s in inner]
    return state


def _load_plain_state(scheduler: LRScheduler, state: Mapping[str, Any]) -> None:
    vars(scheduler).update({k: v for k, v in state.items() if k != "_schedulers"})
    for inner, values in zip(getattr(scheduler, "_schedulers", []), state.get("_schedulers", []), strict=True):
        _load_plain_state(inner, values)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))


def steps_by_batch(settings: Mapping[str, Any]) -> bool:
    """Return whether the schedule counts optimizer steps instead of epochs."""
    return bool(settings.get("interval", "epoch") == "step")


def schedule_span(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the first epoch (counted from 0) and the number of epochs of a recorded config's schedule."""
    epochs, parent = config["trainer"]["epochs"], config.get("parent")
    if parent is None:
        return 0, epochs
    if parent["schedule"] == "restart":
        return parent["epoch"], epochs - parent["epoch"]
    first, length = schedule_span(parent["config"])
    return first, length if parent["schedule"] == "continue" else epochs - first


def check_interval(settings: Mapping[str, Any], epochs: int) -> None:
    """Check the keys in OWN_KEYS; raise UserError."""
    if settings.get("interval", "epoch") not in ("epoch", "step"):
        raise UserError(f"scheduler.interval={settings['interval']}: must be epoch or step")
    warmup = settings.get("warmup_epochs", 0)
    if not is_number(warmup) or not 0 <= warmup < float("inf"):
        raise UserError(f"scheduler.warmup_epochs={warmup}: must be a number of epochs, at least 0")
    if warmup >= epochs:
        raise UserError(f"scheduler.warmup_epochs={warmup}: must be less than the {epochs} epochs of the schedule")
