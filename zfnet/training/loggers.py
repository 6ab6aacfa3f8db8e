"""Where metrics go beside history.csv: TensorBoard, a CSV file, Weights & Biases, MLflow, Trackio, or your own."""

from __future__ import annotations

import csv
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from zfnet.config.schema import flatten

log = logging.getLogger("zfnet")


@dataclass(frozen=True)
class LoggedRun:
    """What a logger is told when a run starts.

    folder: the run directory; config: as recorded, nested; step: 0, or the step from which a stopped run goes on;
    model: on the CPU or a GPU, not to be changed; image_size: side of its input in pixels; samples: uint8 [N, h, w, 3]
    """

    folder: Path
    config: Mapping[str, Any]
    step: int
    model: nn.Module
    image_size: int
    samples: Tensor


class Logger:
    """Gets everything that a run measures. Derive from it, and override what you need; `conf/logger` names it.

    Names are `step/…` for readings within an epoch (means since it began), `epoch/…` for those at its end, and
    `result/…` for the final ones. Only the main process has loggers, and they change nothing about the training.
    """

    def start(self, run: LoggedRun) -> None:
        """Called before the first step of this process."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Called with the metrics of a step (`step/…`: counted in optimizer steps) or an epoch (`epoch/…`)."""

    def figure(self, name: str, path: Path, step: int) -> None:
        """Called with each figure that the run drew, a PNG file."""

    def finish(self, results: Mapping[str, float]) -> None:
        """Called with the final results, after a run that was not stopped."""

    def close(self) -> None:
        """Called at the end, however the run ended."""


class CSVLogger(Logger):
    """Writes `steps.csv` in the run directory: the readings within epochs. A resumed run drops rows that it repeats."""

    def start(self, run: LoggedRun) -> None:
        path = run.folder / "steps.csv"
        rows: list[dict[str, Any]] = []
        if run.step and path.is_file():
            with open(path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= run.step]
        self.file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (open until `close`)
        self.writer = csv.DictWriter(
            self.file, ["step", "train_loss", "train_accuracy", "lr"], lineterminator="\n"
        )
        self.writer.writeheader()
        self.writer.writerows(rows)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        row = {key.removeprefix("step/"): value for key, value in values.items() if key.startswith("step/")}
        if row:
            self.writer.writerow({"step": step, **row})
            self.file.flush()

    def close(self) -> None:
        if hasattr(self, "file"):
            self.file.close()


class TensorBoardLogger(Logger):
    """Writes event files to `tensorboard/` in the run directory: scalars, graph, images and hyperparameters."""

    def start(self, run: LoggedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.config = run.config
        # what was written from this step on is marked as void
        self.writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step or None)
        if run.step == 0:
            self._graph(run)
            self.writer.add_images("train/samples", run.samples, dataformats="NHWC")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def figure(self, name: str, path: Path, step: int) -> None:
        with Image.open(path) as file:
            pixels = torch.frombuffer(bytearray(file.convert("RGB").tobytes()), dtype=torch.uint8)
            pixels = pixels.view(file.height, file.width, 3)
        self.writer.add_image(name, pixels, step, dataformats="HWC")

    def finish(self, results: Mapping[str, float]) -> None:
        # TensorBoard takes plain values only: lists and nulls become text
        plain = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v)
            for k, v in flatten(self.config).items()
        }
        # run_name="." puts them into this run; by default `add_hparams` opens a second one
        self.writer.add_hparams(plain, dict(results), run_name=".")

    def close(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()

    def _graph(self, run: LoggedRun) -> None:
        """Draw the network's graph; the model's mode and its values are left as they are."""
        training = run.model.training
        device = next(run.model.parameters()).device
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                self.writer.add_graph(
                    run.model.eval(), torch.zeros(1, 3, run.image_size, run.image_size, device=device)
                )
        except Exception as error:  # the tracer is PyTorch's; a picture less is no reason to stop a training
            log.warning("TensorBoard: the graph could not be drawn (%s)", str(error).splitlines()[0])
        finally:
            run.model.train(training)


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """One line for an epoch, short enough for 80 columns without test figures."""
    words = [
        f"epoch {row['epoch']:{len(str(epochs))}d}/{epochs}",
        f"train {row['train_loss']:.4f} {row['train_accuracy']:.2%}",
    ]
    for name in ("validation", "test"):
        if row.get(f"{name}_loss") is not None:
            words.append(f"{name} {row[f'{name}_loss']:.4f} {row[f'{name}_accuracy']:.2%}")
    words += [f"lr {row['lr']:.2g}", f"{row['images_per_second']:.0f}/s"]
    return "  ".join(words)
