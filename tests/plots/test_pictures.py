"""Converting tensors to pictures."""

from __future__ import annotations

import torch

from tests.helpers import compose
from zfnet.data import preprocess
from zfnet.plots.pictures import GREY, enlarge, mosaic, on_grey, to_pixels


def test_to_pixels_undoes_preprocess() -> None:
    data = compose("experiment=quickstart", "data.mean=[0.1,0.5,0.6]", "data.std=[0.2,0.3,0.4]").data
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(to_pixels(preprocess(pixels, data), data), pixels)


def test_on_grey_scales_each_projection_for_itself() -> None:
    projections = torch.zeros(3, 3, 4, 4)
    projections[0, :, 0, 0] = torch.tensor([1.0, -1.0, 0.5])
    projections[1] = 1e-6 * projections[0]
    shown = on_grey(projections)
    assert (shown[2] == GREY).all()
    assert shown[0, 0, 0].tolist() == [255, 1, 192]
    assert torch.equal(shown[0], shown[1])
    assert (shown[0, 1:] == GREY).all()


def test_on_grey_clips_a_bright_pixel() -> None:
    projection = torch.ones(1, 3, 40, 40)
    projection[0, 0, 0, 0] = 1e6
    assert on_grey(projection).float().mean() > 250


def test_on_grey_shows_a_small_field_as_its_crop() -> None:
    field = torch.randn(1, 3, 7, 7)
    whole = on_grey(torch.nn.functional.pad(field, (90, 90, 90, 90)))
    assert torch.equal(whole[:, 90:97, 90:97], on_grey(field))


def test_mosaic_by_hand() -> None:
    tiles = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(3, 1, 1, 3)
    sheet = mosaic(tiles, columns=2, gap=1)
    assert sheet[..., 0].tolist() == [[0, 255, 1], [255, 255, 255], [2, 255, 255]]
    assert enlarge(tiles, 5).shape == (3, 5, 5, 3)
    assert mosaic(tiles, columns=3, side=2).shape == (2, 6, 3)
