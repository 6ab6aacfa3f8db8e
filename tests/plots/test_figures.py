"""The style of all figures."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from zfnet.plots.figures import PALETTE, new_figure, plain, save_figure, styled


@styled
def draw(names: list[str]):
    figure = new_figure(figsize=(3, 2))
    axis = figure.subplots()
    (line,) = axis.plot([1, 2])
    axis.set_xticks([0, 1], plain(names))
    return axis, line


def test_styled_uses_the_style_and_leaves_the_callers_settings() -> None:
    before = matplotlib.rcParams.copy()
    axis, line = draw(["a", "b"])
    assert matplotlib.rcParams == before
    assert line.get_color() == PALETTE[0]
    assert not axis.spines["top"].get_visible()
    assert axis.figure.get_layout_engine() is not None


@pytest.mark.parametrize("name", ["$x$", r"a $\nonsense$", "5 $", "$$"])
def test_plain_keeps_dollar_signs_from_being_formulas(tmp_path: Path, name: str) -> None:
    axis, _ = draw([name, "b"])
    save_figure(axis.figure, tmp_path / "x.png")  # a formula that is none would raise
    assert Image.open(tmp_path / "x.png").width > 200
