"""Snapshots of the weights: at the asked epochs, loadable, and no part of what a run is."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from tests.explain.trained import Trained
from tests.helpers import TINY, compose, train_tiny
from zfnet.config.errors import UserError
from zfnet.config.schema import read_config
from zfnet.jobs.train import train
from zfnet.runs.directory import RunDirectory
from zfnet.runs.signals import Stopped
from zfnet.runs.weights import load_model
from zfnet.training.callbacks import Metrics, list_snapshots
from zfnet.training.checkpoint import read_checkpoint, step_files


def test_the_last_snapshot_is_the_network_as_training_left_it(trained: Trained) -> None:
    found = list_snapshots(trained.run.snapshots)
    assert list(found) == [1, 3, 6]
    models = {epoch: load_model(path) for epoch, path in found.items()}
    last = read_checkpoint(step_files(trained.run.checkpoints)[-1]).tensors
    for name, value in models[6][0].state_dict().items():
        assert torch.equal(value, last[f"model.{name}"])
    assert models[1][1].classes == trained.images.classes
    first = models[1][0].conv1.weight
    assert not torch.equal(first, models[3][0].conv1.weight)


def test_a_run_that_goes_on_keeps_its_snapshots_and_writes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("draw_results", "save_figure"):
        monkeypatch.setattr(f"zfnet.jobs.train.{name}", lambda *anything: None)
    words = (
        "scheduler=constant",  # knows nothing of the run's length
        "data.train_images=60",
        "data.test_images=20",
        "trainer.snapshots=[1,2]",
        "trainer.threads=1",
    )

    def stopped(*_: object) -> None:
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_epoch_end", stopped)
        with pytest.raises(Stopped):
            train_tiny(tmp_path / "run", *words)
    run = RunDirectory(tmp_path / "run")
    assert list(list_snapshots(run.snapshots)) == [1]
    before = list_snapshots(run.snapshots)[1].stat().st_mtime_ns
    train(compose(*TINY, *words), run)
    found = list_snapshots(run.snapshots)
    assert list(found) == [1, 2]
    assert found[1].stat().st_mtime_ns == before
    last = read_checkpoint(step_files(run.checkpoints)[-1]).tensors
    assert torch.equal(load_model(found[2])[0].fc8.bias, last["model.fc8.bias"])


def test_snapshots_are_no_part_of_a_runs_identity() -> None:
    plain = compose(*TINY)
    assert compose(*TINY, "trainer.snapshots=[1,2]").identity() == plain.identity()
    older = plain.to_dict()
    del older["trainer"]["snapshots"]
    assert read_config(older).trainer.snapshots == []


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        ("[0,1]", r"trainer\.snapshots\.0=0: must be at least 1"),
        ("[1,3]", r"trainer\.snapshots=\[1, 3\]: epochs are counted from 1 to trainer\.epochs=2"),
    ],
)
def test_snapshots_of_epochs_that_there_are_not_are_refused(epochs: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        compose(*TINY, f"trainer.snapshots={epochs}")
