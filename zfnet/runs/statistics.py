"""Statistics of runs and analyses: means with confidence intervals, rank correlations and hypothesis tests.

All functions use one convention. `std` is the sample standard deviation (ddof=1), None for a single value. `low` and
`high` are the ends of a 95% confidence interval: a bootstrap over the `n` values or, below 30 values, for which a
bootstrap is too narrow, Student's t. For bool values, whose mean is a proportion, it is Wilson's interval (1927).

If two settings have the same seeds, which fix the initial weights and the order of images, their t-test is paired.
Otherwise it is Welch's, which does not assume equal variances (Welch 1947). Multiple tests are corrected after Holm
(1979) or, where some false positives are acceptable, after Benjamini and Hochberg (1995).
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

LEVEL = 0.05  # significance level: a difference is significant if its p is below it

Summary = dict[str, float | int | None]  # a row of statistics, such as n, mean and std

_RESAMPLES = 2000
_MIN_BOOTSTRAP = 30  # a bootstrap needs at least this many values
_BLOCK_ROWS = 16  # rows that are ranked at once
_quadrature_rule = functools.cache(np.polynomial.legendre.leggauss)


def describe(values: Tensor) -> Summary:
    """Return n, mean, std, low and high of values [n]; non-finite values are left out."""
    known = values.detach().cpu().double().flatten()
    known = known[known.isfinite()]
    count = len(known)
    row: Summary = {"n": count, "mean": None, "std": None, "low": None, "high": None}
    if count:
        row["mean"] = float(known.mean())
    if count > 1:
        mean, std = float(known.mean()), float(known.std(correction=1))
        reach = t_quantile(count - 1) * std / math.sqrt(count)
        low, high = mean - reach, mean + reach
        if values.dtype == torch.bool:  # a proportion: its interval must stay within 0 … 1
            low, high = _wilson(mean, count)
        elif count >= _MIN_BOOTSTRAP:
            drawn = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(0))
            low, high = known[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        row |= {"std": std, "low": low, "high": high}
    return row


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% confidence interval of a proportion among `count` values (Wilson 1927)."""
    z = 1.96
    middle, scale = share + z**2 / (2 * count), 1 + z**2 / count
    reach = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(0.0, (middle - reach) / scale), (middle + reach) / scale


def compare_own_with_others(table: Tensor) -> dict[str, Summary]:
    """Compare each image's value for its own partner with its values for the other images' partners.

    table: [N, N], row: image, column: partner (such as an image's object box). Most objects are in the middle of their
    image, so the boxes of other images, rather than the box's area, give the value expected by chance. Returns
    `describe` of the values for the `own` partner, of the mean over the `others`, and of their `difference` per image.
    """
    own = table.diagonal()
    others = table.double().masked_fill(torch.eye(len(table), dtype=torch.bool), torch.nan).nanmean(1)
    return {"own": describe(own), "others": describe(others), "difference": describe(own.double() - others)}


def clustered_mean(values: Tensor, clusters: Tensor) -> Summary:
    """Return mean, standard error, n and the number of clusters of values [n]; non-finite values are left out.

    clusters: int64 [n], such as the image of each value. Values of one image are not independent, so the standard error
    is computed from the clusters' sums (Liang & Zeger 1986). For a single cluster it is None.
    """
    known = values.isfinite()
    values, (_, group) = values[known].double(), clusters[known].unique(return_inverse=True)
    row: Summary = {"n": len(values), "clusters": 0, "mean": None, "se": None}
    if len(values):
        count, mean = int(group.max()) + 1, values.mean()
        row |= {"clusters": count, "mean": float(mean)}
        if count > 1:
            sums = torch.zeros(count, dtype=torch.float64).index_add(0, group, values - mean)
            row["se"] = float((sums.square().sum() * count / (count - 1)).sqrt() / len(values))
    return row


def clustered_p(row: Mapping[str, float | int | None]) -> float | None:
    """Return the two-sided p of a t-test of a clustered mean; None for one cluster or a mean of 0 without spread.

    Other means without spread have no t statistic. Their p is that of a sign-flip test, 2 ^ (1 − clusters).
    """
    mean, error, clusters = row["mean"], row["se"], row["clusters"]
    if mean is None or error is None or clusters is None:
        return None
    if error > 1e-12 * abs(mean):  # a smaller error is a rounding error
        return t_test(mean / error, clusters - 1)
    return 2.0 ** (1 - clusters) if mean else None


def clustered_tests(
    values: Mapping[str, Tensor], clusters: Tensor, pairs: Iterable[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Test the differences between pairs of settings with paired t-tests and standard errors by cluster.

    values: [n] for each setting; clusters: int64 [n]. If all differences are equal, a sign-flip test replaces the
    t-test (`clustered_p`). Settings that never differ are not tested. p_holm is corrected for all pairs (Holm 1979).
    """
    rows: list[dict[str, Any]] = []
    for first, second in pairs:
        row = clustered_mean(values[first] - values[second], clusters)
        if (p := clustered_p(row)) is not None:
            numbers = {"difference": row["mean"], "se": row["se"], "n": row["n"], "clusters": row["clusters"], "p": p}
            rows.append({"first": first, "second": second, **numbers})
    return [row | {"p_holm": p} for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True)]


def rank_correlation(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Return Spearman's correlation of each row pair of a, b [U, …] (ties: mean rank); NaN if one row is constant.

    mask: bool, broadcast to [U, …], True for values to include. Returns float64 [U], on the CPU.
    """
    return (standard_ranks(a, mask) * standard_ranks(b, mask)).sum(1)


def standard_ranks(x: Tensor, mask: Tensor) -> Tensor:
    """Return the ranks in each row of x [U, …] with mean 0 and length 1: their dot products are rank correlations.

    Returns float64 [U, flattened …], on the CPU; 0 where the mask is False, NaN in constant rows.
    """
    blocks = []
    for start in range(0, len(x), _BLOCK_ROWS):  # in blocks, because each step keeps several copies
        part = x[start : start + _BLOCK_ROWS].detach().cpu()
        known = mask[start : start + _BLOCK_ROWS].expand_as(part)
        part, known = part.flatten(1).double(), known.flatten(1)
        ranks = _ranks(part.masked_fill(~known, torch.inf))
        mean = (ranks * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
        centred = (ranks - mean) * known
        norm = centred.norm(dim=1, keepdim=True)
        blocks.append(centred / torch.where(norm > 0, norm, torch.nan))
    return torch.cat(blocks) if blocks else torch.zeros(0, 0, dtype=torch.float64)


def _ranks(x: Tensor) -> Tensor:
    order = torch.from_numpy(x.numpy().argsort(1))  # on a CPU, twice as fast as PyTorch's argsort
    value = x.gather(1, order)
    place, edge = torch.arange(x.shape[1]).expand_as(order), torch.ones(len(x), 1, dtype=torch.bool)
    changes = value[:, 1:] != value[:, :-1]
    first = torch.where(torch.cat([edge, changes], 1), place, 0).cummax(1).values
    last = torch.where(torch.cat([changes, edge], 1), place, x.shape[1]).flip(1).cummin(1).values.flip(1)
    return torch.empty_like(x).scatter(1, order, (first + last).to(x) / 2)


def rank_p(values: Tensor, null: Tensor) -> Tensor:
    """Return p of values [C] under null values [K, C or 1]: (1 + number of null values at least as large) / (1 + K)."""
    return (1 + (null >= values - 1e-12).sum(0)).double() / (1 + len(null))


def false_discovery_rate(p: Tensor) -> Tensor:
    """Return q values [n] (Benjamini & Hochberg 1995).

    At most 5 % of the tests with q ≤ 0.05 are expected to be false positives.
    A NaN in p means that there was no test; its q is NaN.
    """
    q, tested = torch.full_like(p, torch.nan), p.isfinite().nonzero().flatten()
    if len(tested):
        order = tested[p[tested].argsort(stable=True)]
        steps = p[order] * len(order) / torch.arange(1, len(order) + 1)
        q[order] = steps.flip(0).cummin(0).values.flip(0)
    return q


def format_percent(row: Summary, unit: str = "%") -> str:
    """Format a row of `describe` in percent, or a difference in points, as `mean [low, high]`, for the log."""
    if row["mean"] is None:
        return "–"
    mean, low, high = (
        None if value is None else f"{100 * value:.0f}".replace("-0", "0")
        for value in (row["mean"], row["low"], row["high"])
    )
    return f"{mean} {unit}" if low is None else f"{mean} {unit} [{low}, {high}]"


@dataclass(frozen=True)
class Difference:
    """Mean of one setting minus that of another, with its 95% interval and two-sided p; n: number of values each."""

    mean: float
    low: float
    high: float
    p: float
    paired: bool
    n: tuple[int, int]


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference | None:
    """Test the difference between two settings, given their values by seed.

    Returns None if a test is impossible: fewer than two values, or values without spread.
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

    The substitution t = √freedom · cot(v²) turns the tail of the density into an integral of 2v · sin(v²)^(freedom − 1)
    from 0 to √arccot(|t| / √freedom), which Gauss–Legendre quadrature computes to rounding error.
    """
    end = math.sqrt(math.atan2(math.sqrt(freedom), abs(t)))
    nodes, weights = _quadrature_rule(100)
    v = (nodes + 1) * end / 2
    tail = float((weights * np.sin(v**2) ** (freedom - 1) * 2 * v).sum()) * end / 2
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return min(1.0, 2 * scale * tail)


@functools.cache  # paired tests of a sweep have the same degrees of freedom
def t_quantile(freedom: float, p: float = LEVEL) -> float:
    """Return the t statistic that has the two-sided p `p`."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_test(middle, freedom) > p else (low, middle)
    return high


def holm(p: Sequence[float]) -> list[float]:
    """Return p corrected for multiple tests, so that any false positive is less likely than the level (Holm 1979)."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, p[place] * (len(p) - rank)))
        corrected[place] = largest
    return corrected
