"""A config folder from a stranger runs nothing, whatever it says to Hydra."""

from __future__ import annotations

from pathlib import Path

import pytest

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
