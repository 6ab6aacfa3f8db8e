"""The rates of single layers."""

from __future__ import annotations

import sys

from benchmarks import layers


def test_main_times_each_layer_in_both_formats(monkeypatch, capsys) -> None:
    monkeypatch.setattr(layers, "matmul_peak", lambda _: 1e11)
    words = ["experiment=quickstart", "data.batch_size=2", "trainer.device=cpu", "trainer.precision=fp32"]
    monkeypatch.setattr(sys, "argv", ["layers.py", *words])
    layers.main()
    first, _, _, *rows = capsys.readouterr().out.splitlines()
    assert first.endswith("batches of 2; TFLOP/s, a large matrix product 0.100")
    names = [row.split("  ")[0] for row in rows]
    assert names[:2] == ["conv1, NHWC", "conv2, NHWC"]
    assert names.count("together, NHWC") == names.count("together, NCHW") == 1
    assert len(names) == 2 * (names.index("together, NHWC") + 1)
    assert max(map(len, rows)) <= 80
