"""Receptive fields: the pixels that a unit sees, in exact integer arithmetic for every chain.

For the paper's network at 224 px the fields are 7, 27, 75, 107 and 139 px wide (conv1 … conv5).
"""

import torch
from torch import Tensor, nn

from zfnet.config.errors import UserError, did_you_mean
from zfnet.explain.windows import Window, adaptive_windows, window_of
from zfnet.model.chain import ACTIVATIONS, BATCH_NORMS, NEUTRAL, Chain, Step
from zfnet.model.layers import LocalResponseNorm

_WINDOWED = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)
_POINTWISE = (*ACTIVATIONS, *BATCH_NORMS, *NEUTRAL, LocalResponseNorm, nn.LocalResponseNorm)


def window_steps(model: nn.Module | Chain, layer: str) -> list[Step]:
    """Return the convolutions and poolings from the image up to `layer`'s output, in forward order.

    Raises UserError for a layer that is not a convolution and for a module with unknown windows.
    """
    chain = Chain.of(model)
    if layer not in chain.conv_layers:
        raise UserError(f"the network has no convolution {layer}{did_you_mean(layer, chain.conv_layers)}")
    steps = [step for step in chain.up_to(layer) if not isinstance(step.module, _POINTWISE)]
    for step in steps:
        if not isinstance(step.module, (*_WINDOWED, nn.AdaptiveAvgPool2d)):
            raise UserError(f"{step}: which pixels it sees is not known, so {layer} has no receptive field")
    return steps


def receptive_field(model: nn.Module | Chain, layer: str) -> Window:
    """Return the pixels that the units of a convolution layer can see, as the window of one large convolution.

    Near a border some of these pixels lie outside the image. Raises UserError for a layer that is not a convolution,
    and for one after an adaptive pooling with windows of different sizes.
    """
    fields = []
    for axis in (0, 1):
        size, spacing, stride, padding = 1, 1, 1, 0
        for step in reversed(window_steps(model, layer)):
            extent, every, before = _along(step, axis)
            size = (size - 1) * every + extent
            padding = padding * every + before
            stride *= every
        fields.append((size, spacing, stride, padding))
    return Window(*zip(*fields, strict=True))


def _along(step: Step, axis: int) -> tuple[int, int, int]:
    """Return a step's (extent, stride, padding) along rows or columns."""
    if isinstance(step.module, _WINDOWED):
        window = window_at(step)
        return window.extent[axis], window.stride[axis], window.padding[axis]
    cells, windows = step.input_shape[1 + axis], step.output_shape[1 + axis]
    if cells % windows:
        raise UserError(
            f"{step}: its {windows} windows over {cells} cells differ in size, and so do the receptive fields behind it"
        )
    return cells // windows, cells // windows, 0


def window_at(step: Step) -> Window:
    """Return the window of a convolution or a pooling; raise UserError for a padding_mode other than zeros."""
    assert isinstance(step.module, _WINDOWED)
    try:
        return window_of(step.module)
    except ValueError as error:
        raise UserError(f"{step}: {error}") from error


def receptive_box(model: nn.Module | Chain, layer: str, y: int, x: int) -> tuple[int, int, int, int]:
    """Return (top, left, bottom, right), ends exclusive, of the pixels that unit (y, x) of `layer` actually sees.

    The box is clipped at the borders of the image and of every layer in between, because a window sees nothing beyond
    a feature map. It is the smallest box around the pixels; with dilation the unit may not see all pixels inside it.
    """
    top, left, bottom, right = receptive_boxes(model, layer, torch.tensor([[y, x]]))[0].tolist()
    return top, left, bottom, right


def receptive_boxes(model: nn.Module | Chain, layer: str, places: Tensor) -> Tensor:
    """Return the `receptive_box` of each place (y, x) [U, 2]: int64 [U, 4].

    Raises UserError for places outside the maps, and for a layer that is not a convolution.
    """
    steps = window_steps(model, layer)
    height, width = steps[-1].output_shape[1:]
    y, x = places.unbind(1)
    outside = (y < 0) | (y >= height) | (x < 0) | (x >= width)
    if bool(outside.any()):
        raise UserError(f"{tuple(places[outside][0].tolist())}: lies outside {layer}'s {height}×{width} maps")
    ends = []
    for axis, size in enumerate((height, width)):
        reached = torch.eye(size)  # [units, cells]: which cells each row (or column) of units sees
        for step in reversed(steps):
            reached = (reached @ _cells_read(step, axis).float()).clamp(max=1)
        cells = torch.arange(1, reached.shape[1] + 1)
        # the box of a unit that sees only padding is empty
        last = (reached * cells).amax(1).long()
        first = (reached * cells.flip(0)).argmax(1).minimum(last)
        ends.append(torch.stack((first, last), 1).to(places.device)[places[:, axis]])
    return torch.stack(ends, 2).flatten(1)


def _cells_read(step: Step, axis: int) -> Tensor:
    """Return bool [windows, cells]: which cells of a step's input each window reads along an axis."""
    windows, cells = step.output_shape[1 + axis], step.input_shape[1 + axis]
    if not isinstance(step.module, _WINDOWED):
        return adaptive_windows(windows, cells)
    window = window_at(step)
    first = torch.arange(windows)[:, None] * window.stride[axis] - window.padding[axis]
    place = torch.arange(cells) - first
    return (place >= 0) & (place < window.extent[axis]) & (place % window.spacing[axis] == 0)
