"""Windows of feature maps, each at a place of its own and perhaps hanging over the edge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Signal:
    """The signals of some units at one level of the network: of each, the window of the map that it reaches.

    values: [u, C, h, w]; item: int64 [u], each unit's image; corner: int64 [u, 2], the window's first row and
    column in the map, which may lie outside. What lies outside the map is 0.
    """

    values: Tensor
    item: Tensor
    corner: Tensor

    def see(self, maps: Tensor) -> Tensor:
        """Return what `maps` [N, C, H, W] (or [N, C]) hold at the places of the windows."""
        maps = maps[:, :, None, None] if maps.ndim == 2 else maps
        return take_windows(maps, self.item, self.corner, (self.values.shape[2], self.values.shape[3]))

    def keep_inside(self, extent: tuple[int, int]) -> None:
        """Drop what lies outside a map of `extent`, and cut windows that are larger than it."""
        height, width = self.values.shape[2:]
        if height > extent[0] or width > extent[1]:
            self.values = self.cut(torch.zeros_like(self.corner), extent)
            self.corner = torch.zeros_like(self.corner)
        else:
            inside = inside_map(self.corner, (height, width), extent)
            if not bool(inside.all()):
                self.values = self.values * inside

    def cut(self, corner: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the signals within other windows, at `corner` [u, 2] and of `size`."""
        each = torch.arange(len(self.values), device=self.values.device)
        return take_windows(self.values, each, corner - self.corner, size)


def take_windows(maps: Tensor, item: Tensor, corner: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut one window out of one item for each row of `item`; what lies outside a map is 0 (or False).

    maps: [N, C, H, W]; item: int64 [U]; corner: int64 [U, 2], first row and column, perhaps outside the map;
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


def inside_map(corner: Tensor, size: tuple[int, int], extent: torch.Size | tuple[int, int]) -> Tensor:
    """Return bool [U, 1, h, w]: which cells of the windows at `corner` [U, 2] lie within a map of `extent`."""
    lines = [corner[:, axis, None] + torch.arange(size[axis], device=corner.device) for axis in (0, 1)]
    rows, columns = ((line >= 0) & (line < end) for line, end in zip(lines, extent, strict=True))
    return (rows[:, :, None] & columns[:, None, :])[:, None]
