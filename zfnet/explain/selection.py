"""Functions that the analyses share, mainly to select layers and images.

To add an analysis, write one class and one YAML file: see examples/extend/saliency.py.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from zfnet.config.errors import UserError, did_you_mean
from zfnet.config.schema import Config, Job
from zfnet.data import ImageSet, preprocess
from zfnet.data.decode import UnreadableImage, fit_square
from zfnet.data.files import find_images, read_named
from zfnet.data.images import stratified
from zfnet.explain.boxes import boxes_in_input
from zfnet.model.chain import Chain, Network
from zfnet.model.layers import full_precision
from zfnet.runs.directory import find_run
from zfnet.runs.tables import shorten
from zfnet.runs.weights import ModelMetadata, load_model
from zfnet.training.loaded import LoadedRun

_CANDIDATES = 20  # at least this many images of a class are classified to find correct ones
_MAX_FILES = 24  # a figure has one row per file


@dataclass(kw_only=True)
class Look(Job):
    """A job that explains a trained network.

    split: which of the run's images to use; `auto` means validation, or test if the run has no validation images
    """

    reads_run: ClassVar[str] = "needed"

    split: Literal["auto", "train", "validation", "test"]


@dataclass(frozen=True)
class Split:
    """One split of the run's data, and its name: train, validation or test."""

    name: str
    images: ImageSet


@dataclass(frozen=True)
class ChosenImages:
    """Images chosen for an analysis.

    inputs: [N, 3, S, S], normalised, on the device; labels: int64 [N], on the device
    names: for display; known: whether the labels come from the data set; for image files the network predicts them
    boxes: float [N, 4] (top, left, bottom, right) around the object in input pixels, if known
    """

    inputs: Tensor
    labels: Tensor
    names: tuple[str, ...]
    known: bool
    boxes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


def pick_layers(
    network: Network, key: str, names: Sequence[str] | str | None, default: Sequence[str], only_conv: bool = False
) -> list[str]:
    """Return the layers that the setting `key` names, or the default for null; raise UserError for an unknown layer.

    only_conv: accept only convolutions (in a network that is not a chain: modules that return feature maps)
    """
    known, what = (network.conv_layers, "convolution") if only_conv else (network.layers, "layer")
    if only_conv and not isinstance(network, Chain):
        what = "layer of feature maps"
    if not known:
        raise UserError(f"{key}: the network has no {what}")
    names = [names] if isinstance(names, str) else names
    if names is not None and not names:
        raise UserError(f"{key}=[]: names no layer; null means the default")
    if names is None and not default:
        raise UserError(f"{key}: the default finds no layer in this network; name some{did_you_mean('', known)}")
    for name in names or ():
        if name in known:
            continue
        if name in network.outputs:
            raise UserError(f"{key}={name}: is not a {what}: it {network.outputs[name]}")
        raise UserError(f"{key}={name}: the network has no such {what}{did_you_mean(name, known)}")
    return list(dict.fromkeys(default if names is None else names))


def pick_maps(network: Network, key: str, name: str | None) -> str | None:
    """Return the layer of feature maps that the setting `key` names, by default the last; None if there are no maps.

    Raises UserError for an unknown layer.
    """
    if name is None and not network.conv_layers:
        return None
    return pick_layers(network, key, name, network.conv_layers[-1:], only_conv=True)[0]


def load_other(name: str, loaded: LoadedRun) -> tuple[Chain, ModelMetadata]:
    """Return the network of the run that `job.other` names, on the device of `loaded`; raise UserError if no chain."""
    model, metadata = load_model(find_run(name, "job.other").weights, loaded.config.imports)
    try:
        return Chain.of(model.to(loaded.runtime.device), metadata.data.image_size), metadata
    except UserError as error:
        raise UserError(f"job.other={name}: is not a chain of layers: {error}") from error


def chosen_split(loaded: LoadedRun) -> Split:
    """Return the split that `job.split` names (see `Look`); raise UserError if the run has no such images."""
    name = loaded.config.job.split
    if name == "auto":
        name = "test" if loaded.splits.validation is None else "validation"
    return Split(name, loaded.split(name))


def choose_images(loaded: LoadedRun, config: Config, count: int) -> ChosenImages:
    """Return the files that `images=[…]` names or, without it, `count` images of `job.split`.

    Classes alternate; within a class, correctly classified images come first, since a wrong prediction leaves little to
    explain. Raises UserError for an unreadable file.
    """
    if config.images is not None:
        return _from_files(loaded, config.images)
    split = chosen_split(loaded)
    return take(loaded, split, _correct_first(loaded, split.images, min(count, len(split.images))))


def sample(loaded: LoadedRun, images: ImageSet, count: int) -> Tensor:
    """Return the places of `count` images (or all, if there are fewer), with each class in proportion."""
    if count >= len(images):
        return torch.arange(len(images))
    return stratified(images.labels, count, loaded.config.seed)[0]


def take(loaded: LoadedRun, split: Split, index: Tensor) -> ChosenImages:
    """Return the images at `index` of a split as network inputs."""
    images, labels = split.images, split.images.labels[index]
    names = (f"{loaded.classes[c]} ({split.name} {i})" for i, c in zip(index.tolist(), labels.tolist(), strict=True))
    boxes = None if images.boxes is None else boxes_in_input(images.boxes[index], images, loaded.data)
    inputs = to_inputs(loaded, images.pixels(index))
    return ChosenImages(inputs, labels.to(loaded.runtime.device), tuple(names), known=True, boxes=boxes)


def to_inputs(loaded: LoadedRun, pixels: Tensor) -> Tensor:
    """Return stored pixels, uint8 [N, h, w, 3], as network inputs [N, 3, S, S] on the run's device."""
    return preprocess(pixels.to(loaded.runtime.device), loaded.data, loaded.runtime.channels_last)


@torch.no_grad()
@full_precision()
def predict(loaded: LoadedRun, inputs: Tensor) -> Tensor:
    """Return the network's probabilities [N, classes] for inputs [N, 3, S, S], on the CPU."""
    return torch.cat([loaded.model(chunk).softmax(1).cpu() for chunk in inputs.split(loaded.data.batch_size)])


def fill_colour(loaded: LoadedRun, grey: float | None) -> Tensor:
    """Return a grey value, 0 … 255, as network input [3]; None means the data's mean colour, normalised to 0."""
    if grey is None:
        return torch.zeros(3)
    return (grey / 255 - torch.tensor(loaded.data.mean)) / torch.tensor(loaded.data.std)


def _correct_first(loaded: LoadedRun, images: ImageSet, count: int) -> Tensor:
    """Return the places of `count` images; see `choose_images`."""
    present = images.labels.unique()
    if count < len(present):
        present = present[torch.arange(count) * len(present) // count]
    ranked: list[list[int]] = []
    for label in present.tolist():
        members = (images.labels == label).nonzero().flatten()[: max(_CANDIDATES, 2 * count // len(present))]
        correct = predict(loaded, to_inputs(loaded, images.pixels(members))).argmax(1) == label
        ranked.append(torch.cat([members[correct], members[~correct]]).tolist())
    turns = itertools.chain.from_iterable(itertools.zip_longest(*ranked))
    places = [place for place in turns if place is not None][:count]
    if len(places) < min(count, len(images)):  # small classes have too few images, so take more of the large ones
        rest = torch.ones(len(images), dtype=torch.bool).index_fill(0, torch.tensor(places), False)
        places += rest.nonzero().flatten()[: count - len(places)].tolist()
    return torch.tensor(places)


def read_files(loaded: LoadedRun, items: Sequence[str]) -> tuple[Tensor, list[str]]:
    """Return the images that `images=[…]` names in stored pixels, uint8 [N, s, s, 3], and their names.

    Raises UserError for an unreadable image, and unless there are 1 to _MAX_FILES images.
    """
    images, problems = find_images(items)
    for item, problem in problems.items():
        raise UserError(f"{item}: {problem}")
    if not 1 <= len(images) <= _MAX_FILES:
        raise UserError(f"images: {len(images)} are given; a figure shows 1 to {_MAX_FILES}")
    pixels, size = [], loaded.metadata.stored_size
    for image in images:
        try:
            picture = read_named(image, loaded.data.max_pixels, size * loaded.data.draft)
            square = fit_square(picture, size, loaded.data.fit)
        except UnreadableImage as error:
            raise UserError(f"{image} cannot be read as an image ({error})") from error
        pixels.append(torch.from_numpy(square.copy()))
    return torch.stack(pixels), images


def _from_files(loaded: LoadedRun, items: Sequence[str]) -> ChosenImages:
    pixels, files = read_files(loaded, items)
    inputs = to_inputs(loaded, pixels)
    labels = predict(loaded, inputs).argmax(1)
    classes = [loaded.classes[c] for c in labels.tolist()]
    names = (f"{c}? ({shorten(name.rpartition('/')[2], 24)})" for name, c in zip(files, classes, strict=True))
    return ChosenImages(inputs, labels.to(loaded.runtime.device), tuple(names), known=False)
