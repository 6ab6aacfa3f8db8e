"""Image files of any format as RGB images: the only place where image files are opened."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow passes EPS and PS files to Ghostscript, and WMF to the system: such a file would start a program.
_REFUSED = {"EPS", "WMF", "EMF"}
Image.init()
FORMATS = tuple(sorted(set(Image.OPEN) - _REFUSED))
SUFFIXES = frozenset(s for s, f in Image.registered_extensions().items() if f in FORMATS)


def is_image(name: str) -> bool:
    """Return whether a file of this name counts as an image; hidden files do not."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


class UnreadableImage(Exception):
    """The file is not an image that can be decoded; the message says why."""


def read_image(file: str | Path | BinaryIO) -> Image.Image:
    """Return the image in mode RGB, upright; raise UnreadableImage.

    EXIF rotation is applied, transparency becomes white, 16-bit and floating-point grey are scaled to 8 bits, and an
    animation gives its first frame.
    """
    with _opened(file) as image:
        image.seek(0)
        return _to_rgb(ImageOps.exif_transpose(image))


def image_size(file: Path) -> tuple[int, int]:
    """Return (width, height) from the file's header; raise UnreadableImage."""
    with _opened(file) as image:
        return image.size


@contextlib.contextmanager
def _opened(file: str | Path | BinaryIO) -> Iterator[Image.Image]:
    """Open a file with one of FORMATS; raise UnreadableImage for any error, within this block too."""
    if isinstance(file, (str, Path)) and Path(file).exists() and not Path(file).is_file():
        raise UnreadableImage("not a regular file")  # reading a pipe or a device might never end
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                yield image
    except UnidentifiedImageError as error:  # its message repeats the file's name, or names an object in memory
        raise UnreadableImage("not an image of a known format") from error
    except Exception as error:  # Pillow's decoders raise errors of many classes on damaged files
        raise UnreadableImage(str(error) or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image.copy()
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(np.asarray(image, dtype=np.float64), image.mode)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: np.ndarray, mode: str) -> np.ndarray:
    """Scale to 0 … 255: integers from 0 … 65535; floats from the smallest of 0 … 1, 255 and 65535 that holds them."""
    grey = np.nan_to_num(grey)
    peak = float(grey.max(initial=0.0))
    full = next((f for f in (1.0, 255.0) if mode == "F" and peak <= f), 65535.0)
    return (grey.clip(0, full) * (255.0 / full)).round().astype(np.uint8)


def fit_square(image: Image.Image, size: int, fit: str) -> np.ndarray:
    """Return uint8 [size, size, 3]: `crop` keeps proportions (short side to `size`, centre), `stretch` does not."""
    if fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    elif image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)
