"""A running job: its directory, its recorded state, and signals: the first requests a stop, the second forces it."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from tests.helpers import TINY, TINY_EXACT, claim, compose, raise_disk_full, train_tiny_exact
from zfnet.config.errors import UserError
from zfnet.runs.directory import RunDirectory, write_atomically
from zfnet.runs.session import Stopped, StopRequest, hold_directory, log_to, own_directory


def test_the_state_tells_how_the_job_ended(tmp_path: Path) -> None:
    config = compose(*TINY)

    def end(name: str, error: BaseException | None) -> dict:
        expected = contextlib.nullcontext() if error is None else pytest.raises(type(error))
        with expected, own_directory(config, tmp_path / name) as run:
            assert run.state == "running"
            assert run.in_use()
            if error is not None:
                raise error
        run = RunDirectory(tmp_path / name)
        assert not run.in_use()
        assert run.plain_config() == config.to_dict()
        return {k: v for k, v in run.read_json("status.json").items() if k != "pid"}

    assert end("a", None) == {"state": "done", "error": None}
    assert end("b", UserError("no such thing")) == {"state": "failed", "error": "no such thing"}
    assert end("c", ValueError("x")) == {"state": "failed", "error": "ValueError: x"}
    assert end("d", Stopped(signal.SIGTERM)) == {"state": "stopped", "error": "stopped by SIGTERM"}
    assert "in end" in (tmp_path / "c/train.log").read_text()  # the traceback names `end`


@pytest.mark.parametrize("name", ["config.yaml", "notes.txt", ".hydra"])
def test_a_directory_with_anything_in_it_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="is not empty"), own_directory(compose(*TINY), tmp_path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_only_a_training_can_be_resumed(run_py, tiny_run, tmp_path: Path) -> None:
    (tmp_path / "cat.png").touch()
    assert run_py("job=predict", f"run={tiny_run.folder}", "images=cat.png", "hydra.run.dir=p").code == 1
    answer = run_py("job=resume", "run=p")
    assert (answer.code, answer.err) == (1, "error: run=p was made by job=predict: only a training can be continued\n")


def test_a_sweeps_directory_is_named_as_it_is(run_py, tiny_run, tmp_path: Path) -> None:
    (tmp_path / "optimizer.lr=0.01,seed=1").symlink_to(tiny_run.folder)
    answer = run_py("job=summary", "run=optimizer.lr=0.01,seed=1")
    assert answer.code == 0, answer.err
    assert "334,794" in answer.out


NUMBERS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.mark.parametrize(("number", "code"), NUMBERS)
def test_a_deferred_signal_is_a_request(number: int, code: int, capsys) -> None:
    with StopRequest() as stop:
        with stop.deferred():
            stop.check()
            os.kill(os.getpid(), number)
            assert stop.number == number
            with pytest.raises(Stopped) as caught:
                stop.check()
        assert caught.value.exit_code == code
        assert isinstance(caught.value, KeyboardInterrupt)  # it also ends a sweep
    assert "stopping after this step" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), NUMBERS)
def test_a_signal_stops_at_once_outside_the_loop(number: int, code: int) -> None:
    with StopRequest(), pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), number)
    assert caught.value.exit_code == code


def test_signal_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number, _ in NUMBERS]
    with StopRequest():
        assert [signal.getsignal(number) for number, _ in NUMBERS] != before
    assert [signal.getsignal(number) for number, _ in NUMBERS] == before


def test_nohup_keeps_sighup_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("code", [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_output_that_nobody_can_read_ends_no_job(tmp_path: Path, code: int, monkeypatch) -> None:
    """After SIGHUP the terminal is gone, after Ctrl-C `tee` is; printing fails, but the run must still be saved."""

    def gone(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with own_directory(compose(*TINY), tmp_path / "run"), StopRequest() as stop, monkeypatch.context() as patch:
        patch.setattr(sys.stdout, "write", gone)
        patch.setattr(sys.stderr, "write", gone)
        logging.getLogger("zfnet").info("said to nobody")
        with stop.deferred():
            os.kill(os.getpid(), signal.SIGHUP)
        assert stop.number == signal.SIGHUP
    assert "said to nobody" in (tmp_path / "run/train.log").read_text()


def kill_while_writing(path: Path) -> None:
    """Start a process that writes this file and is killed halfway."""

    def half(beside: Path) -> None:
        (beside.parent / ".tmpabc").write_bytes(b"1" * 1000)  # like safetensors' own temporary file
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        write_atomically(path, half)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_full_disk_ends_with_its_own_error(tmp_path: Path, monkeypatch, capfd) -> None:
    """The log cannot be written either, but this does not hide the error of the job."""

    class Full(io.StringIO):
        def flush(self) -> None:
            raise_disk_full()

        def close(self) -> None:
            self.flush()

    def work() -> None:
        with own_directory(compose(*TINY), tmp_path / "run"):
            logging.getLogger("zfnet").info("said")
            raise UserError("no room")

    monkeypatch.setattr(logging.FileHandler, "_open", lambda self: Full())
    with pytest.raises(UserError, match="no room"):
        work()
    assert "Traceback" not in capfd.readouterr().err


def test_a_log_that_cannot_be_created_ends_no_job(tmp_path: Path) -> None:
    (tmp_path / "train.log").mkdir()
    with log_to(tmp_path / "train.log"):
        logging.getLogger("zfnet").info("said")


def test_what_killed_writes_left_is_removed_by_the_next_start(tmp_path: Path) -> None:
    """Only this program's partial files are removed, and none of another run, which may be running."""
    run = RunDirectory(tmp_path / "run")
    claim(run, compose(*TINY))
    other = RunDirectory(run.folder / "inside")
    claim(other, compose(*TINY, "seed=1"))
    run.checkpoints.mkdir()
    places = [run.checkpoints / "step-000000001.safetensors", run.folder / "status.json", other.folder / "config.yaml"]
    for place in places:
        kill_while_writing(place)
    (run.checkpoints / ".step-000000002.safetensors.123.partial").write_bytes(b"half")  # the name in earlier versions
    kept = [run.checkpoints / "mine.partial", run.folder / ".partial", other.folder / "config.yaml"]
    for path in kept[:2]:
        path.write_text("somebody's own")
    left = list(run.folder.rglob(".*.partial"))
    assert len(left) == 4
    assert not run.in_use()
    assert all(path.exists() for path in left)  # `in_use` removes nothing
    with hold_directory(run, "train.log"):
        assert [path for path in left if path.exists()] == list(other.folder.glob(".*.partial"))
    assert all(path.exists() for path in kept)


WRITERS = [["hydra.run.dir=out", *TINY_EXACT], ["job=reproduce", "run=run", "hydra.run.dir=out"]]


@pytest.fixture(scope="module")
def minute_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train_tiny_exact(tmp_path_factory.mktemp("minute") / "run")


@pytest.mark.parametrize("words", WRITERS, ids=lambda words: words[0])
def test_writer_locks_the_directory_first(run_py, minute_run, tmp_path: Path, monkeypatch, words: list[str]) -> None:
    """If two processes start at the same time, the one that is refused writes nothing."""
    (tmp_path / "run").symlink_to(minute_run.folder)
    out, written, real = RunDirectory(tmp_path / "out"), set(), tempfile.TemporaryDirectory

    def noted(suffix: str, prefix: str, folder: Path):
        if Path(folder).resolve().is_relative_to(out.folder.resolve()):
            assert out.in_use(), prefix
            written.add(prefix)
        return real(suffix, prefix, folder)

    with monkeypatch.context() as patch:
        patch.setattr("zfnet.runs.directory.tempfile.TemporaryDirectory", noted)
        answer = run_py(*words)
        assert answer.code == 0, answer.err
    assert {".config.yaml.", ".hydra.yaml.", ".overrides.yaml.", ".status.json."} <= written
    shutil.rmtree(out.folder)
    out.folder.mkdir()
    with out.lock():
        answer = run_py(*words)
        assert (answer.code, answer.err) == (
            1,
            "error: out is in use by another process: wait for it or stop it first\n",
        )
        assert [path.name for path in out.folder.iterdir()] == [".lock"]


def test_in_another_thread_there_are_no_handlers_to_set() -> None:
    numbers: list[object] = []

    def work() -> None:
        with StopRequest() as stop, stop.deferred():
            stop.check()
            numbers.append(stop.number)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert numbers == [None]
