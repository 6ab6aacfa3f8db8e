"""Callbacks: snapshots, early stopping and users' callbacks, which are exact after a kill and a resume."""

from __future__ import annotations

import contextlib
import math
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.explain.trained import Trained
from tests.helpers import (
    EVERY_STEP,
    STEPS,
    TINY,
    TINY_EXACT,
    Killed,
    assert_resumes_exactly,
    compose,
    compose_checked,
    killed_before,
    train_tiny_exact,
    train_until_killed,
    training_state,
    weights_and_history,
)
from tests.own import GradNorm, HookRecorder, StepCounter
from zfnet.config.errors import UserError
from zfnet.config.reading import read_config
from zfnet.jobs import train as train_module
from zfnet.runs.directory import RunDirectory
from zfnet.runs.session import Stopped
from zfnet.runs.weights import load_model
from zfnet.training import loop
from zfnet.training.callbacks import Checkpoints, EarlyStopping, Metrics, Pruning, StopOnSignal, format_duration
from zfnet.training.checkpoint import (
    BEST_FILE,
    Checkpoint,
    CheckpointWriter,
    epoch_files,
    read_checkpoint,
    read_newest,
    step_files,
    unpack,
)


def stopped(*_: object) -> None:
    raise Stopped(signal.SIGTERM)


def test_the_last_snapshot_is_the_network_as_training_left_it(trained: Trained) -> None:
    snapshots = epoch_files(trained.run.snapshots)
    assert list(snapshots) == [1, 3, 6]
    models = {epoch: load_model(path) for epoch, path in snapshots.items()}
    last = read_checkpoint(step_files(trained.run.checkpoints)[-1]).tensors
    for name, value in models[6][0].state_dict().items():
        assert torch.equal(value, last[f"model.{name}"])
    assert models[1][1].classes == trained.images.classes
    first = models[1][0].conv1.weight
    assert not torch.equal(first, models[3][0].conv1.weight)


def test_a_run_that_goes_on_keeps_its_snapshots_and_writes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        "scheduler=constant",  # does not depend on the run's length
        "trainer.snapshots=[1,2]",
    )
    with monkeypatch.context() as patch:
        patch.setattr(Metrics, "on_epoch_end", stopped)
        with pytest.raises(Stopped):
            train_tiny_exact(tmp_path / "run", *words)
    run = RunDirectory(tmp_path / "run")
    assert list(epoch_files(run.snapshots)) == [1]
    before = epoch_files(run.snapshots)[1].stat().st_mtime_ns
    train_tiny_exact(run.folder, *words)
    snapshots = epoch_files(run.snapshots)
    assert list(snapshots) == [1, 2]
    assert snapshots[1].stat().st_mtime_ns == before
    last = read_checkpoint(step_files(run.checkpoints)[-1]).tensors
    assert torch.equal(load_model(snapshots[2])[0].fc8.bias, last["model.fc8.bias"])


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


# -- callbacks of a config

EARLY = ("callbacks=early_stopping", "callbacks.early_stopping.patience=2", "trainer.epochs=8")


def test_early_stopping_ends_after_its_patience_and_says_so(tmp_path: Path, fake_validation) -> None:
    fake_validation(loss=[1.0, 0.9, 0.95, 0.8, 0.85, 0.81, 0.1, 0.1])
    run = train_tiny_exact(tmp_path / "run", *EARLY, "data.subset=18")
    assert [row["epoch"] for row in run.read_history()] == [1, 2, 3, 4, 5, 6]
    assert run.state == "done"
    assert run.read_json("results.json")["epochs"] == 6
    log = (run.folder / "train.log").read_text()
    assert "early stopping after epoch 6: validation_loss did not improve for 2 epochs, best 0.8000" in log


def test_early_stopping_takes_min_delta_and_metrics_that_rise() -> None:
    rising = EarlyStopping("validation_accuracy", patience=1, min_delta=0.1)
    state = SimpleNamespace(should_stop=False)
    for value, stops in ((0.2, False), (0.31, False), (0.4, True)):
        rising.on_epoch_end(state, {"epoch": 1, "validation_accuracy": value})
        assert state.should_stop is stops
    first_is_nan = EarlyStopping(patience=1)
    for value in (math.nan, 2.0, 1.0):
        first_is_nan.on_epoch_end(SimpleNamespace(), {"epoch": 1, "validation_loss": value})
    assert (first_is_nan.best, first_is_nan.waited) == (1.0, 0)


def test_early_stopping_is_exact_after_kills(tmp_path: Path, fake_validation, monkeypatch) -> None:
    """Kills in three epochs and in the last step; then, after the last step, in each of the three parts that follow."""
    fake_validation(loss=[1.0, 0.9, 0.95, 0.96, 0.1, 0.1, 0.1, 0.1])
    expected = weights_and_history(train_tiny_exact(tmp_path / "whole", *EARLY))
    assert len(expected[1]) == 4
    for step in (9, 2 * STEPS + 3, 3 * STEPS, 4 * STEPS - 1):
        train_until_killed(tmp_path / "run", step, *EARLY)
    for owner, name in ((loop, "measure"), (EarlyStopping, "on_epoch_end"), (train_module, "_report")):
        real = getattr(owner, name)

        def killed(*words: Any, real: Any = real) -> Any:
            state = next(w for w in words if hasattr(w, "steps_per_epoch"))
            if state.step == 4 * STEPS:
                raise Killed
            return real(*words)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            with pytest.raises(Killed):
                train_tiny_exact(tmp_path / "run", EVERY_STEP, *EARLY)
        monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("a step was trained"))
    assert weights_and_history(train_tiny_exact(tmp_path / "run", *EARLY)) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("patience=0", "callbacks.early_stopping (EarlyStopping): patience must be at least 1 ("),
        ("patience=many", "callbacks.early_stopping.patience=many: must be a number"),
        ("patient=3", "callbacks.early_stopping.patient: EarlyStopping has no such setting; did you mean"),
    ],
)
def test_early_stopping_names_a_setting_that_means_nothing(word: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        compose_checked(*TINY_EXACT, EARLY[0], f"++callbacks.early_stopping.{word}")


def test_what_is_not_measured_is_named_before_data_is_read() -> None:
    expected = r"callbacks\.early_stopping\.monitor=test_loss: is not measured; known: train_loss, train_accuracy, val"
    words = (*TINY_EXACT, EARLY[0], "callbacks.early_stopping.monitor=test_loss")
    with pytest.raises(UserError, match=expected):
        compose_checked(*words)
    compose_checked(*words, "trainer.test_each_epoch=true")


def test_what_the_data_does_not_measure_is_named_before_the_first_step(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("a step was trained"))
    words = (EARLY[0], "data.validation=0", "trainer.monitor=train_loss")
    expected = (
        r"callbacks\.early_stopping\.monitor=validation_loss: is not measured; known: train_loss, train_accuracy$"
    )
    with pytest.raises(UserError, match=expected):
        train_tiny_exact(tmp_path / "run", *words)


def test_callbacks_of_one_name_are_refused() -> None:
    """A checkpoint would contain the state of only one of them."""
    pair = [StepCounter(), StepCounter()]
    training_state(compose(*TINY_EXACT), callbacks=pair)  # checkpoints store no state of callbacks without a name
    for callback in pair:
        callback.name = "mine"
    with pytest.raises(UserError, match=r"^callbacks\.mine: 2 callbacks have this name; give each its own$"):
        training_state(compose(*TINY_EXACT), callbacks=pair)


OWN = ("imports=[tests]", "+callbacks.mine._target_=tests.own.StepCounter")
NORM = ("imports=[tests]", "+callbacks.mine._target_=tests.own.GradNorm")


def test_a_column_of_ones_own_holds_the_gradients_norm(tmp_path: Path, monkeypatch) -> None:
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(float(clip(*args))))
    with killed_before(STEPS + 3), pytest.raises(Killed):
        train_tiny_exact(tmp_path / "run", *NORM, EVERY_STEP, "trainer.clip_norm=1e-3")
    history = train_tiny_exact(tmp_path / "run", *NORM, EVERY_STEP, "trainer.clip_norm=1e-3").read_history()
    assert [row["grad_norm"] for row in history] == pytest.approx([norms[STEPS - 1], norms[-1]], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("+callbacks.mine.column=seconds",), "callbacks.mine: history.csv already has a column seconds; choose"),
        (("+callbacks.mine.column=train_loss",), "callbacks.mine: history.csv already has a column train_loss"),
        (("+callbacks.other._target_=tests.own.GradNorm",), "callbacks.other: history.csv already has a column grad"),
    ],
)
def test_a_column_that_is_taken_is_refused(words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        compose_checked(*TINY_EXACT, *NORM, *words)


@pytest.mark.parametrize("name", ["NoMeasure", "ColumnsAsText"])
def test_columns_that_nothing_measures_are_refused_before_data_is_read(name: str) -> None:
    with pytest.raises(UserError, match=r"^callbacks\.mine: columns must be a list of the names of the values"):
        compose_checked(*TINY_EXACT, *NORM, f"callbacks.mine._target_=tests.own.{name}")


def test_a_misspelt_hook_is_refused_before_data_is_read() -> None:
    with pytest.raises(
        UserError, match=r"^callbacks\.mine: there is no hook on_epoch_ends; did you mean 'on_epoch_end'"
    ):
        compose_checked(*TINY_EXACT, *NORM, "callbacks.mine._target_=tests.own.Misspelt")


def test_a_callback_that_does_not_give_its_number_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"callbacks.mine \(GradNorm\): .*measure\(\) did not return other"):
        train_tiny_exact(tmp_path / "run", *NORM, "+callbacks.mine.column=other")


def test_what_a_callback_writes_into_the_row_changes_no_history(tmp_path: Path) -> None:
    words = ("+callbacks.other._target_=tests.own.Writer", "trainer.epochs=1", "data.subset=18")
    run = train_tiny_exact(tmp_path / "run", *NORM, *words)
    assert "written" not in run.read_history()[0]


def test_a_metric_without_a_value_leaves_its_cell_empty(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tests.own.GradNorm.measure", lambda *_: {"grad_norm": float("nan")})
    early = ("callbacks=early_stopping", "callbacks.early_stopping.monitor=grad_norm")
    run = train_tiny_exact(tmp_path / "run", *early, *NORM, "callbacks.early_stopping.patience=1", "data.subset=18")
    assert [row["grad_norm"] for row in run.read_history()] == [None, None]


def test_callback_of_ones_own_is_restored_exactly(tmp_path: Path) -> None:
    def kept(folder: Path) -> dict[str, Any]:
        saved, _ = read_newest(folder / "checkpoints")
        assert saved is not None
        assert saved.metadata["step"] == 2 * STEPS
        states: dict[str, Any] = unpack(saved.metadata["callbacks"], saved.tensors)
        return states["mine"]

    run = assert_resumes_exactly(tmp_path, (3, STEPS, 13), *OWN)
    expected, restored = kept(tmp_path / "whole"), kept(run.folder)
    assert restored["steps"] == expected["steps"] == 2 * STEPS
    assert restored["epochs"] == expected["epochs"] == [(1, STEPS), (2, 2 * STEPS)]
    assert torch.equal(restored["total"], expected["total"])


def test_callback_hooks_are_called_in_the_documented_order(tmp_path: Path) -> None:
    words = ("imports=[tests]", "+callbacks.mine._target_=tests.own.HookRecorder")
    HookRecorder.calls.clear()
    train_tiny_exact(tmp_path / "run", *words)
    expected: list[tuple[str, int]] = [("on_fit_start", 0)]
    for epoch in range(2):
        expected.append(("on_epoch_start", epoch * STEPS))
        for step in range(epoch * STEPS, (epoch + 1) * STEPS):
            expected += [("on_before_optimizer_step", step), ("on_optimizer_step", step), ("on_step_end", step + 1)]
        expected.append(("on_epoch_end", (epoch + 1) * STEPS))
    assert HookRecorder.calls == [*expected, ("on_fit_end", 2 * STEPS)]
    HookRecorder.calls.clear()
    train_until_killed(tmp_path / "dead", 2, *words)
    assert HookRecorder.calls[-2:] == [("on_step_end", 2), ("on_exception", 2)]
    HookRecorder.calls.clear()
    train_until_killed(tmp_path / "dead", 3, *words)
    assert HookRecorder.calls[:3] == [("on_fit_start", 0), ("on_epoch_start", 2), ("on_before_optimizer_step", 2)]


def test_a_callback_that_stops_within_an_epoch_ends_the_epoch_after_a_kill_too(tmp_path: Path) -> None:
    words = ("imports=[tests]", "+callbacks.mine._target_=tests.own.StopAtStep", "trainer.epochs=3")
    run = assert_resumes_exactly(tmp_path, (5,), *words)
    assert len(run.read_history()) == 1


def test_metrics_have_probabilities_and_the_run_directory(tmp_path: Path, monkeypatch) -> None:
    seen = []

    def look(self, state, results):
        seen.append((state.folder, tuple(results["validation"].probabilities.shape)))
        return {"grad_norm": 1.0}

    monkeypatch.setattr(GradNorm, "measure", look)
    train_tiny_exact(tmp_path / "run", *NORM, "trainer.epochs=1")
    assert seen == [(tmp_path / "run", (8, 10))]


def test_a_metric_that_names_no_columns_is_refused() -> None:
    with pytest.raises(UserError, match=r"callbacks.mine: has measure\(\), but columns does not name the values"):
        compose_checked(*TINY_EXACT, "imports=[tests]", "+callbacks.mine._target_=tests.own.NoColumns")


def test_pruning_reports_the_epochs_from_before_a_resume_once() -> None:
    reported = []
    pruning = Pruning(lambda value, epoch: reported.append((epoch, value)) or False)
    history = [{"epoch": 1, "validation_accuracy": 0.1}, {"epoch": 2, "validation_accuracy": 0.2}]
    state: Any = SimpleNamespace(
        config=SimpleNamespace(parent=None, trainer=SimpleNamespace(epochs=9)), history=history
    )
    for _ in range(2):
        pruning.on_epoch_start(state)
    pruning.on_epoch_end(state, {"epoch": 3, "validation_accuracy": 0.3})
    assert reported == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_callback_that_cannot_be_saved_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(StepCounter, "state_dict", lambda self: {"steps": {1, 2}})
    with pytest.raises(UserError, match=r"callbacks\.mine\.steps: a checkpoint cannot store a set"):
        train_tiny_exact(tmp_path / "run", *OWN)


BROKEN = r"callbacks\.mine \(Broken\): KeyError: 'val_loss' \(own\.py, line \d+\) \(HYDRA_FULL_ERROR=1 shows where\)$"
HOOKS = ("on_fit_start", "on_epoch_start", "on_optimizer_step", "on_step_end", "on_epoch_end", "on_fit_end")


@pytest.mark.parametrize("method", [*HOOKS, "state_dict"])
def test_callback_that_fails_is_named(tmp_path: Path, method: str) -> None:
    words = ("imports=[tests]", "+callbacks.mine._target_=tests.own.Broken", f"+callbacks.mine.method={method}")
    with pytest.raises(UserError, match=f"^{BROKEN}"):
        train_tiny_exact(tmp_path / "run", *words, "trainer.epochs=1")


def test_callback_that_fails_to_restore_is_named(tmp_path: Path) -> None:
    words = ("imports=[tests]", "+callbacks.mine._target_=tests.own.Broken", "+callbacks.mine.method=load_state_dict")
    train_until_killed(tmp_path / "run", 2, *words)
    with pytest.raises(UserError, match=f"^{BROKEN}"):
        train_tiny_exact(tmp_path / "run", *words)


def test_callback_that_fails_when_a_run_is_stopped_does_not_keep_others_from_saving(
    tmp_path: Path, capfd, monkeypatch
) -> None:
    words = ("imports=[tests]", "+callbacks.mine._target_=tests.own.Broken", "+callbacks.mine.method=on_exception")
    monkeypatch.setattr(StopOnSignal, "on_step_end", stopped)
    with pytest.raises(Stopped):
        train_tiny_exact(tmp_path / "run", *words)
    assert read_newest(tmp_path / "run/checkpoints")[0].metadata["step"] == 1
    assert re.search(BROKEN, capfd.readouterr().out, re.M)


def test_best_weights_are_there_whatever_ends_the_training_after_an_epoch(
    reference_run, tmp_path: Path, monkeypatch
) -> None:
    """A callback can stop before later callbacks run; the checkpoint then names the epoch's weights as the best."""
    with monkeypatch.context() as patch:
        patch.setattr(StepCounter, "on_epoch_end", stopped)
        with pytest.raises(Stopped):
            train_tiny_exact(tmp_path / "run", *OWN)
    assert (tmp_path / "run/checkpoints" / BEST_FILE).exists()
    assert weights_and_history(train_tiny_exact(tmp_path / "run", *OWN)) == reference_run


def test_an_epoch_is_kept_without_best_weights_that_were_lost(tmp_path: Path) -> None:
    with contextlib.closing(CheckpointWriter(tmp_path)) as writer:
        state = SimpleNamespace(best={"epoch": 1}, checkpoint=lambda: Checkpoint({}, {"step": 3}))
        Checkpoints(writer, 5, [3]).on_epoch_end(state, {"epoch": 3})
        writer.wait()
    assert list(epoch_files(tmp_path)) == [3]


# -- a run's time


class Clock:
    """Replaces the module `time`: each call of the clock returns `seconds` more than the previous one."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def perf_counter(self) -> float:
        self.now += self.seconds
        return self.now


def test_a_run_says_how_long_it_takes_and_each_minute_what_is_left(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.training.callbacks.time", Clock(7))  # called twice in each step
    run = train_tiny_exact(tmp_path / "run", "trainer.log_every=2")
    lines = [line.partition(" INFO ")[2] for line in (run.folder / "train.log").read_text().splitlines()]
    assert lines.count("about 4 min on this CPU, estimated from the first steps") == 1
    left = [line for line in lines if line.endswith("images/s") and " left, " in line]
    assert left[0].startswith("epoch 1, step 5/8: 3 min left, loss ")
    assert [re.split(r"[:,] ", line)[1:3] for line in left] == [
        ["step 5/8", "3 min left"],
        ["step 2/8", "84 s left"],
        ["step 7/8", "14 s left"],
    ]


@pytest.mark.parametrize(("model", "named"), [("zfnet", True), ("small", False)])
def test_a_long_run_on_a_cpu_names_experiments_for_one(tmp_path: Path, monkeypatch, model: str, named: bool) -> None:
    monkeypatch.setattr("zfnet.training.callbacks.time", Clock(600))
    with killed_before(STEPS), pytest.raises(Killed):
        train_tiny_exact(tmp_path / "run", f"model={model}")
    log = (tmp_path / "run/train.log").read_text()
    assert "about 5 h 20 min on this CPU, estimated from the first steps" in log
    assert ("experiments for CPUs: cifar10_fast and, for photographs, photos_small\n" in log) is named


def test_a_resumed_run_says_how_long_its_rest_takes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.training.callbacks.time", Clock(600))
    with killed_before(STEPS), pytest.raises(Killed):
        train_tiny_exact(tmp_path / "run", EVERY_STEP)
    before = (tmp_path / "run/train.log").read_text()
    train_tiny_exact(tmp_path / "run", EVERY_STEP)
    log = (tmp_path / "run/train.log").read_text().removeprefix(before)
    assert "about 2 h 40 min on this CPU, estimated from the first steps" in log  # 8 of the 16 steps


def test_duration_reads_like_a_clock() -> None:
    times = {0.4: "0 s", 99: "99 s", 100: "2 min", 5900: "98 min", 3600 * 2.75: "2 h 45 min"}
    assert {seconds: format_duration(seconds) for seconds in times} == times
