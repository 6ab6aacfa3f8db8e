"""Two runs side by side: where their figures part, and what differs around them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from zfnet.config.errors import UserError
from zfnet.config.schema import NOT_IDENTITY, Config, flatten
from zfnet.runs.directory import RunDirectory

# how long things took is nobody's result
_TIMES = ("seconds", "images_per_second")
_LONG = 120  # characters; a longer text, such as a diff, is named by its hash


def compare_runs(recorded: RunDirectory, now: RunDirectory) -> dict[str, Any]:
    """Return what reproduction.json holds: whether two finished runs agree to the bit, and where they do not.

    `variation` lists the settings in which their configs differ, as far as a result can depend on them.
    """
    before, after = recorded.read_history(), now.read_history()
    results = [run.read_json("results.json") for run in (recorded, now)]
    weights = [str(r.get("weights_sha256")) for r in results]
    difference = first_difference(before, after) or _first_in_results(*results)
    return {
        "run": str(recorded.folder),
        "identical": difference is None and weights[0] == weights[1],
        "variation": _differences(*(_settings(run.read_config()) for run in (recorded, now))),
        "epochs": len(after),
        "first_difference": difference,
        "largest_differences": largest_differences(before, after),
        "weights_sha256": {"recorded": weights[0], "now": weights[1]},
        "surroundings": _differences(_surroundings(recorded), _surroundings(now)),
    }


def first_difference(
    recorded: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return the first epoch and metric that are not equal to the bit; None if all are. Times do not count."""
    nothing: Mapping[str, Any] = {}
    for number, (old, new) in enumerate(zip_longest(recorded, now, fillvalue=nothing), start=1):
        for metric, was, found in _pairs(old, new):
            if was != found:
                return {"epoch": number, "metric": metric, "recorded": was, "now": found}
    return None


def largest_differences(
    recorded: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return for each metric that differs somewhere the epoch where it differs most, over the epochs that both have."""
    largest: dict[str, dict[str, Any]] = {}
    for number, (old, new) in enumerate(zip(recorded, now, strict=False), start=1):
        for metric, was, found in _pairs(old, new):
            if was is None or found is None or was == found:
                continue
            size = abs(found - was)
            if metric not in largest or size > largest[metric]["difference"]:
                largest[metric] = {"epoch": number, "recorded": was, "now": found, "difference": size}
    return largest


def _pairs(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for metric in dict.fromkeys([*old, *new]):
        if metric not in _TIMES:
            yield metric, old.get(metric), new.get(metric)


def _first_in_results(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any] | None:
    """Compare what was measured after the last epoch; the weights' hash is reported by itself."""
    aside = (*_TIMES, "weights_sha256")
    parts = [{k: v for k, v in results.items() if k not in aside} for results in (recorded, now)]
    found = _differences(*(flatten(part) for part in parts))
    return {"epoch": None, "metric": found[0].pop("what"), **found[0]} if found else None


def _settings(config: Config) -> dict[str, Any]:
    """Return the settings that a result depends on, by dotted key."""
    aside = {
        "job",
        "run",
        "images",
        *(f"{group}.{key}" for group, keys in NOT_IDENTITY.items() for key in keys),
    }
    return {k: v for k, v in flatten(config.to_dict()).items() if k not in aside and not k.startswith("job.")}


def _surroundings(run: RunDirectory) -> dict[str, Any]:
    """Return environment.json by dotted key; nothing where it is lost, which must not hide a comparison."""
    try:
        found = run.read_json("environment.json")
    except UserError:
        return {}
    plain = flatten(found) if isinstance(found, dict) else {}
    return {key: _brief(value) for key, value in plain.items() if key != "command"}


def _brief(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONG:
        return f"{len(value):,} characters, sha256 {hashlib.sha256(value.encode()).hexdigest()[:16]}"
    return value


def _differences(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"what": key, "recorded": recorded.get(key), "now": now.get(key)}
        for key in dict.fromkeys([*recorded, *now])
        if recorded.get(key) != now.get(key)
    ]
