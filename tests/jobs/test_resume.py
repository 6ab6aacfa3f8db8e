"""job=resume, and repeating the same command: continued, finished and refused runs."""

from __future__ import annotations

import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import (
    EVERY_STEP,
    STEPS,
    TINY_EXACT,
    claim,
    compose,
    train_tiny_exact,
    train_until_killed,
    weights_and_history,
)
from zfnet.config.errors import UserError
from zfnet.jobs import train as train_module
from zfnet.runs.directory import RunDirectory
from zfnet.training.checkpoint import BEST_FILE, step_files


def test_the_same_command_goes_on_in_the_same_directory(reference_run, tmp_path: Path, run_py) -> None:
    train_until_killed(tmp_path / "r", 5)
    answer = run_py(*TINY_EXACT, EVERY_STEP, "hydra.run.dir=r")
    assert answer.code == 0
    assert "r already contains this run" in answer.out
    assert "continuing from epoch 1, step 5" in answer.out
    assert weights_and_history(RunDirectory(tmp_path / "r")) == reference_run
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "r").rglob("*") if p.name != ".lock"}
    assert "nothing to do: r is finished" in run_py(*TINY_EXACT, "hydra.run.dir=r").out
    assert "nothing to do: r is finished" in run_py("job=resume", "run=r").out
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_another_configs_directory_is_refused_untouched(tmp_path: Path, run_py) -> None:
    train_until_killed(tmp_path / "r", 3)
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    answer = run_py(*TINY_EXACT, "hydra.run.dir=r", "seed=1")
    assert answer.code == 1
    assert answer.err == ("error: r contains a run with another config: choose another directory (hydra.run.dir=…)\n")
    assert {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()} == before


def test_resume_takes_no_other_settings(tmp_path: Path, run_py) -> None:
    train_until_killed(tmp_path / "r", 2)
    answer = run_py("job=resume", "run=r", "optimizer.lr=0.5")
    assert answer.code == 1
    assert "accepts no others, such as" in answer.err
    assert "optimizer.lr=0.5" in answer.err


def _hold(folder: Path, held: Any) -> None:
    with RunDirectory(folder).lock():
        held.set()
        time.sleep(600)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    config, run = compose(*TINY_EXACT), RunDirectory(tmp_path / "r")
    claim(run, config)
    fork = multiprocessing.get_context("fork")  # a new interpreter needs two seconds to import PyTorch
    held = fork.Event()
    process = fork.Process(target=_hold, args=(run.folder, held))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(UserError, match="is in use by another process"):
            train_module.train(config, run)
    finally:
        process.kill()
        process.join()
    with run.lock():  # the kernel released the lock
        pass


def test_another_config_than_the_checkpoints_is_refused(run_py, tmp_path: Path) -> None:
    assert run_py(*TINY_EXACT, "hydra.run.dir=r").code == 0
    run = RunDirectory(tmp_path / "r")
    run.set_status("stopped")
    text = (run.folder / "config.yaml").read_text()
    (run.folder / "config.yaml").write_text(text.replace("epochs: 2", "epochs: 3"))
    answer = run_py("job=resume", f"run={run.folder}")
    assert "is not the config that the checkpoint was made with" in answer.error


def test_a_finished_run_without_its_weights_is_named(run_py, tmp_path: Path) -> None:
    run = train_tiny_exact(tmp_path / "r", "trainer.epochs=1")
    run.weights.unlink()
    answer = run_py("job=resume", "run=r")
    assert answer.error == (
        "r is finished, but its model.safetensors is missing: python run.py job=reproduce run=r trains it again, in a "
        "new directory"
    )
    assert run.state == "done"


# -- the best weights are lost


@pytest.mark.parametrize("harm", ["missing", "damaged"])
def test_lost_best_weights_are_not_replaced_by_worse_ones(tmp_path: Path, fake_validation, harm: str) -> None:
    fake_validation(accuracy=[0.9, 0.2, 0.3])
    train_until_killed(tmp_path / "r", 2 * STEPS + 3, "trainer.epochs=3")
    run = RunDirectory(tmp_path / "r")
    path = run.checkpoints / BEST_FILE
    path.unlink()
    if harm == "damaged":
        path.write_bytes(b"\x00" * 99)
    words = {"missing": "is missing", "damaged": "cannot be read"}
    with pytest.raises(UserError) as caught:
        train_tiny_exact(run.folder, EVERY_STEP, "trainer.epochs=3")
    lost = f"{path} {words[harm]}: the weights of the best epoch, 1, are lost"
    assert str(caught.value).startswith(f"{lost}: delete {run.checkpoints} and run job=resume run={run.folder}")
    assert f"{lost}; unless a later epoch is better" in (run.folder / "train.log").read_text()
    assert not run.weights.exists()
    shutil.rmtree(run.checkpoints)  # as the message says
    again = weights_and_history(train_tiny_exact(run.folder, "trainer.epochs=3"))
    assert again == weights_and_history(train_tiny_exact(tmp_path / "whole", "trainer.epochs=3"))
    assert run.read_json("results.json")["best_epoch"] == 1


@pytest.mark.parametrize(("accuracies", "best"), [((0.3, 0.2, 0.9), 3), ((0.1, 0.2, 0.15), 2)])
def test_a_better_later_epoch_replaces_lost_best_weights(
    tmp_path: Path, fake_validation, accuracies: tuple[float, ...], best: int
) -> None:
    fake_validation(accuracy=accuracies)
    expected = weights_and_history(train_tiny_exact(tmp_path / "whole", "trainer.epochs=3"))
    train_until_killed(tmp_path / "r", STEPS + 3, "trainer.epochs=3")
    run = RunDirectory(tmp_path / "r")
    (run.checkpoints / BEST_FILE).unlink()
    assert weights_and_history(train_tiny_exact(run.folder, "trainer.epochs=3")) == expected
    assert run.read_json("results.json")["best_epoch"] == best


def test_best_weights_of_an_epoch_that_is_trained_again_are_not_lost(tmp_path: Path, fake_validation) -> None:
    """A killed run can have reached a better epoch after its newest checkpoint."""
    fake_validation(accuracy=[0.1, 0.9, 0.2])
    expected = weights_and_history(train_tiny_exact(tmp_path / "whole", "trainer.epochs=3"))
    train_until_killed(tmp_path / "r", 2 * STEPS + 1, "trainer.epochs=3")
    run = RunDirectory(tmp_path / "r")
    for path in step_files(run.checkpoints):
        path.unlink()
    train_until_killed(tmp_path / "other", STEPS + 3, "trainer.epochs=3")
    newest = step_files(tmp_path / "other/checkpoints")[-1]
    shutil.copy(newest, run.checkpoints / newest.name)
    fake_validation(accuracy=[0.1, 0.05, 0.02])  # the repeated epoch is worse, as on hardware that rounds differently
    assert weights_and_history(train_tiny_exact(run.folder, "trainer.epochs=3"))[0] == expected[0]
    assert run.read_json("results.json")["best_epoch"] == 2
    assert "are lost" not in (run.folder / "train.log").read_text()


def test_damaged_results_of_a_finished_run_are_named(run_py, tiny_run, tmp_path: Path) -> None:
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    for content in ("null", "[1]", '{"validation": "x"}', "{}"):
        (tmp_path / "run/results.json").write_text(content)
        answer = run_py("job=resume", "run=run")
        assert (answer.code, answer.err) == (1, "error: run/results.json is damaged: it has no validation accuracy\n")
