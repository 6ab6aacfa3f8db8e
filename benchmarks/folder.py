"""Compare batches from the image cache, which decodes each photograph once, with decoding by Pillow in every epoch.

    python benchmarks/folder.py --pictures 4000 --rounds 5

It writes JPEG files of ImageNet's most frequent size to a temporary folder. It prints the speed of the first decoding
and the images per second of augmented 224 px batches, from the cache and decoded by Pillow.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from zfnet import compose
from zfnet.config.schema import DataConfig
from zfnet.data import Batches
from zfnet.data.folder import load_folder
from zfnet.runs.hydra_record import register_resolvers
from zfnet.runs.tables import format_table
from zfnet.training.device import keep_memory, resolve_runtime, time_call

WIDTH, HEIGHT = 500, 375
DISTINCT = 32  # different files; the others are copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000, help="number of photographs; default: 1000")
    parser.add_argument("--rounds", type=int, default=5, help="epochs per method; default: 5")
    options, cores = parser.parse_args(), os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="zfnet-folder-") as place:
        root = Path(place, "photos")
        size = write_pictures(root / "train", options.pictures)
        register_resolvers()
        words = [f"data.root={root}", f"data.cache_dir={place}/cache", "data.store_size=256", "data.crop_size=224"]
        config = compose(["data=folder", "augment.flip=0.5", "augment.crop_padding=0", *words])
        runtime = resolve_runtime(config.trainer)
        start, work = time.perf_counter(), time.process_time()
        images = load_folder(config.data).train
        seconds, work = time.perf_counter() - start, time.process_time() - work
        print(
            f"decoded once, {options.pictures / seconds:.0f} images/s at {work / seconds / cores:.0%} of {cores} "
            f"cores ({size / options.pictures / 1000:.0f} kB a file)"
        )
        cached = Batches(images, config.data, runtime.device, augment=config.augment)
        live = pillow_loader(root / "train", config.data, cores, runtime.device)
        ways: dict[str, Callable[[], Iterable[object]]] = {
            "from the cache": lambda: cached.epoch(0),
            "decoded by Pillow": lambda: (batch.to(runtime.device) for batch, _ in live),
        }
        keep_memory(runtime.device.type == "cpu")
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, batches in ways.items():
                # a deque of length 0 consumes all batches and keeps none
                epoch_seconds = time_call(lambda b=batches: deque(b(), maxlen=0), runtime.device)  # type: ignore[misc]
                speeds[name].append(options.pictures / epoch_seconds)
    rows = [(name, *(f"{f(s):.0f}" for f in (statistics.median, min, max))) for name, s in speeds.items()]
    print("\n".join(format_table([("batches", "images/s", "min", "max"), *rows], "<>>>")))
    ratio = statistics.median(a / b for a, b in zip(*speeds.values(), strict=True))
    print(f"the cache is {ratio:.1f} times as fast (median of {options.rounds} rounds)")


def write_pictures(folder: Path, count: int) -> int:
    """Write `count` photograph-like JPEG files in two class folders of `folder`. Return the bytes in total."""
    files = [picture(number) for number in range(min(count, DISTINCT))]
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[number % len(files)])
    return sum(len(files[number % len(files)]) for number in range(count))


def picture(seed: int) -> bytes:
    """Return a JPEG file of clouds with detail and grain, with about as many bytes as a photograph."""
    rng, pixels = np.random.default_rng(seed), np.zeros((HEIGHT, WIDTH, 3))
    for side, strength in ((4, 1.0), (24, 0.5), (120, 0.25)):
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += strength / 1.75 * np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    pixels += rng.normal(0, 16, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def pillow_loader(folder: Path, data: DataConfig, workers: int, device: torch.device) -> DataLoader:
    """Return the loader that ImageNet scripts usually use."""
    steps = [
        transforms.Resize(int(data.store_size or 0)),
        transforms.RandomCrop(int(data.crop_size or 0)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(data.mean, data.std),
    ]
    dataset = ImageFolder(str(folder), transforms.Compose(steps))
    return DataLoader(dataset, data.batch_size, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda")


if __name__ == "__main__":
    main()
