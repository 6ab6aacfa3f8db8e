"""The results of a training or an evaluation: figures, numbers for results.json, and log lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from zfnet.config.errors import log
from zfnet.data import ImageSet
from zfnet.plots.figures import (
    GREEN,
    INK,
    LIGHT_BLUE,
    RED,
    SOFT,
    SPLIT_COLOURS,
    WHITE,
    Figure,
    epoch_axis,
    new_figure,
    plain,
    save_figure,
    styled,
)
from zfnet.runs.directory import RunDirectory
from zfnet.runs.tables import cut, shorten
from zfnet.training.metrics import Evaluation

_MAX_NUMBERED_CLASSES = 40  # up to this many classes, a figure shows each class's number
_MAX_AXIS_NAMES = 100  # most class names along an axis
_MAX_LOGGED, _EXTREMES = 20, 5  # classes in the log; if there are more, only the 5 best and the 5 worst


def results_of(evaluation: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """Return one split's entry of results.json."""
    return {
        "accuracy": evaluation.accuracy,
        "top5": evaluation.top5,
        "loss": evaluation.loss,
        "mean_class_accuracy": evaluation.mean_class_accuracy(),
        "images": len(evaluation.labels),
        "per_class": dict(zip(classes, evaluation.per_class(), strict=True)),
        "confusion": evaluation.confusion().tolist(),
    }


def log_result(name: str, result: Mapping[str, Any]) -> None:
    """Log one line for a split's entry of results.json."""
    top5 = "" if result["top5"] is None else f"top-5 {result['top5']:.2%}, "
    accuracy, loss, images = result["accuracy"], result["loss"], result["images"]
    log.info(f"{name:<10} accuracy {accuracy:.2%}, {top5}loss {loss:.4f} ({images:,} images)")


def log_per_class(result: Mapping[str, Any]) -> None:
    """Log one line for each class; if there are many, log the best and the worst of those that have images."""
    classes = result["per_class"]
    shown = {name: value for name, value in classes.items() if value is not None or len(classes) <= _MAX_LOGGED}
    absent = len(classes) - len(shown)
    if len(shown) > _MAX_LOGGED:
        log.info("  the %d best and the %d worst of %d classes; results.json has all", _EXTREMES, _EXTREMES, len(shown))
        ranked = sorted(shown, key=shown.__getitem__, reverse=True)
        shown = {name: shown[name] for name in (*ranked[:_EXTREMES], *ranked[-_EXTREMES:])}
    width = max(map(len, shown), default=0)
    for name, accuracy in shown.items():
        log.info("  %-*s %s", width, name, "no images" if accuracy is None else f"{accuracy:7.2%}")
    if absent:
        log.info("  the other %d classes have no images", absent)


def _axis_ticks(count: int) -> range:
    """Return which of `count` classes are named along an axis: all, or at most `_MAX_AXIS_NAMES` at equal distances."""
    return range(0, count, -(-count // _MAX_AXIS_NAMES) or 1)


def draw_results(run: RunDirectory, evaluation: Evaluation, images: ImageSet, what: str) -> None:
    """Write confusion.png, per_class.png and samples.png of an evaluation of `images`; titles contain `what`."""
    save_figure(draw_confusion(evaluation, images.classes, what), run.figures / "confusion.png")
    save_figure(draw_per_class(evaluation, images.classes, what), run.figures / "per_class.png")
    save_figure(draw_samples(images, evaluation, what=what), run.figures / "samples.png")


@styled()
def draw_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss, accuracy and learning rate against the epoch."""
    figure = new_figure(figsize=(12, 3.6))
    axes = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in history]
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=False):
        for name, colour in SPLIT_COLOURS.items():
            values = [row.get(f"{name}_{metric}") for row in history]
            if any(v is not None for v in values):
                axis.plot(epochs, values, ".-", color=colour, label=name)
        axis.legend()
    axes[0].set(title="Loss", ylabel="loss (train: the config's loss; others: cross-entropy)")
    axes[1].set(title="Accuracy (train: measured during the epoch)", ylabel="correctly classified images")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    axes[2].plot(epochs, [row["lr"] for row in history], ".-", color=SOFT)
    axes[2].set(title="Learning rate", ylabel="at the last step of the epoch")
    axes[2].ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axis in axes:
        epoch_axis(axis, epochs)
    return figure


@styled()
def draw_confusion(evaluation: Evaluation, classes: Sequence[str], what: str = "") -> Figure:
    """Draw how the images of each true class (row) are distributed over the predicted classes (columns)."""
    counts, count, classes = evaluation.confusion().numpy(), len(classes), plain(classes, 32)
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.55 * count, 24)
    figure = new_figure(figsize=(side + 0.6, side))
    axis = figure.subplots()
    heat = axis.imshow(rates, cmap="Blues", vmin=0, vmax=1)
    axis.grid(False)
    bar = figure.colorbar(heat, ax=axis, shrink=0.7, label="fraction of the true class's images")
    bar.ax.yaxis.set_major_formatter("{x:.0%}")
    few = count <= 12
    cell = "% of the true class's images" + (", and their number" if few else "")
    correct = f"{evaluation.accuracy:.2%} of {counts.sum():,} images are correct"
    title = f"Confusion matrix{what and f' ({what})'}: {correct}\neach cell: {cell}"
    axis.set(xlabel="predicted class", ylabel="true class", title=title)
    ticks = _axis_ticks(count)
    named = [classes[t] for t in ticks]
    axis.set_xticks(ticks, named, rotation=45 if few else 90, ha="right" if few else "center")
    axis.set_yticks(ticks, named)
    for row, column in np.argwhere(rates >= 0.005) if count <= 20 else ():
        rate = rates[row, column]
        colour = WHITE if rate > 0.6 else INK
        text = f"{100 * rate:.1f}" + (f"\n({counts[row, column]:,})" if few else "")
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    return figure


@styled()
def draw_per_class(evaluation: Evaluation, classes: Sequence[str], what: str = "") -> Figure:
    """Draw the accuracy of each class as a bar; dashed line: over all images, dotted line: mean of the classes."""
    values, few = evaluation.per_class(), len(classes) <= _MAX_NUMBERED_CLASSES
    if not few:
        classes = [name for name, value in zip(classes, values, strict=True) if value is not None]
        values = [value for value in values if value is not None]
    figure = new_figure(figsize=(7, min(1.4 + 0.3 * len(classes), 24)))
    axis = figure.subplots()
    axis.barh(range(len(classes)), [np.nan if v is None else v for v in values], color=LIGHT_BLUE)
    for row, value in enumerate(values) if few else ():
        text = "no images" if value is None else f"{value:.1%}"
        axis.text(1.02, row, text, va="center", fontsize=8)
    mean = evaluation.mean_class_accuracy()
    axis.axvline(evaluation.accuracy, color=SOFT, linestyle="--", linewidth=1)
    axis.axvline(mean, color=SOFT, linestyle=":", linewidth=1)
    ticks, names = _axis_ticks(len(classes)), plain(classes, 32)
    axis.set_yticks(ticks, [names[t] for t in ticks], fontsize=8 if len(classes) <= _MAX_NUMBERED_CLASSES else 6)
    axis.invert_yaxis()
    lines = f"dashed: all images, {evaluation.accuracy:.2%}; dotted: mean over classes, {mean:.2%}"
    title = f"Accuracy by class{what and f' ({what})'}\n{lines}"
    axis.set(xlim=(0, 1.14), title=title, xlabel="correctly classified images")
    axis.set_xticks(np.linspace(0, 1, 6))
    axis.xaxis.set_major_formatter("{x:.0%}")
    axis.grid(axis="y", visible=False)
    return figure


@styled()
def draw_samples(images: ImageSet, evaluation: Evaluation, index: Tensor | None = None, what: str = "") -> Figure:
    """Draw images with their predicted (true) class, green where these agree, as the blog does.

    `evaluation` belongs to `images`. `index` selects the images to draw, each with its file name or number and the
    probability of its prediction; without it, images at equal distances in the set are drawn.
    """
    columns = rows = 8
    title, sure, names = "Predicted class (true class)", [""] * (rows * columns), [""] * (rows * columns)
    if index is None:
        index = torch.linspace(0, len(images) - 1, min(rows * columns, len(images))).round().long()
    else:
        index = index[: rows * columns]
        title = "Mistakes, most confident first: image, predicted class, probability (true class)"
        sure = [f" {p:.0%}" for p in evaluation.confidences[index].tolist()]
        files = [images.files[row] for row in images.rows[index].tolist()] if images.files else index.tolist()
        names = [shorten(Path(str(file)).name, 20) + "\n" for file in files]
    count, title = len(index), title + (what and f": {what}")
    title = title if count >= 5 else title.partition(":")[0]  # a narrow figure has no room for the rest
    columns = min(columns, count)
    rows = -(-count // columns)
    # heights: of an image, of the space above it for its name and classes, and of the space for the title
    side, gap, head = 1.0, 0.42 if names[0] else 0.3, 0.3
    high = (side + gap) * rows + head
    figure = new_figure(figsize=(1.35 * 1.08 * columns, 1.35 * high), layout="none")
    axis = figure.add_axes((0, 0, 1, 1))
    predictions, labels = evaluation.predictions[index].tolist(), evaluation.labels[index].tolist()
    shown = zip(images.pixels(index).numpy(), predictions, labels, strict=True)
    for number, (image, prediction, label) in enumerate(shown):
        row, column = divmod(number, columns)
        left, top = 1.08 * column * side, row * (side + gap)
        axis.imshow(image, extent=(left, left + side, top + side, top), interpolation="nearest")
        guess, truth = (cut(images.classes[n], most) for n, most in ((prediction, 20 - len(sure[number])), (label, 18)))
        words = f"{names[number]}{guess}{sure[number]}\n({truth})"
        colour = GREEN if prediction == label else RED
        axis.text(
            left + side / 2, top - 0.02, words, fontsize=8, ha="center", va="bottom", color=colour, parse_math=False
        )
    axis.set(xlim=(0, 1.08 * columns - 0.08), ylim=(rows * (side + gap) - gap, -gap - head))
    axis.set_title(title, y=1 - 0.2 / high)
    axis.axis("off")
    return figure
