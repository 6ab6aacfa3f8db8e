"""Contenders take turns, so that a machine that speeds up or slows down does so for all of them."""

from __future__ import annotations

import statistics
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tqdm import tqdm

from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.data import ImageSet, load_splits
from zfnet.training.device import keep_memory, timed


class Contender(Protocol):
    """A training loop that can be run for some steps, data included."""

    name: str
    batch_size: int

    def turn(self, steps: int, warmup: int) -> float:
        """Train `warmup` and then `steps` steps; return the seconds that the latter took, all work finished."""


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


def take_turns(contenders: Sequence[Contender], *, rounds: int, steps: int, warmup: int) -> list[Timing]:
    """Let each contender train `steps` steps per round, after `warmup` untimed ones in each turn."""
    timings = [Timing(c.name, c.batch_size, steps) for c in contenders]
    bar = tqdm(total=rounds * len(contenders), unit="turn", disable=None, leave=False, dynamic_ncols=True)
    with bar:
        for _ in range(rounds):
            for contender, timing in zip(contenders, timings, strict=True):
                bar.set_description(contender.name)
                timing.seconds.append(contender.turn(steps, warmup))
                bar.update()
    return timings


def time_steps(
    loop: Generator[None, None, None], steps: int, warmup: int, device: torch.device, ours: bool = False
) -> float:
    """Be the turn of a loop that trains on one batch at each `next()`.

    Only `ours` may keep freed memory, since the others do not ask for that by themselves.
    """
    keep_memory(ours and device.type == "cpu")
    for _ in range(warmup):
        next(loop)
    seconds = timed(lambda: [next(loop) for _ in range(steps)], device)
    loop.close()  # ends a loader's workers
    return seconds


def enough_images(config: Config) -> ImageSet:
    """Return the training images; raise UserError if they do not fill a batch."""
    images = load_splits(config.data).train
    if len(images) < config.data.batch_size:
        raise UserError(
            f"data.batch_size={config.data.batch_size}: there are only {len(images)} training images to take it from"
        )
    return images


def compare(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """Return each contender's speeds; `first_is_faster_by` is the median over rounds of the first against it."""
    rows = []
    for timing in timings:
        pairs = zip(timings[0].images_per_second, timing.images_per_second, strict=True)
        rows.append(
            {
                "name": timing.name,
                "images_per_second": timing.images_per_second,
                "median": timing.median(),
                "first_is_faster_by": statistics.median(a / b for a, b in pairs),
                "steps": timing.steps,
                "batch_size": timing.batch_size,
            }
        )
    return rows


def print_table(rows: Sequence[dict[str, Any]], what: str, ratio: str) -> None:
    """Print what `compare` found, 80 columns wide."""
    print(f"\n{what:<24}{'images/s':>10}{'min':>9}{'max':>9}{ratio:>24}")
    for row in rows:
        speeds = row["images_per_second"]
        print(
            f"{row['name']:<24}{row['median']:>10.1f}{min(speeds):>9.1f}{max(speeds):>9.1f}"
            f"{row['first_is_faster_by']:>23.2f}×"
        )
