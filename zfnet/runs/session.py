"""A job at work in its run directory: the lock, the log, the recorded status, and the reasons to end early."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from tqdm import tqdm

from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.runs.directory import RunDirectory
from zfnet.runs.hydra_record import write_hydra_record

log = logging.getLogger("zfnet")


class Stopped(KeyboardInterrupt):
    """The user or the system asked the run to stop. Ends a whole sweep, as Ctrl-C should."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Pruned(Exception):
    """Raised when a search prunes this trial. Ends the run and not the sweep; a checkpoint is saved."""


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request, which the loop checks between two steps."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._deferred = False

    def __enter__(self) -> StopRequest:
        self._before = {}
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred or self.number is not None:
            raise Stopped(number)
        self.number = number
        print("\nstopping after this step; once more to stop at once", file=sys.stderr)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block the first signal is only noted."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def check(self, any_process: Callable[[bool], bool] = bool) -> None:
        """Raise Stopped if a signal was noted; `any_process` returns whether a flag is set in any process."""
        if any_process(self.number is not None):
            raise Stopped(self.number or signal.SIGTERM)


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
        log.setLevel(before[0])
        log.propagate = before[1]


@contextlib.contextmanager
def own_directory(config: Config, output: Path) -> Iterator[RunDirectory]:
    """Take `output`, which must be new or empty, for this job: hold it, log to <job>.log, record its state.

    Raises UserError where there is something in it already.
    """
    run = RunDirectory(output)
    run.claim_new(config)
    write_hydra_record(output, config)
    with hold(run, f"{config.job.name}.log"), recorded_state(run):
        yield run


@contextlib.contextmanager
def hold(run: RunDirectory, log_name: str) -> Iterator[StopRequest]:
    """Lock a claimed directory and log to a file in it; SIGINT and SIGTERM raise Stopped within this block."""
    with run.lock(), log_to(run.folder / log_name), StopRequest() as stop:
        yield stop


@contextlib.contextmanager
def recorded_state(run: RunDirectory, when_stopped: str = "stopped") -> Iterator[None]:
    """Record running, and at the block's end done, stopped or failed; errors go on to the caller."""
    run.set_status("running")
    try:
        yield
    except Pruned as error:
        run.set_status("pruned", str(error))
        log.info("pruned: %s", error)
        raise
    except KeyboardInterrupt as error:
        run.set_status("stopped", str(error) or "stopped by the keyboard")
        log.info(when_stopped)
        raise
    except SystemExit:  # a cluster's launcher, before it queues the job again
        run.set_status("stopped", "the launcher ended the process")
        raise
    except BaseException as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(UserError):  # such as a full disk, which must not hide the error itself
            run.set_status("failed", reason)
        log.debug("failed", exc_info=True)
        raise
    run.set_status("done")
