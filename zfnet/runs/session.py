"""A running job in its run directory: the lock, the log, the recorded status, and the reasons to end early."""

import contextlib
import logging
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType

from omegaconf import DictConfig
from tqdm.auto import tqdm

from zfnet.config.errors import UserError, log, printable
from zfnet.config.schema import Config
from zfnet.runs.directory import RunDirectory
from zfnet.runs.hydra_record import write_hydra_record


class Stopped(KeyboardInterrupt):
    """Raised when the user or the system asks the run to stop. Ends a whole sweep, as Ctrl-C should."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StoppedAtOnce(Stopped):
    """Raised by a second signal, possibly in the middle of a step, so the state must not be saved."""


class Pruned(Exception):
    """Raised when a search prunes this trial. Ends the run but not the sweep; a checkpoint is saved."""


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Turns the first SIGINT, SIGTERM or SIGHUP into a request that the loop checks between two steps."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = False

    def __enter__(self) -> "StopRequest":
        self._before = {}
        with contextlib.suppress(ValueError):  # only the main thread can set handlers
            for number in STOP_SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:  # started with nohup
                    continue
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred:
            raise Stopped(number)
        if self.number is not None:
            raise StoppedAtOnce(number)
        self.number = number
        with contextlib.suppress(OSError):  # the terminal may have been closed
            print("\nstopping after this step; a second signal stops at once without saving", file=sys.stderr)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record the first signal while this block runs."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self, any_process: Callable[[bool], bool] = bool) -> None:
        """Raise Stopped if a signal was recorded; `any_process` returns whether a flag is set in any process."""
        if any_process(self.number is not None):
            raise Stopped(self.number or signal.SIGTERM)


class _Terminal(logging.Handler):
    """Prints above a progress bar instead of through it, and breaks lines between words."""

    def emit(self, record: logging.LogRecord) -> None:
        # names from elsewhere can contain escape codes that the terminal would execute
        text = "\n".join(map(printable, self.format(record).splitlines()))
        if sys.stdout.isatty():
            fill = partial(textwrap.fill, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
            width = shutil.get_terminal_size().columns
            # a command stays one line, so that it can be copied
            text = "\n".join(line if "python run.py" in line else fill(line, width) for line in text.splitlines())
        # the terminal is closed, the reader of the pipe has ended or the disk is full, but the run must still be saved
        with contextlib.suppress(OSError):
            tqdm.write(text, file=sys.stdout)


class _LogFile(logging.FileHandler):
    """Drops messages if the disk is full, so that a logging error does not hide the error that ends the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        """Print no traceback."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # the file cannot be created
            super().emit(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send the program's messages to the terminal and, with the time and with tracebacks, to a file."""
    terminal, file = _Terminal(logging.INFO), _LogFile(path, encoding="utf-8", delay=True)
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
        log.setLevel(before[0])
        log.propagate = before[1]


@contextlib.contextmanager
def own_directory(config: Config, output: Path) -> Iterator[RunDirectory]:
    """Claim `output`, which must be new or empty, for this job: lock it, log to <job>.log and record the job's state.

    Raises UserError if it is not empty.
    """
    run = RunDirectory(output)
    with claim_directory(run, config, f"{config.job.name}.log", new=True), recorded_state(run):
        yield run
        log.info("written to %s", run.folder)


@contextlib.contextmanager
def continued_directory(config: Config, output: Path) -> Iterator[tuple[RunDirectory, StopRequest]]:
    """Do what `own_directory` does, or continue the same job if it was stopped; also yield its StopRequest.

    Raises UserError if the directory contains anything else.
    """
    run = RunDirectory(output)
    message = f"stopped; to continue, run the command again with hydra.run.dir={run.folder}"
    with claim_directory(run, config, f"{config.job.name}.log") as stop:
        if any(run.plain_config()[key] != config.to_dict()[key] for key in ("job", "run")):
            raise UserError(f"{run.folder} was made with other settings: choose another directory (hydra.run.dir=…)")
        with recorded_state(run, message):
            yield run, stop


@contextlib.contextmanager
def claim_directory(
    run: RunDirectory, config: Config, log_name: str, composed: DictConfig | None = None, new: bool = False
) -> Iterator[StopRequest]:
    """Claim a directory for the run of `config`, or continue the run in it, and hold it with `hold_directory`.

    composed: the config that Hydra composed, for its record in `.hydra/`; None if a recorded run was the base
    new: the directory must be new or empty
    """
    with run.claim(config, new) as resumed:
        if not resumed:
            write_hydra_record(run.folder, config if composed is None else composed)
        with hold_directory(run, log_name) as stop:
            yield stop


@contextlib.contextmanager
def hold_directory(run: RunDirectory, log_name: str) -> Iterator[StopRequest]:
    """Lock a claimed directory and log to a file in it; SIGINT, SIGTERM, SIGHUP raise Stopped within this block."""
    with run.lock(), log_to(run.folder / log_name), StopRequest() as stop:
        run.remove_partials()
        yield stop


@contextlib.contextmanager
def recorded_state(run: RunDirectory, when_stopped: str = "stopped") -> Iterator[None]:
    """Record the state running and, at the end of the block, done, stopped, pruned or failed; errors are re-raised."""
    run.set_status("running")
    try:
        yield
    except Pruned as error:
        run.set_status("pruned", str(error))
        log.info("pruned: %s", error)
        raise
    except KeyboardInterrupt as error:
        run.set_status("stopped", str(error) or "interrupted from the keyboard")
        log.info(when_stopped)
        raise
    except SystemExit:  # from a cluster's launcher, before it queues the job again
        run.set_status("stopped", "the launcher ended the process")
        raise
    except BaseException as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(UserError):  # such as a full disk; it must not hide the first error
            run.set_status("failed", reason)
        log.debug("failed", exc_info=True)
        raise
    run.set_status("done")
