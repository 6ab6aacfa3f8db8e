"""Compare this program's training speed with other training loops, in alternating rounds, data loading included.

    pip install -e '.[benchmark]'      # timm and Lightning; a missing package is left out
    python benchmarks/training.py data=shapes data.store_size=32 data.batch_size=32 job.steps=2

It accepts the overrides of `python run.py job=benchmark` and `--workers N`, the number of loader processes of the other
loops (this program uses none). It writes benchmark.json and a figure to outputs/benchmarks/training. The blog's loop
follows the blog post; the others follow their project's documentation or reference script. All except the blog's use
the config's network, optimizer settings and precision, so they differ only in the loop and the loader.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys
import time
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from zfnet import compose
from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.data import ImageSet, load_splits
from zfnet.jobs.benchmark import Contender, TrainingSteps, measure, print_result, time_steps, write_result
from zfnet.runs.hydra_record import register_resolvers
from zfnet.training.build import build_optimizer, initial_model
from zfnet.training.device import Runtime, keep_memory, resolve_runtime, synchronize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=0, help="loader processes of the other loops; default: 0")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/training"))
    parser.add_argument("overrides", nargs="*", help="config overrides, such as data.batch_size=32")
    options = parser.parse_intermixed_args()
    register_resolvers()
    config = compose(["job=benchmark", *options.overrides])
    runtime = resolve_runtime(config.trainer, own_network=isinstance(config.model, dict))
    images = load_splits(config.data, config.imports).train
    ours, job = TrainingSteps("zfnet", config, runtime, images), config.job
    loops = other_loops(config, runtime, images, options.workers)
    result = measure(ours, loops, job.rounds, job.steps, job.warmup)
    print_result(result)
    write_result(result, config, runtime, options.output)
    print(f"written to {options.output}")


def other_loops(config: Config, runtime: Runtime, images: ImageSet, workers: int) -> Iterator[Contender]:
    """Yield the loops whose packages are installed. The blog's loop needs images of 224 px."""
    if config.data.image_size == 224:
        yield BlogLoop(images, config.data.batch_size, runtime.device, workers)
    else:
        print("the blog's network accepts only images of 224 px: its loop is left out")
    yield TorchvisionLoop(config, runtime, images, workers)
    for package, loop in (("timm", TimmLoop), ("lightning", LightningLoop)):
        if importlib.util.find_spec(package):
            yield loop(config, runtime, images, workers)
        else:
            print(f"{package} is not installed: its loop is left out")


class PillowImages(Dataset):
    """Loads one image at a time, like torchvision's data sets: Pillow image, resize, tensor, normalise."""

    def __init__(self, images: ImageSet, size: int) -> None:
        self.images = images
        self.transform: Any = transforms.Compose(
            [
                transforms.Resize((size, size)),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images.images[int(self.images.rows[index])])
        return self.transform(image), int(self.images.labels[index])


class BlogZFNet(nn.Module):
    """The blog's module for images [N, 3, 224, 224]. Its state dict has the keys `features.0.weight`, …"""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()

        def pool(padding: int) -> nn.Module:
            return nn.MaxPool2d(3, 2, padding, return_indices=True)

        def relu() -> nn.Module:
            return nn.ReLU(inplace=True)

        self.features = nn.Sequential(
            *(nn.Conv2d(3, 96, 7, 2, 1), relu(), pool(1)),
            *(nn.Conv2d(96, 256, 5, 2), relu(), pool(1)),
            *(nn.Conv2d(256, 384, 3, 1, 1), relu()),
            *(nn.Conv2d(384, 384, 3, 1, 1), relu()),
            *(nn.Conv2d(384, 256, 3, 1, 1), relu(), pool(0)),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(9216, 4096), relu(), nn.Dropout()),
            *(nn.Linear(4096, 4096), relu(), nn.Dropout()),
            nn.Linear(4096, num_classes),
        )
        self.feature_outputs: list[Tensor | int] = [0] * len(self.features)
        self.switch_indices: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):
                x, self.switch_indices[i] = layer(x)
            else:
                x = layer(x)
            self.feature_outputs[i] = x
        logits: Tensor = self.classifier(x.view(x.size(0), -1))
        return logits


class BlogLoop:
    """The blog's loop in NCHW and fp32. It stores unused pooling indices, and calls `.item()` every step."""

    name = "the blog's loop"

    def __init__(self, images: ImageSet, batch_size: int, device: torch.device, workers: int) -> None:
        self.batch_size, self.device = batch_size, device
        dataset = PillowImages(images, 224)
        self.loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True)
        self.net = BlogZFNet(len(images.classes)).to(device)
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-3)
        self.criterion = nn.CrossEntropyLoss()

    def time_turn(self, steps: int, warmup: int) -> float:
        keep_memory(False)
        return time_steps(self._loop(), steps, warmup, self.device)

    def _loop(self) -> Generator[None, None, None]:
        self.net.train()
        train_loss, train_correct, count = 0.0, 0.0, 0
        while True:
            for batch_images, batch_labels in self.loader:
                images, labels = batch_images.to(self.device), batch_labels.to(self.device)
                logits = self.net(images)
                loss = self.criterion(logits, labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                count += len(labels)
                train_loss += loss.item()
                train_correct += (logits.argmax(1) == labels).sum().item()
                yield


class _Loop:
    """Base class of the other loops: the network, the optimizer and a turn."""

    name = ""

    def __init__(self, config: Config, runtime: Runtime, images: ImageSet, workers: int) -> None:
        self.batch_size, self.runtime, self.images, self.workers = (config.data.batch_size, runtime, images, workers)
        self.config = config
        self.model: nn.Module = initial_model(config, len(images.classes))[0].to(runtime.device)
        self.optimizer = build_optimizer(config, self.model)
        self.criterion = nn.CrossEntropyLoss()
        self.loader: Any = self._loader()

    def _loader(self) -> Any:
        return DataLoader(
            PillowImages(self.images, self.config.data.image_size),
            self.batch_size,
            shuffle=True,
            num_workers=self.workers,
            pin_memory=self.runtime.device.type == "cuda",
            drop_last=True,
        )

    def time_turn(self, steps: int, warmup: int) -> float:
        keep_memory(False)  # other projects do not change malloc's settings
        return time_steps(self._loop(), steps, warmup, self.runtime.device)

    def _loop(self) -> Generator[None, None, None]:
        raise NotImplementedError


class TorchvisionLoop(_Loop):
    """Follows torchvision's references/classification: Pillow transforms, DataLoader, metrics read every step."""

    name = "torchvision reference"

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
                best = logits.topk(min(5, logits.shape[1]), 1).indices.eq(labels[:, None])
                best[:, :1].sum().item(), best.sum().item(), loss.item()
                yield


class TimmLoop(_Loop):
    """Follows timm's train.py: timm's loader and prefetcher, channels_last, the loss read every step."""

    name = "timm"

    def _loader(self) -> Any:
        from timm.data import create_loader

        data = self.config.data
        dataset: Any = PillowImages(self.images, data.image_size)  # timm replaces the transform
        self.model = self.model.to(memory_format=torch.channels_last)
        return create_loader(
            dataset,
            input_size=(3, data.image_size, data.image_size),
            batch_size=self.batch_size,
            is_training=True,
            no_aug=True,
            use_prefetcher=self.runtime.device.type == "cuda",
            mean=tuple(data.mean),
            std=tuple(data.std),
            num_workers=self.workers,
            persistent_workers=False,
            device=self.runtime.device,
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


class LightningLoop(_Loop):
    """PyTorch Lightning's Trainer with a DataLoader, progress bar and checkpoints off."""

    name = "Lightning"

    def time_turn(self, steps: int, warmup: int) -> float:
        import lightning

        keep_memory(False)
        module, clock = self._module_and_clock(warmup)
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
        return float(clock.end - clock.start)

    def _module_and_clock(self, warmup: int) -> tuple[Any, Any]:
        """Return the LightningModule, and a callback that records when the last warm-up step and the last step end."""
        import lightning

        model, optimizer, criterion, device = self.model, self.optimizer, self.criterion, self.runtime.device

        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = model

            def training_step(self, batch: Any, number: int) -> Any:
                images, labels = batch
                return criterion(self.model(images), labels)

            def configure_optimizers(self) -> Any:
                return optimizer

        class Clock(lightning.Callback):
            start = end = 0.0

            def on_train_start(self, *_: Any) -> None:
                if warmup == 0:
                    self.start = time.perf_counter()

            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                if trainer.global_step == warmup:
                    synchronize(device)
                    self.start = time.perf_counter()

            def on_train_end(self, *_: Any) -> None:
                synchronize(device)
                self.end = time.perf_counter()

        return Module(), Clock()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
