"""Boxes (top, left, bottom, right) in images: the pixels inside them, and their division into cells."""

import torch
from torch import Tensor

from zfnet.config.schema import DataConfig
from zfnet.data import ImageSet


def boxes_in_input(boxes: Tensor, images: ImageSet, data: DataConfig) -> Tensor:
    """Convert boxes [N, 4] from stored pixels to pixels of the network's input: float [N, 4]."""
    stored = images.images.shape[1]
    window = data.crop_size or stored
    moved = (boxes.float() - (stored - window) // 2) * (data.image_size / window)
    return moved.clamp(0, data.image_size)


def in_boxes(centres: Tensor, boxes: Tensor) -> Tensor:
    """Return which points of the grid `centres` [P] × `centres` lie in each box [N, 4]: bool [N, P, P]."""
    top, left, bottom, right = (boxes[:, k, None] for k in range(4))
    rows, columns = (centres >= top) & (centres < bottom), (centres >= left) & (centres < right)
    return rows[:, :, None] & columns[:, None, :]


def cover(images: Tensor, corners: Tensor, patch: int, fill: Tensor) -> Tensor:
    """Return images [N, 3, S, S], each with a square of side `patch` in the colour `fill`, [3].

    corners: (row, column) of each square's first pixel, [N, 2]; squares can extend beyond the images
    """
    hidden = in_boxes(torch.arange(images.shape[-1], device=images.device), torch.cat((corners, corners + patch), 1))
    return torch.where(hidden[:, None], fill.to(images).view(1, 3, 1, 1), images)


def share_in_boxes(maps: Tensor, boxes: Tensor) -> Tensor:
    """Return the share of the absolute attributions, |maps| [N, C, S, S], inside each box [M, 4]: float64 [N, M].

    NaN where all attributions of an image are 0.
    boxes: (top, left, bottom, right) in pixels; a pixel counts if its centre is inside.
    """
    size = maps.abs().sum(1).flatten(1).double()
    inside = in_boxes(torch.arange(maps.shape[-1]) + 0.5, boxes).flatten(1).double()
    return size @ inside.T / size.sum(1, keepdim=True)


def box_cells(boxes: Tensor, extent: tuple[int, int], side: int) -> Tensor:
    """Return the cell of each pixel, int64 [U, h, w]: a box [U, 4] has side² cells, and −1 means outside the box."""
    top, left, bottom, right = (boxes[:, k, None] for k in range(4))
    lines = []
    for first, end, size in ((top, bottom, extent[0]), (left, right, extent[1])):
        place = torch.arange(size) - first
        inside = (place >= 0) & (place < end - first)
        lines.append(torch.where(inside, place * side // (end - first).clamp(min=1), -1))
    rows, columns = lines[0][:, :, None], lines[1][:, None, :]
    return torch.where((rows >= 0) & (columns >= 0), rows * side + columns, -1)


def cell_means(values: Tensor, cells: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the mean of values [U, C, h, w] in each cell, [U, C, count], 0 if empty, and which cells have pixels."""
    index = torch.where(cells < 0, count, cells).flatten(1)
    sums = values.new_zeros(*values.shape[:2], count + 1)
    sums.scatter_add_(2, index[:, None].expand(-1, values.shape[1], -1), values.flatten(2))
    pixels = values.new_zeros(len(values), count + 1).scatter_add_(1, index, values.new_ones(index.shape))[:, :count]
    return sums[..., :count] / pixels[:, None].clamp(min=1), pixels > 0
