"""Statistics of runs and analyses: means with intervals, rank correlations, and tests of hypotheses.

One convention everywhere: `std` is the sample's standard deviation (ddof=1), which a single value does not have;
`low` and `high` are the ends of a 95 % interval: of a bootstrap over the `n` values or, if there are fewer than 30, for
which that is too narrow, of Student's t. Of values that are 0 or 1 the interval is Wilson's (1927).

Where two settings have the same seeds, which share the initial weights and the order of images, their t-test is paired;
else it is Welch's, which does not assume equal variances (Welch 1947). Several tests at once are corrected after Holm
1979 or, where some false ones are acceptable, after Benjamini and Hochberg 1995.
"""

import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.05  # a difference is significant where its p is below

_RESAMPLES = 2000
_MANY = 30  # values that a bootstrap needs
_ROWS = 16  # ranked at once


def describe(values: Tensor) -> dict[str, float | int | None]:
    """Return n, mean, std, low and high of values [n]; values that are not finite do not count."""
    known = values.detach().cpu().double().flatten()
    known = known[known.isfinite()]
    count = len(known)
    row: dict[str, float | int | None] = {"n": count, "mean": None, "std": None, "low": None, "high": None}
    if count:
        row["mean"] = float(known.mean())
    if count > 1:
        mean, std = float(known.mean()), float(known.std(correction=1))
        reach = t_quantile(count - 1) * std / math.sqrt(count)
        low, high = mean - reach, mean + reach
        if known.unique().tolist() in ([0, 1], [1]):  # a share, whose interval ends at 0 and 1
            low, high = _wilson(mean, count)
        elif count >= _MANY:
            drawn = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(0))
            low, high = known[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        row |= {"std": std, "low": low, "high": high}
    return row


def _wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` (Wilson 1927)."""
    middle, scale = share + z**2 / (2 * count), 1 + z**2 / count
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (middle - reach) / scale, (middle + reach) / scale


def own_and_others(table: Tensor) -> dict[str, dict[str, float | int | None]]:
    """Compare each image's value with its own partner to those with the other images' partners.

    table: [N, N], row: image, column: partner (such as its object's box). Objects stand in the middle of most images,
    so the other images' boxes, and not the box's area, tell what to expect by chance. Returns `describe` of the values
    with the `own` partner, of the mean over the `others`, and of their `difference`, image by image.
    """
    table = table.double()
    own = table.diagonal()
    others = table.masked_fill(torch.eye(len(table), dtype=torch.bool), torch.nan).nanmean(1)
    return {"own": describe(own), "others": describe(others), "difference": describe(own - others)}


def clustered(values: Tensor, clusters: Tensor) -> dict[str, float | int | None]:
    """Return mean, standard error, n and the number of clusters of values [n]; values that are not finite do not count.

    clusters: int64 [n], such as the image that a value is from: values of one image are not independent, so the error
    is that of the clusters' sums (Liang & Zeger 1986). One cluster alone has none.
    """
    known = values.isfinite()
    values, (_, group) = values[known].double(), clusters[known].unique(return_inverse=True)
    row: dict[str, float | int | None] = {"n": len(values), "clusters": 0, "mean": None, "se": None}
    if len(values):
        count, mean = int(group.max()) + 1, values.mean()
        row |= {"clusters": count, "mean": float(mean)}
        if count > 1:
            sums = torch.zeros(count, dtype=torch.float64).index_add(0, group, values - mean)
            row["se"] = float((sums.square().sum() * count / (count - 1)).sqrt() / len(values))
    return row


def clustered_p(row: Mapping[str, float | int | None]) -> float | None:
    """Return the two-sided p of a t-test of `clustered`'s mean; None of one cluster and of a mean of 0 without spread.

    Other means without spread have no t: their p is that of a sign-flip test, 2 ^ (1 − clusters).
    """
    mean, error, clusters = row["mean"], row["se"], row["clusters"]
    if mean is None or error is None or clusters is None:
        return None
    if error > 1e-12 * abs(mean):  # else rounding
        return t_test(mean / error, clusters - 1)
    return 2.0 ** (1 - clusters) if mean else None


def clustered_tests(
    values: Mapping[str, Tensor], clusters: Tensor, pairs: Iterable[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Test the differences of pairs of settings, value by value, with errors by cluster (paired t-tests).

    values: those of each setting, [n]; clusters: int64 [n]. Of equal differences a sign-flip test takes the t-test's
    place (`clustered_p`); settings that never differ are not tested. p_holm is corrected for all pairs (Holm 1979).
    """
    rows: list[dict[str, Any]] = []
    for first, second in pairs:
        of = clustered(values[first] - values[second], clusters)
        if (p := clustered_p(of)) is not None:
            numbers = {"difference": of["mean"], "se": of["se"], "n": of["n"], "clusters": of["clusters"], "p": p}
            rows.append({"first": first, "second": second, **numbers})
    return [row | {"p_holm": p} for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True)]


def rank_correlation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Return Spearman's correlation of each row pair of a, b [U, …] (ties: mean rank); NaN where one is constant.

    mask: bool, broadcast to [U, …], what counts. float64 [U], on the CPU.
    """
    return (standard_ranks(a, mask) * standard_ranks(b, mask)).sum(1)


def standard_ranks(x: Tensor, mask: Tensor) -> Tensor:
    """Return the ranks of each row of x [U, …], of mean 0 and length 1: their products are rank correlations.

    float64 [U, …flat], on the CPU; 0 where the mask is False, NaN where a row is constant.
    """
    blocks = []
    for start in range(0, len(x), _ROWS):  # some at a time: each step keeps several copies
        part = x[start : start + _ROWS].detach().cpu()
        known = mask[start : start + _ROWS].expand_as(part)
        part, known = part.flatten(1).double(), known.flatten(1)
        ranks = _ranks(part.masked_fill(~known, torch.inf))
        mean = (ranks * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
        centred = (ranks - mean) * known
        norm = centred.norm(dim=1, keepdim=True)
        blocks.append(centred / torch.where(norm > 0, norm, torch.nan))
    return torch.cat(blocks) if blocks else torch.zeros(0, 0, dtype=torch.float64)


def _ranks(x: Tensor) -> Tensor:
    order = torch.from_numpy(x.numpy().argsort(1))  # twice as fast as PyTorch's on a CPU
    value = x.gather(1, order)
    place, edge = torch.arange(x.shape[1]).expand_as(order), torch.ones(len(x), 1, dtype=torch.bool)
    changes = value[:, 1:] != value[:, :-1]
    first = torch.where(torch.cat([edge, changes], 1), place, 0).cummax(1).values
    last = torch.where(torch.cat([changes, edge], 1), place, x.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(x).scatter(1, order, (first + last).to(x) / 2)


def rank_p(values: Tensor, null: Tensor) -> Tensor:
    """Return p of values [C] against the null's [K, C or 1]: (1 + how many of these are as large) / (1 + K)."""
    return (1 + (null >= values - 1e-12).sum(0)).double() / (1 + len(null))


def false_discovery_rate(p: Tensor) -> Tensor:
    """Return q values [n] (Benjamini & Hochberg 1995): of the tests with q ≤ 0.05, 5 % are expected to be false.

    Where p is NaN, nothing was tested.
    """
    q, tested = torch.full_like(p, torch.nan), p.isfinite().nonzero().flatten()
    if len(tested):
        order = tested[p[tested].argsort(stable=True)]
        steps = p[order] * len(order) / torch.arange(1, len(order) + 1)
        q[order] = steps.flip(0).cummin(0).values.flip(0)
    return q


def percent(row: dict[str, float | int | None]) -> str:
    """Return `mean [low, high]` of a row of `describe` in percent, as a line of the log shows it."""
    if row["mean"] is None:
        return "–"
    interval = "" if row["low"] is None else f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"  # type: ignore[operator]
    return f"{100 * row['mean']:.0f} %{interval}"


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

    Returns None if they cannot be tested: fewer than two values, or values without any spread.
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
