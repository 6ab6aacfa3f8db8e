"""Files that may be a stranger's, as plain values: YAML and JSON of bounded size, depth and numbers.

A kilobyte of YAML can stand for gigabytes (aliases of aliases), and a number of a million digits takes minutes. What is
within the bounds is read in a moment; anything else is a ValueError.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 64 * 2**20
_MOST_YAML_BYTES = 2**20
_MOST_VALUES = 100_000  # of a YAML file, its aliases written out
_DEEPEST = 50
_MOST_DIGITS = 100
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C one is ten times as fast
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def refuse_pipe(path: Path) -> None:
    """Raise ValueError for what is there and no file: to open a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return a file's content; raise ValueError if it is larger than `most` bytes, and OSError."""
    refuse_pipe(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return content


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds, Python's own tags refused; raise OSError, ValueError or yaml.YAMLError."""
    loader, node = _parsed(path)
    return None if node is None else loader.construct_document(node)


def check_yaml(path: Path) -> None:
    """Raise ValueError if a YAML file is out of bounds; OSError or yaml.YAMLError if it cannot be read."""
    _parsed(path)


def _parsed(path: Path) -> tuple[Any, yaml.Node | None]:
    loader = _LOADER(read_bytes(path, _MOST_YAML_BYTES))
    try:
        node = loader.get_single_node()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if node is not None:
        _check_nodes(node)
    return loader, node


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; raise OSError or ValueError."""
    return parse_json(read_bytes(path))


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text; raise ValueError, also for a key that an object holds twice."""
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level: Sequence[Any] = [value]
    for _ in range(_DEEPEST):
        level = [v for node in level if isinstance(node, (dict, list)) for v in _children(node)]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _check_nodes(root: yaml.Node) -> None:
    """Raise ValueError if a document is too large, before anything is made of it: aliases and merges multiply."""
    count, waiting = 0, [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"it holds more than {_MOST_VALUES:,} values")
        if depth > _DEEPEST:
            raise ValueError("it is nested too deeply")
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
                raise ValueError(f"a number has more than {_MOST_DIGITS} digits")
        elif isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(names) > len(set(names)):
                raise ValueError(f"it holds {Counter(names).most_common(1)[0][0]!r:.80} twice")
            waiting += [(child, depth + 1) for pair in node.value for child in pair]
        else:
            waiting += [(child, depth + 1) for child in node.value]


def _children(node: Any) -> Any:
    return node.values() if isinstance(node, dict) else node


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"it holds {name!r:.80} twice")
        made[name] = value
    return made


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number has more than {_MOST_DIGITS} digits")
    return int(digits)
