"""The terminal and the log files: messages above progress bars, and errors as one line."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from zfnet.config.errors import UserError, did_you_mean, yaml_problem
from zfnet.config.schema import flatten
from zfnet.config.trust import CONF, check_config_folders
from zfnet.runs.command import compose_raw
from zfnet.runs.signals import Stopped

log = logging.getLogger("zfnet")

# which extra of pyproject.toml brings what is optional
_EXTRA_OF_LAUNCHER = dict.fromkeys(("joblib", "submitit_local", "submitit_slurm"), "sweep")
_EXTRA_OF = {"optuna": "sweep", "captum": "explain"} | dict.fromkeys(
    ("onnx", "onnxruntime", "onnxscript"), "export"
)

_quiet = False  # whether errors become one line; not so with HYDRA_FULL_ERROR=1


class _Terminal(logging.Handler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send the program's messages to the terminal and, with the time and with tracebacks, to a file."""
    terminal, file = _Terminal(logging.INFO), logging.FileHandler(path, encoding="utf-8", delay=True)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    before = log.level, log.propagate
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.addHandler(terminal)
    log.addHandler(file)
    try:
        yield
    finally:
        log.removeHandler(terminal)
        log.removeHandler(file)
        file.close()
        log.level, log.propagate = before


class _Escaped(BaseException):
    """Carries an error past Hydra, which would print a line of its own about it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


@contextlib.contextmanager
def errors_pass_hydra() -> Iterator[None]:
    """Within this block errors go straight to `run_with_clear_errors`; not in a sweep, where the next job comes."""
    try:
        yield
    except Exception as error:
        if HydraConfig.get().mode == RunMode.RUN and _quiet:
            raise _Escaped(error) from error
        raise


def run_with_clear_errors(main: Callable[[], None]) -> None:
    """Call Hydra's main function; on any error print one line and exit with a code other than 0.

    With HYDRA_FULL_ERROR=1 errors come as they are. Without, that variable is set for Hydra's own sake: it
    then lets errors through instead of printing them in its own way.
    """
    global _quiet
    if os.environ.get("HYDRA_FULL_ERROR") == "1":
        check_config_folders(sys.argv[1:])
        main()
        return
    _quiet = True
    threading.excepthook = _note_thread_error
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        check_config_folders(sys.argv[1:])
        with _wrapped_help() if {"--help", "-h"} & set(sys.argv) else contextlib.nullcontext():
            main()
    except Stopped as error:
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except _Escaped as error:
        _fail(error.error)
    except Exception as error:
        _fail(error)
    finally:
        _quiet = False
        threading.excepthook = threading.__excepthook__
        del os.environ["HYDRA_FULL_ERROR"]


@contextlib.contextmanager
def _wrapped_help() -> Iterator[None]:
    """Break the long lines in which Hydra lists a group's choices."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:  # Hydra leaves by an exit
        for line in text.getvalue().splitlines():
            print(textwrap.fill(line, 80, subsequent_indent="  ") if len(line) > 80 else line)


def _note_thread_error(args: threading.ExceptHookArgs) -> None:
    """One line for an error in a helper thread (TensorBoard's writer on a full disk, say); the run goes on."""
    if isinstance(args.exc_value, Exception):
        print(f"warning: a background thread ended: {explain(args.exc_value)}", file=sys.stderr)


def _fail(error: Exception) -> NoReturn:
    if isinstance(error, BrokenPipeError):  # `python run.py … | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    print(f"error: {explain(error)}", file=sys.stderr)
    sys.exit(1)


def explain(error: Exception) -> str:
    """Return one line for an error; the user's own mistakes are named, the program's are pointed to."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        return _explain_hydra(error)
    if isinstance(error, MemoryError) or re.search(
        "out of memory|can't allocate memory|not enough memory", str(error), re.I
    ):
        return f"out of memory ({_one_line(error)}): lower data.batch_size or the network's sizes"
    if isinstance(error, ModuleNotFoundError) and (extra := _EXTRA_OF.get(str(error.name).split(".")[0])):
        return f"this needs {error.name}: pip install -e '.[{extra}]'"
    if isinstance(error, yaml.YAMLError):
        return yaml_problem(error)
    if isinstance(error, (FileExistsError, NotADirectoryError)) and error.filename:
        return (
            f"{error.filename}: a file stands where a directory is needed: choose another (hydra.run.dir=…)"
        )
    if isinstance(error, ValueError) and (problem := next(filter(None, map(_misfit, _parsed())), None)):
        return problem  # Hydra's answer to model=null
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror} ({type(error).__name__}; HYDRA_FULL_ERROR=1 shows where)"
    return f"{type(error).__name__}: {_one_line(error)} (HYDRA_FULL_ERROR=1 shows where)"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _explain_hydra(error: Exception) -> str:
    """Name the first word of the command line that does not fit; if there is none, return Hydra's own first line."""
    for word in _override_words():
        try:
            (override,) = OverridesParser.create().parse_overrides([word])
        except HydraException:
            return (
                f"the command line cannot be parsed ({word}): write key=value, and quote lists for the shell"
            )
        if (problem := _misfit(override)) is not None:
            return problem
    if isinstance(error.__cause__, yaml.YAMLError):
        return yaml_problem(error.__cause__)
    return " ".join([_one_line(error), *([f"({_one_line(error.__cause__)})"] if error.__cause__ else [])])


def _parsed() -> list[Override]:
    with contextlib.suppress(HydraException):
        return list(OverridesParser.create().parse_overrides(_override_words()))
    return []


def _override_words() -> list[str]:
    """Return the words of the command line that are overrides: neither options nor their values."""
    takes_value = ("-cp", "--config-path", "-cn", "--config-name", "-cd", "--config-dir", "-p", "--package")
    words = sys.argv[1:]
    return [
        word
        for before, word in zip(["", *words], words, strict=False)
        if not word.startswith("-") and before not in takes_value
    ]


def _misfit(override: Override) -> str | None:
    """Return what is wrong with an override: an unknown choice of a group, or an unknown key."""
    key = override.key_or_group
    values = list(override.sweep_string_iterator()) if override.is_sweep_override() else override.value()
    values = values if isinstance(values, list) else [values]
    if key == "hydra/launcher" and values[0] in _EXTRA_OF_LAUNCHER:
        return f"{key}={values[0]} needs packages of its own: pip install -e '.[{_EXTRA_OF_LAUNCHER[values[0]]}]'"
    if (folder := CONF / key).is_dir():
        choices = sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))
        for value in values:
            if str(value) not in choices and not key.startswith("hydra"):
                shown = "null" if value is None else value
                return f"{key}={shown}: no such choice{did_you_mean(str(value), choices)}"
        return None
    if override.is_add() or override.is_force_add() or key.startswith("hydra"):
        return None
    groups = [w for w in _override_words() if (CONF / w.partition("=")[0]).is_dir()]
    try:
        composed = flatten(OmegaConf.to_container(compose_raw(groups), resolve=False))  # type: ignore[arg-type]
    except Exception:  # one of the groups is what is wrong
        return None
    known = {".".join(name.split(".")[: n + 1]) for name in composed for n in range(name.count(".") + 1)}
    if key in known:
        return None
    parent = key.rpartition(".")[0]
    nearby = {k for k in known if k.rpartition(".")[0] == parent} if parent in known else known
    suggestion = did_you_mean(key, known | {p.name for p in CONF.iterdir() if p.is_dir()})
    return f"{key}: no such key{suggestion if 'did you mean' in suggestion else did_you_mean('', nearby)}"
