"""Sweeps as a user runs them: failures, skipping, resuming, refusing, and no trace of one job in the next."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.helpers import TINY, compose
from zfnet.config.errors import UserError
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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings draw no figures, which take most of the time of one this small."""
    monkeypatch.setattr("zfnet.jobs.train.save_figure", lambda *_: None)


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What each file below a folder holds, and when it was written."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "summary.csv", newline="") as file:
        return {row["directory"]: row for row in csv.DictReader(file)}


def test_failures_are_named_the_rest_is_finished_and_rerunning_skips_it(
    run_py, tmp_path, undrawn, monkeypatch
) -> None:
    words = ("-m", *SMALL, "optimizer.lr=1e-3,-1", "seed=0,1")
    answer = run_py(*words)
    assert answer.code == 1
    assert "\njob 3: optimizer.lr=-1 seed=1\n" in answer.out  # and not what all jobs share
    refused = "optimizer.lr=-1: must be greater than 0"
    assert answer.err.splitlines() == [
        "error: 2 of 4 jobs failed",
        f"  optimizer.lr=-1,seed=0: {refused}",
        f"  optimizer.lr=-1,seed=1: {refused}",
    ]
    sweep = tmp_path / "s"
    found = rows(sweep)
    assert {name: row["state"] for name, row in found.items()} == {
        "optimizer.lr=0.001,seed=0": "done",
        "optimizer.lr=0.001,seed=1": "done",
        "optimizer.lr=-1,seed=0": "failed",
        "optimizer.lr=-1,seed=1": "failed",
    }
    assert found["optimizer.lr=-1,seed=0"]["error"] == refused
    assert "Traceback" in (sweep / "optimizer.lr=-1,seed=0/train.log").read_text()
    assert "1 setting, 4 jobs: 2 done, 2 failed" in answer.out
    assert (sweep / "figures/curves.png").is_file()
    results = json.loads((sweep / "optimizer.lr=0.001,seed=1/results.json").read_text())
    assert (
        float(found["optimizer.lr=0.001,seed=1"]["validation_accuracy"]) == results["validation"]["accuracy"]
    )

    # the same again: finished jobs are not even opened, and Hydra's own record stays what it was
    before = {
        **everything_in(sweep / "optimizer.lr=0.001,seed=0"),
        "m": (sweep / "multirun.yaml").read_bytes(),
    }
    monkeypatch.setattr("zfnet.jobs.train.load_splits", lambda *_: pytest.fail("images were loaded"))
    again = run_py(*words)
    assert again.code == 1
    assert again.out.count("finished already: ") == 2
    assert rows(sweep) == found
    assert before == {
        **everything_in(sweep / "optimizer.lr=0.001,seed=0"),
        "m": (sweep / "multirun.yaml").read_bytes(),
    }


def test_another_configs_directory_is_refused_and_left_alone(run_py, tmp_path, undrawn) -> None:
    assert run_py("-m", *SMALL, "seed=0,1").code == 0
    before = everything_in(tmp_path / "s/seed=0")
    record = (tmp_path / "s/multirun.yaml").read_bytes()
    answer = run_py("-m", *SMALL, "model.dropout=0.3", "seed=0,1,2")
    assert answer.code == 1
    assert answer.err.startswith(
        "error: 2 of 3 jobs failed\n  seed=0: s/seed=0 holds a run with another config"
    )
    assert everything_in(tmp_path / "s/seed=0") == before
    assert (tmp_path / "s/multirun.yaml").read_bytes() == record
    assert "dropout: 0.3" in (tmp_path / "s/multirun-2.yaml").read_text()
    assert rows(tmp_path / "s")["seed=2"]["state"] == "done"


def test_a_job_that_breaks_is_logged_and_goes_on_when_the_sweep_is_run_again(
    run_py, tmp_path, undrawn, monkeypatch
) -> None:
    words = ("-m", *SMALL, "trainer=exact", "trainer.epochs=2", "seed=0,1")
    assert run_py(*words[1:-1], "seed=0", "hydra.run.dir=whole").code == 0
    with monkeypatch.context() as patch:
        import zfnet.jobs.train as job

        report = job._report

        def broken(config, *rest):
            if config.seed == 0:
                raise ZeroDivisionError("left over")
            return report(config, *rest)

        patch.setattr(job, "_report", broken)
        answer = run_py(*words)
    assert answer.code == 1
    assert "seed=0: ZeroDivisionError: left over" in answer.err
    log = tmp_path / "s/seed=0/train.log"
    assert "in broken" in log.read_text()
    assert rows(tmp_path / "s")["seed=1"]["state"] == "done"

    assert run_py(*words).code == 0
    assert "going on from epoch 3" in log.read_text()
    digests = [
        json.loads((tmp_path / folder / "results.json").read_text())["weights_sha256"]
        for folder in ("s/seed=0", "whole")
    ]
    assert digests[0] == digests[1]


def test_the_last_job_of_a_mixed_sweep_is_bit_identical_to_the_same_job_alone(
    run_py, tmp_path, undrawn
) -> None:
    words = [word for word in SMALL if not word.startswith("trainer.threads")]
    alone = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *words, "trainer=exact", "hydra.run.dir=alone"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    assert run_py("-m", *words, "trainer.threads=1,null", "trainer=auto,exact").code == 0
    assert alone.wait(timeout=200) == 0
    last = tmp_path / "s/trainer.threads=null,trainer=exact"
    for name in ("results.json", "environment.json"):
        mine, its = (json.loads((folder / name).read_text()) for folder in (last, tmp_path / "alone"))
        key = "weights_sha256" if name == "results.json" else "cpu"
        assert mine[key] == its[key]


def test_threads_and_compiler_are_as_new_for_every_job(monkeypatch) -> None:
    resets = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(True))
    own = torch.get_num_threads()
    resolve_runtime(compose(*TINY, "trainer.threads=1").trainer)
    assert torch.get_num_threads() == 1
    resolve_runtime(compose(*TINY, "trainer.compile=true").trainer)
    assert torch.get_num_threads() == own
    assert resets == [
        True
    ]  # past a number of recompilations it would leave the next job's network uncompiled


@pytest.mark.parametrize(
    "word",
    [
        "data.mean=[0.5,0.5,0.5],[0.4,0.4,0.4]",
        "model.name=a/../b,'c d'",
        "model.name=" + "long" * 60 + ",b",
        "model.name='$(touch x)','..'",
        "trainer.epochs=2,3",  # which SMALL has set already
    ],
)
def test_directory_names_are_safe_whatever_the_values(run_py, tmp_path, monkeypatch, word) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train", lambda *_: 0.5)
    assert run_py("-m", *SMALL, word).code == 0
    found = [path.parent for path in tmp_path.rglob("config.yaml") if path.parent.name != ".hydra"]
    assert len(found) == 2
    for folder in found:
        assert folder.parent == tmp_path / "s"
        assert re.fullmatch(r"[\w.,=+@^~\[\]-]{2,120}", folder.name)


def test_a_sweep_of_one_job_and_of_whole_experiments(run_py, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train", lambda *_: 0.5)
    assert run_py("-m", *SMALL).code == 0
    assert len(list((tmp_path / "s").glob("*/config.yaml"))) == 1
    words = [word for word in SMALL if not word.startswith("experiment")]
    assert run_py("-m", *words, "experiment=quickstart,cifar10_small", "hydra.sweep.dir=e").code == 0
    assert {p.parent.name for p in (tmp_path / "e").glob("*/config.yaml")} == {
        "experiment=quickstart",
        "experiment=cifar10_small",
    }


def test_a_sweep_of_a_job_that_writes_nothing_leaves_nothing(run_py, tmp_path) -> None:
    answer = run_py("-m", "job=summary", "model=small,alexnet_stem", "hydra.sweep.dir=s")
    assert answer.code == 0
    assert answer.out.count("conv1") >= 2
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["multirun.yaml"]


@pytest.mark.parametrize("word", ["optimizer.lrr=1,2", "optimizer=sgd,sdg", "seed=0,1 optimizer.lr"])
def test_what_cannot_be_composed_is_one_line_and_leaves_nothing(run_py, tmp_path, word) -> None:
    answer = run_py("-m", *SMALL, *word.split())
    assert answer.code == 1
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_subdir_may_ask_hydra_for_the_number_of_the_job(run_py, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train", lambda *_: 0.5)
    assert run_py("-m", *SMALL, "seed=0,1", "hydra.sweep.subdir='job-${hydra:job.num}'").code == 0
    assert {p.parent.name for p in tmp_path.glob("s/*/config.yaml")} == {"job-0", "job-1"}


def test_a_grid_refuses_an_interval(run_py, tmp_path) -> None:
    answer = run_py("-m", *SMALL, "optimizer.lr=interval(1e-4,1e-2)")
    assert answer.code == 1
    assert answer.err.startswith("error: optimizer.lr=interval(1e-4,1e-2): a grid needs single values")
    assert not (tmp_path / "s").exists()


def test_batches_go_on_after_a_failure(run_py, tmp_path, monkeypatch) -> None:
    def fails(config, *_):
        if config.seed == 0:
            raise UserError("no luck")
        return 0.5

    monkeypatch.setattr("zfnet.jobs.train.train", fails)
    answer = run_py("-m", *SMALL, "seed=0,1,2", "hydra.sweeper.max_batch_size=1")
    assert answer.err == "error: 1 of 3 jobs failed\n  seed=0: no luck\n"
    assert (tmp_path / "s/seed=2/config.yaml").exists()
