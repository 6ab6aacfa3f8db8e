"""TensorBoard's files, read back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from zfnet.training.board import TensorBoard

from tests.helpers import STEPS, train_minute
from zfnet.plots.figures import save_figure
from zfnet.plots.results import draw_curves
from zfnet.runs.directory import RunDirectory

WORDS = ("trainer.tensorboard=true", "trainer.log_every=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train_minute(tmp_path_factory.mktemp("board") / "run", *WORDS)


@pytest.fixture(scope="module")
def events(run: RunDirectory) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.tensorboard), size_guidance={"images": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def test_all_files_lie_in_one_directory(run: RunDirectory) -> None:
    """`SummaryWriter.add_hparams` would open a second run in a folder below."""
    entries = list(run.tensorboard.iterdir())
    assert entries
    assert all(p.is_file() and p.name.startswith("events.out.tfevents") for p in entries)


def test_scalars_are_historys(run: RunDirectory, events: EventAccumulator) -> None:
    history = run.read_history()
    for name in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr"):
        found = events.Scalars(f"epoch/{name}")
        assert [e.step for e in found] == [1, 2]
        assert [e.value for e in found] == pytest.approx([row[name] for row in history], rel=1e-6)
    steps = [e.step for e in events.Scalars("step/train_loss")]
    assert steps == list(range(3, 2 * STEPS + 1, 3))
    results = run.read_json("results.json")
    for name in ("validation", "test"):
        assert events.Scalars(f"result/{name}_accuracy")[0].value == pytest.approx(results[name]["accuracy"])


def test_graph_images_and_hyperparameters(events: EventAccumulator) -> None:
    tags = events.Tags()
    assert tags["graph"]
    assert "conv1" in str(events.Graph())
    assert any(tag.startswith("train/samples") for tag in tags["images"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optimizer.lr" in content
    assert b"model.conv1.channels" in content


def test_a_picture_is_the_file(tmp_path: Path) -> None:
    save_figure(
        draw_curves([{"epoch": 1, "lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5}]), tmp_path / "x.png"
    )
    board = TensorBoard(tmp_path / "board", 0)
    board.picture("x", tmp_path / "x.png", 3)
    board.close()
    accumulator = EventAccumulator(str(tmp_path / "board"))
    accumulator.Reload()
    (shown,) = accumulator.Images("x")
    width, height = Image.open(tmp_path / "x.png").size
    assert (shown.step, shown.width, shown.height) == (3, width, height)
    assert shown.encoded_image_string == (tmp_path / "x.png").read_bytes()


def test_nothing_where_it_is_not_wanted(tmp_path: Path) -> None:
    assert not train_minute(tmp_path / "run").tensorboard.exists()


def test_a_resumed_board_voids_what_came_after(tmp_path: Path) -> None:
    for start, values in ((0, [1.0, 2.0, 3.0]), (2, [7.0])):
        board = TensorBoard(tmp_path, start)
        for k, value in enumerate(values):
            board.scalars(start + k, {"loss": value, "absent": None})
        board.close()
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [(e.step, e.value) for e in accumulator.Scalars("loss")] == [(0, 1.0), (1, 2.0), (2, 7.0)]
    assert accumulator.Tags()["scalars"] == ["loss"]
