"""The program's callbacks of the training loop. `callbacks:` in a config adds early stopping and your own."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import tqdm

from zfnet.config.errors import log
from zfnet.config.schema import Config
from zfnet.model.build import has_batch_norm
from zfnet.model.layers import renormalize_filters
from zfnet.runs.directory import RunDirectory
from zfnet.runs.session import Pruned, Stopped, StoppedAtOnce, StopRequest
from zfnet.runs.weights import ModelMetadata, save_model
from zfnet.training.checkpoint import BEST_FILE, Checkpoint, CheckpointWriter, copy_checkpoint, epoch_name, step_name
from zfnet.training.loggers import Logger, call_loggers, epoch_line
from zfnet.training.state import Callback, TrainingState

# -- callbacks that change the weights to train or to evaluate


def weight_callbacks(config: Config) -> list[Callback]:
    """Return the callbacks that `model.rms_limit` and `trainer.ema` ask for."""
    limit, decay = getattr(config.model, "rms_limit", None), config.trainer.ema
    made: list[Callback] = [] if limit is None else [FilterRenormalization(limit)]
    return made if decay is None else [*made, EMA(decay, warmup=config.trainer.version > 1)]


class FilterRenormalization(Callback):
    """Scales each convolution filter with an RMS above `limit` down to that RMS (paper, section 3)."""

    name = "filter_renormalization"

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def on_optimizer_step(self, state: TrainingState) -> None:
        renormalize_filters(state.model, self.limit)


class EMA(Callback):
    """Keeps an exponential moving average of the weights; the run evaluates and saves it instead of the weights.

    warmup: limit the decay after t steps to (1 + t) / (10 + t), so that the average soon forgets the first weights
    """

    name = "ema"

    def __init__(self, decay: float, warmup: bool = True) -> None:
        self.decay, self.warmup = decay, warmup

    def on_fit_start(self, state: TrainingState) -> None:
        self.average = AveragedModel(state.model, use_buffers=True)
        state.eval_model = self.average.module

    @torch.no_grad()
    def on_optimizer_step(self, state: TrainingState) -> None:
        # `update_parameters` would synchronise with a GPU, because each call copies the step count to it
        if self.average.n_averaged == 0:
            self.average.update_parameters(state.model)  # copies the weights
            return
        groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        models = (self.average.module, state.model)
        averages, values = ((t.detach() for t in (*m.parameters(), *m.buffers())) for m in models)
        for average, value in zip(averages, values, strict=True):
            group = groups.setdefault(average.dtype, ([], []))
            group[0].append(average)
            group[1].append(value)
        count = int(self.average.n_averaged)  # a CPU tensor
        update = get_ema_multi_avg_fn(min(self.decay, (1 + count) / (10 + count)) if self.warmup else self.decay)
        for group in groups.values():
            update(*group, count)
        self.average.n_averaged += 1

    def state_dict(self) -> dict[str, Any]:
        return {"model": dict(self.average.module.state_dict()), "count": self.average.n_averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average.module.load_state_dict(state["model"])
        self.average.n_averaged.copy_(state["count"])


# -- callbacks after steps


class ProgressBar(Callback):
    """Shows a bar for each epoch on a terminal, one line per minute elsewhere, with the run's remaining time.

    advice: called once, after the first steps, with the estimated seconds until the end if they are more than a minute;
    returns text to print
    """

    def __init__(self, advice: Callable[[TrainingState, float], str] | None = None) -> None:
        self.advice = advice
        self.began: tuple[float, int] | None = None  # time and number of this process's first step
        self.printed = time.perf_counter()

    def on_epoch_start(self, state: TrainingState) -> None:
        self.bar = tqdm(
            total=state.steps_per_epoch,
            initial=state.step_in_epoch,
            desc=f"epoch {state.epoch + 1}/{state.config.trainer.epochs}",
            unit="step",
            disable=None,
            leave=False,
            dynamic_ncols=True,
            # the postfix has the run's remaining time; with that of the epoch, a line would exceed 80 columns
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
        )

    def on_step_end(self, state: TrainingState) -> None:
        now = time.perf_counter()
        self.began = self.began or (now, state.step)
        seconds, steps = now - self.began[0], state.step - self.began[1]
        total = state.config.trainer.epochs * state.steps_per_epoch
        each = seconds / steps if steps else 0.0  # includes evaluations, from the second epoch on
        parts = [f"{format_duration(each * (total - state.step))} left"] if steps else []
        if state.last_reading is not None:
            loss, accuracy = state.last_reading
            speed = state.step_in_epoch * state.config.data.batch_size / state.epoch_seconds
            parts += [f"loss {loss:.2f}", f"accuracy {accuracy:.0%}"]  # short, to fit 80 columns
            parts += [f"{speed:.0f} images/s"] if self.bar.disable else []
        self.bar.update()
        self.bar.set_postfix_str(", ".join(parts), refresh=False)
        if self.bar.disable and parts and now - self.printed > 60:
            self.printed = now
            where = f"step {state.step_in_epoch}/{state.steps_per_epoch}"
            log.info("epoch %d, %s: %s", state.epoch + 1, where, ", ".join(parts))
        if seconds > 5 and self.advice is not None:
            advice, self.advice = self.advice, None
            expected = each * (total - self.began[1] + 1)  # of this process: a resumed run has only the rest to do
            if expected > 60:
                log.info(advice(state, expected))
        if state.step_in_epoch == state.steps_per_epoch:
            self.bar.close()

    def on_exception(self, state: TrainingState, error: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


def format_duration(seconds: float) -> str:
    """Return a rounded time as text: 45 s, 6 min, 2 h 45 min."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


class Metrics(Callback):
    """Reads and logs the metrics every `trainer.log_every` steps, which is the loop's only synchronisation."""

    def __init__(self, run: RunDirectory | None, loggers: dict[str, Logger]) -> None:
        self.run, self.loggers = run, loggers

    def on_step_end(self, state: TrainingState) -> None:
        if state.step % state.config.trainer.log_every:
            return
        loss, accuracy = state.read_metrics()  # makes the host wait for the device
        lr = state.schedule.lr(state.step - 1)
        values = {"step/train_loss": loss, "step/train_accuracy": accuracy, "step/lr": lr}
        call_loggers(self.loggers, "log", state.step, values)

    def on_epoch_end(self, state: TrainingState, row: Mapping[str, Any]) -> None:
        if self.run is None:  # not the main process
            return
        self.run.check_record()
        self.run.write_history(state.history)
        log.info(epoch_line(row, state.config.trainer.epochs))
        values = {f"epoch/{k}": v for k, v in row.items() if k not in ("epoch", "step") and v is not None}
        call_loggers(self.loggers, "log", row["epoch"], values)


class Profiler(Callback):
    """Writes a trace of steps 6 to 10 of the first epoch to profile/ in the run directory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.profile: torch.profiler.profile | None = None

    def on_epoch_start(self, state: TrainingState) -> None:
        if state.epoch > 0:
            return
        self.folder.mkdir(exist_ok=True)
        self.profile = torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=3, warmup=2, active=5, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(self.folder / f"step-{p.step_num:06d}.json.gz")),
            record_shapes=True,
        )
        self.profile.start()

    def on_step_end(self, state: TrainingState) -> None:
        if self.profile is None:
            return
        if state.step_in_epoch == state.steps_per_epoch:
            self.profile.stop()
            self.profile = None
        else:
            self.profile.step()


class BestWeights(Callback):
    """Saves the weights of the best epoch so far.

    It runs before callbacks that can end the training after an epoch, so that the weights of the best epoch that a
    checkpoint names are always saved.
    """

    def __init__(self, writer: CheckpointWriter) -> None:
        self.writer = writer

    def on_epoch_end(self, state: TrainingState, row: Mapping[str, Any]) -> None:
        if state.best is not None and state.best["epoch"] == row["epoch"]:
            best = Checkpoint(dict(state.eval_model.state_dict()), state.best)
            self.writer.write(BEST_FILE, best, prune=False)


class Checkpoints(Callback):
    """Saves the state every `minutes`, at the end, and when the training is stopped.

    After each of `epochs` (counted from 1) it also keeps the state and the best weights so far, for runs that branch.
    """

    def __init__(self, writer: CheckpointWriter, minutes: float, epochs: Sequence[int]) -> None:
        self.writer, self.minutes, self.epochs = writer, minutes, frozenset(epochs)
        self.last = time.perf_counter()

    def on_step_end(self, state: TrainingState) -> None:
        now = time.perf_counter()
        if now - self.last > 60 * self.minutes:
            self.save(state)
            self.last = now

    def on_epoch_end(self, state: TrainingState, row: Mapping[str, Any]) -> None:
        if row["epoch"] in self.epochs:
            self.writer.wait()
            folder = self.writer.folder
            if folder is not None and state.best is not None:
                kept = folder / epoch_name(row["epoch"], best=True)
                # a killed run can repeat this epoch when BEST_FILE is from a later one: then keep the first copy
                repeated = kept.exists() and state.best["epoch"] != row["epoch"]
                if (folder / BEST_FILE).exists() and not repeated:  # BEST_FILE can be lost; a resume warns of it
                    copy_checkpoint(folder / BEST_FILE, kept)  # before the state, so that no state lacks them
            self.writer.write(epoch_name(row["epoch"]), state.checkpoint(), prune=False)

    def on_fit_end(self, state: TrainingState) -> None:
        self.save(state)
        self.writer.wait()

    def on_exception(self, state: TrainingState, error: BaseException) -> None:
        between_steps = isinstance(error, (Stopped, Pruned)) and not isinstance(error, StoppedAtOnce)
        # a collective raises RuntimeError when another process has died; the unfinished step can have changed only the
        # running means of batch norm
        collective = isinstance(error, RuntimeError) and state.world.size > 1 and not has_batch_norm(state.model)
        if between_steps or collective:
            self.save(state)
            self.writer.wait()

    def save(self, state: TrainingState) -> None:
        """Start writing a checkpoint; raise UserError if training has diverged, so that the previous one is kept."""
        state.read_metrics()
        self.writer.write(step_name(state.step), state.checkpoint())


class StopOnSignal(Callback):
    """Ends the training after a step, if SIGINT, SIGTERM or SIGHUP arrived."""

    def __init__(self, stop: StopRequest) -> None:
        self.stop = stop

    def on_step_end(self, state: TrainingState) -> None:
        # on GPUs, several processes agree to stop only at steps where they synchronise anyway
        on_cpu = state.runtime.device.type == "cpu"
        if state.world.size == 1 or on_cpu or state.step % state.config.trainer.log_every == 0:
            self.stop.check(state.world.any)


# -- callbacks after epochs


class Snapshots(Callback):
    """Writes `epoch-0001.safetensors` and so on into `folder` after each of `epochs` (counted from 1; paper, Fig. 4).

    The files have the format of model.safetensors. A resumed run keeps its earlier snapshots. If it repeats an epoch,
    it writes the same file again.
    """

    def __init__(self, folder: Path, epochs: list[int], metadata: ModelMetadata) -> None:
        self.folder, self.epochs, self.metadata = folder, frozenset(epochs), metadata

    def on_epoch_end(self, state: TrainingState, row: Mapping[str, Any]) -> None:
        if row["epoch"] in self.epochs:
            self.folder.mkdir(exist_ok=True)
            save_model(self.folder / epoch_name(row["epoch"]), state.eval_model, self.metadata)


class Pruning(Callback):
    """Reports each epoch to a trial of a search, and ends the run if the search's pruner decides so.

    report: called with (validation accuracy, epoch); returns whether to prune
    """

    def __init__(self, report: Callable[[float, int], bool]) -> None:
        self.report = report
        self.reported = False  # whether the epochs before this process are reported

    def on_epoch_start(self, state: TrainingState) -> None:
        """Report the epochs from before a resume: the study has a new trial for a killed one, without them."""
        first = state.config.parent.epoch if state.config.parent is not None else 0
        for row in () if self.reported else state.history[first:]:
            if row.get("validation_accuracy") is not None:
                self.report(row["validation_accuracy"], row["epoch"])
        self.reported = True

    def on_epoch_end(self, state: TrainingState, row: Mapping[str, Any]) -> None:
        value, epoch = row.get("validation_accuracy"), row["epoch"]
        if value is not None and epoch < state.config.trainer.epochs and self.report(value, epoch):
            raise Pruned(f"validation accuracy {value:.2%} after epoch {epoch}, behind other trials")


class EarlyStopping(Callback):
    """Stop training if a metric does not improve by more than `min_delta` for `patience` epochs.

    monitor: a column of history.csv; lower is better if its name contains loss, otherwise higher
    """

    def __init__(self, monitor: str = "validation_loss", patience: int = 5, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ValueError("patience must be at least 1")
        self.monitor: str = monitor
        self.patience, self.min_delta = patience, min_delta
        self.best: float | None = None
        self.waited = 0

    def on_epoch_end(self, state: TrainingState, row: Mapping[str, Any]) -> None:
        value = row[self.monitor]
        if value is None:  # a callback's metric was not finite
            return
        sign = -1 if "loss" in self.monitor else 1
        if self.best is None or math.isnan(self.best) or sign * (value - self.best) > self.min_delta:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            state.should_stop = True
            log.info(
                "early stopping after epoch %d: %s did not improve for %d epochs, best %.4f",
                *(row["epoch"], self.monitor, self.waited, self.best),
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
