"""Convert tensors to pictures: images from the network's input, projections on grey, and mosaics of both."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from zfnet.config.schema import DataConfig

GREY = 128


def to_pixels(images: Tensor, data: DataConfig) -> Tensor:
    """Undo the normalisation: [N, 3, h, w] becomes uint8 [N, h, w, 3] on the CPU."""
    std, mean = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (data.std, data.mean))
    return _to_bytes((images.detach().float() * std + mean) * 255)


def on_grey(projections: Tensor) -> Tensor:
    """Convert projections [N, 3, h, w] to uint8 [N, h, w, 3]: grey is 0, and each projection has its own scale.

    The largest thousandth of the nonzero magnitudes is clipped: a few bright pixels would leave all others grey.
    """
    flat = projections.detach().float().abs().flatten(1)
    count = ((flat > 0).sum(1, keepdim=True) // 1000).clamp(min=1)
    peak = flat.topk(max(1, flat.shape[1] // 1000)).values.gather(1, count - 1)
    peak = peak.clamp(min=torch.finfo(torch.float32).tiny)
    return _to_bytes(GREY + (255 - GREY) * projections.detach().float() / peak[:, :, None, None])


def _to_bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def mosaic(tiles: Tensor, columns: int, gap: int = 0, side: int = 0) -> np.ndarray:
    """Arrange tiles, uint8 [N, h, w, 3], in rows of `columns` with white gaps; enlarge tiles narrower than `side`."""
    tiles = enlarge(tiles, side)
    count, height, width, _ = tiles.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for number, tile in enumerate(tiles.numpy()):
        top, left = (number // columns) * (height + gap), (number % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return sheet


def enlarge(tiles: Tensor, side: int) -> Tensor:
    """Repeat the pixels of tiles [N, h, w, 3] a whole number of times until they are at least `side` wide."""
    times = max(1, -(-side // tiles.shape[2]))
    return tiles.repeat_interleave(times, 1).repeat_interleave(times, 2)


def show(axis: Axes, pixels: np.ndarray | Tensor, **settings: Any) -> AxesImage:
    """Draw an image or a map of values without ticks, grid and frame; `settings` are passed to `imshow`."""
    image = axis.imshow(np.asarray(pixels), **settings)
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return image


def show_mosaic(
    axis: Axes, tiles: Tensor, columns: Sequence[str], rows: Sequence[str] = (), gap: int = 2, side: int = 0
) -> None:
    """Draw tiles, uint8 [N, h, w, 3], row by row, with a name below each column and, if given, beside each row."""
    sheet = mosaic(tiles, len(columns), gap, side)
    show(axis, sheet)
    wide, high = (sheet.shape[1] + gap) / len(columns), (sheet.shape[0] + gap) / max(1, len(rows))
    axis.set_xticks([(k + 0.5) * wide - gap / 2 for k in range(len(columns))], columns)
    axis.set_yticks([(k + 0.5) * high - gap / 2 for k in range(len(rows))], rows)


def outline_box(axis: Axes, box: Tensor, colour: str) -> None:
    """Draw a dashed outline over a dark line around (top, left, bottom, right), in pixels of the image in `axis`."""
    top, left, bottom, right = box.tolist()
    outline = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color=colour, ls="--")
    outline.set_path_effects([withStroke(linewidth=2.5, foreground="black")])
    axis.add_patch(outline)
