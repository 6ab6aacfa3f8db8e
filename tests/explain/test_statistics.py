"""Statistics of the analyses against closed forms and simulated data."""

from __future__ import annotations

import pytest
import torch

from zfnet.explain.statistics import clustered, describe, false_discovery_rate, own_and_others, rank_correlation, rank_p


def test_describe_one_convention_and_nothing_for_one_value() -> None:
    row = describe(torch.tensor([1.0, 2, 6, torch.nan]))
    assert (row["n"], row["mean"]) == (3, 3)
    assert row["std"] == pytest.approx(7**0.5)  # the sample's: ((−2)² + (−1)² + 3²) / 2
    assert 1 <= row["low"] < 3 < row["high"] <= 6
    assert describe(torch.tensor([4.0])) == {"n": 1, "mean": 4, "std": None, "low": None, "high": None}
    assert describe(torch.tensor([torch.nan]))["mean"] is None


def test_describe_the_interval_holds_the_mean_19_times_of_20() -> None:
    torch.manual_seed(0)
    rows = [describe(torch.randn(40)) for _ in range(200)]
    assert 0.88 < sum(row["low"] <= 0 <= row["high"] for row in rows) / 200 < 0.99


def test_own_and_others_leaves_the_own_partner_out() -> None:
    table = torch.tensor([[1.0, 0.5, 0.0], [0.2, 0.8, 0.0], [0.4, 0.4, 0.4]])
    result = own_and_others(table)
    assert result["own"]["mean"] == pytest.approx(2.2 / 3)
    assert result["others"]["mean"] == pytest.approx((0.25 + 0.1 + 0.4) / 3)
    assert result["difference"]["mean"] == pytest.approx((0.75 + 0.7 + 0) / 3)
    assert own_and_others(torch.ones(1, 1))["difference"]["n"] == 0


def test_rank_p_counts_the_value_itself() -> None:
    null = torch.arange(19.0)[:, None]
    assert rank_p(torch.tensor([99.0, 18.0, 9.0, -1.0]), null).tolist() == pytest.approx([0.05, 0.1, 0.55, 1])


def test_false_discovery_rate_by_hand() -> None:
    p = torch.tensor([0.04, 0.01, 0.03, 0.5], dtype=torch.float64)
    assert false_discovery_rate(p).tolist() == pytest.approx([0.16 / 3, 0.04, 0.16 / 3, 0.5])


def test_rank_correlation_counts_what_the_mask_shows() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 20, 30, generator=generator)
    mask = torch.rand(20, 30, generator=generator) < 0.5
    found = rank_correlation(a, b, mask)
    alone = torch.cat([rank_correlation(x[m][None], y[m][None]) for x, y, m in zip(a, b, mask, strict=True)])
    torch.testing.assert_close(found, alone)
    torch.testing.assert_close(rank_correlation(a, torch.where(mask, a.exp(), b), mask), torch.ones(20).double())
    assert rank_correlation(a, mask.float(), mask).isnan().all()


def test_clustered_error_is_that_of_the_clusters() -> None:
    values, clusters = torch.tensor([1.0, 2.0, 4.0, 7.0]).double(), torch.tensor([5, 6, 7, 8])
    row = clustered(values, clusters)
    assert row["se"] == pytest.approx(float(values.std(correction=1)) / 2)  # each its own: the usual error
    repeated = clustered(values.repeat_interleave(10), clusters.repeat_interleave(10))
    assert repeated["se"] == pytest.approx(row["se"])  # ten copies tell nothing new
    assert (repeated["n"], repeated["clusters"], repeated["mean"]) == (40, 4, 3.5)
    gap = clustered(torch.tensor([1.0, torch.nan]), torch.tensor([0, 1]))
    assert (gap["n"], gap["mean"], gap["se"]) == (1, 1.0, None)
    assert clustered(torch.tensor([torch.nan]), torch.tensor([0]))["mean"] is None
