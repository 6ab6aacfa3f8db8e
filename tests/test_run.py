"""Run directories: found, claimed, refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import TINY, compose
from zfnet.errors import UserError
from zfnet.run import RunDirectory, find_run


def test_last_is_the_newest_finished_training_run(tiny_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished training run"):
        find_run("last")
    (tmp_path / "outputs/train").mkdir(parents=True)
    (tmp_path / "outputs/train/a").symlink_to(tiny_run.folder)
    RunDirectory(tmp_path / "outputs/train/b").claim(compose(*TINY))  # newer, but never run
    assert find_run("last").folder == Path("outputs/train/a")


def test_another_runs_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert run.claim(compose(*TINY)) is False
    before = (run.folder / "config.yaml").read_bytes()
    assert run.claim(compose(*TINY)) is True
    with pytest.raises(UserError, match="holds a run with another config"):
        run.claim(compose(*TINY, "seed=1"))
    assert (run.folder / "config.yaml").read_bytes() == before
