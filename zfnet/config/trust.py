"""Configs from elsewhere, given to Hydra by `--config-path` or `--config-dir`: data, and nothing that runs.

Hydra itself constructs what a config's `hydra` part names (callbacks, launchers, log handlers), before this
program sees a word of it. So that part is checked first: it may say where to write, and little more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from zfnet.config.errors import UserError
from zfnet.runs.command import CONF

_OPTIONS = ("--config-path", "-cp", "--config-dir", "-cd")
_HARMLESS = {"run", "sweep", "job", "mode", "output_subdir"}
_OWN_CALLBACKS = {"sweep_report": {"_target_": "zfnet.sweeps.callback.SweepReport"}}


def check_config_folders(words: Sequence[str]) -> None:
    """Check every YAML file in the folders that these command-line words give to Hydra; raise UserError."""
    for folder in _folders(list(words)):
        for path in sorted(folder.rglob("*.y*ml")):
            _check(path, folder)


def _folders(words: list[str]) -> list[Path]:
    found = [word.split("=", 1)[1] for word in words if word.startswith(tuple(f"{o}=" for o in _OPTIONS))]
    found += [value for option, value in pairwise(words) if option in _OPTIONS]
    return [Path(f) for f in found if Path(f).is_dir()]


def _check(path: Path, root: Path) -> None:
    original = CONF / path.relative_to(root)
    if original.is_file() and original.read_bytes() == path.read_bytes():
        return  # a copy of one of our own
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return  # Hydra will say so
    said = content.get("hydra") if isinstance(content, dict) else None
    # other ways to put something into Hydra's part: a folder of that name, a package header, a placed default
    elsewhere = (
        "hydra" in path.relative_to(root).parts[:-1]
        or re.search(r"@[^\s:]*hydra", text)
        or re.search(r"@package[^\n]*hydra", text)
    )
    more = [key for key, value in said.items() if not _harmless(key, value)] if isinstance(said, dict) else []
    # .hydra/hydra.yaml is Hydra's own record of a run, and is not read as a config unless it is named
    if path.name == "hydra.yaml" and isinstance(content, dict) and set(content) == {"hydra"}:
        return
    if elsewhere or more or (said is not None and not isinstance(said, dict)):
        what = f"hydra.{more[0]}" if more else "a part of Hydra's own configuration"
        raise UserError(
            f"{path}: sets {what}, through which a config can run code; from another folder than conf/ only "
            f"{', '.join(f'hydra.{k}' for k in sorted(_HARMLESS))} are accepted"
        )


def _harmless(key: str, value: Any) -> bool:
    if key == "sweeper":  # what to sweep over, and not with what
        return isinstance(value, dict) and set(value) == {"params"}
    return key in _HARMLESS or (key == "callbacks" and value == _OWN_CALLBACKS)
