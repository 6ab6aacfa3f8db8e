"""Limits of values, written beside a dataclass's fields and checked in one place."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

from zfnet.errors import UserError


def limits(
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    return field(metadata={"low": low, "high": high, "above": above, "below": below})


def one_of(*choices: Any) -> Any:
    return field(metadata={"choices": choices})


def check_ranges(node: Any, prefix: str) -> None:
    """Walk the dataclasses and compare each value with the limits beside its field."""
    for f in dataclasses.fields(node):
        value, key, rule = getattr(node, f.name), prefix + f.name, f.metadata
        if dataclasses.is_dataclass(value):
            check_ranges(value, key + ".")
        if value is None or not rule:
            continue
        if "choices" in rule:
            if not any(value is c or (isinstance(value, str) and value == c) for c in rule["choices"]):
                options = ", ".join(
                    str(c).lower() if isinstance(c, bool) else str(c) for c in rule["choices"]
                )
                raise UserError(f"{key}={value}: must be one of {options}")
            continue
        if not is_finite(value):
            raise UserError(f"{key}={value}: must be a finite number")
        for bound, wrong, words in (
            ("low", lambda v, b: v < b, "at least"),
            ("high", lambda v, b: v > b, "at most"),
            ("above", lambda v, b: v <= b, "greater than"),
            ("below", lambda v, b: v >= b, "less than"),
        ):
            if rule.get(bound) is not None and wrong(value, rule[bound]):
                raise UserError(f"{key}={value}: must be {words} {rule[bound]:g}")


def is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < float("inf")
