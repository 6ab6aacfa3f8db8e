"""Stateless random numbers: functions of a key and an index, uniform and independent of one another."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zfnet.config.randomness import SOURCE, make_key, permutation, randint, random_bits, uniform

N = 200_000


def test_numbers_have_not_changed() -> None:
    """A change of the mixing function would change every run that was ever recorded."""
    assert make_key(0) == 3684207846
    assert make_key(1, 2, 3) == 2830053080
    assert random_bits(make_key(7), torch.arange(3)).tolist() == [443929090, 1468630360, 3875501903]


def test_a_number_depends_on_its_index_alone() -> None:
    whole = uniform(make_key(3), torch.arange(1000))
    assert torch.equal(whole[617:801], uniform(make_key(3), torch.arange(617, 801)))
    shuffled = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(whole[shuffled], uniform(make_key(3), shuffled))


def test_the_key_may_be_a_tensor() -> None:
    index = torch.arange(50)
    assert torch.equal(random_bits(torch.tensor(make_key(5)), index), random_bits(make_key(5), index))


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_kernel_for_gpus_computes_the_same(tmp_path: Path) -> None:
    """Compile the kernel's source as C; a GPU runs the same code for each entry."""
    source = SOURCE.replace("template <typename T> ", "typedef long long T;\n")
    (tmp_path / "k.c").write_text(source)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", "k.so", "k.c"], cwd=tmp_path, check=True)
    kernel = ctypes.CDLL(str(tmp_path / "k.so")).random_bits
    kernel.argtypes, kernel.restype = [ctypes.c_longlong] * 2, ctypes.c_longlong
    index = torch.cat([torch.arange(100), torch.arange(100) * 42_949_673, torch.tensor([2**32 - 1])])
    for key in (0, make_key(3), 2**32 - 1):
        assert [kernel(i, key) for i in index.tolist()] == random_bits(key, index).tolist()


def test_uniform_is_uniform() -> None:
    x = uniform(make_key(1), torch.arange(N))
    assert x.min() >= 0
    assert x.max() < 1
    counts = torch.histc(x, bins=100, min=0, max=1)
    chi2 = ((counts - N / 100) ** 2 / (N / 100)).sum()
    assert chi2 < 160  # 99 degrees of freedom: 1 in 10,000 uniform samples exceeds this
    # neighbours under one key, and equal indices under neighbouring keys, are uncorrelated
    other = uniform(make_key(2), torch.arange(N))
    for y in (x.roll(1), other):
        assert abs(torch.corrcoef(torch.stack([x, y]))[0, 1]) < 5 / N**0.5


@pytest.mark.parametrize("high", [1, 2, 7, 1000])
def test_randint_covers_its_range_evenly(high: int) -> None:
    x = randint(make_key(4), torch.arange(N), high)
    assert x.min() == 0
    assert x.max() == high - 1
    counts = torch.bincount(x, minlength=high).double()
    assert ((counts - N / high) ** 2 / (N / high)).sum() < high + 6 * (2 * high) ** 0.5


def test_every_part_of_a_key_and_its_place_matter() -> None:
    keys = {make_key(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(keys) >= 8000 - 5  # 32 bits: 0.007 collisions expected
    assert make_key(1, 0) != make_key(0, 1) != make_key(1)
    assert make_key(5) != make_key(5 + 2**32)  # seeds above 32 bits give different keys


@given(st.integers(0, 2**63 - 1), st.integers(1, 300))
def test_permutation_has_each_index_once(key: int, n: int) -> None:
    assert permutation(make_key(key), n).sort().values.tolist() == list(range(n))


def test_permutations_differ_and_put_each_anywhere() -> None:
    orders = torch.stack([permutation(make_key(0, epoch), 10) for epoch in range(3000)])
    assert len({tuple(order) for order in orders.tolist()}) > 2990  # out of 3.6 million possible orders
    for place in range(10):
        counts = torch.bincount(orders[:, place], minlength=10)
        assert ((counts - 300) ** 2 / 300).sum() < 34  # 9 degrees of freedom, 1 in 10,000


def test_the_global_generator_is_not_touched() -> None:
    before = torch.random.get_rng_state()
    permutation(make_key(0), 100)
    uniform(make_key(0), torch.arange(5))
    assert torch.equal(before, torch.random.get_rng_state())
