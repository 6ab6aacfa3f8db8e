"""The figures of a training run: curves, confusion matrix, accuracy by class, samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from zfnet.data import ImageSet
from zfnet.training.metrics import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GREEN, RED = "#1a7f37", "#cf222e"
_COLOURS = {"train": "#0969da", "validation": "#bc4c00", "test": "#8250df"}


def new_figure(**settings: Any) -> Figure:
    """Return an empty figure. (matplotlib takes a quarter of a second to import, and training begins without it.)"""
    from matplotlib.figure import Figure

    return Figure(**settings)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG; the metadata names no program version, so that equal figures are equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})


def draw_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss, accuracy and learning rate against the epoch."""
    figure = new_figure(figsize=(12, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    for axis, kind in zip(axes, ("loss", "accuracy"), strict=False):
        for name, colour in _COLOURS.items():
            values = [row.get(f"{name}_{kind}") for row in history]
            if any(v is not None for v in values):
                axis.plot(epochs, values, ".-", color=colour, label=name)
        axis.set(title=kind.capitalize(), xlabel="epoch")
        axis.legend(frameon=False)
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    axes[2].plot(epochs, [row["lr"] for row in history], ".-", color="#57606a")
    axes[2].set(title="Learning rate (last step of the epoch)", xlabel="epoch")
    axes[2].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_confusion(found: Evaluation, classes: Sequence[str]) -> Figure:
    """The share of each true class (row) that was given each name (column)."""
    counts = found.confusion().numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    count = len(classes)
    side = min(3 + 0.55 * count, 24)
    figure = new_figure(figsize=(side, side), layout="constrained")
    axis = figure.subplots()
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set(xlabel="predicted", ylabel="true", title=f"{found.accuracy:.2%} of {counts.sum():,} images")
    ticks = range(count) if count <= 40 else range(0, count, 5)
    axis.set_xticks(
        list(ticks),
        [classes[t] for t in ticks],
        rotation=90 if count > 12 else 45,
        ha="right" if count <= 12 else "center",
    )
    axis.set_yticks(list(ticks), [classes[t] for t in ticks])
    if count <= 20:
        for row in range(count):
            for column in range(count):
                share = shares[row, column]
                if share >= 0.005:
                    axis.text(
                        column,
                        row,
                        f"{100 * share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if share > 0.5 else "black",
                    )
    return figure


def draw_per_class(found: Evaluation, classes: Sequence[str]) -> Figure:
    """Accuracy by class, with the mean as a line."""
    values = [v or 0.0 for v in found.per_class()]
    figure = new_figure(figsize=(7, min(1.2 + 0.3 * len(classes), 24)), layout="constrained")
    axis = figure.subplots()
    bars = axis.barh(range(len(classes)), values, color="#54aeff")
    if len(classes) <= 40:
        axis.bar_label(bars, [f"{v:.1%}" for v in values], padding=3, fontsize=8)
    axis.axvline(found.accuracy, color="#57606a", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(classes)), list(classes), fontsize=8 if len(classes) <= 40 else 5)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1.1), title=f"Accuracy by class (dashed: all images, {found.accuracy:.2%})")
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def draw_samples(images: ImageSet, found: Evaluation, columns: int = 8, rows: int = 8) -> Figure:
    """A grid of images with predicted (true) class above them, green where they agree, as in the blog.

    `found` is about `images`; those shown are evenly spread over the set.
    """
    count = min(rows * columns, len(images))
    index = torch.linspace(0, len(images) - 1, count).round().long()
    columns = min(columns, count)
    rows = -(-count // columns)
    side, gap = 1.0, 0.3  # of an image, and above it for its names
    figure = new_figure(figsize=(1.35 * columns, 1.35 * (side + gap) * rows))
    axis = figure.add_axes((0, 0, 1, 1))
    for number, (image, guess, truth) in enumerate(
        zip(
            images.pixels(index).numpy(),
            found.predictions[index].tolist(),
            found.labels[index].tolist(),
            strict=True,
        )
    ):
        row, column = divmod(number, columns)
        left, top = 1.08 * column * side, row * (side + gap)
        axis.imshow(image, extent=(left, left + side, top + side, top), interpolation="nearest")
        axis.text(
            left + side / 2,
            top - 0.02,
            f"{images.classes[guess]}\n({images.classes[truth]})",
            fontsize=8,
            ha="center",
            va="bottom",
            color=GREEN if guess == truth else RED,
            parse_math=False,  # a class may be called $x$
        )
    axis.set(xlim=(0, 1.08 * columns - 0.08), ylim=(rows * (side + gap) - gap, -gap))
    axis.axis("off")
    return figure
