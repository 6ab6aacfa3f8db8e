"""This program's loop, as a contender and taken apart."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Generator, Iterator

import torch
import torch.nn.functional as F

from zfnet.benchmark.turns import time_steps
from zfnet.config.schema import Config
from zfnet.data import Batch, ImageSet
from zfnet.training.device import Runtime, synchronize
from zfnet.training.loop import read_metrics, train_step
from zfnet.training.state import TrainingState, training_batches


class OurLoop:
    """The training loop that `job=train` runs: its batches, its step, its readings of the loss."""

    def __init__(self, name: str, config: Config, runtime: Runtime, images: ImageSet) -> None:
        self.name = name
        self.config, self.batch_size, self.runtime = config, config.data.batch_size, runtime
        self.batches = training_batches(config, runtime, images)
        self.state = TrainingState(config, runtime, len(images.classes), len(self.batches))
        self.waited = 0.0  # seconds in which the host got no batch yet, and the steps they belong to
        self.taken = 0

    def turn(self, steps: int, warmup: int) -> float:
        return time_steps(self._loop(), steps, warmup, self.runtime.device, ours=True)

    def _loop(self) -> Generator[None, None, None]:
        """Short last batches are left out, so that all steps are equal."""
        self.state.model.train()
        for batch in self._full_batches():
            train_step(self.state, batch)
            if self.state.step % self.config.trainer.log_every == 0:
                read_metrics(self.state)
            self.taken += 1
            yield

    def _full_batches(self) -> Iterator[Batch]:
        epoch = 0
        while True:
            source = self.batches.epoch(epoch)
            while True:
                started = time.perf_counter()
                batch = next(source, None)
                self.waited += time.perf_counter() - started
                if batch is None:
                    break
                if len(batch.labels) == self.batch_size:
                    yield batch
            epoch += 1

    def breakdown(self, steps: int) -> dict[str, float]:
        """Return seconds per step in data, forward, backward and optimizer, the device waited for after each."""
        parts, started = dict.fromkeys(("data", "forward", "backward", "optimizer"), 0.0), 0.0
        state, source = self.state, self._full_batches()

        def lap(part: str) -> None:
            nonlocal started
            synchronize(self.runtime.device)
            parts[part] += time.perf_counter() - started
            started = time.perf_counter()

        for _ in range(steps):
            synchronize(self.runtime.device)
            started = time.perf_counter()
            batch = next(source)
            lap("data")
            state.model.set_step(self.config.seed, state.step)
            with self.runtime.autocast():
                loss = F.cross_entropy(state.forward(batch.images), batch.labels)
            lap("forward")
            loss.backward()
            lap("backward")
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            lap("optimizer")
        return {part: seconds / steps for part, seconds in parts.items()}


def peak_memory(device: torch.device) -> float:
    """Return the largest amount of memory so far, in GiB: allocated on the GPU or, on a CPU, held by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
