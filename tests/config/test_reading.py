"""YAML and JSON of unknown origin: limits are checked before any object is constructed."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import yaml

from zfnet.config.errors import UserError
from zfnet.config.reading import MOST_BYTES, parse_json, read_bytes, read_json, read_yaml
from zfnet.runs.directory import RunDirectory

NAMES = "abcdefghijk"


@pytest.mark.parametrize("tag", ["int", "float", "bool", "timestamp"])
def test_read_yaml_names_a_value_that_does_not_fit_its_tag(tmp_path: Path, tag: str) -> None:
    (tmp_path / "x.yaml").write_text(f"- !!{tag} 'x'\n- !!{tag} ''\n")
    with pytest.raises(ValueError, match=r"value|invalid|could not convert"):
        read_yaml(tmp_path / "x.yaml")


def nested_aliases(item: str, start: str) -> str:
    """Return a document in which each line refers nine times to the line before it."""
    lines = [item.format(name=name, nine=",".join([f"*{before}"] * 9)) for before, name in itertools.pairwise(NAMES)]
    return "\n".join([start, *lines])


YAML = {
    "aliases": (nested_aliases("{name}: &{name} [{nine}]", "a: &a [1]"), "more than 100,000 values"),
    "merges": (nested_aliases("{name}: &{name} {{<<: [{nine}]}}", "a: &a {x: 1}"), "more than 100,000 values"),
    "itself": ("a: &a [*a]", "nested too deeply"),
    "itself, merged": ("a: &a {<<: *a}", "nested too deeply"),
    "itself, as a key": ("? &a [*a]\n: 1", "nested too deeply"),
    "brackets": ("[" * 100_000, "nesting"),
    "deep": ("[" * 60 + "]" * 60, "nested too deeply"),
    "deep blocks": ("- " * 100_000, "nesting"),
    "digits": (f"a: {'9' * 500_000}", "more than 100 digits"),
    "hexadecimal digits": (f"a: 0x{'f' * 500_000}", "more than 100 digits"),
    "a time of day": (f"a: 1{':1' * 200_000}", "more than 100 digits"),
    "a tagged number": (f"a: !!int '{'9' * 500_000}'", "more than 100 digits"),
    "a key twice": ("b: {a: 1, c: 2, a: 3}", "contains 'a' twice"),
    "a key twice at the top": ("a: 1\nb: 2\n'a': 3", "contains 'a' twice"),
    "size": (f"a: {'x' * 2**20}", "larger than 1,048,576 bytes"),
    "a Python tag": ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    "an invalid date": ("a: 2026-99-99", "month must be in"),
}
JSON = {
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep and closed": ("[" * 60 + "]" * 60, "nested too deeply"),
    "digits": ("9" * 500_000, "more than 100 digits"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', "contains 'b' twice"),
    "no JSON": ("x", "Expecting value"),
}


@pytest.mark.parametrize("kind", YAML)
def test_read_yaml_is_bounded(tmp_path: Path, kind: str) -> None:
    text, expected = YAML[kind]
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises((ValueError, yaml.YAMLError), match=expected):
        read_yaml(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read: ") as caught:
        RunDirectory(tmp_path).recorded_config()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", JSON)
def test_read_json_is_bounded(tmp_path: Path, kind: str) -> None:
    text, expected = JSON[kind]
    (tmp_path / "status.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        read_json(tmp_path / "status.json")
    assert RunDirectory(tmp_path).state == "none"


def test_what_honest_files_hold_is_read(tmp_path: Path) -> None:
    content = {"a": [1, -2.5, None, True, "ü", 10**20], "b": {"c": {"d": [[1], []]}}, "n": float("inf")}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert (
        read_yaml(tmp_path / "a.yaml") == read_json(tmp_path / "a.json") == parse_json(json.dumps(content)) == content
    )
    (tmp_path / "empty.yaml").touch()
    assert read_yaml(tmp_path / "empty.yaml") is None


def test_read_bytes_neither_waits_for_a_pipe_nor_reads_without_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="it is not a file"):
        read_bytes(tmp_path / "pipe")
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match="larger than"):
        read_bytes(tmp_path / "sparse", most=1000)
