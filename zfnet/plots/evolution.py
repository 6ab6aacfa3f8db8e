"""The figures of an evolution job: maps over epochs, as in the paper's Fig. 4, and how steady they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from zfnet.plots.palette import PALETTE
from zfnet.plots.pictures import mosaic, on_grey

_CONTRAST = 0.6  # exponent: the paper enhances the contrast artificially, too


def draw_evolution(
    pictures: Mapping[int, Mapping[str, Tensor]], maps: Mapping[str, Tensor], epochs: Sequence[int]
) -> Figure:
    """A block for each layer: a row for each map, a column for each epoch. Grey is no signal.

    pictures: epoch → layer → projections [M, 3, h, w]; maps: layer → the M maps' numbers.
    """
    count = max(len(numbers) for numbers in maps.values())
    columns = min(len(maps), 3)
    rows = -(-len(maps) // columns)
    width = max(3.2, 0.62 * len(epochs) + 0.6)
    figure = Figure(figsize=(width * columns, (0.62 * count + 0.75) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for panel in figure.axes:
        panel.axis("off")
    for panel, (layer, numbers) in zip(axes, maps.items(), strict=False):
        panel.axis("on")
        # [M, E, h, w, 3]: a map's epochs side by side
        tiles = torch.stack([on_grey(_enhance(pictures[epoch][layer])) for epoch in epochs], 1)
        side = max(48, tiles.shape[2])
        sheet = mosaic(tiles.flatten(0, 1), len(epochs), gap=max(2, side // 24), side=48)
        panel.imshow(sheet)
        step, down = sheet.shape[1] / len(epochs), sheet.shape[0] / max(1, len(numbers))
        panel.set_xticks([step * (k + 0.5) for k in range(len(epochs))], list(map(str, epochs)), fontsize=8)
        panel.set_yticks(
            [down * (k + 0.5) for k in range(len(numbers))], list(map(str, numbers.tolist())), fontsize=8
        )
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        panel.set_title(layer, fontsize=11)
        panel.set_xlabel("epoch", fontsize=8)
        panel.set_ylabel("map", fontsize=8)
    return figure


def _enhance(projections: Tensor) -> Tensor:
    return projections.sign() * projections.abs() ** _CONTRAST


def draw_steadiness(rows: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> Figure:
    """Draw against the epoch how like a layer's maps are to those before, to the last, and how many jump."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        ("epoch", "correlation_with_previous", "Correlation with the snapshot before"),
        ("previous", "correlation_of_previous_with_last", "Correlation with the last snapshot"),
        ("epoch", "strongest_image_changed", "Maps whose strongest image is a new one"),
    )
    for axis, (at, key, title) in zip(axes, panels, strict=True):
        for layer, colour in zip(layers, PALETTE, strict=False):
            own = [row for row in rows if row["layer"] == layer]
            axis.plot([r[at] for r in own], [r[key] for r in own], "o-", ms=4, color=colour, label=layer)
        lowest = min((r[key] for r in rows if r[key] < 0), default=0.0)
        axis.set(title=title, xlabel="epoch", ylim=(lowest - 0.02, 1.02))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[2].yaxis.set_major_formatter("{x:.0%}")
    axes[0].legend(frameon=False)
    return figure
