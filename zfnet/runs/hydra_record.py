"""The Hydra part of a run: its record in `.hydra/`, the names of a sweep's directories, and the text of --help."""

import contextlib
import dataclasses
import hashlib
import itertools
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from zfnet.config.reading import read_yaml
from zfnet.config.schema import Config, DataConfig
from zfnet.runs.command import CONF
from zfnet.runs.directory import RunDirectory, write_atomically

NAME_LIMIT = 120  # bytes; file systems allow 255, and a path contains several names


def write_hydra_record(folder: Path, config: DictConfig | Config) -> None:
    """Write config.yaml, hydra.yaml and overrides.yaml to `.hydra/`, as Hydra itself does.

    Hydra would write them before this program can detect that the directory belongs to another run. `config` is the
    config that Hydra composed, with its `${…}`, or the checked config if a recorded run was the base.
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
    """Record where a run's data is and how it is read; the caller has checked that its content is the same."""
    plain, now = run.recorded_config(), dataclasses.asdict(data)
    if plain["data"] == now:
        return
    path = run.folder / ".hydra" / "config.yaml"
    with contextlib.suppress(OSError, ValueError, TypeError, yaml.YAMLError):  # it is optional, and can be damaged
        composed = read_yaml(path)
        moved = {key: value for key, value in now.items() if plain["data"].get(key) != value}
        composed["data"] = {**composed["data"], **moved}
        write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(composed)))
    write_atomically(run.folder / "config.yaml", yaml.safe_dump({**plain, "data": now}, sort_keys=False))


def _hydra_settings() -> dict[str, Any]:
    """Return Hydra's settings in `conf/config.yaml`, so that `--config-path <run>/.hydra` works like `conf/`."""
    plain = read_yaml(CONF / "config.yaml")
    # keep the defaults of Hydra's own groups; the groups of `conf/` do not exist in `.hydra/`
    logging = [d for d in plain["defaults"] if isinstance(d, dict) and "_logging" in next(iter(d))]
    return {"defaults": [*logging, "_self_"], "hydra": plain["hydra"]}


def short_dirname(overrides: str) -> str:
    """Turn a job's overrides into a directory name: readable, safe on any file system, unique.

    Unsafe characters become `_`; a name that was changed or cut gets a hash of the original.
    """
    # `prepare_overrides` adds `++` to keys of a recorded run or of a swept group
    overrides = re.sub(r"(^|,)\+\+", r"\1", overrides)
    name = re.sub(r"[^\w.,=+@^~\[\]-]", "_", overrides) or "default"
    if name == overrides and len(name.encode()) <= NAME_LIMIT:
        return name
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{name.encode()[: NAME_LIMIT - 9].decode(errors='ignore')}-{digest}"


def register_resolvers() -> None:
    """Register the resolvers `${short_dirname:…}` and `${job_help:…}`; call before Hydra composes."""
    OmegaConf.register_new_resolver("short_dirname", lambda text: short_dirname(str(text)), replace=True)
    OmegaConf.register_new_resolver("job_help", _job_help, replace=True)


_GENERAL_HELP = """Groups: GROUP=CHOICE, as in optimizer=sgd. `python run.py job=NAME --help` explains a job's own keys.

$APP_CONFIG_GROUPS

Keys: KEY=VALUE, as in optimizer.lr=0.01. What these overrides compose:

$CONFIG"""


def _job_help(job: str, sources: Any) -> str:
    """Return the template of the text that --help prints for `job`, in the format of `hydra.help.template`.

    sources: Hydra's config sources: this project's folder and that of --config-dir
    """
    files = [Path(s["path"]) / "job" / f"{job}.yaml" for s in sources if s["schema"] == "file"]
    path = next((file for file in files if file.is_file()), None)
    if job == "train" or path is None:
        return _GENERAL_HELP
    groups = sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name not in ("hydra", "job"))
    lines = ["Groups (python run.py --help lists their choices):", *textwrap.wrap(", ".join(groups), 78), ""]
    text = explain_job(path.read_text(encoding="utf-8"), job) + "\n" + "\n".join(lines)
    return text.replace("$", "$$")


def explain_job(text: str, job: str) -> str:
    """Return a job's YAML as help text: its purpose, its commands, and each key with its default and its comment."""
    head: list[str] = []
    paragraph: list[str] = []

    def end_paragraph() -> None:
        head.extend(textwrap.wrap(" ".join(paragraph), 80))
        paragraph.clear()

    comments = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    for line in (comment[2:] for comment in comments):
        if line.startswith("  "):  # a command
            end_paragraph()
            head.append(line)
        elif not line.startswith("@package"):
            if re.match(r"[A-Z][\w ]*: ", line):  # Source: …
                end_paragraph()
            paragraph.append(line)
    end_paragraph()
    keys = [(f"{prefix}{key}={value}", comment) for key, prefix, value, comment in described_keys(text)]
    indent = min(26, 4 + max((len(name) for name, _ in keys), default=0))
    title = "Keys (KEY=VALUE changes a default):" if keys else "It has no keys of its own."
    lines = [f"job={job}", "", *head, "", title]
    for name, comment in keys:
        start = f"  {name}".ljust(indent - 2) + "  "
        wrap = textwrap.TextWrapper(80, start, " " * indent, break_long_words=False)
        lines += wrap.wrap(comment) or [start]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def described_keys(text: str) -> list[list[str]]:
    """Return [key, `job.` or nothing, default as written, comment] for each key in a YAML file, except a job's name."""
    rows: list[list[str]] = []
    prefix = ""
    for line in text.splitlines():
        key = re.match(r"( *)(\w+):(?: ([^#]*?))?\s*(?:# ?(.*))?$", line)
        if key is None:
            more = re.match(r"\s+# ?(.*)$", line)
            if more and rows:
                rows[-1][3] += f" {more[1].strip()}"
        elif key[1] == "":
            prefix = f"{key[2]}."
            if key[3]:
                rows.append([key[2], "", key[3], key[4] or ""])
        elif prefix == "job." and len(key[1]) == 2 and key[2] not in ("name", "_target_"):
            rows.append([key[2], prefix, key[3] or "", key[4] or ""])
    return rows
