"""Hydra's side of a run: its record in `.hydra/`, and the names of a sweep's directories."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from zfnet.config.schema import Config, DataConfig
from zfnet.runs.command import CONF
from zfnet.runs.directory import RunDirectory, write_atomically

NAME_LIMIT = 120  # bytes; file systems stop at 255, and a path holds several names


def write_hydra_record(folder: Path, config: DictConfig | Config) -> None:
    """Write what Hydra itself would: config.yaml, hydra.yaml and overrides.yaml in `.hydra/`.

    Hydra would write them before anything could find that the directory belongs to another run. `config` is what
    Hydra composed, with its `${…}`; or the checked config, where a recorded run was the base.
    """
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    job: Any = OmegaConf.to_container(config) if OmegaConf.is_config(config) else config.to_dict()
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, content in (
        ("config", {**_hydra_settings(), **job}),
        ("hydra", {"hydra": hydra}),
        ("overrides", hydra.overrides.task),
    ):
        write_atomically(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(OmegaConf.create(content)))


def record_data(run: RunDirectory, data: DataConfig) -> None:
    """Record where a run's data lies now, and how it is read, after it was found to be the same."""
    plain, now = run.recorded(), dataclasses.asdict(data)
    if plain["data"] == now:
        return
    path = run.folder / ".hydra" / "config.yaml"
    with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):  # it is not needed, and may be damaged
        composed = yaml.safe_load(path.read_text(encoding="utf-8"))
        moved = {key: value for key, value in now.items() if plain["data"].get(key) != value}
        composed["data"] = {**composed["data"], **moved}
        write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(composed)))
    write_atomically(run.folder / "config.yaml", yaml.safe_dump({**plain, "data": now}, sort_keys=False))


def _hydra_settings() -> dict[str, Any]:
    """Return what `conf/config.yaml` sets of Hydra's own, so that `--config-path <run>/.hydra` runs like any other."""
    plain = yaml.safe_load((CONF / "config.yaml").read_text(encoding="utf-8"))
    # only Hydra's own choices exist there: those of `conf/` do not
    logging = [d for d in plain["defaults"] if isinstance(d, dict) and "_logging" in next(iter(d))]
    return {"defaults": [*logging, "_self_"], "hydra": plain["hydra"]}


def short_dirname(overrides: str) -> str:
    """Turn a job's overrides into a directory name: readable, safe on any file system, unique.

    Characters that file systems dislike become `_`; a name that changed or was cut gets a hash of the original.
    """
    # `++` marks keys of a recorded run, and keys that not every choice of a swept group has
    overrides = re.sub(r"(^|,)\+\+", r"\1", overrides)
    name = re.sub(r"[^\w.,=+@^~\[\]-]", "_", overrides) or "default"
    if name == overrides and len(name.encode()) <= NAME_LIMIT:
        return name
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{name.encode()[: NAME_LIMIT - 9].decode(errors='ignore')}-{digest}"


def register_resolvers() -> None:
    """Make `${short_dirname:…}` known to configs; call before Hydra composes."""
    OmegaConf.register_new_resolver("short_dirname", lambda text: short_dirname(str(text)), replace=True)
