"""Tiny float64 networks of every variant, images, and units, for the tests of explanations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zfnet.config.schema import Conv, Linear, ModelConfig
from zfnet.model.zfnet import ZFNet


def config(**changes) -> ModelConfig:
    """ZFNet's kernels, strides and poolings with a handful of maps."""
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


def network(variant: str = "pad", seed: int = 0) -> ZFNet:
    """Return a random network in evaluation mode, with biases and, for `batch`, statistics of its own."""
    settings, size = VARIANTS[variant]
    torch.manual_seed(seed)
    model = ZFNet(4, size, settings).double().eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, -0.05, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def pictures(model: ZFNet, count: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(
        count, 3, model.image_size, model.image_size, generator=torch.Generator().manual_seed(seed)
    ).double()


def some_units(model: ZFNet, images: Tensor, layer: str) -> list[tuple[int, ...]]:
    """Return units at corners, borders and the middle, in every image and in no special order."""
    shape = model.activations(images, [layer])[layer].shape
    if len(shape) == 2:
        return [(n, f) for f in range(0, shape[1], 2) for n in range(len(images))]
    last = shape[2] - 1
    places = [(last // 2, last // 2), (0, 0), (last, last), (0, last), (last // 2, last)]
    return [(n, (3 * k + n) % shape[1], y, x) for k, (y, x) in enumerate(places) for n in range(len(images))]


def alive(model: ZFNet, images: Tensor, layer: str) -> list[tuple[int, int, int, int]]:
    """Return the strongest unit of each map over all images."""
    found = model.activations(images, [layer])[layer]
    units = []
    for channel in range(found.shape[1]):
        n, y, x = torch.unravel_index(found[:, channel].argmax(), found[:, channel].shape)
        if found[n, channel, y, x] > 0:
            units.append((int(n), channel, int(y), int(x)))
    return units
