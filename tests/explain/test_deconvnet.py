"""Compare the deconvnet with independent implementations, and test other images' switches and errors, in float64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.explain.networks import (
    NETWORKS,
    OTHERS,
    VARIANTS,
    chain,
    network,
    random_inputs,
    some_units,
    strongest_units,
)
from tests.explain.oracles import assert_close, project_by_autograd, project_by_mirror
from zfnet.config.errors import UserError
from zfnet.explain import Deconvnet
from zfnet.explain.deconvnet import RULES
from zfnet.explain.windows import DEAD_WINDOWS, pool_with_switches, unpool, window_of


class Scaled(nn.Conv2d):
    """A convolution that overrides `forward`, so its adjoint is unknown."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


# -- independent implementations


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NETWORKS)
def test_project_equals_autograd(name: str, rule: str) -> None:
    model = chain(name)
    images = random_inputs(model)
    deconvnet = Deconvnet(model, rule, lrn="gradient")
    for layer in model.layers:
        units = some_units(model, images, layer)[: 2 if name in OTHERS else None]
        units += strongest_units(model, images, layer)[:1]
        expected = torch.stack([project_by_autograd(model, images, layer, unit, rule) for unit in units])
        assert expected.abs().sum() > 0
        assert_close(deconvnet.project(images, layer, units), expected)


@pytest.mark.parametrize("dead_windows", DEAD_WINDOWS)
@pytest.mark.parametrize("name", NETWORKS)
def test_project_equals_a_mirror_network(name: str, dead_windows: str) -> None:
    """The mirror network works on whole maps, and the deconvnet on the windows that units see."""
    model = chain(name)
    images = random_inputs(model)
    deconvnet = Deconvnet(model, dead_windows=dead_windows)
    for layer in model.layers:
        units = some_units(model, images, layer)[: 2 if name in OTHERS else None]
        expected = torch.stack([project_by_mirror(model, images, layer, unit, dead_windows) for unit in units])
        assert_close(deconvnet.project(images, layer, units), expected)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        *((name, ("conv2", "conv5", "fc7")) for name in ("pad", "ceil", "batch")),
        ("alexnet", ("features.3", "features.10", "classifier.4")),
        ("vgg11", ("features.3", "features.16", "classifier.3")),
    ],
)
def test_project_equals_captum(name: str, layers: tuple[str, ...]) -> None:
    attr = pytest.importorskip("captum.attr")
    model = chain(name)
    images = random_inputs(model)
    module = copy.deepcopy(model.model)
    for relu in (m for m in module.modules() if isinstance(m, nn.ReLU)):
        relu.inplace = False  # captum's hooks fail with in-place modules
    names = {m: n for n, m in model.model.named_modules()}
    for layer in layers:
        units = strongest_units(model, images, layer)[:3]
        activations = model.activations(images, [layer])[layer]
        end = module.get_submodule(names[model.up_to(layer)[-1].module])
        for rule, method in (("deconvnet", attr.NeuronDeconvolution), ("guided", attr.NeuronGuidedBackprop)):
            ours = Deconvnet(model, rule).project(images, layer, units)
            with warnings.catch_warnings():  # captum warns about its hooks at each attribution
                warnings.simplefilter("ignore")
                for unit, projection in zip(units, ours, strict=True):
                    theirs = method(module, end).attribute(images[unit[0]][None], unit[1:])[0]
                    assert_close(projection, theirs * activations[unit])


def test_project_equals_finite_differences() -> None:
    """The gradient rule gives the derivative of the activation times the activation."""
    model = network("lrn")
    images = random_inputs(model, 1)
    unit = strongest_units(model, images, "conv5")[0]
    direction = random_inputs(model, 1, seed=5)
    step = 1e-6

    def value(shift: float) -> float:
        return model.activations(images + shift * direction, ["conv5"])["conv5"][unit].item()

    slope = (value(step) - value(-step)) / (2 * step)
    projection = Deconvnet(model, "gradient", lrn="gradient").project(images, "conv5", [unit])
    assert (projection * direction).sum().item() == pytest.approx(slope * value(0), rel=1e-6)


# -- switches


def test_project_with_switches_of_another_image() -> None:
    """The activations are the image's own, and the maxima's positions the other image's, as in a mirror network."""
    model = network("no_layers")
    images, others = random_inputs(model), random_inputs(model, seed=9)
    units = strongest_units(model, images, "conv2")
    ours = Deconvnet(model).project(images, "conv2", units, switches_from=others)
    own = Deconvnet(model).project(images, "conv2", units)
    activation = model.activations(images, ["conv2"])["conv2"]
    for unit, projection in zip(units, ours, strict=True):
        below = F.relu(model.conv1(others[unit[0]][None]))
        _, where = F.max_pool2d(below, 3, 2, 1, return_indices=True)
        signal = torch.zeros_like(model.conv2(model.pool1(below)))
        signal[(0, *unit[1:])] = activation[unit]
        signal = F.conv_transpose2d(signal, model.conv2.weight, stride=2, output_padding=where.shape[3] % 2 ^ 1)
        signal = F.pad(signal, (0, where.shape[3] - signal.shape[3]) * 2)
        signal = torch.zeros_like(below).flatten(2).scatter_add(2, where.flatten(2), signal.flatten(2))
        expected = F.conv_transpose2d(signal.view(below.shape).clamp(min=0), model.conv1.weight, stride=2)
        size = model.image_size
        expected = F.pad(expected, (0, 2, 0, 2))[0, :, 1 : size + 1, 1 : size + 1]
        assert_close(projection, expected)
    assert not torch.allclose(ours, own)
    assert_close(Deconvnet(model).project(images, "conv2", units, switches_from=images), own)


def test_unpool_adds_what_max_unpool_would_lose() -> None:
    """Overlapping windows share maxima. MaxUnpool2d keeps only one of their signals, but the adjoint adds them."""
    torch.manual_seed(0)
    x = F.relu(torch.randn(4, 8, 27, 27, dtype=torch.float64)).requires_grad_()
    pooled, where = F.max_pool2d(x, 3, 2, return_indices=True)
    signal = torch.rand_like(pooled)
    right = torch.autograd.grad(pooled, x, signal)[0]
    pool = nn.MaxPool2d(3, 2)
    ours = unpool(signal, pool_with_switches(x.detach(), pool)[1], window_of(pool))
    assert_close(ours, right)
    wrong = F.max_unpool2d(signal, where, 3, 2, output_size=x.shape[2:])
    error = float((wrong - right).norm() / right.norm())
    assert 0.03 < error < 0.6
    assert wrong.sum() < right.sum()


# -- side effects, bad input


def test_project_leaves_the_model_as_it_was() -> None:
    model = network("batch").train()
    model.requires_grad_()
    model(random_inputs(model)).sum().backward()
    cudnn = torch.backends.cudnn
    switches = cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [p.grad.clone() for p in model.parameters()]
    images = random_inputs(model).requires_grad_()
    projections = Deconvnet(model, "guided", lrn="gradient").project(images, "fc8", [(0, 0), (1, 3)])
    assert (cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision) == switches
    assert torch.is_grad_enabled()
    assert not projections.requires_grad
    assert images.grad is None
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    torch.testing.assert_close(
        projections, Deconvnet(model.eval(), "guided").project(images, "fc8", [(0, 0), (1, 3)]), rtol=0, atol=0
    )


def test_project_gives_the_same_bytes_twice_and_in_chunks(monkeypatch) -> None:
    model = network("pad").float()
    images = random_inputs(model, 3).float()
    units = some_units(model, images, "conv5")
    first, second = (Deconvnet(model).project(images, "conv5", units) for _ in range(2))
    assert first.numpy().tobytes() == second.numpy().tobytes()
    monkeypatch.setattr("zfnet.explain.deconvnet._IMAGES_AT_ONCE", 1)
    monkeypatch.setattr("zfnet.explain.deconvnet._CHUNK_BYTES", {"cpu": 1})
    torch.testing.assert_close(Deconvnet(model).project(images, "conv5", units), first)


def test_project_never_uses_tf32() -> None:
    """TF32 is off both in convolutions and in matrix products with the fully connected layers' weights."""
    model, precisions = network(), []
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv

    def note(*_) -> None:
        precisions.append((matmul.fp32_precision, conv.fp32_precision))

    deconvnet = Deconvnet(model)
    model.fc8.register_forward_hook(note)
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        deconvnet.project(random_inputs(model), "fc8", [(0, 0)])
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
    assert precisions == [("ieee", "ieee")]


def test_project_without_units() -> None:
    model = network()
    assert Deconvnet(model).project(random_inputs(model), "conv5", []).shape == (0, 3, 64, 64)


@pytest.mark.parametrize(
    ("layer", "units", "message"),
    [
        ("conv6", [(0, 0, 0, 0)], "the network has no layer conv6"),
        ("conv1", [(0, 5, 0, 0)], "conv1: channel 5 is out of range, 0 … 4"),
        ("conv1", [(2, 0, 0, 0)], "conv1: image 2 is out of range, 0 … 1"),
        ("conv1", [(0, 0, 99, 0)], "conv1: y 99 is out of range"),
        ("conv1", [(0, 0, 0, -1)], "conv1: x -1 is out of range"),
        ("conv1", [(0, 0)], "must be given as (image, channel, y, x)"),
        ("fc7", [(0, 99)], "fc7: feature 99 is out of range"),
    ],
)
def test_project_names_bad_units(layer: str, units: list, message: str) -> None:
    model = network()
    with pytest.raises(UserError) as error:
        Deconvnet(model).project(random_inputs(model), layer, units)
    assert message in str(error.value)


@pytest.mark.parametrize("fields", [False, True])
def test_project_refuses_seeds_and_switches_that_do_not_fit(fields: bool) -> None:
    """Without this check, too many seeds would be ignored."""
    model = network()
    deconvnet, images, units = Deconvnet(model), random_inputs(model), [(0, 1, 2, 3), (1, 1, 2, 3)]
    with pytest.raises(UserError, match=r"seeds of shape \[3\]: must be \[2\], one for each unit"):
        deconvnet.project(images, "conv1", units, seeds=torch.ones(3), fields=fields)
    with pytest.raises(UserError, match=r"switches_from of shape \[1, 3, 64, 64\]: must be \[2, 3, 64, 64\]"):
        deconvnet.project(images, "conv1", units, switches_from=images[:1], fields=fields)


@pytest.mark.parametrize("layer", ["conv1", "fc6"])
@pytest.mark.parametrize("shape", [(2, 3, 63, 64), (2, 1, 64, 64), (3, 64, 64)])
def test_project_refuses_images_of_another_size(layer: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"images of shape .*: the network expects \[N, 3, 64, 64\]"):
        Deconvnet(network()).project(torch.zeros(shape), layer, [(0, 0, 0, 0)])


def test_project_cuts_no_fields_of_linear_layers() -> None:
    model = network()
    with pytest.raises(UserError, match="fc7: its units see the whole image"):
        Deconvnet(model).project(random_inputs(model), "fc7", [(0, 0)], fields=True)


def test_deconvnet_names_bad_choices() -> None:
    with pytest.raises(UserError, match="rule=relu: must be one of deconvnet, guided, gradient"):
        Deconvnet(network(), "relu")
    with pytest.raises(UserError, match="dead_windows=none: must be one of"):
        Deconvnet(network(), dead_windows="none")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.GELU(), r"2 \(GELU\): the deconvnet has no rule for it; known: Conv2d, ReLU, MaxPool2d, AvgPool2d"),
        (nn.AdaptiveMaxPool2d(3), r"2 \(AdaptiveMaxPool2d\): the deconvnet has no rule"),
        (Scaled(4, 4, 3), r"2 \(Scaled\): the deconvnet has no rule"),
        (nn.Conv2d(4, 4, 3, 1, 1, padding_mode="reflect"), r"2 \(Conv2d\): padding_mode=reflect: only zeros"),
        (nn.BatchNorm2d(4, track_running_stats=False), r"2 \(BatchNorm2d\): track_running_stats=False"),
        (nn.MaxPool2d(8, 1), r"2 \(MaxPool2d\): its windows have 64 cells; at most 63"),
        (nn.Linear(8, 8), r"2 \(Linear\): its input has the shape \[4, 8, 8\]; flatten it first"),
        (nn.Flatten(2), r"2 \(Flatten\): must flatten all dimensions but the first"),
    ],
)
def test_project_refuses_modules_without_a_rule(module: nn.Module, message: str) -> None:
    """The error names the module, and occurs only for layers above the module."""
    last = nn.Linear(64, 2) if isinstance(module, nn.Flatten) else nn.Conv2d(4, 2, 1)
    deconvnet = Deconvnet(nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(1), module, last), image_size=8)
    assert deconvnet.project(torch.ones(1, 3, 8, 8), "0", [(0, 0, 0, 0)]).shape == (1, 3, 8, 8)
    with pytest.raises(UserError, match=message):
        deconvnet.project(torch.ones(1, 3, 8, 8), "3", [(0, 0, 0, 0)])


def test_project_leaves_in_place_modules_and_images_as_they_are() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True)).double()
    images = torch.randn(1, 3, 6, 6, dtype=torch.float64)
    before = images.clone()
    deconvnet = Deconvnet(model, "guided", image_size=6)
    deconvnet.project(images, "1", [(0, 0, 0, 0)])
    deconvnet.chain.activations(images, ["1"])
    assert torch.equal(images, before)


@pytest.mark.gpu
def test_project_on_the_gpu_equals_the_cpu() -> None:
    for variant in VARIANTS:
        model = network(variant)
        images = random_inputs(model)
        units = some_units(model, images, "conv5")
        expected = Deconvnet(model).project(images, "conv5", units)
        ours = Deconvnet(model.cuda()).project(images.cuda(), "conv5", units)
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-9, atol=1e-9)
