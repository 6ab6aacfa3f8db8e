"""What the benchmark says of two sets of projections, and of maps that have none."""

from __future__ import annotations

import pytest
import torch

from tests.explain.networks import network, pictures
from zfnet.benchmark.projections import APART, compare, time_projections
from zfnet.config.errors import UserError


def test_compare_finds_the_largest_difference_and_counts_the_units_apart() -> None:
    theirs = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    theirs[1, 2, 3, 0] = -8  # the largest pixel
    ours = theirs.clone()
    ours[0, 0, 0, 0] += 8 * 0.9 * APART
    ours[2, 1, 2, 3] -= 8 * 1.1 * APART
    ours[4] += 8 * 50 * APART
    found = compare(ours, theirs)
    assert found["difference"] == pytest.approx(50 * APART)
    assert found["units_apart"] == 2


def test_maps_without_activation_are_named() -> None:
    pytest.importorskip("captum.attr")
    model = network()
    torch.nn.init.constant_(model.conv3.bias, -1e6)
    with pytest.raises(UserError, match="none of these maps of conv3 is active in the 2 images"):
        time_projections(model, pictures(model), maps=1, rounds=1)
