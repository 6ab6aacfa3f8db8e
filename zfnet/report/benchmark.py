"""The figure of a benchmark: speeds side by side, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

_PARTS = {"data": "#bc4c00", "forward": "#0969da", "backward": "#54aeff", "optimizer": "#8250df"}


def draw_benchmark(result: Mapping[str, Any]) -> Figure:
    """Bars of median images per second with a dot for each turn; below them one step, divided."""
    rows = result["contenders"]
    figure = Figure(figsize=(8, 2.2 + 0.45 * len(rows)), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=[len(rows) + 0.5, 1])
    for y, row in enumerate(rows):
        upper.barh(y, row["median"], color="#54aeff" if y == 0 else "#d0d7de", height=0.6)
        upper.plot(
            row["images_per_second"], [y] * len(row["images_per_second"]), ".", color="#24292f", alpha=0.6
        )
        text = f" {row['median']:.1f}" + ("" if y == 0 else f"  (zfnet ×{row['zfnet_is_faster_by']:.2f})")
        upper.text(max(row["images_per_second"]), y, text, va="center", fontsize=9)
    upper.set_yticks(range(len(rows)), [row["name"] for row in rows])
    upper.invert_yaxis()
    upper.set(title="Training, images per second, data included (dots: turns)")
    upper.set_xlim(0, 1.3 * max(max(row["images_per_second"]) for row in rows))
    total, left = sum(result["breakdown_seconds"].values()), 0.0
    for part, seconds in result["breakdown_seconds"].items():
        lower.barh(0, seconds / total, left=left, color=_PARTS[part], label=f"{part} {seconds / total:.1%}")
        left += seconds / total
    lower.set(title=f"One step of zfnet: {1000 * total:.1f} ms", xlim=(0, 1))
    lower.set_yticks([])
    lower.xaxis.set_major_formatter("{x:.0%}")
    lower.legend(ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
    return figure
