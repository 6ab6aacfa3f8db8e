"""Error messages: one line that names the key and the value."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.helpers import compose_checked
from zfnet.config.errors import UserError, did_you_mean, one_line, printable, yaml_problem
from zfnet.config.reading import read_config


def changed(key: str, value: Any):
    """Read the default config with one value replaced."""
    plain = compose_checked().to_dict()
    *parents, last = key.split(".")
    node = plain
    for parent in parents:
        node = node[parent]
    node[last] = value
    return read_config(plain)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("trainer.epochs", None, "trainer.epochs=null: must be a whole number"),
        ("trainer.epochs", 1.5, "trainer.epochs=1.5: must be a whole number"),
        ("trainer.epochs", True, "trainer.epochs=True: must be a whole number"),
        ("trainer.epochs", [1], "trainer.epochs=[1]: must be a whole number"),
        ("trainer.epochs", {"a": 1}, "trainer.epochs={'a': 1}: must be a whole number"),
        ("trainer.epochs", "7", "trainer.epochs=7: must be a whole number"),
        ("trainer.deterministic", 5, "trainer.deterministic=5: must be true or false"),
        ("model.conv1.pool", 1, "model.conv1.pool=1: must be true or false"),
        ("trainer.snapshots", 3, "trainer.snapshots=3: must be a list"),
        ("trainer.snapshots", ["a"], "trainer.snapshots.0=a: must be a whole number"),
        ("trainer.clip_norm", "x", "trainer.clip_norm=x: must be a number"),
        ("trainer.compile", [], "trainer.compile=[]: must be true or false, or must be one of auto"),
        ("data.mean", "abc", "data.mean=abc: must be a list"),
        ("data.mean", [0.5, None, 0.5], "data.mean.1=null: must be a number"),
        ("data.mean", [0.5, 0.5], "data.mean=[0.5, 0.5]: must have 3 values"),
        ("data.root", ["a"], "data.root=['a']: must be text"),
        ("data.validation", 10**400, "data.validation=1000"),
        ("data.validation", float("nan"), "data.validation=nan: must be a finite number"),
        ("model", None, "model=None: must be a mapping of keys to values"),
        ("model.conv1", 3, "model.conv1=3: must be a mapping of keys to values"),
        ("model.conv3", "x\ny", "model.conv3=x y: must be a mapping of keys to values"),
        ("optimizer", "sgd", "optimizer=sgd: must be a mapping of keys to values"),
        ("seed", "ä", "seed=ä: must be a whole number"),
    ],
)
def test_a_value_of_another_type_is_named(key: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        changed(key, value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_may_be_named_by_a_number() -> None:
    assert changed("data.root", 2024).data.root == "2024"


def test_printable_escapes_what_a_terminal_obeys() -> None:
    assert printable("a\x1b[31m\nb\u202e 猫") == r"a\x1b[31m\nb\u202e 猫"


def test_one_line_takes_the_kind_of_an_error_without_a_message() -> None:
    assert one_line(ValueError("first\n second ")) == "first"
    assert one_line(ValueError("first\n second "), -1) == "second"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_did_you_mean_names_the_closest_or_the_known_words() -> None:
    assert did_you_mean("model.widht", ["model.width", "seed"]) == "; did you mean 'model.width'?"
    assert did_you_mean("x", ["seed", "run"]) == "; known: run, seed"
    assert did_you_mean("0", [f"word{n:02d}" for n in range(26)]).endswith("word23 and 2 more")
    assert did_you_mean("x", []) == ""
    assert did_you_mean(7, ["seed"]) == "; known: seed"  # type: ignore[arg-type]


def test_yaml_problem_names_the_place() -> None:
    with pytest.raises(yaml.YAMLError) as caught:
        yaml.safe_load("a: 1\nb: [")
    assert yaml_problem(caught.value).startswith("line 2, column 5: expected")
