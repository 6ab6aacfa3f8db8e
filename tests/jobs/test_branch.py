"""job=extend and job=fork: a run that continues from an epoch of another run, and chains of such runs."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import zfnet.training.loop
from tests.helpers import (
    EVERY_STEP,
    STEPS,
    TINY_EXACT,
    Killed,
    compose,
    killed_before,
    train_tiny_exact,
    train_without_figures,
    weights_and_history,
    write_images,
)
from tests.own import HookRecorder
from zfnet.runs.directory import RunDirectory
from zfnet.training.callbacks import Checkpoints
from zfnet.training.checkpoint import epoch_name, read_checkpoint, read_newest, step_files, unpack

# halves the learning rate after each epoch except the first; depends on the metrics, not on the run's length
PLATEAU = ("scheduler=plateau", "scheduler.patience=0", "scheduler.factor=0.5", "+scheduler.threshold=0.9")
ALL_ON = ("augment=crop_flip", "model.dropout=0.5", "trainer.ema=0.8", "scheduler.warmup_epochs=1.5")


@pytest.fixture
def branch(run_py) -> Callable[..., RunDirectory]:
    """Return a function that runs a command, expects success, and returns the new run in `to`."""

    def run(to: str, *words: str) -> RunDirectory:
        answer = run_py(*words, f"hydra.run.dir={to}")
        assert answer.code == 0, answer.err
        run.out = answer.out
        return RunDirectory(to)

    return run


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run that keeps the state of both its epochs. Tests read or copy it and never write to it."""
    folder = tmp_path_factory.mktemp("branch") / "run"
    return train_tiny_exact(folder, "trainer.checkpoint_epochs=[1]")


def rates(run: RunDirectory) -> list[float | None]:
    return [row["lr"] for row in run.read_history()]


def test_an_extended_run_equals_one_that_was_as_long_from_the_start(branch, tmp_path: Path) -> None:
    """Also if it is killed in its second step and resumed."""
    words = (*PLATEAU, *ALL_ON)
    parent = train_tiny_exact(tmp_path / "one", *words)
    extend = ("job=extend", "run=one", "trainer.epochs=3", EVERY_STEP)
    with killed_before(2 * STEPS + 1), pytest.raises(Killed):
        branch("two", *extend)
    run = branch("two", *extend)
    assert "two already contains this run" in branch.out
    assert weights_and_history(run) == weights_and_history(
        train_tiny_exact(tmp_path / "whole", *words, "trainer.epochs=3")
    )
    assert rates(run)[-1] == rates(parent)[-1] / 2
    link = run.read_config().parent
    assert link is not None
    assert (link.run, link.epoch, link.step, link.schedule) == ("one", 2, 2 * STEPS, "stretch")
    assert link.identity == parent.read_config().identity()
    assert re.fullmatch(r"[0-9a-f]{64}", link.weights_sha256)
    assert run.job == "train"  # run=last, job=evaluate and others accept it


def test_a_fork_that_changes_nothing_equals_its_parent(branch, tmp_path: Path) -> None:
    words = ("optimizer=sgd", "trainer.checkpoint_epochs=[1]", *ALL_ON)
    parent = train_tiny_exact(tmp_path / "one", *words)
    run = branch("two", "job=fork", "run=one", "job.epoch=1")
    assert weights_and_history(run) == weights_and_history(parent)
    newest = [read_newest(r.checkpoints)[0] for r in (run, parent)]
    assert newest[0].metadata["schedule"] == newest[1].metadata["schedule"]


@pytest.mark.parametrize("from_defaults", [True, False])
def test_what_an_optimizer_keeps_in_its_groups_goes_on(branch, tmp_path: Path, from_defaults: bool) -> None:
    words = (*PLATEAU, "imports=[tests]", "optimizer=sgd", "~optimizer.momentum", "~optimizer.nesterov")
    words += ("optimizer._target_=tests.own.Counting", f"+optimizer.from_defaults={str(from_defaults).lower()}")
    train_tiny_exact(tmp_path / "one", *words)
    run = branch("two", "imports=[tests]", "job=extend", "run=one", "trainer.epochs=3")
    assert weights_and_history(run) == weights_and_history(
        train_tiny_exact(tmp_path / "whole", *words, "trainer.epochs=3")
    )
    settings = ("optimizer.lr=0.5", "optimizer.weight_decay=0.25")
    run = branch("three", "imports=[tests]", "job=extend", "run=one", "trainer.epochs=3", *settings)
    saved = read_newest(run.checkpoints)[0]
    (group,) = unpack(saved.metadata["optimizer"], saved.tensors)["param_groups"]
    assert (group["count"], group["lr"], group["weight_decay"]) == (3 * STEPS, 0.125, 0.25)  # halved twice


def test_the_best_epoch_before_a_branch_still_counts(branch, tmp_path: Path, fake_validation) -> None:
    accuracies = [0.9, 0.95, 0.1, 0.2]
    fake_validation(accuracy=accuracies)
    train_tiny_exact(tmp_path / "one", "trainer.checkpoint_epochs=[1]")
    longer = branch("two", "job=extend", "run=one", "trainer.epochs=4")
    assert longer.read_json("results.json")["best_epoch"] == 2
    assert longer.weights.read_bytes() == Path("one/model.safetensors").read_bytes()
    accuracies[1] = 0.3
    other = branch("three", "job=fork", "run=one", "job.epoch=1", "optimizer.lr=0.1", "trainer.epochs=3")
    assert other.read_json("results.json")["best_epoch"] == 1  # not the parent's epoch 2
    assert "the weights are those of epoch 1 (the parent's), the best of 3" in branch.out


@pytest.mark.parametrize("word", ["data.split_seed=1", "data.mean=[0.4,0.4,0.4]"])
def test_the_best_epoch_before_a_branch_does_not_count_on_other_images(
    branch, tmp_path: Path, fake_validation, word: str
) -> None:
    fake_validation(accuracy=[0.9, 0.8, 0.1, 0.2])
    train_tiny_exact(tmp_path / "one")
    other = branch("two", "job=extend", "run=one", "trainer.epochs=4", word)
    assert other.read_json("results.json")["best_epoch"] == 4
    assert f"{word.split('=')[0]} is not the parent's" in (other.folder / "train.log").read_text()


def test_the_place_of_the_images_does_not_count(branch, run_py, tmp_path: Path, fake_validation) -> None:
    fake_validation(accuracy=[0.9, 0.8, 0.1, 0.2])
    words = [word for word in TINY_EXACT if "_images" not in word]
    words += ["data=folder", "data.root=old", "data.image_size=64", "data.validation=4"]
    for name, test in (("old", "test"), ("new", "test"), ("other", "val")):  # the same pixels and labels
        write_images(tmp_path / name, {"train/a": 20, "train/b": 20, f"{test}/a": 3, f"{test}/b": 3})
    train_without_figures(tmp_path / "one", compose(*words))
    extend = ("job=extend", "run=one", "trainer.epochs=4")
    shutil.rmtree("old")
    moved = branch("two", *extend, "data.root=new")
    assert "is not the parent's" not in branch.out
    results, seconds = moved.read_json("results.json"), [row["seconds"] for row in moved.read_history()]
    assert results["best_epoch"] == 1
    assert results["images_per_second"] == pytest.approx(36 * 2 / sum(seconds[2:]), rel=0.02)  # of its two epochs
    assert branch("three", *extend, "data.root=other").read_json("results.json")["best_epoch"] == 4
    assert "the images are not the parent's: the parent's best epoch does not count" in branch.out
    answer = run_py("job=reproduce", "run=two")
    assert "identical: every metric of 4 epochs" in answer.out, answer.err


def test_a_fork_to_other_classes_says_what_to_do(run_py, two_epochs: RunDirectory, tmp_path: Path) -> None:
    shutil.copytree(two_epochs.folder, tmp_path / "one")
    write_images(tmp_path / "photos", {f"{split}/{kind}": 9 for split in ("train", "test") for kind in "ab"})
    answer = run_py("job=fork", "run=one", "job.epoch=1", "data=folder", "data.root=photos", "data.image_size=64")
    assert answer.error.startswith("the run cannot begin with its parent's state (RuntimeError: size mismatch for fc8.")
    assert answer.error.endswith("for other classes, train a new run with trainer.init_from=<weights>")


def test_why_an_optimizer_starts_without_state_is_said(branch, tmp_path: Path) -> None:
    train_tiny_exact(tmp_path / "one", "optimizer=sgd", "optimizer.momentum=0")
    branch("two", "job=extend", "run=one", "trainer.epochs=3")
    assert "the optimizer starts without state" not in branch.out  # SGD without momentum has no state
    branch("three", "job=extend", "run=one", "trainer.epochs=3", "trainer.freeze=[conv1]")
    assert "the optimizer starts without state: trainer.freeze is not the parent's" in branch.out


def test_the_best_epoch_before_a_fork_survives_a_kill(tmp_path: Path, fake_validation, monkeypatch) -> None:
    """Killed in epoch 4 and continued in epoch 2, a run must not keep epoch 3's weights as the best up to epoch 2."""
    fake_validation(accuracy=[0.5, 0.4, 0.9, 0.1])
    words = ("trainer.epochs=4", "trainer.checkpoint_epochs=[2]")
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "on_step_end", lambda self, state: state.step == STEPS + 3 and self.save(state))
        with killed_before(3 * STEPS + 2), pytest.raises(Killed):
            train_tiny_exact(tmp_path / "one", *words)
    train_tiny_exact(tmp_path / "one", *words)
    assert read_checkpoint(tmp_path / "one/checkpoints" / epoch_name(2, best=True)).metadata["epoch"] == 1


def test_fit_extends_a_run_in_python(two_epochs: RunDirectory, tmp_path: Path) -> None:
    config = zfnet.compose(["job=extend", f"run={two_epochs.folder}", "trainer.epochs=3"])
    run = zfnet.fit(config, tmp_path / "two")
    assert zfnet.fit(config, tmp_path / "two").results == run.results
    assert [row["epoch"] for row in RunDirectory(tmp_path / "two").read_history()] == [1, 2, 3]
    assert run.results["epochs"] == 3


COSINE = ("scheduler=cosine", "optimizer.lr=0.04", "data.validation=0")


@pytest.fixture(scope="module")
def cosine(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run with a cosine schedule. Tests read it and never write to it."""
    return train_tiny_exact(tmp_path_factory.mktemp("cosine") / "run", *COSINE)


@pytest.mark.parametrize("rule", ["stretch", "continue", "restart"])
def test_the_schedule_of_a_branch_is_chosen_and_logged(branch, cosine: RunDirectory, tmp_path: Path, rule: str) -> None:
    run = branch("two", "job=extend", f"run={cosine.folder}", "trainer.epochs=4", f"job.schedule={rule}")
    before = rates(cosine)
    assert rates(run)[:2] == before
    now = rates(run)[2:]
    if rule == "stretch":
        assert now == rates(train_tiny_exact(tmp_path / "whole", *COSINE, "trainer.epochs=4"))[2:]
    elif rule == "restart":
        assert now == before
    else:
        assert now == [before[-1]] * 2
    spans = {"stretch": "1 to 4", "continue": "1 to 2", "restart": "3 to 4"}
    assert f"learning rate (job.schedule={rule}): CosineAnnealingLR over epochs {spans[rule]}; " in branch.out
    assert "; 0.000304 before, 0.0" in branch.out


def test_a_new_callback_of_a_branch_begins_with_the_parents_weights(branch, tmp_path: Path) -> None:
    train_tiny_exact(tmp_path / "one", "trainer.epochs=1")
    HookRecorder.calls.clear()
    words = ("imports=[tests]", "+callbacks.mine._target_=tests.own.HookRecorder")
    branch("two", "job=extend", "run=one", "trainer.epochs=2", *words)
    assert HookRecorder.calls[:2] == [("on_fit_start", 0), ("on_fit_start", 8)]


def test_a_schedule_that_restarts_needs_no_metric_of_the_parent(branch, run_py, tmp_path: Path) -> None:
    train_tiny_exact(tmp_path / "one", "data.validation=0", "scheduler=constant", "trainer.epochs=1")
    words = ("job=extend", "run=one", "trainer.epochs=2", "data.validation=0.1", "scheduler=plateau")
    assert run_py(*words).error == "trainer.monitor=validation_loss: the parent did not measure it"
    assert branch("two", *words, "job.schedule=restart").state == "done"


def test_a_chain_is_reproduced_from_its_start_without_its_parents(branch, run_py, tmp_path: Path) -> None:
    """The chain forks with other settings, then extends; the reproduction is killed in its second part."""
    train_tiny_exact(tmp_path / "one", *PLATEAU, "trainer.checkpoint_epochs=[1]", "trainer.epochs=2")
    fork = ("optimizer.lr=0.003", "data.batch_size=12", "optimizer=adam", "model.dropout=0.3", "augment=crop_flip")
    branch("two", "job=fork", "run=one", "job.epoch=1", "data.image_size=68", *fork)
    assert "the optimizer starts without state" in branch.out
    branch("three", "job=extend", "run=two", "trainer.epochs=3", "scheduler=cosine", "job.schedule=restart")
    for name in ("one", "two"):
        shutil.rmtree(name)
    with killed_before(9), pytest.raises(Killed):  # this part has 6 steps per epoch
        branch("again", "job=reproduce", "run=three")
    answer = run_py("job=resume", "run=again")
    assert answer.code == 0, answer.err
    assert "first its parent, two, to epoch 2" in answer.out
    assert "not the recorded ones" not in answer.out
    assert "identical: every metric of 3 epochs" in answer.out
    assert not Path("again/parent").exists()


def test_a_parent_that_comes_out_otherwise_is_named(branch, run_py, tmp_path: Path, monkeypatch) -> None:
    train_tiny_exact(tmp_path / "one", "trainer.epochs=1")
    branch("two", "job=extend", "run=one", "trainer.epochs=2")
    real = zfnet.training.loop.train_step

    def other(state, batch) -> None:
        real(state, batch)
        state.model.fc8.bias.data[0] += 1e-3

    monkeypatch.setattr("zfnet.training.loop.train_step", other)
    answer = run_py("job=reproduce", "run=two")
    assert answer.code == 1
    assert "after epoch 1 the weights are not the recorded ones" in answer.out
    assert "not identical to two: epoch 1, train_loss was" in answer.err


def test_a_run_that_was_stopped_early_goes_on(branch, tmp_path: Path) -> None:
    words = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=9")
    parent = train_tiny_exact(tmp_path / "one", *words, "trainer.epochs=4")
    assert len(parent.read_history()) == 2
    run = branch("two", "job=extend", "run=one", "trainer.epochs=6")
    assert len(run.read_history()) == 4  # early stopping starts again and stops the run


def test_refusals(run_py, branch, two_epochs: RunDirectory, tmp_path: Path) -> None:
    for name in ("one", "late"):
        shutil.copytree(two_epochs.folder, tmp_path / name)
    Path("late/checkpoints", epoch_name(1)).unlink()
    for words, expected in (
        ("job=extend run=one", "job=extend needs trainer.epochs=N, more than the 2 epochs that run=one has trained"),
        ("job=fork run=one", "job=fork needs job.epoch=N; run=one keeps the state of epochs 1, 2\n"),
        ("job=fork run=late job.epoch=3 trainer.epochs=4", "job.epoch=3: run=late keeps the state of epoch 2\n"),
        (
            "job=fork run=late job.epoch=1",
            "job.epoch=1: run=late keeps the state of epoch 2; job=reproduce run=late "
            "trainer.checkpoint_epochs=[1] makes a run that keeps the state of this epoch\n",
        ),
        ("job=fork run=one job.epoch=1 model.conv1.channels=5", "model.conv1.channels=5: must be "),
        (
            "job=fork run=one job.epoch=1 data.image_size=96",
            "data.image_size=96: must be 64, as in the parent, because the weights have other shapes\n",
        ),
        (
            "job=fork run=one job.epoch=1 scheduler.warmup_epochs=1.5 job.schedule=restart",
            "scheduler.warmup_epochs=1.5",
        ),
        ("job=fork run=one job.epoch=1 hydra.run.dir=one", "one contains a run with another config"),
    ):
        answer = run_py(*words.split(), *(["hydra.run.dir=new"] if "hydra.run.dir" not in words else []))
        assert f"{answer.error}\n".startswith(expected), words
        assert not Path("new").exists(), words
    run = branch("two", "job=extend", "run=one", "trainer.epochs=3")
    run.set_status("stopped")
    for path in step_files(run.checkpoints):
        path.unlink()
    answer = run_py("job=resume", "run=two")
    assert answer.error == "two/checkpoints no longer has the state that the run began with: branch from one again"
