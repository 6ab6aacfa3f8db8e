"""The training loop."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from zfnet.config.errors import UserError
from zfnet.data import Batch, Batches
from zfnet.runs.signals import Pruned, Stopped, StopRequest
from zfnet.training.checkpoint import Checkpoint, CheckpointWriter, step_name
from zfnet.training.device import Plan
from zfnet.training.metrics import Evaluation, EvaluationSums
from zfnet.training.recorder import Recorder
from zfnet.training.snapshots import Snapshots
from zfnet.training.state import TrainingState

BEST = "best.safetensors"


def fit(
    state: TrainingState,
    train: Batches,
    validation: Batches | None,
    test: Batches | None,
    writer: CheckpointWriter,
    recorder: Recorder,
    stop: StopRequest,
    snapshots: Snapshots | None = None,
) -> None:
    """Train from where `state` is to the last epoch. Raises UserError if it diverges; Stopped or Pruned, having saved.

    `test` is given only where the config asks for a reading after each epoch; nothing is chosen by it.
    """
    trainer = state.config.trainer
    with stop.deferred():
        try:
            while state.epoch < trainer.epochs:
                train_epoch(state, train, writer, recorder, stop)
                row: dict[str, float] = {}
                for name, batches in (("validation", validation), ("test", test)):
                    if batches is not None and state.world.is_main:
                        found = evaluate(
                            state.evaluated, batches, state.plan, f"{name} {state.epoch + 1}", stop
                        )
                        row |= {f"{name}_loss": found.loss, f"{name}_accuracy": found.accuracy}
                row = state.world.broadcast(row)  # all processes must decide alike
                if snapshots is not None:
                    snapshots.take(state.epoch + 1, state.evaluated)
                finish_epoch(state, row, len(train.set), writer, recorder)
        except (Stopped, Pruned):
            save(state, writer, state.epoch_seconds)
            writer.wait()
            raise
        except RuntimeError:
            # what a collective raises when another process is gone; the step in progress has changed nothing yet
            if state.world.size > 1:
                save(state, writer, state.epoch_seconds)
                writer.wait()
            raise
    save(state, writer, 0.0)
    writer.wait()


def train_epoch(
    state: TrainingState, train: Batches, writer: CheckpointWriter, recorder: Recorder, stop: StopRequest
) -> None:
    """Train from where `state` is to the end of its epoch."""
    trainer, started, before = state.config.trainer, time.perf_counter(), state.epoch_seconds
    last_save = started
    state.model.train()
    profiler = recorder.profiler(trainer.profile and state.epoch == 0)
    with (
        profiler as profile,
        tqdm(
            total=len(train),
            initial=state.step_in_epoch,
            desc=f"epoch {state.epoch + 1}/{trainer.epochs}",
            unit="step",
            disable=None if state.world.is_main else True,
            leave=False,
            dynamic_ncols=True,
        ) as bar,
    ):
        for batch in train.epoch(state.epoch, state.step_in_epoch):
            train_step(state, batch)
            now = time.perf_counter()
            state.epoch_seconds = before + now - started
            bar.update()
            if profile is not None:
                profile.step()
            if state.step % trainer.log_every == 0:
                loss, accuracy = read_metrics(state)  # the one place where the host waits for the device
                speed = state.step_in_epoch * train.data.batch_size / state.epoch_seconds
                bar.set_postfix_str(
                    f"loss {loss:.4f}, accuracy {accuracy:.4f}, {speed:.0f} images/s", refresh=False
                )
                recorder.step(state.step, loss, accuracy, state.schedule.rate(state.step - 1))
            if now - last_save > 60 * trainer.checkpoint_minutes:
                save(state, writer, state.epoch_seconds)
                last_save = now
            # on GPUs the processes of a run agree to stop only where they synchronise anyway
            if (
                state.world.size == 1
                or state.plan.device.type == "cpu"
                or state.step % trainer.log_every == 0
            ):
                stop.check(state.world)


def train_step(state: TrainingState, batch: Batch) -> None:
    """Forward, backward, step: the whole of learning."""
    config, plan, world = state.config, state.plan, state.world
    tally = torch.zeros(2, dtype=state.metrics.sums.dtype, device=plan.device)  # sum of losses, correct
    size = len(batch.labels)
    part = max(1, -(-size // config.trainer.accumulate))
    for start in range(0, max(1, size), part):
        labels = batch.labels[start : start + part]
        state.model.set_step(config.seed, state.step, batch.first + start)
        with plan.autocast(), state.averaging(start + part >= size):
            logits = state.forward(batch.images[start : start + part])
            losses = F.cross_entropy(
                logits, labels, reduction="sum", label_smoothing=config.trainer.label_smoothing
            )
            # processes average their gradients, so each scales its sum to be a part of the whole batch's mean
            (losses * (world.size / batch.total)).backward()
        tally += torch.stack([losses.detach(), (logits.argmax(1) == labels).sum()])
    losses, correct = world.all_reduce(tally).unbind()
    state.metrics.add(losses, correct, batch.total, state.step)
    if config.trainer.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.trainer.clip_norm)
    with state.schedule.warmed_up(state.step):
        state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.model.renormalize()
    state.move_average()
    state.schedule.after_step()
    state.step += 1


def finish_epoch(
    state: TrainingState,
    measured: dict[str, float],
    images: int,
    writer: CheckpointWriter,
    recorder: Recorder,
) -> None:
    """Record the epoch, keep the weights if they are the best on validation, and move the learning rate."""
    loss, accuracy = read_metrics(state)
    row: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "step": state.step,
        "lr": state.schedule.rate(state.step - 1),
        "train_loss": loss,
        "train_accuracy": accuracy,
        "validation_loss": None,
        "validation_accuracy": None,
        **measured,
        "seconds": round(state.epoch_seconds, 3),
        "images_per_second": round(images / state.epoch_seconds, 1),
    }
    state.history.append(row)
    score = row["validation_accuracy"]
    if score is not None and (state.best is None or score > state.best["validation_accuracy"]):
        state.best = {k: row[k] for k in ("epoch", "validation_accuracy", "validation_loss")}
        writer.write(BEST, Checkpoint(dict(state.evaluated.state_dict()), state.best), prune=False)
    state.schedule.after_epoch(row[state.config.trainer.monitor])
    state.metrics.reset()
    state.epoch += 1
    state.epoch_seconds = 0.0
    recorder.epoch(row, state.history, state.config.trainer.epochs)


def read_metrics(state: TrainingState) -> tuple[float, float]:
    """Return the epoch's mean loss and accuracy so far; raise UserError if the loss is lost."""
    loss, accuracy, bad = state.metrics.read()
    if bad is not None:
        raise UserError(
            f"training diverged: the loss at step {bad} (epoch {bad // state.steps_per_epoch + 1}, learning rate "
            f"{state.schedule.rate(bad):g}) is not a number or beyond all bounds: lower optimizer.lr, or try "
            "scheduler.warmup_epochs=1 or trainer.clip_norm=1"
        )
    return loss, accuracy


def save(state: TrainingState, writer: CheckpointWriter, epoch_seconds: float) -> None:
    """Start writing a checkpoint, unless the loss is lost: then the one before it is worth more."""
    read_metrics(state)
    writer.write(step_name(state.step), state.checkpoint(epoch_seconds))


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Batches, plan: Plan, what: str, stop: StopRequest | None = None
) -> Evaluation:
    """Run a whole set through the network in evaluation mode; its mode is put back afterwards."""
    sums, mode = EvaluationSums(), model.training
    model.eval()
    try:
        for batch in tqdm(
            batches.in_order(),
            what,
            len(batches),
            unit="batch",
            disable=None,
            leave=False,
            dynamic_ncols=True,
        ):
            with plan.autocast():
                logits = model(batch.images)
            sums.add(logits, batch.labels)
            if stop is not None:
                stop.check()
    finally:
        model.train(mode)
    return sums.result()
