"""What a run's records cost: checkpoints, TensorBoard, history and progress bars, against epochs without them."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path
from typing import Any

from zfnet.benchmark.turns import Contender, compare, enough_images, print_table, take_turns
from zfnet.config.schema import Config
from zfnet.data import ImageSet
from zfnet.runs.directory import RunDirectory
from zfnet.runs.signals import StopRequest
from zfnet.training.board import TensorBoard
from zfnet.training.checkpoint import CheckpointWriter
from zfnet.training.device import Runtime, timed
from zfnet.training.loop import finish_epoch, train_epoch
from zfnet.training.recorder import Recorder
from zfnet.training.state import TrainingState, training_batches


class Epochs:
    """Whole epochs of training, with or without all that a run writes.

    With it, each epoch counts as the best so far, so that its weights are written as well. What is still being
    written when a turn ends is waited for, but not timed: within a run it is written beside the next epoch.
    """

    def __init__(
        self, name: str, config: Config, runtime: Runtime, images: ImageSet, folder: Path | None
    ) -> None:
        self.name, self.images = name, images
        self.batches = training_batches(config, runtime, images)
        self.batch_size = len(images)  # what the clock calls a step is an epoch here
        self.state = TrainingState(config, runtime, len(images.classes), len(self.batches))
        run = None if folder is None else RunDirectory(folder)
        board = None if run is None else TensorBoard(run.tensorboard, 0)
        self.writer = CheckpointWriter(None if run is None else run.checkpoints)
        self.recorder = Recorder(run, board)
        self.screen = _Screen() if run is not None else io.StringIO()

    def turn(self, steps: int, warmup: int) -> float:
        """Train `steps` epochs; there is no warm-up."""
        seconds = timed(lambda: self._epochs(steps), self.state.runtime.device)
        self.writer.wait()
        return seconds

    def _epochs(self, count: int) -> None:
        with contextlib.redirect_stderr(self.screen):
            for _ in range(count):
                train_epoch(self.state, self.batches, self.writer, self.recorder, StopRequest())
                found = {"validation_loss": 0.0, "validation_accuracy": float(self.state.epoch)}
                finish_epoch(self.state, found, len(self.images), self.writer, self.recorder)


class _Screen(io.StringIO):
    """Somewhere to draw progress bars, which are drawn on terminals only."""

    def isatty(self) -> bool:
        return True


def measure(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Train epochs with and without records, in turns; return what benchmark.json holds."""
    job, images = config.job, enough_images(config)
    with tempfile.TemporaryDirectory(prefix="zfnet-records-") as folder:
        contenders: list[Contender] = [
            Epochs("without records", config, runtime, images, None),
            Epochs("with records", config, runtime, images, Path(folder)),
        ]
        timings = take_turns(contenders, rounds=job.rounds, steps=config.trainer.epochs, warmup=0)
    rows = compare(timings)
    return {
        "title": "Epochs with and without records",
        "contenders": rows,
        "share_of_an_epoch": 1 - 1 / rows[1]["first_is_faster_by"],
        "seconds_of_an_epoch": len(images) / timings[0].median(),
    }


def say(result: dict[str, Any]) -> None:
    """Print the table and the share."""
    print_table(result["contenders"], "epochs", "without is faster by")
    print(
        f"\nrecords take {result['share_of_an_epoch']:.2%} of an epoch of {result['seconds_of_an_epoch']:.1f} s"
    )
