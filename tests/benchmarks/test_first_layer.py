"""The ways to compute the first layer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import first_layer
from tests.helpers import tiny_model_config
from zfnet.config.errors import UserError
from zfnet.config.schema import Conv
from zfnet.model.zfnet import ZFNet

WORDS = ("experiment=quickstart", "data.batch_size=3", "trainer.device=cpu", "trainer.precision=fp32")


@pytest.mark.parametrize("size", [65, 68])
@pytest.mark.parametrize(("kernel", "padding"), [(4, 0), (4, 1), (5, 0), (5, 2), (7, 1)])
def test_all_ways_compute_the_same_layer(size: int, kernel: int, padding: int, monkeypatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    torch.manual_seed(0)
    model = ZFNet(3, size, tiny_model_config(conv1=Conv(4, kernel, 2, padding, True))).double()
    images = torch.randn(first_layer.GROUP + 3, 3, size, size, dtype=torch.float64)

    def results(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        output = call(images)
        return [output, *torch.autograd.grad(output.square().sum(), list(model.conv1.parameters()))]

    calls = first_layer.ways(model)
    expected = results(lambda x: model.pool1(model.relu1(model.conv1(x))))
    assert len(calls) == 6
    for name, call in calls.items():
        for result, value in zip(results(call), expected, strict=True):
            torch.testing.assert_close(result, value, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "changes", [{"norm": "batch"}, {"conv1": Conv(4, 7, 4, 1, True)}, {"conv1": Conv(4, 7, 2, 1, False)}]
)
def test_ways_refuses_another_first_layer(changes: dict[str, Any]) -> None:
    model = ZFNet(3, 200, tiny_model_config(**changes))
    with pytest.raises(UserError, match="conv1 must have stride 2, ReLU and pooling"):
        first_layer.ways(model)


def test_main_prints_a_table(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(first_layer, "ROUNDS", 2)
    monkeypatch.setattr(sys, "argv", ["first_layer.py", *WORDS])
    first_layer.main()
    title, _, _, *rows = capsys.readouterr().out.splitlines()
    assert title.endswith("batches of 3, 2 rounds")
    assert [row.split("  ")[0] for row in rows] == list(first_layer.ways(ZFNet()))
    assert rows[0].split()[-2:] == ["1.00×", "0"]
    assert max(map(len, rows)) <= 80


@pytest.mark.parametrize(
    ("words", "message"), [(["data.batch_sze=3"], "data.batch_sze"), (["model=zfnet_bn"], "no normalisation")]
)
def test_main_refuses_in_one_line(words: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["first_layer.py", *WORDS, *words])
    with pytest.raises(SystemExit) as end:
        first_layer.main()
    assert str(end.value.code).startswith("error: ")
    assert message in str(end.value.code)
    assert "\n" not in str(end.value.code)
