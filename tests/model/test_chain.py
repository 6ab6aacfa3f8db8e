"""Chains: names, ends of layers, activations; and the layers of networks that are not chains."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from tests.explain.networks import NETWORKS, chain, random_inputs
from tests.helpers import tiny_model_config
from zfnet.config.errors import UserError
from zfnet.explain import Deconvnet
from zfnet.explain.targets import grad_cam, gradient
from zfnet.model import Chain, Network, ZFNet
from zfnet.model.chain import OUTPUT


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_are_those_of_the_forward_pass(name: str) -> None:
    """Compare bit by bit with hooks on the last module of each layer; in-place modules do not change kept outputs."""
    model = chain(name)
    images = random_inputs(model)
    seen: dict[str, list[Tensor]] = {}
    for layer in model.layers:
        model.up_to(layer)[-1].module.register_forward_hook(
            lambda module, inputs, output, layer=layer: seen.setdefault(layer, []).append(output.clone())
        )
    logits = model.model(images)
    expected = dict(seen)
    outputs = model.activations(images, model.layers)
    assert list(outputs) == model.layers
    assert torch.equal(outputs[model.layers[-1]], logits)
    assert torch.equal(model.activations(images, [model.layers[-1], OUTPUT])[OUTPUT], logits)
    assert logits.shape == (2, model.num_classes)
    for layer in model.layers:
        assert any(torch.equal(outputs[layer], output) for output in expected[layer])
    for layer in reversed(model.layers):
        assert torch.equal(model.activations(images, [layer])[layer], outputs[layer])
    assert model.activations(images, []) == {}


def test_layers_of_zfnet() -> None:
    model = ZFNet(3, 64, tiny_model_config(norm="batch"))
    assert model.layers == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    assert model.chain.conv_layers == model.layers[:5]
    names = {layer: model.chain.up_to(layer)[-1].name for layer in model.layers}
    assert names == {layer: f"relu{layer[-1]}" for layer in model.layers[:-1]} | {"fc8": "fc8"}
    assert (model.chain.channels, model.chain.num_classes, model.chain.image_size) == (3, 3, 64)
    assert Chain.of(model) is Chain.of(model.chain) is model.chain


def test_layers_of_torchvision_and_of_a_users_network() -> None:
    alexnet, mixed = chain("alexnet"), chain("mixed")
    assert alexnet.conv_layers == ["features.0", "features.3", "features.6", "features.8", "features.10"]
    assert alexnet.layers[5:] == ["classifier.1", "classifier.4", "classifier.6"]
    assert alexnet.up_to("features.10")[-1].name == "features.11"
    assert mixed.layers == ["stem.0", "body.dilated", "body.even", "last", "head.0", "head.4"]
    assert [mixed.up_to(layer)[-1].name for layer in mixed.layers] == [
        "relu", "relu", "body.even", "last", "head.2", "head.4"
    ]  # fmt: skip
    assert [step.name for step in mixed.steps][-7:-4] == ["last", "the flatten after last", "head.0"]
    assert mixed.channels == 1


def test_output_is_what_the_network_returns_where_that_is_no_layers_output() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    chain, images = Chain(model, 8), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outputs = chain.activations(images, ["0", OUTPUT])
    assert outputs["0"].shape == (2, 4, 6, 6)
    assert torch.equal(outputs[OUTPUT], model(images))
    seeds = torch.ones(2)
    projections = Deconvnet(chain, "gradient").project(images, OUTPUT, [(0, 1), (1, 3)], seeds=seeds)
    images.requires_grad_()
    logits = model(images)
    (expected,) = torch.autograd.grad(logits[0, 1] + logits[1, 3], images)
    torch.testing.assert_close(projections, expected)


def test_chain_leaves_the_model_as_it_was() -> None:
    model = copy.deepcopy(chain("mixed").model).train()
    model.stem[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    Chain(model, 33)
    assert torch.equal(torch.rand(1), expected)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_chain_of_a_copy_is_the_copys() -> None:
    model = ZFNet(3, 64, tiny_model_config())
    assert model.chain.model is model
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.conv1.weight.zero_()
    assert twin.chain.model is twin
    assert twin.chain.steps[0].module is twin.conv1


def test_chain_knows_a_module_that_was_replaced() -> None:
    model = ZFNet(10, 64)
    images = torch.rand(1, 3, 64, 64)
    model.activations(images, ["fc8"])
    model.fc8 = nn.Linear(model.fc8.in_features, 3)
    model.eval()
    assert torch.equal(model.activations(images, ["fc8"])["fc8"], model(images))


@pytest.mark.parametrize(
    ("images", "kind"), [(torch.zeros(1, 3, 64, 64).byte(), r"torch\.uint8"), (np.zeros((1, 3, 64, 64)), "ndarray")]
)
def test_images_that_are_no_tensor_of_floats_are_named(images: Any, kind: str) -> None:
    with pytest.raises(UserError, match=f"^images are {kind}: the network expects a tensor of floats"):
        ZFNet(10, 64).activations(images, ["conv1"])


def test_chain_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert Chain(ZFNet(3, 64, tiny_model_config()), 64).layers[0] == "conv1"


class Functions(nn.Module):
    """A convolution, the function `between`, a linear layer, and the function `at_the_end`."""

    def __init__(self, between, at_the_end=lambda x: x) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 2, 3), nn.Linear(2 * 36, 4)
        self.between, self.at_the_end = between, at_the_end

    def forward(self, x: Tensor) -> Tensor:
        return self.at_the_end(self.fc(self.between(self.conv(x))))


@pytest.mark.parametrize(
    "flatten",
    [lambda x: torch.flatten(x, 1), lambda x: x.view(x.size(0), -1), lambda x: F.dropout(x, 0.5, False).flatten(1)],
)  # fmt: skip
def test_chain_takes_a_flatten_between_modules(flatten) -> None:
    chain = Chain(Functions(flatten), 8)
    assert [step.name for step in chain.steps] == ["conv", "the flatten after conv", "fc"]


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Functions(lambda x: F.relu(x).flatten(1)), r"the input of fc \(Linear\) is not the output of conv"),
        (Functions(lambda x: x.relu_().flatten(1)), r"the input of fc \(Linear\) is not the output of conv"),
        (Functions(lambda x: x.flatten(1).flip(1)), r"the input of fc \(Linear\) is not the output of conv"),
        (Functions(lambda x: x.flatten(1), lambda x: x.softmax(1)), "the network's output is not the output of fc"),
        (Functions(lambda x: x.flatten(1), lambda x: (x, x)), "Functions: returns a tuple"),
        (Functions(lambda x: x), r"cannot process 3×8×8 images: after conv \(Conv2d\): mat1 and mat2"),
        (nn.Sequential(nn.Conv2d(3, 2, 3), nn.MaxPool2d(2, return_indices=True)), "Sequential: returns a tuple"),
        (Twice(), r"conv \(Conv2d\): is used twice"),
        (nn.Sequential(OrderedDict({"a/b": nn.Conv2d(3, 2, 3)})), "a/b: rename this module"),
        (nn.Sequential(nn.ReLU()), "the network has no convolution or linear layer"),
    ],
)  # fmt: skip
def test_chain_refuses_networks_that_are_not_chains(model: nn.Module, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Chain(model, 8)


@pytest.mark.parametrize(
    ("model", "channels"),
    [
        (nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 3), nn.Flatten(), nn.Linear(144, 2)), 3),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(784, 2)), 1),
    ],
)
def test_channels_of_the_images_are_not_those_of_the_first_convolution_if_colour_works(model, channels: int) -> None:
    assert Chain(model, 16).channels == channels


def test_chain_refuses_branches() -> None:
    with pytest.raises(UserError, match=r"the input of layer1.0.relu \(ReLU\) is not the output of layer1.0.bn2"):
        Chain(torchvision.models.resnet18(), 32)


def test_up_to_names_the_layers() -> None:
    with pytest.raises(UserError, match=r"the network has no layer features.1; did you mean 'features\.10'"):
        chain("alexnet").up_to("features.1")
    with pytest.raises(UserError, match="Mixed: its image size is not known"):
        Chain.of(chain("mixed").model)


def test_layers_of_a_residual_network() -> None:
    network = Network(torchvision.models.resnet18(num_classes=7), 64)
    assert network.layers[:4] == ["conv1", "bn1", "relu", "maxpool"]
    assert network.layers[4:7] == ["layer1.0.conv1", "layer1.0.bn1", "layer1.0.conv2"]  # its ReLU runs twice
    assert network.layers[-4:] == ["layer4.1", "layer4", "avgpool", "fc"]
    assert (network.conv_layers[-1], network.last_hidden) == ("layer4", ["avgpool"])
    assert [step.name for step in network.up_to("conv1")] == ["conv1", "bn1", "relu"]
    assert (network.channels, network.num_classes, network.image_size) == (3, 7, 64)
    assert "relu" not in network.conv_layers  # it is in place
    assert network.outputs["relu"] == "returns its input, [N, 64, 32, 32]"
    with pytest.raises(UserError, match=r"layer2.0.conv1 is not in a chain of modules from the image: the input of"):
        network.up_to("layer2.0.conv1")
    with pytest.raises(UserError, match=r"ResNet is not a chain of layers: the input of layer1.0.relu"):
        Deconvnet(network)


def test_activations_of_a_residual_network() -> None:
    """Compare with torchvision's feature extractor, and check that in-place operations change nothing that is kept."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64)
    names = ["layer1.0.conv2", "layer3", "avgpool"]
    extractor = create_feature_extractor(model, names)
    network = Network(model, 64)
    outputs = network.activations(images, [*names, "layer1.0.bn2", "bn1", OUTPUT])
    expected = extractor(images)
    assert all(torch.equal(outputs[name], expected[name]) for name in names)
    assert torch.equal(outputs[OUTPUT], model(images))
    assert torch.equal(outputs["bn1"], model.bn1(model.conv1(images)))
    assert torch.equal(outputs["layer1.0.bn2"], model.layer1[0].bn2(outputs["layer1.0.conv2"]))
    slope = torch.autograd.grad(outputs[OUTPUT].sum(), outputs["layer1.0.bn2"])[0]
    assert (slope != 0).any()
    assert not any(module._forward_hooks for module in model.modules())
    for layer, problem in (
        ("layer5", "the network has no layer layer5; did you mean 'layer4'"),
        ("layer1.0.relu", "layer1.0.relu is not a layer: it runs 2 times"),
    ):
        with pytest.raises(UserError, match=problem):
            network.activations(images, [layer])
    with pytest.raises(UserError, match=r"images of shape \[2, 3, 32, 32\]: the network expects \[N, 3, 64, 64\]"):
        network.activations(images[:, :, ::2, ::2], ["layer4"])


class InPlace(nn.Module):
    """The first operation changes the images in place; a layer returns a tuple, one tokens, and one its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.tokens = nn.LSTM(8, 5, batch_first=True), nn.Linear(5, 6)
        self.head = nn.Sequential(nn.Conv2d(6, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(self.lstm(x.mul_(2).mean(1))[0]).mean(1)[:, :, None, None]).flatten(1)


def test_network_leaves_the_images_as_they_are() -> None:
    network, images = Network(InPlace(), 8), torch.randn(2, 3, 8, 8)
    kept = images.clone()
    logits = network.activations(images, [OUTPUT])[OUTPUT]
    assert torch.equal(images, kept)
    assert torch.equal(logits, network.model(kept.clone()))
    assert (network.layers, network.conv_layers, network.last_hidden) == (["tokens", "head.0", "head"], [], ["tokens"])


class Parts(nn.Module):
    """Modules by name, and a function of them and the images."""

    def __init__(self, forward, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


CONV = {"kernel_size": 3, "padding": 1}
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def no_gradient(m: Parts, x: Tensor) -> Tensor:
    with torch.no_grad():
        maps = m.conv(x)
    return m.fc(maps.mean((2, 3)))


def attend(m: Parts, x: Tensor) -> Tensor:
    tokens = m.patch(x).flatten(2).mT[:, None]  # [N, 1, 16, 4], as with one head
    last = m.last((m.weights(tokens @ tokens.mT) @ tokens).view(-1, 4, 4, 4))  # channels last
    return m.fc(last.mean((1, 2)))


@pytest.mark.parametrize(
    ("model", "layers", "conv_layers", "last_hidden"),
    [
        (
            Parts(attend,
                  patch=nn.Conv2d(3, 4, 2, 2), weights=nn.Softmax(-1), last=nn.Linear(4, 5), fc=nn.Linear(5, 2)),
            ["patch", "weights", "last", "fc"], ["patch"], ["last"],
        ),
        (  # the logits are a function of the last layer
            Parts(lambda m, x: m.fc(m.conv(x).mean((2, 3)).relu()) / 8, conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 2)),
            ["conv", "fc"], ["conv"], ["conv"],
        ),
        (  # one layer runs twice, and images are grey
            Parts(lambda m, x: (lambda h: m.fc((h + m.twice(m.twice(h))).mean((2, 3))))(m.conv(x)),
                  conv=nn.Conv2d(1, 4, 3), twice=nn.Conv2d(4, 4, **CONV), fc=nn.Linear(4, 2)),
            ["conv", "fc"], ["conv"], ["conv"],
        ),
    ],
)  # fmt: skip
def test_layers_of_networks(
    model: nn.Module, layers: list[str], conv_layers: list[str], last_hidden: list[str]
) -> None:
    network = Network.of(model, 8)
    assert type(network) is Network
    assert (network.layers, network.conv_layers, network.last_hidden) == (layers, conv_layers, last_hidden)
    images = IMAGES[:, : network.channels]
    outputs = network.activations(images, [*layers, OUTPUT])
    assert torch.equal(outputs[OUTPUT], model(images))
    assert all(len(output) == 2 for output in outputs.values())


@pytest.mark.parametrize(
    "model",
    [
        Parts(lambda m, x: m.fc((m.view(h := m.conv(x)) + m.relu(h)).mean((2, 3))),
              conv=nn.Conv2d(3, 4, 3), view=nn.Identity(), relu=nn.ReLU(inplace=True), fc=nn.Linear(4, 2)),
        Parts(lambda m, x: m.fc((m.view(h := m.conv(x)) * h.add_(1)).mean((2, 3))),
              conv=nn.Conv2d(3, 4, 3), view=nn.Dropout(), fc=nn.Linear(4, 2)),
    ],
)  # fmt: skip
def test_activations_do_not_change_a_network_whose_layer_returns_its_input(model: nn.Module) -> None:
    network = Network.of(model.eval(), 8)
    outputs = network.activations(IMAGES, ["conv", "view", OUTPUT])
    assert torch.equal(outputs[OUTPUT], model(IMAGES))
    assert torch.equal(outputs["conv"], model.get_submodule("conv")(IMAGES))
    assert torch.equal(outputs["view"], outputs["conv"])


def test_layers_without_a_gradient_are_named() -> None:
    network = Network.of(Parts(no_gradient, conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 2)), 8)
    with pytest.raises(UserError, match="the logits have no gradient with respect to layer conv"):
        grad_cam(network, IMAGES, torch.tensor([0, 1]), "conv")
    with pytest.raises(UserError, match="the logits have no gradient with respect to the images"):
        gradient(network, IMAGES, torch.tensor([0, 1]))
    assert network.activations(IMAGES, ["conv"])["conv"].shape == (2, 4, 6, 6)


def test_layers_that_do_not_run_or_have_no_output_for_each_image_are_named() -> None:
    def forward(m: Parts, x: Tensor) -> Tensor:
        h = m.conv(x).mean((2, 3))
        return m.fc((h if m.training else m.sometimes(h)) @ m.table(torch.arange(3))[:, :4].mT @ torch.ones(3, 4))

    parts = {"conv": nn.Conv2d(3, 4, 3), "sometimes": nn.Tanh(), "table": nn.Embedding(3, 5), "fc": nn.Linear(4, 2)}
    network = Network.of(Parts(forward, **parts).train(), 8)
    assert network.layers == ["conv", "sometimes", "table", "fc"]
    for layer in ("sometimes", "table"):
        with pytest.raises(UserError, match=f"layer {layer} does not return one output for each image"):
            network.activations(IMAGES, [layer])
    with pytest.raises(UserError, match=r"layers='conv': must be a list, as in \['conv'\]"):
        network.activations(IMAGES, "conv")
    del network.model.sometimes
    with pytest.raises(AttributeError):
        network.activations(IMAGES, ["conv", "sometimes"])
    assert not any(module._forward_hooks for module in network.model.modules())


def own_error(m: Parts, x: Tensor) -> Tensor:
    raise UserError("images are upside down")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: {"logits": m.fc(m.conv(x).mean((2, 3)))}, "Parts: returns a dict; it must return one tensor"),
        (own_error, "^images are upside down$"),
        (lambda m, x: m.fc(m.conv(x)), r"cannot process 3×8×8 images: after conv \(Conv2d\): mat1 and mat2"),
    ],
)
def test_network_names_what_it_cannot_read(function, message: str) -> None:
    model = Parts(function, conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 2))
    with pytest.raises(UserError, match=message):
        Network.of(model, 8)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_network_of_a_chain_is_the_chain_and_is_traced_once() -> None:
    runs: list[int] = []
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    model.register_forward_hook(lambda *_: runs.append(1))
    assert type(Network.of(model, 8)) is Chain
    assert len(runs) == 1
    assert Deconvnet(Network(model, 8)).chain.layers == ["0", "3"]
    branched = Parts(lambda m, x: m.fc((m.conv(x) + x).flatten(1)), conv=nn.Conv2d(3, 3, **CONV), fc=nn.Linear(192, 2))
    branched.register_forward_hook(lambda *_: runs.append(1))
    runs.clear()
    assert type(Network.of(branched, 8)) is Network
    assert len(runs) == 1


def test_parametrizations_are_no_layers() -> None:
    model = Parts(lambda m, x: m.fc((m.conv(x) * m.t).mean((2, 3))), conv=nn.Conv2d(3, 4, 3), fc=nn.Linear(4, 2))
    model.t = nn.Parameter(torch.ones(3, 4, 1, 1)[:1])
    nn.utils.parametrize.register_parametrization(model, "t", nn.Softplus())
    nn.utils.parametrizations.weight_norm(model.conv)
    assert Network.of(model, 8).layers == ["conv", "fc"]
