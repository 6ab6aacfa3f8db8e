"""A job at work in its run directory: the lock, the log, signals, and the recorded status."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.runs.console import log_to
from zfnet.runs.directory import RunDirectory
from zfnet.runs.hydra_record import write_hydra_record
from zfnet.runs.signals import Pruned, StopRequest

log = logging.getLogger("zfnet")


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
    except Pruned as verdict:
        run.set_status("pruned", str(verdict))
        log.info("pruned: %s", verdict)
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
        with contextlib.suppress(UserError):  # a full disk, say, must not hide the error itself
            run.set_status("failed", reason)
        log.debug("failed", exc_info=True)
        raise
    run.set_status("done")
