"""pyproject.toml admits no version that .ci/advisories.toml lists as affected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

tomllib = pytest.importorskip("tomllib")  # new in Python 3.11
ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(text) for texts in lists for text in texts]


def advisories() -> list[dict[str, Any]]:
    return tomllib.loads((ROOT / ".ci/advisories.toml").read_text())["advisory"]


def admitted(requirement: Requirement, advisory: dict[str, Any]) -> Iterator[str]:
    """Yield affected versions that a requirement admits on some Python: its floor, and those the advisory names."""
    floors = [f"{s.version}.1" if s.operator == ">" else s.version for s in requirement.specifier if s.operator != "<"]
    affected = SpecifierSet(advisory["affected"])
    for python in PYTHONS:
        if requirement.marker is not None and not requirement.marker.evaluate({"python_version": python}):
            continue
        if python in SpecifierSet(advisory.get("python", "")):
            # a requirement without a floor admits the oldest version, so try a version older than any other
            for version in [*(floors or ["0.0.1"]), *(s.version for s in affected)]:
                if version in affected and version in requirement.specifier:
                    yield version


@pytest.mark.parametrize("advisory", advisories(), ids=lambda a: f"{a['package']} {a['affected']}")
def test_no_declared_floor_admits_an_affected_version(advisory: dict[str, Any]) -> None:
    requirements = [r for r in declared() if r.name == advisory["package"]]
    assert requirements, "no longer declared: remove the advisory"
    for requirement in requirements:
        assert not list(admitted(requirement, advisory)), f"{requirement} admits {advisory['id']}: {advisory['why']}"


@pytest.mark.parametrize(
    ("requirement", "affected", "python", "expected"),
    [
        ("x>=2.9", "<2.10", "", True),
        ("x>=2.10", "<2.10", "", False),
        ("x>=2.10", "<=2.10.0", "", True),
        ("x>2.10.0", "<=2.10.0", "", False),
        ("x>=2.5", ">=2.6.2,<=2.6.3", "", True),
        ("x>=2.6.6", ">=2.6.2,<=2.6.3", "", False),
        ("x", "<3", "", True),
        ("x<2", "<1", "", True),
        ("x>=12; python_version < '3.11'", "<13", ">=3.11", False),
        ("x>=12; python_version < '3.12'", "<13", ">=3.11", True),
    ],
)
def test_admitted(requirement: str, affected: str, python: str, expected: bool) -> None:
    advisory = {"affected": affected, "python": python}
    assert bool(list(admitted(Requirement(requirement), advisory))) is expected
