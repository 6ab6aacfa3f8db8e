"""Make a checked config from the command line, with or without a recorded run as the base.

Without `run=…`, Hydra composes the config from `conf/`. With `run=…`, the run's own record is the base, and the command
line's overrides are applied to it; the current defaults have no effect. Hydra must accept these overrides first, even
if the config that it composes does not have their keys (the default optimizer can have other keys than the record's):
see `prepare_overrides`.
"""

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zfnet.config.errors import UserError, one_line
from zfnet.config.instantiate import resolve
from zfnet.config.reading import read_config, read_yaml, upgrade
from zfnet.config.schema import NOT_IDENTITY, Config, Job, leaves, names_a_value
from zfnet.config.trust import CONF, imported_packages, only_own_folders, parse_overrides
from zfnet.data.images import data_hash
from zfnet.runs.directory import RunDirectory, find_run

# groups that a command can replace in a record; job and experiment describe the new command, not the recorded run
GROUPS = ("model", "data", "augment", "loss", "optimizer", "scheduler", "trainer", "logger", "callbacks")
_SINGLE_CHOICE = ("job", "experiment", "debug", *(group for group in GROUPS if group not in ("logger", "callbacks")))
# keys of the command itself, not of the record
_COMMAND_KEYS = ("job", "run", "images", "imports")
# Hydra's options without a value
_FLAGS = ("-m", "--multirun", "-r", "--run", "--resolve", "-h", "--help")


def prepare_overrides(argv: Sequence[str]) -> list[str]:
    """Mark overrides with `++` so that Hydra accepts keys that only a named run or some choices of a swept group have.

    Whether these keys exist is checked later, in the record or in each job's config. Values that Hydra's grammar does
    not allow, and file names that it would misread, are quoted (see `_quote`). Flags such as -m come first, because
    argparse, which Hydra uses, refuses overrides on both sides of one.
    """
    argv = [_quote(argument) for argument in argv if argument != "hydra.output_subdir=.hydra"]  # written in any case
    named = any(argument.startswith("run=") and argument not in ("run=", "run=null") for argument in argv)
    sweeps = {"-m", "--multirun"} & set(argv)
    swept = {
        key for key, _, value in (a.partition("=") for a in argv) if sweeps and "," in value and (CONF / key).is_dir()
    }

    def marked(argument: str) -> str:
        group = re.match(r"([A-Za-z_]\w*)\.\S*=", argument)
        if group is None or group[1] in ("hydra", "job"):
            return argument
        return f"++{argument}" if named or {group[1], "experiment"} & swept else argument

    flags = [argument for argument in argv if argument in _FLAGS]
    return [*flags, *(marked(argument) for argument in argv if argument not in _FLAGS)]


# keys that have names of files or folders as values; the pattern of a list's item
_PATH_KEYS = ("run", "images", "data.root", "data.cache_dir", "trainer.init_from", "source", "job.sweep", "job.root")
_LIST_ITEM = re.compile(r"""\s*(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,]+)""")


def _quote(argument: str) -> str:
    """Quote a value, or the items of a list or a sweep, if Hydra cannot parse them, such as `cat (1).jpg` and `größe`.

    The name of an existing file or folder is taken literally: in `run=a,b=1`, Hydra would see a list and another
    override.
    """
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-"):
        return argument
    is_path = key.lstrip("+") in _PATH_KEYS

    def quoted(text: str) -> str:
        """Return the text, quoted if Hydra would misread it."""
        text = text.strip()
        parsed = _parsed_value(f"{key}={text}")
        exists = is_path and os.path.exists(os.path.expanduser(text))
        plain = parsed == text or (parsed is not None and not exists)
        return text if plain else QuotedString(text, Quote.double).with_quotes()

    if is_path and os.path.exists(os.path.expanduser(value)):
        return f"{key}={quoted(value)}"
    is_list = value.startswith("[") and value.endswith("]")
    if _parsed_value(argument) is not None and not (is_path and is_list):
        return argument
    if choices := re.fullmatch(r"choice\((.*,.*)\)", value):  # Hydra's choice(…) refuses null, a sweep does not
        return _quote(f"{key}={choices[1]}")
    items = ",".join(quoted(item) for item in _LIST_ITEM.findall(value[1:-1] if is_list else value))
    # text with a bracket is not split at commas: `choice(1,2` is not a sweep over two values
    apart = [] if re.search(r"[()\[\]{}]", value) else [f"{key}={items}"]
    candidates = [f"{key}=[{items}]"] if is_list else [*apart, f"{key}={quoted(value)}"]
    return next((c for c in candidates if _parsed_value(c) is not None), argument)


def _parsed_value(text: str) -> Any:
    """Return the value that Hydra reads in an override; None if it cannot be parsed."""
    try:
        override = parse_overrides([text])[0]
    except HydraException:
        return None
    value = override.value()
    return "null" if value is None else value


def read_command(raw: DictConfig, overrides: Sequence[str], sources: Iterable[Any]) -> Config:
    """Return the checked config of a command, given the config `raw` that Hydra composed with `overrides`.

    sources: Hydra's `runtime.config_sources` of `raw`; empty, which means trusted, for a config of `compose_raw`
    Raises UserError for anything that is not acceptable.
    """
    from_elsewhere = not only_own_folders(sources)
    parsed = parse_overrides(overrides)
    for override in parsed:
        value = override.value()
        # Hydra would merge the files of several choices
        if isinstance(value, list) and len(value) > 1 and override.key_or_group in _SINGLE_CHOICE:
            several = f"{override.key_or_group}={','.join(map(str, value))}"
            raise UserError(f"{override.input_line}: choose one, or sweep over them with run.py -m {several}")
        if value == {}:
            raise UserError(f"{override.input_line}: is empty; set keys, as in {override.key_or_group}.KEY=VALUE")
        if value == "" and override.key_or_group in _PATH_KEYS:  # for example, an unset shell variable
            raise UserError(f"{override.input_line}: is empty; name a file or folder")
    if isinstance(raw.get("job"), str):  # in a record given by --config-path, job is not a group
        raise UserError(f"job={raw.job}: this config has no config group named job; write job.name={raw.job}")
    chosen = {o.key_or_group: f"{o.key_or_group}/{o.value()}.yaml" for o in parsed}
    for group, misplaced in (("experiment", "experiment"), ("debug", "debug"), ("job", "job.job")):
        if group in chosen and OmegaConf.is_dict(OmegaConf.select(raw, misplaced)):
            raise UserError(f"{chosen[group]}: its first line must be # @package _global_")
    for group in _SINGLE_CHOICE:
        if raw.get(group) == {}:
            raise UserError(f"{chosen.get(group, f'the file of {group}')}: is empty")
    # a command trusts the packages in its own overrides and in the project's own `conf/`
    own_imports = [o for o in overrides if o.lstrip("+").startswith("imports=")]
    imports = imported_packages(compose_raw(own_imports) if from_elsewhere else raw)
    target, name = (OmegaConf.select(raw, f"job.{key}") for key in ("_target_", "name"))
    if target is None and name is None and "job" in chosen:
        raise UserError(f"{chosen['job']}: its keys must be under job:, after # @package _global_")
    if target is None:
        raise UserError(f"job.name={name}: choose a job with job=NAME, such as job=train")
    if name is None:
        raise UserError(f"job._target_={target}: the job's file must also set job.name")
    job_class = resolve("job", target, Job, imports)
    job, run = f"job={name}", raw.get("run")
    if raw.get("images") is not None and not job_class.reads_images:
        raise UserError(f"{job} does not read image files: leave out images=…")
    if run is None:
        if job_class.reads_run == "needed":
            raise UserError(f"{job} needs run=<dir>: the directory of a run, or run=last for the newest one")
        config = read_config(raw, imports)
        if from_elsewhere:
            _refuse_remote_loggers(config.logger, overrides, "an external config folder:")
    elif job_class.reads_run == "refused":
        raise UserError(
            f"{job} does not read a run: job=resume continues one, and job=reproduce repeats one in a new directory"
        )
    else:
        base = find_run(str(run))
        if job_class.trains and base.job == "import":
            raise UserError(f"run={base.folder} was made by job=import: {job} needs a run that this program trained")
        own = {key: OmegaConf.to_container(raw, resolve=True)[key] for key in _COMMAND_KEYS}  # type: ignore[index,call-overload]
        config = apply_overrides(base, overrides, {**own, "run": str(base.folder)}, imports, raw)
    config.overrides, config.composed = list(overrides), raw
    return config


def apply_overrides(
    run: RunDirectory,
    overrides: Sequence[str],
    own: dict[str, Any],
    imports: Sequence[str] = (),
    composed: DictConfig | None = None,
) -> Config:
    """Return a run's recorded config with overrides applied; `own` contains the command's own job, run and images.

    A group override (`optimizer=sgd`) replaces the whole group by the file in `conf/`; a key override sets that key.
    """
    parsed = parse_overrides(overrides)
    applied = [o for o in parsed if o.key_or_group not in _COMMAND_KEYS and not o.key_or_group.startswith("job.")]
    run.read_config(imports)  # if the record is damaged, this error names the file
    _refuse_remote_loggers(run.recorded_config().get("logger"), overrides, f"run={run.folder}: its")
    if not applied:
        return _with_moved_parents(read_config({**run.recorded_config(), **own}, imports), run)
    base = _composed_record(run)
    # without `.hydra/` (a reproduction's record), a number replaces the reference in conf/scheduler/onecycle.yaml
    peak, rate = (OmegaConf.select(base, key) for key in ("scheduler.max_lr", "optimizer.lr"))
    if peak is not None and peak == rate:
        OmegaConf.update(base, "scheduler.max_lr", "${optimizer.lr}")
    groups = {o.key_or_group for o in applied if _is_group(o)}
    if groups:  # `composed` has the command's groups from all of its folders, with the keys that it sets in them
        plain: Any = OmegaConf.to_container(compose_raw(overrides) if composed is None else composed, resolve=False)
        for group in groups:
            base[group] = plain.get(group, {})  # empty after ~logger
    for override in applied:
        if override.key_or_group.partition(".")[0] in groups:
            continue
        try:
            if override.is_delete():
                parent, _, key = override.key_or_group.rpartition(".")
                del OmegaConf.select(base, parent)[key]
            else:
                OmegaConf.update(base, override.key_or_group, override.value(), force_add=True)
        except (OmegaConfBaseException, TypeError, KeyError) as error:
            raise UserError(f"{override.input_line}: cannot be set ({one_line(error)})") from error
    for key, value in own.items():
        base[key] = value
    return _with_moved_parents(read_config(base, imports), run)


def _with_moved_parents(config: Config, run: RunDirectory) -> Config:
    """Set the data folders of a run's parents to the run's own, if they use the same images, and return its config."""
    recorded, held, link = run.recorded_config()["data"], data_hash(run.environment), config.parent
    parent: Any = link and {"config": link.config, "data_hash": link.data_hash}
    while parent is not None:
        data = parent["config"]["data"]
        same = held is not None and held == parent.get("data_hash")
        for key in NOT_IDENTITY["data"]:
            if data["name"] == config.data.name and key in data and (same or data[key] == recorded.get(key)):
                data[key] = getattr(config.data, key, None)
        parent = parent["config"].get("parent")
    return config


# keys that let loggers write outside the run directory, each with its harmless values
_REMOTE_KEYS = {"tracking_uri": (None,), "space_id": (None,), "entity": (None,), "mode": (None, "offline")}


def _refuse_remote_loggers(loggers: Any, overrides: Sequence[str], whose: str) -> None:
    """Raise UserError if loggers of a foreign config would write elsewhere and the command does not set loggers."""
    if any(each.lstrip("+~").startswith("logger") for each in overrides) or not isinstance(loggers, dict):
        return
    for name, settings in loggers.items():
        for key, harmless in _REMOTE_KEYS.items():
            if isinstance(settings, dict) and settings.get(key) not in harmless:
                raise UserError(
                    f"{whose} logger.{name}.{key}={settings[key]} sends results elsewhere; choose "
                    f"the loggers yourself, as in logger={name} or logger=none"
                )


def _is_group(override: Override) -> bool:
    key = override.key_or_group
    if key in ("experiment", "debug"):
        raise UserError(
            f"{override.input_line}: sets keys of several groups and cannot be applied to a recorded run; "
            "choose groups or keys, as in optimizer=sgd optimizer.lr=0.01"
        )
    return key in GROUPS


def _composed_record(run: RunDirectory) -> DictConfig:
    """Return the run's config with its interpolations, so that keys that refer to others still follow them.

    `.hydra/config.yaml` is used only if it resolves to the record and if each `${…}` in it names a plain value: other
    interpolations could read environment variables or expand without bound. Otherwise the record itself is returned.
    """
    recorded = run.recorded_config()
    plain = OmegaConf.create(recorded)
    try:
        unresolved = read_yaml(run.folder / ".hydra" / "config.yaml")
        if not isinstance(unresolved, dict):
            return plain
        job = {k: v for k, v in upgrade(unresolved).items() if k in plain}  # without the keys for Hydra
        if any("${" in str(v) and not names_a_value(v, job) for _, v in leaves(job)):
            return plain
        composed = OmegaConf.create(job)
        same = read_config(composed).identity() == read_config(recorded).identity()
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, UserError):
        return plain
    return composed if same else plain


def compose_raw(overrides: Sequence[str]) -> DictConfig:
    """Compose this project's `conf/` with these overrides; works inside and outside a Hydra program."""
    if not CONF.is_dir():  # only an editable install has the repository's conf/
        raise UserError(f"compose needs the repository's conf/, which is not at {CONF}; run pip install -e .")
    program = GlobalHydra.instance().hydra  # compose replaces a running program's state, so restore it below
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra_compose("config", overrides=list(overrides))
    finally:
        if program is not None:
            GlobalHydra.instance().initialize(program)
