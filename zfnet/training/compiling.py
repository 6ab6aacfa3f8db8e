"""trainer.compile=auto: time torch.compile with this network on this device, before the first step."""

from collections.abc import Sequence
from functools import partial

from zfnet.config.errors import one_line
from zfnet.data import Batch, Batches
from zfnet.training.device import time_call
from zfnet.training.loop import train_step
from zfnet.training.state import TrainingState

STEPS, WARMUP = 10, 3
WHERE = ("cuda",)  # on CPUs, compiled steps of this network are slower


def describe(eager: float, compiled: float, cost: float, steps: int, steps_per_epoch: int) -> str:
    """Return two lines about a run of `steps`. eager, compiled: seconds of a step; cost: seconds of compiling"""
    measured = (
        f"torch.compile: took {cost:.1f} s; a step takes {1000 * compiled:.2f} ms with it, "
        f"{1000 * eager:.2f} without:\n"
    )
    if compiled >= eager:
        return f"{measured}it never saves time; off"
    even = cost / (eager - compiled)
    return f"{measured}it saves time after {even / steps_per_epoch:.1f} of {steps / steps_per_epoch:.0f} epochs; on"


def resolve_compile(state: TrainingState, batches: Batches, recorded: bool | None) -> str | None:
    """Resolve trainer.compile=auto: as recorded for the same run, or else by timing; return a message about the timing.

    With several processes, or on a device other than a CUDA GPU, `auto` means off.
    """
    if state.config.trainer.compile != "auto" or state.runtime.device.type not in WHERE or state.world.size > 1:
        return None
    if recorded is None:
        return compile_if_faster(state, batches)
    state.use_compiled(recorded)
    return None


def compile_if_faster(state: TrainingState, batches: Batches) -> str:
    """Compile the training step if that saves time over the run, and restore the state; return a message about it."""
    trainer = state.config.trainer
    steps = trainer.epochs * state.steps_per_epoch
    before = state.checkpoint()
    before.tensors = {name: tensor.clone() for name, tensor in before.tensors.items()}
    before.metadata["seconds"] = state.seconds
    examples = _one_of_each_size(batches)
    eager = _step_seconds(state, examples[0])
    if eager * steps * trainer.compile_gain < trainer.compile_seconds:
        message = f"torch.compile: off, {steps:,} steps of {1000 * eager:.2f} ms are too few for it to save time"
    else:
        state.use_compiled(True)
        try:
            cost = time_call(partial(_train_on, state, examples), state.runtime.device)
            compiled = _step_seconds(state, examples[0])
        except Exception as error:  # such as no C compiler or no Triton; auto must not fail
            state.use_compiled(False)
            state.optimizer.zero_grad(set_to_none=True)
            message = f"torch.compile: off, it fails here ({one_line(error)})"
        else:
            state.use_compiled(compiled < eager)  # compiling is done, so only the steps count
            message = describe(eager, compiled, cost, steps, state.steps_per_epoch)
    state.restore(before)
    return message


def _one_of_each_size(batches: Batches) -> list[Batch]:
    """Return a full batch and, if it is smaller, the last batch, because each size is compiled separately."""
    full, last = (next(batches.epoch(0, start)) for start in (0, len(batches) - 1))
    return [full] if len(last.labels) == len(full.labels) else [full, last]


def _step_seconds(state: TrainingState, batch: Batch) -> float:
    _train_on(state, [batch] * WARMUP)
    return time_call(partial(_train_on, state, [batch] * STEPS), state.runtime.device) / STEPS


def _train_on(state: TrainingState, batches: Sequence[Batch]) -> None:
    for batch in batches:
        train_step(state, batch)
