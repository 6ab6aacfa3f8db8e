"""The proof of exactness: its recipes are valid, and what it has recorded agrees with itself."""

from __future__ import annotations

import json

import pytest

from benchmarks.exactness import RECIPES, SMALL
from tests.conftest import ROOT
from tests.helpers import compose_checked


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_can_be_trained(name: str) -> None:
    config = compose_checked(*SMALL, *RECIPES[name])
    assert config.trainer.deterministic
    optimizer, scheduler = name.split(", ")[:2]
    assert config.optimizer["_target_"].lower().endswith(f".{optimizer}")
    assert scheduler in config.scheduler["_target_"].lower()


def test_the_record_holds_no_difference() -> None:
    record = json.loads((ROOT / "docs/results/exactness.json").read_text())
    assert record["identical"] == record["tries"] > 0
    assert record["different"] == 0
    assert sum(record["kill_points"]["in the write of"].values()) == record["faults"]["SIGKILL in a write"]
    assert "the loser's record" not in record["two_starts_of_one_directory"]
    for found in record["hashes"].values():
        assert set(found["tries"]) <= {found["undisturbed"]}
