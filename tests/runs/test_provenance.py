"""What environment.json holds about a run's surroundings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zfnet.runs import provenance
from zfnet.runs.provenance import describe_environment


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one file, committed to git, that takes this one's place."""
    (tmp_path / "zfnet").mkdir()
    (tmp_path / "zfnet/a.py").write_text("a = 1\n")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "one")):
        named = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *named, *words], check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


def code() -> dict:
    return describe_environment(torch.device("cpu"), "", "exact")["code"]


def test_code_is_the_commit_and_what_differs_from_it(project: Path) -> None:
    clean = code()
    assert len(clean["commit"]) == 40
    assert (clean["diff"], clean["untracked"]) == ("", [])
    (project / "zfnet/a.py").write_text("a = 2\n")
    (project / "zfnet/b.py").touch()
    changed = code()
    assert "+a = 2" in changed["diff"]
    assert changed["untracked"] == ["zfnet/b.py"]
    assert changed["commit"] == clean["commit"]
    assert changed["source_sha256"] != clean["source_sha256"]


def test_code_without_a_repository_still_has_the_hash_of_the_source(project: Path) -> None:
    before = code()
    (project / ".git").rename(project / "git")
    assert code() == {"source_sha256": before["source_sha256"], "commit": None, "diff": None, "untracked": []}


def test_describe_environment_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/run.py", "seed=1"])
    found = describe_environment(torch.device("cpu"), "abc", "exact")
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert (found["mode"], found["data_fingerprint"], found["device"]) == ("exact", "abc", {"type": "cpu"})
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["command"] == ["run.py", "seed=1"]
