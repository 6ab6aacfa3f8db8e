"""Pooling switches: a worked example, the adjoint identity, and dead windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zfnet.explain.windows import DEAD_WINDOWS, pool_with_switches, unpool, window_of


def test_pool_with_switches_worked_example() -> None:
    """The 9 in the middle of 5×5 cells is the maximum of three 3×3 windows at stride 2, so it gets three signals."""
    x = torch.tensor([[1.0, 2, 3, 0, 1], [0, 1, 0, 2, 0], [2, 0, 9, 0, 3], [1, 0, 0, 1, 0], [0, 5, 1, 0, 9.5]])[
        None, None
    ]
    pool = nn.MaxPool2d(3, 2)
    pooled, switches = pool_with_switches(x, pool)
    assert pooled[0, 0].tolist() == [[9, 9], [9, 9.5]]
    # bit 3·dy + dx is cell (dy, dx) of each window
    assert switches[0, 0].tolist() == [[1 << 8, 1 << 6], [1 << 2, 1 << 8]]
    back = unpool(torch.tensor([[1.0, 10], [100, 1000]])[None, None], switches, window_of(pool))
    expected = torch.zeros(5, 5)
    expected[2, 2], expected[4, 4] = 111, 1000
    assert torch.equal(back[0, 0], expected)


def test_pool_with_switches_dead_windows() -> None:
    x = torch.zeros(1, 1, 3, 5)
    x[0, 0, 1, 4] = 7.0
    pool = nn.MaxPool2d(3, 2)
    one = torch.ones(1, 1, 1, 2)
    back = {rule: unpool(one, pool_with_switches(x, pool, rule)[1], window_of(pool))[0, 0] for rule in DEAD_WINDOWS}
    assert back["mask"].nonzero().tolist() == [[1, 4]]
    assert back["first"].nonzero().tolist() == [[0, 0], [1, 4]]
    assert back["all"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 1], [1, 1, 1, 0, 0]]


@settings(max_examples=80, deadline=None)
@given(
    size=st.tuples(st.integers(9, 13), st.integers(9, 13)),
    kernel=st.tuples(st.integers(2, 5), st.integers(2, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.integers(0, 1),
    spacing=st.integers(1, 2),
    ceil=st.booleans(),
    channels_last=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_unpool_first_is_autograds_choice_and_the_adjoint(
    size, kernel, stride, padding, spacing, ceil, channels_last, seed
) -> None:
    """On maps with many ties and dead windows, unpooling equals autograd's gradient of the pooling."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 3, (2, 3, *size), generator=generator).double().clamp(min=0)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    for pool in (nn.MaxPool2d(kernel, stride, padding, spacing, ceil_mode=ceil), nn.MaxPool2d(3, 2, padding)):
        expected_pooled = pool(x)
        pooled, switches = pool_with_switches(x.detach(), pool)
        assert torch.equal(pooled, expected_pooled)
        signal = torch.randn(pooled.shape, generator=generator, dtype=torch.float64)
        expected = torch.autograd.grad(expected_pooled, x, signal)[0]
        back = F.pad(unpool(signal, switches, window_of(pool)), (0, 9, 0, 9))
        back = back[:, :, padding : padding + size[0], padding : padding + size[1]]
        torch.testing.assert_close(back, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 1])
def test_pool_with_switches_never_point_into_the_padding(padding: int) -> None:
    x = torch.zeros(1, 1, 6, 6)
    pool = nn.MaxPool2d(3, 2, padding, ceil_mode=True)
    for rule in DEAD_WINDOWS:
        pooled, switches = pool_with_switches(x, pool, rule)
        back = unpool(torch.ones_like(pooled), switches, window_of(pool))
        inside = back[:, :, padding : padding + 6, padding : padding + 6]
        assert back.sum() == inside.sum()


def test_unpool_is_undone_by_pooling_without_overlap() -> None:
    x = torch.rand(1, 4, 8, 8)
    pool = nn.MaxPool2d(2, 2)
    pooled, switches = pool_with_switches(x, pool)
    assert torch.equal(pool(unpool(pooled, switches, window_of(pool))), pooled)
