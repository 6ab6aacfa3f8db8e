"""Read image files as RGB images. No other module opens image files.

A file's header gives its size before any pixel is decoded. Files of more than `max_pixels` pixels, of four bytes each,
are refused. All threads together decode at most `_PIXELS_AT_ONCE` pixels at a time.
"""

import contextlib
import math
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from zfnet.config.errors import log
from zfnet.config.schema import MAX_PIXELS

# Only a few of Pillow's forty formats, because hostile files can attack each decoder. Some builds of Pillow lack AVIF.
Image.init()
FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if f in Image.OPEN)
SUFFIXES = frozenset(s for s, f in Image.registered_extensions().items() if f in FORMATS)

_PIXELS_AT_ONCE = 3 * MAX_PIXELS  # each copy of these pixels takes 1 GiB
_BAND = 1 << 20  # pixels that are scaled in one step
_warned_about_range = threading.Event()


def is_image(name: str) -> bool:
    """Return whether a file of this name counts as an image; hidden files do not."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(".")


class UnreadableImage(Exception):
    """The file is not an image that can be decoded; the message says why."""


def read_image(file: str | Path | BinaryIO, max_pixels: int = MAX_PIXELS, draft: int = 0) -> Image.Image:
    """Return the image in mode RGB; raise UnreadableImage if it cannot be decoded or has more than `max_pixels`.

    EXIF rotation is applied, transparency becomes white, an animation gives its first frame. Grey values of more than
    8 bits are scaled: integers from 0 … 65535, floats from the smallest of 0 … 1, 0 … 255 and 0 … 65535 that contains
    them. An image with values outside these ranges is scaled by its own range; a warning is logged once per process.

    draft: pixels per side that the caller needs: a JPEG is decoded at 1/2, 1/4 or 1/8 if each side keeps twice as many
    """
    with _open_image(file, max_pixels) as image, _pixel_limit.reserve(_pixels(image)):
        if draft:
            image.draft(None, (2 * draft, 2 * draft))
        image.load()
        with contextlib.suppress(Exception):  # the EXIF part is damaged; the pixels can still be good
            ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)


def image_size(file: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Return (width, height) from the file's header; raise UnreadableImage."""
    with _open_image(file, max_pixels) as image:
        return image.size


@contextlib.contextmanager
def _open_image(file: str | Path | BinaryIO, max_pixels: int) -> Iterator[Image.Image]:
    """Open a file in one of FORMATS; raise UnreadableImage for any error, also within the `with` block."""
    if isinstance(file, (str, Path)):
        if Path(file).exists() and not Path(file).is_file():
            raise UnreadableImage("not a regular file")  # reading a pipe or a device might never end
        try:
            # open the file here: Pillow can memory-map a path, and then mixes up the pixels of a rotated TIFF
            with open(file, "rb") as stream, _open_image(stream, max_pixels) as image:
                yield image
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error
        return
    if Image.MAX_IMAGE_PIXELS and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # otherwise Pillow applies its own limit
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                if (pixels := _pixels(image)) > max_pixels:
                    raise UnreadableImage(f"{pixels:,} pixels are more than data.max_pixels={max_pixels:,}")
                yield image
    except UnreadableImage:
        raise
    except Image.DecompressionBombError as error:  # Pillow raises this above twice MAX_IMAGE_PIXELS
        raise UnreadableImage(f"it has more pixels than data.max_pixels={max_pixels:,} allows") from error
    except UnidentifiedImageError as error:  # Pillow's message repeats the file name or names a BytesIO
        raise UnreadableImage(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise errors of many classes on damaged files
        raise UnreadableImage(str(error) or type(error).__name__) from error


def _pixels(image: Image.Image) -> int:
    """Return how many pixels decoding keeps in memory: the image's, or those of one tile of a TIFF if it is larger."""
    tags = getattr(image, "tag_v2", {})
    tile = int(tags.get(TiffImagePlugin.TILEWIDTH, 0)) * int(tags.get(TiffImagePlugin.TILELENGTH, 0))
    return max(image.width * image.height, tile)


class _PixelLimit:
    """Limit how many pixels all threads decode at once; a thread waits until others have released enough."""

    def __init__(self, pixels: int) -> None:
        self._pixels, self._used, self._changed = pixels, 0, threading.Condition()

    @contextlib.contextmanager
    def reserve(self, pixels: int) -> Iterator[None]:
        """Reserve `pixels` within the `with` block; a request above the limit waits until no other thread decodes."""
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + pixels <= self._pixels)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()


_pixel_limit = _PixelLimit(_PIXELS_AT_ONCE)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert the image to mode RGB, unless it has that mode; see `read_image` for grey values and transparency."""
    if image.mode in ("F", "I") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Return grey values scaled to 0 … 255, uint8 [h, w]; see `read_image`. NaN is treated as 0."""
    rows = max(1, _BAND // image.width)
    boxes = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    low, high = math.inf, -math.inf
    for box in boxes:
        band = np.asarray(image.crop(box))
        finite = band[np.isfinite(band)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    low, high = (low, high) if low <= high else (0.0, 0.0)
    black, full = 0.0, next((f for f in ((1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)) if high <= f), 0.0)
    if low < 0 or not full:
        black, full = low, high - low
        if not _warned_about_range.is_set():
            _warned_about_range.set()
            log.warning("grey images with values such as %g … %g are scaled by their own range", low, high)
    grey = np.empty((image.height, image.width), np.uint8)
    for box in boxes:  # single precision would round some floats and 32-bit integers to another grey
        band = np.nan_to_num(np.asarray(image.crop(box), np.float64), posinf=high, neginf=black)
        grey[box[1] : box[3]] = ((band - black).clip(0, full) * (255.0 / (full or 1.0))).round()
    return grey


def fit_square(image: Image.Image, size: int, fit: str) -> np.ndarray:
    """Return uint8 [size, size, 3]: `crop` scales the short side to `size` and crops the centre, `stretch` distorts."""
    if fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    elif image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image)
