"""The first signal is a request, the second an order, and the handlers before are put back."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from zfnet.runs.signals import Stopped, StopRequest

NUMBERS = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.mark.parametrize(("number", "code"), NUMBERS)
def test_deferred(number: int, code: int, capsys) -> None:
    with StopRequest() as stop:
        with stop.deferred():
            stop.check()
            os.kill(os.getpid(), number)
            assert stop.number == number
            with pytest.raises(Stopped) as caught:
                stop.check()
        assert caught.value.exit_code == code
        assert isinstance(caught.value, KeyboardInterrupt)  # which ends a sweep, too
    assert "stopping after this step" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), NUMBERS)
def test_outside_the_loop_at_once(number: int, code: int) -> None:
    with StopRequest(), pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number, _ in NUMBERS]
    with StopRequest():
        assert [signal.getsignal(number) for number, _ in NUMBERS] != before
    assert [signal.getsignal(number) for number, _ in NUMBERS] == before


def test_in_another_thread_there_is_nothing_to_set() -> None:
    found: list[object] = []

    def work() -> None:
        with StopRequest() as stop, stop.deferred():
            stop.check()
            found.append(stop.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]
