"""Load the data that a config names: training, validation and test images."""

import contextlib
import os
import socket
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from zfnet.config.errors import UserError, log, one_line, place_of
from zfnet.config.instantiate import instantiate
from zfnet.config.randomness import DATASET, SUBSET, make_key, seeded_generators
from zfnet.config.schema import DataConfig, DatasetData, FolderData, ShapesData
from zfnet.data.decode import fit_square, to_rgb
from zfnet.data.folder import load_folder
from zfnet.data.images import ImageSet, Splits, fingerprint, hold_out, image_set, stratified
from zfnet.data.shapes import draw_shapes

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "shapes": 10, "imagenette": 10}


def known_classes(data: DataConfig) -> int | None:
    """Return the number of classes if the config determines it, else None; read no image."""
    return NUM_CLASSES.get(data.name) or len(getattr(data, "classes", None) or ()) or None


def load_splits(data: DataConfig, imports: Sequence[str] = ()) -> Splits:
    """Return the training, validation and test images that the config describes; raise UserError.

    imports: packages from which a data set's `_target_` may come
    """
    if isinstance(data, FolderData):
        splits = load_imagenette(data) if data.name == "imagenette" else load_folder(data)
    elif isinstance(data, ShapesData):
        size = data.store_size or data.image_size
        train = draw_shapes(data.train_images, size, part=0)
        test = draw_shapes(data.test_images, size, part=1)
        splits = Splits(train, None, test, fingerprint(train.images, test.images))
    elif isinstance(data, DatasetData):
        splits = load_datasets(data, imports)
    else:
        splits = load_cifar(data.name, data.root or "data")
    train, validation = splits.train, splits.validation
    if validation is None:
        train, validation = hold_out(train, data.validation, data.split_seed)
    train = _subset(train, data.subset, data.split_seed)
    validation = validation and _subset(validation, data.eval_subset, data.split_seed)
    tested = splits.test and _subset(splits.test, data.eval_subset, data.split_seed)
    crop, stored = data.crop_size, train.images.shape[1]
    if crop is not None and crop > stored:
        raise UserError(f"data.crop_size={crop}: images are stored at {stored}×{stored}; raise data.store_size")
    return replace(splits, train=train, validation=validation, test=tested)


def _subset(images: ImageSet, count: int | None, seed: int) -> ImageSet:
    """Return `count` images, each class in proportion; all images if there are fewer or `count` is None."""
    if count is None or count >= len(images):
        return images
    return images.take(stratified(images.labels, count, seed, SUBSET)[0])


# -- your own torch.utils.data.Dataset


def load_datasets(data: DatasetData, imports: Sequence[str]) -> Splits:
    """Return the images of the data sets that the config names.

    Every image is read once, in order, with generators seeded by its number, and stored as uint8, so random transforms
    of a data set run once, not in each epoch. Raises UserError for items that are not (image, label).
    """
    sets = {name: instantiate(f"data.{name}", settings, Dataset, imports) for name, settings in data.parts.items()}
    read = {name: _read_all(name, dataset) for name, dataset in sets.items()}
    sizes = {image.size for image in read["train"][0]}
    width, height = next(iter(sizes))
    side = data.store_size or (width if len(sizes) == 1 and width == height else data.image_size)
    classes = data.classes or getattr(sets["train"], "classes", None)
    highest = max(max(labels) for _, labels in read.values())
    if classes is None:
        lowest = min(min(labels) for _, labels in read.values())
        if lowest > 0:
            log.warning("the labels are %d to %d: number them from 0, or class 0 stays empty", lowest, highest)
        if highest >= max(_MANY_CLASSES, sum(len(labels) for _, labels in read.values())):
            raise UserError(f"the labels are {lowest} to {highest}, more classes than images: number them from 0")
        classes = [str(number) for number in range(highest + 1)]
    if not isinstance(classes, Collection):
        raise UserError(f"data.train: its attribute classes is a {type(classes).__name__}, must be a list of names")
    if highest >= len(classes):
        raise UserError(f"data.classes={list(classes)}: the label {highest} has no name")
    made = {
        name: image_set(
            np.stack([fit_square(image, side, data.fit) for image in images]),
            torch.tensor(labels),
            [str(c) for c in classes],
        )
        for name, (images, labels) in read.items()
    }
    mark = fingerprint(*(array for part in made.values() for array in (part.images, part.labels.numpy())))
    return Splits(made["train"], made.get("val"), made.get("test"), mark)


_MANY_CLASSES = 1000
_ROUNDING = 1e-3  # resized floats can exceed 0 … 1 by this much


def _read_all(name: str, dataset: Any) -> tuple[list[Image.Image], list[int]]:
    images, labels = [], []
    if not hasattr(dataset, "__len__"):
        raise UserError(f"data.{name}: {type(dataset).__name__} has no __len__; a map-style data set needs one")
    with seeded_generators(torch.device("cpu")) as set_seed:
        for number in tqdm(range(len(dataset)), f"reading {name}", unit=" images", disable=None, leave=False):
            set_seed(make_key(DATASET, number))
            try:
                item = dataset[number]
                if not isinstance(item, (tuple, list)) or len(item) != 2:
                    length = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
                    raise TypeError(f"a {type(item).__name__}{length}; return (image, label)")
                images.append(to_image(item[0]))
                labels.append(_to_label(item[1]))
            except Exception as error:  # user code may raise anything
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise UserError(f"data.{name}: item {number} cannot be used ({reason}){place_of(error)}") from error
            if labels[-1] < 0:
                raise UserError(f"data.{name}: item {number} has the label {labels[-1]}; labels count from 0")
    if not images:
        raise UserError(f"data.{name}: the data set is empty")
    return images, labels


def to_image(image: Any) -> Image.Image:
    """Convert a PIL image, array or tensor to an RGB image; raise ValueError or another error for other input."""
    if isinstance(image, Image.Image):
        return to_rgb(image).convert("RGB")  # a copy, in case the data set returns one object for all items
    pixels = image
    if isinstance(image, torch.Tensor):
        if image.is_floating_point():
            low, high = (float(value) for value in image.aminmax())
            if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # true for NaN, too
                raise ValueError(
                    f"pixels are floats from {low:g} to {high:g}: return uint8, or floats from 0 to 1 before Normalize"
                )
            pixels = image.mul(255).round().clamp(0, 255).to(torch.uint8)
        pixels = pixels.permute(1, 2, 0).numpy() if pixels.ndim == 3 else pixels.numpy()
    array = np.asarray(pixels)
    if array.dtype != np.uint8:
        raise ValueError(f"pixels are {array.dtype}, must be uint8 (or floats from 0 to 1 in a tensor)")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 2, 3, 4)) or not array.size:
        kind = "a tensor" if isinstance(image, torch.Tensor) else "an array"
        raise ValueError(f"{kind} of shape {list(np.shape(image))}: arrays are [h, w, 3], tensors [3, h, w]")
    return to_rgb(Image.fromarray(array.squeeze(-1) if array.ndim == 3 and array.shape[2] == 1 else array))


def _to_label(label: Any) -> int:
    try:
        number = int(label)
        if isinstance(label, str) or number != label:
            raise ValueError
    except Exception as error:  # a label of any type can raise anything
        shape = list(getattr(label, "shape", ()))
        shown = f"of shape {shape}" if shape else textwrap.shorten(repr(label), 40, placeholder="…")
        raise ValueError(f"the label {shown}: labels are whole numbers from 0") from error
    return number


# -- CIFAR-10, CIFAR-100 and Imagenette, through torchvision

NETWORK_TIMEOUT_S = 30


def load_cifar(name: str, root: str) -> Splits:
    """Return the images of `cifar10` or `cifar100`, downloading them if they are not at `root`.

    On each load, torchvision compares the MD5 of every file with the published one before it reads the file. The files
    are pickles, so this also ensures that only the published pickles are opened.
    """
    import torchvision  # imported here, because it takes half a second

    folder = Path(os.path.expanduser(root))
    cls = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    train = _read_or_download(cls, name, folder, train=True)
    test = cls(str(folder), train=False)
    sets = [image_set(part.data, torch.tensor(part.targets), part.classes) for part in (train, test)]
    marks = [part.data for part in (train, test)] + [s.labels.numpy() for s in sets]
    return Splits(sets[0], None, sets[1], fingerprint(*marks))


IMAGENETTE_IMAGES = (9469, 3925)  # training and test


def load_imagenette(data: FolderData) -> Splits:
    """Return the training and test images of Imagenette at 320 px, downloading it if it is not at `data.root`.

    The folder `val` is used as the test set; validation images are held out of the training images, as for other sets.
    """
    import torchvision

    folder = Path(os.path.expanduser(str(data.root)))
    cls = torchvision.datasets.Imagenette
    published = _read_or_download(cls, "imagenette", folder, size="320px")
    root = folder / "imagenette2-320"
    splits = load_folder(replace(data, root=str(root)))
    train, test = splits.train, splits.validation
    sizes = len(train), len(test or ())
    if test is None or sizes != IMAGENETTE_IMAGES:  # an interrupted extraction leaves only some images
        raise UserError(f"{root}: {sizes[0]} + {sizes[1]} images, Imagenette has 9469 + 3925; delete it and try again")
    names = tuple(names[0] for names in published.classes)
    files = tuple(os.path.join(root.name, file) for file in train.files)  # below `data.root`
    train, test = (replace(part, classes=names, files=files) for part in (train, test))
    return replace(splits, train=train, validation=None, test=test)


def _read_or_download(cls: type, name: str, folder: Path, **settings: Any) -> Any:
    not_found = (RuntimeError, FileNotFoundError)  # torchvision raises these if files are missing or damaged
    with contextlib.suppress(*not_found):
        return cls(str(folder), **settings)
    before, lock = socket.getdefaulttimeout(), folder / ".download.lock"
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)  # torchvision sets no timeout and could wait forever
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):  # if several processes start together, one downloads
            with contextlib.suppress(*not_found):
                return cls(str(folder), **settings)
            return cls(str(folder), download=True, **settings)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # remove an empty folder, but no files of others
            lock.unlink(missing_ok=True)
            folder.rmdir()
        reason = one_line(getattr(error, "reason", None) or error)
        raise UserError(
            f"{name} is not in {folder.absolute()} and could not be downloaded ({reason}): set data.root=… to a folder "
            "that contains it, or try the built-in images with experiment=quickstart"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
