"""Images in folders, a folder a class: decoded once into a memory-mapped cache, and labelled.

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
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from zfnet.config.errors import UserError
from zfnet.config.schema import FolderData
from zfnet.data.decode import UnreadableImage, fit_square, image_size, is_image, read_image
from zfnet.data.images import ImageSet, image_set, release, stratified

CACHE_VERSION = 2
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_TEST_FRACTION = 0.2  # of a folder that is not divided


@dataclass(frozen=True)
class _Listing:
    """Every image file: its path below root, its split (train, val, test or all) and its class."""

    root: Path
    files: list[str]
    splits: list[str]
    labels: list[int]
    classes: list[str]


def load_folder(data: FolderData) -> tuple[ImageSet, ImageSet | None, ImageSet | None, str]:
    """Return (train, validation or None, test or None, fingerprint) of the images below `data.root`."""
    listing = _list_files(Path(str(data.root)).expanduser())
    images, skipped, mark = _cached(listing, data)
    whole = image_set(images, torch.tensor(listing.labels), listing.classes)
    splits = np.array(listing.splits)
    splits[skipped] = ""
    rows = {name: torch.from_numpy((splits == name).nonzero()[0]) for name in (*_SPLITS, "all")}
    train, val, test, undivided = (whole.take(r) if len(r) else None for r in rows.values())
    if train is None:
        assert undivided is not None
        held_out, kept = stratified(undivided.labels, round(len(undivided) * _TEST_FRACTION), data.split_seed)
        train, test = undivided.take(kept), undivided.take(held_out)
    return train, val, test, mark


def _list_files(root: Path) -> _Listing:
    if not root.is_dir():
        raise UserError(f"data.root={root}: there is no such folder")
    below = {p.name: p for p in _subfolders(root)}
    folders = {split: below[name] for split, names in _SPLITS.items() for name in names if name in below}
    if folders and "train" not in folders:
        raise UserError(f"data.root={root}: has {', '.join(folders)}/ but no train/ folder")
    folders = folders or {"all": root}
    learned_from = folders.get("train", root)
    classes = [p.name for p in _subfolders(learned_from)]
    listing = _Listing(root, [], [], [], classes)
    for split, folder in folders.items():
        for class_folder in _subfolders(folder):
            if class_folder.name not in classes:
                raise UserError(f"{class_folder}: its class '{class_folder.name}' has no folder in {learned_from}")
            files = _images_below(class_folder, root)
            listing.files.extend(files)
            listing.splits.extend([split] * len(files))
            listing.labels.extend([classes.index(class_folder.name)] * len(files))
    if len(classes) < 2:
        raise UserError(f"data.root={root}: needs at least two class folders with images, has {len(classes)}")
    pairs = zip(listing.labels, listing.splits, strict=True)
    learned = {label for label, split in pairs if split in ("train", "all")}
    if not learned:
        raise UserError(f"data.root={root}: its class folders hold no image files")
    for label, name in enumerate(classes):
        if label not in learned:
            raise UserError(
                f"{learned_from / name}: holds no image files to learn the class '{name}' from; "
                "put some there or remove the folder"
            )
    return listing


def _subfolders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images_below(folder: Path, root: Path) -> list[str]:
    """Return the paths below `root` of the image files below `folder`, in a fixed order."""
    walk = ((Path(place).relative_to(root).as_posix(), names) for place, _, names in os.walk(folder))
    files = [f"{place}/{name}" for place, names in walk for name in names if is_image(name)]
    return sorted(files, key=lambda file: file.split("/"))


def _cached(listing: _Listing, data: FolderData) -> tuple[np.ndarray, list[int], str]:
    """Return (images [N, s, s, 3] memory-mapped, the numbers of unreadable files, fingerprint), decoding if need be."""
    stats = [os.stat(listing.root / f) for f in listing.files]
    content = [
        CACHE_VERSION,
        *(data.store_size, data.image_size, data.crop_size, data.fit, data.on_error, data.max_pixels),
        [[f, s.st_size, s.st_mtime_ns] for f, s in zip(listing.files, stats, strict=True)],
        listing.labels,
    ]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]
    caches = Path(data.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "zfnet").expanduser()
    folder, partial = caches / key, caches / f"{key}.partial"
    try:
        caches.mkdir(parents=True, exist_ok=True)
        with FileLock(caches / f"{key}.lock"):  # of several runs that start together, one decodes
            if not folder.is_dir():
                shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
                partial.mkdir()
                _build(listing, data, partial)
                partial.rename(folder)
    except (OSError, UserError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        raise UserError(f"the image cache {caches} cannot be written ({error}): set data.cache_dir=…") from error
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        images, skipped = np.load(folder / "images.npy", mmap_mode="r"), manifest["skipped"]
        if skipped:
            print(
                f"{len(skipped)} unreadable images are left out (data.on_error=skip); "
                f"first: {listing.root / listing.files[skipped[0]]}"
            )
        return images, skipped, manifest["fingerprint"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"the image cache {folder} is damaged ({type(error).__name__}): delete it, and it is made again"
        ) from error


def _build(listing: _Listing, data: FolderData, folder: Path) -> None:
    """Decode every file into `folder`, on all cores (Pillow's decoders release the interpreter lock)."""
    count, path = len(listing.files), folder / "images.npy"
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        size = data.store_size or _natural_size(pool, listing, data)
        images = _new_array(path, (count, size, size, 3))

        def decode(number: int) -> str | None:
            try:
                image = read_image(listing.root / listing.files[number], data.max_pixels)
                images[number] = fit_square(image, size, data.fit)
                return None
            except UnreadableImage as error:
                return str(error)

        # the digest and the disk keep step with the decoding, which needs neither
        skipped, digest = [], hashlib.sha256()
        problems = pool.map(decode, range(count))
        for number, problem in enumerate(tqdm(problems, "decoding", count, unit=" images", disable=None, leave=False)):
            if number % 256 == 0:
                with open(path, "r+b") as file:
                    os.fsync(file.fileno())
                release(images)
            if problem is None:
                digest.update(images[number].data)
            elif data.on_error == "skip":
                skipped.append(number)
            else:
                pool.shutdown(wait=True, cancel_futures=True)
                raise UserError(
                    f"{listing.root / listing.files[number]} cannot be read as an image ({problem}): "
                    "remove or repair it, or set data.on_error=skip"
                )
    if len(skipped) == count:
        raise UserError(f"data.root={listing.root}: none of its {count} images can be read")
    images.flush()
    digest.update(np.delete(np.array(listing.labels), skipped).data)
    manifest: dict[str, Any] = {"skipped": skipped, "fingerprint": digest.hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Make a file of bytes that is mapped into memory; raise OSError if the disk has no room for it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    # otherwise writing to a full disk through the map would kill the process
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def _natural_size(pool: ThreadPoolExecutor, listing: _Listing, data: FolderData) -> int:
    """Keep small images as they are, if all are squares of one size: enlarging them is the device's work."""

    def size_of(file: str) -> tuple[int, int] | None:
        try:
            return image_size(listing.root / file)
        except UnreadableImage:
            return None  # reported when it is decoded

    largest = max(data.image_size, data.crop_size or 0)
    sizes = set(pool.map(size_of, listing.files)) - {None}
    width, height = sizes.pop() if len(sizes) == 1 else (0, 1)  # type: ignore[misc]
    return width if width == height <= largest else largest
