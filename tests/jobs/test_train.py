"""The results of a training run: its files, its log, and the weights that are best on validation."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import TINY_EXACT, compose, read_csv, train_tiny_exact, weights_and_history
from zfnet.config.errors import UserError
from zfnet.jobs.train import train
from zfnet.runs.directory import HISTORY_COLUMNS, RunDirectory
from zfnet.runs.weights import load_model
from zfnet.training import callbacks
from zfnet.training.checkpoint import epoch_files


def test_the_best_weights_are_the_ones_kept(tmp_path: Path, fake_validation) -> None:
    """If the first of three epochs is the best on validation, the file contains its weights."""
    fake_validation(accuracy=[0.9, 0.2, 0.3])
    run = train_tiny_exact(tmp_path / "run", "trainer.epochs=3", "optimizer.lr=0.01", "trainer.snapshots=[1,3]")
    files = run.weights, *epoch_files(run.snapshots).values()
    kept, first, last = (load_model(file)[0].conv1.weight for file in files)
    assert torch.equal(kept, first)
    assert not torch.equal(first, last)
    assert run.read_json("results.json")["best_epoch"] == 1


def test_the_files_of_a_run(tiny_run: RunDirectory) -> None:
    present = {p.name for p in tiny_run.folder.iterdir()}
    expected = {"config.yaml", "environment.json", "status.json", "history.csv", "results.json"}
    assert expected | {"model.safetensors", "checkpoints", "figures", "train.log"} <= present
    assert not [p for p in tiny_run.folder.rglob("*") if p.name.endswith(".partial")]
    assert tiny_run.state == "done"
    rows = read_csv(tiny_run.folder / "history.csv")
    assert tuple(rows[0]) == HISTORY_COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2"]
    log = (tiny_run.folder / "train.log").read_text()
    assert "epoch 1/2" in log
    assert "334,794 parameters" in log


def test_results(tiny_run: RunDirectory) -> None:
    results, history = tiny_run.read_json("results.json"), tiny_run.read_history()
    assert {"test", "validation", "epochs", "seconds", "images_per_second", "weights_sha256"} <= results.keys()
    for name, images in (("validation", 20), ("test", 50)):
        part = results[name]
        assert part["images"] == images
        confusion = np.array(part["confusion"])
        assert confusion.sum() == images
        assert part["accuracy"] == pytest.approx(np.trace(confusion) / images)
        assert 0 <= part["accuracy"] <= part["top5"] <= 1
        for k, accuracy in enumerate(part["per_class"].values()):
            assert accuracy == pytest.approx(confusion[k, k] / confusion[k].sum())
    best = max(history, key=lambda row: row["validation_accuracy"])
    assert results["best_epoch"] == best["epoch"]
    assert results["validation"]["accuracy"] == pytest.approx(best["validation_accuracy"])
    assert results["test_seen_each_epoch"] is False
    environment = tiny_run.read_json("environment.json")
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    assert len(environment["data_fingerprint"]) == 64


@pytest.mark.parametrize("words", [("trainer.monitor=train_loss",), ("scheduler=onecycle",)])
def test_without_validation_the_last_weights_are_kept(tmp_path: Path, words: tuple[str, ...]) -> None:
    run = train_tiny_exact(tmp_path / "run", "data.validation=0", "trainer.test_each_epoch=true", *words)
    results = run.read_json("results.json")
    assert results["validation"] is None
    assert results["best_epoch"] is None
    assert results["test_seen_each_epoch"] is True
    history = run.read_history()
    assert all(row["validation_loss"] is None for row in history)
    assert history[-1]["test_accuracy"] == pytest.approx(results["test"]["accuracy"])
    assert "do not choose an epoch or a setting by it" in (run.folder / "train.log").read_text()


def test_logging_and_boards_change_no_weights(tmp_path: Path) -> None:
    """Logs and checkpoints must not affect the computation."""
    plain = weights_and_history(train_tiny_exact(tmp_path / "a"))
    words = ("trainer.log_every=1", "logger=[tensorboard,csv]", "trainer.checkpoint_minutes=1e-9")
    assert weights_and_history(train_tiny_exact(tmp_path / "b", *words)) == plain


def test_the_objective_of_a_sweep_is_validations(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    value = train(compose(*TINY_EXACT), run)
    assert value == run.read_json("results.json")["validation"]["accuracy"]


def test_few_images_give_a_warning(tiny_run: RunDirectory, tmp_path: Path) -> None:
    log = (tiny_run.folder / "train.log").read_text()
    assert "few images: one of 20 validation images is 5.0% of accuracy" in log
    assert "few images: one of 50 test images is 2.0% of accuracy" in log
    assert "no test images" not in log
    words = ("trainer.epochs=1", "data.train_images=200", "data.validation=100", "data.subset=7")
    log = (train_tiny_exact(tmp_path / "run", *words).folder / "train.log").read_text()
    assert "validation images is" not in log
    absent = re.search(r"no training images in 3 of 10 classes: (\w+, \w+, \w+)\n.*epoch 1", log, re.DOTALL)
    assert absent is not None  # logged before training


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["data.subset=73"], "data.subset=73: there are 72 training images; null uses all of them"),
        (["augment.cutout=65"], "augment.cutout=65: must be at most 64, the side of the images it is cut from"),
        (["augment.cutout=33", "data.crop_size=32"], "augment.cutout=33: must be at most 32"),
    ],
)
def test_what_does_not_fit_the_images_is_named(tmp_path: Path, words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        train_tiny_exact(tmp_path / "run", *words)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trainer.init_from=nowhere.safetensors"], "trainer.init_from=nowhere.safetensors: there is no such file"),
        (["trainer.init_from=other.safetensors"], "trainer.init_from=other.safetensors: has no conv1.weight"),
        (
            ["augment.transforms=[{_target_:torchvision.transforms.v2.RandomCrop,size:65}]"],
            "augment.transforms.0 (RandomCrop): fails on an image [3, 64, 64]: Required crop size (65, 65)",
        ),
        (
            [
                "augment.transforms=[{_target_:torchvision.transforms.v2.ToPILImage},"
                "{_target_:torchvision.transforms.v2.Normalize,mean:[0.5],std:[0.5]}]"
            ],
            "augment.transforms.1 (Normalize): fails on an Image: ",
        ),
        (
            ["augment.transforms=[{_target_:torchvision.transforms.v2.CenterCrop,size:[9,10]}]"],
            "augment.transforms: return [3, 9, 10] of torch.uint8, not uint8 [3, s, s]",
        ),
        (
            ["augment.transforms=[{_target_:torchvision.transforms.v2.ToPILImage}]"],
            "augment.transforms: return Image; must be a tensor",
        ),
    ],
)
def test_what_cannot_be_read_or_fails_is_named_before_a_directory_is_taken(
    run_py, tmp_path: Path, words: list[str], expected: str
) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors")
    answer = run_py(*TINY_EXACT, *words, "hydra.run.dir=new")
    assert answer.error.startswith(expected)
    assert not Path("new").exists()


def test_what_just_fits_the_images_is_taken(tmp_path: Path) -> None:
    assert train_tiny_exact(tmp_path / "run", "data.subset=72", "augment.cutout=64", "trainer.epochs=1").state == "done"


def test_a_directory_outside_the_current_one_keeps_its_absolute_name(run_py, tmp_path_factory, monkeypatch) -> None:
    given: list[Path] = []
    monkeypatch.setattr("zfnet.jobs.train.TrainJob.main", lambda self, config, output: given.append(output))
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "run"
    for folder in (elsewhere, "a/b", Path.cwd() / "c"):
        assert run_py(*TINY_EXACT, f"hydra.run.dir={folder}").code == 0
    assert given == [elsewhere, Path("a/b"), Path("c")]


@pytest.mark.parametrize("where", ["BestWeights.on_epoch_end", "Metrics.on_epoch_end", "Checkpoints.on_fit_end"])
def test_a_directory_that_is_deleted_ends_the_run(tmp_path: Path, monkeypatch, where: str) -> None:
    name, hook = where.split(".")
    before = getattr(getattr(callbacks, name), hook)

    def deleted(self, *given) -> None:
        before(self, *given)
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)

    monkeypatch.setattr(f"zfnet.training.callbacks.{where}", deleted)
    # the thread that writes the best weights can be the first to notice that the directory is missing
    gone = r" was deleted during the run \(config\.yaml is missing\)"
    with pytest.raises(UserError, match=rf"/gone({gone}|/checkpoints/best\.safetensors cannot be written: .*No such)"):
        train_tiny_exact(tmp_path / "gone", "trainer.epochs=1")
