"""The layout that README describes: imports point to the same row or down, and there are no import cycles."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# a folder may import its own row and the rows below it
ROWS = (("jobs", "analyses"), ("sweeps", "training", "explain", "plots"), ("data", "model", "runs"), ("config",))


def _imports(path: Path, modules: set[str], exports: dict[str, str]) -> set[str]:
    """Return the package's modules that a file imports anywhere, including inside functions and for types.

    exports: the defining module of each name that a folder's `__init__` re-exports, such as `zfnet.data.Batches`
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {exports.get(name, name) for name in names} & modules


def _exports() -> dict[str, str]:
    found = {}
    for path in (ROOT / "zfnet").rglob("__init__.py"):
        folder = path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                found |= {f"{folder}.{alias.asname or alias.name}": str(node.module) for alias in node.names}
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    files = {
        p.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): p
        for p in (ROOT / "zfnet").rglob("*.py")
        if p.name != "__init__.py"
    }
    exports = _exports()
    return {name: _imports(path, set(files), exports) - {name} for name, path in files.items()}


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Return what is left after repeatedly removing the nodes that import none of the remaining nodes."""
    remaining = dict(graph)
    while leaves := {name for name, imports in remaining.items() if not imports & remaining.keys()}:
        remaining = {name: imports for name, imports in remaining.items() if name not in leaves}
    return sorted(remaining)


def test_imports_through_a_folder_count_as_those_of_the_file(graph: dict[str, set[str]]) -> None:
    assert "zfnet.data.batches" in graph["zfnet.training.loop"]  # from zfnet.data import Batch, Batches


def test_no_two_files_import_each_other(graph: dict[str, set[str]]) -> None:
    """Neither directly nor through other files."""
    assert cycles(graph) == []


def test_no_two_folders_import_each_other(graph: dict[str, set[str]]) -> None:
    folders: dict[str, set[str]] = {}
    for name, imports in graph.items():
        folder = name.split(".")[1]
        folders.setdefault(folder, set()).update({other.split(".")[1] for other in imports} - {folder})
    assert cycles(folders) == []


def test_arrows_point_down(graph: dict[str, set[str]]) -> None:
    row = {folder: number for number, folders in enumerate(ROWS) for folder in folders}
    up = [
        f"{name} imports {other}"
        for name, imports in graph.items()
        for other in imports
        if row[other.split(".")[1]] < row[name.split(".")[1]]
    ]
    assert not up


def test_the_package_has_folders_only() -> None:
    assert [p.name for p in (ROOT / "zfnet").glob("*.py")] == ["__init__.py"]
    assert {p.name for p in (ROOT / "zfnet").iterdir() if p.is_dir() and p.name != "__pycache__"} == {
        folder for folders in ROWS for folder in folders
    }


def test_no_stem_stands_in_three_folders(graph: dict[str, set[str]]) -> None:
    stems = [name.rpartition(".")[2] for name in graph]
    assert [s for s in set(stems) if stems.count(s) > 2] == []


def test_progress_bars_are_those_of_a_notebook_too() -> None:
    """`tqdm.auto` shows a bar in terminals and in notebooks. `tqdm.tqdm` would be hidden in notebooks."""
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "zfnet").rglob("*.py")}
    assert [
        path for path, text in sources.items() if re.search(r"^\s*(from tqdm import|import tqdm)", text, re.M)
    ] == []
    assert sum("from tqdm.auto import" in text for text in sources.values()) > 5
