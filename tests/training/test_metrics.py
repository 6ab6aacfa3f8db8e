"""Metrics summed over batches, compared with the same metrics computed at once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zfnet.training.metrics import DIVERGED_LOSS, EvaluationSums, RunningMetrics

CPU = torch.device("cpu")


def random_logits(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, generator=generator), torch.randint(classes, (count,), generator=generator)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 12), st.integers(0, 1000))
def test_evaluation_does_not_depend_on_batches(sizes: list[int], classes: int, seed: int) -> None:
    logits, labels = random_logits(sum(sizes), classes, seed)
    sums = EvaluationSums()
    for part, truth in zip(logits.split(sizes), labels.split(sizes), strict=True):
        sums.add(part, truth)
    evaluation = sums.result()
    assert evaluation.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-5)
    assert evaluation.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    rank = (logits > logits.gather(1, labels[:, None])).sum(1)
    # with five classes or fewer, top5 would always be 1
    assert evaluation.top5 == (pytest.approx((rank < 5).double().mean().item()) if classes > 5 else None)
    assert torch.equal(evaluation.predictions, logits.argmax(1))
    torch.testing.assert_close(evaluation.confidences, logits.softmax(1).amax(1))
    confusion = torch.zeros(classes, classes, dtype=torch.long)
    for truth, guess in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        confusion[truth, guess] += 1
    assert torch.equal(evaluation.confusion(), confusion)
    for label, value in enumerate(evaluation.per_class()):
        members = labels == label
        if not members.any():
            assert value is None
        else:
            assert value == pytest.approx((logits.argmax(1)[members] == label).double().mean().item())


def test_half_precision_logits_are_measured_in_single() -> None:
    logits, labels = random_logits(64, 10)
    sums = EvaluationSums()
    sums.add(logits.bfloat16(), labels)
    assert sums.result().loss == pytest.approx(F.cross_entropy(logits.bfloat16().float(), labels).item())


def test_running_means_weigh_batches_by_their_size() -> None:
    logits, labels = random_logits(25, 4)
    metrics = RunningMetrics(CPU)
    for step, part in enumerate((slice(0, 10), slice(10, 20), slice(20, 25))):
        losses = F.cross_entropy(logits[part], labels[part], reduction="sum")
        metrics.add(losses, (logits[part].argmax(1) == labels[part]).sum(), len(labels[part]), step)
    loss, accuracy, bad = metrics.read()
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert bad is None
    metrics.reset()
    assert metrics.read() == (0.0, 0.0, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2 * DIVERGED_LOSS])
def test_the_first_lost_step_is_remembered(value: float) -> None:
    metrics = RunningMetrics(CPU)
    for step, loss in enumerate((1.0, 0.99 * DIVERGED_LOSS, value, 1.0, value)):
        metrics.add(torch.tensor(5 * loss), torch.tensor(3), 5, step)
    metrics.reset()  # a new epoch resets the sums, but not the diverged step
    assert metrics.read()[2] == 2
