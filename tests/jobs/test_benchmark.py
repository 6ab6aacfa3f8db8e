"""job=benchmark: its table, JSON file and figure."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers import TINY_EXACT, compose
from zfnet.data import load_splits
from zfnet.jobs.benchmark import PHASES, TrainingSteps, flops_per_image, matmul_peak
from zfnet.model.zfnet import ZFNet
from zfnet.training.callbacks import EMA
from zfnet.training.device import resolve_runtime

MODEL = ("model=small", *(word for word in TINY_EXACT if word.startswith("model.")))
WORDS = ("job=benchmark", *MODEL, "data=shapes", "data.image_size=64", "data.store_size=32")
SIZES = ("data.train_images=20", "data.test_images=10", "data.batch_size=8", "job.rounds=2", "job.steps=2")


@pytest.mark.drawn
def test_benchmark_times_the_step_and_its_phases(run_py, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.benchmark.matmul_peak", lambda _: 1e12)
    averaged = []
    real = EMA.on_optimizer_step
    monkeypatch.setattr(EMA, "on_optimizer_step", lambda self, state: averaged.append(real(self, state)))
    answer = run_py(*WORDS, *SIZES, "trainer.ema=0.9", "hydra.run.dir=b")
    assert answer.code == 0, answer.err
    assert len(averaged) >= 2 * 2 + 2  # in the rounds and in the phases
    assert max(len(line) for line in answer.out.splitlines()) <= 80
    result = json.loads((tmp_path / "b/benchmark.json").read_text())
    assert "faster" not in answer.out
    (row,) = result["contenders"]
    assert row["name"] == "as chosen"
    assert row["median"] == pytest.approx(sum(row["images_per_second"]) / 2)
    assert list(result["breakdown_seconds"]) == list(PHASES)
    assert min(result["breakdown_seconds"].values()) > 0
    assert 0 < result["waiting_share"] < 1
    assert result["share_of_matmul_peak"] == pytest.approx(result["tflop_per_second"])
    assert (tmp_path / "b/figures/benchmark.png").stat().st_size > 5000


def test_matmul_peak_is_the_rate_of_the_fastest_product(monkeypatch) -> None:
    products, seconds = [], iter([2.0, 0.5, *[1.0] * 8])
    monkeypatch.setattr("zfnet.jobs.benchmark.time_call", lambda call, _: products.append(call) or next(seconds))
    assert matmul_peak(resolve_runtime(compose(*TINY_EXACT).trainer)) == 2 * 2048**3 / 0.5
    assert len(products) == 10
    assert products[0]().shape == (2048, 2048)


def test_the_steps_of_a_warm_up_do_not_count(monkeypatch) -> None:
    config = compose(*TINY_EXACT)
    runtime, images = resolve_runtime(config.trainer), load_splits(config.data).train
    steps = TrainingSteps("ours", config, runtime, images)
    real, calls = steps.batches.epoch, []

    def slow_at_first(epoch: int):
        for number, batch in enumerate(real(epoch)):
            calls.append(number)
            time.sleep(0.5 if number < 2 else 0)
            yield batch

    monkeypatch.setattr(steps.batches, "epoch", slow_at_first)
    steps.time_turn(3, warmup=2)
    assert len(calls) >= 5
    assert steps.steps_taken == 3
    assert 0 < steps.data_wait < 0.5
    steps.time_turn(1, warmup=2)
    assert steps.steps_taken == 4


@pytest.mark.drawn
@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_benchmark_times_each_choice_beside_its_alternative(
    capability: str, run_py, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("zfnet.jobs.benchmark.matmul_peak", lambda _: 1e11)
    # the compiler's frontend is enough here; its backend takes a minute
    monkeypatch.setattr("zfnet.training.state.torch.compile", partial(torch.compile, backend="eager"))
    words = ("job.subject=choices", "model.norm=lrn", "trainer.precision=fp32", "hydra.run.dir=c")
    answer = run_py(*WORDS, *SIZES, *words)
    assert answer.code == 0, answer.err
    assert max(len(line) for line in answer.out.splitlines()) <= 80
    rows = json.loads((tmp_path / "c/benchmark.json").read_text())["contenders"]
    names = ["as chosen", "trainer=exact", "exact in bf16", "NCHW", "bf16", "compiled"]
    assert [row["name"] for row in rows] == [n for n in names if capability == "AVX512" or "bf16" not in n]
    assert ("bf16 is not timed" in answer.out) == (capability == "AVX2")
    for row in rows:
        ratios = [a / b for a, b in zip(rows[0]["images_per_second"], row["images_per_second"], strict=True)]
        assert row["first_is_faster_by"] == pytest.approx(sum(ratios) / 2)
        assert row["first_step_seconds"] > 0
    assert (tmp_path / "c/figures/benchmark.png").stat().st_size > 5000


def test_benchmark_names_a_batch_larger_than_the_data(run_py) -> None:
    answer = run_py(*WORDS, *SIZES, "data.batch_size=100")
    assert answer.code == 1
    assert answer.err.startswith("error: data.batch_size=100: there are only 18 training images")


def test_flops_per_image_are_those_of_the_layers() -> None:
    with torch.device("meta"):
        model, images = ZFNet(), torch.empty(2, 3, 224, 224)
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
    assert flops_per_image(model, images) == expected
    assert expected / 1e9 == pytest.approx(6.642, abs=0.001)
