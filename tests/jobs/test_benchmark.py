"""job=benchmark: one command, a table, a JSON file and a figure."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch

WORDS = ("job=benchmark", "model=small", "data=shapes", "data.image_size=64", "data.store_size=32")
SIZES = ("data.train_images=20", "data.test_images=10", "data.batch_size=8", "job.rounds=1", "job.steps=2")


def test_times_itself_beside_another_loop(run_py, tmp_path: Path) -> None:
    answer = run_py(*WORDS, *SIZES, "hydra.run.dir=b")
    assert answer.code == 0, answer.err
    assert max(len(line) for line in answer.out.splitlines()) <= 80
    result = json.loads((tmp_path / "b/benchmark.json").read_text())
    ours, *others = result["contenders"]
    assert ours["name"] == "zfnet"
    assert "torchvision reference" in [o["name"] for o in others]
    for row in result["contenders"]:
        speed = row["images_per_second"][0]
        assert row["median"] == speed
        assert row["first_is_faster_by"] == pytest.approx(ours["median"] / speed)
    assert 0 < result["data_share"] < 1
    assert 0 < result["share_of_matmul_peak"] < 1
    assert (tmp_path / "b/figures/benchmark.png").stat().st_size > 5000


def test_a_batch_larger_than_the_data_is_named(run_py) -> None:
    answer = run_py(*WORDS, *SIZES, "data.batch_size=100")
    assert answer.code == 1
    assert answer.err.startswith("error: data.batch_size=100: there are only 18 training images")


def test_times_projections_beside_captum_and_they_agree(run_py, tmp_path: Path) -> None:
    words = ("job.subject=deconvnet", "job.maps=2", "job.count=2", "hydra.run.dir=p")
    answer = run_py(*WORDS, *SIZES, *words)
    assert answer.code == 0, answer.err
    assert max(len(line) for line in answer.out.splitlines()) <= 80
    result = json.loads((tmp_path / "p/benchmark.json").read_text())
    assert [row["layer"] for row in result["layers"]] == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    assert max(row["difference"] for row in result["layers"]) < 1e-5
    assert [row["units_apart"] for row in result["layers"]] == [0] * 5
    total = result["all_maps_top_9"]
    assert total["projections"] == 9 * (32 + 64 + 96 + 96 + 64)
    assert total["ratio"] == pytest.approx(total["captum_seconds"] / total["zfnet_seconds"])


def test_each_decision_beside_its_alternative(run_py, tmp_path: Path, monkeypatch) -> None:
    # the compiler's front half is enough here: the other half takes a minute
    monkeypatch.setattr("zfnet.training.state.torch.compile", partial(torch.compile, backend="eager"))
    answer = run_py(
        *WORDS, *SIZES, "job.subject=choices", "model.norm=lrn", "trainer.precision=fp32", "hydra.run.dir=c"
    )
    assert answer.code == 0, answer.err
    assert max(len(line) for line in answer.out.splitlines()) <= 80
    result = json.loads((tmp_path / "c/benchmark.json").read_text())
    assert [row["name"] for row in result["contenders"]] == [
        *("as chosen", "exact", "NCHW", "bf16", "compiled", "optimizer not fused", "pooling first"),
        *("PyTorch's LRN", "memory given back"),
    ]
    assert "torch.compile: took" in result["compile"]["words"]
    assert (tmp_path / "c/figures/benchmark.png").stat().st_size > 5000


def test_records_against_none(run_py, tmp_path: Path) -> None:
    answer = run_py(*WORDS, *SIZES, "job.subject=records", "trainer.epochs=2", "hydra.run.dir=r")
    assert answer.code == 0, answer.err
    result = json.loads((tmp_path / "r/benchmark.json").read_text())
    without, within = result["contenders"]
    assert result["share_of_an_epoch"] == pytest.approx(1 - within["median"] / without["median"])
    assert f"records take {result['share_of_an_epoch']:.2%} of an epoch" in answer.out


def test_a_folder_decoded_once_beside_every_time(run_py, tmp_path: Path) -> None:
    answer = run_py(*WORDS, *SIZES, "job.subject=folder", "job.pictures=40", "hydra.run.dir=f")
    assert answer.code == 0, answer.err
    assert max(len(line) for line in answer.out.splitlines()) <= 80
    result = json.loads((tmp_path / "f/benchmark.json").read_text())
    assert [row["name"] for row in result["contenders"]] == ["from the cache", "decoded by Pillow"]
    assert 0 < result["decoding"]["share_of_cores"] < 1.05


@pytest.mark.slow
def test_the_first_step_and_the_overhead_of_a_sweep(run_py, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.benchmark.start.JOBS", 2)
    answer = run_py(*WORDS, *SIZES, "job.subject=start", "hydra.run.dir=s")
    assert answer.code == 0, answer.err
    result = json.loads((tmp_path / "s/benchmark.json").read_text())
    assert 0 < result["first_step_begins"][0] < result["first_step_ends"][0] < 200
    assert len(result["sweep_adds_per_job"]) == len(result["job_aside_from_its_epochs"]) == 1
    assert "job.rounds=1" not in result["command_words"]
    bad = run_py(*WORDS, *SIZES, "job.subject=start", "data=folder", "data.root=nowhere")
    assert bad.code == 1
    assert bad.err.startswith("error: no step was taken: data.root=nowhere: there is no such folder")
