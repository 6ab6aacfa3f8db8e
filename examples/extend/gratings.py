"""A data set of your own: any map-style `torch.utils.data.Dataset` of (image, label) pairs."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset


class Gratings(Dataset):
    """Striped images of `size` × `size` pixels in four orientations, with noise. Image k is always the same.

    split: train, val or test, which share no images; count: number of images
    """

    classes = ("horizontal", "rising", "vertical", "falling")

    def __init__(self, split: str, count: int = 1000, size: int = 32) -> None:
        self.split, self.count, self.size = ("train", "val", "test").index(split), count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        random, label = np.random.default_rng([self.split, index]), index % len(self.classes)
        y, x = np.mgrid[: self.size, : self.size] / self.size
        angle = label * np.pi / 4 + random.normal(0, 0.1)
        wave = np.sin(2 * np.pi * (4 * (y * np.cos(angle) + x * np.sin(angle)) + random.random()))
        grey = 128 + 50 * wave[..., None] + random.normal(0, 40, (self.size, self.size, 3))
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)), label
