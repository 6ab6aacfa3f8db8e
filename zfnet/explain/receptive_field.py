"""Which pixels a unit sees: exact integer arithmetic for every variant.

For the paper's network at 224 px the fields are 7, 27, 75, 107 and 139 px wide (conv1 … conv5).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zfnet.config.errors import UserError, did_you_mean
from zfnet.explain.switches import side
from zfnet.model.sizes import CONV_LAYERS
from zfnet.model.zfnet import ZFNet


@dataclass(frozen=True)
class Step:
    """A module that looks through windows: how wide they are, how far apart, and where the first one starts."""

    name: str
    kernel: int
    stride: int
    padding: int


@dataclass(frozen=True)
class ReceptiveField:
    """The pixels that a unit at (y, x) of a layer may see: rows y·stride + offset … + size − 1; columns alike.

    Near a border some of them lie outside the image.
    """

    size: int
    stride: int
    offset: int

    def corner(self, y: int, x: int) -> tuple[int, int]:
        """Return the first row and the first column, which may be negative."""
        return y * self.stride + self.offset, x * self.stride + self.offset


def window_steps(model: ZFNet, layer: str) -> list[Step]:
    """Return the convolutions and poolings from the image up to `layer`'s output, in forward order."""
    if layer not in model.layers or layer not in CONV_LAYERS:
        known = [name for name in model.layers if name in CONV_LAYERS]
        raise UserError(f"{layer}: no such convolution layer{did_you_mean(layer, known)}")
    steps = []
    for name in model.steps:
        module = getattr(model, name)
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            steps.append(Step(name, side(module.kernel_size), side(module.stride), side(module.padding)))
        if name == layer:
            return steps
    raise AssertionError(layer)


def receptive_field(model: ZFNet, layer: str) -> ReceptiveField:
    """Return the receptive field of a convolution layer's units; raise UserError for another layer."""
    size, stride, offset = 1, 1, 0
    for step in reversed(window_steps(model, layer)):
        size = (size - 1) * step.stride + step.kernel
        offset = offset * step.stride - step.padding
        stride *= step.stride
    return ReceptiveField(size, stride, offset)


def receptive_box(model: ZFNet, layer: str, y: int, x: int) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right), ends exclusive, of the pixels that unit (y, x) of `layer` really sees.

    The box is clipped at the image and at the borders of every layer between: a window that hangs over the
    edge of a feature map sees nothing there.
    """
    top, left, bottom, right = receptive_boxes(model, layer, torch.tensor([[y, x]]))[0].tolist()
    return top, left, bottom, right


def receptive_boxes(model: ZFNet, layer: str, places: Tensor) -> Tensor:
    """Return `receptive_box` of many units: int64 [U, 4] for places (y, x) [U, 2]; raise UserError."""
    steps = window_steps(model, layer)
    sizes = [model.image_size]  # the side of each step's input, then of the last output
    for step in steps:
        sizes.append(_output_size(model, step, sizes[-1]))
    outside = ((places < 0) | (places >= sizes[-1])).any(1)
    if bool(outside.any()):
        y, x = places[outside][0].tolist()
        raise UserError(f"({y}, {x}): lies outside {layer}'s {sizes[-1]}×{sizes[-1]} maps")
    first, last = places, places  # inclusive on the way down
    for step, size in zip(reversed(steps), reversed(sizes[:-1]), strict=True):
        first = (first * step.stride - step.padding).clamp(min=0)
        last = (last * step.stride - step.padding + step.kernel - 1).clamp(max=size - 1)
    return torch.cat((first, last + 1), 1)


def _output_size(model: ZFNet, step: Step, size: int) -> int:
    module = getattr(model, step.name)
    if isinstance(module, nn.MaxPool2d):  # asked of the module itself, since ceil_mode has rules of its own
        return module(torch.empty(1, 1, size, size, device="meta")).shape[-1]
    return (size + 2 * step.padding - step.kernel) // step.stride + 1
