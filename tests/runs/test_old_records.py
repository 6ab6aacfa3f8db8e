"""Records from before losses and loggers had a `_target_` (commit e428fc9): they load, evaluate, reproduce and resume.

tests/fixtures/run_before_slots: a finished run, a run that was killed after its eleventh step, and the history of the
same run without the kill.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from zfnet.data.shapes import CLASSES
from zfnet.runs.directory import RunDirectory
from zfnet.runs.provenance import describe_environment
from zfnet.runs.weights import load_run, weights_hash

FIXTURES = Path(__file__).parents[1] / "fixtures/run_before_slots"


def same_machine() -> bool:
    """Return whether this machine computes bitwise the same results as the one that made the records."""
    now = describe_environment(torch.device("cpu"), "exact", [])
    then = json.loads((FIXTURES / "finished/environment.json").read_text())

    def what_counts(environment: dict[str, Any]) -> tuple:
        cpu = environment["cpu"]
        return environment["packages"]["torch"], cpu["name"], cpu["capability"]

    return what_counts(now) == what_counts(then)


def assert_same(now: RunDirectory, then: RunDirectory) -> None:
    """Assert that runs are bitwise equal on the machine of the record, and equal within rounding elsewhere."""
    if same_machine():
        digests = [run.read_json("results.json")["weights_sha256"] for run in (now, then)]
        assert digests[0] == digests[1]
    rows, expected = now.read_history(), then.read_history()
    assert len(rows) == len(expected) == 2
    for row, old in zip(rows, expected, strict=True):
        for key in set(old) - {"seconds", "images_per_second"}:
            assert row[key] == pytest.approx(old[key], rel=1e-5), key


@pytest.fixture
def finished(tmp_path: Path) -> RunDirectory:
    return RunDirectory(shutil.copytree(FIXTURES / "finished", tmp_path / "finished"))


def test_finished_record_loads(finished: RunDirectory) -> None:
    run = load_run(finished.folder)
    assert run.classes == CLASSES
    assert weights_hash(run.model.state_dict()) == finished.read_json("results.json")["weights_sha256"]
    config = run.config
    assert (config.loss["label_smoothing"], config.logger, config.callbacks) == (0.1, {}, {})
    assert (config.data.train_images, config.trainer.ema) == (80, 0.8)


def test_identity_of_a_record_stays_what_its_checkpoints_and_branches_say(finished: RunDirectory) -> None:
    """A new key must be in `_DEFAULTS_OF_OLD_RECORDS`; otherwise earlier runs cannot be continued."""
    identity = "49a1582cf3fa34e275564dec55fd5997de6664567d4e55e1fb1ef8f11846cfb7"
    assert finished.read_config().identity() == identity


@pytest.mark.drawn
def test_finished_record_evaluates(finished: RunDirectory, run_py) -> None:
    answer = run_py("job=evaluate", f"run={finished.folder}", "hydra.run.dir=evaluation")
    assert answer.code == 0, answer.err
    accuracy = finished.read_json("results.json")["test"]["accuracy"]
    assert RunDirectory("evaluation").read_json("results.json")["test"]["accuracy"] == pytest.approx(accuracy)


def test_finished_record_reproduces(finished: RunDirectory, run_py) -> None:
    answer = run_py("job=reproduce", f"run={finished.folder}", "hydra.run.dir=again")
    comparison = RunDirectory("again").read_json("reproduction.json")
    assert_same(RunDirectory("again"), finished)
    assert comparison["variation"] == []
    if same_machine():
        assert answer.code == 0, answer.err
        assert comparison["identical"]


@pytest.mark.drawn  # draw figures too: the history is from an old checkpoint
def test_killed_record_resumes(tmp_path: Path, run_py) -> None:
    run = RunDirectory(shutil.copytree(FIXTURES / "killed", tmp_path / "killed"))
    answer = run_py("job=resume", f"run={run.folder}")
    assert answer.code == 0, answer.err
    assert "continuing from epoch 2, step 11" in answer.out
    assert_same(run, RunDirectory(FIXTURES / "whole"))
