"""The figure of an occlusion job, in the layout of the paper's Fig. 7."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from zfnet.explain.occlusion import Occlusion
from zfnet.plots.figures import RED
from zfnet.plots.palette import class_colours
from zfnet.plots.pictures import outline_box

_TITLES = (
    "(a) Image and square",
    "(b) {layer}: activation of\nthe strongest map",
    "(c) {layer}: image and projection of that map,\nhere and where it is strongest",
    "(d) Probability of the class",
    "(e) Most probable class",
)


@dataclass(frozen=True)
class Projections:
    """What panel c shows: projections and images, uint8 [1 + M, S, S, 3], this image's first, and each one's name."""

    projections: np.ndarray
    images: np.ndarray
    words: Sequence[str]


def draw_occlusion(
    found: Occlusion,
    pictures: np.ndarray,
    names: Sequence[str],
    classes: Sequence[str],
    layer: str,
    projections: Sequence[Projections],
    boxes: Tensor | None = None,
    fill: Sequence[float] = (0.5, 0.5, 0.5),
) -> Figure:
    """One row an image, five panels each. The square stands where it hurts the class most; dashed: the known box.

    pictures: uint8 [N, S, S, 3]; fill: the square's colour, in 0 … 1; boxes: [N, 4] in input pixels.
    """
    rows, size = len(pictures), pictures.shape[1]
    figure = Figure(figsize=(18, 0.5 + 2.9 * rows), layout="constrained")
    axes = figure.subplots(rows, 5, squeeze=False, width_ratios=(1.1, 1.25, 2, 1.25, 1.4))
    edge = _edges(found, size)
    for row, panels in enumerate(axes):
        worst = np.unravel_index(int(found.probability[row].argmin()), found.probability[row].shape)
        _draw_image(panels[0], found, pictures[row], worst, fill)
        panels[0].set_ylabel(names[row], fontsize=10)
        heat = panels[1].imshow(found.activation[row].numpy(), cmap="magma", extent=edge, vmin=0)
        panels[1].set_xlabel(
            f"map {int(found.channel[row])}; whole image: {float(found.whole_activation[row]):.3g}",
            fontsize=9,
        )
        figure.colorbar(heat, ax=panels[1], shrink=0.8)
        _draw_projections(panels[2], projections[row])
        heat = panels[3].imshow(found.probability[row].numpy(), cmap="viridis", extent=edge, vmin=0, vmax=1)
        panels[3].set_xlabel(f"whole image: {float(found.whole_probability[row]):.1%}", fontsize=9)
        figure.colorbar(heat, ax=panels[3], shrink=0.8)
        _draw_labels(panels[4], found.predicted[row].numpy(), classes, edge)
        for panel in (panels[0], panels[1], panels[3], panels[4]):
            panel.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xticks=[], yticks=[])
            if boxes is not None and panel is not panels[0]:
                outline_box(panel, boxes[row], "white")
    for panel, title in zip(axes[0], _TITLES, strict=True):
        panel.set_title(title.format(layer=layer), fontsize=11, y=1.03)
    return figure


def _edges(found: Occlusion, size: int) -> tuple[float, float, float, float]:
    """Where the maps lie on the image: each cell is centred on its square."""
    stride = float(found.starts[1] - found.starts[0]) if len(found.starts) > 1 else float(size)
    low = float(found.starts[0]) + found.patch / 2 - stride / 2 - 0.5
    high = float(found.starts[-1]) + found.patch / 2 + stride / 2 - 0.5
    return low, high, high, low


def _draw_image(
    panel: Axes, found: Occlusion, picture: np.ndarray, place: tuple[np.intp, ...], fill: Sequence[float]
) -> None:
    panel.imshow(picture)
    top, left = float(found.starts[place[0]]) - 0.5, float(found.starts[place[1]]) - 0.5
    panel.add_patch(
        Rectangle((left, top), found.patch, found.patch, facecolor=tuple(fill), edgecolor="white", lw=0.8)
    )


def _draw_projections(panel: Axes, shown: Projections) -> None:
    """Tile projection and image side by side, two by two, this image's first."""
    panel.axis("off")
    for number, words in enumerate(shown.words):
        left, bottom = 0.51 * (number % 2), 0.53 * (1 - number // 2)
        tile = panel.inset_axes((left, bottom, 0.49, 0.43))
        pair = np.concatenate([shown.images[number], shown.projections[number]], axis=1)
        tile.imshow(pair)
        tile.set(xticks=[], yticks=[])
        tile.set_title(words, fontsize=8, pad=2)
        tile.spines[:].set(color=RED if number == 0 else "#d0d7de", linewidth=1.5 if number == 0 else 0.8)


def _draw_labels(
    panel: Axes, labels: np.ndarray, classes: Sequence[str], edge: tuple[float, float, float, float]
) -> None:
    """Draw a map of class numbers, with a legend of those that occur, most frequent first."""
    colours = class_colours(labels.ravel().tolist())
    numbers = {c: n for n, c in enumerate(colours)}
    drawn = np.vectorize(numbers.__getitem__)(labels)
    panel.imshow(
        drawn,
        cmap=ListedColormap(list(colours.values())),
        extent=edge,
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        interpolation="nearest",
    )
    order = sorted(colours, key=lambda c: -int((labels == c).sum()))
    panel.legend(
        handles=[Patch(color=colours[c], label=classes[c]) for c in order[:8]],
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        fontsize=8,
        handlelength=1,
    )
