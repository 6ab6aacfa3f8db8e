"""What people read: the terminal, train.log, and errors as one line."""

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
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from zfnet.config.errors import UserError, did_you_mean, yaml_problem
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
    if "Config group override must be a string" in str(error):
        return _no_group_file()
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror} ({type(error).__name__}; HYDRA_FULL_ERROR=1 shows where)"
    return f"{type(error).__name__}: {_one_line(error)} (HYDRA_FULL_ERROR=1 shows where)"


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _explain_hydra(error: Exception) -> str:
    text = str(error)
    if match := re.search(
        r"Could not (?:override|append to config\. An item is already at|delete from config\.) '([^']+)'",
        text,
    ):
        return _unknown_key(match[1].split("@")[0].lstrip("+~"), text)
    if match := re.search(r"In '[^']*': Could not find '([^']+)/([^'/]*)'", text):
        if (extra := _EXTRA_OF_LAUNCHER.get(match[2])) and match[1] == "hydra/launcher":
            return f"{match[1]}={match[2]} needs packages of its own: pip install -e '.[{extra}]'"
        choices = re.findall(r"^\t(\S+)$", text, re.M)
        return f"{match[1]}={match[2]}: no such choice{did_you_mean(match[2], choices)}"
    if "node `job` is not a container" in text:  # a record given as --config-path
        return "this config has no choices of jobs: write job.name=… instead of job=…"
    if match := re.search(
        r"LexerNoViableAltException: (.*)|mismatched input|no viable alternative|extraneous input|missing EQUAL",
        text,
    ):
        where = match[1] or _one_line(error)
        return f"the command line cannot be parsed ({where}): write key=value, and quote lists for the shell"
    cause = f" ({_one_line(error.__cause__)})" if error.__cause__ is not None else ""
    return _one_line(error) + cause


def _unknown_key(key: str, text: str) -> str:
    """Name a key that the config has not, with the nearest one that it has."""
    known: list[str] = []
    with contextlib.suppress(Exception):
        known = _keys(compose_raw([w for w in sys.argv[1:] if _chooses_a_group(w)]))
    if key in known:
        return _one_line(Exception(text))
    suggestion = did_you_mean(key, known) if known else ""
    if suggestion.startswith("; known"):
        parent = key.rpartition(".")[0]
        siblings = [k for k in known if k.rpartition(".")[0] == parent]
        suggestion = f"; known: {', '.join(siblings)}" if siblings else ""
    return f"{key}: no such key{suggestion}"


def _no_group_file() -> str:
    """Name the group that was given something else than one of its files, as in model=null."""
    for name, _, value in (word.partition("=") for word in sys.argv[1:]):
        if (CONF / name).is_dir() and not (CONF / name / f"{value}.yaml").is_file():
            choices = [path.stem for path in (CONF / name).glob("*.yaml")]
            return f"{name}={value}: no such choice{did_you_mean(value, choices)}"
    return "a group was given something else than a name"


def _chooses_a_group(word: str) -> bool:
    name, _, value = word.partition("=")
    return "." not in name and (CONF / name / f"{value}.yaml").is_file()


def _keys(node, prefix: str = "") -> list[str]:
    keys = []
    for key in node:
        keys.append(prefix + str(key))
        value = node._get_node(key)
        if hasattr(value, "keys"):
            keys += _keys(value, f"{prefix}{key}.")
    return keys
