"""torch.compile where it pays: tried with this network on this device, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from zfnet.config.errors import one_line
from zfnet.data import Batch, Batches
from zfnet.training.device import timed
from zfnet.training.loop import train_step
from zfnet.training.state import TrainingState

STEPS, WARMUP = 10, 3
WHERE = ("cuda",)  # on CPUs, compiled steps of this network are slower


@dataclass(frozen=True)
class Trial:
    """What was measured, in seconds: a step as it is, a compiled one, and the compiling."""

    eager: float
    compiled: float
    cost: float

    @property
    def pays(self) -> bool:
        """Whether to go on compiled, now that compiling is paid for."""
        return self.compiled < self.eager

    def describe(self, steps: int, steps_per_epoch: int) -> str:
        """Two lines for people about a run of `steps`."""
        measured = (
            f"torch.compile: took {self.cost:.1f} s; a step takes {1000 * self.compiled:.2f} ms with it, "
            f"{1000 * self.eager:.2f} without:\n"
        )
        if not self.pays:
            return f"{measured}it never pays; off"
        even = self.cost / (self.eager - self.compiled)
        return f"{measured}it pays after {even / steps_per_epoch:.1f} epochs, of {steps / steps_per_epoch:.0f}; on"


def settle_auto(state: TrainingState, batches: Batches, recorded: bool | None) -> str | None:
    """Make of trainer.compile=auto what a record of the same run says, or a trial; return words about a trial.

    Of a run on several processes, or elsewhere than on a GPU, `auto` is off.
    """
    if state.config.trainer.compile != "auto" or state.runtime.device.type not in WHERE or state.world.size > 1:
        return None
    if recorded is None:
        return compile_if_it_pays(state, batches)
    state.use_compiled(recorded)
    return None


def compile_if_it_pays(state: TrainingState, batches: Batches) -> str:
    """Leave `state` as it was, but for whether its steps are compiled; return the reason in words."""
    trainer = state.config.trainer
    steps = trainer.epochs * state.steps_per_epoch
    before = state.checkpoint()
    before.tensors = {name: tensor.clone() for name, tensor in before.tensors.items()}
    before.metadata["seconds"] = state.seconds
    examples = _one_of_each_size(batches)
    eager = _seconds(state, examples[0])
    if eager * steps * trainer.compile_gain < trainer.compile_seconds:
        words = f"torch.compile: off, {steps:,} steps of {1000 * eager:.2f} ms are too few for it to pay"
    else:
        state.use_compiled(True)
        try:
            cost = timed(partial(_train_on, state, examples), state.runtime.device)
            trial = Trial(eager, _seconds(state, examples[0]), cost)
        except Exception as error:  # no C compiler, no Triton …: nobody asked for it by name
            state.use_compiled(False)
            state.optimizer.zero_grad(set_to_none=True)
            words = f"torch.compile: off, it fails here ({one_line(error)})"
        else:
            state.use_compiled(trial.pays)
            words = trial.describe(steps, state.steps_per_epoch)
    state.restore(before)
    return words


def _one_of_each_size(batches: Batches) -> list[Batch]:
    """Return a full batch and, if it is smaller, the last: each size is compiled for itself."""
    full, last = (next(batches.epoch(0, start)) for start in (0, len(batches) - 1))
    return [full] if len(last.labels) == len(full.labels) else [full, last]


def _seconds(state: TrainingState, batch: Batch) -> float:
    _train_on(state, [batch] * WARMUP)
    return timed(partial(_train_on, state, [batch] * STEPS), state.runtime.device) / STEPS


def _train_on(state: TrainingState, batches: Sequence[Batch]) -> None:
    for batch in batches:
        train_step(state, batch)
