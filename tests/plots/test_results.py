"""Figures for any number of classes: not blank, and equal for equal input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import random_images
from zfnet.data.images import image_set
from zfnet.plots.figures import save_figure
from zfnet.plots.results import (
    draw_confusion,
    draw_curves,
    draw_per_class,
    draw_samples,
    log_per_class,
    log_result,
    results_of,
)
from zfnet.training.metrics import Evaluation, EvaluationSums


def evaluation_of(count: int, classes: int) -> Evaluation:
    sums, generator = EvaluationSums(), torch.Generator().manual_seed(0)
    sums.add(torch.randn(count, classes, generator=generator), torch.arange(count) % classes)
    return sums.result()


def history(epochs: int, **columns: float) -> list[dict]:
    plain = {"lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5, "validation_loss": None, "validation_accuracy": None}
    return [{"epoch": e + 1, **plain, **columns} for e in range(epochs)]


def test_draw_results_of_a_run(tiny_run) -> None:
    assert {p.name for p in tiny_run.figures.iterdir()} == {
        "curves.png",
        "confusion.png",
        "per_class.png",
        "samples.png",
    }
    for path in tiny_run.figures.iterdir():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 10
        assert (pixels != 255).any(2).mean() > 0.01
        assert (pixels[[0, -1]] > 250).mean() > 0.9  # nothing is cut off at the edges


@pytest.mark.parametrize("classes", [1, 2, 100])
def test_draw_confusion_and_per_class_of_any_number_of_classes(classes: int) -> None:
    names = [f"class {k}" for k in range(classes)]
    evaluation = evaluation_of(max(2 * classes, 5), classes)
    confusion = draw_confusion(evaluation, names).axes[0]
    image = np.asarray(confusion.images[0].get_array())
    assert image.shape == (classes, classes)
    assert image.sum(1) == pytest.approx(np.ones(classes))
    assert len(draw_per_class(evaluation, names).axes[0].patches) == classes


def test_draw_per_class_leaves_out_classes_without_images() -> None:
    sums = EvaluationSums()
    sums.add(torch.eye(4)[[0, 1, 1, 3]] * 5, torch.tensor([0, 1, 1, 0]))
    axis = draw_per_class(sums.result(), list("abcd")).axes[0]
    assert [t.get_text() for t in axis.texts if t.get_text()] == ["50.0%", "100.0%", "no images", "no images"]
    heights = [bar.get_width() for bar in axis.patches]
    assert heights[:2] == [0.5, 1]
    assert np.isnan(heights[2:]).all()
    assert axis.lines[1].get_xdata()[0] == 0.75  # the mean of two classes, not of four


def test_of_many_classes_those_with_images_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """An imported network can have 1,000 classes, while the images have only ten."""
    evaluation, names = evaluation_of(4, 100), [f"class {k}" for k in range(100)]
    present = evaluation.labels.unique().tolist()
    axis = draw_per_class(evaluation, names).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [names[k] for k in present]
    with caplog.at_level("INFO", logger="zfnet"):
        log_per_class({"per_class": dict(zip(names, evaluation.per_class(), strict=True))})
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[1] for line in lines[:-1]] == [str(k) for k in present]
    assert lines[-1] == f"  the other {100 - len(present)} classes have no images"


def test_of_1000_classes_the_best_and_worst_are_logged_and_some_are_named(caplog: pytest.LogCaptureFixture) -> None:
    names = [f"c{k}" for k in range(1000)]
    with caplog.at_level("INFO", logger="zfnet"):
        log_per_class({"per_class": {name: None if k < 100 else k / 1000 for k, name in enumerate(names)}})
    head, *lines, absent = (record.getMessage().strip() for record in caplog.records)
    assert head == "the 5 best and the 5 worst of 900 classes; results.json has all"
    assert [line.split()[0] for line in lines] == [f"c{k}" for k in (*range(999, 994, -1), *range(104, 99, -1))]
    assert absent == "the other 100 classes have no images"
    evaluation = evaluation_of(1000, 1000)
    for draw in (draw_per_class, draw_confusion):
        labels = [label.get_text() for label in draw(evaluation, names).axes[0].get_yticklabels()]
        assert labels == names[::10]


def test_draw_curves_shows_what_there_is() -> None:
    axes = draw_curves(history(1)).axes
    assert [line.get_label() for line in axes[0].lines] == ["train"]
    axes = draw_curves(history(3, validation_loss=2.0, validation_accuracy=0.4, test_loss=3.0)).axes
    assert [line.get_label() for line in axes[0].lines] == ["train", "validation", "test"]
    assert [line.get_label() for line in axes[1].lines] == ["train", "validation"]
    assert axes[0].get_ylabel() == "loss (train: the config's loss; others: cross-entropy)"
    assert axes[2].lines[0].get_ydata().tolist() == [0.1] * 3


def test_draw_samples_names_guess_and_truth() -> None:
    images = image_set(random_images(5, 8).numpy(), torch.arange(5) % 3, "abc")
    evaluation = evaluation_of(5, 3)
    (axis,) = draw_samples(images, evaluation).axes
    expected = [f"{'abc'[g]}\n({'abc'[t]})" for g, t in zip(evaluation.predictions, evaluation.labels, strict=True)]
    assert [text.get_text() for text in axis.texts] == expected
    for shown, image in zip(axis.images, images.images, strict=True):
        assert np.array_equal(shown.get_array(), image)


@pytest.mark.drawn
def test_save_figure_writes_equal_files_for_equal_figures(tmp_path: Path) -> None:
    for name in ("a/x.png", "b/x.png"):
        save_figure(draw_curves(history(2)), tmp_path / name)
    assert (tmp_path / "a/x.png").read_bytes() == (tmp_path / "b/x.png").read_bytes()


def test_draw_curves_of_one_epoch_marks_it_as_one() -> None:
    for axis in draw_curves(history(1)).axes:
        assert axis.get_xticks().tolist() == [1]
        assert axis.get_xlim() == (0, 2)


def test_draw_confusion_says_what_a_cell_is() -> None:
    sums = EvaluationSums()
    sums.add(torch.eye(2)[[0, 0, 1, 1]] * 5, torch.tensor([0, 0, 0, 1]))
    axis = draw_confusion(sums.result(), list("ab"), "test").axes[0]
    assert [text.get_text() for text in axis.texts] == ["66.7\n(2)", "33.3\n(1)", "100.0\n(1)"]
    assert axis.get_title().startswith("Confusion matrix (test): 75.00% of 4 images are correct\n")
    assert "% of the true class's images, and their number" in axis.get_title()


def test_log_result_names_a_top_5_of_six_classes_and_more(caplog) -> None:
    caplog.set_level("INFO", logger="zfnet")
    for classes in (5, 6):
        log_result("test", results_of(evaluation_of(12, classes), "abcdef"[:classes]))
    few, many = (record.getMessage() for record in caplog.records)
    assert "top-5" not in few
    assert "top-5 " in many


def test_draw_samples_of_chosen_images_names_their_probability() -> None:
    images = image_set(np.zeros((4, 8, 8, 3), np.uint8), torch.arange(4) % 2, ["cat", "dog"])
    evaluation = evaluation_of(4, 2)
    axis = draw_samples(images, evaluation, torch.tensor([3, 1])).axes[0]
    words = [text.get_text() for text in axis.texts]
    assert [word.split("(")[1] for word in words] == ["dog)", "dog)"]
    assert [word.split()[0] for word in words] == ["3", "1"]  # the images' numbers
    assert [word.split()[2] for word in words] == [f"{evaluation.confidences[k]:.0%}" for k in (3, 1)]
    long = image_set(
        np.zeros((4, 8, 8, 3), np.uint8), torch.arange(4) % 2, ["tree frog, tree-frog", "bullfrog, Rana catesbeiana"]
    )
    lines = draw_samples(long, evaluation).axes[0].texts[1].get_text().splitlines()
    assert lines[-1] == "(bullfrog, Rana ca…)"
    assert max(map(len, lines)) <= 20
