"""Types and limits of values, written beside a dataclass's fields and checked in one place."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import field
from types import NoneType, UnionType
from typing import Any

from omegaconf.nodes import BooleanNode, FloatNode, IntegerNode, StringNode

from zfnet.config.errors import UserError

_NODES: dict[Any, Any] = {int: IntegerNode, float: FloatNode, bool: BooleanNode, str: StringNode}
_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list of whole numbers, as in [1,2]",
    list[float]: "a list of numbers, as in [0.5,0.5,0.5]",
    list[str]: "a list of names, as in [conv4,conv5]",
    NoneType: "null",
}


def limits(
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    return field(metadata={"low": low, "high": high, "above": above, "below": below})


def one_of(*choices: Any) -> Any:
    return field(metadata={"choices": choices})


def check_types(schema: Any, plain: Mapping[str, Any], prefix: str) -> None:
    """Walk a dataclass and compare each value that `plain` gives with its field's type; raise UserError."""
    hints = typing.get_type_hints(schema)
    for f in dataclasses.fields(schema):
        value, hint = plain.get(f.name, "???"), hints[f.name]
        if value == "???":  # it is missing, which is another error
            continue
        kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, UnionType) else (hint,)
        fitting = [kind for kind in kinds if _fits(value, kind)]
        if not fitting:
            wanted = " or ".join(_WORDS.get(kind) or f"keys and values{_keys(kind)}" for kind in kinds)
            shown = "null" if value is None else " ".join(str(value).split())[:60]
            raise UserError(f"{prefix}{f.name}={shown}: must be {wanted}")
        if dataclasses.is_dataclass(fitting[0]):
            check_types(fitting[0], value, f"{prefix}{f.name}.")


def _fits(value: Any, kind: Any) -> bool:
    if kind in (Any, NoneType):
        return kind is Any or value is None
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(v, *typing.get_args(kind)) for v in value)
    if kind not in _NODES:  # a group of keys
        return isinstance(value, Mapping)
    if value is None or (kind is bool and not isinstance(value, (bool, str))):
        return False
    try:
        _NODES[kind](value)
    except (ValueError, OverflowError):
        return False
    return True


def _keys(kind: Any) -> str:
    if not dataclasses.is_dataclass(kind):
        return ""
    return f" ({', '.join(f.name for f in dataclasses.fields(kind))})"


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
