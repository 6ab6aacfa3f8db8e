"""Labelled images in one array, and functions that divide a set."""

import hashlib
import json
import mmap
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zfnet.config.errors import UserError, printable
from zfnet.config.randomness import SPLIT, make_key, random_bits


@dataclass(frozen=True)
class ImageSet:
    """Images of one size with labels.

    images: uint8 [M, h, w, 3], in memory or memory-mapped, possibly shared with other sets
    labels: int64 [N]
    rows:   int64 [N], position of each labelled image in `images`
    classes: names, by label
    boxes:  int64 [N, 4] (top, left, bottom, right; ends exclusive) around the object, if known
    files:  path of each of the M images below the data set's root, if they are files
    """

    images: np.ndarray
    labels: Tensor
    rows: Tensor
    classes: tuple[str, ...]
    boxes: Tensor | None = None
    files: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def classes_without_images(self) -> list[str]:
        """Return the names of the classes that have no image in this set."""
        counts = self.labels.bincount(minlength=len(self.classes)).tolist()
        return [name for name, count in zip(self.classes, counts, strict=True) if count == 0]

    def take(self, index: Tensor) -> "ImageSet":
        """Return the set of the images at `index`; the pixels are shared, not copied."""
        boxes = None if self.boxes is None else self.boxes[index]
        return replace(self, labels=self.labels[index], rows=self.rows[index], boxes=boxes)

    def pixels(self, index: Tensor | Sequence[int]) -> Tensor:
        """Return the images at `index` as uint8 [n, h, w, 3] on the CPU."""
        chosen = torch.from_numpy(self.images[self.rows[torch.as_tensor(index)].numpy()])
        release(self.images)
        return chosen


def release(images: np.ndarray) -> None:
    """Release the pages of a memory-mapped file, so that reading a file larger than memory does not fill the memory.

    The pages stay in the system's cache while it has room; no written data is lost.
    """
    if isinstance(images.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        images.base.madvise(mmap.MADV_DONTNEED)


def image_set(images: np.ndarray, labels: Tensor, classes: Sequence[str], boxes: Tensor | None = None) -> ImageSet:
    """Return the set of all `images`, in their order; raise UserError if two classes have the same name."""
    names = tuple(map(class_name, classes))
    if twice := next((name for name, count in Counter(names).items() if count > 1), None):
        raise UserError(f"two classes are called '{twice}' (after Unicode normalisation): rename one")
    return ImageSet(images, labels.long(), torch.arange(len(labels)), names, boxes)


def class_name(name: str) -> str:
    """Return a class's name in the form for matching, records and output: normalised (NFC), on one line."""
    return printable(unicodedata.normalize("NFC", name))


@dataclass(frozen=True)
class Splits:
    """The splits of a data set: validation selects the epoch, test gives the result; either can be None.

    fingerprint: SHA-256 of pixels and labels
    unreadable: the names of files that were left out (data.on_error=skip)
    """

    train: ImageSet
    validation: ImageSet | None
    test: ImageSet | None
    fingerprint: str
    unreadable: tuple[str, ...] = ()

    def sizes(self) -> dict[str, int]:
        """Return how many images each split has."""
        parts = {"training": self.train, "validation": self.validation, "test": self.test}
        return {name: len(part) for name, part in parts.items() if part is not None}

    def describe(self) -> dict[str, Any]:
        """Return the entry of environment.json that, together with the fingerprint, identifies the data set."""
        return {"images": self.sizes(), "classes": list(self.train.classes)}

    @property
    def validation_reports(self) -> bool:
        """Whether validation both selects the epoch and gives the result, because there is no test set."""
        return self.test is None and self.validation is not None

    def remarks(self) -> dict[str, Any]:
        """Return the entry of results.json that lists the files left out; empty if there are none."""
        return {"unreadable": list(self.unreadable)} if self.unreadable else {}

    def difference(self, environment: Mapping[str, Any], sizes: bool = True) -> str | None:
        """Describe how these images differ from those that environment.json describes; return None if they do not.

        sizes: whether a different number of images is a difference; False if the command sets the number
        """
        if "data_fingerprint" not in environment:  # nothing is recorded
            return None
        recorded, words = environment.get("data"), []
        if isinstance(recorded, dict):  # older records contain only the fingerprint
            before, now = recorded.get("classes"), list(self.train.classes)
            if isinstance(before, list) and before != now:
                changed = [f"'{c}' is new" for c in now if c not in before]
                changed += [f"'{printable(c)}' is gone" for c in before if c not in now]
                words.append(f"class {', '.join(changed)}" if changed else "the classes' order")
            current, counts = self.sizes(), recorded.get("images")
            counts = counts if isinstance(counts, dict) else current
            for name in dict.fromkeys([*counts, *current]) if sizes else ():
                if (old := counts.get(name, 0)) != (new := current.get(name, 0)):
                    words.append(f"{new:,} {printable(name)} images, not {old}")
        if not words and environment["data_fingerprint"] != self.fingerprint:
            words.append("other pixels or labels")
        return "; ".join(words) or None


def data_hash(environment: Mapping[str, Any]) -> str | None:
    """Return a hash of the images in environment.json, independent of `data.subset`; None if it describes none."""
    fingerprint, data = environment.get("data_fingerprint"), environment.get("data")
    if not isinstance(fingerprint, str) or not isinstance(data, Mapping) or not isinstance(data.get("images"), Mapping):
        return None
    sizes = {name: count for name, count in data["images"].items() if name != "training"}
    text = json.dumps([fingerprint, data.get("classes"), sizes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def stratified(labels: Tensor, count: int, seed: int, purpose: int = SPLIT) -> tuple[Tensor, Tensor]:
    """Choose `count` of the labels, each class in proportion; return the sorted indices (chosen, others).

    The counts per class are rounded by largest remainder; ties go to the lower class number.
    """
    total = len(labels)
    classes, sizes = labels.unique(return_counts=True)
    exact = sizes.double() * count / total
    counts = exact.floor().long()
    counts[(counts - exact).argsort(stable=True)[: count - int(counts.sum())]] += 1
    bits = random_bits(make_key(seed, purpose), torch.arange(total))
    chosen = torch.zeros(total, dtype=torch.bool)
    for label, number in zip(classes, counts, strict=True):
        members = (labels == label).nonzero().flatten()
        chosen[members[bits[members].argsort(stable=True)[:number]]] = True
    return chosen.nonzero().flatten(), (~chosen).nonzero().flatten()


def hold_out(train: ImageSet, amount: float, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """Divide a training set into (training, validation); `amount` is a count, or a fraction if below 1."""
    if amount == 0:
        return train, None
    count = max(1, round(amount * len(train))) if amount < 1 else int(amount)
    if count >= len(train):
        raise UserError(f"data.validation={amount:g}: leaves no training images out of {len(train)}")
    held_out, kept = stratified(train.labels, count, seed)
    return train.take(kept), train.take(held_out)


def fingerprint(*arrays: np.ndarray) -> str:
    """Return a SHA-256 over the arrays' contents."""
    digest = hashlib.sha256()
    for array in arrays:
        rows = max(1, len(array) * 2**26 // max(1, array.nbytes))  # 64 MiB at a time
        for start in range(0, len(array), rows):
            digest.update(np.ascontiguousarray(array[start : start + rows]).data)
            release(array)
    return digest.hexdigest()
