"""Names of a sweep's directories, and Hydra's own record of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.helpers import TINY_EXACT
from zfnet.runs.command import apply_overrides
from zfnet.runs.directory import RunDirectory
from zfnet.runs.hydra_record import NAME_LIMIT, explain_job, short_dirname


@given(st.text(max_size=400))
def test_short_dirname_is_short_and_safe(text: str) -> None:
    name = short_dirname(text)
    assert 0 < len(name.encode()) <= NAME_LIMIT
    assert not set(name) & set('/\\:*?"<>|\n\0 ')
    assert short_dirname(text) == name


def test_short_dirname_is_readable_and_unique() -> None:
    assert short_dirname("optimizer.lr=0.01,seed=3") == "optimizer.lr=0.01,seed=3"
    assert short_dirname("").startswith("default")
    names = {short_dirname("x" * 300 + str(k)) for k in range(50)} | {short_dirname("a/b"), short_dirname("a_b")}
    assert len(names) == 52


def test_write_hydra_record_is_what_hydra_writes(run_py, tmp_path: Path) -> None:
    assert run_py(*TINY_EXACT, "hydra.run.dir=r", "seed=4").code == 0
    folder = tmp_path / "r/.hydra"
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "hydra.yaml", "overrides.yaml"]
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == [*TINY_EXACT, "seed=4"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["seed"] == 4
    assert config["scheduler"]["max_lr"] == "${optimizer.lr}"  # the reference is kept
    assert config["hydra"]["job"] == {"chdir": False}  # so that `--config-path` works with this file
    own = {"job": {"name": "train"}, "run": None, "images": None}
    later = apply_overrides(RunDirectory(tmp_path / "r"), ["optimizer.lr=0.05"], own)
    assert later.scheduler["max_lr"] == 0.05
    assert later.seed == 4


def test_short_dirname_leaves_out_the_mark_of_a_recorded_runs_keys() -> None:
    assert short_dirname("++optimizer.lr=0.1,++seed=1,+mine.a=++b") == "optimizer.lr=0.1,seed=1,+mine.a=++b"


JOBS = sorted((ROOT / "conf/job").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_explain_job_names_every_key_with_its_comment(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    plain = yaml.safe_load(text)
    keys = [f"job.{key}" for key in plain["job"] if key not in ("name", "_target_")]
    keys += [key for key in ("runs", "source") if key in plain]
    lines = explain_job(text, path.stem).splitlines()
    assert len(lines) < 35  # with the groups below, the help fits 40 lines
    for key in keys:
        (line,) = [line for line in lines if line.startswith(f"  {key}=")]
        value = line.split("=", 1)[1].split("  ")[0]
        assert yaml.safe_load(value) == (plain["job"][key[4:]] if key.startswith("job.") else plain[key])
    assert sum(line.startswith(("  job.", "  runs=", "  source=")) for line in lines) == len(keys)
    words = " ".join(" ".join(lines).split())
    for line in text.partition("\nhydra:")[0].splitlines():
        comment = line.partition("#")[2].split()
        assert " ".join(comment) in words or comment == ["@package", "_global_"]
    assert all(len(line) <= 80 for line in lines if not line.startswith("  python"))


def test_help_of_a_job_is_about_that_job(run_py, tmp_path: Path) -> None:
    answer = run_py("job=occlusion", "--help")
    assert answer.code == 0, answer.err
    assert answer.out.startswith("job=occlusion\n")
    assert re.search(r"^  job.patch=null +side of the square in input pixels; null: a", answer.out, re.M)
    assert "augment, callbacks, data" in answer.out
    assert "conv1" not in answer.out.replace("conv5", "")
    assert len(answer.out.splitlines()) < 40
    general = run_py("--help")
    assert "model/ablation: conv_512" in general.out
    assert "kernel_size: 7" in general.out
    (tmp_path / "mine/job").mkdir(parents=True)
    (tmp_path / "mine/job/mine.yaml").write_text("# @package _global_\n# What $it does.\njob: {name: mine}\n")
    own = run_py("--config-dir", "mine", "job=mine", "--help")
    assert own.out.startswith("job=mine\n\nWhat $it does.\n")
