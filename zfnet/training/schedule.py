"""The learning rate: a PyTorch scheduler, with warm-up on top and a state of plain numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from zfnet.config.errors import UserError
from zfnet.config.instantiate import build_scheduler

# keys of conf/scheduler that are ours and not the scheduler's
EXTRA = ("interval", "warmup_epochs")


class Schedule:
    """Steps the scheduler at the interval that its config names.

    During warm-up the scheduler's rate is multiplied by a factor that rises linearly to 1. The factor is
    applied for the duration of a step only, so schedulers that compute a rate from the last one are not misled.
    """

    def __init__(
        self, settings: Mapping[str, Any], optimizer: Optimizer, epochs: int, steps_per_epoch: int
    ) -> None:
        self.optimizer = optimizer
        self.by_step = settings.get("interval", "epoch") == "step"
        length = epochs * steps_per_epoch if self.by_step else epochs
        self.warmup_steps = round(settings.get("warmup_epochs", 0) * steps_per_epoch)
        self.scheduler = build_scheduler(settings, optimizer, length, EXTRA)
        ends = getattr(self.scheduler, "total_steps", length)
        if ends < length:
            raise UserError(
                f"scheduler.total_steps={ends}: the schedule ends before the run, which takes {length}; write auto"
            )
        self.length, self.taken = length, 0

    def rate(self, step: int) -> float:
        """Return the learning rate that global step `step` uses (or would use)."""
        return float(self.optimizer.param_groups[0]["lr"]) * self._factor(step)

    def _factor(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0

    @contextlib.contextmanager
    def warmed_up(self, step: int) -> Iterator[None]:
        """Let the optimizer see the warmed-up rate for one step."""
        factor = self._factor(step)
        if factor == 1.0:
            yield
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] * factor
        try:
            yield
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def after_step(self) -> None:
        """Tell a schedule that counts steps that one is over."""
        if self.by_step:
            self._advance(None)

    def after_epoch(self, watched: float) -> None:
        """Tell a schedule that counts epochs that one is over; `watched` is what a plateau schedule looks at."""
        if not self.by_step:
            self._advance(watched)

    def _advance(self, watched: float | None) -> None:
        self.taken += 1
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(watched)  # type: ignore[arg-type]
        elif self.taken < self.length:  # after the last step there is no rate left to compute
            self.scheduler.step()

    def state(self) -> dict[str, Any]:
        """Return what changes as the schedule advances, as plain numbers; the rest follows from the config."""
        plain = {k: v for k, v in self.scheduler.state_dict().items() if _is_plain(v)}
        return {"taken": self.taken, "scheduler": plain}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`; the rates themselves belong to the optimizer."""
        self.taken = state["taken"]
        self.scheduler.load_state_dict({**self.scheduler.state_dict(), **state["scheduler"]})


def check_interval(settings: Mapping[str, Any], epochs: int) -> None:
    """Check the keys that are ours; raise UserError."""
    if settings.get("interval", "epoch") not in ("epoch", "step"):
        raise UserError(f"scheduler.interval={settings['interval']}: must be epoch or step")
    warmup = settings.get("warmup_epochs", 0)
    if isinstance(warmup, bool) or not isinstance(warmup, (int, float)) or not 0 <= warmup < float("inf"):
        raise UserError(f"scheduler.warmup_epochs={warmup}: must be a number of epochs, at least 0")
    if warmup >= epochs:
        raise UserError(
            f"scheduler.warmup_epochs={warmup}: must be less than trainer.epochs={epochs}, the run's length"
        )
    if str(settings.get("_target_", "")).endswith("ReduceLROnPlateau") and settings.get("interval") == "step":
        raise UserError("scheduler.interval=step: a plateau schedule steps once an epoch, on trainer.monitor")


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(v) for v in value)
    return value is None or isinstance(value, (bool, int, float, str))
