"""A config folder from a stranger runs nothing, whatever it says to Hydra."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import MINUTE, compose
from zfnet.config.errors import UserError
from zfnet.config.trust import CONF, only_own_folders
from zfnet.runs.directory import RunDirectory

HOSTILE = {
    "callback": "hydra:\n  callbacks:\n    x: {_target_: pathlib.Path.touch, self: witness}\n",
    "launcher": "hydra:\n  launcher: {_target_: pathlib.Path.touch}\n",
    "logging": "hydra:\n  job_logging:\n    version: 1\n    handlers: {x: {'()': pathlib.Path.touch, self: witness}}\n",
    "searchpath": "hydra:\n  searchpath: ['file:///elsewhere']\n",
    "package": "# @package hydra\ncallbacks:\n  x: {_target_: pathlib.Path.touch}\n",
    "placed": "defaults:\n  - other@hydra.callbacks: bad\n",
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("option", ["--config-path", "--config-dir"])
def test_a_hostile_folder_is_refused(run_py, tmp_path: Path, kind: str, option: str) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text(HOSTILE[kind])
    for words in ([option, tmp_path / "other"], [f"{option}={tmp_path / 'other'}"]):
        answer = run_py(*words, "job=summary")
        assert answer.code == 1
        assert answer.err.startswith(f"error: {tmp_path / 'other/config.yaml'}: sets ")
        assert answer.err.count("\n") == 1
    assert not (tmp_path / "witness").exists()


def test_a_group_of_hydras_is_refused(run_py, tmp_path: Path) -> None:
    (tmp_path / "other/hydra/callbacks").mkdir(parents=True)
    (tmp_path / "other/hydra/callbacks/x.yaml").write_text("y: {_target_: pathlib.Path.touch}\n")
    assert "sets a part of Hydra's own configuration" in run_py("--config-dir", tmp_path / "other").err


def test_imports_of_a_folder_from_elsewhere_have_no_effect(run_py, tmp_path: Path) -> None:
    """Not in the folder that holds the config, and not in one that adds a choice to a group."""
    (tmp_path / "my_lab.py").write_text(
        "open('witness', 'w').close()\nimport torch\nclass Mine(torch.optim.SGD): pass\n"
    )
    (tmp_path / "theirs/optimizer").mkdir(parents=True)
    (tmp_path / "theirs/optimizer/mine.yaml").write_text(
        "# @package _global_\nimports: [my_lab]\noptimizer: {_target_: my_lab.Mine, lr: 0.1}\n"
    )
    words = ["--config-dir", "theirs", *MINUTE, "optimizer=mine"]
    answer = run_py(*words)
    assert answer.code == 1
    assert "add imports=[my_lab]" in answer.err
    assert not (tmp_path / "witness").exists()


def test_imports_of_the_command_line_count_with_a_folder_from_elsewhere(run_py, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trusted_lab.py").write_text("import torch\nclass Mine(torch.optim.SGD): pass\n")
    (tmp_path / "ours/optimizer").mkdir(parents=True)
    (tmp_path / "ours/optimizer/mine.yaml").write_text("_target_: trusted_lab.Mine\nlr: 0.1\n")
    answer = run_py("--config-dir", "ours", *MINUTE, "optimizer=mine", "imports=[trusted_lab]", "hydra.run.dir=run")
    assert answer.code == 0, answer.err
    assert RunDirectory(tmp_path / "run").recorded()["imports"] == ["trusted_lab"]
    refused = run_py("job=reproduce", "run=run", "hydra.run.dir=again")
    assert "add imports=[trusted_lab]" in refused.err
    assert run_py("job=evaluate", "run=run", "hydra.run.dir=evaluated").code == 0  # needs no optimizer
    assert run_py("job=reproduce", "run=run", "imports=[trusted_lab]", "hydra.run.dir=again").code == 0


def test_only_own_folders() -> None:
    def source(schema: str, path: str) -> SimpleNamespace:
        return SimpleNamespace(schema=schema, path=path)

    own = [source("pkg", "hydra.conf"), source("file", str(CONF)), source("structured", "")]
    assert only_own_folders(own)
    assert not only_own_folders([*own, source("file", "/elsewhere")])


@pytest.mark.parametrize("value", ["os", "[a.b]", "[1]", "['x y']"])
def test_imports_are_names_of_packages(value: str) -> None:
    with pytest.raises(UserError, match=r"^imports="):
        compose(f"imports={value}")


def _hostile_folder(tmp_path: Path) -> Path:
    (tmp_path / "theirs/experiment").mkdir(parents=True)
    text = "# @package _global_\nhydra:\n  callbacks:\n    x: {_target_: pathlib.Path.touch, self: witness}\n"
    (tmp_path / "theirs/experiment/x.yaml").write_text(text)
    return tmp_path / "theirs"


@pytest.mark.parametrize("option", ["--config-di", "--config-d", "-cd", "--config-dir"])
def test_abbreviated_options_name_folders_too(run_py, tmp_path: Path, option: str) -> None:
    answer = run_py(option, _hostile_folder(tmp_path), "experiment=x", "job=summary")
    assert answer.code == 1
    assert "sets hydra.callbacks" in answer.err
    assert not (tmp_path / "witness").exists()


def test_linked_and_searched_folders_are_checked(run_py, tmp_path: Path) -> None:
    theirs = _hostile_folder(tmp_path)
    (tmp_path / "link").mkdir()
    (tmp_path / "link/experiment").symlink_to(theirs / "experiment")
    (tmp_path / "link/loop").symlink_to(tmp_path / "link")
    for words in (["--config-dir", tmp_path / "link"], [f"hydra.searchpath=[file://{theirs}]"]):
        answer = run_py(*words, "experiment=x", "job=summary")
        assert answer.code == 1
        assert "sets hydra.callbacks" in answer.err
    assert not (tmp_path / "witness").exists()
