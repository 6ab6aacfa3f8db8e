"""Image files of every format, intact and hostile."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zfnet.data.decode import FORMATS, SUFFIXES, UnreadableImage, fit_square, image_size, read_image

GRADIENT = np.linspace(0, 255, 12 * 16).reshape(12, 16).astype(np.uint8)
COLOUR = np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1]], axis=-1)


def encode(image: Image.Image, file_format: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM", "TGA", "GIF", "JPEG", "WEBP"])
def test_read_image_reads_every_format(file_format: str) -> None:
    lossless = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}
    smooth = Image.fromarray(np.repeat(GRADIENT[..., None], 3, axis=2))
    image = read_image(encode(smooth, file_format, **lossless.get(file_format, {})))
    assert (image.mode, image.size) == ("RGB", (16, 12))
    tolerance = 3 if file_format in ("JPEG", "GIF") else 0
    assert np.abs(np.asarray(image).astype(int) - np.asarray(smooth)).max() <= tolerance


def test_read_image_converts_every_mode() -> None:
    rgb = Image.fromarray(COLOUR)
    assert np.array_equal(read_image(encode(rgb, "PNG")), COLOUR)
    grey = Image.fromarray(GRADIENT)
    for image in (grey, grey.convert("P")):
        assert np.array_equal(np.asarray(read_image(encode(image, "PNG")))[..., 1], GRADIENT)
    bits = Image.fromarray(GRADIENT > 127)
    assert bits.mode == "1"
    assert np.array_equal(np.asarray(read_image(encode(bits, "PNG")))[..., 0], (GRADIENT > 127) * 255)
    cmyk = np.asarray(read_image(encode(rgb.convert("CMYK"), "TIFF"))).astype(int)
    assert np.abs(cmyk - COLOUR).max() <= 1


def test_read_image_shows_transparency_as_white() -> None:
    alpha = np.array([[0, 255, 128]], dtype=np.uint8)
    black = np.zeros((1, 3, 3), dtype=np.uint8)
    expected = [255, 0, 127]
    rgba = Image.fromarray(np.dstack([black, alpha]))
    assert np.asarray(read_image(encode(rgba, "PNG")))[0, :, 0].tolist() == pytest.approx(expected, abs=1)
    la = Image.fromarray(np.dstack([black[..., 0], alpha]), "LA")
    assert np.asarray(read_image(encode(la, "PNG")))[0, :, 2].tolist() == pytest.approx(expected, abs=1)
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.putdata([0, 1])
    pixels = np.asarray(read_image(encode(palette, "PNG", transparency=0)))
    assert pixels[0].tolist() == [[255, 255, 255], [10, 20, 30]]
    colour_key = np.asarray(read_image(encode(Image.new("RGB", (1, 1), (9, 9, 9)), "PNG", transparency=(9, 9, 9))))
    assert colour_key[0, 0].tolist() == [255, 255, 255]


def test_read_image_keeps_the_range_of_16_bits_and_floats() -> None:
    wide = (GRADIENT.astype(np.uint16) * 257).astype(np.uint16)
    for file_format in ("PNG", "TIFF"):
        image = read_image(encode(Image.fromarray(wide), file_format))
        assert np.array_equal(np.asarray(image)[..., 0], GRADIENT)
    for scale in (1 / 255, 1.0, 257.0):
        image = Image.fromarray((GRADIENT * scale).astype(np.float32))
        pixels = np.asarray(read_image(encode(image, "TIFF")))[..., 0].astype(int)
        assert np.abs(pixels - GRADIENT).max() <= 1
    broken = Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 0.5]], dtype=np.float32))
    assert read_image(encode(broken, "TIFF")).size == (4, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_applies_exif_rotation(orientation: int) -> None:
    upright = COLOUR
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = encode(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(np.asarray(read_image(file)), upright)


def test_read_image_takes_the_first_frame() -> None:
    frames = [Image.new("RGB", (5, 5), c) for c in ("red", "blue")]
    for file_format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if file_format == "WEBP" else {}
        file = encode(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
        assert np.asarray(read_image(file))[2, 2].tolist() == [255, 0, 0]


def _png_header(width: int, height: int) -> bytes:
    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def hostile_files() -> dict[str, bytes]:
    whole = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "PNG").read()
    jpeg = encode(Image.fromarray(COLOUR).resize((64, 64)), "JPEG").read()
    return {
        "zero bytes": b"",
        "text": b"not an image at all\n",
        "truncated png": whole[: len(whole) // 2],
        "truncated jpeg": jpeg[: len(jpeg) // 2],
        "header only": whole[:40],
        "flipped bytes": whole[:60] + bytes(255 - b for b in whole[60:90]) + whole[90:],
        "decompression bomb": _png_header(60_000, 60_000),
        "beyond all bounds": _png_header(2**31 - 1, 2**31 - 1),
        "no pixels": _png_header(0, 0),
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "html": b"<html><body>404</body></html>",
        "pickle": b"\x80\x04cos\nsystem\n(S'touch witness'\ntR.",
    }


@pytest.mark.parametrize("name", hostile_files())
def test_read_image_refuses_hostile_files(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "image.png"
    path.write_bytes(hostile_files()[name])
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    assert str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["image.png"]


def test_folders_and_missing_files_are_unreadable(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.png"):
        with pytest.raises(UnreadableImage):
            read_image(path)
        with pytest.raises(UnreadableImage):
            image_size(path)


def test_formats_exclude_those_that_start_a_program() -> None:
    assert {"PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"} <= set(FORMATS)
    assert not {"EPS", "WMF", "EMF"} & set(FORMATS)
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"} <= SUFFIXES
    assert not {".eps", ".ps", ".wmf", ".emf"} & SUFFIXES


def test_image_size_reads_the_header_only(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_png_header(300, 200))  # its pixels are missing
    assert image_size(path) == (300, 200)


def test_fit_square() -> None:
    wide = Image.fromarray(np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 20, 0).repeat(3, 2))
    cropped = fit_square(wide, 20, "crop")  # the middle 20 of 40 columns, unscaled
    assert np.array_equal(cropped[0, :, 0], np.arange(10, 30))
    stretched = fit_square(wide, 20, "stretch")
    assert stretched.shape == (20, 20, 3)
    assert stretched[0, 0, 0] <= 2
    assert stretched[0, -1, 0] >= 37
    square = wide.crop((0, 0, 20, 20))
    assert np.array_equal(fit_square(square, 20, "stretch"), np.asarray(square))
    assert fit_square(Image.new("RGB", (1, 300)), 8, "crop").shape == (8, 8, 3)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for read in (read_image, image_size):
        with pytest.raises(UnreadableImage, match="not a regular file"):
            read(tmp_path / "pipe.png")
