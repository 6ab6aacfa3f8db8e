"""Statistics against closed forms, printed tables, worked examples and simulated data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from zfnet.runs.statistics import (
    clustered_mean,
    clustered_p,
    compare_own_with_others,
    describe,
    difference,
    false_discovery_rate,
    format_percent,
    holm,
    rank_correlation,
    rank_p,
    t_quantile,
    t_test,
)


def test_describe_gives_wilsons_interval_for_shares() -> None:
    row = describe(torch.tensor([True, True, False, True, True]))
    assert (row["n"], row["mean"]) == (5, pytest.approx(0.8))
    assert (row["low"], row["high"]) == (pytest.approx(0.37553, abs=1e-4), pytest.approx(0.96380, abs=1e-4))
    row = describe(torch.ones(3).bool())
    assert (row["low"], row["high"]) == (pytest.approx(3 / (3 + 1.96**2)), pytest.approx(1))
    row = describe(torch.zeros(3).bool())
    assert (row["low"], row["high"]) == (0, pytest.approx(1.96**2 / (3 + 1.96**2)))
    assert describe(torch.zeros(3))["high"] == 0  # not a proportion: for example, differences that are all 0
    ours = compare_own_with_others(torch.tensor([[False, True], [True, False]]))
    assert (ours["own"]["low"], ours["difference"]["mean"]) == (0, -1)
    assert ours["own"]["high"] > 0.5  # 0 of 2


def test_describe_one_convention_and_nothing_for_one_value() -> None:
    row = describe(torch.tensor([1.0, 2, 6, torch.nan]))
    assert (row["n"], row["mean"]) == (3, 3)
    assert row["std"] == pytest.approx(7**0.5)  # the sample variance: ((−2)² + (−1)² + 3²) / 2
    assert row["low"] < 3 < row["high"]
    assert describe(torch.tensor([4.0])) == {"n": 1, "mean": 4, "std": None, "low": None, "high": None}
    assert describe(torch.tensor([torch.nan]))["mean"] is None


@pytest.mark.parametrize("count", [3, 40])
def test_describe_the_interval_holds_the_mean_19_times_of_20(count: int) -> None:
    torch.manual_seed(0)
    rows = [describe(torch.randn(count)) for _ in range(200)]
    assert 0.88 < sum(row["low"] <= 0 <= row["high"] for row in rows) / 200 < 0.99


def test_own_and_others_leaves_the_own_partner_out() -> None:
    table = torch.tensor([[1.0, 0.5, 0.0], [0.2, 0.8, 0.0], [0.4, 0.4, 0.4]])
    result = compare_own_with_others(table)
    assert result["own"]["mean"] == pytest.approx(2.2 / 3)
    assert result["others"]["mean"] == pytest.approx((0.25 + 0.1 + 0.4) / 3)
    assert result["difference"]["mean"] == pytest.approx((0.75 + 0.7 + 0) / 3)
    assert compare_own_with_others(torch.ones(1, 1))["difference"]["n"] == 0


def test_rank_p_counts_the_value_itself() -> None:
    null = torch.arange(19.0)[:, None]
    assert rank_p(torch.tensor([99.0, 18.0, 9.0, -1.0]), null).tolist() == pytest.approx([0.05, 0.1, 0.55, 1])


def test_false_discovery_rate_by_hand() -> None:
    p = torch.tensor([0.04, 0.01, 0.03, 0.5], dtype=torch.float64)
    expected = [0.16 / 3, 0.04, 0.16 / 3, 0.5]
    assert false_discovery_rate(p).tolist() == pytest.approx(expected)
    with_untested = torch.cat([torch.tensor([torch.nan]).double(), p])
    assert false_discovery_rate(with_untested).tolist() == pytest.approx([math.nan, *expected], nan_ok=True)


def test_rank_correlation_counts_what_the_mask_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20, 30, generator=generator)
    mask = torch.rand(20, 30, generator=generator) < 0.5
    found = rank_correlation(a, b, mask)
    alone = torch.cat(
        [rank_correlation(x[m][None], y[m][None], m[m][None]) for x, y, m in zip(a, b, mask, strict=True)]
    )
    torch.testing.assert_close(found, alone)
    torch.testing.assert_close(rank_correlation(a, torch.where(mask, a.exp(), b), mask), torch.ones(20).double())
    assert rank_correlation(a, mask.float(), mask).isnan().all()


def test_clustered_error_is_that_of_the_clusters() -> None:
    values, clusters = torch.tensor([1.0, 2.0, 4.0, 7.0]).double(), torch.tensor([5, 6, 7, 8])
    row = clustered_mean(values, clusters)
    assert row["se"] == pytest.approx(float(values.std(correction=1)) / 2)  # one value per cluster: the usual error
    repeated = clustered_mean(values.repeat_interleave(10), clusters.repeat_interleave(10))
    assert repeated["se"] == pytest.approx(row["se"])  # ten copies add no information
    assert (repeated["n"], repeated["clusters"], repeated["mean"]) == (40, 4, 3.5)
    gap = clustered_mean(torch.tensor([1.0, torch.nan]), torch.tensor([0, 1]))
    assert (gap["n"], gap["mean"], gap["se"]) == (1, 1.0, None)
    assert clustered_mean(torch.tensor([torch.nan]), torch.tensor([0]))["mean"] is None


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 3], 0.2952), ([0.1] * 7, 2**-6), ([-0.1] * 3, 0.25), ([0.0] * 7, None), ([1.0], None)],
)
def test_clustered_p_needs_no_spread(values: list[float], expected: float | None) -> None:
    p = clustered_p(clustered_mean(torch.tensor(values), torch.arange(len(values))))
    assert p == (expected and pytest.approx(expected, abs=1e-4))


@pytest.mark.parametrize("t", [0.0, 0.1, 1.0, 3.0, 50.0, 1e4])
def test_t_test_has_its_closed_forms(t: float) -> None:
    assert t_test(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), abs=1e-12)
    assert t_test(t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-12)
    angle = math.atan(t / math.sqrt(3))
    assert t_test(-t, 3) == pytest.approx(1 - 2 / math.pi * (angle + math.sin(angle) * math.cos(angle)), abs=1e-12)


def test_t_test_of_a_fractional_freedom_is_the_integral_of_the_density() -> None:
    t, freedom = 2.1, 3.7
    x = np.linspace(0, t, 200_001)
    density = (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi * freedom)
    assert t_test(t, freedom) == pytest.approx(1 - 2 * scale * np.trapezoid(density, x), abs=1e-9)


@pytest.mark.parametrize(
    ("freedom", "p", "t"), [(1, 0.05, 12.7062), (4, 0.05, 2.7764), (9, 0.01, 3.2498), (30, 0.05, 2.0423)]
)
def test_t_quantile_agrees_with_printed_tables(freedom: float, p: float, t: float) -> None:
    assert t_quantile(freedom, p) == pytest.approx(t, abs=5e-5)


def test_difference_is_paired_where_seeds_match() -> None:
    """By hand: differences 1, 2, 3 have mean 2, error 1/√3, so t = 2√3 with 2 degrees of freedom."""
    found = difference({0: 11.0, 1: 22.0, 2: 33.0}, {2: 30.0, 1: 20.0, 0: 10.0})
    assert found is not None
    assert (found.paired, found.n, found.mean) == (True, (3, 3), pytest.approx(2.0))
    assert found.p == pytest.approx(1 - math.sqrt(12) / math.sqrt(2 + 12))
    reach = 4.302653 / math.sqrt(3)
    assert (found.low, found.high) == (pytest.approx(2 - reach, abs=1e-5), pytest.approx(2 + reach, abs=1e-5))


def test_difference_is_welchs_where_seeds_do_not_match() -> None:
    """By hand: variances 1 and 4 over 3 values each: error √(5/3), freedom (5/3)² / ((1/9 + 16/9) / 2) = 50/17."""
    found = difference({0: 10.0, 1: 11.0, 2: 12.0}, {5: 4.0, 6: 6.0, 7: 8.0})
    assert found is not None
    assert (found.paired, found.mean) == (False, pytest.approx(5.0))
    assert found.p == pytest.approx(t_test(5 / math.sqrt(5 / 3), 50 / 17))
    assert found.high - found.mean == pytest.approx(math.sqrt(5 / 3) * t_quantile(50 / 17))


@pytest.mark.parametrize(
    ("first", "second"),
    [({0: 1.0}, {0: 2.0}), ({0: 1.0, 1: 2.0}, {0: 1.0}), ({0: 1.1, 1: 2.1}, {0: 0.1, 1: 1.1}), ({}, {})],
)
def test_difference_without_spread_or_seeds_is_not_tested(first: dict, second: dict) -> None:
    assert difference(first, second) is None


def test_interval_excludes_zero_exactly_where_p_is_below_its_level() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        first, second = (dict(enumerate(generator.normal(mean, 1, 4))) for mean in (0.0, 1.0))
        found = difference(first, {seed + 10: value for seed, value in second.items()})
        assert found is not None
        assert (found.low > 0 or found.high < 0) is (found.p < 0.05)


def test_holm_multiplies_by_what_is_left_and_keeps_the_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [(-0.001, None, None, "0 %"), (0.356, -0.004, 0.729, "36 % [0, 73]"), (None, None, None, "–")],
)
def test_format_percent_has_no_negative_zero(mean, low, high, expected: str) -> None:
    assert format_percent({"mean": mean, "low": low, "high": high}) == expected
