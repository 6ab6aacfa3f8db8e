"""Max pooling that remembers where each maximum was, and the way back (paper, section 2.1 and Fig. 1).

A switch is a set of bits, one for each cell of a pooling window. With ZFNet's 3×3 windows at stride 2 the
windows overlap, and a quarter to a third of them share a maximum with a neighbour: the way back must add
what they bring. (`nn.MaxUnpool2d` keeps one and drops the others, which puts a projection of conv5 off by 60 %.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEAD_WINDOWS = ("first", "mask", "all")


def pool_with_switches(x: Tensor, pool: nn.MaxPool2d, dead_windows: str = "first") -> tuple[Tensor, Tensor]:
    """Return (pooled, switches), both [N, C, h, w], for x [N, C, H, W] ≥ 0; switches are int16, bit dy·kernel + dx.

    dead_windows says what becomes of windows without an active cell, whose maximum is anywhere: `first` takes
    the first cell, as autograd does; `mask` gives them no switch; `all` sets the bit of each cell that equals
    the maximum, in live windows too, as cuda-convnet does.
    """
    kernel, stride, padding = side(pool.kernel_size), side(pool.stride), side(pool.padding)
    pooled, index = F.max_pool2d(x, kernel, stride, padding, ceil_mode=pool.ceil_mode, return_indices=True)
    height, width = pooled.shape[2:]
    if dead_windows == "all":
        beyond = ((height - 1) * stride + kernel, (width - 1) * stride + kernel)
        low, high = padding, [b - n - padding for b, n in zip(beyond, x.shape[2:], strict=True)]
        padded = F.pad(x, (low, max(0, high[1]), low, max(0, high[0])), value=float("-inf"))
        switches = torch.zeros_like(index, dtype=torch.int16)
        for place in range(kernel**2):
            cell = padded[_cells(place, kernel, stride, height, width)]
            switches |= (cell == pooled).to(torch.int16) << place
        return pooled, switches
    top = torch.arange(height, device=x.device, dtype=torch.int32)[:, None] * stride - padding
    left = torch.arange(width, device=x.device, dtype=torch.int32) * stride - padding
    index = index.int()  # divides in half the time
    row = index.div(x.shape[3], rounding_mode="floor")
    places = (row - top) * kernel + (index - row * x.shape[3] - left)
    switches = torch.ones_like(places, dtype=torch.int16) << places.to(torch.int16)
    if dead_windows == "mask":
        switches *= pooled > 0
    return pooled, switches


def unpool(signal: Tensor, switches: Tensor, pool: nn.MaxPool2d) -> Tensor:
    """Send each value of `signal` [N, C, h, w] to the cells that its switch names; what meets there is added.

    Returns the cells under all windows, [N, C, (h−1)·stride + kernel, (w−1)·stride + kernel]: the first window's
    first cell is at (0, 0), so with padding the map itself starts at (padding, padding).
    """
    kernel, stride = side(pool.kernel_size), side(pool.stride)
    height, width = signal.shape[2:]
    out = torch.zeros(
        (*signal.shape[:2], (height - 1) * stride + kernel, (width - 1) * stride + kernel),
        dtype=signal.dtype,
        device=signal.device,
    ).contiguous(memory_format=torch.channels_last)
    for place in range(kernel**2):
        out[_cells(place, kernel, stride, height, width)] += signal * (switches >> place & 1)
    return out


def _cells(place: int, kernel: int, stride: int, height: int, width: int) -> tuple:
    """Index, in the cells under all windows, the one at `place` of each window."""
    dy, dx = divmod(place, kernel)
    rows = slice(dy, dy + (height - 1) * stride + 1, stride)
    columns = slice(dx, dx + (width - 1) * stride + 1, stride)
    return (slice(None), slice(None), rows, columns)


def side(value: Any) -> int:
    """PyTorch keeps kernel sizes, strides and paddings as a number or as a pair; ours are square."""
    return int(value[0] if isinstance(value, tuple) else value)
