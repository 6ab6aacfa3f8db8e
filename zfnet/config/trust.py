"""Which packages a command trusts, and what a config folder from elsewhere may hold.

Trust is what somebody types (`imports=[lion_pytorch]`) or keeps in the project's own `conf/`, such as conf/local.yaml.
A run's record, and a folder given by `--config-path` or `--config-dir`, may name packages too; that has no effect.

Hydra itself constructs what a config's `hydra` part names (callbacks, launchers, log handlers) before this program
sees it. So that part of a folder from elsewhere is checked first: it may say where to write, and little more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from zfnet.config.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"

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
