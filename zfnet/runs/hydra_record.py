"""Hydra's side of a run: its record in `.hydra/`, and the names of a sweep's directories."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from zfnet.config.schema import Config
from zfnet.config.trust import CONF
from zfnet.runs.directory import write_atomically

NAME_LIMIT = 120  # bytes; file systems stop at 255, and a path holds several names


def write_hydra_record(folder: Path, config: Config | None = None) -> None:
    """Write what Hydra itself would: config.yaml, hydra.yaml and overrides.yaml in `.hydra/`.

    Hydra would write them before anybody could find that the directory belongs to another run. With a
    `config` that config is written: where a recorded run was the base, Hydra's composition is not what ran.
    """
    if not HydraConfig.initialized():
        return
    composed: Any = HydraConfig.instance().cfg  # Hydra's own part; the job's is composed once more
    words = list(composed.hydra.overrides.task)
    if config is None:
        job = OmegaConf.to_container(
            hydra_compose(composed.hydra.job.config_name, overrides=words), resolve=False
        )
    else:
        job = config.to_dict()
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, part in (
        ("config", {**_hydra_settings(), **job}),  # type: ignore[dict-item]
        ("hydra", {"hydra": composed.hydra}),
        ("overrides", words),
    ):
        write_atomically(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(OmegaConf.create(part)))


def _hydra_settings() -> dict[str, Any]:
    """Return what `conf/config.yaml` says to Hydra, so that `--config-path <run>/.hydra` runs like any other."""
    plain = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    # choices that are files of `conf/` cannot be found from there; Hydra's own can
    kept = [
        d
        for d in plain["defaults"]
        if isinstance(d, dict)
        and (key := next(iter(d))).startswith("override ")
        and not (CONF / key.split()[1] / f"{d[key]}.yaml").is_file()
    ]
    return {"defaults": [*kept, "_self_"], "hydra": plain["hydra"]}


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
