"""Errors as one line on the terminal, with what was probably meant."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zfnet.config.errors import UserError, did_you_mean, yaml_problem
from zfnet.config.schema import flatten
from zfnet.config.trust import CONF, check_config_folders
from zfnet.runs.command import compose_raw

# which extra of pyproject.toml brings a package or a launcher
_EXTRAS = {
    "sweep": ("optuna", "joblib", "submitit_local", "submitit_slurm"),
    "explain": ("captum",),
    "export": ("onnx", "onnxruntime", "onnxscript"),
}
_EXTRA_OF = {name: extra for extra, names in _EXTRAS.items() for name in names}

_one_line_errors = False  # not so with HYDRA_FULL_ERROR=1


@contextlib.contextmanager
def errors_pass_hydra() -> Iterator[None]:
    """Within this block an error ends the program with its one line, before Hydra can print lines of its own.

    Not in a sweep, where the next job comes.
    """
    try:
        yield
    except Exception as error:
        if HydraConfig.get().mode == RunMode.RUN and _one_line_errors:
            _fail(error)
        raise


def run_with_clear_errors(main: Callable[[], None]) -> None:
    """Call Hydra's main function; on any error print one line and exit with a code other than 0.

    With HYDRA_FULL_ERROR=1 errors come as they are. Without, that variable is set for Hydra, which then lets errors
    through instead of printing them in its own way.
    """
    global _one_line_errors
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        check_config_folders(sys.argv[1:])
        main()
        return
    _one_line_errors = True
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        check_config_folders(sys.argv[1:])
        main()
    except KeyboardInterrupt as error:
        sys.exit(getattr(error, "exit_code", 130))
    except Exception as error:
        _fail(error)
    finally:
        _one_line_errors = False
        del os.environ["HYDRA_FULL_ERROR"]


def _fail(error: Exception) -> NoReturn:
    if isinstance(error, BrokenPipeError):  # `python run.py … | head`: the reader has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        print(f"error: {explain(error)}", file=sys.stderr)
    sys.exit(1)


def explain(error: Exception) -> str:
    """Return one line for an error; the user's own mistakes are named, the program's are pointed to."""
    if isinstance(error, UserError):
        return str(error)
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OverrideParseException):
        return f"the command line cannot be parsed ({error.override}): write key=value, and quote lists for the shell"
    if isinstance(error, (HydraException, OmegaConfBaseException, ValueError)):  # ValueError: model=null
        if problem := next(filter(None, map(_misfit, _overrides())), None):
            return problem
        if not isinstance(error, ValueError):
            cause = error.__cause__
            return yaml_problem(cause) if isinstance(cause, yaml.YAMLError) else first
    if isinstance(error, yaml.YAMLError):
        return yaml_problem(error)
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRA_OF.get(str(error.name).split(".")[0])):
        return f"this needs {error.name}: pip install -e '.[{extra}]'"
    if isinstance(error, MemoryError) or ("memory" in first and ("out of" in first or "allocate" in first)):
        return f"out of memory ({first}): lower data.batch_size or the network's sizes"
    return f"{type(error).__name__}: {first} (HYDRA_FULL_ERROR=1 shows where)"


def _overrides() -> list[Override]:
    """Return the key=value words of the command line, parsed."""
    parsed: list[Override] = []
    for word in sys.argv[1:]:
        if "=" in word and not word.startswith("-"):
            with contextlib.suppress(HydraException):  # the value of an option, such as a folder's name
                parsed += OverridesParser.create().parse_overrides([word])
    return parsed


def _misfit(override: Override) -> str | None:
    """Return what is wrong with an override: an unknown choice of a group, or an unknown key."""
    key = override.key_or_group
    values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else override.value()
    values = values if isinstance(values, list) else [values]
    if key == "hydra/launcher" and (extra := _EXTRA_OF.get(str(values[0]))):
        return f"{key}={values[0]} needs packages of its own: pip install -e '.[{extra}]'"
    if key.startswith("hydra") and not key.startswith("hydra/sweeper/"):  # Hydra's own groups have Hydra's choices
        return None
    if (folder := CONF / key).is_dir():
        choices = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
        for value in ("null" if v is None else str(v) for v in values):
            if value not in choices:
                return f"{key}={value}: no such choice{did_you_mean(value, choices)}"
        return None
    if override.is_add() or override.is_force_add():
        return None
    groups = [o.input_line or "" for o in _overrides() if (CONF / o.key_or_group).is_dir()]
    try:
        composed = flatten(OmegaConf.to_container(compose_raw(groups), resolve=False))  # type: ignore[arg-type]
    except Exception:  # one of the groups is what is wrong
        return None
    known = {".".join(name.split(".")[: n + 1]) for name in composed for n in range(name.count(".") + 1)}
    if key in known:
        return None
    suggestion = did_you_mean(key, known | {p.name for p in CONF.iterdir() if p.is_dir()})
    if "did you mean" not in suggestion:  # list the keys beside it
        parent = key.rpartition(".")[0]
        suggestion = did_you_mean("", {k for k in known if k.rpartition(".")[0] == parent} or known)
    return f"{key}: no such key{suggestion}"
