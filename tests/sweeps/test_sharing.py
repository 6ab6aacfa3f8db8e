"""Jobs side by side: each process its own GPU, and the same numbers as one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.helpers import MINUTE
from tests.sweeps.test_launch import SMALL
from zfnet.sweeps import launch


@pytest.fixture
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_slot", None)
    monkeypatch.setenv(
        "CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "")
    )  # put back afterwards


@pytest.mark.usefixtures("_own_environment")
def test_processes_take_gpus_in_turn_and_a_dead_one_makes_room(tmp_path: Path, monkeypatch) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "4, 7,GPU-8a"
    given, locks = [], []
    for _ in range(4):
        os.environ["CUDA_VISIBLE_DEVICES"] = "4, 7,GPU-8a"
        monkeypatch.setattr(launch, "_slot", None)  # a process that has none yet
        launch.take_one_gpu(4, tmp_path)
        locks.append(launch._slot)
        given.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert given == ["4", "7", "GPU-8a", "4"]
    launch.take_one_gpu(4, tmp_path)  # the next job of the same process
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    locks[1].release()
    lock, number = launch.take_slot(tmp_path / ".slots")
    assert number == 1
    for each in [lock, *locks]:
        each.release()


@pytest.mark.usefixtures("_own_environment")
@pytest.mark.parametrize(("parallel", "devices"), [(1, "0,1"), (4, "3"), (4, "")])
def test_who_runs_alone_or_has_no_choice_keeps_what_it_has(
    tmp_path: Path, parallel: int, devices: str
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    launch.take_one_gpu(parallel, tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == devices
    assert not (tmp_path / ".slots").exists()


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side_with_the_same_numbers(run_py, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    from joblib.externals import loky

    words = ("-m", *SMALL, "trainer=exact", "optimizer.lr=1e-3,-1")
    answer = run_py(*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=side")
    loky.get_reusable_executor().shutdown()
    assert answer.code == 1
    assert "optimizer.lr=-1: must be greater than 0" in answer.err
    assert run_py(*words).code == 1
    results = [
        json.loads((tmp_path / sweep / "optimizer.lr=0.001/results.json").read_text())
        for sweep in ("side", "s")
    ]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    tables = [(tmp_path / sweep / "summary.csv").read_text().splitlines() for sweep in ("side", "s")]
    assert [line.split(",")[:2] for line in tables[0]] == [line.split(",")[:2] for line in tables[1]]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_submitit_runs_jobs_in_processes_of_their_own_and_requeues_one(tmp_path: Path) -> None:
    """Its local executor stands for SLURM; SIGUSR2 is how it hears that its time is up."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    words = ["-m", *MINUTE, "hydra/launcher=submitit_local"]
    words += ["trainer.epochs=25", "trainer.checkpoint_minutes=1e-5", "seed=3", "hydra.sweep.dir=s"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # for the processes of the jobs
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (found := list(tmp_path.glob("s/*/checkpoints/step-*"))) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    folder = found[0].parents[1]
    status = folder / "status.json"
    os.kill(json.loads(status.read_text())["pid"], signal.SIGUSR2)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    assert json.loads(status.read_text())["state"] == "done"
    log = (folder / "train.log").read_text()
    assert log.count("epoch 25/25") == 1
    assert "going on from epoch" in log
