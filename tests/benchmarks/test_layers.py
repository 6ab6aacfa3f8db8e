"""The rates of single layers."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
import torch

from benchmarks import layers
from tests.helpers import compose, tiny_model_config
from zfnet.jobs.benchmark import flops_per_image
from zfnet.model.build import build_model
from zfnet.model.zfnet import ZFNet
from zfnet.training.device import resolve_runtime

WORDS = ("experiment=quickstart", "data.batch_size=3", "trainer.device=cpu", "trainer.precision=fp32")


@pytest.mark.parametrize("network", ["", "model.norm=batch"])
def test_time_layers_counts_the_operations_of_a_training_step(network: str) -> None:
    config = compose(*WORDS, *network.split())
    size = config.data.image_size
    parts = dict(layers.time_layers(config, resolve_runtime(config.trainer)))
    names = ["conv1, NHWC", "conv1, NCHW", "conv2, NHWC"]
    assert list(parts)[:3] == names
    assert list(parts)[-1] == "fc8"
    counted = sum(p.operations for name, pair in parts.items() if "NHWC" not in name for p in pair)
    model = build_model(config.model, 10, size)
    assert counted == 3 * flops_per_image(model, torch.randn(2, 3, size, size))
    assert all(p.seconds > 0 for pair in parts.values() for p in pair)


def test_main_prints_a_table(monkeypatch, capsys) -> None:
    monkeypatch.setattr(layers, "matmul_peak", lambda _: 1e11)
    monkeypatch.setattr(layers, "ROUNDS", 2)
    monkeypatch.setattr(sys, "argv", ["layers.py", *WORDS])
    layers.main()
    first, second, _, _, *rows = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"pooling before ReLU: \d\.\d{3} times as fast \(quartiles of 2 rounds: \d\.\d{3}, \d\.\d{3}\)", rows.pop()
    )
    assert first.endswith("batches of 3")
    assert second == "GFLOP/s; a large matrix product 100.0"
    assert [row.split("  ")[0] for row in rows][:2] == ["conv1, NHWC", "conv1, NCHW"]
    assert max(map(len, rows)) <= 80


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"norm": "lrn"}, {"norm": "batch", "pooling": "ceil"}])
def test_pooling_before_relu_changes_no_bit(changes: dict[str, Any], precision: torch.dtype) -> None:
    torch.manual_seed(0)
    model = ZFNet(3, 68, tiny_model_config(dropout=0.0, **changes))
    images, labels = torch.randn(6, 3, 68, 68), torch.arange(6) % 3
    order = layers.pool_before_relu(model.steps)
    assert order != model.steps

    def gradients(steps: list[str]) -> list[torch.Tensor]:
        model.steps = steps
        model.zero_grad()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = model(images)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        return [logits, *(p.grad.clone() for p in model.parameters())]

    fast, plain = (gradients(steps) for steps in (order, model.steps))
    assert all(torch.equal(a, b) for a, b in zip(fast, plain, strict=True))
    assert all(gradient.any() for gradient in fast)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["data.batch_sze=3"], "data.batch_sze"), (["model.conv1.kernel_size=99"], "conv1 receives 64×64 pixels")],
)
def test_main_refuses_in_one_line(words: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["layers.py", *WORDS, *words])
    with pytest.raises(SystemExit) as end:
        layers.main()
    assert str(end.value.code).startswith("error: ")
    assert message in str(end.value.code)
    assert "\n" not in str(end.value.code)
