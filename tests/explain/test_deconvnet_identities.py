"""Identities of the deconvnet in float64: closed forms, symmetries, and projections within the receptive field."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.explain.networks import NETWORKS, chain, network, random_inputs, some_units, strongest_units
from tests.explain.oracles import assert_close
from zfnet.explain import Deconvnet, receptive_box, receptive_field
from zfnet.explain.deconvnet import RULES
from zfnet.explain.windows import Signal, Window, take_windows, transposed
from zfnet.model.zfnet import ZFNet


def test_project_conv1_is_the_filter_times_the_activation() -> None:
    model = network()
    images = random_inputs(model)
    activation = model.activations(images, ["conv1"])["conv1"]
    for unit in strongest_units(model, images, "conv1"):
        n, channel, y, x = unit
        expected = torch.zeros(3, 64 + 14, 64 + 14, dtype=torch.float64)
        top, left = 2 * y - 1 + 7, 2 * x - 1 + 7
        expected[:, top : top + 7, left : left + 7] = activation[n, channel, y, x] * model.conv1.weight[channel]
        assert_close(Deconvnet(model).project(images, "conv1", [unit])[0], expected[:, 7:-7, 7:-7])


def test_project_in_all_positive_networks_has_one_rule() -> None:
    model = network("ceil")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    images = random_inputs(model).abs()
    for layer in ("conv5", "fc8"):
        units = some_units(model, images, layer)
        first, second, third = (Deconvnet(model, rule).project(images, layer, units) for rule in RULES)
        assert first.abs().sum() > 0
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first, third, rtol=0, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_project_seeds_only_scale(rule: str) -> None:
    model = network()
    images = random_inputs(model)
    units = strongest_units(model, images, "conv4")
    deconvnet = Deconvnet(model, rule)
    one = deconvnet.project(images, "conv4", units, seeds=torch.ones(len(units)))
    seven = deconvnet.project(images, "conv4", units, seeds=torch.full((len(units),), 7.0))
    own = deconvnet.project(images, "conv4", units)
    activation = model.activations(images, ["conv4"])["conv4"]
    assert_close(seven, 7 * one)
    assert_close(own, one * torch.stack([activation[u] for u in units])[:, None, None, None])


def test_project_inactive_units_to_nothing() -> None:
    model = network()
    images = random_inputs(model)
    activation = model.activations(images, ["conv3"])["conv3"]
    unit = tuple((activation == 0).nonzero()[0].tolist())
    for rule in RULES:
        assert Deconvnet(model, rule).project(images, "conv3", [unit]).abs().max() == 0


def test_project_stops_negative_signals_at_a_relu() -> None:
    """The first layer has negative weights and receives a rectified signal ≥ 0, so the projection is ≤ 0."""
    model = network()
    with torch.no_grad():
        model.conv1.weight.abs_().neg_()
        model.conv1.bias.fill_(30)
    images = random_inputs(model)
    units = strongest_units(model, images, "conv5")
    assert units
    projections = Deconvnet(model).project(images, "conv5", units)
    assert projections.max() <= 0
    assert projections.min() < 0
    assert Deconvnet(model, "gradient").project(images, "conv5", units).max() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_project_lies_within_the_receptive_field(name: str) -> None:
    model = chain(name)
    images = random_inputs(model)
    for layer in (model.conv_layers[1], model.conv_layers[-1]):
        units = some_units(model, images, layer)
        projections = Deconvnet(model).project(images, layer, units, seeds=torch.ones(len(units), dtype=torch.float64))
        for unit, projection in zip(units, projections, strict=True):
            top, left, bottom, right = receptive_box(model, layer, unit[2], unit[3])
            assert projection.abs().sum() > 0
            projection[:, top:bottom, left:right] = 0
            assert projection.abs().sum() == 0


def test_project_moves_with_the_image() -> None:
    model = ZFNet(4, 224, network().config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # with biases, the padding at the borders would reveal a shift
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
    assert_close(moved[:, :, 16:, 16:], here[:, :, :-16, :-16])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("name", "layer"), [("ceil", "conv3"), ("mixed", "body.dilated"), ("vgg11", "features.3")])
def test_project_fields_are_projections_cut_out(name: str, layer: str, rule: str) -> None:
    model = chain(name)
    images = random_inputs(model)
    units = some_units(model, images, layer)
    deconvnet, extent = Deconvnet(model, rule), receptive_field(model, layer)
    whole = F.pad(deconvnet.project(images, layer, units), (max(extent.kernel),) * 4)
    fields = deconvnet.project(images, layer, units, fields=True)
    assert fields.shape == (len(units), model.channels, *extent.kernel)
    for unit, projection, cut in zip(units, whole, fields, strict=True):
        top, left = (place + max(extent.kernel) for place in extent.corners(torch.tensor([unit[2:4]]))[0].tolist())
        assert_close(cut, projection[:, top : top + extent.kernel[0], left : left + extent.kernel[1]])


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    square=st.booleans(),
    spacing=st.sampled_from([(1, 1), (2, 1), (3, 3)]),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    channels=st.sampled_from([1, 3, 6]),
    groups=st.integers(1, 2),
)
def test_transposed_is_the_adjoint(kernel, stride, square, spacing, height, width, channels, groups) -> None:
    if square:
        kernel, stride, spacing = (kernel[0],) * 2, (stride[0],) * 2, (1, 1)
    signal = torch.randn(2, 4, height, width, dtype=torch.float64)
    weight = torch.randn(4, channels, *kernel, dtype=torch.float64)
    ours = transposed(signal, weight, Window(kernel, spacing, stride, (0, 0)), groups)
    theirs = F.conv_transpose2d(signal, weight, stride=stride, dilation=spacing, groups=groups)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    x = torch.randn_like(ours)
    forward = F.conv2d(x, weight, stride=stride, dilation=spacing, groups=groups)
    torch.testing.assert_close((forward * signal).sum(), (x * ours).sum(), rtol=1e-10, atol=1e-10)


def test_take_windows_beyond_the_border_are_zero() -> None:
    maps = torch.arange(1, 19).view(2, 1, 3, 3)
    windows = take_windows(maps, torch.tensor([1, 0]), torch.tensor([[-1, -1], [2, 1]]), (2, 3))
    assert windows[:, 0].tolist() == [[[0, 0, 0], [0, 10, 11]], [[8, 9, 0], [0, 0, 0]]]


def test_signal_drops_what_lies_outside_and_is_never_larger_than_the_map() -> None:
    ones, item = torch.ones(1, 1, 4, 4), torch.tensor([0])
    small = Signal(ones[..., :2, :2], item, torch.tensor([[-1, 2]]))
    small.keep_inside((3, 3))
    assert small.values[0, 0].tolist() == [[0, 0], [1, 0]]
    assert small.corner.tolist() == [[-1, 2]]
    large = Signal(ones, item, torch.tensor([[-2, 0]]))
    large.keep_inside((3, 3))
    assert large.values[0, 0].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert large.corner.tolist() == [[0, 0]]
