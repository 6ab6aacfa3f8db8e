"""Muon, compared with the singular value decomposition and with PyTorch's SGD; and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.helpers import assert_resumes_exactly, compose_checked
from zfnet.training.build import build_optimizer
from zfnet.training.muon import Muon, orthogonalized


def oracle(matrix: torch.Tensor, steps: int) -> torch.Tensor:
    """Apply the polynomial to the singular values, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(8, 27), (27, 8), (12, 12), (1, 5), (5, 1)])
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_orthogonalized_maps_singular_values_and_keeps_their_vectors(shape: tuple[int, int], steps: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    torch.testing.assert_close(orthogonalized(matrix, steps).double(), oracle(matrix, steps), rtol=1e-4, atol=1e-4)


def test_orthogonalized_makes_singular_values_about_one_whatever_they_were() -> None:
    matrix = torch.randn(16, 40, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -1, 40))
    values = torch.linalg.svdvals(orthogonalized(matrix, 5))
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert orthogonalized(torch.zeros(3, 4), 5).eq(0).all()  # no gradient, no step


def test_a_step_is_momentum_then_orthogonalisation_then_decay() -> None:
    torch.manual_seed(0)
    start, grads = torch.randn(6, 2, 1, 2), [torch.randn(6, 2, 1, 2) for _ in range(3)]
    weight = nn.Parameter(start.clone().contiguous(memory_format=torch.channels_last))
    optimizer = Muon([weight], lr=0.1, momentum=0.6, weight_decay=0.5, steps=3)
    expected, buffer = start.double(), torch.zeros(6, 2, 1, 2).double()
    for grad in grads:
        weight.grad = grad.contiguous(memory_format=torch.channels_last)
        optimizer.step()
        buffer = 0.6 * buffer + grad
        step = oracle((grad + 0.6 * buffer).flatten(1), 3).reshape(expected.shape) * (6 / 4) ** 0.5
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * step
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.7])
@pytest.mark.parametrize("nesterov", [True, False])
def test_biases_and_excepted_weights_take_steps_of_sgd(momentum: float, nesterov: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.full((4,), 0.5)), nn.Parameter(torch.full((3, 4), 0.5))] for _ in range(2))
    groups = [{"params": ours[:1]}, {"params": ours[1:], "orthogonalize": False}]
    settings = {"lr": 0.1, "momentum": momentum, "weight_decay": 0.01}
    optimizers = (
        Muon(groups, nesterov=nesterov, **settings),
        torch.optim.SGD(theirs, nesterov=nesterov and momentum > 0, **settings),
    )
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = torch.randn(one.shape)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_the_recipe_orthogonalises_convolutions_only() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    groups = build_optimizer(compose_checked("optimizer=muon", "optimizer.lr=0.2"), model).param_groups
    assert [({p.ndim for p in g["params"]}, g["lr"], g["orthogonalize"]) for g in groups] == [
        ({4}, 0.2, True),
        ({1}, 0.1, True),  # Muon does not orthogonalise one-dimensional weights
        ({2}, 0.1, False),
    ]


def test_muon_resumes_exactly(tmp_path: Path) -> None:
    words = ("optimizer=muon", "scheduler=onecycle", "scheduler.warmup_epochs=0.5", "model.norm=batch")
    assert_resumes_exactly(tmp_path, (3, 11), *words)
