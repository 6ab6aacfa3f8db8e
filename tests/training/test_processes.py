"""Several processes train one network as one process does, and the run detects a dead process."""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.helpers import TINY, compose_checked, fork_server, no_figures, other_process, run_py_in, train_tiny
from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.data import Batch
from zfnet.jobs import train as train_module
from zfnet.jobs.train import train_and_test
from zfnet.runs.directory import RunDirectory
from zfnet.runs.session import Stopped, StopRequest
from zfnet.runs.weights import load_run
from zfnet.training import loop
from zfnet.training.checkpoint import step_name
from zfnet.training.device import resolve_runtime
from zfnet.training.processes import World
from zfnet.training.state import TrainingState

# 90 training images in batches of 40, 40 and 10: shares of unequal size, each divided again by accumulation
WORDS = (
    "trainer=exact",
    "trainer.device=cpu",
    "trainer.threads=1",
    "trainer.accumulate=2",
    "trainer.epochs=2",
    "optimizer=sgd",
    "optimizer.lr=0.02",
    "model.dropout=0.5",
    "augment=crop_flip",
    "augment.transforms=[{_target_:torchvision.transforms.v2.ColorJitter,brightness:0.5}]",
    "data.train_images=100",
    "data.batch_size=40",
)


NORM = ("imports=[tests]", "+callbacks.norm._target_=tests.own.GradNorm")  # norm of the whole batch's gradients


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    with no_figures():
        return train_tiny(tmp_path_factory.mktemp("world") / "one", *WORDS, *NORM)


def assert_close(a: RunDirectory, b: RunDirectory) -> None:
    """Check that two runs are equal except for rounding, which depends on the order of additions."""
    for row, other in zip(a.read_history(), b.read_history(), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
        assert row["train_accuracy"] == other["train_accuracy"]
    weights, others = load_run(a.folder).model.state_dict(), load_run(b.folder).model.state_dict()
    moved = sum((weights[name] - others[name]).square().sum() for name in weights).sqrt()
    size = sum(w.square().sum() for w in weights.values()).sqrt()
    assert moved / size < 1e-5


@pytest.mark.slow
def test_two_processes_train_what_one_does(alone: RunDirectory, tmp_path: Path, monkeypatch) -> None:
    context = fork_server()  # the program spawns, as in the next test, which takes seconds longer
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    together = train_tiny(tmp_path / "two", *WORDS, *NORM, "trainer.devices=2")
    assert together.state == "done"
    assert_close(alone, together)
    norms = [[row["grad_norm"] for row in run.read_history()] for run in (alone, together)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert not torch.distributed.is_initialized()


def run_py_with_a_pause(pipe: Connection, *words: Any) -> None:
    """Run run.py, and after two steps send the id of the other training process and wait for an answer."""
    step = loop.train_step

    def paused(state: TrainingState, batch: Batch) -> None:
        step(state, batch)
        if state.step == 2:
            (other,) = multiprocessing.active_children()
            pipe.send(other.pid)
            pipe.recv()

    loop.train_step = paused
    run_py_in(*words)


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_another_number_goes_on(alone: RunDirectory, tmp_path: Path, run_py) -> None:
    folder = tmp_path / "run"
    words = [*WORDS, "trainer.devices=2", "trainer.epochs=2", f"hydra.run.dir={folder}"]
    words += ["experiment=quickstart", "data.test_images=50", "logger=none", "trainer.log_every=1"]
    ours, theirs = multiprocessing.Pipe()
    with other_process(run_py_with_a_pause, theirs, tmp_path, *words) as process:
        theirs.close()  # so that `recv` ends if the process does
        os.kill(ours.recv(), signal.SIGKILL)
        ours.send("go on")
        process.join(40)
        assert process.exitcode == 1
    err = (tmp_path / "err.txt").read_text()
    assert err.startswith("error: training process 2 of 2 was ended by SIGKILL: continue from the last checkpoint")
    assert err.count("\n") == 1, err
    run = RunDirectory(folder)
    assert run.state == "failed"
    assert list(run.checkpoints.glob("step-*"))

    answer = run_py("job=resume", f"run={folder}", "trainer.devices=1")
    assert answer.code == 0, answer.err
    assert_close(alone, run)


@pytest.mark.slow
def test_a_signal_to_all_processes_saves_and_stops(tmp_path: Path, monkeypatch, capfd) -> None:
    context, step = fork_server(), loop.train_step
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)

    def signalled(state: TrainingState, batch: Batch) -> None:  # in process 0 only
        step(state, batch)
        if state.step == 2:
            (other,) = multiprocessing.active_children()
            for number in (other.pid, os.getpid()):
                os.kill(number, signal.SIGTERM)

    monkeypatch.setattr(loop, "train_step", signalled)
    with pytest.raises(Stopped):
        train_tiny(tmp_path / "run", *WORDS, "trainer.devices=2", "trainer.log_every=1")
    assert RunDirectory(tmp_path / "run").state == "stopped"
    assert (tmp_path / "run/checkpoints" / step_name(2)).is_file()
    assert capfd.readouterr().err == "\nstopping after this step; a second signal stops at once without saving\n"


def test_other_processes_have_the_settings_and_threads_of_process_0(tiny_run: RunDirectory, monkeypatch) -> None:
    works: list[Any] = []
    seen: list[Any] = []

    @contextlib.contextmanager
    def capture(count: int, work: Any, folder: Path) -> Iterator[World]:
        works.append(work)
        yield World(0, count)

    def look(config: Config, *_: Any, **__: Any) -> dict:
        seen.append((config.trainer.log_every, config.trainer.devices, resolve_runtime(config.trainer, World(0, 2))))
        seen[-1] += (torch.get_num_threads(),)
        return {}

    monkeypatch.setattr(train_module, "processes", capture)
    monkeypatch.setattr(train_module, "_train", look)
    recorded = tiny_run.read_config()
    trainer = replace(recorded.trainer, log_every=7, devices=2, threads=None)
    monkeypatch.setattr("zfnet.training.device.DEFAULT_THREADS", 6)
    train_and_test(replace(recorded, trainer=trainer), tiny_run, StopRequest())
    monkeypatch.setattr("zfnet.training.device.DEFAULT_THREADS", 2)  # another process can have another default
    works[0](World(1, 2, 1), tiny_run.folder)
    assert recorded.trainer.log_every != 7
    assert seen[0] == seen[1]
    assert (seen[1][:2], seen[1][3]) == ((7, 2), 3)


def test_batch_norm_over_processes_needs_gpus(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cpu", "auto"):
        with pytest.raises(UserError, match="batch normalisation over several processes needs GPUs"):
            compose_checked(*TINY, "model.norm=batch", "trainer.devices=2", f"trainer.device={device}")


@pytest.fixture
def group_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_are_sent_with_as_many_digits_as_the_config_says(group_of_one, precision: str) -> None:
    images, alone = torch.rand(4, 5), torch.nn.Linear(5, 3)
    model = copy.deepcopy(alone)
    wrapped = World(0, 2, 0).wrap(model, torch.device("cpu"), precision)
    wrapped(images).sum().backward()
    alone(images).sum().backward()
    for ours, expected in zip(model.parameters(), alone.parameters(), strict=True):
        sent = expected.grad if precision == "fp32" else expected.grad.bfloat16().float()
        assert torch.equal(ours.grad, sent)
    assert (precision == "fp32") == torch.equal(model.weight.grad, alone.weight.grad)


def test_processes_divide_their_shares_into_as_many_micro_batches() -> None:
    """Two processes get four and five of nine images; trainer.accumulate=4 divides each share."""
    for first, size, sizes in ((0, 5, [2, 2, 1, 0]), (5, 4, [1, 1, 1, 1]), (0, 0, [0, 0, 0, 0])):
        share = Batch(torch.zeros(size, 3, 4, 4), torch.arange(size), torch.arange(size), first, 9)
        parts = list(share.split(4, exactly=True))
        assert [len(part.labels) for part, _ in parts] == sizes
        assert [last for _, last in parts] == [False, False, False, True]
        assert torch.cat([part.labels for part, _ in parts]).tolist() == list(range(size))
