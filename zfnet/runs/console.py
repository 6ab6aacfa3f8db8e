"""Print errors on the terminal as one line with a suggestion."""

import contextlib
import difflib
import functools
import inspect
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zfnet.config.errors import UserError, did_you_mean, place_of, printable, yaml_problem
from zfnet.config.instantiate import resolve
from zfnet.config.schema import flatten
from zfnet.config.trust import CONF, check_what_hydra_composes, config_loader, parse_overrides

# extras of pyproject.toml, each with the packages and launchers that it provides
_EXTRAS = {
    "sweep": ("optuna", "joblib", "submitit_local", "submitit_slurm"),
    "explain": ("captum",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}
_EXTRA_OF = {name: extra for extra, names in _EXTRAS.items() for name in names}
# keys of a slot that its class does not take
_EXTRA_KEYS = {"optimizer": ("param_groups",), "scheduler": ("interval", "warmup_epochs")}
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+(e[-+]?\d+)?")  # a decimal comma: 0,001

_one_line_errors = False  # stays False with HYDRA_FULL_ERROR=1


@contextlib.contextmanager
def errors_pass_hydra() -> Iterator[None]:
    """End the program with one line if an error occurs in this block, before Hydra prints its own lines.

    In a sweep, the error is raised unchanged, because other jobs follow.
    """
    try:
        yield
    except Exception as error:
        if HydraConfig.get().mode == RunMode.RUN and _one_line_errors:
            _fail(error)
        raise


def run_with_clear_errors(main: Callable[[], None]) -> None:
    """Call Hydra's main function; on any error print one line and exit with a code other than 0.

    With HYDRA_FULL_ERROR=1, errors are raised unchanged. Otherwise this function sets the variable, which makes Hydra
    raise errors instead of printing them in its own way.
    """
    global _one_line_errors
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as with `>&-`
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a name outside the terminal's encoding must not end a run; a pipe or a file receives each line at once
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        check_what_hydra_composes(sys.argv[1:])
        main()
        return
    _one_line_errors = True
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        check_options(sys.argv[1:])
        check_what_hydra_composes(sys.argv[1:])
        main()
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "exit_code", 130))
    except Exception as error:
        _fail(error)
    finally:
        _one_line_errors = False
        del os.environ["HYDRA_FULL_ERROR"]
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # nobody can read it; otherwise Python would print this error and change the exit code
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(error: Exception) -> NoReturn:
    if not isinstance(error, BrokenPipeError):  # `python run.py … | head`: the reader has closed the pipe
        # a record from elsewhere can contain escape codes that move the cursor or rename the window
        print("\n".join(map(printable, f"error: {explain(error)}".splitlines())), file=sys.stderr)
    sys.exit(1)


def explain(error: Exception, argv: Sequence[str] | None = None, loader: ConfigLoader | None = None) -> str:
    """Return one line for an error: what to correct or, for a fault of the program, how to see the traceback.

    argv, loader: the overrides that were composed and their config loader; by default the program's command line
    """
    if isinstance(error, UserError):
        return str(error)
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    if first.endswith(":") and more:
        first += f" {more[0].strip()}"
    if first.startswith("Multiple values for "):  # Hydra's own advice is for config.yaml
        first += "; in a file of a group such as experiment, with a slash: override /GROUP: CHOICE"
    if isinstance(error, OverrideParseException):
        override = printable(error.override)
        return f"the command line cannot be parsed ({override}): write key=value, and quote lists for the shell"
    if isinstance(error, (HydraException, OmegaConfBaseException, ValueError)):  # model=null raises ValueError
        if problem := find_bad_override(sys.argv[1:] if argv is None else argv, loader):
            return problem
        if isinstance(error, MissingConfigException) and error.options:  # in a file's defaults list
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            return f"{group}={name}: no such choice{did_you_mean(name, error.options)}"
        if not isinstance(error, ValueError):
            cause = error.__cause__
            return yaml_problem(cause) if isinstance(cause, yaml.YAMLError) else first
    if isinstance(error, yaml.YAMLError):
        return yaml_problem(error)
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRA_OF.get(str(error.name).split(".")[0])):
        return f"this needs {error.name}: pip install -e '.[{extra}]'"
    if isinstance(error, MemoryError) or ("memory" in first and ("out of" in first or "allocate" in first)):
        return f"out of memory ({first}): lower data.batch_size or the network's sizes"
    if isinstance(error, OSError) and error.__traceback__ and _makes_run_directory(error):
        return (
            f"the folder {error.filename} cannot be created ({error.strerror}): choose another with hydra.run.dir=…, "
            "or hydra.sweep.dir=… for a sweep"
        )
    if isinstance(error, FileNotFoundError) and error.filename is None:  # from os.getcwd
        return "the current directory was deleted: change to another directory"
    return f"{type(error).__name__}: {first}{place_of(error)} (HYDRA_FULL_ERROR=1 shows where)"


def _makes_run_directory(error: OSError) -> bool:
    """Return whether Hydra or this program failed to make a run or sweep directory."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    ours = [name for name in modules if name.startswith(("hydra", "zfnet"))]
    where = ("hydra", "zfnet.runs", "zfnet.sweeps")
    made = any(frame.f_code.co_name == "mkdir" for frame in frames)  # a long name fails in a function that mkdir calls
    return made and bool(ours) and ours[-1].startswith(where)


def check_options(argv: Sequence[str]) -> None:
    """Raise UserError for an option that Hydra does not have, including those that it would accept as abbreviations."""
    known = re.findall(r"--[a-z-]+", get_args_parser().format_usage())
    for number, argument in enumerate(argv):
        name, _, value = argument.removeprefix("--").partition("=")
        is_key = (name and (CONF / name).is_dir()) or name in ("seed", "run", "images", "imports")
        if argument.startswith("--") and (is_key or not any(o.startswith(f"--{name}") for o in known)):
            value = value or next((a for a in argv[number + 1 : number + 2] if not a.startswith("-")), "VALUE")
            example = f"{name}={value}" if is_key else "optimizer.lr=0.01"
            raise UserError(f"--{name}: no such option; settings have no dashes, as in {example}")


def _overrides(argv: Sequence[str]) -> list[Override]:
    """Parse and return the arguments of a command line that are key=value or ~key."""
    parsed: list[Override] = []
    for argument in argv:
        if ("=" in argument or argument.startswith("~")) and not argument.startswith("-"):
            with contextlib.suppress(HydraException):  # skip an option's value, such as a folder
                parsed += parse_overrides([argument])
    return parsed


def find_bad_override(argv: Sequence[str], loader: ConfigLoader | None = None) -> str | None:
    """Return what is wrong with the first bad key=value among a command's arguments; None if all are good.

    loader: the config loader, such as that of a sweep's job; by default a loader for `argv`
    """
    overrides = _overrides(argv)
    name = get_args_parser().parse_known_args(list(argv))[0].config_name or "config"
    # overrides that decide which choices exist, and which of them can be composed
    further = [o.input_line or "" for o in overrides if o.key_or_group in ("hydra.searchpath", "imports")]
    loader = loader or config_loader(argv)
    sweeps = any(re.fullmatch("-m|--multirun|hydra.mode=MULTIRUN", argument) for argument in argv)

    def list_group(group: str, kind: ObjectType = ObjectType.CONFIG) -> list[str]:
        return loader.get_group_options(group, kind, name, further)

    @functools.cache
    def composed() -> dict[str, Any] | None:
        try:
            config = loader.load_configuration(name, [*further, *groups], RunMode.RUN, validate_sweep_overrides=False)
        except Exception:  # one of the choices is wrong
            return None
        plain: Any = OmegaConf.to_container(config, resolve=False)
        return flatten({key: value for key, value in plain.items() if key != "hydra"})

    try:
        has_jobs = bool(list_group("job"))
        groups = [o.input_line or "" for o in overrides if list_group(o.key_or_group)]
    except Exception:  # the folder or its config cannot be read; the original error says so
        return None
    for o in overrides:
        if o.key_or_group == "job" and not has_jobs:  # the config is a run's record, without groups
            return f"{o.input_line}: this config has no config group named job; write job.name={o.value()}"
    return next(filter(None, (_override_problem(o, groups, list_group, composed, sweeps) for o in overrides)), None)


def _override_problem(
    override: Override,
    groups: Sequence[str],
    list_group: Callable[..., list[str]],
    compose: Callable[[], dict[str, Any] | None],
    sweeps: bool,
) -> str | None:
    """Return what is wrong with an override: several values, an unknown choice of a group, or an unknown key.

    list_group: returns the choices of a group, or its subgroups
    compose: returns the values that the chosen groups set, by dotted key; None if a choice is wrong
    """
    key = override.key_or_group
    if override.is_sweep_override() and not sweeps:
        return _describe_several_values(override, (compose() or {}).get(key))
    if override.value_type == ValueType.GLOB_CHOICE_SWEEP:
        return None  # Hydra expands the pattern itself
    values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else override.value()
    values = values if isinstance(values, list) else [values]
    if key == "hydra/launcher" and (extra := _EXTRA_OF.get(str(values[0]))):
        return f"{key}={values[0]} needs additional packages: pip install -e '.[{extra}]'"
    if key.startswith("hydra."):
        return None
    if choices := list_group(key):
        if override.is_delete():
            return None
        for value in ("null" if v is None else str(v) for v in values):
            folder, _, last = f"{key}/{value}".rpartition("/")
            if last not in list_group(folder):
                nested = [f"{g}/{c}" for g in list_group(key, ObjectType.GROUP) for c in list_group(f"{key}/{g}")]
                return f"{key}={value}: no such choice{did_you_mean(value, [*choices, *nested])}"
        return None
    if key.startswith("hydra/"):
        return f"{key}: no such group{did_you_mean(key, [f'hydra/{g}' for g in list_group('hydra', ObjectType.GROUP)])}"
    if override.is_add() or override.is_force_add():
        return None
    composed = compose()
    return None if composed is None else _key_problem(override, groups, composed)


def _describe_several_values(override: Override, value: Any) -> str:
    """Say that several values need a sweep, or how to write what was probably meant for a key with this value."""
    key, text = override.key_or_group, str(override.input_line)
    given = text.partition("=")[2]
    advice = f"; write a list as {key}=[{given}]" if key in ("logger", "callbacks") or isinstance(value, list) else ""
    if isinstance(value, float) and _DECIMAL_COMMA.fullmatch(given):
        advice = f"; write a decimal number with a point: {key}={given.replace(',', '.')}"
    return f"{text}: several values need a sweep (run.py -m){advice}"


def _key_problem(override: Override, groups: Sequence[str], composed: dict[str, Any]) -> str | None:
    """Return what is wrong with an override of a key: it is not one of `composed`, or cannot be set like this."""
    key, text = override.key_or_group, str(override.input_line)
    known = {".".join(name.split(".")[: n + 1]) for name in composed for n in range(name.count(".") + 1)}
    if override.is_delete() and composed.get(key, key) is None:
        return f"{text}: is already null, and Hydra cannot delete it; leave it out"
    if key in known:
        below = sorted(name for name in known if name.rpartition(".")[0] == key)
        if below and not isinstance(override.value(), (dict, type(None))) and not override.is_sweep_override():
            return f"{text}: is a mapping; set one of its keys, as in {below[0]}=VALUE"
        return None
    group, _, name = key.partition(".")
    with contextlib.suppress(UserError, ValueError):
        target = composed.get(f"{group}._target_")
        taken = [*inspect.signature(resolve(group, target, object)).parameters, *_EXTRA_KEYS.get(group, ())]
        if name in taken and not override.is_delete():
            return f"{key}: is not in conf/{group}/, but {str(target).rpartition('.')[2]} accepts it: write +{text}"
    parent, _, last = key.rpartition(".")
    beside = {k.removeprefix(f"{parent}."): k for k in known if k.rpartition(".")[0] == parent}
    longer = sorted((k for k in known if k.endswith(f".{key}")), key=len)
    if longer:
        suggestion = f"; did you mean '{longer[0]}'?"
    elif parent and beside:  # compare the last part only
        close = difflib.get_close_matches(last, beside, n=1, cutoff=0.6)
        suggestion = f"; did you mean '{beside[close[0]]}'?" if close else did_you_mean("", beside.values())
    else:
        suggestion = did_you_mean(key, known | {p.name for p in CONF.iterdir() if p.is_dir()})
    chosen = next((g for g in groups if g.startswith(f"{group}=")), None)
    return f"{key}: no such key{f' with {chosen}' if chosen else ''}{suggestion}"
