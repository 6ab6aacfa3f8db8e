"""The environment of a run, as environment.json records it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import raise_disk_full
from zfnet.runs import provenance
from zfnet.runs.provenance import changed_code, describe_environment


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace this project by one with a single file, committed to git."""
    (tmp_path / "zfnet").mkdir()
    (tmp_path / "zfnet/a.py").write_text("a = 1\n")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "one")):
        named = ("-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *named, *words], check=True)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


def code() -> dict:
    return describe_environment(torch.device("cpu"), "exact", [])["code"]


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


def test_code_names_files_and_changes_of_any_bytes(project: Path) -> None:
    (project / "zfnet/a.py").write_bytes(b"a = 1  # caf\xe9\n")
    (project / "zfnet/b b.py").touch()
    changed = code()
    assert "+a = 1  # caf\ufffd\n" in changed["diff"]  # a patch ends with a newline
    assert changed["untracked"] == ["zfnet/b b.py"]


def test_code_without_a_repository_still_has_the_hash_of_the_source(project: Path) -> None:
    before = code()
    (project / ".git").rename(project / "git")
    assert code() == {"source_sha256": before["source_sha256"], "commit": None, "diff": None, "untracked": []}


@pytest.mark.parametrize("place", ["my_lab.py", "my_lab/__init__.py", "my_lab/deep/er.py"])
def test_code_of_an_imported_package_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("a = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_lab", raising=False)
    importlib.import_module("my_lab")

    def now() -> dict[str, Any]:
        return describe_environment(torch.device("cpu"), "exact", ["my_lab", "never_imported"])

    first = now()
    assert first["code"]["imported"].keys() == {"my_lab"}
    assert changed_code(first, now()) == []
    file.write_text("a = 2\n")
    assert changed_code(first, now()) == ["my_lab"]
    if file.parent != tmp_path:
        file.rename(file.with_name("renamed.py"))
        assert changed_code(first, now()) == ["my_lab"] != changed_code(now(), now())
        file.with_name("renamed.py").rename(file)
    zfnets = {**first, "code": {**first["code"], "source_sha256": "0" * 64}}
    assert changed_code(zfnets, now()) == ["zfnet", "my_lab"]
    monkeypatch.setattr(Path, "read_bytes", raise_disk_full)
    assert provenance._source_hash("my_lab") is None
    monkeypatch.undo()
    assert changed_code({}, now()) == changed_code({"code": {"imported": None}}, now()) == []  # earlier records


def test_describe_environment_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/run.py", "seed=1"])
    found = describe_environment(torch.device("cpu"), "exact", [])
    assert json.loads(json.dumps(found)) == found
    assert found["packages"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert (found["mode"], found["device"]) == ("exact", {"type": "cpu"})
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["command"] == ["run.py", "seed=1"]
