"""The windows of convolutions and poolings: their geometry, the backward pass through them, and windows cut from maps.

A pooling's switches are bits, one for each cell of a window, set where the maximum was (paper, section 2.1 and Fig. 1).
ZFNet's 3×3 windows at stride 2 overlap, and a quarter to a third of them share a maximum with a neighbour, so the
backward pass must add their signals. (`nn.MaxUnpool2d` keeps one signal and drops the others, which gives a projection
of conv5 an error of 60 %.)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

Pair = tuple[int, int]  # rows, columns

DEAD_WINDOWS = ("first", "mask", "all")
MOST_CELLS = 63  # the number of cells for which an int64 has bits
_FEW_CHANNELS = 4  # with at most this many output channels a transposed convolution is slow on a CPU


class Window(NamedTuple):
    """The geometry of a convolution's or a pooling's windows; each pair is (rows, columns).

    kernel: number of cells that a window reads; spacing: distance between these cells (dilation); stride: distance
    between windows; padding: cells before the first row and the first column
    """

    kernel: Pair
    spacing: Pair
    stride: Pair
    padding: Pair

    @property
    def extent(self) -> Pair:
        """The size of a window from its first cell to its last."""
        rows, columns = ((k - 1) * d + 1 for k, d in zip(self.kernel, self.spacing, strict=True))
        return rows, columns

    def corners(self, places: Tensor) -> Tensor:
        """Return the first row and column of the windows at `places` (y, x): int64 [U, 2] for [U, 2]."""
        # uses Python numbers, because a tensor would have to be copied to the device
        return torch.stack([places[:, axis] * self.stride[axis] - self.padding[axis] for axis in (0, 1)], 1)


def window_of(module: nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d) -> Window:
    """Return a module's window; raise ValueError for a padding_mode other than zeros."""
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    spacing = _pair(getattr(module, "dilation", 1))
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise ValueError(f"padding_mode={module.padding_mode}: only zeros are supported")
    if module.padding == "same":
        rows, columns = ((k - 1) * d // 2 for k, d in zip(kernel, spacing, strict=True))
        return Window(kernel, spacing, stride, (rows, columns))
    return Window(kernel, spacing, stride, _pair(0 if module.padding == "valid" else module.padding))


def adaptive_windows(windows: int, cells: int) -> Tensor:
    """Return bool [windows, cells]: which cells each window of an adaptive pooling covers along an axis."""
    window, cell = torch.arange(windows)[:, None], torch.arange(cells)
    # PyTorch's definition: ⌊i·cells/windows⌋ … ⌈(i + 1)·cells/windows⌉ − 1
    return (cell >= window * cells // windows) & (cell < -(-(window + 1) * cells // windows))


# -- the backward pass through windows


def pool_with_switches(x: Tensor, pool: nn.MaxPool2d, dead_windows: str = "first") -> tuple[Tensor, Tensor]:
    """Return (pooled, switches), both [N, C, h, w], for x [N, C, H, W]. Bit dy·columns + dx marks a maximum.

    dead_windows: how to treat windows without an active cell (a value above 0), where several cells can be equal:
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
    index = index.int()  # division takes half the time of int64
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
    """Add each value of `signal` [N, C, h, w] to the cells that its switch marks.

    switches: [N, C, h, w], or None to mark all cells of every window (the adjoint of a sum)
    Returns the cells under all windows, [N, C, (h−1)·stride + extent, (w−1)·stride + extent]: the first window's
    first cell is at (0, 0), so with padding the map itself starts at (padding, padding).
    """
    size = (signal.shape[2], signal.shape[3])
    out = signal.new_zeros(*signal.shape[:2], *_covered(window, size)).contiguous(memory_format=torch.channels_last)
    for place, cell in _cells(window, size):
        out[cell] += signal if switches is None else signal * (switches >> place & 1)
    return out


def _covered(window: Window, size: tuple[int, int]) -> tuple[int, int]:
    """Return how many rows and columns `size` windows cover."""
    rows, columns = ((n - 1) * s + e for n, s, e in zip(size, window.stride, window.extent, strict=True))
    return rows, columns


def _cells(window: Window, size: tuple[int, int]) -> Iterator[tuple[int, tuple]]:
    """Yield each position in a window, and the index of its cells in all windows at once."""
    for place in range(math.prod(window.kernel)):
        cell = divmod(place, window.kernel[1])
        rows, columns = (
            slice(d * spacing, d * spacing + (n - 1) * stride + 1, stride)
            for d, spacing, n, stride in zip(cell, window.spacing, size, window.stride, strict=True)
        )
        yield place, (slice(None), slice(None), rows, columns)


def transposed(signal: Tensor, weight: Tensor, window: Window, groups: int) -> Tensor:
    """Compute `F.conv_transpose2d` without padding, with the stride and the spacing of `window`.

    signal: [N, C, h, w]; weight: [C, I / groups, k, l]. Returns [N, I, (h−1)·stride + extent, …]. On a CPU that
    function is slow for few output channels, such as the three of an image. In that case `transposed` computes each
    of the stride² phases of the output as channels of an ordinary convolution with every stride-th row and column of
    the filters.
    """
    stride, kernel = window.stride[0], window.kernel
    plain = groups == 1 and window.spacing == (1, 1) and window.stride == (stride, stride)
    if weight.shape[1] > _FEW_CHANNELS or signal.device.type != "cpu" or not plain:
        signal = signal.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(signal, weight, stride=window.stride, groups=groups, dilation=window.spacing)
    # size of the filters of one phase
    rows, columns = (-(-k // stride) for k in kernel)
    filters = F.pad(weight, (0, columns * stride - kernel[1], 0, rows * stride - kernel[0]))
    phases = filters.view(*weight.shape[:2], rows, stride, columns, stride).permute(1, 3, 5, 0, 2, 4)
    phases = phases.flip(4, 5).reshape(-1, len(weight), rows, columns)
    out = F.pixel_shuffle(F.conv2d(signal, phases, padding=(rows - 1, columns - 1)), stride)
    height, width = ((n - 1) * stride + k for n, k in zip(signal.shape[2:], kernel, strict=True))
    return out[:, :, :height, :width]


# -- windows of feature maps


@dataclass
class Signal:
    """The signals of some units at one layer of the network. Each signal covers a window of the feature map.

    values: [u, C, h, w], 0 outside the map; item: int64 [u], each unit's image; corner: int64 [u, 2], the window's
    first row and column in the map, which can lie outside the map
    """

    values: Tensor
    item: Tensor
    corner: Tensor

    def gather(self, maps: Tensor) -> Tensor:
        """Return the values of `maps` [N, C, H, W] (or [N, C]) in the windows."""
        return take_windows(as_maps(maps), self.item, self.corner, (self.values.shape[2], self.values.shape[3]))

    def move_down(self, values: Tensor, window: Window, shape: torch.Size) -> None:
        """Move to the input, of `shape`, of a convolution or pooling with this window; set the signals to `values`."""
        self.values = values
        self.corner = window.corners(self.corner)
        self.keep_inside((shape[1], shape[2]))

    def keep_inside(self, extent: Pair) -> None:
        """Set values outside a map of `extent` to 0, and cut windows that are larger than the map."""
        height, width = self.values.shape[2:]
        if height > extent[0] or width > extent[1]:
            self.values = self.cut(torch.zeros_like(self.corner), extent)
            self.corner = torch.zeros_like(self.corner)
        else:
            inside = inside_map(self.corner, (height, width), extent)
            if not bool(inside.all()):
                self.values = self.values * inside

    def cut(self, corner: Tensor, size: Pair) -> Tensor:
        """Return the signals in other windows, at `corner` [u, 2] and of `size`."""
        each = torch.arange(len(self.values), device=self.values.device)
        return take_windows(self.values, each, corner - self.corner, size)


def as_maps(x: Tensor) -> Tensor:
    """Return features [N, C] as maps of one cell."""
    return x[:, :, None, None] if x.ndim == 2 else x


def take_windows(maps: Tensor, item: Tensor, corner: Tensor, size: Pair) -> Tensor:
    """Cut one window out of the maps of each image in `item`; cells outside a map are 0 (or False).

    maps: [N, C, H, W]; item: int64 [U]; corner: int64 [U, 2], first row and column, possibly outside the map;
    size: (h, w). Returns [U, C, h, w].
    """
    rows = corner[:, :1] + torch.arange(size[0], device=maps.device)
    columns = corner[:, 1:] + torch.arange(size[1], device=maps.device)
    windows = maps.permute(0, 2, 3, 1)[
        item[:, None, None],
        rows.clamp(0, maps.shape[2] - 1)[:, :, None],
        columns.clamp(0, maps.shape[3] - 1)[:, None, :],
    ].permute(0, 3, 1, 2)
    inside = inside_map(corner, size, maps.shape[2:])
    if bool(inside.all()):
        return windows
    return windows * inside.to(windows.dtype)


def inside_map(corner: Tensor, size: Pair, extent: torch.Size | Pair) -> Tensor:
    """Return bool [U, 1, h, w]: which cells of the windows at `corner` [U, 2] lie within a map of `extent`."""
    lines = [corner[:, axis, None] + torch.arange(size[axis], device=corner.device) for axis in (0, 1)]
    rows, columns = ((line >= 0) & (line < end) for line, end in zip(lines, extent, strict=True))
    return (rows[:, :, None] & columns[:, None, :])[:, None]
