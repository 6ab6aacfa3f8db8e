"""The training loop."""

import time
from collections.abc import Mapping

import torch
from torch import nn
from tqdm.auto import tqdm

from zfnet.data import Batch, Batches
from zfnet.model.layers import evaluation_mode, set_dropout_step
from zfnet.runs.session import StopRequest
from zfnet.training.device import Runtime, synchronize
from zfnet.training.metrics import Evaluation, EvaluationSums
from zfnet.training.state import TrainingState, check_columns, measured_columns, set_optimizer_mode


def fit(
    state: TrainingState,
    train: Batches,
    evaluations: Mapping[str, Batches],
    stop: StopRequest,
    epochs: int | None = None,
) -> None:
    """Train from the current step of `state` to the last epoch, or until a callback sets `state.should_stop`.

    epochs: the number of the last epoch to train, instead of trainer.epochs
    evaluations: sets to evaluate after each epoch, by the name of their columns (validation, test)

    Raises UserError if the loss diverges or a callback's columns are not allowed; Stopped or Pruned after the
    callbacks have saved.
    """
    check_columns(state.callbacks, measured_columns(evaluations))
    try:
        with stop.deferred():
            last = epochs or state.config.trainer.epochs
            while state.epoch < last and not (state.should_stop and state.step_in_epoch == 0):  # end no epoch early
                train_epoch(state, train)
                measured = measure(state, evaluations, stop)
                row = state.end_epoch(measured, len(train.set))
                state.call("on_epoch_end", dict(row))
            state.call("on_fit_end")
    except BaseException as error:
        state.call("on_exception", error)
        raise
    stop.check(state.world.any)  # after a signal since the last step: all is saved, a resume will write the report


def train_epoch(state: TrainingState, train: Batches) -> None:
    """Train from the current step of `state` to the end of the epoch."""
    state.train()
    state.call("on_epoch_start")
    start = time.perf_counter() - state.epoch_seconds
    for batch in train.epoch(state.epoch, state.step_in_epoch):
        train_step(state, batch)
        if state.step_in_epoch == state.steps_per_epoch:
            synchronize(state.runtime.device)  # so that the history's seconds include all queued work
        state.epoch_seconds = time.perf_counter() - start
        state.call("on_step_end")


def train_step(state: TrainingState, batch: Batch) -> None:
    """Run the forward pass, the backward pass and the optimizer step, without making the host wait for the device."""
    config, world = state.config, state.world
    state.runtime.choose_kernels(full=batch.total == config.data.batch_size)
    totals = torch.zeros(2, dtype=state.metrics.sums.dtype, device=state.runtime.device)  # loss, correct
    for micro, last in batch.split(config.trainer.accumulate, exactly=world.size > 1):
        set_dropout_step(state.model, config.seed, state.step, micro.first)
        with state.grad_sync(last):
            with state.runtime.autocast():
                logits = state.forward(micro.images)
                loss = state.criterion(logits, micro.labels)  # summed over the images
            # DDP averages the gradients of all processes; with this factor the result is that of the batch's mean loss
            (loss * (world.size / batch.total)).backward()
        totals[0] += loss.detach()  # not stacked: in bf16, the count would be rounded
        totals[1] += (logits.argmax(1) == micro.labels).sum()
    loss_sum, correct = world.all_reduce(totals).unbind()
    state.metrics.add(loss_sum, correct, batch.total, state.step)
    state.call("on_before_optimizer_step")
    if config.trainer.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.trainer.clip_norm)
    state.schedule.set_lr(state.step)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.call("on_optimizer_step")
    state.schedule.step()
    state.step += 1


def measure(state: TrainingState, evaluations: Mapping[str, Batches], stop: StopRequest) -> dict[str, float | None]:
    """Return each set's loss and accuracy and the callbacks' metrics, by column; the same in all processes."""
    row: dict[str, float | None] = {}
    set_optimizer_mode(state.optimizer, "eval")
    if state.world.is_main:
        keep = any(callback.columns for callback in state.callbacks)
        results = {
            name: evaluate(state.eval_model, batches, state.runtime, f"{name} {state.epoch + 1}", stop, keep)
            for name, batches in evaluations.items()
        }
        for name, result in results.items():
            row |= {f"{name}_loss": result.loss, f"{name}_accuracy": result.accuracy}
        row |= state.callback_metrics(results)
    return state.world.broadcast(row)  # all processes must make the same decisions


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    runtime: Runtime,
    name: str,
    stop: StopRequest | None = None,
    probabilities: bool = False,
) -> Evaluation:
    """Evaluate the network on a whole set, in evaluation mode; its mode is restored afterwards.

    probabilities: keep every image's probability of every class
    """
    sums = EvaluationSums(probabilities)
    bar = tqdm(batches.in_order(), name, len(batches), unit="batch", disable=None, leave=False, dynamic_ncols=True)
    with evaluation_mode(model), bar:
        for batch in bar:
            runtime.choose_kernels(full=len(batch.labels) == batches.data.batch_size)
            with runtime.autocast():
                logits = model(batch.images)
            sums.add(logits, batch.labels)
            if stop is not None:
                stop.check()
    return sums.result()
