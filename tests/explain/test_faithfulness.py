"""Compare metrics of explanations with closed forms: a random map scores 0, and a linear model's weights score 1."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zfnet.explain.faithfulness import (
    FILLINGS,
    Removal,
    greedy_areas,
    impute,
    rank_among_others,
    ranks_of,
    removal_scores,
    structural_similarity,
    support,
)

ITEMS, CELLS = 60, 16
WEIGHTS = torch.rand(ITEMS, CELLS, generator=torch.Generator().manual_seed(0)).double()


def linear(item: Tensor, removed: Tensor) -> Tensor:
    """Return the sum of the weights that are not removed."""
    return (WEIGHTS[item] * ~removed).sum(1)


def test_removal_of_a_linear_model_is_known() -> None:
    opposite = (torch.arange(CELLS) % 2 * WEIGHTS, torch.rand(ITEMS, CELLS))
    maps = {"right": WEIGHTS, "wrong": -WEIGHTS, "random": opposite[1], "constant": torch.ones(ITEMS, CELLS)}
    scores = removal_scores(linear, maps | {"half": opposite[0]}, CELLS)
    for found in scores["right"]:
        assert found.allclose(torch.ones(ITEMS).double(), atol=1e-6)
    for name in ("random", "constant"):  # ties in a constant map must be broken at random
        for found in scores[name]:
            assert abs(found.mean()) < 4 * found.std() / ITEMS**0.5
    for found in scores["wrong"]:  # as far below random as the right order is above
        assert found.mean() == pytest.approx(-1, abs=0.1)
    assert all(0.2 < found.mean() < 0.8 for found in scores["half"])


@pytest.mark.parametrize("filling", FILLINGS)
def test_insertion_is_the_reversed_deletion_of_the_least_relevant(filling: str) -> None:
    """The curves are equal bit for bit, with each filling, for an order and for its reverse."""
    frames, boxes = torch.randn(1, 3, 8, 8), torch.tensor([[0, 0, 8, 8]])
    kernel = torch.randn(3, 8, 8)
    removal = Removal(frames, boxes, lambda f, _: (f * kernel).relu().sum((1, 2, 3)), 4, filling, frames / 2)
    relevance = {"a": torch.randn(1, 16), "b": torch.randn(1, 16)}
    order = relevance["a"][0].argsort(descending=True)  # most relevant first
    for first in (order, order.flip(0)):
        deletion, insertion = torch.zeros(5, 16, dtype=torch.bool), torch.ones(5, 16, dtype=torch.bool)
        for step in range(5):
            deletion[step, first[: 4 * step]] = True
            insertion[step, first.flip(0)[: 4 * step]] = False
        item = torch.zeros(5, dtype=torch.int64)
        assert torch.equal(removal(item, insertion), removal(item, deletion).flip(0))
    # so the scores have a fixed ratio: the areas are equal, and all methods have the same scale
    found = removal_scores(removal, relevance | {f"{k} last": -v for k, v in relevance.items()}, 4)
    ratios = [float(found[name][1] / found[f"{name} last"][0]) for name in relevance]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)


def test_greedy_areas_of_a_linear_model_are_those_of_the_sorted_weights() -> None:
    every = torch.arange(ITEMS)
    nothing = torch.zeros(ITEMS, CELLS, dtype=torch.bool)
    whole, empty = linear(every, nothing), linear(every, ~nothing)
    lowest, highest = greedy_areas(linear, whole, empty, CELLS, 4)
    for area, descending in ((lowest, True), (highest, False)):
        gone = torch.cat([torch.zeros(ITEMS, 1), WEIGHTS.sort(1, descending=descending).values.cumsum(1)], 1)
        curve = (whole[:, None] - gone)[:, ::4]
        torch.testing.assert_close(area, torch.trapezoid(curve, dim=1) / 4)


def test_removal_scores_of_a_constant_measure_are_nan() -> None:
    scores = removal_scores(lambda item, removed: torch.ones(len(item)), {"any": torch.rand(3, 4)}, 2)
    assert all(found.isnan().all() for found in scores["any"])


def test_ranks_of_is_the_order_from_the_most_relevant() -> None:
    assert ranks_of(torch.tensor([[1.0, 3.0, 2.0]]), 0).tolist() == [[2, 0, 1]]


@pytest.mark.parametrize("filling", FILLINGS)
def test_removal_changes_the_removed_cells_alone(filling: str) -> None:
    frames, boxes = torch.randn(2, 3, 8, 8) + 3, torch.tensor([[0, 0, 8, 8], [0, 0, 4, 8]])
    seen: list[Tensor] = []

    def value(given: Tensor, item: Tensor) -> Tensor:
        seen.append(given)
        return given.mean((1, 2, 3))

    removal = Removal(frames, boxes, value, 2, filling, torch.full_like(frames, 7))
    item, removed = torch.tensor([1, 0]), torch.tensor([[True, False, False, False], [False, False, False, True]])
    left = removal(item, removed)
    assert left.tolist() == seen[0].mean((1, 2, 3)).tolist()
    same = (seen[0] == frames[item]).all(1)
    hidden = torch.zeros(2, 8, 8, dtype=torch.bool)
    hidden[0, :2, :4] = hidden[1, 4:, 4:] = True
    assert torch.equal(same, ~hidden)
    fill = seen[0][1, :, 4:, 4:]
    if filling == "mean colour":
        assert fill.eq(0).all()
    elif filling == "blur":
        assert fill.eq(7).all()
    else:  # interpolated between the surrounding values
        assert frames.min() < fill.min() <= fill.max() < frames.max()


def test_impute_continues_a_plane_and_keeps_what_is_known() -> None:
    plane = torch.arange(7.0)[:, None] + 2 * torch.arange(7.0)
    points = torch.stack([plane, torch.full((7, 7), 3.0)])[None].double()
    lost = torch.zeros(1, 7, 7, dtype=torch.bool)
    lost[:, 2:5, 2:5] = True
    broken = points.masked_fill(lost[:, None], 1e3)
    torch.testing.assert_close(impute(broken, lost), points, rtol=2e-3, atol=1e-3)
    assert impute(broken, torch.ones_like(lost)).abs().max() == 0  # without any known point: the mean colour


def test_support_is_the_largest_share_of_what_is_inside() -> None:
    size, inside = torch.arange(16.0).view(1, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool)
    inside[0, 3] = False
    assert support(size, inside, 0.25).flatten().nonzero().flatten().tolist() == [9, 10, 11]


def test_own_percentile_is_1_for_the_best_and_0_by_chance() -> None:
    nan = torch.nan
    others = torch.tensor([[1.0, 2.0, nan], [1.0, 5.0, nan], [3.0, 3.0, 3.0], [nan, nan, nan]])
    found = rank_among_others(torch.tensor([3.0, 3.0, 3.0, 3.0]), others)
    assert found[:3].tolist() == [1, 0, 0]
    assert found[3].isnan()
    values = torch.rand(500, 11, generator=torch.Generator().manual_seed(0))  # control: own is a random value, too
    assert abs(rank_among_others(values[:, 0], values[:, 1:]).mean()) < 0.08


def test_structural_similarity() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 4, 16, 16, generator=generator)
    inside = torch.ones(4, 16, 16, dtype=torch.bool)
    inside[:, 10:] = False
    torch.testing.assert_close(structural_similarity(a, 3 * a, inside), torch.ones(4).double())
    assert structural_similarity(a, b, inside).abs().max() < 0.4
    changed = torch.where(inside, a, b)  # pixels outside do not count
    torch.testing.assert_close(structural_similarity(a, changed, inside), torch.ones(4).double())
    assert structural_similarity(a, 0 * a, inside).isnan().all()
    # one window by hand: means 0.5 and 0.75, variances 1/4 and 1/16, covariance 1/8
    first = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    second = torch.tensor([[[0.5, 1.0], [1.0, 0.5]]])
    c1, c2 = 1e-4, 9e-4
    expected = (2 * 0.5 * 0.75 + c1) * (2 * 0.125 + c2) / ((0.25 + 0.5625 + c1) * (0.25 + 0.0625 + c2))
    found = structural_similarity(first, second, torch.ones(1, 2, 2, dtype=torch.bool))
    assert float(found) == pytest.approx(expected)
