"""What must hold of the deconvnet: closed forms, symmetries, and where a projection may lie, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.explain.networks import VARIANTS, alive, network, pictures, some_units
from tests.explain.oracles import close
from zfnet.explain import Deconvnet, receptive_box, receptive_field
from zfnet.explain.deconvnet import RULES
from zfnet.model.zfnet import ZFNet


def test_layer_1_is_the_filter_times_the_activation() -> None:
    model = network()
    images = pictures(model)
    activation = model.activations(images, ["conv1"])["conv1"]
    for unit in alive(model, images, "conv1"):
        n, channel, y, x = unit
        expected = torch.zeros(3, 64 + 14, 64 + 14, dtype=torch.float64)
        top, left = 2 * y - 1 + 7, 2 * x - 1 + 7
        expected[:, top : top + 7, left : left + 7] = (
            activation[n, channel, y, x] * model.conv1.weight[channel]
        )
        close(Deconvnet(model).project(images, "conv1", [unit])[0], expected[:, 7:-7, 7:-7])


def test_all_positive_networks_have_one_rule() -> None:
    model = network("ceil")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    images = pictures(model).abs()
    for layer in ("conv5", "fc8"):
        units = some_units(model, images, layer)
        first, second, third = (Deconvnet(model, rule).project(images, layer, units) for rule in RULES)
        assert first.abs().sum() > 0
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, third, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_the_seed_only_scales(rule: str) -> None:
    model = network()
    images = pictures(model)
    units = alive(model, images, "conv4")
    deconvnet = Deconvnet(model, rule)
    one = deconvnet.project(images, "conv4", units, seeds=torch.ones(len(units)))
    seven = deconvnet.project(images, "conv4", units, seeds=torch.full((len(units),), 7.0))
    own = deconvnet.project(images, "conv4", units)
    activation = model.activations(images, ["conv4"])["conv4"]
    close(seven, 7 * one)
    close(own, one * torch.stack([activation[u] for u in units])[:, None, None, None])


def test_an_inactive_unit_projects_to_nothing() -> None:
    model = network()
    images = pictures(model)
    activation = model.activations(images, ["conv3"])["conv3"]
    unit = tuple((activation == 0).nonzero()[0].tolist())
    for rule in RULES:
        assert Deconvnet(model, rule).project(images, "conv3", [unit]).abs().max() == 0


def test_negative_signals_do_not_pass_a_relu() -> None:
    """With a negative first layer the rectified signal is ≥ 0 above it, so the image is ≤ 0 everywhere."""
    model = network()
    with torch.no_grad():
        model.conv1.weight.abs_().neg_()
        model.conv1.bias.fill_(30)
    images = pictures(model)
    units = alive(model, images, "conv5")
    assert units
    projections = Deconvnet(model).project(images, "conv5", units)
    assert projections.max() <= 0
    assert projections.min() < 0
    assert Deconvnet(model, "gradient").project(images, "conv5", units).max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_projection_lies_within_the_receptive_field(variant: str) -> None:
    model = network(variant)
    images = pictures(model)
    for layer in ("conv2", "conv5"):
        units = some_units(model, images, layer)
        projections = Deconvnet(model).project(
            images, layer, units, seeds=torch.ones(len(units), dtype=torch.float64)
        )
        for unit, projection in zip(units, projections, strict=True):
            top, left, bottom, right = receptive_box(model, layer, unit[2], unit[3])
            assert projection.abs().sum() > 0
            projection[:, top:bottom, left:right] = 0
            assert projection.abs().sum() == 0


def test_moving_the_image_by_a_stride_moves_the_projection() -> None:
    model = ZFNet(4, 224, network().config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # a shift is seen at the borders through the biases
            if parameter.ndim == 1:
                parameter.zero_()
    images = torch.zeros(1, 3, 224, 224, dtype=torch.float64)
    images[:, :, 80:112, 80:112] = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    y, x = 5, 6
    activation = model.activations(images, ["conv5"])["conv5"][0, :, y, x]
    channel = int(activation.argmax())
    here = Deconvnet(model).project(images, "conv5", [(0, channel, y, x)])
    moved = Deconvnet(model).project(images.roll((16, 16), (2, 3)), "conv5", [(0, channel, y + 1, x + 1)])
    assert here.abs().sum() > 0
    close(moved[:, :, 16:, 16:], here[:, :, :-16, :-16])


@pytest.mark.parametrize("rule", RULES)
def test_fields_are_projections_cut_out(rule: str) -> None:
    model = network("ceil")
    images = pictures(model)
    units = some_units(model, images, "conv3")
    deconvnet, extent = Deconvnet(model, rule), receptive_field(model, "conv3")
    whole = F.pad(deconvnet.project(images, "conv3", units), (extent.size,) * 4)
    fields = deconvnet.project_fields(images, "conv3", units)
    assert fields.shape == (len(units), 3, extent.size, extent.size)
    for unit, projection, cut in zip(units, whole, fields, strict=True):
        top, left = (place + extent.size for place in extent.corner(unit[2], unit[3]))
        close(cut, projection[:, top : top + extent.size, left : left + extent.size])
