"""Loggers: the calls that they get, TensorBoard's files read with its own reader, and the line of an epoch."""

from __future__ import annotations

import errno
import io
import re
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tests.helpers import (
    STEPS,
    TINY_EXACT,
    Killed,
    compose,
    read_csv,
    train_tiny_exact,
    train_until_killed,
    training_state,
    weights_and_history,
)
from zfnet.config.errors import UserError
from zfnet.plots.figures import save_figure
from zfnet.plots.results import draw_curves
from zfnet.runs.directory import HISTORY_COLUMNS, RunDirectory
from zfnet.training import loop
from zfnet.training.callbacks import Metrics
from zfnet.training.loggers import LoggedRun, Logger, TensorBoardLogger, epoch_line

ROW = {
    "epoch": 9,
    "step": 90,
    "lr": 0.000123,
    "train_loss": 1.23456,
    "train_accuracy": 0.5,
    "validation_loss": 2.5,
    "validation_accuracy": 0.25,
    "seconds": 3.5,
    "images_per_second": 12345.6,
}


class Notes(Logger):
    """A user's logger that records every call in memory."""

    calls: list[tuple] = []  # noqa: RUF012 (shared, because a run creates its own object)

    def start(self, run: LoggedRun) -> None:
        self.calls.append(("start", run.step, run.config["seed"], tuple(run.samples.shape)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls.append(("log", step, dict(values)))

    def figure(self, name: str, path: Path, step: int) -> None:
        self.calls.append(("figure", name))

    def finish(self, results: Mapping[str, float]) -> None:
        self.calls.append(("finish", dict(results)))

    def close(self) -> None:
        self.calls.append(("close",))


@pytest.fixture
def notes() -> Notes:
    Notes.calls.clear()
    return Notes()


OWN = ("imports=[tests]", f"+logger.mine._target_={__name__}.Notes")


def test_logger_of_ones_own_is_told_everything(tmp_path: Path, notes: Notes) -> None:
    run = train_tiny_exact(tmp_path / "run", *OWN, "trainer.log_every=8")
    history, results = run.read_history(), run.read_json("results.json")
    assert notes.calls[0] == ("start", 0, 0, (16, 64, 64, 3))
    assert [c[1] for c in notes.calls if c[0] == "log"] == [8, 1, 16, 2]  # steps 8 and 16, epochs 1 and 2
    steps = notes.calls[1][2]
    assert steps["step/train_loss"] == history[0]["train_loss"]
    assert notes.calls[2][2]["epoch/validation_loss"] == history[0]["validation_loss"]
    accuracies = {f"result/{k}_accuracy": results[k]["accuracy"] for k in ("validation", "test")}
    assert notes.calls[-2:] == [("finish", accuracies), ("close",)]


BROKEN = r"logger\.broken \(Broken\): KeyError: 'val_loss' \(own\.py, line \d+\) \(HYDRA_FULL_ERROR=1 shows where\)"


@pytest.mark.parametrize("method", ["log", "finish", "close"])
def test_logger_that_fails_is_left_out_with_one_warning(
    tmp_path: Path, notes: Notes, reference_run, method: str
) -> None:
    words = ("+logger.broken._target_=tests.own.Broken", f"+logger.broken.method={method}", *OWN, "trainer.log_every=1")
    run = train_tiny_exact(tmp_path / "run", *words)
    assert weights_and_history(run) == reference_run
    text = (run.folder / "train.log").read_text()
    end = "\n" if method == "close" else "; the run continues without this logger\n"
    assert len(re.findall(BROKEN + end, text)) == len(re.findall(BROKEN, text)) == 1
    steps = range(1, 2 * STEPS + 1)
    assert [c[1] for c in notes.calls if c[0] == "log"] == [*steps[:STEPS], 1, *steps[STEPS:], 2]
    assert notes.calls[-1] == ("close",)


def test_logger_that_cannot_start_is_named_before_the_first_step(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("a step was trained"))
    words = (OWN[0], "+logger.broken._target_=tests.own.Broken", "+logger.broken.method=start")
    with pytest.raises(UserError) as caught:
        train_tiny_exact(tmp_path / "run", *words)
    assert re.fullmatch(BROKEN, str(caught.value))


def test_logger_is_told_where_a_resumed_run_goes_on(tmp_path: Path, notes: Notes) -> None:
    train_until_killed(tmp_path / "run", 5, *OWN)
    assert notes.calls[-1] == ("close",)
    notes.calls.clear()
    train_tiny_exact(tmp_path / "run", *OWN)
    assert notes.calls[0][:2] == ("start", 5)


def test_metrics_go_to_history_and_loggers(tmp_path: Path, notes: Notes) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "config.yaml").touch()
    metrics, state = Metrics(run, {"mine": notes}), training_state(compose(*TINY_EXACT, "trainer.log_every=7"))
    state.metrics.add(torch.tensor(3.0), torch.tensor(1), 2, 0)
    for state.step in range(1, 8):
        metrics.on_step_end(state)
    values = {"step/train_loss": 1.5, "step/train_accuracy": 0.5, "step/lr": state.schedule.lr(6)}
    assert notes.calls == [("log", 7, values)]
    state.history = [ROW]
    metrics.on_epoch_end(state, {**ROW, "validation_loss": None})
    _, step, values = notes.calls[1]
    assert step == 9
    assert values["epoch/validation_accuracy"] == 0.25
    assert not {"epoch/epoch", "epoch/step", "epoch/validation_loss"} & values.keys()
    assert run.read_history() == [ROW]
    assert (tmp_path / "history.csv").read_text().splitlines()[0] == ",".join(HISTORY_COLUMNS)


def test_metrics_without_loggers_or_in_another_process(tmp_path: Path) -> None:
    state = training_state(compose(*TINY_EXACT))
    state.history = [{**ROW, "validation_loss": None, "validation_accuracy": None}]
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").touch()
    Metrics(RunDirectory(tmp_path / "a"), {}).on_epoch_end(state, state.history[0])
    Metrics(None, {}).on_epoch_end(state, state.history[0])  # in a process that writes no files
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.*")} == {"a/config.yaml", "a/history.csv"}


def test_test_columns_follow_the_usual_ones_and_gaps_are_empty(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    row = {**ROW, "validation_loss": None, "test_loss": 0.5}
    run.write_history([row])
    header, values = (tmp_path / "history.csv").read_text().splitlines()
    assert header.split(",") == [*HISTORY_COLUMNS, "test_loss"]
    assert values.split(",")[5] == ""
    assert run.read_history()[0]["validation_loss"] is None


def test_epoch_line_fits_80_columns() -> None:
    assert epoch_line(ROW, 10) == ("epoch  9/10  train 1.2346 50.00%  validation 2.5000 25.00%  lr 0.00012  12346/s")
    assert len(epoch_line({**ROW, "epoch": 100, "train_accuracy": 1.0, "validation_accuracy": 1.0}, 100)) <= 84
    assert "validation" not in epoch_line({**ROW, "validation_loss": None}, 10)


# -- CSV


def test_csv_logger_drops_the_rows_that_a_resumed_run_repeats(tmp_path: Path) -> None:
    words = ("logger=csv", "trainer.log_every=1")
    train_until_killed(tmp_path / "run", 5, *words)
    with open(tmp_path / "run/steps.csv", "a") as file:
        file.write("6,9.9,0.9,0.1\n1")  # a step after the checkpoint, and a line that a crash has cut
    train_tiny_exact(tmp_path / "run", *words)
    train_tiny_exact(tmp_path / "whole", *words)
    assert (tmp_path / "run/steps.csv").read_text() == (tmp_path / "whole/steps.csv").read_text()
    rows = read_csv(tmp_path / "run/steps.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 2 * STEPS + 1))
    assert list(rows[0]) == ["step", "train_loss", "train_accuracy", "lr"]


def test_csv_logger_keeps_its_rows_when_a_resumed_run_is_killed_before_the_next(tmp_path: Path) -> None:
    words = ("logger=csv", "trainer.log_every=1")
    train_until_killed(tmp_path / "run", 5, *words)
    before = (tmp_path / "run/steps.csv").read_text()
    path = tmp_path / "run/steps.csv"

    def killed(*arguments: object) -> None:
        assert path.read_text() == before
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", killed)
        with pytest.raises(Killed):
            train_tiny_exact(tmp_path / "run", *words)


def test_csv_logger_names_a_damaged_file(tmp_path: Path) -> None:
    train_until_killed(tmp_path / "run", 5, "logger=csv")
    for content in (b"\xff\n", b"step,loss\n1,2\n", b"step,lr\nx,1\n", b"step,lr\n1," + b"1" * 200_000):
        (tmp_path / "run/steps.csv").write_bytes(content)
        with pytest.raises(UserError, match=r"steps\.csv is damaged: delete it to continue"):
            train_tiny_exact(tmp_path / "run", "logger=csv")


# -- TensorBoard


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("board") / "run"
    return train_tiny_exact(folder, "logger=tensorboard", "trainer.log_every=3")


@pytest.fixture(scope="module")
def events(run: RunDirectory) -> EventAccumulator:
    return read_events(run.folder / "tensorboard")


def read_events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_tensorboard_files_lie_in_one_directory(run: RunDirectory) -> None:
    """By default `SummaryWriter.add_hparams` writes a second run to a subfolder."""
    entries = list((run.folder / "tensorboard").iterdir())
    assert entries
    assert all(p.is_file() and p.name.startswith("events.out.tfevents") for p in entries)


def test_tensorboard_scalars_are_historys(run: RunDirectory, events: EventAccumulator) -> None:
    history = run.read_history()
    for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr"):
        scalars = events.Scalars(f"epoch/{name}")
        assert [e.step for e in scalars] == [1, 2]
        assert [e.value for e in scalars] == pytest.approx([row[name] for row in history], rel=1e-6)
    steps = [e.step for e in events.Scalars("step/train_loss")]
    assert steps == list(range(3, 2 * STEPS + 1, 3))
    results = run.read_json("results.json")
    for name in ("validation", "test"):
        assert events.Scalars(f"result/{name}_accuracy")[0].value == pytest.approx(results[name]["accuracy"])


def test_tensorboard_graph_images_and_hyperparameters(events: EventAccumulator) -> None:
    tags = events.Tags()
    assert tags["graph"]
    assert "conv1" in str(events.Graph())
    assert any(tag.startswith("train/samples") for tag in tags["images"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer.lr" in content
    assert b"model.conv1.channels" in content


def logged_run(folder: Path, step: int, model: nn.Module | None = None) -> LoggedRun:
    model = model or nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    return LoggedRun(folder, {"seed": 0}, step, model, 8, torch.zeros(1, 8, 8, 3, dtype=torch.uint8))


@pytest.mark.drawn
def test_tensorboard_figure_is_the_file(tmp_path: Path) -> None:
    save_figure(draw_curves([{"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5}]), tmp_path / "x.png")
    board = TensorBoardLogger()
    board.start(logged_run(tmp_path, 0))
    board.figure("x", tmp_path / "x.png", 3)
    board.close()
    (shown,) = read_events(tmp_path / "tensorboard").Images("x")
    drawn = Image.open(tmp_path / "x.png").convert("RGB")
    assert (shown.step, shown.width, shown.height) == (3, *drawn.size)
    assert Image.open(io.BytesIO(shown.encoded_image_string)).tobytes() == drawn.tobytes()


def test_tensorboard_graph_leaves_the_mode_and_a_failure_is_a_warning(tmp_path: Path, caplog) -> None:
    class Own(nn.Sequential):
        def forward(self, images):
            raise RuntimeError("not today\nand more")

    model = Own(nn.Linear(1, 1)).train()
    board = TensorBoardLogger()
    with caplog.at_level("WARNING", logger="zfnet"):
        board.start(logged_run(tmp_path, 0, model))
    board.close()
    assert model.training
    assert "TensorBoard: the graph could not be drawn (not today)" in caplog.text


def test_tensorboard_raises_the_error_of_its_thread_without_a_traceback(tmp_path: Path, monkeypatch) -> None:
    printed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", hook := printed.append)
    board = TensorBoardLogger()
    board.start(logged_run(tmp_path, 0))
    board.log(1, {"loss": 1.0})
    board.writer.flush()

    def full(self, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
    board.writer.add_scalar("loss", 1.0, 2)
    other = threading.Thread(target=full, args=(None, b""))
    other.start()
    other.join()
    assert printed.pop().thread is other
    with pytest.raises(OSError, match="No space left on device"):
        board.close()
    assert printed == []
    assert threading.excepthook is hook
    assert [e.step for e in read_events(tmp_path / "tensorboard").Scalars("loss")] == [1]


def test_tensorboard_hides_no_errors_of_other_threads(tmp_path: Path, monkeypatch) -> None:
    printed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    boards = [TensorBoardLogger() for _ in range(3)]
    for number, board in enumerate(boards):
        board.start(logged_run(tmp_path / str(number), 0))
    boards[0].close()
    boards[1].close()
    other = threading.Thread(target=int, args=("no number",))
    other.start()
    other.join()
    assert [failure.thread for failure in printed] == [other]
    monkeypatch.setattr(threading, "excepthook", hook := printed.extend)  # somebody else's
    boards[2].close()
    assert threading.excepthook == hook


def test_no_logger_writes_nothing(tmp_path: Path) -> None:
    run = train_tiny_exact(tmp_path / "run")
    assert not (run.folder / "tensorboard").exists()
    assert not (run.folder / "steps.csv").exists()


def test_tensorboard_of_a_resumed_run_voids_what_came_after(tmp_path: Path) -> None:
    for start, values in ((0, [1.0, 2.0, 3.0]), (2, [7.0])):  # the second run continues after step 2
        board = TensorBoardLogger()
        board.start(logged_run(tmp_path, start))
        for step, value in enumerate(values, start + 1):
            board.log(step, {"loss": value})
        board.close()
    events = read_events(tmp_path / "tensorboard")
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 7.0)]
    assert events.Tags()["scalars"] == ["loss"]
