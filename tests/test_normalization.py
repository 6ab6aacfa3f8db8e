"""Local response normalisation against PyTorch's, and its gradient against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from zfnet.model.layers import LocalResponseNorm


def _noise(*shape: int, scale: float = 20.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "alpha", "beta", "k"), [(5, 1e-4, 0.75, 2.0), (3, 1e-2, 0.5, 1.0), (1, 0.1, 0.75, 1.0)]
)
@pytest.mark.parametrize("channels", [1, 2, 7, 96])
def test_equals_pytorchs(size: int, alpha: float, beta: float, k: float, channels: int) -> None:
    """PyTorch's α multiplies the mean of the squares, Krizhevsky's and ours the sum."""
    theirs = nn.LocalResponseNorm(size, alpha * size, beta, k)
    ours = LocalResponseNorm(size, alpha, beta, k)
    x, y = _noise(2, channels, 3, 4).requires_grad_(), _noise(2, channels, 3, 4).requires_grad_()
    weight = torch.rand(2, channels, 3, 4, dtype=torch.float64)
    a, b = ours(x), theirs(y)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("beta", "k"), [(0.75, 2.0), (0.5, 1.0)])
def test_gradient_is_right(beta: float, k: float) -> None:
    x = _noise(2, 6, 2, 2, scale=2.0).requires_grad_()
    assert torch.autograd.gradcheck(LocalResponseNorm(5, 0.1, beta, k), (x,))


def test_by_hand() -> None:
    """Map c of a column of maps sees c−2 … c+2."""
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 6, 1, 1)
    y = LocalResponseNorm(size=5, alpha=0.5, beta=0.75, k=2.0)(x).flatten()
    for c in range(6):
        total = sum((j + 1) ** 2 for j in range(max(0, c - 2), min(6, c + 3)))
        assert y[c].item() == pytest.approx((c + 1) * (2 + 0.5 * total) ** -0.75, rel=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_normalised_in_single(autocast: bool) -> None:
    """Under bf16 autocast as a convolution would hand it over; backward too, which runs outside autocast."""
    x = _noise(1, 8, 2, 2).bfloat16().requires_grad_()
    y = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        a = LocalResponseNorm()(x)
    b = LocalResponseNorm()(y)
    assert torch.equal(a, b)
    a.sum().backward()
    b.sum().backward()
    assert torch.equal(x.grad, y.grad.bfloat16())


def test_an_even_size_is_refused() -> None:
    with pytest.raises(ValueError, match="size=4: must be odd"):
        LocalResponseNorm(4)
