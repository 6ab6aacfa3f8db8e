"""What the network asks of the hardware, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from zfnet.benchmark.peaks import Peaks, roofline_seconds, training_flops
from zfnet.model.zfnet import ZFNet
from zfnet.training.device import Runtime

PLAN = Runtime(torch.device("cpu"), "fp32", True, False, False)


@pytest.fixture(scope="module")
def model() -> ZFNet:
    with torch.device("meta"):
        return ZFNet()


def test_training_flops_are_those_of_the_layers(model: ZFNet) -> None:
    # multiply-adds of conv1 … fc8 for one 224 px image; conv1 has no gradient with respect to the image
    forward = [
        110 * 110 * 96 * 7 * 7 * 3,
        26 * 26 * 256 * 5 * 5 * 96,
        13 * 13 * 384 * 3 * 3 * 256,
        13 * 13 * 384 * 3 * 3 * 384,
        13 * 13 * 256 * 3 * 3 * 384,
    ]
    linear = [9216 * 4096, 4096 * 4096, 4096 * 10]
    expected = 2 * (2 * forward[0] + 3 * sum(forward[1:]) + 3 * sum(linear))
    assert training_flops(model) == expected
    assert expected / 1e9 == pytest.approx(6.642, abs=0.001)


def test_roofline_is_compute_bound_on_a_slow_processor_and_memory_bound_on_slow_memory(model: ZFNet) -> None:
    slow_processor = roofline_seconds(model, 32, PLAN, Peaks(0.25, 1e9))
    assert slow_processor == pytest.approx(32 * training_flops(model) / 0.25e12, rel=1e-6)
    slow_memory = roofline_seconds(model, 1, PLAN, Peaks(1e9, 10.0))
    parameters = sum(p.numel() for p in model.parameters())
    assert slow_memory > parameters * (7 + 3) * 4 / 10e9  # optimizer, and weights read in three products
