"""The benchmark's comparison of two sets of projections, and of maps that have none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import projections
from benchmarks.projections import TOLERANCE, compare, time_projections
from tests.explain.networks import network, random_inputs
from zfnet.config.errors import UserError


def test_compare_returns_the_largest_difference_and_counts_units_apart() -> None:
    theirs = torch.rand(5, 3, 4, 4, dtype=torch.float64)
    theirs[1, 2, 3, 0] = -8  # the largest pixel
    ours = theirs.clone()
    ours[0, 0, 0, 0] += 8 * 0.9 * TOLERANCE
    ours[2, 1, 2, 3] -= 8 * 1.1 * TOLERANCE
    ours[4] += 8 * 50 * TOLERANCE
    result = compare(ours, theirs)
    assert result["difference"] == pytest.approx(50 * TOLERANCE)
    assert result["units_apart"] == 2


def test_time_projections_names_a_layer_without_active_maps() -> None:
    pytest.importorskip("captum.attr")
    model = network()
    torch.nn.init.constant_(model.conv3.bias, -1e6)
    with pytest.raises(UserError, match="1 maps of conv3: none is active in the 2 images"):
        time_projections(model, random_inputs(model), maps=1, rounds=1)


def test_projections_agree_through_contrast_normalisation() -> None:
    pytest.importorskip("captum.attr")
    model = network("lrn")
    rows = time_projections(model, random_inputs(model), maps=1, rounds=1)
    assert max(row["difference"] for row in rows) < 1e-9


def test_main_times_projections_beside_captum_and_they_agree(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("captum.attr")
    words = "data=shapes model=small data.image_size=64 data.store_size=32 data.train_images=20 data.test_images=10"
    options = f"--maps 2 --count 2 --rounds 1 --output {tmp_path}"
    monkeypatch.setattr(sys, "argv", ["projections.py", *words.split(), *options.split()])
    projections.main()
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if "written" not in line) <= 80
    result = json.loads((tmp_path / "projections.json").read_text())
    assert [row["layer"] for row in result["layers"]] == ["conv1", "conv2", "conv3", "conv4", "conv5"]
    assert max(row["difference"] for row in result["layers"]) < 1e-5
    assert [row["units_apart"] for row in result["layers"]] == [0] * 5
    total = result["all_maps_top_9"]
    assert total["projections"] == 9 * (32 + 64 + 96 + 96 + 64)
    assert total["ratio"] == pytest.approx(total["captum_seconds"] / total["zfnet_seconds"])
    for row in result["layers"]:
        assert row[f"{row['best']}_seconds"] == min(row[f"{name}_seconds"] for name in projections.RIVALS)
        assert row["ratio_to_best"] <= row["ratio"]
