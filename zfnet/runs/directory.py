"""The run directory: this module reads and writes all files in it except the weights.

A file is written under a temporary name, synced and renamed, so it is complete or absent. A writer holds the
directory's lock. Configs are YAML without interpolation, so reading them cannot run code.
"""

import contextlib
import csv
import functools
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from zfnet.config.errors import UserError, one_line, with_file_name, yaml_problem
from zfnet.config.reading import read_bytes, read_config, read_json, read_yaml, upgrade
from zfnet.config.schema import Config
from zfnet.runs.tables import csv_cell

HISTORY_COLUMNS = (
    *("epoch", "step", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy"),
    *("seconds", "images_per_second"),
)
OUTPUTS = Path("outputs")
_MAX_THREADS, _MAX_EPOCH = 1024, 10**9  # a record with more is damaged
# files that a directory can contain before its run: a lock, and the record of an attempt with a refused config
BEFORE_RUN = (".lock", "status.json", "train.log")
_PARTIAL = re.compile(r"\..+\.\w+\.partial")  # files that a killed process left half written


def _written_by_hydra() -> list[str]:
    """Return the names of files and folders that Hydra has already written to the job's directory, if configured."""
    hydra: Any = HydraConfig.get() if HydraConfig.initialized() else None
    # `compose` in Python leaves a HydraConfig behind although no job runs
    if hydra is None or OmegaConf.is_missing(hydra.runtime, "output_dir"):
        return []
    logs: Any = OmegaConf.to_container(hydra.job_logging, resolve=True)
    files = [handler.get("filename") for handler in (logs.get("handlers") or {}).values()]
    return [Path(name).name for name in (hydra.output_subdir, *files) if name]


def write_atomically(path: Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file atomically: at any moment, `path` has all of its old or all of its new content.

    content: bytes, text, or a function that writes to the path with which it is called and raises OSError if it fails
    """
    try:
        # a folder, because a function can create temporary files of its own, as safetensors does
        with tempfile.TemporaryDirectory(".partial", f".{path.name}.", path.parent) as folder:
            beside = Path(folder, path.name)
            beside.touch()
            mode = beside.stat().st_mode  # the mode from the user's umask; safetensors would set 0600
            if callable(content):
                content(beside)
            else:
                beside.write_bytes(content.encode() if isinstance(content, str) else content)
            os.chmod(beside, mode)
            with open(beside, "r+b") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    with contextlib.suppress(OSError):  # make the new name durable, if the system can
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, directly from the tensors' memory.

    `safetensors.torch.save`, which makes the bytes first, would hold the GIL and so block the training loop: for 0.2 s
    with the blog's network.
    """

    def write(beside: Path) -> None:
        try:
            save_file(tensors, beside, metadata)
        except SafetensorError as error:
            raise OSError(str(error).removeprefix("Error while serializing: ")) from error

    write_atomically(path, write)


def remove_if_empty(folder: Path) -> None:
    """Remove a directory that Hydra made if it is still empty; for `outputs/KIND/NAME`, remove empty parents too."""
    if HydraConfig.initialized() and folder.absolute() == Path(HydraConfig.get().runtime.cwd):
        return  # the job has no directory of its own (hydra.run.dir=.)
    with contextlib.suppress(OSError):  # not empty, or absent
        folder.rmdir()
        if folder.parent.parent == OUTPUTS:
            folder.parent.rmdir()
            OUTPUTS.rmdir()


class RunDirectory:
    """One run's directory and its files."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.figures = self.folder / "figures"
        self.snapshots = self.folder / "snapshots"
        self.weights = self.folder / "model.safetensors"

    @functools.cached_property
    def _lock(self) -> FileLock:
        return FileLock(self.folder / ".lock")  # reentrant: code that holds it can lock it again

    # -- claim and lock

    @contextlib.contextmanager
    def claim(self, config: Config, new: bool = False) -> Iterator[bool]:
        """Claim the directory for the run of `config` and lock it within this block; yield whether to resume the run.

        A directory without a run is claimed. One with the same run is resumed. One with another run, or with other
        files, is refused and not changed.

        new: the directory must be absent or empty
        """
        self._belongs_to(config, new)  # before locking: a refused directory gets no lock file
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder} cannot be created: {error.strerror or error}") from error
        with self.lock():
            resumed = self._belongs_to(config, new)  # again: another process may have claimed it
            if not resumed:
                write_atomically(self.folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
            yield resumed

    def _belongs_to(self, config: Config, new: bool) -> bool:
        """Return True if the directory has the run of `config`, False if it is free; raise UserError otherwise."""
        # a config.yaml with a defaults list is not a record but a file for Hydra, as in `conf/`
        # `Path.exists` would raise for a folder that cannot be read; `os.listdir` below names it
        recorded = os.path.exists(self.folder / "config.yaml") and "defaults" not in self.plain_config()
        if recorded and not new:
            if self.read_config().identity() != config.identity():
                raise UserError(
                    f"{self.folder} contains a run with another config: choose another directory (hydra.run.dir=…)"
                )
            return True
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise UserError(f"{self.folder} cannot be read: {error.strerror or error}") from error
        if any(name not in (*BEFORE_RUN, *_written_by_hydra()) and not _PARTIAL.fullmatch(name) for name in names):
            content = "contains a run" if recorded else "contains no run"
            raise UserError(f"{self.folder} is not empty and {content}: choose another directory (hydra.run.dir=…)")
        return False

    def refuse_links(self) -> None:
        """Raise UserError if a link in the directory points outside, because the run could write through it.

        The link that W&B leaves in the folders of its finished runs is allowed: W&B never writes there again.
        """
        inside = self.folder.resolve()
        for place, folders, files in os.walk(self.folder):
            for path in (Path(place, name) for name in (*folders, *files)):
                # `Path.resolve` would raise for a loop of links
                outside = path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(inside)
                if outside and not path.relative_to(self.folder).match("wandb/*run-*/logs/debug-core.log"):
                    raise UserError(f"{path}: is a link, so the run would write elsewhere: replace it")

    def remove_partials(self) -> None:
        """Remove files that killed processes left half written; the caller must hold the directory's lock."""
        for place, folders, files in os.walk(self.folder):
            for name in [n for n in (*folders, *files) if _PARTIAL.fullmatch(n)]:
                path = Path(place, name)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:  # earlier versions wrote to a file, not a folder
                    path.unlink(missing_ok=True)
            # skip folders of other runs
            folders[:] = [n for n in folders if not os.path.exists(os.path.join(place, n, ".lock"))]

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the directory for this process to write there; the system releases the lock however the process ends.

        Raises UserError if another process has the lock, or if a link in the directory points outside.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.folder} is in use by another process: wait for it or stop it first") from None
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        try:
            self.refuse_links()
            yield
        finally:
            self._lock.release()

    def in_use(self) -> bool:
        """Return whether a process, possibly this one, holds the directory's lock."""
        if not (self.folder / ".lock").is_file():
            return False
        try:
            with FileLock(self.folder / ".lock", timeout=0):  # not `self._lock`, which is reentrant
                return False
        except (Timeout, OSError):
            return True

    # -- the small files

    def recorded_config(self) -> dict[str, Any]:
        """Return config.yaml as plain values in the format of this version; raise UserError if it cannot be read."""
        path = self.folder / "config.yaml"
        try:
            plain = read_yaml(path)
            if not isinstance(plain, dict):
                raise UserError(f"{path} is not a config")
            return upgrade(plain)
        except FileNotFoundError:
            raise UserError(f"run={self.folder}: there is no run (no config.yaml)") from None
        except yaml.YAMLError as error:
            raise UserError(f"{path} cannot be read: {yaml_problem(error)}") from error
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from error

    def plain_config(self) -> dict[str, Any]:
        """Return `recorded_config()`, or an empty dict if it cannot be read."""
        try:
            return self.recorded_config()
        except UserError:
            return {}

    def read_config(self, imports: Sequence[str] = ()) -> Config:
        """Return the run's own config; raise UserError if there is none or it is damaged.

        imports: packages that this command trusts; the record's own list has no effect
        """
        path = self.folder / "config.yaml"
        try:
            return read_config(self.recorded_config(), imports)
        except UserError as error:
            raise with_file_name(path, error) from error

    def write_json(self, name: str, content: Any) -> None:
        write_atomically(self.folder / name, json.dumps(content, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """Return a JSON file of the run; raise UserError if it is absent or damaged."""
        path = self.folder / name
        try:
            return read_json(path)
        except FileNotFoundError:
            raise UserError(f"run={self.folder}: has no {name}; did it finish?") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {one_line(error)}") from error

    @property
    def environment(self) -> dict[str, Any]:
        """The content of environment.json; empty if it cannot be read, so that runs can still be compared."""
        try:
            environment = self.read_json("environment.json")
        except UserError:
            return {}
        return environment if isinstance(environment, dict) else {}

    @property
    def threads(self) -> int | None:
        """The number of CPU threads that the run used, if it is recorded."""
        cpu = self.environment.get("cpu")
        threads = cpu.get("threads") if isinstance(cpu, dict) else None
        return threads if isinstance(threads, int) and 1 <= threads <= _MAX_THREADS else None

    def write_csv(self, name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
        """Write a table with a header, which is `columns` or the keys of the first row."""
        text = io.StringIO(newline="")
        names = columns or list(rows[0])
        table = csv.writer(text, lineterminator="\n")
        table.writerow(map(csv_cell, names))
        table.writerows([csv_cell(row.get(name)) for name in names] for row in rows)
        # file names in a table can contain any bytes
        write_atomically(self.folder / name, text.getvalue().encode("utf-8", "backslashreplace"))

    def write_history(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write history.csv; additional columns follow the usual ones."""
        columns = dict.fromkeys([*HISTORY_COLUMNS, *(key for row in rows for key in row)])
        self.write_csv("history.csv", rows, list(columns))

    def check_record(self) -> None:
        """Raise UserError if config.yaml, without which the run is useless, was deleted after the run began."""
        if not (self.folder / "config.yaml").is_file():
            raise UserError(f"{self.folder} was deleted during the run (config.yaml is missing): start a new run")

    def set_status(self, state: str, error: str | None = None) -> None:
        """Record running, done, stopped, pruned (stopped by a search) or failed."""
        self.write_json("status.json", {"state": state, "error": error, "pid": os.getpid()})

    @property
    def state(self) -> str:
        """The recorded state, `none` if there is no readable record of it, or `killed` if no process holds the lock."""
        return self.state_and_error()[0]

    def state_and_error(self) -> tuple[str, str | None]:
        """Return the recorded state and its error or reason; `none` without a record, `killed` if it ran unlocked."""
        try:
            status = self.read_json("status.json")
            state, error = str(status["state"]), status["error"]
        except (UserError, KeyError, TypeError):
            return "none", None
        return "killed" if state == "running" and not self.in_use() else state, error

    @property
    def overrides(self) -> list[str]:
        """The overrides of the command that made the run, except for Hydra, job and run; empty if they are unknown."""
        try:
            overrides = read_yaml(self.folder / ".hydra" / "overrides.yaml")
        except (OSError, ValueError, yaml.YAMLError):
            return []
        overrides = [str(each).removeprefix("++") for each in overrides] if isinstance(overrides, list) else []
        return [each for each in overrides if not each.lstrip("+~").startswith(("hydra", "job=", "run="))]

    @property
    def job(self) -> str | None:
        """The name of the job that made this run; None if its config cannot be read."""
        try:
            return str(self.plain_config()["job"]["name"])
        except (KeyError, TypeError):
            return None

    def read_history(self) -> list[dict[str, float | None]]:
        """Return the rows of history.csv as numbers; an empty cell is None."""
        try:
            text = read_bytes(self.folder / "history.csv").decode()
            rows = csv.DictReader(io.StringIO(text, newline=""))
            history = [{k: float(v) if v else None for k, v in row.items()} for row in rows]
            if not all(1 <= (row.get("epoch") or 0) <= _MAX_EPOCH for row in history):
                raise ValueError("a row has no epoch")
            return history
        except FileNotFoundError:
            raise UserError(f"run={self.folder}: has no history.csv; did it train?") from None
        except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
            raise UserError(f"{self.folder / 'history.csv'} cannot be read: {error}") from error


def objective(results: Mapping[str, Any]) -> float | None:
    """Return the value that sweeps compare: validation accuracy, never test accuracy; None without validation."""
    return results["validation"]["accuracy"] if results["validation"] else None


def in_sweep() -> bool:
    """Return whether this process runs a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def sweep_folder(hydra: Any) -> Path:
    """Return the sweep's directory from Hydra's config of a job, which with hydra.job.chdir=true works in its own."""
    return Path(hydra.runtime.cwd, hydra.sweep.dir)


def find_run(text: str, key: str = "run") -> RunDirectory:
    """Return the run that `key` names: a directory, or `last` for the newest finished training run in outputs/.

    Raises UserError if there is none.
    """
    if text != "last":
        folder = Path(os.path.expanduser(text))
        if not os.path.isfile(folder / "config.yaml"):  # also False for a name that is too long
            raise UserError(f"{key}={text}: there is no run (no config.yaml)")
        return RunDirectory(folder)
    # exclude the runs of this sweep, so that `last` is the same run in all of its jobs
    sweep = sweep_folder(HydraConfig.get()).resolve() if in_sweep() else None
    finished = [
        run
        for run in list_runs(OUTPUTS)
        if run.state == "done"
        and run.job == "train"
        and (run.folder / "results.json").exists()
        and not (sweep and run.folder.resolve().is_relative_to(sweep))
    ]
    if not finished:
        apart = f" outside this sweep's {sweep}" if sweep else ""
        raise UserError(f"{key}=last: there is no finished training run in {OUTPUTS.absolute()}{apart}")
    return max(finished, key=lambda run: (run.folder / "results.json").stat().st_mtime_ns)


def list_runs(root: Path) -> list[RunDirectory]:
    """Return every run below `root` (outputs/<job>/<time>, outputs/sweeps/<time>/<overrides>), sorted."""
    return [RunDirectory(folder) for folder in find_folders(root, "config.yaml", 4) if folder.name != ".hydra"]


def find_folders(root: Path, name: str, depth: int) -> list[Path]:
    """Return the sorted folders below `root`, at most `depth` levels down, that contain a file or folder `name`.

    A folder that cannot be read is reported on the terminal and left out. A folder with several links is named once.
    """

    def report(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            where, reason = Path(error.filename), error.strerror or error
            print(f"{where} cannot be read and is left out: {reason}", file=sys.stderr)

    folders, seen = [], set()
    for place, below, files in os.walk(root, onerror=report, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            below.clear()
            continue
        seen.add(real)
        below.sort(key=lambda name: os.path.islink(os.path.join(place, name)))  # links last
        level = len(Path(place).relative_to(root).parts)
        if level > 0 and name in (*below, *files):
            folders.append(Path(place))
        if level == depth:
            below.clear()
    return sorted(folders)
