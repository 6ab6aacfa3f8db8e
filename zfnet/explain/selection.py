"""What the jobs that look inside a network share: the images that they show to it, and its strongest activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from zfnet.config.errors import UserError, did_you_mean
from zfnet.config.ranges import one_of
from zfnet.config.schema import Config, DataConfig, Job
from zfnet.data import ImageSet, preprocess
from zfnet.data.decode import UnreadableImage, fit_square
from zfnet.data.images import stratified
from zfnet.data.named import find_images
from zfnet.model.sizes import CONV_LAYERS
from zfnet.model.zfnet import ZFNet
from zfnet.plots.predictions import shorten
from zfnet.training.loaded import LoadedRun

# of each class, so many images at least are asked whether the network names them rightly
_CANDIDATES = 20
_FILES = 24  # rows of a figure


@dataclass(kw_only=True)
class Look(Job):
    """A job that looks inside a trained network: `split` is the part of the run's data that it shows to it.

    `auto` is validation or, where the run has none, test.
    """

    reads_run: ClassVar[str] = "needed"

    split: str = one_of("auto", "train", "validation", "test")


@dataclass(frozen=True)
class Chosen:
    """Images picked to be looked at.

    inputs: [N, 3, S, S], normalised, on the device; labels: int64 [N], on the device
    names: one each, for people; known: whether the labels are true, or (of image files) the network's own answers
    boxes: float [N, 4] (top, left, bottom, right) around the object in input pixels, where it is known
    """

    inputs: Tensor
    labels: Tensor
    names: tuple[str, ...]
    known: bool
    boxes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


def check_layer(model: ZFNet, key: str, layer: str, only_conv: bool = False) -> None:
    """Raise UserError unless the network has this layer (with `only_conv`: among conv1 … conv5)."""
    known = [name for name in model.layers if name in CONV_LAYERS or not only_conv]
    if layer not in known:
        raise UserError(f"{key}={layer}: no such layer{did_you_mean(layer, known)}")


@dataclass(frozen=True)
class Part:
    """A part of the run's data: train, validation or test."""

    name: str
    images: ImageSet


def part_to_show(used: LoadedRun) -> Part:
    """Return the part that `job.split` names (see `Look` in `job_settings.py`); raise UserError where there is none."""
    splits, name = used.splits(), used.config.job.split
    if name == "auto":
        name = "test" if splits.validation is None else "validation"
    return Part(name, used.split(name, splits))


def choose_images(used: LoadedRun, config: Config, count: int, part: Part | None = None) -> Chosen:
    """Return the files that `images=[…]` names or, without it, `count` images of `part` (default: of `job.split`).

    Of a split, classes take turns, and of each class those come first that the network names rightly: where
    it is wrong from the start there is little to explain. Raises UserError for an unreadable file.
    """
    if config.images is not None:
        return _from_files(used, config.images)
    part = part or part_to_show(used)
    return take(used, part, _pick(used, part.images, min(count, len(part.images))))


def sample(used: LoadedRun, part: ImageSet, count: int) -> Tensor:
    """Return the places of `count` images (all, if there are fewer), each class in proportion."""
    if count >= len(part):
        return torch.arange(len(part))
    return stratified(part.labels, count, used.config.seed)[0]


def take(used: LoadedRun, part: Part, index: Tensor) -> Chosen:
    """Return the images at `index` of a part as the network sees them."""
    images, labels = part.images, part.images.labels[index]
    return Chosen(
        to_inputs(used, images.pixels(index)),
        labels.to(used.runtime.device),
        tuple(
            f"{used.classes[c]} ({part.name} {i})"
            for i, c in zip(index.tolist(), labels.tolist(), strict=True)
        ),
        known=True,
        boxes=None if images.boxes is None else boxes_in_input(images.boxes[index], images, used.data),
    )


def to_inputs(used: LoadedRun, pixels: Tensor) -> Tensor:
    """Return stored pixels, uint8 [N, h, w, 3], as the network sees them: [N, 3, S, S] on its device."""
    return preprocess(pixels.to(used.runtime.device), used.data, used.runtime.channels_last)


@torch.no_grad()
def answers(used: LoadedRun, inputs: Tensor) -> Tensor:
    """Return the probabilities [N, classes] that the network gives to inputs [N, 3, S, S], on the CPU."""
    return torch.cat([used.model(part).softmax(1).cpu() for part in inputs.split(used.data.batch_size)])


def boxes_in_input(boxes: Tensor, images: ImageSet, data: DataConfig) -> Tensor:
    """Return boxes, counted in stored pixels, in pixels of the network's input: float [N, 4]."""
    stored = images.images.shape[1]
    window = data.crop_size or stored
    moved = (boxes.float() - (stored - window) // 2) * (data.image_size / window)
    return moved.clamp(0, data.image_size)


def mean_colour(used: LoadedRun, grey: float | None) -> Tensor:
    """Return a grey value, 0 … 255, in the network's units, [3]; None is the data's mean colour, which is 0 there."""
    if grey is None:
        return torch.zeros(3)
    return (grey / 255 - torch.tensor(used.data.mean)) / torch.tensor(used.data.std)


def _pick(used: LoadedRun, part: ImageSet, count: int) -> Tensor:
    """Return the places of `count` images; see `choose_images`."""
    present = part.labels.unique().tolist()
    turns = [
        present[k * len(present) // count if count < len(present) else k % len(present)] for k in range(count)
    ]
    chosen: list[int] = []
    for label in dict.fromkeys(turns):
        wanted = turns.count(label)
        members = (part.labels == label).nonzero().flatten()[: max(_CANDIDATES, 2 * wanted)]
        right = answers(used, to_inputs(used, part.pixels(members))).argmax(1) == label
        chosen += torch.cat([members[right], members[~right]])[:wanted].tolist()
    return torch.tensor(chosen)


def _from_files(used: LoadedRun, items: Sequence[str]) -> Chosen:
    images, problems = find_images(items)
    for item, problem in problems.items():
        raise UserError(f"{item}: {problem}")
    if not 1 <= len(images) <= _FILES:
        raise UserError(f"images: {len(images)} are named; a figure holds 1 to {_FILES}")
    pixels = []
    for image in images:
        try:
            square = fit_square(image.read(), used.metadata.stored_size, used.data.fit)
        except UnreadableImage as error:
            raise UserError(f"{image.name} cannot be read as an image ({error})") from error
        pixels.append(torch.from_numpy(square.copy()))
    inputs = to_inputs(used, torch.stack(pixels))
    labels = answers(used, inputs).argmax(1)
    names = tuple(
        f"{used.classes[c]}? ({shorten(i.name.rpartition('/')[2], 24)})"
        for i, c in zip(images, labels.tolist(), strict=True)
    )
    return Chosen(inputs, labels.to(used.runtime.device), names, known=False)
