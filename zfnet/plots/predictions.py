"""Predictions, as a table for the terminal and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure

_SHORTEST_NAME = 16  # to which a name is cut before classes go on in the next line


@dataclass(frozen=True)
class Prediction:
    """name: of the image; best: (class, probability), most probable first; picture: uint8 [h, w, 3], perhaps kept."""

    name: str
    best: list[tuple[str, float]]
    picture: np.ndarray | None = None


def shorten(text: str, width: int) -> str:
    """Return `text` in at most `width` printable characters; of a long one the end, which tells files apart."""
    text = "".join(c if c.isprintable() else "�" for c in text)
    return text if len(text) <= width else f"…{text[len(text) - width + 1 :]}"


def prediction_table(predictions: Sequence[Prediction], width: int = 80) -> list[str]:
    """Return lines of at most `width` characters: the image, and its classes with their probabilities.

    What does not fit beside a name goes on below it.
    """
    longest = max((len(p.name) for p in predictions), default=0)
    most = max((len(p.best) for p in predictions), default=0)
    label = min(
        max((len(name) for p in predictions for name, _ in p.best), default=0), width - _SHORTEST_NAME - 9
    )
    first = min(longest, max(_SHORTEST_NAME, width - most * (label + 9)))
    a_line = max(1, (width - first) // (label + 9))
    lines = []
    for prediction in predictions:
        cells = [f"{shorten(name, label):<{label}} {share:6.1%}" for name, share in prediction.best]
        for start in range(0, len(cells), a_line):
            name = shorten(prediction.name, first) if start == 0 else ""
            lines.append("  ".join([f"{name:<{first}}", *cells[start : start + a_line]]).rstrip())
    return lines


def draw_predictions(predictions: Sequence[Prediction], columns: int = 6) -> Figure:
    """Each picture with bars for its most probable classes below it."""
    shown = [p for p in predictions if p.picture is not None]
    columns = min(columns, len(shown))
    rows, bars = -(-len(shown) // columns), min(3, max(len(p.best) for p in shown))
    figure = Figure(figsize=(2.1 * columns, (2.35 + 0.24 * bars) * rows), layout="constrained")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[2.0, 0.24 * bars] * rows)
    for number, prediction in enumerate(shown):
        row, column = divmod(number, columns)
        picture, chart = (figure.add_subplot(grid[2 * row + part, column]) for part in (0, 1))
        assert prediction.picture is not None
        picture.imshow(prediction.picture)
        picture.set_title(shorten(prediction.name, 26), fontsize=8, color="#57606a", parse_math=False)
        picture.axis("off")
        best = prediction.best[:bars]
        chart.barh(range(len(best)), [share for _, share in best], height=0.82, color=_shades(len(best)))
        for place, (name, share) in enumerate(best):
            weight = "bold" if place == 0 else "normal"
            text = name if len(name) <= 18 else f"{name[:17]}…"
            chart.text(0.02, place, text, va="center", fontsize=8, weight=weight, parse_math=False)
            chart.text(0.98, place, f"{share:.1%}", va="center", ha="right", fontsize=8, weight=weight)
        chart.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5), facecolor="#f6f8fa")
        chart.set_xticks([])
        chart.set_yticks([])
        chart.spines[:].set_visible(False)
    return figure


def _shades(count: int) -> list[str]:
    return ["#54aeff", *["#b6e3ff"] * (count - 1)]
