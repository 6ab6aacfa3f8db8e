"""Frames of projections and patches."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers import compose
from zfnet.data import preprocess
from zfnet.data.images import image_set
from zfnet.explain import Deconvnet
from zfnet.explain.crops import frame_size, view_units
from zfnet.model import Chain
from zfnet.plots.pictures import GREY, to_pixels


def test_view_units_with_fields_that_are_not_square() -> None:
    torch.manual_seed(0)
    chain = Chain(nn.Sequential(nn.Conv2d(3, 4, (3, 5), padding=(1, 0)), nn.ReLU()), 12)
    data = compose("experiment=quickstart", "data.image_size=12").data
    pixels = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    images = image_set(pixels.numpy(), torch.arange(3), list("abc"))
    units = torch.tensor([[2, 1, 4, 6], [0, 3, 0, 0]])
    assert frame_size(chain, "0") == 5
    projections, patches = view_units(Deconvnet(chain), images, data, "0", units)
    inputs = preprocess(pixels, data)
    shown = to_pixels(inputs, data)
    assert torch.equal(patches[0, :3], shown[2, 3:6, 6:11])
    assert torch.equal(patches[1, 1:3], shown[0, :2, :5])
    inside = torch.zeros(2, 5, 5, dtype=torch.bool)
    inside[0, :3], inside[1, 1:3] = True, True
    assert (patches[~inside] == GREY).all()
    assert (projections * ~inside[:, None] == 0).all()
    whole = Deconvnet(chain).project(inputs, "0", units)
    assert torch.equal(projections[0, :, :3], whole[0, :, 3:6, 6:11])
