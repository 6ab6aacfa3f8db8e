"""The selection of images for the analyses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from zfnet.data import Splits
from zfnet.data.shapes import draw_shapes
from zfnet.explain.selection import chosen_split


@pytest.mark.parametrize(
    ("asked", "has_validation", "shown"),
    [("auto", True, "validation"), ("auto", False, "test"), ("train", False, "train")],
)
def test_chosen_split_auto_is_validation_or_else_test(asked: str, has_validation: bool, shown: str) -> None:
    sets = {name: draw_shapes(10, 16, k) for k, name in enumerate(("train", "validation", "test"))}
    splits = Splits(sets["train"], sets["validation"] if has_validation else None, sets["test"], "")
    loaded: Any = SimpleNamespace(
        splits=splits,
        split=lambda name: getattr(splits, name),
        config=SimpleNamespace(job=SimpleNamespace(split=asked)),
    )
    split = chosen_split(loaded)
    assert split.name == shown
    assert split.images is sets[shown]
