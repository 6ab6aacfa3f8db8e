"""Which packages a command trusts, and what a config folder from elsewhere may hold.

Trust is what somebody types (`imports=[lion_pytorch]`) or keeps in the project's own `conf/`, such as conf/local.yaml.
A run's record, and a folder given by `--config-path` or `--config-dir`, may name packages too; that has no effect.

Hydra itself constructs what a config's `hydra` part names (callbacks, launchers, log handlers) before this program
sees it. So that part of a folder from elsewhere is checked first: it may say where to write, and little more.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from zfnet.config.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"

_HARMLESS = {"run", "sweep", "job", "mode", "output_subdir"}
_OWN_CALLBACKS = {"sweep_report": {"_target_": "zfnet.sweeps.callback.SweepReport"}}


def check_config_folders(words: Sequence[str]) -> None:
    """Check every YAML file in the folders that these command-line words give to Hydra; raise UserError."""
    for folder in _folders(list(words)):
        for path in _yaml_files(folder):
            _check(path, folder)


def _folders(words: list[str]) -> list[Path]:
    """Return the folders that options name, abbreviated as argparse allows, and those of `hydra.searchpath`."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-path", "-cp", action="append", default=[])
    parser.add_argument("--config-dir", "-cd", action="append", default=[])
    parser.add_argument("--config-name", "-cn")
    options = parser.parse_known_args(words)[0]
    searched = [part for word in words if "hydra.searchpath" in word for part in re.split(r"[\[\],='\"]", word)]
    named = [*options.config_path, *options.config_dir, *(p.removeprefix("file://").strip() for p in searched)]
    # relative folders count from run.py's (`--config-path`) or from the current one
    places = [place for name in named if name for place in (Path(name), CONF.parent / name)]
    return [p for p in dict.fromkeys(places) if p.is_dir() and p.resolve() != CONF]


def _yaml_files(folder: Path) -> list[Path]:
    """Return every YAML file below a folder, links to folders followed as Hydra follows them, loops ended."""
    files: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [Path(place) / name for name in names if name.endswith((".yaml", ".yml"))]
    return sorted(files)


def _check(path: Path, root: Path) -> None:
    original = CONF / path.relative_to(root)
    if original.is_file() and original.read_bytes() == path.read_bytes():
        return  # a copy of one of our own
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError):
        return  # Hydra reports it
    hydra_part = content.get("hydra") if isinstance(content, dict) else None
    # other ways to put something into Hydra's part: a folder of that name, a package header, a placed default
    elsewhere = (
        "hydra" in path.relative_to(root).parts[:-1]
        or re.search(r"@[^\s:]*hydra", text)
        or re.search(r"@package[^\n]*hydra", text)
    )
    more = (
        [key for key, value in hydra_part.items() if not _harmless(key, value)] if isinstance(hydra_part, dict) else []
    )
    # .hydra/hydra.yaml is Hydra's own record of a run, and is not read as a config unless it is named
    if path.name == "hydra.yaml" and isinstance(content, dict) and set(content) == {"hydra"}:
        return
    if elsewhere or more or (hydra_part is not None and not isinstance(hydra_part, dict)):
        what = f"hydra.{more[0]}" if more else "a part of Hydra's own configuration"
        raise UserError(
            f"{path}: sets {what}, through which a config can run code; from another folder than conf/ only "
            f"{', '.join(f'hydra.{k}' for k in sorted(_HARMLESS))} are accepted"
        )


def _harmless(key: str, value: Any) -> bool:
    if key == "sweeper":  # what to sweep over, and not with what
        return isinstance(value, dict) and set(value) == {"params"}
    return key in _HARMLESS or (key == "callbacks" and value == _OWN_CALLBACKS)


def only_own_folders(sources: Iterable[Any]) -> bool:
    """Return whether Hydra composed a config from this project's `conf/` and Hydra's own packages alone.

    sources: `HydraConfig.get().runtime.config_sources`
    """
    places = [Path(str(s.path)) for s in sources if s.schema == "file"]
    return all(place.resolve() == CONF for place in places)
