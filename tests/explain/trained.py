"""A network that the tests of explanations train for a few seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tests.helpers import TINY, compose, train_without_figures
from zfnet.data import ImageSet, load_splits, preprocess
from zfnet.model.zfnet import ZFNet
from zfnet.runs.directory import RunDirectory
from zfnet.runs.weights import load_run


@dataclass(frozen=True)
class Trained:
    """The network, its run, and its test images."""

    run: RunDirectory
    model: ZFNet
    images: ImageSet
    inputs: Tensor

    def correctly_classified(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return (inputs, labels, boxes) of the first `count` images that the network classifies correctly."""
        with torch.no_grad():
            correct = (self.model(self.inputs).argmax(1) == self.images.labels).nonzero().flatten()[:count]
        assert len(correct) == count
        assert self.images.boxes is not None
        return self.inputs[correct], self.images.labels[correct], self.images.boxes[correct]


def train_network(folder: Path) -> Trained:
    """Train a narrow network with batch normalisation on 1,080 built-in images: a third becomes correct in seconds."""
    words = (
        "trainer.epochs=6",
        "trainer.threads=1",
        "trainer.snapshots=[1,3,6]",
        "data.train_images=1200",
        "data.test_images=200",
        "data.batch_size=25",
        "optimizer.lr=3e-3",
        "model.norm=batch",
        "model.conv1.channels=12",
        "model.conv2.channels=32",
        "model.conv3.channels=48",
        "model.conv4=null",
        "model.conv5.channels=48",
    )
    run = train_without_figures(folder, compose(*TINY, *words))
    loaded = load_run(run.folder)
    images = load_splits(loaded.config.data).test
    assert images is not None
    return Trained(run, loaded.model, images, preprocess(images.pixels(torch.arange(len(images))), loaded.config.data))
