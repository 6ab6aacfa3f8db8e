"""The deconvnet against independent oracles, with switches of another image, and its manners, in float64."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.explain.networks import VARIANTS, alive, network, pictures, some_units
from tests.explain.oracles import by_autograd, by_mirror, close
from zfnet.config.errors import UserError
from zfnet.explain import Deconvnet
from zfnet.explain.deconvnet import RULES
from zfnet.explain.switches import pool_with_switches, unpool
from zfnet.model.sizes import CONV_LAYERS

# -- independent implementations


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_and_rule_equals_autograd(variant: str, rule: str) -> None:
    model = network(variant)
    images = pictures(model)
    deconvnet = Deconvnet(model, rule, lrn="gradient")
    for layer in model.layers:
        units = some_units(model, images, layer)
        expected = torch.stack([by_autograd(model, images, layer, unit, rule) for unit in units])
        assert expected.abs().sum() > 0
        close(deconvnet.project(images, layer, units), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_equals_a_mirror_network(variant: str) -> None:
    model = network(variant)
    images = pictures(model)
    deconvnet = Deconvnet(model)
    for layer in model.layers:
        units = some_units(model, images, layer)
        expected = torch.stack([by_mirror(model, images, layer, unit) for unit in units])
        close(deconvnet.project(images, layer, units), expected)


@pytest.mark.parametrize("variant", ["pad", "ceil", "batch"])
def test_equals_captum(variant: str) -> None:
    attr = pytest.importorskip("captum.attr")
    model = network(variant)
    images = pictures(model)
    for layer in ("conv2", "conv5", "fc7"):
        units = alive(model, images, layer)[:3] if layer in CONV_LAYERS else [(0, 1), (1, 2), (1, 3)]
        ours = Deconvnet(model).project(images, layer, units)
        activations = model.activations(images, [layer])[layer]
        step = next(s for s, name in model.output_of.items() if name == layer)
        captum = attr.NeuronDeconvolution(model, getattr(model, step))
        with warnings.catch_warnings():  # captum warns of its hooks, and at each attribution
            warnings.simplefilter("ignore")
            for unit, projection in zip(units, ours, strict=True):
                theirs = captum.attribute(images[unit[0]][None], unit[1:])[0]
                close(projection, theirs * activations[unit])


def test_equals_finite_differences() -> None:
    """The gradient rule is the derivative of the activation, here times the activation."""
    model = network("lrn")
    images = pictures(model, 1)
    unit = alive(model, images, "conv5")[0]
    direction = pictures(model, 1, seed=5)
    step = 1e-6

    def value(shift: float) -> float:
        return model.activations(images + shift * direction, ["conv5"])["conv5"][unit].item()

    slope = (value(step) - value(-step)) / (2 * step)
    projection = Deconvnet(model, "gradient", lrn="gradient").project(images, "conv5", [unit])
    assert (projection * direction).sum().item() == pytest.approx(slope * value(0), rel=1e-6)


@pytest.mark.parametrize("dead_windows", ["first", "mask", "all"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_working_on_what_the_units_see_changes_nothing(variant: str, dead_windows: str) -> None:
    model = network(variant)
    images = pictures(model)
    windows, whole = (Deconvnet(model, dead_windows=dead_windows) for _ in range(2))
    whole.whole_maps = True
    for layer in ("conv2", "conv5"):
        units = some_units(model, images, layer)
        close(windows.project(images, layer, units), whole.project(images, layer, units))


# -- switches


def test_switches_of_another_image() -> None:
    """The seeds stay; the places of the maxima are the other image's: a mirror with both says the same."""
    model = network("no_layers")
    images, others = pictures(model), pictures(model, seed=9)
    units = alive(model, images, "conv2")
    ours = Deconvnet(model).project(images, "conv2", units, switches_from=others)
    own = Deconvnet(model).project(images, "conv2", units)
    activation = model.activations(images, ["conv2"])["conv2"]
    for unit, projection in zip(units, ours, strict=True):
        below = F.relu(model.conv1(others[unit[0]][None]))
        _, where = F.max_pool2d(below, 3, 2, 1, return_indices=True)
        signal = torch.zeros_like(model.conv2(model.pool1(below)))
        signal[(0, *unit[1:])] = activation[unit]
        signal = F.conv_transpose2d(
            signal, model.conv2.weight, stride=2, output_padding=where.shape[3] % 2 ^ 1
        )
        signal = F.pad(signal, (0, where.shape[3] - signal.shape[3]) * 2)
        signal = torch.zeros_like(below).flatten(2).scatter_add(2, where.flatten(2), signal.flatten(2))
        expected = F.conv_transpose2d(signal.view(below.shape).clamp(min=0), model.conv1.weight, stride=2)
        size = model.image_size
        expected = F.pad(expected, (0, 2, 0, 2))[0, :, 1 : size + 1, 1 : size + 1]
        close(projection, expected)
    assert not torch.allclose(ours, own)
    close(Deconvnet(model).project(images, "conv2", units, switches_from=images), own)


def test_max_unpool_would_be_wrong() -> None:
    """Overlapping windows share maxima; MaxUnpool2d keeps one of the duplicates, the adjoint adds them."""
    torch.manual_seed(0)
    x = F.relu(torch.randn(4, 8, 27, 27, dtype=torch.float64)).requires_grad_()
    pooled, where = F.max_pool2d(x, 3, 2, return_indices=True)
    signal = torch.rand_like(pooled)
    right = torch.autograd.grad(pooled, x, signal)[0]
    pool = nn.MaxPool2d(3, 2)
    ours = unpool(signal, pool_with_switches(x.detach(), pool)[1], pool)
    close(ours, right)
    wrong = F.max_unpool2d(signal, where, 3, 2, output_size=x.shape[2:])
    error = float((wrong - right).norm() / right.norm())
    assert 0.03 < error < 0.6
    assert wrong.sum() < right.sum()


# -- manners


def test_the_model_is_left_as_it_was() -> None:
    model = network("batch").train()
    model.requires_grad_()
    model(pictures(model)).sum().backward()
    cudnn = torch.backends.cudnn
    switches = cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    images = pictures(model).requires_grad_()
    found = Deconvnet(model, "guided", lrn="gradient").project(images, "fc8", [(0, 0), (1, 3)])
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision) == switches
    assert torch.is_grad_enabled()
    assert not found.requires_grad
    assert images.grad is None
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    torch.testing.assert_close(
        found, Deconvnet(model.eval(), "guided").project(images, "fc8", [(0, 0), (1, 3)]), rtol=0, atol=0
    )


def test_twice_the_same_bytes_and_chunks_change_nothing(monkeypatch) -> None:
    model = network("pad").float()
    images = pictures(model, 3).float()
    units = some_units(model, images, "conv5")
    first, second = (Deconvnet(model).project(images, "conv5", units) for _ in range(2))
    assert first.numpy().tobytes() == second.numpy().tobytes()
    monkeypatch.setattr("zfnet.explain.deconvnet._IMAGES", 1)
    monkeypatch.setattr("zfnet.explain.deconvnet._CHUNK_BYTES", {"cpu": 1})
    torch.testing.assert_close(Deconvnet(model).project(images, "conv5", units), first)


def test_tf32_has_no_part_in_it() -> None:
    """Neither in convolutions nor in products with the fully connected layers' weights."""
    model, found = network(), []
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv

    def note(*_) -> None:
        found.append((matmul.fp32_precision, conv.fp32_precision))

    model.fc8.register_forward_hook(note)
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        Deconvnet(model).project(pictures(model), "fc8", [(0, 0)])
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
    assert found == [("ieee", "ieee")]


def test_no_units_no_projections() -> None:
    model = network()
    assert Deconvnet(model).project(pictures(model), "conv5", []).shape == (0, 3, 64, 64)


@pytest.mark.parametrize(
    ("layer", "units", "message"),
    [
        ("conv6", [(0, 0, 0, 0)], "conv6: no such layer"),
        ("conv1", [(0, 5, 0, 0)], "conv1: channel 5 is out of range, 0 … 4"),
        ("conv1", [(2, 0, 0, 0)], "conv1: image 2 is out of range, 0 … 1"),
        ("conv1", [(0, 0, 99, 0)], "conv1: y 99 is out of range"),
        ("conv1", [(0, 0, 0, -1)], "conv1: x -1 is out of range"),
        ("conv1", [(0, 0)], "must be given as (image, channel, y, x)"),
        ("fc7", [(0, 99)], "fc7: feature 99 is out of range"),
    ],
)
def test_bad_units_are_named(layer: str, units: list, message: str) -> None:
    model = network()
    with pytest.raises(UserError) as error:
        Deconvnet(model).project(pictures(model), layer, units)
    assert message in str(error.value)


@pytest.mark.parametrize("project", [Deconvnet.project, Deconvnet.project_fields])
def test_seeds_and_switches_must_fit(project) -> None:
    """Too many seeds would otherwise go by unseen."""
    model = network()
    deconvnet, images, units = Deconvnet(model), pictures(model), [(0, 1, 2, 3), (1, 1, 2, 3)]
    with pytest.raises(UserError, match=r"seeds of shape \[3\]: must be \[2\], one for each unit"):
        project(deconvnet, images, "conv1", units, seeds=torch.ones(3))
    with pytest.raises(UserError, match=r"switches_from of shape \[1, 3, 64, 64\]: must be \[2, 3, 64, 64\]"):
        project(deconvnet, images, "conv1", units, switches_from=images[:1])


def test_bad_choices_are_named() -> None:
    with pytest.raises(UserError, match="rule=relu: must be one of deconvnet, guided, gradient"):
        Deconvnet(network(), "relu")
    with pytest.raises(UserError, match="dead_windows=none: must be one of"):
        Deconvnet(network(), dead_windows="none")


@pytest.mark.gpu
def test_the_gpu_says_the_same() -> None:
    for variant in VARIANTS:
        model = network(variant)
        images = pictures(model)
        units = some_units(model, images, "conv5")
        expected = Deconvnet(model).project(images, "conv5", units)
        found = Deconvnet(model.cuda()).project(images.cuda(), "conv5", units)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)
