"""Names of a sweep's directories, and Hydra's own record of a run."""

from __future__ import annotations

from pathlib import Path

import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import MINUTE, no_figures
from zfnet.runs.command import overlay
from zfnet.runs.directory import RunDirectory
from zfnet.runs.hydra_record import NAME_LIMIT, short_dirname


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
    with no_figures():
        assert run_py(*MINUTE, "hydra.run.dir=r", "seed=4").code == 0
    folder = tmp_path / "r/.hydra"
    assert sorted(p.name for p in folder.iterdir()) == ["config.yaml", "hydra.yaml", "overrides.yaml"]
    assert yaml.safe_load((folder / "overrides.yaml").read_text()) == [*MINUTE, "seed=4"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["seed"] == 4
    assert config["scheduler"]["max_lr"] == "${optimizer.lr}"  # as composed, so that it still follows
    assert config["hydra"]["job"] == {"chdir": False}  # so that `--config-path` works on it
    own = {"job": {"name": "train"}, "run": None, "images": None}
    later = overlay(RunDirectory(tmp_path / "r"), ["optimizer.lr=0.05"], own)
    assert later.scheduler["max_lr"] == 0.05
    assert later.seed == 4


def test_short_dirname_leaves_out_the_mark_of_a_recorded_runs_keys() -> None:
    assert short_dirname("++optimizer.lr=0.1,++seed=1,+mine.a=++b") == "optimizer.lr=0.1,seed=1,+mine.a=++b"
