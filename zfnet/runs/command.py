"""From the command line to a checked config, with or without a recorded run underneath.

Without `run=…` a config is what Hydra composes from `conf/`. With it, the run's own record is the base and
the command line's overrides are laid on top; today's defaults have no say. Hydra has to accept those
overrides first, though its composition may lack their keys (the record's optimizer may have others than
today's default): `forgive` lets it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zfnet.config.errors import UserError
from zfnet.config.schema import Config, job_class, read_config
from zfnet.runs.directory import RunDirectory, find_run

CONF = Path(__file__).resolve().parents[2] / "conf"
# groups that may be swapped on top of a record; job and experiment say what to do, not what was done
GROUPS = ("model", "optimizer", "scheduler", "data", "augment", "trainer")
# what a command says about itself, and not about the record
_OWN = ("job", "run", "images")


def forgive(words: Sequence[str]) -> list[str]:
    """Mark key overrides so that Hydra takes keys which its own composition lacks, if the words name a run.

    The record decides later whether such a key exists. Two things are quoted: a run directory whose name is made
    of overrides, as in a sweep (Hydra would read its `,` and `=` as a list and another override), and letters
    outside ASCII, for which Hydra has no place in bare values.
    """
    words = [_quote(word) for word in words]
    if not any(word.startswith("run=") and word not in ("run=", "run=null") for word in words):
        return words
    return [
        f"++{w}" if re.match(r"[A-Za-z_]\w*\.\S*=", w) and not w.startswith(("hydra.", "job.")) else w
        for w in words
    ]


def _quote(word: str) -> str:
    key, _, value = word.partition("=")
    if key == "run" and re.search(r"[,=]", value) and Path(value).expanduser().is_dir():
        return f'run="{value}"'
    if word.startswith("-") or value.isascii() or re.search(r"""['"$(){}\\]""", value):
        return word
    return f"{key}=" + re.sub(r"[^,\[\]]*[^\x00-\x7f][^,\[\]]*", lambda item: f'"{item[0].strip()}"', value)


def read_command(raw: DictConfig, words: Sequence[str]) -> Config:
    """Return the checked config of a command: `raw` is what Hydra composed, `words` the overrides given to it.

    Raises UserError for anything that is not acceptable.
    """
    for override in _parse(words):
        if override.value() == {}:
            raise UserError(
                f"{override.input_line}: says nothing; set keys, as in {override.key_or_group}.KEY=VALUE"
            )
    if isinstance(raw.get("job"), str):  # in a record given as --config-path, job is no group
        raise UserError(f"job={raw.job}: this config has no choices of jobs; write job.name={raw.job}")
    kind = job_class(OmegaConf.select(raw, "job._target_"))
    job, run = f"job={raw.job.name}", raw.get("run")
    if raw.get("images") is not None and not kind.reads_images:
        raise UserError(f"{job} reads no image files: leave images=… out")
    if run is None:
        if kind.reads_run == "needed":
            raise UserError(f"{job} needs run=<dir>: the directory of a run, or run=last for the newest one")
        config = read_config(raw)
    elif kind.reads_run == "refused":
        raise UserError(
            f"{job} reads no run: job=resume goes on with one, job=reproduce runs one again, in a new directory"
        )
    else:
        found = find_run(str(run))
        own = {key: OmegaConf.to_container(raw, resolve=True)[key] for key in _OWN}  # type: ignore[index,call-overload]
        config = overlay(found, words, {**own, "run": str(found.folder)})
    config.overrides = list(words)
    return config


def overlay(run: RunDirectory, words: Sequence[str], own: dict[str, Any]) -> Config:
    """Return a run's recorded config with overrides on top; `own` holds the command's job, run and images.

    A group override (`optimizer=sgd`) swaps the whole group for today's file, a key override sets that key.
    """
    overrides = [
        o for o in _parse(words) if o.key_or_group not in _OWN and not o.key_or_group.startswith("job.")
    ]
    if not overrides:
        plain = run.read_config().to_dict()
        return read_config(OmegaConf.create({**plain, **own}))
    base = _record(run)
    groups = [o for o in overrides if _is_group(o)]
    if groups:
        composed = compose([o.input_line or "" for o in groups])
        for override in groups:
            base[override.key_or_group] = composed._get_node(override.key_or_group)
    for override in overrides:
        if override in groups:
            continue
        try:
            if override.is_delete():
                parent, _, key = override.key_or_group.rpartition(".")
                del OmegaConf.select(base, parent)[key]
            else:
                OmegaConf.update(base, override.key_or_group, override.value(), force_add=True)
        except (OmegaConfBaseException, TypeError, KeyError) as error:
            raise UserError(f"{override.input_line}: cannot be set ({str(error).splitlines()[0]})") from error
    for key, value in own.items():
        base[key] = value
    return read_config(base)


def _parse(words: Sequence[str]) -> list[Override]:
    return list(OverridesParser.create().parse_overrides(list(words)))


def _is_group(override: Override) -> bool:
    key = override.key_or_group
    if key == "experiment":
        raise UserError(
            f"{override.input_line}: an experiment is a whole recipe and cannot be laid on a recorded run; "
            "choose groups or keys, as in optimizer=sgd optimizer.lr=0.01"
        )
    return key in GROUPS


def _record(run: RunDirectory) -> DictConfig:
    """Return the run's config as it was composed, so that keys which follow others still follow them.

    `.hydra/config.yaml` holds it with its `${…}`. It counts only if it says the same as the checked record,
    and only if nothing in it calls a resolver, which could read environment variables.
    """
    checked = run.read_config()
    plain = OmegaConf.create(checked.to_dict())
    try:
        unresolved = yaml.safe_load((run.folder / ".hydra" / "config.yaml").read_text(encoding="utf-8"))
        if not isinstance(unresolved, dict):
            return plain
        job = {k: v for k, v in unresolved.items() if k in plain}  # less what is said to Hydra
        values = json.dumps(job, default=str)  # YAML can spell "$" in other ways
    except (OSError, ValueError, yaml.YAMLError):
        return plain
    if re.search(r"\$\{[^}]*[:$]", values):
        return plain
    composed = OmegaConf.create(job)
    try:
        same = read_config(composed).identity() == checked.identity()
    except UserError:
        return plain
    return composed if same else plain


def compose(words: Sequence[str], name: str = "config") -> DictConfig:
    """Compose today's `conf/` with these overrides; works inside and outside a Hydra program."""
    if GlobalHydra.instance().is_initialized():
        return hydra_compose(name, overrides=list(words))
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra_compose(name, overrides=list(words))
