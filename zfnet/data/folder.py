"""Read labelled images from class folders, and decode them once into a memory-mapped cache.

The cache's key is a hash of each file's content and of the settings for storing it. The cache is built under another
name and then renamed, so it is either complete or absent.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from zfnet.config.errors import UserError, log, printable
from zfnet.config.reading import read_json
from zfnet.config.schema import NO_ROOT, FolderData
from zfnet.data.decode import UnreadableImage, fit_square, image_size, read_image
from zfnet.data.files import LeftOutNames, is_folder, is_hidden, list_images
from zfnet.data.images import Splits, class_name, image_set, release, stratified

CACHE_VERSION = 3
_SPLIT_NAMES = {
    "train": ("train", "training", "trn", "trainset"),
    "val": ("val", "valid", "validation", "valset"),
    "test": ("test", "testing", "tst", "testset"),
}
_FILLERS = ("set", "data", "dataset", "image", "images", "img", "imgs", "split", "folder")  # as in training_set
_TEST_FRACTION = 0.2  # of the images, if the folder has no splits
_COARSEST_CLOCK_NS = 2 * 10**9  # coarsest file system clock: within it, a second change can keep a file's time

_progress = functools.partial(tqdm, unit=" images", disable=None, leave=False)


@dataclass(frozen=True)
class _Listing:
    """The path, split (train, val, test or all) and class of every image file, and the names that are left out."""

    root: Path
    files: list[str] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    left_out: LeftOutNames = field(default_factory=LeftOutNames)

    def __str__(self) -> str:
        return f"data.root={printable(self.root)}"

    def name(self, number: int) -> str:
        """Return a file's path for a message."""
        return printable(self.files[number])


def load_folder(data: FolderData) -> Splits:
    """Return the images below `data.root`, and log in one line what is left out; raise UserError."""
    if not data.root:
        raise UserError(NO_ROOT)
    listing = _list_files(Path(os.path.expanduser(data.root)))
    if listing.left_out.names:
        log.warning("%s: left out: %s", listing, listing.left_out)
        closed = listing.left_out.names.get(LeftOutNames.UNREADABLE)
        if closed and data.on_error == "stop":
            raise UserError(
                f"{listing}: a folder cannot be read ({printable(closed[0])}): change its permissions, or set "
                "data.on_error=skip"
            )
    images, unreadable, mark = _load_cached(listing, data)
    skipped = list(unreadable)
    if skipped:
        log.warning(
            "%s: %d unreadable images are left out (data.on_error=skip); first: %s",
            *(listing, len(skipped), listing.name(skipped[0])),
        )
    files = tuple(os.path.relpath(file, listing.root) for file in listing.files)
    whole = replace(image_set(images, torch.tensor(listing.labels), listing.classes), files=files)
    splits = np.array(listing.splits)
    splits[skipped] = ""
    rows = {name: torch.from_numpy((splits == name).nonzero()[0]) for name in (*_SPLIT_NAMES, "all")}
    train, val, test, undivided = (whole.take(r) if len(r) else None for r in rows.values())
    if train is None:
        if undivided is None:
            raise UserError(f"{listing}: none of its training images can be read")
        held_out, kept = stratified(undivided.labels, max(1, round(len(undivided) * _TEST_FRACTION)), data.split_seed)
        train, test = undivided.take(kept), undivided.take(held_out)
    names = tuple(os.path.relpath(listing.files[k], listing.root) for k in skipped)
    return Splits(train, val, test, mark, names)


# -- splits and classes


def _list_files(root: Path) -> _Listing:
    if not root.is_dir():
        problem = (
            "is a file; name the folder that contains train/ and test/" if root.is_file() else "there is no such folder"
        )
        raise UserError(f"data.root={printable(root)}: {problem}")
    listing = _Listing(root)
    folders = _split_folders(root, listing)
    learned_from, below = folders.get("train") or folders["all"]
    classes = _by_class(below, listing)
    listing.classes.extend(classes)
    if len(classes) < 2:
        raise UserError(
            f"{listing}: {printable(learned_from)} needs at least two class folders with images, has {len(classes)}"
            f"{_list_folders(learned_from)}"
        )
    for split, (folder, below) in folders.items():
        for name, path in _by_class(below, listing).items():
            if name not in classes:
                raise UserError(
                    f"{printable(path)}: its class '{name}' has no folder in {printable(learned_from)}: "
                    "add one there, or remove this one"
                )
            files = list_images(path, listing.left_out, above=(root, folder))
            listing.files.extend(files)
            listing.splits.extend([split] * len(files))
            listing.labels.extend([listing.classes.index(name)] * len(files))
    pairs = zip(listing.labels, listing.splits, strict=True)
    learned = {label for label, split in pairs if split in ("train", "all")}
    left_out = f" (left out: {listing.left_out})" if listing.left_out.names else ""
    if not learned:
        raise UserError(f"{listing}: its class folders contain no image files{left_out}")
    for label, (name, path) in enumerate(classes.items()):
        if label not in learned:
            raise UserError(
                f"{printable(path)}: contains no image files for the class '{name}'{left_out}; "
                "put some there or remove the folder"
            )
    return listing


def _split_folders(root: Path, listing: _Listing) -> dict[str, tuple[Path, list[Path]]]:
    """Return {split: (its folder, the class folders in it)}, or {"all": …} if `root` has no splits.

    Raises UserError if the names of the folders are ambiguous, or if a split is given twice or train is missing.
    """
    below = _folders_in(root, listing)
    named = _named_splits(below)
    folders: dict[str, tuple[Path, list[Path]]] = {}
    for path, split in named.items():
        if split in folders:
            both = _join_names([folders[split][0], path])
            raise UserError(f"{listing}: {both} both name the split {split}: remove one, or join them")
        inner = _folders_in(path, listing)
        # some archives contain train/train or seg_train/seg_train
        if len(inner) == 1 and (inner[0].name == path.name or split in _named_splits(inner).values()):
            path, inner = inner[0], _folders_in(inner[0], listing)
        folders[split] = path, inner
    if folders and "train" not in folders:
        alone = printable(str(next(iter(named))))  # such as ImageNet's val/, for an imported network
        raise UserError(
            f"{listing}: has {_join_names(named)} but no train/ folder{_list_folders(root)}; data.root={alone} reads "
            "that alone"
        )
    for path in below:
        if folders and path not in named:
            listing.left_out.add(LeftOutNames.BESIDE, path.name)
        # such as my_train/ alone, or cats/train
        elif not folders and (names := _scan(path)[0]) and (_split_word(path.name) or _named_splits(map(Path, names))):
            raise UserError(
                f"{listing}: {_join_names([path])} is not clearly a class or a split: name the splits train/, val/ and "
                f"test/, with the class folders in them{_list_folders(root)}"
            )
    return {split: folders[split] for split in _SPLIT_NAMES if split in folders} or {"all": (root, below)}


def _split_word(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return (split, other words) of a folder's name, ignoring case; None unless one word names a split."""
    words = [w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+", name)]
    named = [split for word in words for split, known in _SPLIT_NAMES.items() if word in known]
    rest = tuple(w for w in words if w not in _FILLERS and not any(w in known for known in _SPLIT_NAMES.values()))
    return (named[0], rest) if len(named) == 1 else None


def _named_splits(folders: Iterable[Path]) -> dict[Path, str]:
    """Return {folder: split} for folders such as Training or test_set, and for pairs such as seg_train and seg_test.

    A folder such as train_station, without a counterpart, is not a split.
    """
    words = {path: parsed for path in folders if (parsed := _split_word(path.name))}
    rests = {rest: {split for split, other in words.values() if other == rest} for _, rest in words.values()}
    return {path: split for path, (split, rest) in words.items() if not rest or len(rests[rest]) > 1}


def _folders_in(folder: Path, listing: _Listing) -> list[Path]:
    """Return the visible folders in a folder of splits or classes; add hidden folders and files to `left_out`."""
    folders, others = _scan(folder)
    for names, hidden, loose in (
        (folders, LeftOutNames.HIDDEN_FOLDER, None),
        (others, LeftOutNames.HIDDEN_FILE, LeftOutNames.LOOSE),
    ):
        for name in names:
            if kind := hidden if is_hidden(name) else loose:
                listing.left_out.add(kind, name)
    return [folder / name for name in folders if not is_hidden(name)]


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the other files in a folder, sorted; raise UserError."""
    try:
        with os.scandir(folder) as entries:
            kinds = {entry.name: is_folder(entry) for entry in entries}
    except OSError as error:
        raise UserError(f"{printable(folder)} cannot be read ({error.strerror})") from error
    return sorted(n for n in kinds if kinds[n]), sorted(n for n in kinds if not kinds[n])


def _by_class(folders: Sequence[Path], listing: _Listing) -> dict[str, Path]:
    """Return {class: folder}, sorted by class; raise UserError if two folders have the same class name."""
    classes: dict[str, Path] = {}
    for path in folders:
        if (name := class_name(path.name)) in classes:
            raise UserError(f"{listing}: two folders are called '{name}' (after Unicode normalisation): rename one")
        classes[name] = path
    return dict(sorted(classes.items()))


def _join_names(folders: Iterable[Path]) -> str:
    return " and ".join(f"{printable(path.name)}/" for path in folders)


def _list_folders(root: Path) -> str:
    """Return the folders in `root`, for an error message."""
    names = [*map(printable, _scan(root)[0])]
    return f"; found: {', '.join(names[:12])}{' …' if len(names) > 12 else ''}" if names else "; found no folder"


# -- the cache


def _load_cached(listing: _Listing, data: FolderData) -> tuple[np.ndarray, dict[int, str], str]:
    """Return (memory-mapped images [N, s, s, 3], {number of an unreadable file: reason}, fingerprint).

    The lookup has two steps: the files' status, which changes with their content, gives the key of the content, and the
    key gives the pixels. So unchanged files are hashed once, and equal content is decoded once, in any location.
    """
    caches = Path(os.path.expanduser(data.cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "zfnet"))
    try:
        caches.mkdir(parents=True, exist_ok=True)
        folder = _find_or_build(listing, data, caches)
    except OSError as error:
        raise UserError(
            f"the image cache {printable(caches)} cannot be written ({error}): set data.cache_dir=…"
        ) from error
    try:
        manifest = read_json(folder / "manifest.json")
        images = np.load(folder / "images.npy", mmap_mode="r")
        unreadable = {int(number): str(problem) for number, problem in manifest["unreadable"]}
        fingerprint = str(manifest["fingerprint"])
        numbers, side = range(len(listing.files)), images.shape[1]
        fits = images.dtype == np.uint8 and images.shape == (len(numbers), side, side, 3)
        if not fits or any(number not in numbers for number in unreadable):
            raise ValueError("it is not the cache of these files")
    except (OSError, EOFError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(
            f"the image cache {printable(folder)} is damaged ({type(error).__name__}): delete it, and the next run "
            "creates it again"
        ) from error
    if unreadable and data.on_error == "stop":  # the cache was built with on_error=skip
        raise _cannot_be_read(listing, *next(iter(unreadable.items())))
    return images, unreadable, fingerprint


def _find_or_build(listing: _Listing, data: FolderData, caches: Path) -> Path:
    """Return the cache folder of the decoded images; raise UserError, or OSError if it cannot be written."""
    started = time.time_ns()
    stats = _stats(listing)
    storage_settings = [
        *(CACHE_VERSION, data.store_size, data.image_size, data.crop_size, data.fit, data.max_pixels),
        *(data.draft, listing.labels),
    ]
    known = caches / f"{_key([storage_settings, os.path.abspath(listing.root), listing.files, stats])}.key"
    with FileLock(known.with_suffix(".lock")):  # if several runs start together, one reads the files
        with contextlib.suppress(OSError):
            key = known.read_text(encoding="ascii", errors="replace")
            if _KEY.fullmatch(key) and (folder := caches / key).is_dir():  # a full disk can leave the key empty
                return folder
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            read = functools.partial(_hash_and_size, max_pixels=data.max_pixels)
            hashes, sizes = zip(*_progress(pool.map(read, listing.files), "reading", len(stats)), strict=True)
            key = _key([storage_settings, hashes])
            folder, partial = caches / key, caches / f"{key}.partial"
            with FileLock(caches / f"{key}.lock"):
                if not folder.is_dir():
                    shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
                    partial.mkdir()
                    try:
                        _build(listing, data, data.store_size or _natural_size(set(sizes), data), partial, pool)
                        if _stats(listing) != stats:
                            raise UserError(f"{listing}: files changed while they were read: start again")
                    except (OSError, UserError):
                        shutil.rmtree(partial, ignore_errors=True)
                        raise
                    partial.rename(folder)
        if all(changed < started - _COARSEST_CLOCK_NS for *_, changed in stats):
            known.write_text(key, encoding="ascii")
    return folder


def _stats(listing: _Listing) -> list[tuple[int, ...]]:
    """Return each file's inode, size and times; ctime shows a change even if mtime is reset. Zeros if unreadable."""
    stats: list[tuple[int, ...]] = []
    for file in listing.files:
        try:
            s = os.stat(file)
            stats.append((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
        except OSError:
            stats.append((0, 0, 0, 0))
    return stats


_KEY = re.compile("[0-9a-f]{24}")


def _key(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:24]


def _hash_and_size(file: str, max_pixels: int) -> tuple[str, tuple[int, int] | None]:
    """Return a hash of the file's bytes and its (width, height); an empty hash and None if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        if not os.path.isfile(file):  # reading a pipe might never end
            return "", None
        with open(file, "rb") as opened:
            while chunk := opened.read(2**20):
                digest.update(chunk)
    except OSError:
        return "", None
    try:
        return digest.hexdigest(), image_size(Path(file), max_pixels)
    except UnreadableImage:  # `_build` reports it
        return digest.hexdigest(), None


def _build(listing: _Listing, data: FolderData, size: int, folder: Path, pool: ThreadPoolExecutor) -> None:
    """Decode every file into `folder`, on all cores (Pillow's decoders release the GIL)."""
    count, path = len(listing.files), folder / "images.npy"
    images = _new_array(path, (count, size, size, 3))

    def decode(number: int) -> str | None:
        try:
            image = read_image(Path(listing.files[number]), data.max_pixels, size * data.draft)
            images[number] = fit_square(image, size, data.fit)
            return None
        except UnreadableImage as error:
            return str(error)

    # hash each image, and sync every 256 images, while the pool decodes the next ones
    unreadable, digest = {}, hashlib.sha256()
    for number, problem in enumerate(_progress(pool.map(decode, range(count)), "decoding", count)):
        if number % 256 == 0:
            with open(path, "r+b") as file:
                os.fsync(file.fileno())
            release(images)
        if problem is None:
            digest.update(images[number].data)
        elif data.on_error == "skip":
            unreadable[number] = problem
        else:
            pool.shutdown(wait=True, cancel_futures=True)
            raise _cannot_be_read(listing, number, problem)
    if len(unreadable) == count:
        raise UserError(f"{listing}: none of its {count} images can be read")
    images.flush()
    digest.update(np.delete(np.array(listing.labels), list(unreadable)).data)
    manifest: dict[str, Any] = {"unreadable": list(unreadable.items()), "fingerprint": digest.hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _cannot_be_read(listing: _Listing, number: int, problem: str) -> UserError:
    return UserError(
        f"{listing.name(number)} cannot be read as an image ({printable(problem)}): "
        "remove or repair it, or set data.on_error=skip"
    )


def _new_array(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Create a memory-mapped file; raise OSError if the disk has no room for it."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    # reserve the space now: writing to a full disk through the map would kill the process
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def _natural_size(sizes: set[tuple[int, int] | None], data: FolderData) -> int:
    """Return the images' own side if all are equal squares no larger than needed; otherwise the side that is needed."""
    largest = max(data.image_size, data.crop_size or 0)
    sizes = sizes - {None}
    width, height = sizes.pop() if len(sizes) == 1 else (0, 1)  # type: ignore[misc]
    return width if width == height <= largest else largest
