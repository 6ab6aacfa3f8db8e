"""Tables of points: where a point comes to lie in the network's input, and what is said of a bad table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from tests.helpers import TINY, compose
from zfnet.analyses.points import read_points, to_input_pixels
from zfnet.config.errors import UserError

DATA = compose(*TINY).data


@pytest.fixture
def used() -> Any:
    """What is asked of a run: its preprocessing and its device."""
    runtime = SimpleNamespace(device=torch.device("cpu"), channels_last=True)
    return SimpleNamespace(metadata=SimpleNamespace(stored_size=64), data=DATA, runtime=runtime)


@pytest.fixture(autouse=True)
def _pictures(tmp_path: Path) -> None:
    dot = Image.new("RGB", (120, 80))
    dot.paste("white", (70, 20, 80, 30))
    dot.save(tmp_path / "a.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "b.png")


def test_points_follow_their_pixels_into_the_network(used: Any, tmp_path: Path) -> None:
    table = tmp_path / "points.csv"
    table.write_text("image,part,x,y\na.png,dot,75,25\nb.png,dot,1,62\n")
    found = read_points(used, table)
    y, x = found.parts["dot"][0].tolist()
    assert (x, y) == pytest.approx((44, 20))  # 20 px are cut off on the left, the rest is 0.8 as large
    lit = (found.inputs[0, 0] > 0).nonzero().float() + 0.5
    assert lit.mean(0).tolist() == pytest.approx([y, x], abs=0.6)
    assert found.parts["dot"][1].tolist() == [62, 1]
    stretched = replace(DATA, fit="stretch", crop_size=32)
    assert to_input_pixels((60, 40), (120, 80), 64, stretched) == (32, 32)
    assert to_input_pixels((30, 40), (120, 80), 64, stretched) == (32, 0)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["image,part,x"], "lacks the column y"),
        (["image,part,x,y", "a.png,eye,1,b"], "line 2: x=1, y=b are not numbers"),
        (["image,part,x,y", "a.png,eye,1,nan", "b.png,eye,1,1"], "eye of a.png lies outside"),
        (["image,part,x,y", "a.png,eye,1,1", "a.png,eye,1,1"], "line 3: eye of a.png is there already"),
        (["image,part,x,y", "a.png,eye,60,1", "b.png,nose,30,1"], "image a.png has no nose"),
        (
            ["image,part,x,y", "a.png,eye,1,1", "b.png,eye,1,1"],
            "eye of a.png lies outside what the network sees",
        ),
        (["image,part,x,y", "a.png,eye,60,1"], "names 1 images"),
        (["image,part,x,y", "a.png,eye,60,1", "c.png,eye,30,1"], "c.png cannot be read as an image"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(
    used: Any, tmp_path: Path, lines: list[str], expected: str
) -> None:
    (tmp_path / "points.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        read_points(used, tmp_path / "points.csv")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
