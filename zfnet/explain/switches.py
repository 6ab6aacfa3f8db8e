"""Max pooling that remembers where each maximum was, and the way back (paper, section 2.1 and Fig. 1).

A switch is a set of bits, one for each cell of a pooling window. With ZFNet's 3×3 windows at stride 2 the
windows overlap, and a quarter to a third of them share a maximum with a neighbour: the way back must add
what they bring. (`nn.MaxUnpool2d` keeps one and drops the others, which puts a projection of conv5 off by 60 %.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.explain.receptive_field import Window, window_of

DEAD_WINDOWS = ("first", "mask", "all")
MOST_CELLS = 63  # that an int64 has bits for


def pool_with_switches(x: Tensor, pool: nn.MaxPool2d, dead_windows: str = "first") -> tuple[Tensor, Tensor]:
    """Return (pooled, switches), both [N, C, h, w], for x [N, C, H, W]; switches are integers, bit dy·columns + dx.

    dead_windows: what becomes of windows without an active cell (none above 0), whose maximum may be anywhere:
        `first` takes the first of equal cells, as autograd does; `mask` gives them no switch; `all` sets the bit of
        each cell that equals the maximum, in live windows too, as cuda-convnet does
    """
    window = window_of(pool)
    pooled, index = F.max_pool2d(
        x, window.kernel, window.stride, window.padding, window.spacing, pool.ceil_mode, return_indices=True
    )
    size = (pooled.shape[2], pooled.shape[3])
    cells = math.prod(window.kernel)
    dtype = next(d for d in (torch.int16, torch.int32, torch.int64) if cells < torch.iinfo(d).bits)
    if dead_windows == "all":
        high = [max(0, n - m - p) for n, m, p in zip(_covered(window, size), x.shape[2:], window.padding, strict=True)]
        padded = F.pad(x, (window.padding[1], high[1], window.padding[0], high[0]), value=float("-inf"))
        switches = torch.zeros_like(index, dtype=dtype)
        for place, cell in _cells(window, size):
            switches |= (padded[cell] == pooled).to(dtype) << place
        return pooled, switches
    top, left = (
        torch.arange(n, device=x.device, dtype=torch.int32) * stride - padding
        for n, stride, padding in zip(size, window.stride, window.padding, strict=True)
    )
    index = index.int()  # divides in half the time
    row = index.div(x.shape[3], rounding_mode="floor")
    down, right = row - top[:, None], index - row * x.shape[3] - left
    if window.spacing != (1, 1):
        down, right = down // window.spacing[0], right // window.spacing[1]
    places = down * window.kernel[1] + right
    switches = torch.ones_like(places, dtype=dtype) << places.to(dtype)
    if dead_windows == "mask":
        switches *= pooled > 0
    return pooled, switches


def unpool(signal: Tensor, switches: Tensor | None, window: Window) -> Tensor:
    """Send each value of `signal` [N, C, h, w] to the cells that its switch names; what meets there is added.

    switches: [N, C, h, w], or None for all cells of every window, which is the way back from a sum
    Returns the cells under all windows, [N, C, (h−1)·stride + extent, (w−1)·stride + extent]: the first window's
    first cell is at (0, 0), so with padding the map itself starts at (padding, padding).
    """
    size = (signal.shape[2], signal.shape[3])
    out = torch.zeros(
        (*signal.shape[:2], *_covered(window, size)), dtype=signal.dtype, device=signal.device
    ).contiguous(memory_format=torch.channels_last)
    for place, cell in _cells(window, size):
        out[cell] += signal if switches is None else signal * (switches >> place & 1)
    return out


def _covered(window: Window, size: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and the columns under `size` windows."""
    rows, columns = ((n - 1) * s + e for n, s, e in zip(size, window.stride, window.extent, strict=True))
    return rows, columns


def _cells(window: Window, size: tuple[int, int]) -> Iterator[tuple[int, tuple]]:
    """Yield each place of a window, and the index of that cell of each window in the cells under all windows."""
    for place in range(math.prod(window.kernel)):
        rows, columns = (
            slice(d * spacing, d * spacing + (n - 1) * stride + 1, stride)
            for d, spacing, n, stride in zip(
                divmod(place, window.kernel[1]), window.spacing, size, window.stride, strict=True
            )
        )
        yield place, (slice(None), slice(None), rows, columns)
