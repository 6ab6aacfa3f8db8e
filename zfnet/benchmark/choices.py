"""The decisions that `trainer=auto` takes, each against its alternative: what every one of them is worth here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from zfnet.benchmark.ours import OurLoop
from zfnet.benchmark.pool_first import PoolFirstZFNet
from zfnet.benchmark.turns import compare, enough_images, print_table, take_turns, time_steps
from zfnet.config.instantiate import build_optimizer
from zfnet.config.schema import Config
from zfnet.data import ImageSet
from zfnet.model.layers import LocalResponseNorm
from zfnet.training.compiling import Trial
from zfnet.training.device import Runtime, set_switches, timed
from zfnet.training.state import TrainingState


class Way(OurLoop):
    """Our loop with one decision changed: by another runtime, by `change`, which mends its state, or in its memory."""

    def __init__(
        self,
        name: str,
        config: Config,
        runtime: Runtime,
        images: ImageSet,
        change: Callable[[TrainingState], None] | None = None,
        keeps_memory: bool = True,
    ) -> None:
        super().__init__(name, config, runtime, images)
        self.keeps_memory = keeps_memory
        if change is not None:
            change(self.state)

    def turn(self, steps: int, warmup: int) -> float:
        set_switches(self.runtime.deterministic, self.runtime.precision)
        return time_steps(self._loop(), steps, warmup, self.runtime.device, ours=self.keeps_memory)


def measure(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Time every way in turns with the chosen one; return what benchmark.json holds."""
    job, images = config.job, enough_images(config)
    ways = [Way("as chosen", config, runtime, images)]
    exact = replace(runtime, precision="fp32", compile=False, deterministic=True)
    precision = "fp32" if runtime.precision == "bf16" else "bf16"
    plans = {
        "exact": exact,
        "NCHW" if runtime.channels_last else "NHWC": replace(
            runtime, channels_last=not runtime.channels_last
        ),
        precision: replace(runtime, precision=precision),
        "not compiled" if runtime.compile else "compiled": replace(runtime, compile=not runtime.compile),
    }
    ways += [Way(name, config, other, images) for name, other in plans.items() if other != runtime]
    ways.append(Way("optimizer not fused", config, runtime, images, _not_fused))
    if config.model.norm != "batch":
        ways.append(Way("pooling first", config, runtime, images, _pool_first))
    # on CUDA its backward pass has no deterministic form, and asked for one raises
    if config.model.norm == "lrn" and not (runtime.deterministic and runtime.device.type == "cuda"):
        ways.append(Way("PyTorch's LRN", config, runtime, images, _their_lrn))
    if runtime.device.type == "cpu":
        ways.append(Way("memory given back", config, runtime, images, keeps_memory=False))
    compiled = next(way for way in ways if way.runtime.compile)
    cost = timed(lambda: compiled.turn(1, 0), runtime.device)
    timings = take_turns(ways, rounds=job.rounds, steps=job.steps, warmup=job.warmup)
    by_name = {timing.name: config.data.batch_size / timing.median() for timing in timings}
    chosen = by_name["as chosen"]
    trial = Trial(by_name.get("not compiled", chosen), by_name.get("compiled", chosen), cost)
    steps = len(images) // config.data.batch_size
    return {
        "title": "Training steps with one decision changed",
        "contenders": compare(timings),
        "compile": {**asdict(trial), "words": trial.describe(steps * config.trainer.epochs, steps)},
    }


def say(result: dict[str, Any]) -> None:
    """Print the table, and when compiling pays."""
    print_table(result["contenders"], "way", "as chosen is faster by")
    print(f"\n{result['compile']['words']}")


def _not_fused(state: TrainingState) -> None:
    state.optimizer = build_optimizer(state.config.optimizer, state.model.parameters(), fused=False)


def _pool_first(state: TrainingState) -> None:
    state.model.__class__ = PoolFirstZFNet


def _their_lrn(state: TrainingState) -> None:
    for name, module in state.model.named_children():
        if isinstance(module, LocalResponseNorm):
            # their α multiplies the mean of the squares, ours the sum
            theirs = nn.LocalResponseNorm(module.size, module.size * module.alpha, module.beta, module.k)
            setattr(state.model, name, theirs)
