"""job=benchmark: one command, a table, a JSON file and a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
        assert row["zfnet_is_faster_by"] == pytest.approx(ours["median"] / speed)
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
