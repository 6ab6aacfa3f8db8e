"""The selection of images for the analyses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zfnet.config.errors import UserError
from zfnet.data import Splits
from zfnet.data.images import image_set
from zfnet.data.shapes import draw_shapes
from zfnet.explain import selection
from zfnet.explain.selection import chosen_split, pick_layers
from zfnet.model import Chain


def test_pick_layers_needs_a_layer() -> None:
    linear = Chain(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), 4)
    assert pick_layers(linear, "job.layers", ["1"], []) == ["1"]
    with pytest.raises(UserError, match=r"^job\.layers: the default finds no layer in this network; .*known: 1$"):
        pick_layers(linear, "job.layers", None, linear.conv_layers)


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


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (7, [1, 2, 4, 0, 8, 5, 3]),  # only image 4 has class 2
        (9, [1, 2, 4, 0, 8, 5, 3, 7, 6]),
    ],
)
def test_images_alternate_between_classes_and_begin_with_correct_ones(monkeypatch, count: int, expected: list) -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 0, 1, 0, 1])
    images = image_set(np.arange(9, dtype=np.uint8)[:, None, None, None].repeat(3, 3), labels, "abc")
    correct = torch.tensor([False, True, True, False, False, False, False, False, True])
    predicted = torch.eye(4)[torch.where(correct, labels, 3)]
    monkeypatch.setattr(selection, "to_inputs", lambda _, pixels: pixels[:, 0, 0, 0].long())  # the images' numbers
    monkeypatch.setattr(selection, "predict", lambda _, numbers: predicted[numbers])
    loaded: Any = None
    assert selection._correct_first(loaded, images, count).tolist() == expected


def test_images_of_a_large_class_replace_those_that_small_classes_lack(monkeypatch) -> None:
    labels = torch.tensor([0] * 30 + [1, 2])
    images = image_set(np.zeros((32, 3, 3, 3), np.uint8), labels, "abc")
    monkeypatch.setattr(selection, "to_inputs", lambda _, pixels: pixels)
    monkeypatch.setattr(selection, "predict", lambda _, pixels: torch.eye(3)[torch.zeros(len(pixels)).long()])
    loaded: Any = None
    for count, expected in ((28, 28), (40, 32)):
        chosen = selection._correct_first(loaded, images, count)
        assert len(chosen) == len(chosen.unique()) == expected
