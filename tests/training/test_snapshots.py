"""Snapshots of the weights: at the asked epochs, loadable, and no part of what a run is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.explain.trained import Trained
from tests.helpers import TINY, compose, train_tiny
from zfnet.config import read_config
from zfnet.errors import UserError
from zfnet.training.checkpoint import read_checkpoint, step_files
from zfnet.training.snapshots import list_snapshots
from zfnet.weights import load_model


def test_the_last_snapshot_is_the_network_as_training_left_it(trained: Trained) -> None:
    found = list_snapshots(trained.run.snapshots)
    assert list(found) == [1, 4, 8]
    models = {epoch: load_model(path) for epoch, path in found.items()}
    last = read_checkpoint(step_files(trained.run.checkpoints)[-1]).tensors
    for name, value in models[8][0].state_dict().items():
        assert torch.equal(value, last[f"model.{name}"])
    assert models[1][1].classes == trained.images.classes
    first = models[1][0].conv1.weight
    assert not torch.equal(first, models[4][0].conv1.weight)


def test_a_resumed_run_keeps_and_completes_its_snapshots(tmp_path: Path) -> None:
    words = (
        "trainer=exact",
        "scheduler=constant",  # does not know the run's length, so a run of one epoch is half of one of two
        "data.train_images=60",
        "data.test_images=20",
        "trainer.snapshots=[1,2]",
        "trainer.threads=1",
    )
    whole = train_tiny(tmp_path / "whole", *words)
    part = train_tiny(tmp_path / "part", *words, "trainer.epochs=1")
    assert list(list_snapshots(part.snapshots)) == [1]
    before = list_snapshots(part.snapshots)[1].stat().st_mtime_ns
    (part.folder / "status.json").unlink()
    (part.folder / "config.yaml").write_bytes((whole.folder / "config.yaml").read_bytes())
    again = train_tiny(tmp_path / "part", *words)
    found = list_snapshots(again.snapshots)
    assert list(found) == [1, 2]
    assert found[1].stat().st_mtime_ns == before
    expected = load_model(list_snapshots(whole.snapshots)[2])[0].state_dict()
    for name, value in load_model(found[2])[0].state_dict().items():
        assert torch.equal(value, expected[name])


def test_snapshots_are_no_part_of_a_runs_identity() -> None:
    plain = compose(*TINY)
    assert compose(*TINY, "trainer.snapshots=[1,2]").identity() == plain.identity()
    older = plain.to_dict()
    del older["trainer"]["snapshots"]
    assert read_config(older).trainer.snapshots == []


def test_epoch_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer.snapshots=\[0, 1\]: epochs are counted from 1"):
        compose(*TINY, "trainer.snapshots=[0,1]")
