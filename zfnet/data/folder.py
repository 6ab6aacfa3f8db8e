"""Images in folders, a folder a class: found, decoded once into a memory-mapped cache, and labelled.

The cache is keyed by what it holds (each file's path, size and time, and how it is stored), built beside its
final place and renamed, so it is either whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from zfnet.config.errors import UserError
from zfnet.config.schema import FolderData
from zfnet.data.decode import SUFFIXES, UnreadableImage, fit_square, image_size, read_image
from zfnet.data.images import ImageSet, image_set, release, stratified

CACHE_VERSION = 1
_PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
# of a folder that is not divided, these parts are set aside for validation and test
_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class _Listing:
    """Every image file: its path below root, its part (train, val, test or all) and its class."""

    root: Path
    files: list[str]
    parts: list[str]
    labels: list[int]
    classes: list[str]


def load_folder(data: FolderData) -> tuple[ImageSet, ImageSet | None, ImageSet | None, str]:
    """Return (train, validation or None, test or None, fingerprint) of the images below `data.root`."""
    listing = _list_files(Path(str(data.root)).expanduser())
    images, good, mark = _cached(listing, data)
    whole = image_set(images, torch.tensor(listing.labels)[good], listing.classes)
    parts = np.array(listing.parts)[good.numpy()]
    train, val, test = (_part(whole, parts == name) for name in _PARTS)
    if train is None:  # one folder of classes, not divided
        held_out, kept = stratified(whole.labels, round(len(whole) * _TEST_FRACTION), data.split_seed)
        train, test = whole.take(kept), whole.take(held_out)
    return train, val, test, mark


def _part(whole: ImageSet, chosen: np.ndarray) -> ImageSet | None:
    return whole.take(torch.from_numpy(chosen.nonzero()[0])) if chosen.any() else None


def _list_files(root: Path) -> _Listing:
    if not root.is_dir():
        raise UserError(f"data.root={root}: there is no such folder")
    below = {p.name: p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")}
    found = {part: below[name] for part, names in _PARTS.items() for name in names if name in below}
    if found and "train" not in found:
        raise UserError(f"data.root={root}: has {', '.join(found)}/ but no train/ folder")
    folders = found or {"all": root}
    classes = sorted(
        p.name for p in folders.get("train", root).iterdir() if p.is_dir() and not p.name.startswith(".")
    )
    listing = _Listing(root, [], [], [], classes)
    for part, folder in folders.items():
        for class_folder in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
            if class_folder.name not in classes:
                raise UserError(
                    f"{class_folder}: its class '{class_folder.name}' has no folder in {folders['train']}"
                )
            files = _images_below(class_folder, root)
            listing.files.extend(files)
            listing.parts.extend([part] * len(files))
            listing.labels.extend([classes.index(class_folder.name)] * len(files))
    if len(classes) < 2:
        raise UserError(f"data.root={root}: needs at least two class folders with images, has {len(classes)}")
    learned = {
        label for label, part in zip(listing.labels, listing.parts, strict=True) if part in ("train", "all")
    }
    if not learned:
        raise UserError(f"data.root={root}: its class folders hold no image files")
    for label, name in enumerate(classes):
        if label not in learned:
            raise UserError(
                f"{folders.get('train', root) / name}: holds no image files to learn the class '{name}' from; "
                "put some there or remove the folder"
            )
    return listing


def _images_below(folder: Path, root: Path) -> list[str]:
    """Return the paths below `root` of the image files below `folder`, in a fixed order."""
    files = []
    for place, _, names in os.walk(folder):
        within = Path(place).relative_to(root).as_posix()
        files += [
            f"{within}/{name}"
            for name in names
            if os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")
        ]
    return sorted(files, key=lambda file: file.split("/"))


def _cached(listing: _Listing, data: FolderData) -> tuple[np.ndarray, torch.Tensor, str]:
    """Return (images [M, s, s, 3] memory-mapped, the files they came from, fingerprint), decoding if need be."""
    stats = [os.stat(os.path.join(listing.root, f)) for f in listing.files]
    metadata = [
        CACHE_VERSION,
        data.store_size,
        data.image_size,
        data.crop_size,
        data.fit,
        data.on_error,
        [[f, s.st_size, s.st_mtime_ns] for f, s in zip(listing.files, stats, strict=True)],
        listing.labels,
    ]
    key = hashlib.sha256(json.dumps(metadata).encode()).hexdigest()[:24]
    place = _cache_folder(data)
    folder = place / key
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(
            place / f"{key}.lock"
        ):  # of several runs that start together, one decodes and the others wait
            if not folder.is_dir():
                _build(listing, data, folder)
    except OSError as error:
        shutil.rmtree(folder.with_suffix(".partial"), ignore_errors=True)
        raise UserError(
            f"the image cache {place} cannot be written ({error}): set data.cache_dir=…"
        ) from error
    try:
        return _read_cache(folder, listing)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the image cache {folder} is damaged ({type(error).__name__}): delete it, and it is made again"
        ) from error


def _read_cache(folder: Path, listing: _Listing) -> tuple[np.ndarray, torch.Tensor, str]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["skipped"]:
        print(
            f"{len(manifest['skipped'])} unreadable images are left out (data.on_error=skip); "
            f"first: {listing.root / manifest['skipped'][0]}"
        )
    good = torch.from_numpy(np.load(folder / "rows.npy"))
    return np.load(folder / "images.npy", mmap_mode="r"), good, manifest["fingerprint"]


def _cache_folder(data: FolderData) -> Path:
    if data.cache_dir:
        return Path(data.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "zfnet"


def _build(listing: _Listing, data: FolderData, folder: Path) -> None:
    """Decode every file into `folder`, on all cores (Pillow's decoders release the interpreter lock)."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
    partial.mkdir()
    count = len(listing.files)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        size = data.store_size or _natural_size(pool, listing, data)
        images = _new_array(partial / "images.npy", (count, size, size, 3))

        def decode(number: int) -> str | None:
            try:
                images[number] = fit_square(read_image(listing.root / listing.files[number]), size, data.fit)
                return None
            except UnreadableImage as error:
                return str(error)

        # the digest and the disk keep step with the decoding, which needs neither
        problems, digest = {}, hashlib.sha256()
        jobs = pool.map(decode, range(count))
        for number, problem in enumerate(
            tqdm(jobs, "decoding", count, unit=" images", disable=None, leave=False)
        ):
            if number % 256 == 0:
                with open(partial / "images.npy", "r+b") as file:
                    os.fsync(file.fileno())
                release(images)
            if problem is None:
                digest.update(images[number].data)
                continue
            problems[number] = problem
            if data.on_error == "stop":
                pool.shutdown(wait=True, cancel_futures=True)
                shutil.rmtree(partial, ignore_errors=True)
                raise UserError(
                    f"{listing.root / listing.files[number]} cannot be read as an image ({problem}): "
                    "remove or repair it, or set data.on_error=skip"
                )
    good = np.array([n for n in range(count) if n not in problems], dtype=np.int64)
    if len(good) == 0:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"data.root={listing.root}: none of its {count} images can be read")
    if problems:
        images = _compact(partial, images, good)
    images.flush()
    digest.update(np.array(listing.labels)[good].data)
    np.save(partial / "rows.npy", good)
    manifest = {
        "skipped": [listing.files[n] for n in problems],
        "fingerprint": digest.hexdigest(),
    }
    (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    partial.rename(folder)


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Make a file of bytes that is mapped into memory; raise OSError if the disk has no room for it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(
        os, "posix_fallocate"
    ):  # without it, writing to a full disk through the map would kill the process
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def _compact(partial: Path, images: np.memmap, good: np.ndarray) -> np.memmap:
    """Close the gaps that skipped images left."""
    shape = (len(good), *images.shape[1:])
    packed = _new_array(partial / "packed.npy", shape)
    for new, old in enumerate(good):
        packed[new] = images[old]
        if new % 256 == 0:
            release(images)
            release(packed)
    packed.flush()
    os.replace(partial / "packed.npy", partial / "images.npy")
    return packed


def _natural_size(pool: ThreadPoolExecutor, listing: _Listing, data: FolderData) -> int:
    """Keep small images as they are, if all are squares of one size: enlarging them is the device's work."""

    def size_of(file: str) -> tuple[int, int] | None:
        try:
            return image_size(listing.root / file)
        except UnreadableImage:
            return None  # reported when it is decoded

    sizes = set(pool.map(size_of, listing.files)) - {None}
    if len(sizes) == 1:
        width, height = next(iter(sizes))  # type: ignore[misc]
        if width == height <= max(data.image_size, data.crop_size or 0):
            return width
    return max(data.image_size, data.crop_size or 0)
