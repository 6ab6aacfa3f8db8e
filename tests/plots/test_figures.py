"""The style of the figures."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
from matplotlib.font_manager import fontManager
from PIL import Image

from zfnet.plots import figures
from zfnet.plots.figures import PALETTE, new_figure, plain, save_figure, styled


@styled()
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


@pytest.mark.drawn
def test_letters_without_a_font_are_one_line(tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(figures, "_families", lambda: ["DejaVu Sans"])
    figures._warn_once.cache_clear()
    with warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("error")
        for name in ("a.png", "b.png"):
            save_figure(draw(["犬", "猫"])[0].figure, tmp_path / name)
    assert [record.getMessage() for record in caplog.records] == [
        "some letters are empty boxes in figures: install a font that has them, such as Noto Sans CJK"
    ]


def test_letters_come_from_the_fonts_that_are_installed(monkeypatch) -> None:
    fonts = [SimpleNamespace(name=name) for name in ("Hiragino Sans", "Noto Sans CJK SC", "Comic Sans")]
    monkeypatch.setattr(fontManager, "ttflist", fonts)
    assert figures._families.__wrapped__() == ["DejaVu Sans", "Noto Sans CJK SC", "Hiragino Sans"]


def test_plain_keeps_the_end_of_a_long_name() -> None:
    name = 50 * "the same beginning " + "$1 (validation 7)"
    assert plain([name, "b"], 20) == [r"…g \$1 (validation 7)", "b"]


@pytest.mark.drawn
@pytest.mark.parametrize("name", ["$x$", r"a $\nonsense$", "5 $", "$$"])
def test_plain_keeps_dollar_signs_from_being_formulas(tmp_path: Path, name: str) -> None:
    axis, _ = draw([name, "b"])
    save_figure(axis.figure, tmp_path / "x.png")  # an invalid formula would raise
    assert Image.open(tmp_path / "x.png").width > 200
