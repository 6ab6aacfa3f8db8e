"""Decoding intact and hostile image files of every format."""

from __future__ import annotations

import io
import logging
import os
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from zfnet.data import decode
from zfnet.data.decode import FORMATS, SUFFIXES, UnreadableImage, fit_square, image_size, read_image

GRADIENT = np.linspace(0, 255, 12 * 16).reshape(12, 16).astype(np.uint8)
COLOUR = np.stack([GRADIENT, GRADIENT[::-1], GRADIENT[:, ::-1]], axis=-1)


def encode(image: Image.Image, file_format: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("file_format", FORMATS)
def test_read_image_reads_every_format(file_format: str) -> None:
    lossless = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    smooth = Image.fromarray(np.repeat(GRADIENT[..., None], 3, axis=2))
    image = read_image(encode(smooth, file_format, **lossless.get(file_format, {})))
    assert (image.mode, image.size) == ("RGB", (16, 12))
    tolerance = 3 if file_format in ("JPEG", "GIF", "AVIF") else 0
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
    broken = Image.fromarray(np.array([[np.nan, np.inf, -np.inf, 0.2, 0.6]], dtype=np.float32))
    assert np.asarray(read_image(encode(broken, "TIFF")))[0, :, 0].tolist() == [0, 153, 0, 51, 153]
    for value in (np.nan, np.inf, -np.inf, -3):  # these images have no range
        assert not np.asarray(read_image(encode(Image.fromarray(np.full((2, 2), value, np.float32)), "TIFF"))).any()


@pytest.mark.parametrize(
    "values",
    [
        np.linspace(-3, 7, 192, dtype=np.float32),
        np.linspace(1e6, 2e6, 192, dtype=np.float32),
        np.linspace(-(2**31), 2**31 - 1, 192).astype(np.int32),
        np.linspace(0, 70_000, 192).astype(np.int32),
    ],
    ids=["negative floats", "large floats", "all of 32 bits", "more than 16 bits"],
)
def test_unusual_ranges_are_scaled_by_their_own_with_one_warning(values, monkeypatch, caplog) -> None:
    monkeypatch.setattr(decode, "_warned_about_range", threading.Event())
    monkeypatch.setattr(decode, "_BAND", 50)  # not a whole number of rows
    file = encode(Image.fromarray(values.reshape(12, 16)), "TIFF")
    with caplog.at_level(logging.WARNING, "zfnet"):
        pixels = [np.asarray(read_image(file))[..., 0].astype(int) for _ in range(2)]
    assert np.abs(pixels[0].ravel() - np.linspace(0, 255, 192)).max() <= 1
    assert np.array_equal(*pixels)
    assert [r.getMessage().count("are scaled by their own range") for r in caplog.records] == [1]


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


@pytest.mark.parametrize(
    ("kind", "count", "value", "turned"),
    [
        (3, 1, struct.pack("<H", 6), True),
        (4, 1, struct.pack("<I", 6), True),
        (5, 1, struct.pack("<II", 6, 1), True),
        (3, 2, struct.pack("<HH", 6, 1), True),
        (11, 1, struct.pack("<f", 6), True),
        (2, 2, b"6\0", False),
        (7, 4, b"six\0", False),
        (5, 1, struct.pack("<II", 6, 0), False),
        (3, 1, struct.pack("<H", 9), False),
        (99, 1, b"6", False),
    ],
)
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF"])
def test_a_rotation_of_any_type(file_format: str, kind: int, count: int, value: bytes, turned: bool) -> None:
    """Values equal to 1 … 8 count. Text, fractions with denominator 0 and unknown types are ignored, without error."""
    inline = value if len(value) <= 4 else struct.pack("<I", 26)
    tag = struct.pack("<HHI", 0x0112, kind, count) + inline.ljust(4, b"\0")
    if file_format == "TIFF":
        plain = {256: 16, 257: 12, 258: 8, 259: 1, 262: 1, 273: 154, 277: 1, 278: 12, 279: 192}
        tags = [struct.pack("<HHII", key, 4, 1, number) for key, number in plain.items()]
        offset = 8 + 2 + 12 * 10 + 4
        tag = tag if len(value) <= 4 else tag[:-4] + struct.pack("<I", offset)
        content = b"II*\0" + struct.pack("<IH", 8, 10) + b"".join([*tags[:5], tag, *tags[5:]]) + bytes(4)
        file = io.BytesIO(content + value.ljust(154 - offset, b"\0") + GRADIENT.tobytes())
    else:
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + tag + bytes(4) + value
        file = encode(Image.fromarray(GRADIENT), file_format, exif=exif, quality=100)
    pixels = np.asarray(read_image(file))[..., 0].astype(int)
    assert np.abs(pixels - (np.rot90(GRADIENT, -1) if turned else GRADIENT)).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "RGB", "I;16", "RGBA"])
def test_a_rotated_tiff_on_disk(mode: str, orientation: int, tmp_path: Path) -> None:
    """Pillow memory-maps some rotated TIFFs as if they were upright."""
    grey = Image.fromarray(GRADIENT.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(GRADIENT)
    exif = Image.Exif()
    exif[0x0112] = orientation
    (grey if mode == "I;16" else grey.convert(mode)).save(tmp_path / "a.tif", exif=exif)
    expected = grey.convert("L") if mode != "I;16" else Image.fromarray(GRADIENT)
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.get(orientation)
    expected = expected if turn is None else expected.transpose(turn)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.tif"))[..., 0], np.asarray(expected))
    assert image_size(tmp_path / "a.tif") == expected.size


def test_damaged_exif_does_not_cost_the_image() -> None:
    for exif in (b"Exif\0\0II*\0", b"Exif\0\0" + bytes(range(64)), b"Exif\0\0MM\0*\xff\xff\xff\xff"):
        assert np.array_equal(np.asarray(read_image(encode(Image.fromarray(COLOUR), "PNG", exif=exif))), COLOUR)


def test_read_image_takes_the_first_frame() -> None:
    frames = [Image.new("RGB", (5, 5), c) for c in ("red", "blue")]
    for file_format in ("GIF", "WEBP", "PNG", "TIFF"):
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
        "largest possible size": _png_header(2**31 - 1, 2**31 - 1),
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


def test_formats_are_few() -> None:
    """Pillow's decoders for EPS and WMF start programs; the other formats rarely contain photographs."""
    assert set(FORMATS) - {"AVIF"} == {"JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"}
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm"} <= SUFFIXES
    assert not {".eps", ".ps", ".wmf", ".emf", ".psd", ".tga", ".jp2", ".ico"} & SUFFIXES
    for other in ("TGA", "JPEG2000", "ICO"):
        with pytest.raises(UnreadableImage, match=r"not an image of a known format \(JPEG, PNG, "):
            read_image(encode(Image.fromarray(COLOUR), other))


# -- limits on pixels and memory


def test_more_than_max_pixels_are_refused_before_they_are_decoded() -> None:
    file = io.BytesIO(_png_header(300, 200))  # without pixel data, so decoding raises another error
    with pytest.raises(UnreadableImage, match=r"^60,000 pixels are more than data.max_pixels=59,999$"):
        read_image(file, 59_999)
    with pytest.raises(UnreadableImage, match="truncated"):
        read_image(file, 60_000)


def test_a_bomb_is_refused_in_the_words_of_the_limit() -> None:
    """Pillow's own limit, twice the limit of its warning, applies first."""
    with pytest.raises(UnreadableImage, match=r"^it has more pixels than data.max_pixels=[\d,]+ allows$"):
        read_image(io.BytesIO(_png_header(60_000, 60_000)))


def test_max_pixels_may_be_larger_than_pillows_own_limit(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    file = encode(Image.fromarray(COLOUR), "PNG")
    with pytest.raises(UnreadableImage, match="192 pixels are more than"):
        read_image(file, 191)
    assert read_image(file, 192).size == (16, 12)


def test_a_tiff_counts_by_its_largest_tile() -> None:
    """An image of 10×10 pixels with one tile of 40,000×40,000 pixels, in a small file, took 1.5 GB of memory."""
    tags = {256: 10, 257: 10, 258: 8, 259: 5, 262: 1, 277: 1, 322: 40_000, 323: 40_000, 324: 130, 325: 1000}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    file = io.BytesIO(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(1004))
    with pytest.raises(UnreadableImage, match="1,600,000,000 pixels are more than"):
        read_image(file)


def _peak() -> int:
    """Return this process's peak memory since the last write to `clear_refs`, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux can reset the memory peak")
@pytest.mark.parametrize("mode", ["I;16", "F", "RGBA", "RGB"])
def test_memory_follows_the_number_of_pixels(mode: str, tmp_path: Path) -> None:
    """At most three copies of four bytes per pixel, plus one band; an earlier version took 26 bytes per pixel."""
    shape, kind = {"RGBA": ((4000, 5000, 4), np.uint8), "RGB": ((4000, 5000, 3), np.uint8)}.get(
        mode, ((4000, 5000), np.uint16 if mode == "I;16" else np.float32)
    )
    path, exif = tmp_path / "image.tif", Image.Exif()
    exif[0x0112] = 6  # rotating needs a copy, too
    Image.fromarray(np.zeros(shape, kind)).save(path, exif=exif)
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak()
    assert read_image(path).size == (4000, 5000)
    assert (_peak() - before) / 20e6 < 15


def test_threads_share_one_limit(monkeypatch) -> None:
    """Sixteen threads never decode more pixels than two images have at once; a larger image waits and runs alone."""
    monkeypatch.setattr(decode, "_pixel_limit", decode._PixelLimit(2 * COLOUR.size // 3))
    held, most, lock, real = 0, [0], threading.Lock(), decode.to_rgb

    def slow(image: Image.Image) -> Image.Image:
        nonlocal held
        with lock:
            held += image.width * image.height
            most.append(held)
        barrier.wait(0.01)
        with lock:
            held -= image.width * image.height
        return real(image)

    barrier = threading.Event()
    monkeypatch.setattr(decode, "to_rgb", slow)
    large = Image.new("RGB", (40, 40))
    files = [encode(large if n % 5 == 0 else Image.fromarray(COLOUR), "PNG") for n in range(20)]
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(lambda file: read_image(file).size, files))
    assert sizes == [(40, 40) if n % 5 == 0 else (16, 12) for n in range(20)]
    assert max(most) == 40 * 40
    assert set(most) <= {0, 16 * 12, 2 * 16 * 12, 40 * 40}


def test_image_size_reads_the_header_only(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(_png_header(300, 200))  # without pixel data
    assert image_size(path) == (300, 200)


@pytest.mark.parametrize(
    ("side", "expected"), [(0, 800), (201, 800), (200, 400), (101, 400), (100, 200), (51, 200), (50, 100), (3, 100)]
)
def test_a_jpeg_is_decoded_no_larger_than_its_reader_needs(side: int, expected: int) -> None:
    image = Image.fromarray(COLOUR).resize((1200, 800), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    drafted = read_image(encode(image, "JPEG", exif=exif), draft=side)
    assert drafted.size == (expected, expected * 3 // 2)
    full = read_image(encode(image, "JPEG", exif=exif))
    squares = [fit_square(one, side or 8, "crop").astype(int) for one in (drafted, full)]
    assert np.abs(squares[0] - squares[1]).max() <= 3
    assert read_image(encode(image, "PNG"), draft=side).size == (1200, 800)


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
