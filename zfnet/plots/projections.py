"""Figures of projections: the paper's Fig. 2, and how projections fare against their controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from zfnet.explain.controls import CONTROLS
from zfnet.plots.pictures import mosaic

_CONTROL_COLOURS = {"random_weights": "#0969da", "other_switches": "#bc4c00", "other_unit": "#8250df"}


def draw_projections(
    title: str, maps: Sequence[int], projections: Sequence[Tensor], patches: Sequence[Tensor]
) -> Figure:
    """The paper's Fig. 2 for one layer: on the left the maps' projections, on the right the patches they come from.

    maps: numbers of the feature maps; projections, patches: of each map uint8 [top, h, w, 3], in one order
    """
    columns = math.ceil(math.sqrt(len(maps)))
    rows = -(-len(maps) // columns)
    figure = Figure(figsize=(4.0 * columns + 0.4, 2.2 * rows + 0.55), layout="constrained")
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(1, 2)
    sides = {"projections (grey: no signal)": projections, "image patches": patches}
    for axis, (name, tiles) in zip(axes, sides.items(), strict=True):
        blocks = [mosaic(block, math.ceil(math.sqrt(len(block))), gap=3, side=96) for block in tiles]
        height, width = (side + side // 9 for side in blocks[0].shape[:2])  # with room for its number
        sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
        for place, (number, block) in enumerate(zip(maps, blocks, strict=True)):
            top, left = height * (place // columns) + height - block.shape[0], width * (place % columns)
            sheet[top : top + block.shape[0], left : left + block.shape[1]] = block
            axis.text(
                left + block.shape[1] / 2,
                top - height / 75,
                f"map {number}",
                ha="center",
                va="bottom",
                fontsize=8,
            )
        axis.imshow(sheet, interpolation="antialiased")
        axis.set_title(name, fontsize=11, color="#57606a")
        axis.axis("off")
    return figure


def draw_controls(similarity: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Rank correlation of projections with those of each control, by layer: mean and standard deviation."""
    layers = list(similarity)
    figure = Figure(figsize=(max(6.0, 1.7 * len(layers) + 1.5), 3.8), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(CONTROLS)
    for place, (name, meaning) in enumerate(CONTROLS.items()):
        rows = [similarity[layer].get(name, {}) for layer in layers]
        drawn = [k for k, row in enumerate(rows) if row.get("rank_correlation") is not None]
        axis.bar(
            [k + (place - (len(CONTROLS) - 1) / 2) * width for k in drawn],
            [rows[k]["rank_correlation"] for k in drawn],
            width * 0.92,
            yerr=[rows[k]["rank_correlation_std"] for k in drawn],
            color=_CONTROL_COLOURS[name],
            ecolor="#57606a",
            error_kw={"linewidth": 1},
            capsize=2,
            label=meaning,
        )
    axis.axhline(0, color="#57606a", linewidth=0.8)
    axis.axhline(1, color="#57606a", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(layers)), layers)
    axis.set(
        ylabel="rank correlation",
        title="How like the true projections the controls are (1: the same; then they show the image, not the unit)",
    )
    axis.title.set_fontsize(10)
    axis.set_ylim(min(-0.3, axis.get_ylim()[0]), 1.15)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=3)
    return figure
