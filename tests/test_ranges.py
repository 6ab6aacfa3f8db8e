"""Values of another kind than their key takes: named, with what it takes; and what is taken as it was meant."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers import checked
from zfnet.config.errors import UserError
from zfnet.config.schema import Config, read_config


def changed(key: str, value: Any) -> Config:
    """Return the default config, read from plain values of which one is changed."""
    plain = checked().to_dict()
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
        ("trainer.deterministic", 5, "trainer.deterministic=5: must be true or false"),
        ("model.conv1.pool", 1, "model.conv1.pool=1: must be true or false"),
        ("trainer.snapshots", 3, "trainer.snapshots=3: must be a list of whole numbers, as in [1,2]"),
        ("trainer.snapshots", ["a"], "trainer.snapshots=['a']: must be a list of whole numbers, as in [1,2]"),
        ("trainer.clip_norm", "x", "trainer.clip_norm=x: must be a number or null"),
        ("trainer.compile", [], "trainer.compile=[]: must be true or false or text"),
        ("data.mean", "abc", "data.mean=abc: must be a list of numbers, as in [0.5,0.5,0.5]"),
        ("data.mean", [0.5, None, 0.5], "data.mean=[0.5, None, 0.5]: must be a list of numbers"),
        ("data.root", ["a"], "data.root=['a']: must be text or null"),
        ("data.validation", 10**400, "must be a number"),
        ("model", None, "model=null: must be keys and values (name, conv1, "),
        ("model.conv1", 3, "model.conv1=3: must be keys and values (channels, kernel_size, stride, padding, pool)"),
        ("model.conv3", "x\ny", "model.conv3=x y: must be keys and values (channels, "),
        ("optimizer", "sgd", "optimizer=sgd: must be keys and values"),
        ("seed", "ä", "seed=ä: must be a whole number"),
    ],
)  # fmt: skip
def test_another_kind_is_named(key: str, value: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        changed(key, value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_reads_as_the_kind_is_taken() -> None:
    """Environment variables are text."""
    assert changed("seed", "7").seed == 7
    assert changed("trainer.tensorboard", "false").trainer.tensorboard is False
    assert changed("optimizer.lr", 1).optimizer["lr"] == 1
    assert changed("model.dropout", "1e-1").model.dropout == 0.1
    assert changed("data.root", 2024).data.root == "2024"
    assert changed("model.conv3", None).model.conv3 is None
