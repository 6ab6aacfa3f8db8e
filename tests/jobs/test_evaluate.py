"""Evaluating: a run's own figures again, to the bit; other images by the names of their classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import used
from zfnet.data.shapes import CLASSES, draw_shapes
from zfnet.plots.results import results_of
from zfnet.runs.directory import RunDirectory
from zfnet.training.loop import evaluate


def test_the_runs_own_splits_give_its_own_figures(run_py, tiny_run, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr("zfnet.jobs.evaluate.draw_results", lambda *given: drawn.append(given))
    recorded = tiny_run.read_json("results.json")
    answer = run_py("job=evaluate", f"run={tiny_run.folder}", "hydra.run.dir=e")
    assert answer.code == 0, answer.err
    assert RunDirectory("e").read_json("results.json")["test"] == recorded["test"]
    assert RunDirectory("e").state == "done"
    ((_, shown, part),) = drawn
    assert shown.accuracy == recorded["test"]["accuracy"]
    assert len(part) == 50
    run = used(tiny_run)
    found = evaluate(run.model, run.batches(run.split("validation")), run.runtime, "validation")
    assert results_of(found, run.classes) == recorded["validation"]


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """The first 40 test images as files; class folders in alphabetical order, as folders are."""
    drawn = draw_shapes(40, 64, part=1)
    for n, label in enumerate(drawn.labels.tolist()):
        folder = tmp_path / "gallery" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.images[n]).save(folder / f"{n:02d}.png")
    return tmp_path / "gallery"


def test_classes_of_a_folder_are_matched_by_name(tiny_run, gallery: Path) -> None:
    folder = used(tiny_run, "data=folder", f"data.root={gallery}")
    assert folder.data.image_size == 64  # the run's, though conf/data/folder.yaml says 224
    part = folder.split("all")
    assert len(part) == 40
    own = used(tiny_run)
    same = own.split("test").take(torch.arange(40))
    by_folder = evaluate(folder.model, folder.batches(part), folder.runtime, "folder")
    by_run = evaluate(own.model, own.batches(same), own.runtime, "run")
    assert by_folder.confusion().tolist() == by_run.confusion().tolist()
    assert by_folder.loss == pytest.approx(by_run.loss, rel=1e-5)


def test_all_is_every_image_once(tiny_run) -> None:
    run = used(tiny_run)
    splits = run.splits()
    part = run.split("all", splits)
    assert splits.validation is not None
    assert splits.test is not None
    assert len(part) == 250
    pixels = part.pixels(range(250))
    assert len(pixels.flatten(1).unique(dim=0)) == 250
    assert torch.equal(pixels[-50:], splits.test.pixels(range(50)))
    assert torch.equal(part.labels[-50:], splits.test.labels)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.dropout=0.5"], "model.dropout=…: job=evaluate uses the network and the weights"),
        (["optimizer=sgd"], "optimizer=…: job=evaluate uses"),
        (["data.image_size=128"], "data.image_size=128: the run's network takes images of 64 px"),
        (["job.split=dev"], "job.split=dev: must be one of test, validation, train, all"),
        (["job.tta=mirror"], "job.tta=mirror: must be one of none, flip, tencrop"),
        (["data=folder", "data.root=strange"], "its class 'cat' is not one of run="),
    ],
)
def test_one_line_and_nothing_written(run_py, tiny_run, tmp_path: Path, words, expected) -> None:
    for kind in ("cat", "dog"):
        (tmp_path / "strange" / kind).mkdir(parents=True)
        for n in range(5):
            Image.new("RGB", (64, 64)).save(tmp_path / "strange" / kind / f"{n}.png")
    answer = run_py("job=evaluate", f"run={tiny_run.folder}", *words)
    assert answer.code == 1
    assert expected in answer.err
    assert answer.err.count("\n") == 1
    assert not list(tmp_path.glob("outputs/*/*"))


def test_views_are_averaged_in_the_job(run_py, tiny_run, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.evaluate.draw_results", lambda *_: None)
    answer = run_py("job=evaluate", f"run={tiny_run.folder}", "job.tta=tencrop", "hydra.run.dir=t")
    assert answer.code == 0, answer.err
    found = RunDirectory("t").read_json("results.json")
    assert found["tta"] == "tencrop"
    assert found["test"]["loss"] != tiny_run.read_json("results.json")["test"]["loss"]
