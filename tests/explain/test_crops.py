"""Frames of projections and patches."""

from __future__ import annotations

import torch
from torch import nn

from tests.helpers import compose
from zfnet.data import preprocess
from zfnet.data.images import image_set
from zfnet.explain import Deconvnet
from zfnet.explain.crops import frame_size, look
from zfnet.model import Chain


def test_look_at_fields_that_are_not_square() -> None:
    torch.manual_seed(0)
    chain = Chain(nn.Sequential(nn.Conv2d(3, 4, (3, 5), padding=(1, 0)), nn.ReLU()), 12)
    data = compose("experiment=quickstart", "data.image_size=12").data
    pixels = torch.randint(0, 256, (3, 12, 12, 3), dtype=torch.uint8)
    images = image_set(pixels.numpy(), torch.arange(3), list("abc"))
    units = torch.tensor([[2, 1, 4, 6], [0, 3, 0, 0]])
    views = look(Deconvnet(chain), images, data, "0", units)
    inputs = preprocess(pixels, data)
    assert frame_size(chain, "0") == 5
    assert torch.equal(views.patches[0, :, :3], inputs[2, :, 3:6, 6:11])
    assert torch.equal(views.patches[1, :, 1:3], inputs[0, :, :2, :5])
    inside = torch.zeros(2, 1, 5, 5, dtype=torch.bool)
    inside[0, 0, :3], inside[1, 0, 1:3] = True, True
    assert torch.equal(views.inside, inside)
    for name in ("patches", "projections"):
        assert (getattr(views, name) * ~inside == 0).all()
    whole = Deconvnet(chain).project(inputs, "0", units)
    assert torch.equal(views.projections[0, :, :3], whole[0, :, 3:6, 6:11])
