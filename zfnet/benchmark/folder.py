"""Folders of photographs: decoded once and read from the cache, against Pillow decoding them in every epoch."""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from zfnet.benchmark.turns import Contender, compare, print_table, take_turns
from zfnet.config.schema import AugmentConfig, Config, DataConfig
from zfnet.data import Batches
from zfnet.data.folder import load_folder
from zfnet.training.device import Runtime, keep_memory, timed

WIDTH, HEIGHT = 500, 375  # the most frequent size in ImageNet
DISTINCT = 32


class Epochs:
    """A pass over all images, as normalised batches on the device."""

    def __init__(
        self, name: str, images: int, device: torch.device, batches: Callable[[], Iterable[object]]
    ) -> None:
        self.name, self.batch_size, self.device, self.batches = name, images, device, batches

    def turn(self, steps: int, warmup: int) -> float:
        """Pass over the images `steps` times; there is no warm-up."""
        return timed(lambda: self._passes(steps), self.device)

    def _passes(self, count: int) -> None:
        keep_memory(self.device.type == "cpu")
        for _ in range(count):
            deque(self.batches(), maxlen=0)  # takes them all and keeps none


def measure(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Write photographs, decode them once, then read them both ways in turns; return what benchmark.json holds."""
    count = config.job.pictures
    with tempfile.TemporaryDirectory(prefix="zfnet-folder-") as place:
        root, size = Path(place, "photos"), config.data.image_size
        size_on_disk = write_pictures(root / "train", count)
        data = replace(
            config.data,
            name="folder",
            root=str(root),
            cache_dir=str(Path(place, "cache")),
            store_size=size * 256 // 224,
            crop_size=size,
            fit="crop",
        )
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        before, work = time.perf_counter(), time.process_time()
        images, *_ = load_folder(data)
        seconds, work = time.perf_counter() - before, time.process_time() - work
        flips = AugmentConfig(name="flip", crop_padding=0, flip=0.5, cutout=0)
        ours = Batches(images, data, runtime.device, augment=flips, channels_last=runtime.channels_last)
        theirs = _live(root / "train", data, cores, runtime)
        contenders: list[Contender] = [
            Epochs("from the cache", count, runtime.device, lambda: ours.epoch(0)),
            Epochs(
                "decoded by Pillow", count, runtime.device, lambda: (x.to(runtime.device) for x, _ in theirs)
            ),
        ]
        timings = take_turns(contenders, rounds=config.job.rounds, steps=1, warmup=0)
    return {
        "title": f"Batches of {WIDTH}×{HEIGHT} photographs",
        "contenders": compare(timings),
        "kilobytes_per_file": size_on_disk / count / 1000,
        "decoding": {"images_per_second": count / seconds, "share_of_cores": work / seconds / cores},
        "cores": cores,
    }


def say(result: dict[str, Any]) -> None:
    """Print how fast the cache was made and how fast it is read."""
    decoding = result["decoding"]
    print(
        f"decoded once, {decoding['images_per_second']:.0f} images/s at {decoding['share_of_cores']:.0%} of "
        f"{result['cores']} cores ({result['kilobytes_per_file']:.0f} kB a file)"
    )
    print_table(result["contenders"], "batches", "the cache is faster by")


def write_pictures(folder: Path, count: int) -> int:
    """Write `count` photograph-like JPEG files in two class folders below `folder`; return their bytes in all."""
    files = [_picture(number) for number in range(min(count, DISTINCT))]
    for number in range(count):
        place = folder / f"class{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:06d}.jpg").write_bytes(files[number % len(files)])
    return sum(len(files[number % len(files)]) for number in range(count))


def _picture(seed: int) -> bytes:
    """Return a JPEG file of clouds with detail and grain, of about the bytes that a photograph takes."""
    chance, pixels = np.random.default_rng(seed), np.zeros((HEIGHT, WIDTH, 3))
    for side, strength in ((4, 1.0), (24, 0.5), (120, 0.25)):
        noise = Image.fromarray(chance.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += strength / 1.75 * np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    pixels += chance.normal(0, 16, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _live(folder: Path, data: DataConfig, workers: int, runtime: Runtime) -> DataLoader:
    """Return the usual loader of an ImageNet script, on all cores."""
    steps = [
        transforms.Resize(int(data.store_size or 0)),
        transforms.RandomCrop(int(data.crop_size or 0)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(data.mean, data.std),
    ]
    return DataLoader(
        ImageFolder(str(folder), transforms.Compose(steps)),
        data.batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=runtime.device.type == "cuda",
    )
