"""What a run says while it trains: history.csv, train.log, the terminal and TensorBoard."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from zfnet.runs.directory import RunDirectory

log = logging.getLogger("zfnet")


class Board(Protocol):
    """What a recorder needs of TensorBoard."""

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None: ...


class Watcher(Protocol):
    """Somebody outside who looks at every epoch, and may raise Pruned."""

    def epoch(self, row: Mapping[str, Any]) -> None: ...


class Recorder:
    """Passes each reading on to all who want it; without a run, to nobody."""

    def __init__(self, run: RunDirectory | None, board: Board | None, watcher: Watcher | None = None) -> None:
        self.run, self.board, self.watcher = run, board, watcher

    def profiler(self, wanted: bool) -> torch.profiler.profile | contextlib.nullcontext[None]:
        """Return a context that writes a trace of five steps, the sixth to the tenth, to profile/ in the run."""
        if not wanted or self.run is None:
            return contextlib.nullcontext()
        folder = self.run.folder / "profile"
        folder.mkdir(exist_ok=True)
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=3, warmup=2, active=5, repeat=1),
            on_trace_ready=lambda p: p.export_chrome_trace(str(folder / f"step-{p.step_num:06d}.json.gz")),
            record_shapes=True,
        )

    def step(self, step: int, loss: float, accuracy: float, rate: float) -> None:
        """A reading within an epoch: means since the epoch began."""
        if self.board is not None:
            self.board.scalars(
                step, {"step/train_loss": loss, "step/train_accuracy": accuracy, "step/lr": rate}
            )

    def epoch(self, row: Mapping[str, Any], history: Sequence[Mapping[str, Any]], epochs: int) -> None:
        """The end of an epoch."""
        if self.run is None:
            return
        self.run.write_history(history)
        log.info(epoch_line(row, epochs))
        if self.board is not None:
            skip = ("epoch", "step")
            self.board.scalars(row["epoch"], {f"epoch/{k}": v for k, v in row.items() if k not in skip})
        if self.watcher is not None and row["epoch"] < epochs:
            self.watcher.epoch(row)


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
