"""The figure of an invariance job, in the layout of the paper's Fig. 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from zfnet.explain.invariance import Curves
from zfnet.plots.palette import INK, PALETTE
from zfnet.plots.pictures import mosaic

_UNITS = {
    "vertical translation": "pixels down",
    "horizontal translation": "pixels right",
    "scale": "factor",
    "rotation": "degrees",
}


def draw_invariance(
    own: Mapping[str, Curves],
    mean: Mapping[str, Curves],
    units: Mapping[str, float],
    examples: Mapping[str, Tensor],
    names: Sequence[str],
) -> Figure:
    """A row for each transform: images, distances in each layer, probability of the class.

    Thin lines are the images of `own`; the black line is the mean over those of `mean`, its band holds the
    middle half of them. units: layer → the distance that is drawn as 1. examples: transform → uint8
    [3 · N, S, S, 3], each image of `own` at three amounts.
    """
    layers = list(units)
    columns = len(layers) + 2
    figure = Figure(figsize=(3.2 + 3.6 * (columns - 1), 0.7 + 2.75 * len(own)), layout="constrained")
    axes = figure.subplots(len(own), columns, squeeze=False, width_ratios=[0.8] + [1] * (columns - 1))
    for panels, (transform, curves) in zip(axes, own.items(), strict=True):
        _draw_examples(panels[0], transform, curves, examples[transform], len(names))
        for panel, layer in zip(panels[1:], layers, strict=False):
            for n, line in enumerate(curves.distances[layer] / units[layer]):
                panel.plot(curves.amounts, line, color=PALETTE[n % len(PALETTE)], lw=1.2)
            _draw_mean(panel, curves.amounts, mean[transform].distances[layer] / units[layer])
            panel.set(ylabel=f"distance in {layer}", ylim=(0, None))
        for n, line in enumerate(curves.probability):
            panels[-1].plot(curves.amounts, line, color=PALETTE[n % len(PALETTE)], lw=1.2, label=names[n])
        _draw_mean(panels[-1], curves.amounts, mean[transform].probability)
        panels[-1].set(ylabel="probability of the class", ylim=(0, 1.02))
        for panel in panels[1:]:
            panel.set_xlabel(_UNITS[transform])
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0)
    count = len(next(iter(mean.values())).probability)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    labels = [f"mean of {count} images, middle half" if label == "mean" else label for label in labels]
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    return figure


def _draw_examples(panel: Axes, transform: str, curves: Curves, pictures: Tensor, count: int) -> None:
    """One row an image, at the first, the middle and the last amount; its curve's colour beside it."""
    size = pictures.shape[1]
    gap = max(2, size // 16)
    panel.imshow(mosaic(pictures, 3, gap))
    middles = [n * (size + gap) + size / 2 for n in range(count)]
    for n, middle in enumerate(middles):
        panel.plot([-2 * gap], [middle], "s", color=PALETTE[n % len(PALETTE)], ms=5, clip_on=False)
    panel.set_xlim(-3 * gap, 3 * (size + gap))
    amounts = curves.amounts.numpy()
    ticks = [
        f"{amounts[k]:.0f}" if "translation" in transform else f"{amounts[k]:.3g}"
        for k in (0, len(amounts) // 2, -1)
    ]
    panel.set_xticks([k * (size + gap) + size / 2 for k in range(3)], ticks, fontsize=8)
    panel.set(yticks=[], title=transform.capitalize())
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)


def _draw_mean(panel: Axes, amounts: Tensor, values: Tensor) -> None:
    """Draw the mean over images of [N, A] and the band between their quartiles."""
    low, high = np.quantile(values.numpy(), [0.25, 0.75], axis=0)
    panel.fill_between(amounts.numpy(), low, high, color=INK, alpha=0.12, lw=0)
    panel.plot(amounts.numpy(), values.mean(0).numpy(), color=INK, lw=2, label="mean")
