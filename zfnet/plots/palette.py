"""Colours of classes and curves, the same in every figure."""

from __future__ import annotations

from collections.abc import Sequence

# the first three are those of the training curves
PALETTE = (
    "#0969da",
    "#bc4c00",
    "#8250df",
    "#1a7f37",
    "#cf222e",
    "#9a6700",
    "#54aeff",
    "#ff9bce",
    "#57606a",
    "#7ee787",
)
INK, PALE = "#24292f", "#d0d7de"


def class_colours(classes: Sequence[int]) -> dict[int, str]:
    """Give each class number that occurs a colour; more than ten share them in turn."""
    return {c: PALETTE[n % len(PALETTE)] for n, c in enumerate(sorted(set(classes)))}
