"""Exactness under faults, and negative controls: damage to any part of a checkpoint changes the compared result."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from safetensors.torch import load

from tests.helpers import (
    EVERY_STEP,
    STEPS,
    Killed,
    killed_before,
    raise_disk_full,
    train_tiny_exact,
    train_until_killed,
    weights_and_history,
)
from zfnet.config.errors import UserError
from zfnet.runs.directory import RunDirectory
from zfnet.training import loop
from zfnet.training.checkpoint import BEST_FILE, Checkpoint, CheckpointWriter, read_checkpoint, step_files

# -- negative controls

EARLY = ("callbacks=early_stopping", "callbacks.early_stopping.patience=1")
RECIPES = {
    "adamw": ("optimizer=adamw", "scheduler=onecycle", "trainer.ema=0.8"),
    "sgd": ("optimizer=sgd", "scheduler=plateau", "scheduler.patience=0", "trainer.epochs=3", *EARLY),
}
DIES_AT = STEPS + 2  # in the second epoch
LOSSES = {"validation 1": 3.0, "validation 2": 2.9, "validation 3": 2.8}
NOT_RESULTS = {"seconds", "epoch_seconds", "compiled"}  # parts of a checkpoint that no result depends on


def evaluate_with_fixed_accuracy(model, batches, runtime, name, *more, real=loop.evaluate):
    """Evaluate, but set the accuracy so that the first epoch is the best."""
    result = real(model, batches, runtime, name, *more)
    if name in LOSSES:
        # the last digits depend on the network
        return replace(result, loss=LOSSES[name] + result.loss / 1e6, accuracy=1 / int(name[-1]))
    return result


@pytest.fixture(scope="module")
def killed_and_uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """For each recipe, a killed run and the result of the same run without a kill."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", evaluate_with_fixed_accuracy)
        for name, words in RECIPES.items():
            folder = tmp_path_factory.mktemp(name)
            train_until_killed(folder / "run", DIES_AT, *words)
            made[name] = folder / "run", weights_and_history(train_tiny_exact(folder / "whole", *words))
    return made


@pytest.fixture
def controls(killed_and_uninterrupted, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Path, Any]]:
    monkeypatch.setattr(loop, "evaluate", evaluate_with_fixed_accuracy)
    return killed_and_uninterrupted


def tensor(pattern: str) -> Callable[[Checkpoint], None]:
    """Return a function that changes the first tensor with a matching name slightly."""

    def damage(saved: Checkpoint) -> None:
        name = next(name for name in sorted(saved.tensors) if re.fullmatch(pattern, name))
        value = saved.tensors[name]
        saved.tensors[name] = value * 1.01 if value.is_floating_point() and value.any() else value + 1

    return damage


def value(*path: str, to: Any) -> Callable[[Checkpoint], None]:
    """Return a function that sets the value at this path of the metadata."""

    def damage(saved: Checkpoint) -> None:
        node = saved.metadata
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = to(node[path[-1]]) if callable(to) else to

    return damage


def packed(slot: str, name: str, to: Any) -> Callable[[Checkpoint], None]:
    """Return a function that replaces the value with this name in a packed value of the metadata."""

    def damage(saved: Checkpoint) -> None:
        text = json.dumps(saved.metadata[slot])
        changed = re.sub(rf'\["{name}", [^][]+\]', f'["{name}", {to}]', text)
        assert changed != text
        saved.metadata[slot] = json.loads(changed)

    return damage


DAMAGES: list[tuple[str, str, Callable[[Checkpoint], None]]] = [
    ("adamw", "model", tensor(r"model\.conv1\.weight")),
    ("adamw", "optimizer.exp_avg", tensor(r"optimizer\..*\.exp_avg")),
    ("adamw", "optimizer.exp_avg_sq", tensor(r"optimizer\..*\.exp_avg_sq")),
    ("adamw", "optimizer.step", tensor(r"optimizer\..*\.step")),
    ("adamw", "optimizer.lr", packed("optimizer", "lr", 0.5)),
    ("sgd", "optimizer.momentum_buffer", tensor(r"optimizer\..*\.momentum_buffer")),
    ("adamw", "callbacks.ema.model", tensor(r"callbacks\.ema\.model\.conv1\.weight")),
    ("adamw", "callbacks.ema.count", tensor(r"callbacks\.ema\.count")),
    ("sgd", "callbacks.early_stopping", packed("callbacks", "best", 0.1)),
    ("adamw", "metrics", tensor("metrics")),
    ("adamw", "step", value("step", to=lambda step: step + 1)),
    ("adamw", "epoch", value("epoch", to=0)),
    ("adamw", "schedule.onecycle", value("schedule", "scheduler", "last_epoch", to=lambda count: count - 3)),
    ("sgd", "schedule.plateau", value("schedule", "scheduler", "best", to=0.0)),
    ("adamw", "schedule.taken", value("schedule", "taken", to=100)),
    ("adamw", "best", value("best", "validation_accuracy", to=2.0)),
    ("adamw", "history", value("history", to=[])),
    ("sgd", "should_stop", value("should_stop", to=True)),
    ("adamw", "identity", value("identity", to="0" * 64)),
]


def rewrite(path: Path, damage: Callable[[Checkpoint], None]) -> None:
    """Damage a checkpoint as a memory error would, and write it with a valid checksum."""
    saved = read_checkpoint(path)
    damage(saved)
    writer = CheckpointWriter(path.parent)
    writer.write(path.name, saved, prune=False)
    writer.close()


def is_noticed(controls, tmp_path: Path, recipe: str, damage: Callable[[Checkpoint], None], best: bool = False) -> bool:
    """Return whether the resumed run raises UserError or its result differs from the run without a kill."""
    killed, expected = controls[recipe]
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    rewrite(folder / "checkpoints" / BEST_FILE if best else step_files(folder / "checkpoints")[-1], damage)
    try:
        return weights_and_history(train_tiny_exact(folder, *RECIPES[recipe])) != expected
    except UserError:
        return True


@pytest.mark.parametrize(("recipe", "name", "damage"), DAMAGES, ids=[name for _, name, _ in DAMAGES])
def test_a_damaged_part_is_detected(controls, tmp_path: Path, recipe: str, name: str, damage) -> None:
    assert is_noticed(controls, tmp_path, recipe, damage)


def test_damaged_best_weights_are_detected(controls, tmp_path: Path) -> None:
    assert is_noticed(controls, tmp_path, "adamw", tensor(r"conv1\.weight"), best=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_undamaged_rewrite_is_not_detected(controls, tmp_path: Path, recipe: str) -> None:
    assert not is_noticed(controls, tmp_path, recipe, lambda saved: None)


def test_every_part_of_a_checkpoint_has_a_control(controls) -> None:
    """Each part of a checkpoint needs an entry in DAMAGES."""
    damaged = {name.split(".")[0] for _, name, _ in DAMAGES}
    for recipe, (killed, _) in controls.items():
        saved = read_checkpoint(step_files(killed / "checkpoints")[-1])
        kinds = {name.split(".")[0] for name in saved.tensors} | saved.metadata.keys()
        assert kinds - NOT_RESULTS <= damaged
        moments = {name.rpartition(".")[2] for name in saved.tensors if name.startswith("optimizer.")}
        assert {f"optimizer.{moment}" for moment in moments} <= {name for r, name, _ in DAMAGES if r == recipe}


# -- sequences of faults


class Fault:
    """Kills the process, or fills the disk, at the `number`-th write of a file."""

    def __init__(self, number: int, fraction: float, full: bool) -> None:
        self.number, self.fraction, self.full = number, fraction, full

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        real, writes = os.replace, 0

        def replace_or_fail(beside: Path, path: Path) -> None:
            nonlocal writes
            writes += 1
            if writes < self.number:
                real(beside, path)
            elif self.full:
                raise_disk_full()
            else:  # a dead process makes no later write either
                if writes == self.number:
                    size = int(self.fraction * beside.stat().st_size)
                    left = path.parent / f".{path.name}.0.partial"
                    left.write_bytes(beside.read_bytes()[:size])
                raise Killed

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replace_or_fail)
            yield


class Faults(RuleBasedStateMachine):
    """A run that resumes after kills, full disks and damage ends with the same bits as a run without faults.

    If two processes have trained a part of it, the numbers may differ by the rounding of another order of additions.
    """

    reference_run: Any = None
    folder: Path
    together: bool = False  # whether two processes have trained a part

    @initialize(step=st.integers(3, 2 * STEPS - 1))
    def begin(self, step: int) -> None:
        """Kill the run at some step, so that every example has a resume."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.train(killed_before(step))

    def train(self, fault: Any, devices: int = 1) -> None:
        line, self.together = None, self.together or devices > 1
        try:
            with fault:
                train_tiny_exact(self.folder, EVERY_STEP, f"trainer.devices={devices}")
        except Killed:
            pass
        except UserError as error:
            line = str(error)
        if line is not None and "delete " in line:
            shutil.rmtree(self.folder / "checkpoints")
        elif line is not None:
            assert line.endswith("cannot be written: No space left on device")

    @rule(step=st.integers(0, 2 * STEPS - 1), devices=st.sampled_from([1, 2]))
    def killed_before_a_step(self, step: int, devices: int) -> None:
        self.train(killed_before(step), devices)

    @rule(number=st.integers(1, 20), fraction=st.floats(0, 1), full=st.booleans())
    def killed_or_without_space_in_a_write(self, number: int, fraction: float, full: bool) -> None:
        self.train(Fault(number, fraction, full).active())

    @rule(fraction=st.none() | st.floats(0, 0.99), best=st.booleans())
    def newest_checkpoint_is_cut_or_lost(self, fraction: float | None, best: bool) -> None:
        folder = self.folder / "checkpoints"
        for path in [folder / BEST_FILE] * (best and (folder / BEST_FILE).exists()) or step_files(folder)[-1:]:
            content = path.read_bytes()
            path.unlink()
            if fraction is not None:
                path.write_bytes(content[: int(fraction * len(content))])

    def teardown(self) -> None:
        self.train(contextlib.nullcontext())
        run = train_tiny_exact(self.folder, EVERY_STEP)  # continue if `train` has deleted the checkpoints
        if self.together:
            assert_close(weights_and_history(run), self.reference_run)
        else:
            assert weights_and_history(run) == self.reference_run
        assert run.state == "done"
        assert not list(self.folder.rglob("*.partial"))


def assert_close(run: Any, reference: Any) -> None:
    """Check that weights and history are equal within rounding."""
    (weights, rows), (expected, others) = run, reference
    for name, value in load(expected).items():
        assert torch.allclose(load(weights)[name], value, rtol=0, atol=1e-6), name
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


@pytest.fixture
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start processes by fork: that is fast, and they contain this process's patches for faults."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)


@pytest.mark.usefixtures("_forked")
def test_any_sequence_of_faults_ends_with_the_same_bits(reference_run, tmp_path: Path) -> None:
    machine = type("Machine", (Faults,), {"reference_run": reference_run, "folder": tmp_path / "run"})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=4, stateful_step_count=4, deadline=None, phases=[Phase.generate])
    )


@pytest.mark.usefixtures("_forked")
def test_another_number_of_processes_goes_on_with_the_same_numbers(reference_run, tmp_path: Path) -> None:
    for step, devices in ((3, 1), (STEPS + 3, 2)):
        train_until_killed(tmp_path / "run", step, f"trainer.devices={devices}")
    run = train_tiny_exact(tmp_path / "run", EVERY_STEP)
    assert "continuing from epoch 2, step 11" in (run.folder / "train.log").read_text()
    assert_close(weights_and_history(run), reference_run)
    with pytest.raises(AssertionError):  # it detects a difference of one part in a thousand
        assert_close(weights_and_history(train_tiny_exact(tmp_path / "other", "optimizer.lr=0.0010010")), reference_run)


def test_the_faults_are_real(tmp_path: Path) -> None:
    """Without working faults, the tests above would prove nothing."""
    with pytest.raises(Killed), Fault(1, 0.5, full=False).active():
        train_tiny_exact(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir() if "partial" in path.name] == [".config.yaml.0.partial"]
    with pytest.raises(UserError, match="No space left"), Fault(12, 0.5, full=True).active():
        train_tiny_exact(tmp_path / "b", EVERY_STEP)
    run = RunDirectory(tmp_path / "b")
    assert run.state == "killed"  # the full disk also prevented the status update
