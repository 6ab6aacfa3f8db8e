"""Everything that training changes, in one place: what a checkpoint holds and what a resume restores."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from zfnet.config.instantiate import build_optimizer
from zfnet.config.schema import Config
from zfnet.data import Batches, ImageSet
from zfnet.model.zfnet import ZFNet
from zfnet.training.checkpoint import (
    Checkpoint,
    load_optimizer,
    optimizer_checkpoint,
    under_prefix,
    with_prefix,
)
from zfnet.training.device import Plan
from zfnet.training.metrics import RunningMetrics
from zfnet.training.processes import SINGLE, World
from zfnet.training.schedule import Schedule


class TrainingState:
    """The network, what moves it, and where in the run it is.

    There is no random state: order, augmentation and dropout are functions of (seed, epoch, step).
    """

    def __init__(
        self, config: Config, plan: Plan, num_classes: int, steps_per_epoch: int, world: World = SINGLE
    ) -> None:
        self.config, self.plan, self.steps_per_epoch, self.world = config, plan, steps_per_epoch, world
        self.model = make_model(config, num_classes).to(plan.device).to(memory_format=plan.memory_format)
        if world.size > 1 and config.model.norm == "batch":
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(
                self.model
            )  # of the whole batch, as in one process
        # wrapping and compiling make other modules; the state dict is always the plain one's
        self.parallel = world.wrap(self.model, plan.device, config.trainer.gradients)
        self.use_compiled(plan.compile)
        fused = plan.device.type in ("cpu", "cuda")
        self.optimizer = build_optimizer(config.optimizer, self.model.parameters(), fused)
        self.schedule = Schedule(config.scheduler, self.optimizer, config.trainer.epochs, steps_per_epoch)
        self.average = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.trainer.ema), use_buffers=True)
            if config.trainer.ema
            else None
        )
        self.metrics = RunningMetrics(plan.device)
        self.epoch = 0  # the epoch in progress, counted from 0
        self.step = 0  # optimizer steps since the beginning
        self.best: dict[str, Any] | None = None  # epoch and figures of the best validation so far
        self.history: list[dict[str, Any]] = []  # one row per finished epoch
        self.seconds = 0.0  # spent in earlier epochs and processes
        self.epoch_seconds = 0.0  # spent training in this epoch by earlier processes
        self._started = time.perf_counter()

    def use_compiled(self, wanted: bool) -> None:
        """Train through torch.compile from now on, or not; each size of batch is compiled for itself."""
        self.compiled = wanted
        self.forward: Callable[..., torch.Tensor] = (
            torch.compile(self.parallel, dynamic=False) if wanted else self.parallel
        )

    @property
    def evaluated(self) -> ZFNet:
        """The weights to evaluate and keep: the moving average where there is one."""
        if self.average is None:
            return self.model
        module: ZFNet = self.average.module  # type: ignore[assignment]
        return module

    def move_average(self) -> None:
        """Let the moving average follow the weights, where there is one.

        `update_parameters` would do it too, but has the host wait for a GPU: it sends it its count of steps each time.
        """
        if self.average is None:
            return
        if self.average.n_averaged == 0:
            self.average.update_parameters(self.model)  # copies
            return
        groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        of_average, of_model = (
            (t.detach() for t in (*m.parameters(), *m.buffers())) for m in (self.average.module, self.model)
        )
        for average, now in zip(of_average, of_model, strict=True):
            group = groups.setdefault(average.dtype, ([], []))
            group[0].append(average)
            group[1].append(now)
        assert self.average.multi_avg_fn is not None
        for group in groups.values():
            self.average.multi_avg_fn(*group, self.average.n_averaged)
        self.average.n_averaged += 1

    def averaging(self, now: bool) -> contextlib.AbstractContextManager:
        """Return the context of a backward pass: whether processes average their gradients after it."""
        if now or self.world.size == 1:
            return contextlib.nullcontext()
        waiting: contextlib.AbstractContextManager = self.parallel.no_sync()  # type: ignore[operator]
        return waiting

    @property
    def step_in_epoch(self) -> int:
        return self.step - self.epoch * self.steps_per_epoch

    def elapsed(self) -> float:
        """Seconds of this run, over all its processes."""
        return self.seconds + time.perf_counter() - self._started

    def checkpoint(self, epoch_seconds: float) -> Checkpoint:
        """Return what a resume needs; `epoch_seconds` is the time spent training in this epoch."""
        optimizer = optimizer_checkpoint(self.optimizer)
        tensors = {
            **with_prefix("model", self.model.state_dict()),
            **with_prefix("optimizer", optimizer.tensors),
            "metrics": self.metrics.sums,
        }
        if self.average is not None:
            tensors |= {
                **with_prefix("average", self.average.module.state_dict()),
                "average_count": self.average.n_averaged,
            }
        metadata = {
            "identity": self.config.identity(),
            "epoch": self.epoch,
            "step": self.step,
            "optimizer": optimizer.metadata,
            "schedule": self.schedule.state(),
            "best": self.best,
            "history": self.history,
            "seconds": self.elapsed(),
            "epoch_seconds": epoch_seconds,
            "compiled": self.compiled,
        }
        return Checkpoint(tensors, metadata)

    def restore(self, saved: Checkpoint) -> None:
        """Become what `checkpoint` recorded."""
        metadata = saved.metadata
        self.model.load_state_dict(under_prefix("model", saved.tensors))
        load_optimizer(
            self.optimizer, Checkpoint(under_prefix("optimizer", saved.tensors), metadata["optimizer"])
        )
        self.schedule.load_state(metadata["schedule"])
        self.metrics.sums.copy_(saved.tensors["metrics"])
        if self.average is not None:
            self.average.module.load_state_dict(under_prefix("average", saved.tensors))
            self.average.n_averaged.copy_(saved.tensors["average_count"])
        self.epoch, self.step, self.best = metadata["epoch"], metadata["step"], metadata["best"]
        self.history, self.seconds, self.epoch_seconds = (
            metadata["history"],
            metadata["seconds"],
            metadata["epoch_seconds"],
        )


def training_batches(config: Config, plan: Plan, images: ImageSet, world: World = SINGLE) -> Batches:
    """Return the batches that a run trains on: its seed, its augmentation, and this process's share of each."""
    return Batches(
        images,
        config.data,
        plan.device,
        seed=config.seed,
        augment=config.augment,
        channels_last=plan.channels_last,
        share=(world.rank, world.size),
    )


def make_model(config: Config, num_classes: int) -> ZFNet:
    """Return the network with the weights that the seed gives it, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return ZFNet(num_classes, config.data.image_size, config.model)
