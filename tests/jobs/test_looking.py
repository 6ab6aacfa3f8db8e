"""The jobs that look inside a network, as commands: what they write, and what they say to bad input."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.explain.trained import Trained
from zfnet.data import Splits
from zfnet.data.shapes import draw_shapes
from zfnet.explain.attribution import METHODS
from zfnet.explain.selection import part_to_show
from zfnet.runs.directory import RunDirectory
from zfnet.runs.weights import load_model
from zfnet.training.callbacks import list_snapshots

QUICK = ("trainer.threads=1",)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_occlusion_of_image_files(run_py, tiny_run: RunDirectory, tmp_path: Path) -> None:
    picture = tmp_path / "a, b.png"  # a name that a careless table would tear apart
    Image.new("RGB", (50, 80), "red").save(picture)
    answer = run_py(
        "job=occlusion", f"run={tiny_run.folder}", f"images=['{picture}']", "job.patch=30", "job.stride=30",
        "hydra.run.dir=out", *QUICK,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    metadata = json.loads(Path("out/occlusion.json").read_text())
    rows = read_csv(Path("out/maps.csv"))
    assert len(rows) == 9
    assert metadata["images"][0]["class_is_the_truth"] is False
    assert metadata["images"][0]["lowest_probability"] == min(float(r["probability"]) for r in rows)
    assert "a, b.png" in rows[0]["image"]
    assert "boxes" not in metadata
    assert Image.open("out/figures/occlusion.png").width > 1000
    assert RunDirectory("out").state == "done"


def test_invariance_writes_every_point_that_it_draws(run_py, tiny_run: RunDirectory) -> None:
    answer = run_py(
        "job=invariance", f"run={tiny_run.folder}", "job.count=2", "job.mean_images=6", "job.steps=3",
        "job.split=test", "hydra.run.dir=out", *QUICK,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    rows = read_csv(Path("out/curves.csv"))
    assert len(rows) == (2 + 6) * 4 * 3
    metadata = json.loads(Path("out/invariance.json").read_text())
    assert metadata["layers"] == ["conv1", "fc7"]
    for row in rows:
        scaled = float(row["distance_fc7"]) / metadata["distance_between_two_images"]["fc7"]
        assert float(row["canonical_fc7"]) == pytest.approx(scaled, rel=1e-5)
        if float(row["amount"]) == (1 if row["transform"] == "scale" else 0):
            assert row["distance_conv1"] == row["distance_fc7"] == "0.0"
    assert Image.open("out/figures/invariance.png").width > 1000


def test_evolution_names_each_maps_strongest_image_at_each_epoch(run_py, trained: Trained) -> None:
    answer = run_py(
        "job=evolution", f"run={trained.run.folder}", "job.split=test", "job.layers=[conv1,conv5]", "job.maps=3",
        "job.probe_images=20", "hydra.run.dir=out", *QUICK,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    rows = read_csv(Path("out/strongest.csv"))
    assert len(rows) == 3 * (12 + 48)
    early, _ = load_model(list_snapshots(trained.run.snapshots)[3])
    with torch.no_grad():
        peaks = early.activations(trained.inputs, ["conv5"])["conv5"].amax((2, 3))
    for row in rows:
        if row["layer"] == "conv5" and row["epoch"] == "3":
            number = int(row["map"])
            assert float(row["activation"]) == pytest.approx(float(peaks[:, number].max()), rel=1e-4)
            assert float(peaks[int(row["image"]), number]) == pytest.approx(
                float(row["activation"]), rel=1e-4
            )
    steps = read_csv(Path("out/steadiness.csv"))
    assert [(r["previous"], r["epoch"]) for r in steps] == [("1", "3")] * 2 + [("3", "6")] * 2
    last = [r for r in steps if r["epoch"] == "6"]
    assert all(r["correlation_with_previous"] == r["correlation_of_previous_with_last"] for r in last)
    assert Image.open("out/figures/evolution.png").width > 500
    assert Path("out/figures/steadiness.png").exists()


def test_filters_of_two_runs_stand_side_by_side(run_py, tiny_run: RunDirectory, trained: Trained) -> None:
    answer = run_py(
        "job=filters",
        f"run={tiny_run.folder}",
        f"job.other={trained.run.folder}",
        "hydra.run.dir=out",
        *QUICK,
    )
    assert answer.code == 0, answer.err
    metadata = list(json.loads(Path("out/filters.json").read_text())["runs"].values())
    assert [f["filters"] for f in metadata] == [32, 12]
    rows = read_csv(Path("out/filters.csv"))
    assert len(rows) == 44
    assert max(float(r["rms"]) for r in rows[32:]) == pytest.approx(metadata[1]["rms"]["max"])
    weight = load_model(trained.run.weights)[0].conv1.weight.detach()
    assert metadata[1]["rms"]["max"] == pytest.approx(
        float(weight.square().mean((1, 2, 3)).max().sqrt()), rel=1e-5
    )
    assert Image.open("out/figures/filters.png").width > 1000


def test_correspondence_of_shapes_and_of_a_table_of_points(
    run_py, tiny_run: RunDirectory, tmp_path: Path
) -> None:
    words = ("job=correspondence", f"run={tiny_run.folder}", "job.permutations=20", *QUICK)
    answer = run_py(*words, "job.split=test", "job.count=30", "hydra.run.dir=out")
    assert answer.code == 0, answer.err
    rows = read_csv(Path("out/correspondence.csv"))
    assert [r["part"] for r in rows] == [
        *(f"{v} {h}" for v in ("upper", "lower") for h in ("left", "right")),
        "same place",
        "random",
    ] * 2
    assert {r["layer"] for r in rows} == {"conv5", "fc7"}
    assert Image.open("out/figures/correspondence.png").width > 500

    for name, size in (("a.png", (80, 60)), ("b.png", (64, 64))):
        Image.effect_noise(size, 90).save(tmp_path / name)
    table = tmp_path / "points.csv"
    table.write_text("image,part,x,y\na.png,eye,40,20\na.png,nose,50,40\nb.png,eye,30,20\nb.png,nose,31,45\n")
    answer = run_py(*words, f"job.points={table}", "hydra.run.dir=own")
    assert answer.code == 0, answer.err
    metadata = json.loads(Path("own/correspondence.json").read_text())
    assert list(metadata["table"]["fc7"]) == ["eye", "nose", "same place", "random"]
    assert metadata["images"] == 2


def test_attribution_writes_its_maps(run_py, tiny_run: RunDirectory) -> None:
    pytest.importorskip("captum")
    answer = run_py(
        "job=attribution", f"run={tiny_run.folder}", "job.count=2", "job.steps=8", "job.split=test",
        "hydra.run.dir=out", *QUICK,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    rows = read_csv(Path("out/attribution.csv"))
    assert [r["method"] for r in rows[::2]] == list(METHODS)
    maps = load_file("out/maps.safetensors")
    for row in rows:
        assert 0 < float(row["box_area"]) < 1
    assert float(rows[0]["sum"]) == pytest.approx(float(maps["deconvnet"][0].sum()), rel=1e-4)
    assert Image.open("out/figures/attribution.png").width > 1000


def test_attribution_without_captum_says_how_to_get_it(run_py, tiny_run: RunDirectory, monkeypatch) -> None:
    for name in ("captum", "captum.attr"):
        monkeypatch.setitem(sys.modules, name, None)
    answer = run_py("job=attribution", f"run={tiny_run.folder}", "hydra.run.dir=out", *QUICK)
    assert (answer.code, answer.err) == (
        1,
        "error: job=attribution needs captum: pip install -e '.[explain]'\n",
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("asked", "has_validation", "shown"),
    [("auto", True, "validation"), ("auto", False, "test"), ("train", False, "train")],
)
def test_auto_shows_validation_images_or_else_test_images(
    asked: str, has_validation: bool, shown: str
) -> None:
    parts = {name: draw_shapes(10, 16, k) for k, name in enumerate(("train", "validation", "test"))}
    splits = Splits(parts["train"], parts["validation"] if has_validation else None, parts["test"], "")
    used: Any = SimpleNamespace(
        splits=lambda: splits,
        split=lambda name, s: getattr(s, name),
        config=SimpleNamespace(job=SimpleNamespace(split=asked)),
    )
    found = part_to_show(used)
    assert found.name == shown
    assert found.images is parts[shown]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["job=occlusion"], "job=occlusion needs run=<dir>"),
        (["job=occlusion", "job.layer=conv9"], "job.layer=conv9: no such layer; did you mean 'conv5'?"),
        (["job=occlusion", "job.layer=fc7"], "job.layer=fc7: no such layer; known: conv1"),
        (["job=occlusion", "job.patch=64"], "job.patch=64: the occluder must be smaller than the image"),
        (["job=occlusion", "job.patch=8", "job.stride=9"], "job.stride=9: must be at most job.patch=8"),
        (["job=occlusion", "job.split=tset"], "job.split=tset: must be one of auto, train, validation, test"),
        (["job=occlusion", "job.fill=300"], "job.fill=300.0: must be at most 255"),
        (["job=occlusion", "images=[nope.jpg]"], "nope.jpg: there is no such file"),
        (["job=invariance", "job.layers=[conv1,fc9]"], "job.layers=fc9: no such layer; did you mean 'fc"),
        (["job=evolution"], "job=evolution needs run=<dir>"),
        (["job=evolution", "job.layers=[conv6]"], "job.layers=conv6: no such layer; did you mean 'conv5'?"),
        (["job=evolution", "job.split=test"], "train with 'trainer.snapshots=[1,2,5,10]'"),
        (["job=filters", "job.other=nowhere"], "run=nowhere: there is no run"),
        (["job=correspondence", "job.points=no.csv"], "job.points=no.csv cannot be read"),
        (["job=correspondence", "job.count=1"], "job.count=1: must be at least 2"),
        (["job=invariance", "job.steps=1"], "job.steps=1: must be at least 2"),
    ],
)
def test_bad_input_gets_one_line(run_py, tiny_run: RunDirectory, words: list[str], expected: str) -> None:
    given = words if len(words) == 1 else [*words, f"run={tiny_run.folder}"]
    answer = run_py(*given, "hydra.run.dir=out", *QUICK)
    assert answer.code == 1
    assert answer.err.count("\n") == 1, answer.err
    assert expected in answer.err
    assert not Path("out").exists()


def test_the_run_that_is_read_is_not_written_to(run_py, tiny_run: RunDirectory) -> None:
    before = sorted(p.name for p in tiny_run.folder.iterdir())
    answer = run_py("job=occlusion", f"run={tiny_run.folder}", f"hydra.run.dir={tiny_run.folder}", *QUICK)
    assert answer.code == 1
    assert "is not empty and holds a run: choose another directory" in answer.err
    assert sorted(p.name for p in tiny_run.folder.iterdir()) == before
