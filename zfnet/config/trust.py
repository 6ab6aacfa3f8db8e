"""Which packages a command trusts, and which Hydra settings a config folder from elsewhere can change.

A command trusts the packages that the user types (`imports=[lion_pytorch]`) or lists in the project's own `conf/`, for
example in conf/local.yaml. The `imports` of a run's record, or of a folder given by `--config-path`, `--config-dir` or
`hydra.searchpath`, have no effect.

Before this program sees a config, Hydra constructs the objects in its `hydra` part (callbacks, launchers, log
handlers), sets environment variables and makes directories. So each config that Hydra composes with a folder from
elsewhere is checked before Hydra uses it: its `hydra` part is compared with the one that the project's own files give
for the same choices. The check reads the composed config, so it does not depend on how the YAML is written.
"""

import copy
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal import hydra as hydra_internal
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import file_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra._internal.utils import create_automatic_config_search_path, create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from zfnet.config.errors import UserError, one_line, yaml_problem
from zfnet.config.instantiate import resolve
from zfnet.config.reading import parse_yaml
from zfnet.config.schema import leaves, names_a_value

CONF = Path(__file__).resolve().parents[2] / "conf"

# the parts of `hydra` that Hydra constructs, and their base classes
_CONSTRUCTED: dict[str, type] = {"callbacks": Callback, "launcher": Launcher, "sweeper": Sweeper}
# keys that Hydra sets for each config or only displays; `overrides` has its own check
_HARMLESS = ("runtime", "overrides", "mode", "verbose", "help", "hydra_help")
_HARMLESS_JOB = ("override_dirname", "id", "num", "config_name", "chdir")
_DIRECTORIES = ("run.dir", "sweep.dir", "output_subdir", "job.name")
_JOB_NUMBER = "${hydra.job.num}"  # Hydra's own default for sweep.subdir
_COMMAND_ONLY = ("imports", "run", "images")  # a folder's sweeper.params must not set these


_parser = functools.cache(OverridesParser.create)  # a new parser would register all functions of the grammar again


def parse_overrides(overrides: Iterable[str]) -> list[Override]:
    """Parse command-line overrides such as `optimizer=sgd`, as Hydra does; raise HydraException if one is invalid."""
    return _parser().parse_overrides(list(overrides))


def check_what_hydra_composes(argv: Sequence[str]) -> None:
    """Make Hydra check each config that it composes from now on; `argv` is the command line.

    Raises UserError for an option that reads a pickle.
    """
    # argparse accepts abbreviations, and only this option begins with --e
    if any(argument.startswith("--e") for argument in argv):
        raise UserError("--experimental-rerun reads a pickle, which can run code: use job=reproduce run=<dir>")
    hydra_internal.ConfigLoaderImpl = CheckedConfigLoader  # type: ignore[misc]
    Plugins.instance()  # registers Hydra's own file reader, which the next line replaces
    SourcesRegistry.instance().types["file"] = FileConfigSource


_parsed: dict[Any, ConfigResult] = {}  # files of the project's own `conf/`, by name, time and size


class FileConfigSource(file_config_source.FileConfigSource):
    """Hydra's reader of config files, with limits on files in a folder from elsewhere.

    It has the same name as Hydra's class: a launcher's processes register Hydra's again, and the names must agree.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """Return the file's content; raise UserError if it exceeds a limit."""
        path = Path(self.path) / self._normalize_file_name(config_path)
        if not _is_own("file", self.path):
            try:
                parse_yaml(path)
            except OSError:
                pass  # Hydra's own reader, called below, reports the file
            except yaml.YAMLError as error:  # deeply nested YAML would make Hydra's own parser recurse without end
                raise UserError(f"{path}, {yaml_problem(error)}") from error
            except ValueError as error:
                raise UserError(f"{path} cannot be read: {error}") from error
            return super().load_config(config_path)
        # cache the files, because a sweep composes each job's config two or three times
        state = path.stat() if path.exists() else None
        key = (self.provider, str(path), state and (state.st_mtime_ns, state.st_size))
        if key not in _parsed:
            _parsed[key] = super().load_config(config_path)
        return copy.deepcopy(_parsed[key])


class CheckedConfigLoader(ConfigLoaderImpl):
    """Hydra's config loader, but raises UserError if a folder from elsewhere sets a key that it must not set.

    Hydra calls it for a command and for each job of a sweep, in the process in which the job runs.
    """

    def load_configuration(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *args: Any, **kwargs: Any
    ) -> DictConfig:
        """Return the composed config."""
        config = super().load_configuration(config_name, overrides, run_mode, *args, **kwargs)
        if not only_own_folders(config.hydra.runtime.config_sources):
            _check(config, overrides)
        return config

    def _process_config_searchpath(self, config_name: str | None, *args: Any) -> None:
        """Refuse search paths of a config from elsewhere, because Hydra imports the packages of `pkg://` paths.

        Hydra calls this before it composes a config or lists a group's choices.
        """
        name = config_name or ""  # without a name, there is no primary config
        source = next((source for source in self.get_sources() if name and source.is_config(name)), None)
        if source is not None and not _is_own(source.scheme(), source.path):
            primary = source.load_config(name).config
            if OmegaConf.is_dict(primary) and (paths := OmegaConf.select(primary, "hydra.searchpath")):
                raise _refusal("hydra.searchpath", paths)
        super()._process_config_searchpath(config_name, *args)


def config_loader(argv: Sequence[str]) -> CheckedConfigLoader:
    """Return a loader for the folders from which Hydra composes with these command-line arguments."""
    options = get_args_parser().parse_known_args(list(argv))[0]
    run_py = str(CONF.parent / "run.py")
    folders = create_automatic_config_search_path(run_py, None, options.config_path or CONF.name)
    if options.config_dir and os.path.isdir(options.config_dir):  # as Hydra's `_run_hydra` does
        folder = f"file://{os.path.abspath(options.config_dir)}"
        folders.prepend("command-line", folder, SearchPathQuery(provider="schema"))
    return CheckedConfigLoader(folders)


def only_own_folders(sources: Iterable[Any]) -> bool:
    """Return whether Hydra composed a config only from this project's `conf/` and Hydra's own packages.

    sources: Hydra's `runtime.config_sources`; an empty list returns True
    """
    return all(_is_own(source.schema, source.path) for source in sources)


def _is_own(scheme: str, path: Any) -> bool:
    if scheme == "file":
        return Path(str(path)).resolve() == CONF
    # installed Hydra plugins bring configs of their own, and Hydra imports these plugins in any case
    return scheme == "structured" or (scheme == "pkg" and f"{path}.".startswith(("hydra.conf.", "hydra_plugins.")))


def _check(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raise UserError if a config that was composed with a folder from elsewhere sets a key that it must not set."""
    whole: Any = OmegaConf.to_container(config, resolve=False)
    part = whole["hydra"]
    given = part["overrides"]["hydra"] + part["overrides"]["task"]
    if sorted(given) != sorted(overrides):  # the program takes them for the command line
        raise _refusal("hydra.overrides", next(each for each in given if each not in overrides))
    parsed = parse_overrides(overrides)
    typed = {o.key_or_group.removeprefix("hydra.") for o in parsed if o.key_or_group.startswith("hydra.")}
    for key in ("job.folder", "job.sweep"):  # job=schema and job=compare write to these folders
        folder = OmegaConf.select(config, key, throw_on_resolution_failure=False)
        if folder is not None and all(o.key_or_group != key for o in parsed) and not _stays_below(str(folder)):
            raise _refusal(key, folder)
    outside = {k: v for k, v in whole.items() if k != "hydra"}
    for key, value in leaves(outside):
        if "${" in str(value) and not names_a_value(value, outside) and not any(str(value) in o for o in overrides):
            raise _refusal(key, value)  # could read an environment variable, or expand without bound
    own = _own_config(part["runtime"]["choices"], parsed)
    imports = imported_packages(own)
    expected: Any = OmegaConf.to_container(own.hydra, resolve=False)
    for name, base in _CONSTRUCTED.items():
        _check_constructed(name, part[name], expected[name], base, imports)
    for key, value in leaves(part):  # not `flatten`, which would keep only one of two equal dotted keys
        head, _, rest = key.partition(".")
        if head in (*_CONSTRUCTED, *_HARMLESS) or (head == "job" and rest in _HARMLESS_JOB):
            continue
        if any(key == name or key.startswith(f"{name}.") for name in typed):
            continue
        if key in _DIRECTORIES:
            _check_directory(config, key)
        elif key == "sweep.subdir" and (value == _JOB_NUMBER or ("${" not in str(value) and _stays_below(str(value)))):
            continue
        elif value != _value_at(expected, key):
            raise _refusal(f"hydra.{key}", value)


def _own_config(choices: Mapping[str, Any], parsed: Sequence[Override]) -> DictConfig:
    """Compose `conf/` with the same choices of Hydra's own groups and the typed `hydra.…` and `imports` overrides."""
    sources = _own_loader().get_sources()
    groups = [
        f"{group}={choice}"
        for group, choice in choices.items()
        if group.startswith("hydra/") and any(source.is_config(f"{group}/{choice}") for source in sources)
    ]
    typed = [
        o.input_line or ""
        for o in parsed
        if o.key_or_group == "imports"
        or (o.key_or_group.startswith("hydra.") and o.key_or_group not in ("hydra.searchpath", "hydra.mode"))
    ]
    try:
        return _compose_own(CONF, (*groups, *typed))
    except HydraException as error:
        raise UserError(
            f"{' '.join(typed or groups)}: not accepted with an external config folder ({one_line(error)})"
        ) from error


def _own_loader() -> ConfigLoaderImpl:
    # not the public `hydra.compose`, which would replace the running program's GlobalHydra and job name
    return ConfigLoaderImpl(create_config_search_path(f"file://{CONF}"))


@functools.lru_cache(maxsize=4)  # Hydra composes each command's config twice
def _compose_own(conf: Path, overrides: tuple[str, ...]) -> DictConfig:
    return _own_loader().load_configuration("config", list(overrides), RunMode.RUN, validate_sweep_overrides=False)


def imported_packages(config: DictConfig) -> list[str]:
    """Return the packages in a config's `imports`; raise UserError if they are not names of packages."""
    imports: Any = OmegaConf.select(config, "imports")
    imports = OmegaConf.to_container(imports) if OmegaConf.is_list(imports) else imports or []
    if not isinstance(imports, list) or not all(str(i).isidentifier() for i in imports):
        raise UserError(f"imports={imports}: must be a list of packages, as in imports=[lion_pytorch,my_lab]")
    return [str(i) for i in imports]


def _check_constructed(name: str, part: Any, expected: Any, base: type, imports: Sequence[str]) -> None:
    """Check what Hydra will construct: classes of zfnet or Hydra with at most other numbers, or trusted classes."""
    if not isinstance(part, dict):
        raise _refusal(f"hydra.{name}", part)
    if name == "sweeper" and part.get("params") is not None:
        _check_parameters(part["params"])
    entries = part if name == "callbacks" else {"": part}
    for entry, settings in entries.items():
        key = f"{name}.{entry}" if entry else name
        own = expected.get(entry) if entry else expected
        target = settings.get("_target_") if isinstance(settings, dict) else None
        known = isinstance(own, dict) and own.get("_target_") == target
        if not known and target is not None:
            resolve(f"hydra.{key}", target, base, imports)
        elif not known and settings is not None:
            raise _refusal(f"hydra.{key}", settings)
        trusted = not known and str(target).partition(".")[0] in imports
        for rest, value in leaves(settings or {}):
            if name == "sweeper" and rest.split(".")[0] == "params":
                continue
            last = rest.rpartition(".")[2]
            if trusted:  # allow all arguments except those that could become another object
                refused = rest != "_target_" and (last == "_target_" or "${" in str(value))
            else:  # only numbers may differ, because some arguments of Hydra's launchers are commands to run
                differs = value != _value_at(own, rest) and rest != "_target_"
                refused = differs and (isinstance(value, (str, list)) or last == "_recursive_")
            if refused:
                raise _refusal(f"hydra.{key}.{rest}", value)


def _check_parameters(params: Any) -> None:
    """Check a sweep's `params`, which become overrides of each job as if the user had typed them."""
    if not isinstance(params, dict):
        raise _refusal("hydra.sweeper.params", params)
    for key, value in params.items():
        try:
            parsed = parse_overrides([f"{key}={value}"])[0].key_or_group
        except HydraException as error:
            raise _refusal(f"hydra.sweeper.params.{key}", value) from error
        if parsed in _COMMAND_ONLY or parsed.startswith(("hydra.", "hydra/")):
            raise _refusal(f"hydra.sweeper.params.{key}", value)


def _check_directory(config: DictConfig, key: str) -> None:
    """Check that a directory lies below the current one, and store the resolved name so that it cannot change later."""
    value = OmegaConf.select(config.hydra, key)
    if value is None:
        return
    if not _stays_below(str(value)) or (key == "job.name" and os.sep in str(value)):
        raise _refusal(f"hydra.{key}", value)
    OmegaConf.update(config.hydra, key, value)


def _stays_below(path: str) -> bool:
    inside = os.path.relpath(path)
    return inside != os.pardir and not inside.startswith(os.pardir + os.sep)


def _value_at(node: Any, key: str) -> Any:
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def _refusal(key: str, value: Any) -> UserError:
    return UserError(
        f"{key}={value!s:.80}: an external config folder may not set this, because it could run code or write "
        f"elsewhere; set it on the command line or in {CONF.name}/"
    )
