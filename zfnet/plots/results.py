"""What an evaluation says, as figures, as numbers for results.json, and as lines for people."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from zfnet.data import ImageSet
from zfnet.plots.figures import draw_confusion, draw_per_class, draw_samples, save_figure
from zfnet.runs.directory import RunDirectory
from zfnet.training.metrics import Evaluation

log = logging.getLogger("zfnet")


def results_of(found: Evaluation, classes: Sequence[str]) -> dict[str, Any]:
    """Return one split's entry of results.json."""
    return {
        **found.summary(),
        "images": len(found.labels),
        "per_class": dict(zip(classes, found.per_class(), strict=True)),
        "confusion": found.confusion().tolist(),
    }


def draw_results(
    run: RunDirectory,
    found: Evaluation,
    part: ImageSet,
) -> None:
    """Write confusion.png, per_class.png and samples.png; `found` is about the images of `part`."""
    figures = {
        "confusion": draw_confusion(found, part.classes),
        "per_class": draw_per_class(found, part.classes),
        "samples": draw_samples(part, found),
    }
    for name, figure in figures.items():
        save_figure(figure, run.figures / f"{name}.png")


def say_result(name: str, result: dict[str, Any]) -> None:
    """One line for a split's entry of results.json."""
    log.info(
        "%-10s accuracy %.2f %%, top-5 %.2f %%, loss %.4f (%d images)",
        name,
        100 * result["accuracy"],
        100 * result["top5"],
        result["loss"],
        result["images"],
    )


def say_per_class(result: dict[str, Any]) -> None:
    """A line for each class."""
    width = max(len(c) for c in result["per_class"])
    for name, accuracy in result["per_class"].items():
        log.info("  %-*s %s", width, name, "no images" if accuracy is None else f"{accuracy:7.2%}")
