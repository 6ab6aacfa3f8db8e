"""Contenders take turns, so that a machine that speeds up or slows down does so for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from tqdm import tqdm


class Contender(Protocol):
    """A training loop that can be run for some steps, data included."""

    name: str
    batch_size: int

    def steps(self) -> Iterator[None]:
        """Begin a turn: each `next()` gets a batch and trains on it."""


@dataclass
class Timing:
    """Seconds of each turn, by contender; a turn is `steps` steps of `batch_size` images."""

    name: str
    batch_size: int
    steps: int
    seconds: list[float] = field(default_factory=list)

    @property
    def images_per_second(self) -> list[float]:
        return [self.steps * self.batch_size / s for s in self.seconds]

    def median(self) -> float:
        """Return the median images per second."""
        return statistics.median(self.images_per_second)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def take_turns(
    contenders: Sequence[Contender], device: torch.device, *, rounds: int, steps: int, warmup: int
) -> list[Timing]:
    """Let each contender train `steps` steps per round, after `warmup` untimed ones in each turn."""
    timings = [Timing(c.name, c.batch_size, steps) for c in contenders]
    bar = tqdm(total=rounds * len(contenders), unit="turn", disable=None, leave=False, dynamic_ncols=True)
    with bar:
        for _ in range(rounds):
            for contender, timing in zip(contenders, timings, strict=True):
                bar.set_description(contender.name)
                turn = contender.steps()
                timing.seconds.append(_time(turn, steps, warmup, device))
                turn.close()  # type: ignore[attr-defined]  # ends a loader's workers
                bar.update()
    return timings


def _time(turn: Iterator[None], steps: int, warmup: int, device: torch.device) -> float:
    for _ in range(warmup):
        next(turn)
    synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        next(turn)
    synchronize(device)
    return time.perf_counter() - started


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one call takes, its work on the device included."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started
