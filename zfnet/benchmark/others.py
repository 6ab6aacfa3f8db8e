"""Other people's training loops, with the same network, optimizer settings and images, and their own loaders.

Each is written the way its project's documentation or reference script trains, and takes part only where its
package is installed. All use the precision of our runtime, so that what differs is the loop and the loader.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import time
import warnings
from collections.abc import Generator
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset

from zfnet.benchmark.blog import PillowImages
from zfnet.benchmark.turns import Contender, time_steps
from zfnet.config.instantiate import build_optimizer
from zfnet.config.schema import Config
from zfnet.data import ImageSet
from zfnet.training.device import Runtime, keep_memory, synchronize
from zfnet.training.state import make_model


def other_loops(config: Config, runtime: Runtime, images: ImageSet, workers: int) -> list[Contender]:
    """Return torchvision's reference loop, and timm's and Lightning's where they are installed."""
    loops: list[Contender] = [TorchvisionLoop(config, runtime, images, workers)]
    if importlib.util.find_spec("timm"):
        loops.append(TimmLoop(config, runtime, images, workers))
    if importlib.util.find_spec("lightning"):
        loops.append(LightningLoop(config, runtime, images, workers))
    return loops


class _Loop:
    """What these loops share: the network, the optimizer, and a turn."""

    name = ""

    def __init__(self, config: Config, runtime: Runtime, images: ImageSet, workers: int) -> None:
        self.batch_size, self.runtime, self.workers = config.data.batch_size, runtime, workers
        self.model = make_model(config, len(images.classes)).to(runtime.device)
        self.optimizer = build_optimizer(config.optimizer, self.model.parameters())
        self.criterion = nn.CrossEntropyLoss()

    def turn(self, steps: int, warmup: int) -> float:
        return time_steps(self._loop(), steps, warmup, self.runtime.device)

    def _loop(self) -> Generator[None, None, None]:
        raise NotImplementedError


def _pillow_loader(config: Config, runtime: Runtime, images: ImageSet, workers: int) -> DataLoader:
    """Return the usual loader: Pillow images one at a time, made into batches."""
    return DataLoader(
        PillowImages(images, config.data.image_size),
        config.data.batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=runtime.device.type == "cuda",
        drop_last=True,
    )


class TorchvisionLoop(_Loop):
    """After torchvision's references/classification: Pillow transforms, DataLoader, metrics read each step."""

    name = "torchvision reference"

    def __init__(self, config: Config, runtime: Runtime, images: ImageSet, workers: int) -> None:
        super().__init__(config, runtime, images, workers)
        self.loader = _pillow_loader(config, runtime, images, workers)

    def _loop(self) -> Generator[None, None, None]:
        self.model.train()
        while True:
            for batch_images, batch_labels in self.loader:
                images, labels = batch_images.to(self.runtime.device), batch_labels.to(self.runtime.device)
                with self.runtime.autocast():
                    logits = self.model(images)
                    loss = self.criterion(logits, labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                best = logits.topk(5, 1).indices.eq(labels[:, None])
                best[:, :1].sum().item(), best.sum().item(), loss.item()
                yield


class TimmLoop(_Loop):
    """After timm's train.py: its loader with its prefetcher, channels_last, the loss read each step."""

    name = "timm"

    def __init__(self, config: Config, runtime: Runtime, images: ImageSet, workers: int) -> None:
        super().__init__(config, runtime, images, workers)
        create_loader: Any = importlib.import_module("timm.data").create_loader
        size = config.data.image_size
        self.model = self.model.to(memory_format=torch.channels_last)
        self.loader = create_loader(
            _Pictures(images),
            input_size=(3, size, size),
            batch_size=self.batch_size,
            is_training=True,
            no_aug=True,
            use_prefetcher=runtime.device.type == "cuda",
            mean=tuple(config.data.mean),
            std=tuple(config.data.std),
            num_workers=workers,
            persistent_workers=False,
            device=runtime.device,
        )

    def _loop(self) -> Generator[None, None, None]:
        self.model.train()
        while True:
            for batch_images, batch_labels in self.loader:
                images = batch_images.to(self.runtime.device, memory_format=torch.channels_last)
                labels = batch_labels.to(self.runtime.device)
                with self.runtime.autocast():
                    loss = self.criterion(self.model(images), labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                loss.item()
                yield


class _Pictures(Dataset):
    """Pillow images, to which timm adds its own transform."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        picture = Image.fromarray(self.images.images[int(self.images.rows[index])])
        return self.transform(picture), int(self.images.labels[index])


class LightningLoop(_Loop):
    """PyTorch Lightning's Trainer with a DataLoader, progress bar and checkpoints off."""

    name = "Lightning"

    def __init__(self, config: Config, runtime: Runtime, images: ImageSet, workers: int) -> None:
        super().__init__(config, runtime, images, workers)
        self.loader = _pillow_loader(config, runtime, images, workers)

    def turn(self, steps: int, warmup: int) -> float:
        import lightning

        keep_memory(False)
        module = _lightning_module(self.model, self.optimizer, self.criterion)
        clock = _clock(warmup, self.runtime.device)
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = lightning.Trainer(
                max_steps=warmup + steps,
                accelerator="gpu" if self.runtime.device.type == "cuda" else "cpu",
                devices=1,
                precision="bf16-mixed" if self.runtime.precision == "bf16" else "32-true",
                callbacks=[clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, self.loader)
        return float(clock.ended - clock.started)


def _lightning_module(model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module) -> Any:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, number: int) -> Any:
            images, labels = batch
            return criterion(self.model(images), labels)

        def configure_optimizers(self) -> Any:
            return optimizer

    return Module()


def _clock(warmup: int, device: torch.device) -> Any:
    """Return a callback that notes when the last warm-up step and the last step ended."""
    import lightning

    class Clock(lightning.Callback):
        started = ended = 0.0

        def on_train_start(self, *_: Any) -> None:
            if warmup == 0:
                self.started = time.perf_counter()

        def on_train_batch_end(
            self, trainer: Any, module: Any, outputs: Any, batch: Any, number: int
        ) -> None:
            if trainer.global_step == warmup:
                synchronize(device)
                self.started = time.perf_counter()

        def on_train_end(self, *_: Any) -> None:
            synchronize(device)
            self.ended = time.perf_counter()

    return Clock()
