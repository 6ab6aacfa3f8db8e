"""The built-in images: balanced, reproducible, with tight boxes, and different from the test images."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from zfnet.data.shapes import CLASSES, draw_shapes


def test_a_function_of_part_and_index() -> None:
    a, b = draw_shapes(30, 48, 0), draw_shapes(530, 48, 0)
    assert np.array_equal(a.images, b.images[:30])
    assert torch.equal(a.boxes, b.boxes[:30])
    assert a.images.shape == (30, 48, 48, 3)
    assert a.images.dtype == np.uint8
    assert b.classes == CLASSES
    assert torch.bincount(b.labels).tolist() == [53] * 10


def test_no_image_is_in_both_parts_or_twice() -> None:
    marks = [hashlib.sha256(image.tobytes()).digest() for part in (0, 1) for image in draw_shapes(300, 32, part).images]
    assert len(set(marks)) == 600


def test_the_global_generator_is_not_touched() -> None:
    torch.manual_seed(1)
    a = draw_shapes(5, 32, 0).images
    torch.manual_seed(2)
    assert np.array_equal(a, draw_shapes(5, 32, 0).images)


def test_boxes_hug_the_object() -> None:
    """Outside the box, an image is a linear ramp with noise of known range. The shape touches each side of the box."""
    size, drawn = 64, draw_shapes(100, 64, 0)
    for image, (top, left, bottom, right) in zip(drawn.images, drawn.boxes.tolist(), strict=True):
        assert 0 <= top < bottom <= size
        assert 0 <= left < right <= size
        assert 14 <= max(bottom - top, right - left) <= 46  # radius 0.17 … 0.33 of 64 px
        inside = np.zeros((size, size), dtype=bool)
        inside[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True  # one pixel of soft edge
        yy, xx = np.mgrid[:size, :size]
        plane = np.stack([np.ones(size * size), yy.ravel(), xx.ravel()], 1)
        away = ~inside.ravel()
        off = np.zeros((size, size))
        for c in range(3):
            values = image[..., c].ravel().astype(float)
            ok = away & (values > 0) & (values < 255)  # without clipped pixels
            fit, *_ = np.linalg.lstsq(plane[ok], values[ok], rcond=None)
            residual = np.abs(values - plane @ fit).reshape(size, size)
            # noise is ±26, and clipping distorts the fit slightly
            assert (residual.ravel()[ok] > 35).mean() < 0.01
            off += residual
        # some pixel just inside each side belongs to the shape
        for side in (off[top, left:right], off[bottom - 1, left:right]):
            assert side.max() > 60
        for side in (off[top:bottom, left], off[top:bottom, right - 1]):
            assert side.max() > 60


def test_shapes_of_all_classes_are_visible() -> None:
    drawn = draw_shapes(100, 64, 0)
    for image, (top, left, bottom, right) in zip(drawn.images, drawn.boxes.tolist(), strict=True):
        patch = image[top:bottom, left:right].astype(float)
        assert patch.std() > image[0].astype(float).std() * 0.3
        assert patch.size > 300
