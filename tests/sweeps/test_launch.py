"""Sweeps as a user runs them: failed, skipped, resumed and refused jobs, and no effect of one job on the next."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.helpers import EVERY_STEP, TINY, TINY_EXACT, compose, other_process, read_csv, run_py_in
from zfnet.config.errors import UserError
from zfnet.jobs import train as job
from zfnet.sweeps import launch
from zfnet.sweeps.figures import draw_sweep
from zfnet.training.device import resolve_runtime

SMALL = (
    "experiment=quickstart",
    "trainer.epochs=1",
    "logger=none",
    "data.train_images=100",
    "data.test_images=20",
    "data.batch_size=30",
    "trainer.threads=1",
    "hydra.sweep.dir=s",
)
# for tests whose jobs train: the network of TINY_EXACT, and two steps
FAST = (*SMALL, *(word for word in TINY_EXACT if word.startswith("model.")), "data.train_images=60")


def files_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return the content and the modification time of each file below a folder."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def rows(folder: Path) -> dict[str, dict[str, str]]:
    return {row["directory"]: row for row in read_csv(folder / "summary.csv")}


def test_launch_names_failed_jobs_and_skips_finished_ones(run_py, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.sweeps.figures.draw_sweep", draw_sweep)
    monkeypatch.setattr(launch.SweepJobs, "check", lambda *_: None)  # so that the error occurs in the jobs
    words = ("-m", *FAST, "optimizer.lr=1e-3,-1", "seed=0,1")
    answer = run_py(*words)
    assert answer.code == 1
    assert "\njob 3: optimizer.lr=-1 seed=1\n" in answer.out  # without the overrides that all jobs share
    refused = "optimizer.lr=-1: must be a number greater than 0"
    assert answer.err.splitlines() == [
        "error: 2 of 4 jobs failed",
        f"  optimizer.lr=-1,seed=0: {refused}",
        f"  optimizer.lr=-1,seed=1: {refused}",
    ]
    sweep = tmp_path / "s"
    table = rows(sweep)
    assert {name: row["state"] for name, row in table.items()} == {
        "optimizer.lr=0.001,seed=0": "done",
        "optimizer.lr=0.001,seed=1": "done",
        "optimizer.lr=-1,seed=0": "failed",
        "optimizer.lr=-1,seed=1": "failed",
    }
    assert table["optimizer.lr=-1,seed=0"]["error"] == refused
    assert "Traceback" in (sweep / "optimizer.lr=-1,seed=0/train.log").read_text()
    assert "1 setting, 4 jobs: 2 done, 2 failed" in answer.out
    assert (sweep / "figures/curves.png").is_file()
    results = json.loads((sweep / "optimizer.lr=0.001,seed=1/results.json").read_text())
    assert float(table["optimizer.lr=0.001,seed=1"]["validation_accuracy"]) == results["validation"]["accuracy"]

    # the same command again: it does not open finished jobs, and does not change Hydra's record
    before = {**files_in(sweep / "optimizer.lr=0.001,seed=0"), "m": (sweep / "multirun.yaml").read_bytes()}
    monkeypatch.setattr("zfnet.jobs.train.load_splits", lambda *_: pytest.fail("images were loaded"))
    again = run_py(*words)
    assert again.code == 1
    assert again.out.count("finished already: ") == 2
    assert rows(sweep) == table
    assert before == {**files_in(sweep / "optimizer.lr=0.001,seed=0"), "m": (sweep / "multirun.yaml").read_bytes()}


def test_a_sweeps_jobs_print_no_test_accuracy(run_py, tmp_path) -> None:
    """Users who see a test accuracy for each setting would choose by it."""
    answer = run_py("-m", *FAST, "seed=0,1")
    assert answer.code == 0
    logs = [path.read_text() for path in (tmp_path / "s").glob("*/train.log")]
    for text in (answer.out.partition("written to s\n")[0], *logs):
        assert "validation accuracy" in text
        assert "test       accuracy" not in text
    summary = (tmp_path / "s/summary.md").read_text()
    assert "Test accuracy of the best setting by validation" in summary


def test_launch_leaves_another_runs_directory_alone(run_py, tmp_path) -> None:
    assert run_py("-m", *FAST, "seed=0,1").code == 0
    before = files_in(tmp_path / "s/seed=0")
    record = (tmp_path / "s/multirun.yaml").read_bytes()
    answer = run_py("-m", *FAST, "model.dropout=0.3", "seed=0,1,2")
    assert answer.code == 1
    assert answer.err.startswith("error: 2 of 3 jobs failed\n  seed=0: s/seed=0 contains a run with another config")
    assert files_in(tmp_path / "s/seed=0") == before
    assert (tmp_path / "s/multirun.yaml").read_bytes() == record
    assert "dropout: 0.3" in (tmp_path / "s/multirun-2.yaml").read_text()
    assert rows(tmp_path / "s")["seed=2"]["state"] == "done"


def test_launch_again_resumes_a_job_that_broke(run_py, tmp_path, monkeypatch) -> None:
    words = ("-m", *FAST, "trainer=exact", "trainer.epochs=2", "seed=0,1")
    assert run_py(*words[1:-1], "seed=0", "hydra.run.dir=whole").code == 0
    report = job._report

    def broken(config, *rest):
        if config.seed == 0:
            raise ZeroDivisionError("left over")
        return report(config, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(job, "_report", broken)
        answer = run_py(*words)
    assert answer.code == 1
    assert "seed=0: ZeroDivisionError: left over" in answer.err
    log = tmp_path / "s/seed=0/train.log"
    assert "in broken" in log.read_text()
    assert rows(tmp_path / "s")["seed=1"]["state"] == "done"

    assert run_py(*words).code == 0
    assert "all 2 epochs are trained; evaluating" in log.read_text()
    digests = [
        json.loads((tmp_path / folder / "results.json").read_text())["weights_sha256"]
        for folder in ("s/seed=0", "whole")
    ]
    assert digests[0] == digests[1]


def test_launch_job_of_a_mixed_sweep_equals_the_job_alone(run_py, tmp_path) -> None:
    words = [word for word in FAST if not word.startswith("trainer.threads")]
    with other_process(run_py_in, tmp_path, *words, "trainer=exact", "hydra.run.dir=alone") as alone:
        assert run_py("-m", *words, "trainer.threads=1,null", "trainer=auto,exact").code == 0
        alone.join(200)
        assert alone.exitcode == 0, (tmp_path / "err.txt").read_text()
    last = tmp_path / "s/trainer.threads=null,trainer=exact"
    for name in ("results.json", "environment.json"):
        mine, its = (json.loads((folder / name).read_text()) for folder in (last, tmp_path / "alone"))
        key = "weights_sha256" if name == "results.json" else "cpu"
        assert mine[key] == its[key]


def test_resolve_runtime_resets_threads_and_compiler_for_every_job(monkeypatch) -> None:
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    own = torch.get_num_threads()
    resolve_runtime(compose(*TINY, "trainer.threads=1").trainer)
    assert torch.get_num_threads() == 1
    resolve_runtime(compose(*TINY, "trainer.compile=true").trainer)
    assert torch.get_num_threads() == own
    assert resets == [True]  # at the recompilation limit, later jobs would run uncompiled


@pytest.mark.parametrize(
    ("word", "jobs"),
    [
        ("data.mean=[0.5,0.5,0.5],[0.4,0.4,0.4]", 2),
        (f"model.name=a/../b,'c d',{'long' * 60},'$(touch x)','..'", 5),
        ("trainer.epochs=2,3", 2),  # SMALL sets this key, too
    ],
)
def test_launch_names_directories_safely(run_py, tmp_path, monkeypatch, word: str, jobs: int) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train_and_test", lambda *_: {"validation": {"accuracy": 0.5}})
    assert run_py("-m", *SMALL, word).code == 0
    folders = [path.parent for path in tmp_path.rglob("config.yaml") if path.parent.name != ".hydra"]
    assert len(folders) == jobs
    for folder in folders:
        assert folder.parent == tmp_path / "s"
        assert re.fullmatch(r"[\w.,=+@^~\[\]-]{2,120}", folder.name)


def test_grid_of_one_job_and_of_experiments(run_py, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train_and_test", lambda *_: {"validation": {"accuracy": 0.5}})
    assert run_py("-m", *SMALL).code == 0
    assert len(list((tmp_path / "s").glob("*/config.yaml"))) == 1
    words = [word for word in SMALL if not word.startswith(("experiment", "data."))]
    assert run_py("-m", *words, "experiment=quickstart,cifar10_small", "hydra.sweep.dir=e").code == 0
    assert {p.parent.name for p in (tmp_path / "e").glob("*/config.yaml")} == {
        "experiment=quickstart",
        "experiment=cifar10_small",
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("optimizer.lrr=1,2", "no job has started: optimizer.lrr: no such key; did you mean"),
        ("optimizer=sgd,sdg", "no job has started: optimizer=sdg: no such choice; did you mean 'sgd'?"),
        ("seed=0,1 optimizer.lr", ""),
        ("optimizer.lr=interval(1e-4,1e-2)", "optimizer.lr=interval(1e-4,1e-2): a grid needs single values"),
        ("seed=range(3,0)", "seed=range(3,0): names no value"),
        ("optimizer.lr=1,2 hydra.sweep.subdir=a", "no job has started: hydra.sweep.subdir=a: is also another job's;"),
    ],
)
def test_grid_that_cannot_be_composed_is_one_line_and_writes_nothing(run_py, tmp_path, words, expected) -> None:
    answer = run_py("-m", *SMALL, *words.split())
    assert answer.error.startswith(expected)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "optimizer.lr=1e-3,-1 seed=0,1",
            "optimizer.lr=-1: must be a number greater than 0 (the job optimizer.lr=-1 seed=0)",
        ),
        (
            "data.image_size=64,20",
            "data.image_size=53 or more (it is 20), or lower the kernel sizes and strides (the job ",
        ),
        (
            "seed=0,1 trainer.epochs=1,0 hydra.sweeper.max_batch_size=1",
            "trainer.epochs=0: must be at least 1 (the job ",
        ),
        ("optimizer=sgd,adamw optimizer.momentum=0.5", "optimizer.momentum: AdamW has no such setting"),
        ("model=small,null", "model=null: no such choice; known: "),
    ],
)
def test_a_bad_value_is_found_before_the_first_job_trains(run_py, tmp_path, monkeypatch, words, expected) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train", lambda *_: pytest.fail("a job was started"))
    answer = run_py("-m", *SMALL, *words.split())
    assert answer.error.startswith("no job has started: ")
    assert expected in answer.error
    assert not (tmp_path / "s").exists()


def test_the_check_of_a_sweep_imports_nothing_from_elsewhere(run_py, tmp_path, monkeypatch) -> None:
    (tmp_path / "theirs/model").mkdir(parents=True)
    (tmp_path / "theirs/model/own.yaml").write_text(
        "# @package _global_\nimports: [hostile]\nmodel:\n  _target_: hostile.Net\n"
    )
    (tmp_path / "hostile.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    answer = run_py("-m", "--config-dir", "theirs", *SMALL, "+model@_global_=own", "seed=0,1")
    assert answer.code == 1
    assert "add imports=[hostile]" in answer.err


def test_a_key_of_all_swept_groups_is_taken(run_py, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "zfnet.jobs.train.train_and_test", lambda config, *_: {"validation": {"accuracy": config.optimizer["momentum"]}}
    )
    answer = run_py("-m", *SMALL, "optimizer=sgd,rmsprop", "optimizer.momentum=0.25,0.5")
    assert (answer.code, answer.err) == (0, "")
    names = sorted(path.parent.name for path in tmp_path.glob("s/*/config.yaml"))
    assert names == [f"optimizer.momentum={m},optimizer={o}" for m in (0.25, 0.5) for o in ("rmsprop", "sgd")]


def test_launch_resolves_a_subdir_with_the_number_of_the_job(run_py, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train_and_test", lambda *_: {"validation": {"accuracy": 0.5}})
    assert run_py("-m", *SMALL, "seed=0,1", "hydra.sweep.subdir='job-${hydra:job.num}'").code == 0
    assert {p.parent.name for p in tmp_path.glob("s/*/config.yaml")} == {"job-0", "job-1"}


def test_grid_goes_on_after_a_batch_with_a_failed_job(run_py, tmp_path, monkeypatch) -> None:
    def fails(config, *_):
        if config.seed == 0:
            raise UserError("no luck")
        return {"validation": {"accuracy": 0.5}}

    monkeypatch.setattr("zfnet.jobs.train.train_and_test", fails)
    answer = run_py("-m", *SMALL, "seed=0,1,2", "hydra.sweeper.max_batch_size=1")
    assert answer.err == "error: 1 of 3 jobs failed\n  seed=0: no luck\n"
    assert (tmp_path / "s/seed=2/config.yaml").exists()


# -- parallel jobs: each process uses its own GPU, and the results equal those of sequential jobs


@pytest.fixture
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_gpu", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))  # restored afterwards


@pytest.mark.usefixtures("_own_environment")
def test_take_one_gpu_in_turn_and_that_of_a_dead_process(tmp_path: Path, monkeypatch) -> None:
    locks = []

    def take(devices: str) -> str:
        monkeypatch.setattr(launch, "_gpu", None)  # like a process without a GPU
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
        launch.take_one_gpu(4, tmp_path)
        locks.append(launch._gpu)
        return os.environ["CUDA_VISIBLE_DEVICES"]

    assert [take("4, 7,GPU-8a") for _ in range(4)] == ["4", "7", "GPU-8a", "4"]
    launch.take_one_gpu(4, tmp_path)  # the next job of the same process
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4"
    locks[1].release()
    assert take("4, 7,GPU-8a") == "7"
    for lock in locks:
        lock.release()


@pytest.mark.usefixtures("_own_environment")
@pytest.mark.parametrize(("parallel", "devices"), [(1, "0,1"), (4, "3"), (4, "")])
def test_take_one_gpu_keeps_what_a_single_process_has(tmp_path: Path, parallel: int, devices: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = devices
    launch.take_one_gpu(parallel, tmp_path)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == devices
    assert not (tmp_path / ".gpus").exists()


@pytest.mark.slow
def test_launch_with_joblib_gives_the_same_numbers(run_py, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(launch.SweepJobs, "check", lambda *_: None)
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    from joblib.externals import loky

    words = ("-m", *FAST, "trainer=exact", "optimizer.lr=1e-3,-1")
    answer = run_py(*words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweep.dir=side")
    loky.get_reusable_executor().shutdown()
    assert answer.code == 1
    assert "optimizer.lr=-1: must be a number greater than 0" in answer.err
    assert run_py(*words).code == 1
    results = [
        json.loads((tmp_path / sweep / "optimizer.lr=0.001/results.json").read_text()) for sweep in ("side", "s")
    ]
    assert results[0]["weights_sha256"] == results[1]["weights_sha256"]
    tables = [(tmp_path / sweep / "summary.csv").read_text().splitlines() for sweep in ("side", "s")]
    assert [line.split(",")[:2] for line in tables[0]] == [line.split(",")[:2] for line in tables[1]]


TIME_LIMIT = """
import os, signal
from pathlib import Path
from zfnet.jobs import train
from zfnet.training.callbacks import Callback

train.draw_curves = train.draw_results = train.save_figure = lambda *_: None  # figures take seconds

class TimeLimit(Callback):
    def on_step_end(self, state):
        mark = Path(__file__).with_name("signalled")
        if state.step == 10 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGUSR2)
"""


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_launch_with_submitit_requeues_a_job(run_py, tmp_path: Path, monkeypatch) -> None:
    """submitit's local executor replaces SLURM; SIGUSR2 tells it that the job's time limit is reached."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "time_limit.py").write_text(TIME_LIMIT)
    for name in ("draw_curves", "draw_results", "save_figure"):  # the module changes them in this process, too
        monkeypatch.setattr(job, name, getattr(job, name))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")  # for the processes of the jobs
    words = (*TINY_EXACT, "imports=[time_limit]", "+callbacks.limit._target_=time_limit.TimeLimit", EVERY_STEP)
    answer = run_py("-m", *words, "hydra/launcher=submitit_local", "seed=3", "hydra.sweep.dir=s")
    assert answer.code == 0, answer.err
    (status,) = tmp_path.glob("s/*/status.json")
    assert json.loads(status.read_text())["state"] == "done"
    log = status.with_name("train.log").read_text()
    assert log.count("epoch 2/2") == 1
    assert re.search("continuing from epoch 2, step (8|9|10)", log)
