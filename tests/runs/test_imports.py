"""Records that name classes of other packages are refused, unless the command trusts the package."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers import (
    EVERY_STEP,
    STEPS,
    TINY_EXACT,
    Killed,
    compose,
    killed_before,
    train_without_figures,
    weights_and_history,
)
from zfnet.config.errors import UserError
from zfnet.runs.directory import RunDirectory
from zfnet.runs.weights import load_run

TRUST = "imports=[tests]"
NETWORK = ("~model", "+model._target_=tests.own.Network", "+model.width=8")
WORDS = (
    *(word for word in TINY_EXACT if not word.startswith("model.")),
    *NETWORK,
    "optimizer=sgd",
    *(f"~optimizer.{key}" for key in ("momentum", "weight_decay", "nesterov")),
    "optimizer._target_=tests.own.NestedState",
    "+callbacks.mine._target_=tests.own.StepCounter",
    TRUST,
)
REFUSAL = "_target_=tests.own.{}: the package tests is not one that this command imports; if you trust it, add "


def train_own(folder: Path, *words: str) -> RunDirectory:
    return train_without_figures(folder, compose(*WORDS, *words))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run with a network, an optimizer and a callback from another package."""
    return train_own(tmp_path_factory.mktemp("own") / "run")


def test_load_run_imports_only_what_it_is_told_to(own: RunDirectory) -> None:
    assert own.read_json("environment.json")["imports"] == ["tests"]
    with pytest.raises(UserError, match=re.escape("model." + REFUSAL.format("Network"))):
        load_run(own.folder)
    run = load_run(own.folder, ["tests"])
    assert type(run.model).__name__ == "Network"
    assert run.model.features.weight.shape[0] == 8


@pytest.mark.parametrize("job", ["evaluate", "reproduce", "resume"])
def test_jobs_import_only_what_the_command_trusts(own: RunDirectory, run_py, tmp_path: Path, job: str) -> None:
    """The record's own `imports` contain the package, but have no effect."""
    assert "imports:\n- tests" in (own.folder / "config.yaml").read_text()
    folder = own.folder
    if job == "resume":
        folder = tmp_path / "killed"
        with killed_before(STEPS + 3), pytest.raises(Killed):
            train_own(folder, EVERY_STEP)
    refused = run_py(f"job={job}", f"run={folder}")
    assert "the package tests is not one that this command imports" in refused.error
    done = run_py(f"job={job}", f"run={folder}", TRUST)
    assert done.code == 0, done.err
    if job == "resume":
        assert "continuing from epoch 2" in done.out
        assert weights_and_history(RunDirectory(folder)) == weights_and_history(own)
    if job == "reproduce":
        assert "identical" in done.out


def test_record_that_was_changed_to_name_a_package_is_refused(own: RunDirectory, tmp_path: Path, run_py) -> None:
    """For a run from elsewhere, no package that its config or weights name is imported."""
    folder = tmp_path / "strangers"
    shutil.copytree(own.folder, folder)
    (tmp_path / "harm.py").write_text("import pathlib; pathlib.Path('witness').write_text('ran')")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("tests.own.Network", "harm.Network"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"tests.own.Network", b"harm.own1.Network"))
    for job in ("evaluate", "reproduce", "export"):
        answer = run_py(f"job={job}", f"run={folder}", TRUST)
        assert answer.code == 1
        assert "the package harm is not one that this command imports" in answer.err
    assert not (tmp_path / "witness").exists()
