"""A run that resumes after a stop, a kill or a full disk is bit-identical to an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers import (
    EVERY_STEP,
    STEPS,
    TINY_EXACT,
    Killed,
    assert_resumes_exactly,
    compose,
    killed_before,
    other_process,
    run_py_in,
    train_tiny_exact,
    train_until_killed,
    weights_and_history,
)
from zfnet.config.errors import UserError
from zfnet.jobs import train as train_module
from zfnet.runs.directory import RunDirectory
from zfnet.runs.session import Stopped
from zfnet.training import checkpoint as checkpoint_module
from zfnet.training import loop
from zfnet.training.callbacks import Checkpoints
from zfnet.training.checkpoint import step_files, step_name
from zfnet.training.processes import World
from zfnet.training.schedule import Schedule

ALL_ON = (
    "augment=crop_flip_cutout",
    "model.dropout=0.5",
    "model.norm=batch",
    "trainer.ema=0.8",
    "trainer.accumulate=3",
    "trainer.clip_norm=1",
    "loss.label_smoothing=0.1",
    "scheduler.warmup_epochs=0.5",
)


def test_two_runs_in_one_process_are_equal(reference_run, tmp_path: Path) -> None:
    """Another run between them does not affect the second one."""
    words = ("seed=9", "trainer.epochs=1", "data.subset=27", "trainer.threads=2", "trainer.deterministic=false")
    train_tiny_exact(tmp_path / "between", *words, *ALL_ON)
    assert weights_and_history(train_tiny_exact(tmp_path / "again")) == reference_run


@pytest.mark.parametrize("stops", [[1, 3, 7, 9, 15], [8, 12]], ids=str)
def test_killed_and_resumed(reference_run, tmp_path: Path, stops: list[int]) -> None:
    """Kills: before the second step, twice in one epoch, before and after the last step of an epoch, and at the end."""
    for step in stops:
        train_until_killed(tmp_path / "run", step)
    run = train_tiny_exact(tmp_path / "run", EVERY_STEP)
    assert weights_and_history(run) == reference_run
    assert run.state == "done"


# test_exactness.py resumes adamw with onecycle, and sgd with plateau
@pytest.mark.parametrize(("optimizer", "scheduler"), [("sgd", "onecycle"), ("adamw", "plateau")])
def test_with_everything_on(tmp_path: Path, optimizer: str, scheduler: str) -> None:
    assert_resumes_exactly(tmp_path, (5, 11), *ALL_ON, f"optimizer={optimizer}", f"scheduler={scheduler}")


def test_with_balanced_draws(tmp_path: Path) -> None:
    assert_resumes_exactly(tmp_path, (3, 8), "data.sampler=balanced", "augment=crop_flip", "data.subset=50")


def test_bf16_keeps_the_promise_of_exact(tmp_path: Path) -> None:
    """trainer=exact trainer.precision=bf16: the same bits twice and after a kill, other bits than in fp32."""
    words = ("trainer.precision=bf16", "model.norm=lrn", "model.dropout=0.5", "augment=crop_flip", "data.store_size=32")
    words += ("data.subset=27",)  # 3 steps an epoch
    run = assert_resumes_exactly(tmp_path, [4], *words)
    assert weights_and_history(train_tiny_exact(tmp_path / "fp32", *words[1:])) != weights_and_history(run)


def test_without_a_checkpoint_it_starts_again(reference_run, tmp_path: Path) -> None:
    with killed_before(3), pytest.raises(Killed):
        train_tiny_exact(tmp_path / "run")
    assert not step_files(tmp_path / "run/checkpoints")
    assert weights_and_history(train_tiny_exact(tmp_path / "run")) == reference_run


def test_killed_while_validating(reference_run, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", _raise(Killed))
        with pytest.raises(Killed):
            train_tiny_exact(tmp_path / "run", EVERY_STEP)
    assert step_files(tmp_path / "run/checkpoints")[-1].name == step_name(STEPS)
    assert weights_and_history(train_tiny_exact(tmp_path / "run", EVERY_STEP)) == reference_run


def test_killed_while_reporting(reference_run, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "_report", _raise(Killed))
        with pytest.raises(Killed):
            train_tiny_exact(tmp_path / "run")
    patch_calls: list[int] = []
    monkeypatch.setattr(loop, "train_step", lambda *_: patch_calls.append(1))
    assert weights_and_history(train_tiny_exact(tmp_path / "run")) == reference_run
    assert patch_calls == []  # all steps were already done


def _raise(error: type[BaseException]):
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def test_killed_while_writing_a_checkpoint(reference_run, tmp_path: Path) -> None:
    """An interrupted write leaves a partial file; a file system that lost a synced write leaves a short newest file."""
    train_until_killed(tmp_path / "run", 6)
    files = step_files(tmp_path / "run/checkpoints")
    assert [p.name for p in files] == [step_name(5), step_name(6)]
    content = files[-1].read_bytes()
    (files[-1].parent / f".{step_name(7)}.1.partial").write_bytes(content[:1000])
    files[-1].write_bytes(content[: len(content) // 2])
    log = (tmp_path / "run/train.log").read_text()
    assert "using an earlier one" not in log
    assert weights_and_history(train_tiny_exact(tmp_path / "run", EVERY_STEP)) == reference_run
    log = (tmp_path / "run/train.log").read_text()
    assert f"{files[-1]} is damaged or not a checkpoint" in log
    assert "using an earlier one" in log
    assert "continuing from epoch 1, step 5" in log


def test_a_full_disk_stops_the_run_and_loses_nothing(reference_run, tmp_path: Path, monkeypatch) -> None:
    real = checkpoint_module.write_tensors

    def full(path: Path, *rest) -> None:
        if path.name >= step_name(5) and path.name.startswith("step"):
            raise UserError(f"{path} cannot be written: No space left on device")
        real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "write_tensors", full)
        with pytest.raises(UserError, match="No space left on device"):
            train_tiny_exact(tmp_path / "run", EVERY_STEP)
    run = RunDirectory(tmp_path / "run")
    assert run.state == "failed"
    assert "No space left" in run.read_json("status.json")["error"]
    assert step_files(run.checkpoints)[-1].name == step_name(4)
    assert weights_and_history(train_tiny_exact(tmp_path / "run", EVERY_STEP)) == reference_run


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_after_the_step_and_resume(
    reference_run, tmp_path: Path, run_py, monkeypatch, number: int, code: int
) -> None:
    real, steps = loop.train_step, []

    def signalled(state, batch) -> None:
        real(state, batch)
        steps.append(state.step)
        if state.step == 4 and len(steps) == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop, "train_step", signalled)
    before = signal.getsignal(number)
    answer = run_py(*TINY_EXACT, "hydra.run.dir=r")
    assert answer.code == code
    assert "stopping after this step" in answer.err
    assert "Traceback" not in answer.err
    assert "job=resume run=r" in answer.out
    assert steps == [1, 2, 3, 4]
    run = RunDirectory(tmp_path / "r")
    status = run.read_json("status.json")
    assert (status["state"], status["error"]) == ("stopped", f"stopped by {signal.Signals(number).name}")
    assert signal.getsignal(number) is before
    assert run_py("job=resume", "run=r").code == 0
    assert steps == list(range(1, 2 * STEPS + 1))
    assert weights_and_history(run) == reference_run


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("where", ["loop.evaluate", "callbacks.Checkpoints.on_fit_end"])
def test_a_signal_after_the_last_step_stops_and_loses_nothing(
    reference_run, tmp_path: Path, monkeypatch, where: str, number: int
) -> None:
    """The next start writes the report, without training any step."""
    owner = loop if where == "loop.evaluate" else Checkpoints
    name = where.rpartition(".")[2]
    real = getattr(owner, name)

    def signalled(*words: object, **more: object) -> object:
        result = real(*words, **more)
        if "validation 2" in words or owner is Checkpoints:
            os.kill(os.getpid(), number)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signalled)
        with pytest.raises(Stopped):
            train_tiny_exact(tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    assert run.read_json("status.json")["error"] == f"stopped by {signal.Signals(number).name}"
    assert not run.weights.exists()
    monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("a step was trained again"))
    assert weights_and_history(train_tiny_exact(run.folder)) == reference_run


def test_a_second_signal_stops_at_once_and_saves_no_half_step(
    reference_run, tmp_path: Path, run_py, monkeypatch
) -> None:
    def signalled(_: Schedule) -> None:  # after the optimizer's step, before `state.step` counts it
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run = RunDirectory(tmp_path / "r")
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "step", signalled)
        assert run_py(*TINY_EXACT, "hydra.run.dir=r").code == 130
    assert run.state == "stopped"
    assert weights_and_history(train_tiny_exact(run.folder)) == reference_run


def test_a_run_that_stopped_after_its_last_epoch_is_only_evaluated(tmp_path: Path, reference_run) -> None:
    run = train_tiny_exact(tmp_path / "run")
    run.set_status("stopped")
    assert weights_and_history(train_tiny_exact(run.folder)) == reference_run
    log = (run.folder / "train.log").read_text()
    assert "all 2 epochs are trained; evaluating\n" in log
    assert "continuing from" not in log


@pytest.mark.slow
def test_processes_that_are_really_killed(tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch, then the same command and SIGTERM, then a resume."""
    words = [*TINY_EXACT, EVERY_STEP, "hydra.run.dir=r", "trainer.epochs=12"]
    run = RunDirectory(tmp_path / "r")

    def wait_for_step(step: int, alive: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not any(int(p.stem[5:]) >= step for p in step_files(run.checkpoints)):
            assert alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    # a new interpreter; the other tests' processes are forked from a server that has imported the package
    with subprocess.Popen([sys.executable, ROOT / "run.py", *words], cwd=tmp_path) as process:
        try:
            wait_for_step(10, lambda: process.poll() is None)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert run.state == "killed"
    first = int(step_files(run.checkpoints)[-1].stem[5:])
    with other_process(run_py_in, tmp_path, *words) as other:
        wait_for_step(first + 3, other.is_alive)
        other.terminate()
        other.join(20)
        assert other.exitcode == 143, (tmp_path / "err.txt").read_text()
    assert run.state == "stopped"
    second = int(step_files(run.checkpoints)[-1].stem[5:])
    assert 10 <= first < second < 12 * STEPS
    longer = [w for w in words if not w.startswith("hydra")]
    config = compose(*longer)
    train_module.train(config, run)
    # after an epoch's last step, the signal can arrive before the epoch's validation or after it
    epochs = {(second - 1) // STEPS + 1, second // STEPS + 1}
    log = (run.folder / "train.log").read_text()
    assert any(f"continuing from epoch {epoch}, step {second}\n" in log for epoch in epochs)
    assert weights_and_history(run) == weights_and_history(train_tiny_exact(tmp_path / "whole", "trainer.epochs=12"))


def test_a_checkpoint_is_tensors_and_plain_numbers(tmp_path: Path) -> None:
    train_until_killed(tmp_path / "run", 3, *ALL_ON)
    saved, _ = checkpoint_module.read_newest(tmp_path / "run/checkpoints")
    assert saved is not None
    assert json.loads(json.dumps(saved.metadata)) == saved.metadata
    assert saved.metadata["step"] == 3
    kinds = {name.split(".")[0] for name in saved.tensors}
    assert kinds == {"model", "optimizer", "metrics", "callbacks"}


def test_a_resumed_run_uses_as_many_threads_as_its_record_says(tmp_path: Path, monkeypatch) -> None:
    words = ("trainer.threads=null", "trainer.epochs=1", "data.subset=27")
    train_until_killed(tmp_path / "run", 2, *words)  # tests run with one thread
    monkeypatch.setattr("zfnet.training.device.DEFAULT_THREADS", 2)
    run = train_tiny_exact(tmp_path / "run", EVERY_STEP, *words)
    assert run.threads == 1
    assert train_tiny_exact(tmp_path / "new", *words).threads == 2


def test_a_process_of_torchrun_joins_a_resumed_run(tmp_path: Path, run_py, monkeypatch) -> None:
    train_until_killed(tmp_path / "run", 2)
    joined: list[object] = []
    monkeypatch.setattr(train_module, "torchrun_world", lambda: World(1, 2))
    monkeypatch.setattr(train_module, "run_worker", lambda world, work: joined.append(world))
    assert run_py("job=resume", "run=run").code == 0
    assert joined == [World(1, 2)]
    monkeypatch.setattr("zfnet.jobs.reproduce.torchrun_world", lambda: World(1, 2))
    assert "job=reproduce does not run under torchrun: set trainer.devices" in run_py("job=reproduce", "run=run").err
