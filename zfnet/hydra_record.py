"""Hydra's side of a run: its record in `.hydra/`, and the names of a sweep's directories."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from zfnet.composing import compose
from zfnet.run import write_atomically

NAME_LIMIT = 120  # bytes; file systems stop at 255, and a path holds several names


def write_hydra_record(folder: Path) -> None:
    """Write what Hydra itself would: config.yaml, hydra.yaml and overrides.yaml in `.hydra/`.

    Hydra would write them before anybody could find that the directory belongs to another run.
    """
    if not HydraConfig.initialized():
        return
    composed: Any = HydraConfig.instance().cfg
    (folder / ".hydra").mkdir(exist_ok=True)
    # composed again, since what HydraConfig keeps is Hydra's own part only
    job = compose(list(composed.hydra.overrides.task))
    for name, part in (
        ("config", job),
        ("hydra", OmegaConf.create({"hydra": composed.hydra})),
        ("overrides", composed.hydra.overrides.task),
    ):
        write_atomically(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(part))


def short_dirname(overrides: str) -> str:
    """Turn a job's overrides into a directory name: readable, safe on any file system, unique.

    Characters that file systems dislike become `_`; a name that changed or was cut gets a hash of the original.
    """
    name = re.sub(r"[^\w.,=+@^~\[\]-]", "_", overrides) or "default"
    if name == overrides and len(name.encode()) <= NAME_LIMIT:
        return name
    mark = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{name.encode()[: NAME_LIMIT - 9].decode(errors='ignore')}-{mark}"


def register_resolvers() -> None:
    """Make `${short_dirname:…}` known to configs; call before Hydra composes."""
    OmegaConf.register_new_resolver("short_dirname", lambda text: short_dirname(str(text)), replace=True)
