"""Comparing two runs: what counts as a difference, and which one is reported."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from zfnet.runs.compare import _without_new_keys, compare_runs, first_difference, largest_differences
from zfnet.runs.directory import RunDirectory

Row = dict[str, Any]
NUMBERS = st.floats(0, 10) | st.none()
ROWS = st.lists(
    st.fixed_dictionaries({"train_loss": NUMBERS, "validation_loss": NUMBERS, "seconds": NUMBERS}), max_size=4
)
HISTORIES = ROWS.map(lambda rows: [{"epoch": n, **row} for n, row in enumerate(rows, start=1)])


@given(HISTORIES)
def test_a_history_equals_itself_whatever_the_times(history: list[Row]) -> None:
    slower = [{**row, "seconds": 99.0, "images_per_second": 1.0} for row in history]
    assert first_difference(history, slower) is None
    assert largest_differences(history, slower) == {}


@given(HISTORIES, HISTORIES)
def test_the_first_difference_is_the_first(old: list[Row], new: list[Row]) -> None:
    difference = first_difference(old, new)
    if difference is None:
        assert [(r["train_loss"], r["validation_loss"]) for r in old] == [
            (r["train_loss"], r["validation_loss"]) for r in new
        ]
        return
    before = difference["epoch"] - 1
    assert first_difference(old[:before], new[:before]) is None
    assert difference["recorded"] != difference["now"]


def test_the_last_bit_counts() -> None:
    old, new = [{"train_loss": 0.1 + 0.2}], [{"train_loss": 0.3}]
    assert first_difference(old, new) == {"epoch": 1, "metric": "train_loss", "recorded": 0.1 + 0.2, "now": 0.3}


def test_nan_equals_nan() -> None:
    assert first_difference([{"validation_loss": float("nan")}], [{"validation_loss": float("nan")}]) is None
    assert first_difference([{"validation_loss": float("nan")}], [{"validation_loss": 1.0}])["epoch"] == 1


def test_a_missing_epoch_and_a_missing_column_are_differences() -> None:
    row = {"epoch": 1.0, "train_loss": 1.0}
    assert first_difference([row], [])["epoch"] == 1
    assert first_difference([row], [row | {"test_loss": 2.0}])["metric"] == "test_loss"


def test_the_largest_difference_of_each_metric_is_found() -> None:
    old = [{"train_loss": 1.0, "lr": 0.1}, {"train_loss": 1.0, "lr": 0.1}, {"train_loss": 1.0, "lr": 0.1}]
    new = [{"train_loss": 1.5, "lr": 0.1}, {"train_loss": 3.0, "lr": 0.1}, {"train_loss": 0.5, "lr": 0.1}]
    differences = largest_differences(old, new)
    assert list(differences) == ["train_loss"]
    assert differences["train_loss"] == {"epoch": 2, "recorded": 1.0, "now": 3.0, "difference": 2.0}


def test_what_an_earlier_version_did_not_record_is_no_difference(tiny_run, tmp_path: Path) -> None:
    """The images' fingerprint and the mean class accuracy follow from other values that are compared."""
    earlier = RunDirectory(shutil.copytree(tiny_run.folder, tmp_path / "earlier"))
    results, environment = tiny_run.read_json("results.json"), tiny_run.environment
    for part in ("validation", "test"):
        del results[part]["mean_class_accuracy"]
    del environment["data"]
    earlier.write_json("results.json", results)
    earlier.write_json("environment.json", environment)
    comparison = compare_runs(earlier, tiny_run)
    assert comparison["identical"]
    assert comparison["surroundings"] == []
    assert not compare_runs(tiny_run, earlier)["identical"]


def test_code_that_earlier_versions_did_not_hash_is_no_difference() -> None:
    now = {"code.imported.a": "1", "code.changed": ["zfnet"]}
    assert _without_new_keys({}, now) == {"code.changed": ["zfnet"]}
    assert _without_new_keys({"code.imported.a": "2"}, now) == now
