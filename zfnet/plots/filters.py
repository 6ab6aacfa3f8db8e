"""The figure of a filters job: one run or two side by side, after the paper's Fig. 6, with what was measured below."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from zfnet.explain.filters import Filters
from zfnet.plots.figures import RED
from zfnet.plots.palette import INK, PALETTE
from zfnet.plots.pictures import enlarge, mosaic

_SIDE, _GAP = 44, 4  # of a drawn filter and between two, in pixels of the sheet


def draw_filters(found: Mapping[str, Filters], limit: float) -> Figure:
    """Filters of each run on one common scale (grey is 0), strongest first; red frames: dead. Measures below."""
    columns = 12 if len(found) > 1 else 24
    rows = max(-(-len(filters.rms) // columns) for filters in found.values())
    tall = 0.9 + 13 / len(found) * rows / columns
    figure = Figure(figsize=(13, tall + 3.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(tall, 3.6))  # type: ignore[misc]
    sheets = upper.subplots(1, len(found), squeeze=False)[0]
    for panel, (name, filters) in zip(sheets, found.items(), strict=True):
        _draw_sheet(panel, filters, columns)
        size = filters.weight.shape[-1]
        panel.set_title(
            f"{name}\n{len(filters.rms)} filters {size}×{size}, stride {filters.stride}", fontsize=11
        )
    axes = lower.subplots(1, 3)
    everything = torch.cat([filters.rms for filters in found.values()]).clamp(min=1e-6)
    low, high = min(float(everything.min()), limit) / 1.3, max(float(everything.max()), limit) * 1.3
    wide = high > 10 * low
    bins = np.geomspace(low, high, 25) if wide else np.linspace(low, high, 25)
    for colour, (name, filters) in zip(PALETTE, found.items(), strict=False):
        style = {"color": colour, "alpha": 0.55, "label": name}
        axes[0].hist(filters.rms.clamp(min=1e-6).numpy(), bins, **style)
        axes[2].hist(filters.aliasing.numpy(), np.linspace(0, 1, 26), **style)
        centres = filters.frequencies - filters.frequencies[0] / 2
        middle, spread = (
            filters.spectrum.mean(0),
            filters.spectrum.quantile(torch.tensor([0.25, 0.75]).double(), 0),
        )
        axes[1].plot(centres.numpy(), middle.numpy(), ".-", color=colour, label=name)
        axes[1].fill_between(centres.numpy(), *spread.numpy(), color=colour, alpha=0.15, lw=0)
        axes[1].axvline(0.5 / filters.stride, color=colour, ls="--", lw=1)
    axes[0].axvline(limit, color=INK, ls="--", lw=1)
    axes[0].set(title=f"RMS of a filter (dashed: the paper's limit, {limit:g})", ylabel="filters")
    if wide:
        axes[0].set_xscale("log")
    axes[1].set(
        title="Power by frequency (dashed: the stride's Nyquist)",
        xlabel="cycles per pixel",
        ylabel="density (white noise: 1)",
        xlim=(0, 0.7),
        ylim=(0, None),
    )
    axes[2].set(title="Energy beyond the stride's Nyquist frequency", xlim=(0, 1), ylabel="filters")
    axes[2].xaxis.set_major_formatter("{x:.0%}")
    for axis in axes:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].legend(frameon=False, fontsize=9)
    return figure


def _draw_sheet(panel: Axes, filters: Filters, columns: int) -> None:
    order = filters.rms.argsort(descending=True, stable=True)
    weight = filters.weight[order]
    scale = weight.abs().amax().clamp(min=1e-12)  # one for all, so that a filter that dominates is seen to
    tiles = (127.5 * (1 + weight / scale)).round().to(torch.uint8).permute(0, 2, 3, 1)
    tiles = enlarge(tiles, _SIDE)
    side = tiles.shape[1]
    panel.imshow(mosaic(tiles, columns, _GAP))
    for place in filters.silent[order].nonzero().flatten().tolist():
        left, top = (place % columns) * (side + _GAP) - 2, (place // columns) * (side + _GAP) - 2
        panel.add_patch(Rectangle((left, top), side + 3, side + 3, fill=False, color=RED, lw=2))
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    panel.set_xlabel(f"{int(filters.silent.sum())} dead, {int(filters.flat.sum())} flat", fontsize=10)
