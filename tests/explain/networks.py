"""Small float64 networks (variants of ZFNet, torchvision's, and a custom one), with images and units for them."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

from zfnet.config.schema import Conv, Linear, ModelConfig
from zfnet.model import Chain, ZFNet
from zfnet.model.layers import Dropout


def config(**changes) -> ModelConfig:
    """Return a config with ZFNet's kernels, strides and poolings, but only a few maps per layer."""
    settings = {
        "conv1": Conv(5, 7, 2, 1, True),
        "conv2": Conv(6, 5, 2, 0, True),
        "conv3": Conv(7, 3, 1, 1, False),
        "conv4": Conv(6, 3, 1, 1, False),
        "conv5": Conv(5, 3, 1, 1, True),
        "fc6": Linear(9),
        "fc7": Linear(8),
    }
    return ModelConfig(**{**settings, **changes})


VARIANTS: dict[str, tuple[ModelConfig, int]] = {
    "pad": (config(), 64),
    "ceil": (config(pooling="ceil"), 67),
    "lrn": (config(norm="lrn", pooling="ceil"), 65),
    "batch": (config(norm="batch"), 71),
    "no_layers": (config(conv3=None, conv4=None, fc6=None, fc7=None), 66),
    "alexnet_stem": (config(conv1=Conv(5, 11, 4, 2, True), conv2=Conv(6, 5, 1, 2, True)), 73),
    "no_pool": (config(conv1=Conv(5, 3, 1, 1, False), conv2=Conv(6, 4, 3, 3, True)), 32),
}


class Mixed(nn.Module):
    """All modules that a chain can contain and ZFNet does not, nested, with one ReLU module for all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.stem = nn.Sequential(
            nn.Conv2d(1, 6, (5, 3), stride=(2, 1), padding=(1, 2), bias=False),
            nn.BatchNorm2d(6),
            self.relu,
            nn.Sequential(nn.MaxPool2d((2, 3), (2, 2), ceil_mode=True), nn.LocalResponseNorm(3, 0.1)),
        )
        self.body = nn.ModuleDict(
            {
                "dilated": nn.Conv2d(6, 8, 3, dilation=2, groups=2, padding="same"),
                "norm": nn.BatchNorm2d(8, affine=False),
                "rest": nn.Identity(),
                "drop": nn.Dropout2d(0.5, inplace=True),
                "pool": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
                "even": nn.Conv2d(8, 6, (1, 4), padding="same", padding_mode="zeros"),
            }
        )
        self.mean = nn.AdaptiveAvgPool2d((3, 2))
        self.last = nn.Conv2d(6, 7, 2)
        self.head = nn.Sequential(nn.Linear(14, 9), nn.BatchNorm1d(9), nn.ReLU(), Dropout(0.5), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name, module in self.body.items():
            x = module(x)
            if name == "norm":
                x = self.relu(x)
        x = self.last(self.mean(x))
        return self.head(x.view(len(x), -1))


# name: (constructor, side of the images in pixels)
OTHERS = {"alexnet": (torchvision.models.alexnet, 64), "vgg11": (torchvision.models.vgg11, 32), "mixed": (Mixed, 33)}
NETWORKS = (*VARIANTS, *OTHERS)


def network(name: str = "pad", seed: int = 0) -> ZFNet:
    """Return a random ZFNet in evaluation mode, with random biases and, for `batch`, random running statistics."""
    settings, size = VARIANTS[name]
    torch.manual_seed(seed)
    return _randomize(ZFNet(4, size, settings))


def chain(name: str, seed: int = 0) -> Chain:
    """Return the chain of a network. To save time, torchvision's networks get an eighth of their maps, few features."""
    if name in VARIANTS:
        return network(name, seed).chain
    build, size = OTHERS[name]
    torch.manual_seed(seed)
    if build is Mixed:
        return Chain(_randomize(Mixed()), size)
    with torch.device("meta"):
        model = build()
        maps, cells = 3, model.avgpool.output_size[0] ** 2
        for n, conv in enumerate(model.features):
            if isinstance(conv, nn.Conv2d):
                narrow = conv.out_channels // 8
                model.features[n] = nn.Conv2d(maps, narrow, conv.kernel_size, conv.stride, conv.padding)
                maps = narrow
        linear = [n for n, module in enumerate(model.classifier) if isinstance(module, nn.Linear)]
        features = maps * cells
        for n, width in zip(linear, (9, 8, 4), strict=True):
            model.classifier[n], features = nn.Linear(features, width), width
    return Chain(_randomize(model.to_empty(device="cpu")), size)


def _randomize(model):
    model.double().eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, -0.05, 0.1)
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            if module.affine:
                nn.init.normal_(module.weight, 1, 0.5)
                nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def random_inputs(model: ZFNet | Chain, count: int = 2, seed: int = 1) -> Tensor:
    channels = model.channels if isinstance(model, Chain) else 3
    return torch.randn(
        count, channels, model.image_size, model.image_size, generator=torch.Generator().manual_seed(seed)
    ).double()


def some_units(model: ZFNet | Chain, images: Tensor, layer: str) -> list[tuple[int, ...]]:
    """Return units at corners, a border and the middle, of alternating images."""
    shape, count = model.activations(images, [layer])[layer].shape, len(images)
    if len(shape) == 2:
        return [(k % count, f) for k, f in enumerate(range(0, shape[1], 2))]
    bottom, right = shape[2] - 1, shape[3] - 1
    places = [(bottom // 2, right // 2), (0, 0), (bottom, right), (0, right), (bottom // 2, right)]
    return [(k % count, (3 * k + k % count) % shape[1], y, x) for k, (y, x) in enumerate(places)]


def strongest_units(model: ZFNet | Chain, images: Tensor, layer: str) -> list[tuple[int, ...]]:
    """Return the strongest unit of each map over all images: (image, channel, y, x) or (image, feature)."""
    activations = model.activations(images, [layer])[layer]
    units = []
    for channel in range(activations.shape[1]):
        values = activations[:, channel]
        n, *place = (int(i) for i in torch.unravel_index(values.argmax(), values.shape))
        if values.max() > 0:
            units.append((n, channel, *place))
    return units
