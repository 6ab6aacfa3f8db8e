"""job=evaluate: bit-identical results on a run's own data, other images by class name, test-time augmentation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.helpers import TINY, compose, load_for_job, read_csv
from zfnet import ZFNet
from zfnet.data.shapes import CLASSES, draw_shapes
from zfnet.jobs.evaluate import MeanOfViews, data_for_tencrop, wrong_by_confidence
from zfnet.plots.results import results_of
from zfnet.runs.directory import RunDirectory
from zfnet.training.loop import evaluate
from zfnet.training.metrics import Evaluation


def test_evaluate_repeats_the_runs_own_results(run_py, tiny_run, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr("zfnet.jobs.evaluate.draw_results", lambda *given: drawn.append(given))
    recorded = tiny_run.read_json("results.json")
    answer = run_py("job=evaluate", f"run={tiny_run.folder}", "hydra.run.dir=e")
    assert answer.code == 0, answer.err
    assert RunDirectory("e").read_json("results.json")["test"] == recorded["test"]
    assert RunDirectory("e").state == "done"
    ((_, shown, images, what),) = drawn
    assert what == "test"
    assert shown.accuracy == recorded["test"]["accuracy"]
    assert len(images) == 50
    run = load_for_job(tiny_run)
    evaluation = evaluate(run.model, run.batches(run.split("validation")), run.runtime, "validation")
    assert results_of(evaluation, run.classes) == recorded["validation"]


def test_evaluate_lists_every_prediction_and_draws_the_worst_first(run_py, tiny_run, gallery, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr("zfnet.jobs.evaluate.save_figure", lambda figure, path: drawn.append(path.name))
    words = ["data=folder", f"data.root={gallery}", "job.split=all", "hydra.run.dir=e"]
    assert run_py("job=evaluate", f"run={tiny_run.folder}", *words).code == 0
    rows = read_csv("e/predictions.csv")
    confusion = torch.zeros(10, 10, dtype=torch.long)
    for row in rows:
        assert Path(row["image"]).parent.name == row["true"]
        assert Path(row["image"]).is_file()
        values = {c: float(row[f"P({c})"]) for c in CLASSES}
        assert sum(values.values()) == pytest.approx(1, abs=1e-4)
        assert float(row["probability"]) == values[row["predicted"]] == max(values.values())
        assert float(row["probability_of_true"]) == values[row["true"]]
        confusion[CLASSES.index(row["true"]), CLASSES.index(row["predicted"])] += 1
    assert confusion.tolist() == RunDirectory("e").read_json("results.json")["all"]["confusion"]
    assert drawn == ["worst.png"]


def test_worst_is_the_most_confident_mistake() -> None:
    predictions, labels = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 1])
    confidences = torch.tensor([0.99, 0.6, 0.9, 0.7])
    assert wrong_by_confidence(Evaluation(0, 0, 0, predictions, confidences, labels, 2)).tolist() == [2, 3, 1]
    assert wrong_by_confidence(Evaluation(0, 0, 0, labels, confidences, labels, 2)).tolist() == []


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Write the first 40 test images as files in class folders, whose order is alphabetical."""
    drawn = draw_shapes(40, 64, part=1)
    for n, label in enumerate(drawn.labels.tolist()):
        folder = tmp_path / "gallery" / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.images[n]).save(folder / f"{n:02d}.png")
    return tmp_path / "gallery"


def test_evaluate_matches_a_folders_classes_by_name(tiny_run, gallery: Path) -> None:
    folder = load_for_job(tiny_run, "data=folder", f"data.root={gallery}")
    assert folder.data.image_size == 64  # the run's value; conf/data/folder.yaml says 224
    images = folder.split("all")
    assert len(images) == 40
    own = load_for_job(tiny_run)
    same = own.split("test").take(torch.arange(40))
    by_folder = evaluate(folder.model, folder.batches(images), folder.runtime, "folder")
    by_run = evaluate(own.model, own.batches(same), own.runtime, "run")
    assert by_folder.confusion().tolist() == by_run.confusion().tolist()
    assert by_folder.loss == pytest.approx(by_run.loss, rel=1e-5)


def test_split_all_is_every_image_once(tiny_run) -> None:
    run = load_for_job(tiny_run)
    splits = run.splits
    images = run.split("all")
    assert splits.validation is not None
    assert splits.test is not None
    assert len(images) == 250
    pixels = images.pixels(range(250))
    assert len(pixels.flatten(1).unique(dim=0)) == 250
    assert torch.equal(pixels[-50:], splits.test.pixels(range(50)))
    assert torch.equal(images.labels[-50:], splits.test.labels)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model.dropout=0.5"], "model.dropout=0.5: job=evaluate uses the network and the weights"),
        (["optimizer=sgd"], "optimizer=sgd: job=evaluate uses"),
        (["data.image_size=128"], "data.image_size=128: the run's network expects images of 64 px"),
        (["job.split=dev"], "job.split=dev: must be one of test, validation, train or all"),
        (["job.tta=mirror"], "job.tta=mirror: must be one of none, flip, flip_shift or tencrop"),
        (["data=folder", "data.root=strange"], "its class 'cat' is not one of run="),
    ],
)
def test_evaluate_refuses_in_one_line_and_writes_nothing(run_py, tiny_run, tmp_path: Path, words, expected) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "strange" / name).mkdir(parents=True)
        for n in range(5):
            Image.new("RGB", (64, 64)).save(tmp_path / "strange" / name / f"{n}.png")
    answer = run_py("job=evaluate", f"run={tiny_run.folder}", *words)
    assert expected in answer.error
    assert not list(tmp_path.glob("outputs/*/*"))


def test_evaluate_averages_the_views_of_tta(run_py, tiny_run) -> None:
    answer = run_py("job=evaluate", f"run={tiny_run.folder}", "job.tta=tencrop", "hydra.run.dir=t")
    assert answer.code == 0, answer.err
    results = RunDirectory("t").read_json("results.json")
    assert results["tta"] == "tencrop"
    assert results["test"]["loss"] != tiny_run.read_json("results.json")["test"]["loss"]


def network() -> ZFNet:
    torch.manual_seed(0)
    return ZFNet(10, 64, compose(*TINY).model).eval()


def test_tencrop_averages_corners_centre_and_mirror_images() -> None:
    model, images = network(), torch.randn(3, 3, 74, 74)
    views = []
    for top, left in ((0, 0), (0, 10), (10, 0), (10, 10), (5, 5)):
        crop = images[:, :, top : top + 64, left : left + 64]
        views += [crop, crop.flip(3)]
    with torch.no_grad():
        expected = torch.stack([model(v).softmax(1) for v in views]).mean(0).log()
        torch.testing.assert_close(MeanOfViews(model, "tencrop", 64)(images), expected)


def test_flip_gives_mirror_images_equal_outputs() -> None:
    model, images = network(), torch.randn(2, 3, 64, 64)
    flip = MeanOfViews(model, "flip", 64)
    with torch.no_grad():
        torch.testing.assert_close(flip(images), flip(images.flip(3)))
        expected = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
        torch.testing.assert_close(flip(images), expected.log())
        assert not torch.allclose(model(images), model(images.flip(3)))


@pytest.mark.parametrize("shift", [1, 3])
def test_flip_shift_weighs_two_diagonal_shifts_as_much_as_none(shift: int) -> None:
    model, images = network(), torch.randn(2, 3, 64, 64)
    reflected = torch.cat([images[:, :, 1 : shift + 1].flip(2), images, images[:, :, -shift - 1 : -1].flip(2)], 2)
    padded = torch.cat([reflected[..., 1 : shift + 1].flip(3), reflected, reflected[..., -shift - 1 : -1].flip(3)], 3)
    moved = [padded[:, :, :64, :64], padded[:, :, 2 * shift :, 2 * shift :]]
    with torch.no_grad():
        plain, *others = (sum(model(v).softmax(1) / 2 for v in (x, x.flip(3))) for x in (images, *moved))
        expected = (plain / 2 + sum(others) / 4).log()
        torch.testing.assert_close(MeanOfViews(model, "flip_shift", 64, shift)(images), expected)


def test_flip_shift_takes_images_of_one_pixel() -> None:
    images = torch.randn(2, 3, 1, 1)
    views = MeanOfViews(torch.nn.Flatten(), "flip_shift", 1)(images)  # all views equal the image
    torch.testing.assert_close(views, images.flatten(1).log_softmax(1))


def test_data_for_tencrop_enlarges_images_by_the_crop() -> None:
    data = compose(*TINY).data
    assert data_for_tencrop(data, 64, 0.875).image_size == 73  # 64 / 0.875
    larger = data_for_tencrop(dataclasses.replace(data, crop_size=32), 64, 0.875)
    assert (larger.image_size, larger.crop_size) == (128, None)  # 32 of 64 pixels
