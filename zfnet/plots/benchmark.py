"""The figure of a benchmark: speeds side by side, and where a step's time goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_PARTS = {"data": "#bc4c00", "forward": "#0969da", "backward": "#54aeff", "optimizer": "#8250df"}


def draw_benchmark(result: Mapping[str, Any]) -> Figure:
    """Bars of median images per second with a dot for each turn; below them one step, divided, if it is known."""
    rows, parts = result["contenders"], result.get("breakdown_seconds")
    figure = Figure(figsize=(8, (2.2 if parts else 1.0) + 0.45 * len(rows)), layout="constrained")
    if parts:
        upper, lower = figure.subplots(2, 1, height_ratios=[len(rows) + 0.5, 1])
        _draw_parts(lower, parts)
    else:
        upper = figure.subplots()
    for y, row in enumerate(rows):
        upper.barh(y, row["median"], color="#54aeff" if y == 0 else "#d0d7de", height=0.6)
        upper.plot(
            row["images_per_second"], [y] * len(row["images_per_second"]), ".", color="#24292f", alpha=0.6
        )
        text = f" {row['median']:.1f}" + (
            "" if y == 0 else f"  ({rows[0]['name']} ×{row['first_is_faster_by']:.2f})"
        )
        upper.text(max(row["images_per_second"]), y, text, va="center", fontsize=9)
    upper.set_yticks(range(len(rows)), [row["name"] for row in rows])
    upper.invert_yaxis()
    title = result.get("title", "Training, data included")
    upper.set(title=f"{title}: images per second (dots: turns)")
    upper.set_xlim(0, 1.35 * max(max(row["images_per_second"]) for row in rows))
    upper.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_parts(axis: Axes, parts: Mapping[str, float]) -> None:
    total, left = sum(parts.values()), 0.0
    for part, seconds in parts.items():
        axis.barh(0, seconds / total, left=left, color=_PARTS[part], label=f"{part} {seconds / total:.1%}")
        left += seconds / total
    axis.set(title=f"One step of zfnet: {1000 * total:.1f} ms", xlim=(0, 1))
    axis.set_yticks([])
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.legend(ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.35))
    axis.spines[["top", "right"]].set_visible(False)
