"""Test-time augmentation against its definition."""

from __future__ import annotations

import dataclasses

import torch

from tests.helpers import TINY, compose
from zfnet import ZFNet
from zfnet.training.tta import MeanOfViews, data_for_views


def network() -> ZFNet:
    torch.manual_seed(0)
    return ZFNet(10, 64, compose(*TINY).model).eval()


def test_ten_crops_are_corners_centre_and_mirror_images() -> None:
    model, images = network(), torch.randn(3, 3, 74, 74)
    views = []
    for top, left in ((0, 0), (0, 10), (10, 0), (10, 10), (5, 5)):
        crop = images[:, :, top : top + 64, left : left + 64]
        views += [crop, crop.flip(3)]
    with torch.no_grad():
        expected = torch.stack([model(v).softmax(1) for v in views]).mean(0).log()
        torch.testing.assert_close(MeanOfViews(model, "tencrop")(images), expected)


def test_flip_makes_mirror_images_equal() -> None:
    model, images = network(), torch.randn(2, 3, 64, 64)
    both = MeanOfViews(model, "flip")
    with torch.no_grad():
        torch.testing.assert_close(both(images), both(images.flip(3)))
        expected = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
        torch.testing.assert_close(both(images), expected.log())
        assert not torch.allclose(model(images), model(images.flip(3)))


def test_the_size_before_cropping_follows_the_crop() -> None:
    data = compose(*TINY).data
    assert data_for_views(data, "flip", 64, 0.875) is data
    assert data_for_views(data, "tencrop", 64, 0.875).image_size == 73  # 64 / 0.875
    larger = data_for_views(dataclasses.replace(data, crop_size=32), "tencrop", 64, 0.875)
    assert (larger.image_size, larger.crop_size) == (128, None)  # 32 of 64 pixels
