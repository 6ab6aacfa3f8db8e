"""Whether a difference between two settings is more than the spread of their seeds: t-tests with intervals.

Where both settings have the same seeds, which share the initial weights and the order of images, the test is paired;
else it is Welch's, which assumes no equal variances (Welch 1947). Several tests at once are corrected after Holm 1979.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.05  # a difference holds where p is below


@dataclass(frozen=True)
class Difference:
    """Mean of one setting less that of another, with its 95 % interval and two-sided p; n: how many values each has."""

    mean: float
    low: float
    high: float
    p: float
    paired: bool
    n: tuple[int, int]


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Test the difference of two settings' values, which are given by seed.

    Returns None where there is nothing to test by: fewer than two values, or values without any spread.
    """
    n = len(first), len(second)
    if min(n) < 2:
        return None
    paired = first.keys() == second.keys()
    if paired:
        values = [first[seed] - second[seed] for seed in first]
        mean, error, freedom = statistics.fmean(values), statistics.stdev(values) / math.sqrt(n[0]), n[0] - 1.0
    else:
        parts = [statistics.variance(v.values()) / len(v) for v in (first, second)]
        mean, error = statistics.fmean(first.values()) - statistics.fmean(second.values()), math.sqrt(sum(parts))
        below = sum(part**2 / (count - 1) for part, count in zip(parts, n, strict=True))
        freedom = sum(parts) ** 2 / below if below else 1.0
    if error <= 1e-12 * max(map(abs, [*first.values(), *second.values()])):
        return None
    reach = error * t_quantile(freedom)
    return Difference(mean, mean - reach, mean + reach, t_test(mean / error, freedom), paired, n)


def t_test(t: float, freedom: float) -> float:
    """Return the two-sided p of a t statistic: the probability beyond ±t, for 1 or more degrees of freedom.

    With t = √freedom · cot(v²) the density's tail becomes the integral of a power of a sine over 0 … √(arccot), which
    Gauss and Legendre's rule takes to rounding.
    """
    end = math.sqrt(math.atan2(math.sqrt(freedom), abs(t)))
    nodes, weights = _rule()
    v = (nodes + 1) * end / 2
    tail = float((weights * np.sin(v**2) ** (freedom - 1) * 2 * v).sum()) * end / 2
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return min(1.0, 2 * scale * tail)


@functools.cache
def _rule() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(100)


def t_quantile(freedom: float, p: float = LEVEL) -> float:
    """Return the t whose two-sided p this is."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_test(middle, freedom) > p else (low, middle)
    return high


def holm(p: Sequence[float]) -> list[float]:
    """Return these p corrected for being several: the chance of any false one stays below the level (Holm 1979)."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, p[place] * (len(p) - rank)))
        corrected[place] = largest
    return corrected
