"""Receptive fields against the paper's numbers and against what the network really reacts to."""

from __future__ import annotations

import pytest
import torch

from tests.explain.networks import VARIANTS, network, pictures
from zfnet.config.errors import UserError
from zfnet.explain import receptive_box, receptive_field
from zfnet.model.zfnet import ZFNet


def test_the_papers_numbers() -> None:
    model = ZFNet(10, 224)
    fields = [receptive_field(model, f"conv{n}") for n in range(1, 6)]
    assert [f.size for f in fields] == [7, 27, 75, 107, 139]
    assert [f.stride for f in fields] == [2, 8, 16, 16, 16]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_box_holds_exactly_the_pixels_that_matter(variant: str) -> None:
    """In an all-positive network without maxima every pixel seen has a derivative; average pooling sees as max does."""
    model = network(variant)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    images = pictures(model, 1).abs().requires_grad_()
    for layer in ("conv2", "conv5"):
        x = images
        for name in model.steps:
            module = getattr(model, name)
            if isinstance(module, torch.nn.MaxPool2d):
                module = torch.nn.AvgPool2d(3, 2, module.padding, module.ceil_mode)
            x = x if name.startswith("norm") else module(x)
            if model.output_of.get(name) == layer:
                break
        last = x.shape[2] - 1
        for y, column in {(0, 0), (last, last), (last // 2, 0), (last // 2, last // 2)}:
            gradient = torch.autograd.grad(x[0, 0, y, column], images, retain_graph=True)[0][0].sum(0)
            rows, columns = gradient.sum(1).nonzero().flatten(), gradient.sum(0).nonzero().flatten()
            seen = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
            assert receptive_box(model, layer, y, column) == seen


def test_layers_without_a_field_are_refused() -> None:
    with pytest.raises(UserError, match="fc7: no such convolution layer"):
        receptive_field(network(), "fc7")
    with pytest.raises(UserError, match="conv3: no such convolution layer"):
        receptive_field(network("no_layers"), "conv3")
    with pytest.raises(UserError, match="outside conv5's"):
        receptive_box(network(), "conv5", 50, 0)
