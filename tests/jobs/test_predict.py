"""job=predict: the same preprocessing as in training, all file formats, and reports of unreadable files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import load_for_job, read_csv
from zfnet.data.decode import read_image
from zfnet.data.shapes import draw_shapes
from zfnet.jobs.predict import Prediction, predict, prediction_rows, prediction_table
from zfnet.runs.directory import RunDirectory
from zfnet.training.loop import evaluate


def test_predict_agrees_with_evaluate(tiny_run, tmp_path: Path) -> None:
    run = load_for_job(tiny_run)
    test = run.split("test")
    evaluation = evaluate(run.model, run.batches(test), run.runtime, "test")
    images = []
    for n, pixels in enumerate(test.pixels(range(len(test))).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{n:02d}.png")
        images.append(str(tmp_path / f"{n:02d}.png"))
    predictions = list(predict(run, images, top=10, batch_size=20))
    assert [p.error for p in predictions] == [None] * len(test)
    assert [run.classes.index(p.best[0][0]) for p in predictions] == evaluation.predictions.tolist()
    probabilities = torch.tensor([p.best[0][1] for p in predictions])
    torch.testing.assert_close(probabilities, evaluation.confidences)
    for p in predictions:
        assert sum(value for _, value in p.best) == pytest.approx(1, abs=1e-5)


def test_file_formats_show_the_same_picture(tmp_path: Path) -> None:
    upright = Image.fromarray(draw_shapes(1, 64, part=1).images[0])
    exif = Image.Exif()
    exif[0x0112] = 6  # display it rotated by 90° clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.convert("RGBA").save(tmp_path / "alpha.png")
    upright.save(tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (64, 64))])
    upright.convert("CMYK").save(tmp_path / "print.tif")
    wanted = np.asarray(upright).astype(int)
    for name, most in (("turned.png", 0), ("alpha.png", 0), ("print.tif", 1), ("moving.gif", 60)):
        seen = np.asarray(read_image(tmp_path / name)).astype(int)
        assert np.abs(seen - wanted).max() <= most, name
    grey = np.asarray(upright.convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert np.abs(np.asarray(read_image(tmp_path / "deep.png"))[..., 0] - grey / 257).max() <= 1


@pytest.mark.drawn
def test_predict_job_reports_unreadable_images_and_does_the_rest(run_py, tiny_run, tmp_path: Path) -> None:
    Image.new("RGB", (30, 90), "red").save(tmp_path / "tall $x_{y.png")
    (tmp_path / "bad.jpg").write_text("not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "tall $x_{y.png").read_bytes()[:60])
    answer = run_py(
        "job=predict", f"run={tiny_run.folder}", f"images=[{tmp_path},gone.png,{'a' * 300},file:///etc/passwd]",
        "job.top=2", "hydra.run.dir=p",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    written = json.loads(Path("p/predictions.json").read_text())
    assert [i["image"] for i in written["images"]] == [str(tmp_path / "tall $x_{y.png")]
    assert len(written["images"][0]["predictions"]) == 2
    unread = {Path(i["image"]).name: i["error"] for i in written["unreadable"]}
    assert unread["gone.png"] == unread["a" * 300] == "there is no such file"
    assert unread["bad.jpg"].startswith("not an image of a known format (JPEG, ")
    assert unread["passwd"] == "file: is not supported, only http and https"
    assert "cut.png" in unread
    assert "1 of 6 images" in answer.out
    assert "tall $x_{y.png: data.fit=crop keeps the central 33%" in answer.out
    assert Path("p/figures/predictions.png").stat().st_size > 5000
    (row,) = read_csv("p/predictions.csv")
    best = written["images"][0]["predictions"][0]
    assert (row["image"], row["predicted"]) == (written["images"][0]["image"], best["class"])
    assert row["probability"] == row[f"P({best['class']})"]
    assert float(row["probability"]) == pytest.approx(best["probability"], rel=1e-5)
    assert written["weights_sha256"] == tiny_run.read_json("results.json")["weights_sha256"]


def test_predict_keeps_pictures_of_the_first_readable_images(tiny_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.predict.SHOWN", 3)
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    images = ["gone.png"] * 5 + [str(tmp_path / "good.png")] * 5
    predictions = list(predict(load_for_job(tiny_run), images, top=1, batch_size=2))
    assert [p.error is None for p in predictions] == [False] * 5 + [True] * 5
    assert [p.picture is not None for p in predictions[5:]] == [True, True, True, False, False]


def test_predict_job_fails_where_no_image_is_readable(run_py, tiny_run, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("not an image")
    answer = run_py("job=predict", f"run={tiny_run.folder}", "images=bad.jpg", "hydra.run.dir=p")
    assert (answer.code, "none can be read: bad.jpg: not an image" in answer.err) == (1, True)
    assert RunDirectory("p").state == "failed"
    answer = run_py("job=predict", f"run={tiny_run.folder}", "images=[a.png,b.png]")
    assert (answer.code, "a.png: there is no such file, and 1 more" in answer.err) == (1, True)
    answer = run_py("job=predict", f"run={tiny_run.folder}")
    assert (answer.code, "job=predict needs images" in answer.err) == (1, True)
    assert not list(tmp_path.glob("outputs/*/*"))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data=cifar100", "data=cifar100: job=predict reads only images=[…], not a data set; leave it out"),
        ("data.subset=5", "data.subset=5: job=predict reads only images=[…], not a data set"),
        ("data.store_size=16", "data.store_size=16: job=predict reads only images=[…], not a data set"),
        ("job.top=11", "job.top=11: the run has 10 classes"),
    ],
)
def test_predict_job_refuses_overrides_without_effect(
    run_py, tiny_run, tmp_path: Path, word: str, expected: str
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    answer = run_py("job=predict", f"run={tiny_run.folder}", "images=good.png", word)
    assert answer.code == 1
    assert answer.err.startswith(f"error: {expected}")
    assert not (tmp_path / "outputs").exists()


def test_prediction_rows_of_equally_probable_classes_show_the_one_that_counted() -> None:
    (row,) = prediction_rows(["x.png"], torch.tensor([[0.5, 0.5]]), ["a", "b"], [0], [1])
    assert row["predicted"] == "b"


def test_prediction_rows_leave_out_columns_that_would_be_too_many(monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.predict.MOST_COLUMNS", 1)
    (row,) = prediction_rows(["x.png"], torch.tensor([[0.25, 0.75]]), ["a", "b"], [0])
    expected = {"image": "x.png", "true": "a", "predicted": "b", "probability": "0.75", "probability_of_true": "0.25"}
    assert row == expected


@pytest.mark.parametrize("top", [1, 3, 5])
def test_prediction_table_keeps_to_its_width(top: int) -> None:
    classes = [("a class with a rather long name of its own", 0.5), ("b", 0.25), ("c", 0.1), ("d", 0.05), ("e", 0)]
    many = [Prediction("folder/" * 20 + "cat\x1b[31m.png", classes[:top]), Prediction("x.png", classes[:top])]
    for predictions in (many, many[1:]):
        lines = prediction_table(predictions, 80)
        assert max(map(len, lines)) <= 80
        assert all(line.isprintable() for line in lines)
        text = "\n".join(lines)
        assert text.count("%") == top * len(predictions)
