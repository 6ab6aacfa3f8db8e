"""Compare two runs: where their metrics first differ, and what else differs."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from zfnet.config.schema import flatten, result_keys
from zfnet.runs.directory import RunDirectory

# keys that are not results: times, and remarks about the images
_REMARKS = ("validation_chose_and_reports", "unreadable", "test_seen_each_epoch")
_NOT_RESULTS = ("seconds", "images_per_second", *_REMARKS)
_MAX_LENGTH = 120  # characters; a longer text, such as a diff, is replaced by its hash


def compare_runs(recorded: RunDirectory, now: RunDirectory) -> dict[str, Any]:
    """Return the content of reproduction.json: whether two finished runs are bitwise identical, and where they differ.

    `variation` lists the differences between their configs that can affect the results.
    """
    before, after = recorded.read_history(), now.read_history()
    results = [flatten(run.read_json("results.json")) for run in (recorded, now)]
    weights = [str(r.pop("weights_sha256", None)) for r in results]
    results[1] = _without_new_keys(*results)
    settings = [flatten(result_keys(run.read_config().to_dict())) for run in (recorded, now)]
    environments = [environment_values(run) for run in (recorded, now)]
    difference = first_difference(before, after)
    if difference is None and (at_the_end := _differences(*results)):
        difference = {"epoch": None, "metric": at_the_end[0].pop("what"), **at_the_end[0]}
    return {
        "run": str(recorded.folder),
        "identical": difference is None and weights[0] == weights[1],
        "variation": _differences(*settings),
        "epochs": len(after),
        "first_difference": difference,
        "largest_differences": largest_differences(before, after),
        "weights_sha256": {"recorded": weights[0], "now": weights[1]},
        "surroundings": _differences(environments[0], _without_new_keys(*environments)),
    }


def first_difference(recorded: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the first epoch and metric that are not bitwise equal; None if all are equal. Times are ignored."""
    nothing: dict[str, Any] = {}
    for number, (old, new) in enumerate(zip_longest(recorded, now, fillvalue=nothing), start=1):
        if differences := _differences(old, new):
            return {"epoch": number, "metric": differences[0].pop("what"), **differences[0]}
    return None


def largest_differences(
    recorded: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return, for each metric that differs, the epoch with the largest difference among those that both runs have."""
    largest: dict[str, dict[str, Any]] = {}
    for number, (old, new) in enumerate(zip(recorded, now, strict=False), start=1):
        for metric, was, is_now in (d.values() for d in _differences(old, new)):
            if was is None or is_now is None:
                continue
            size = abs(is_now - was)
            if metric not in largest or size > largest[metric]["difference"]:
                largest[metric] = {"epoch": number, "recorded": was, "now": is_now, "difference": size}
    return largest


def environment_values(run: RunDirectory) -> dict[str, Any]:
    """Return the values of environment.json by dotted key, without the command and with long texts hashed."""
    values = {key: value for key, value in flatten(run.environment).items() if key != "command"}
    for key, value in values.items():
        if isinstance(value, str) and len(value) > _MAX_LENGTH:
            values[key] = f"{len(value):,} characters, sha256 {hashlib.sha256(value.encode()).hexdigest()[:16]}"
    return values


def _without_new_keys(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return `now` without keys that an earlier version did not record; they follow from other compared values."""
    later = [k for k in now if k.startswith(("data.", "code.imported")) or k.endswith(".mean_class_accuracy")]
    return {key: value for key, value in now.items() if key in recorded or key not in later}


def _equal(a: Any, b: Any) -> bool:
    """Return whether two values are equal; NaN, such as the validation loss of weights that overflow, equals NaN."""
    return bool(a == b or (a != a and b != b))


def _differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"what": key, "recorded": recorded.get(key), "now": now.get(key)}
        for key in dict.fromkeys([*recorded, *now])
        if not _equal(recorded.get(key), now.get(key))
        and key not in _NOT_RESULTS
        # earlier versions recorded the top-5 accuracy for five classes or fewer, where it is always 1
        and not (key.endswith(".top5") and recorded.get(key) == 1 and now.get(key) is None)
    ]
