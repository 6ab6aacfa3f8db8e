"""Errors that a user can act on: one line that names the thing, the value and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import yaml

_LISTED = 24  # names that a message lists


class UserError(Exception):
    """Something outside the program is wrong: a key, a file, the network, a device. Shown as one line."""


def printable(text: object) -> str:
    """Return a name as one line: characters that a terminal obeys or cannot show are escaped, as in Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the known word closest to `word`, or a list of the known ones."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    more = len(names) - _LISTED
    return f"; known: {', '.join(names[:_LISTED])}{f' and {more} more' if more > 0 else ''}" if names else ""


def yaml_problem(error: yaml.YAMLError) -> str:
    """Return one line for a syntax error: the place, with the file where it is known, and what is wrong there."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).strip().splitlines()[0]
    file = "" if mark.name.startswith("<") else f"{mark.name}, "
    return f"{file}line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', None) or 'no YAML'}"
