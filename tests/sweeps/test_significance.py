"""Tests of differences: closed forms, tables, worked examples, and what cannot be tested."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zfnet.sweeps.significance import difference, holm, t_quantile, t_test


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
