"""Compare receptive fields with the paper's numbers and with the pixels that change a unit's activation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.explain.networks import NETWORKS, chain, network, random_inputs
from zfnet.config.errors import UserError
from zfnet.explain import receptive_box, receptive_field
from zfnet.model import Chain, ZFNet


def test_receptive_field_papers_numbers() -> None:
    model = ZFNet(10, 224)
    fields = [receptive_field(model, f"conv{n}") for n in range(1, 6)]
    assert [max(f.kernel) for f in fields] == [7, 27, 75, 107, 139]
    assert [f.stride for f in fields] == [(s, s) for s in (2, 8, 16, 16, 16)]


def test_receptive_field_of_other_networks() -> None:
    """By hand. `mixed` has kernel/stride 5/2 and 2/2 along rows, 3/1 and 3/2 along columns, then 3 with dilation 2."""
    vgg, mixed = chain("vgg11"), chain("mixed")
    assert [max(receptive_field(vgg, layer).kernel) for layer in vgg.conv_layers] == [3, 8, 18, 26, 46, 62, 102, 134]
    field = receptive_field(mixed, "body.dilated")
    assert field.kernel == (5 + 2 + 4 * 4, 3 + 2 + 4 * 2)
    assert field.stride == (4, 2)
    assert field.padding == (2 * 4 + 1, 2 * 2 + 2)


@pytest.mark.parametrize("name", NETWORKS)
def test_receptive_box_holds_exactly_the_pixels_that_matter(name: str) -> None:
    """With positive weights, and average instead of max pooling, every pixel that a unit sees has a derivative."""
    model = chain(name)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.abs_()
    images = random_inputs(model, 1).abs().requires_grad_()
    for layer in (model.conv_layers[1], model.conv_layers[-1]):
        x = images
        for step in model.up_to(layer):
            module = step.module
            if isinstance(module, nn.MaxPool2d):
                module = nn.AvgPool2d(module.kernel_size, module.stride, module.padding, module.ceil_mode)
            x = module(x) if isinstance(module, (nn.Conv2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)) else x
        bottom, right = x.shape[2] - 1, x.shape[3] - 1
        for y, column in {(0, 0), (bottom, right), (bottom // 2, 0), (bottom // 2, right // 2)}:
            gradient = torch.autograd.grad(x[0, 0, y, column], images, retain_graph=True)[0][0].sum(0)
            rows, columns = gradient.sum(1).nonzero().flatten(), gradient.sum(0).nonzero().flatten()
            seen = (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
            assert receptive_box(model, layer, y, column) == seen


def test_receptive_field_refuses_layers_without_one() -> None:
    with pytest.raises(UserError, match="the network has no convolution fc7"):
        receptive_field(network(), "fc7")
    with pytest.raises(UserError, match="the network has no convolution conv3"):
        receptive_field(network("no_layers"), "conv3")
    with pytest.raises(UserError, match="outside conv5's"):
        receptive_box(network(), "conv5", 50, 0)
    with pytest.raises(UserError, match=r"mean \(AdaptiveAvgPool2d\): its 3 windows over \d+ cells differ in size"):
        receptive_field(chain("mixed"), "last")
    shuffled = Chain(nn.Sequential(nn.Conv2d(3, 4, 1), nn.PixelShuffle(2), nn.Conv2d(1, 2, 3)), 8)
    with pytest.raises(UserError, match=r"1 \(PixelShuffle\): which pixels it sees is not known"):
        receptive_field(shuffled, "2")
    with pytest.raises(UserError, match="Sequential: its image size is not known"):
        receptive_field(shuffled.model, "2")
