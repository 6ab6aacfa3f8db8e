"""The program's logger, and errors that a user can correct: one line that names the key, its value and what to do."""

import dataclasses
import difflib
import logging
import os
import sysconfig
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from pydantic import ValidationError

log = logging.getLogger("zfnet")  # runs/session.py sends it to the terminal and a file

_PACKAGE = Path(__file__).resolve().parents[1]
_MAX_LISTED = 24  # a message lists at most this many names


class UserError(Exception):
    """Something outside the program is wrong: a key, a file, the network, a device. Shown as one line."""


def printable(text: object) -> str:
    """Return text as one line, with control and unprintable characters escaped as in Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def one_line(error: object, line: int = 0) -> str:
    """Return one line of an error's message, by default the first; the name of its class if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[line].strip()


def place_of(error: BaseException) -> str:
    """Return ` (file.py, line n)`, the last line of the user's own code in the traceback, or nothing."""
    own = f"{_PACKAGE}{os.sep}", str(_PACKAGE.parent / "run.py")
    libraries = (*own, "<", *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(libraries)]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""


def describe_fault(slot: str, part: object, error: Exception) -> str:
    """Return one line about an error that the object in a slot, such as callbacks.mine, raised."""
    reason = one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"
    return f"{slot} ({type(part).__name__}): {reason}{place_of(error)} (HYDRA_FULL_ERROR=1 shows where)"


def with_file_name(path: Path, error: UserError) -> UserError:
    """Return the error with the file's name, because the user did not type the file's keys."""
    return error if str(path) in str(error) else UserError(f"{path}: {error}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known word closest to `word`, or a list of the known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    more = len(names) - _MAX_LISTED
    return f"; known: {', '.join(names[:_MAX_LISTED])}{f' and {more} more' if more > 0 else ''}" if names else ""


def yaml_problem(error: yaml.YAMLError) -> str:
    """Return one line about a syntax error: the file if it is known, the line and column, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return one_line(error)
    file = "" if mark.name.startswith("<") else f"{mark.name}, "
    return f"{file}line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'invalid YAML'}"


# messages for pydantic's types of errors, worded like this program's other messages
_MESSAGES = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of at most 4,300 digits",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "list_type": "must be a list, as in [{item}]",
    "dict_type": "must be a mapping of keys to values",
    "dataclass_type": "must be a mapping of keys to values",
    "literal_error": "must be one of {expected}",
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be greater than {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "less_than": "must be less than {lt:g}",
    "too_short": "must have {min_length} values",
    "too_long": "must have {max_length} values",
}


def schema_problem(error: ValidationError, schema: Any, plain: dict[str, Any], prefix: str) -> str:
    """Return one line about the first bad key of `plain` (below `prefix`), with all of pydantic's reasons."""

    def path(loc: tuple[int | str, ...]) -> tuple[list[str], Any]:
        keys, node = [], plain  # skip the parts of `loc` that name members of a union
        for key in loc:
            if (isinstance(node, dict) and key in node) or (isinstance(node, list) and isinstance(key, int)):
                node = node[key]
                keys.append(str(key))
        return keys, node

    first = error.errors()[0]
    keys, value = path(first["loc"])
    where = ".".join([prefix, *keys] if prefix else keys)
    last = str(first["loc"][-1])
    if first["type"] == "missing":
        key = f"{where}.{last}" if where else last
        return f"{key} is missing from the config: give it a value, as in {key}=…"
    if first["type"] == "unexpected_keyword_argument":
        return f"{where}: no such key{did_you_mean(last, _fields_at(schema, keys[:-1]))}"
    shown = "null" if value is None else " ".join(str(value).split())
    reasons = dict.fromkeys(
        _MESSAGES.get(e["type"], e["msg"].removeprefix("Value error, "))
        .format(**e.get("ctx", {}), item="1,2" if value is None else shown)
        .replace("'", "")
        for e in error.errors()
        if path(e["loc"])[0] == keys
    )
    return f"{where}={shown}: {', or '.join(reasons)}"


def _fields_at(schema: Any, keys: Sequence[str]) -> list[str]:
    """Return the field names of the dataclass at `keys` below `schema`; empty if there is no dataclass."""
    node = schema
    for key in keys:
        hint = get_type_hints(node).get(key)
        node = next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if node is None:
            return []
    return [f.name for f in dataclasses.fields(node)]
