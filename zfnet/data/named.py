"""The images that a command names: files, folders, patterns and addresses."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from zfnet.data.decode import SUFFIXES, UnreadableImage, read_image
from zfnet.data.fetch import fetch


@dataclass(frozen=True)
class NamedImage:
    """One image: its path, or its address on the web."""

    name: str

    def read(self) -> Image.Image:
        """Return the image in mode RGB, upright; raise UnreadableImage."""
        if _is_address(self.name):
            return read_image(io.BytesIO(fetch(self.name)))
        return read_image(self.name)


def find_images(items: Sequence[str]) -> tuple[list[NamedImage], dict[str, str]]:
    """Return the images that `items` name, each once and in their order, and what is wrong with the other items.

    A folder stands for all files below it that have an image's suffix, by name; a pattern (`*`, `?`, `[…]`,
    `**`) for the files that match it.
    """
    names: list[str] = []
    problems: dict[str, str] = {}
    for item in items:
        try:
            names += _expand(item)
        except UnreadableImage as error:
            problems[item] = str(error)
    return [NamedImage(name) for name in dict.fromkeys(names)], problems


def _expand(item: str) -> list[str]:
    if _is_address(item):
        return [item]
    path = Path(item).expanduser()
    if path.is_dir():
        found = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES
        ]
        if not found:
            raise UnreadableImage("holds no image files")
        return sorted(found)
    if path.is_file():
        return [str(path)]
    if path.exists():  # a device or a pipe, which might never end
        raise UnreadableImage("is not a regular file")
    if glob.has_magic(str(path)):
        matches = [m for m in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(m)]
        if not matches:
            raise UnreadableImage("matches no file")
        return matches
    raise UnreadableImage("there is no such file")


def _is_address(item: str) -> bool:
    return re.match(r"[A-Za-z][\w+.-]*://", item) is not None
