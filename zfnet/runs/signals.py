"""Reasons to leave before the end: SIGTERM and Ctrl-C finish the step, save and leave; a search may prune."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType


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
        with contextlib.suppress(
            ValueError
        ):  # handlers belong to the main thread; elsewhere there are none to set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._deferred and self.number is None:
            self.number = number
            print("\nstopping after this step; once more to stop at once", file=sys.stderr)
            return
        raise Stopped(number)

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
