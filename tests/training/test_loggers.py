"""What a run says at the end of an epoch."""

from __future__ import annotations

from pathlib import Path

from zfnet.runs.directory import HISTORY_COLUMNS, RunDirectory
from zfnet.training.loggers import Recorder, epoch_line

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


class Board:
    def __init__(self) -> None:
        self.seen: list[tuple[int, dict]] = []

    def scalars(self, step: int, values) -> None:
        self.seen.append((step, dict(values)))


def test_history_and_board(tmp_path: Path) -> None:
    run, board = RunDirectory(tmp_path), Board()
    recorder = Recorder(run, board)
    recorder.step(7, 1.5, 0.25, 0.1)
    recorder.epoch(ROW, [ROW], 10)
    assert board.seen[0] == (7, {"step/train_loss": 1.5, "step/train_accuracy": 0.25, "step/lr": 0.1})
    step, values = board.seen[1]
    assert step == 9
    assert values["epoch/validation_accuracy"] == 0.25
    assert "epoch/epoch" not in values
    assert run.read_history() == [ROW]
    assert (tmp_path / "history.csv").read_text().splitlines()[0] == ",".join(HISTORY_COLUMNS)


def test_without_a_board(tmp_path: Path) -> None:
    recorder = Recorder(RunDirectory(tmp_path), None)
    recorder.step(7, 1.5, 0.25, 0.1)
    recorder.epoch({**ROW, "validation_loss": None, "validation_accuracy": None}, [], 10)


def test_test_columns_follow_the_usual_ones_and_gaps_are_empty(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    row = {**ROW, "validation_loss": None, "test_loss": 0.5}
    run.write_history([row])
    header, values = (tmp_path / "history.csv").read_text().splitlines()
    assert header.split(",") == [*HISTORY_COLUMNS, "test_loss"]
    assert values.split(",")[5] == ""
    assert run.read_history()[0]["validation_loss"] is None


def test_a_line_fits_80_columns() -> None:
    assert epoch_line(ROW, 10) == (
        "epoch  9/10  train 1.2346 50.00%  validation 2.5000 25.00%  lr 0.00012  12346/s"
    )
    assert (
        len(epoch_line({**ROW, "epoch": 100, "train_accuracy": 1.0, "validation_accuracy": 1.0}, 100)) <= 84
    )
    assert "validation" not in epoch_line({**ROW, "validation_loss": None}, 10)
