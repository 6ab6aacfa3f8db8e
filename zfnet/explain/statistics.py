"""Statistics that the analyses share.

One convention everywhere: `std` is the sample's standard deviation (ddof=1), which one value alone does not have;
`low` and `high` are the ends of a 95 % bootstrap interval of the mean (percentiles, what is counted in `n` is drawn).
"""

from __future__ import annotations

import torch
from torch import Tensor

_RESAMPLES = 2000
_ROWS = 16  # that are ranked at once


def describe(values: Tensor) -> dict[str, float | int | None]:
    """Return n, mean, std, low and high of values [n]; what is not finite does not count; None for want of them."""
    known = values.detach().cpu().double().flatten()
    known = known[known.isfinite()]
    count = len(known)
    row: dict[str, float | int | None] = {"n": count, "mean": None, "std": None, "low": None, "high": None}
    if count:
        row["mean"] = float(known.mean())
    if count > 1:
        drawn = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(0))
        low, high = known[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        row |= {"std": float(known.std(correction=1)), "low": low, "high": high}
    return row


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
    """Return mean, standard error, n and the number of clusters of values [n]; what is not finite does not count.

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


def rank_correlation(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return Spearman's correlation of each row pair of a, b [U, …] (ties: mean rank); NaN where one is constant.

    mask: bool, broadcast to [U, …], what counts (None: all). float64 [U], on the CPU.
    """
    return (standard_ranks(a, mask) * standard_ranks(b, mask)).sum(1)


def standard_ranks(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the ranks of each row of x [U, …], of mean 0 and length 1: their products are rank correlations.

    float64 [U, …flat], on the CPU; 0 where the mask is False, NaN where a row is constant.
    """
    found = []
    for start in range(0, len(x), _ROWS):  # some at a time: each step keeps several copies
        part = x[start : start + _ROWS].detach().cpu()
        known = torch.ones_like(part, dtype=torch.bool)
        if mask is not None:
            known = mask[start : start + _ROWS].expand_as(part)
        part, known = part.flatten(1).double(), known.flatten(1)
        ranks = _ranks(part.masked_fill(~known, torch.inf))
        mean = (ranks * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
        centred = (ranks - mean) * known
        norm = centred.norm(dim=1, keepdim=True)
        found.append(centred / torch.where(norm > 0, norm, torch.nan))
    return torch.cat(found) if found else torch.zeros(0, 0, dtype=torch.float64)


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
    """Return q values [n] (Benjamini & Hochberg 1995): of the tests with q ≤ 0.05, 5 % are expected to be false."""
    order = p.argsort(stable=True)
    steps = p[order] * len(p) / torch.arange(1, len(p) + 1)
    return torch.empty_like(p).scatter(0, order, steps.flip(0).cummin(0).values.flip(0)) if len(p) else p


def percent(row: dict[str, float | int | None]) -> str:
    """Return `mean [low, high]` of a row of `describe` in percent, as a line of the log shows it."""
    if row["mean"] is None:
        return "–"
    interval = "" if row["low"] is None else f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"  # type: ignore[operator]
    return f"{100 * row['mean']:.0f} %{interval}"
