"""Weights kept at some epochs, so that the features' growth can be looked at later (paper, Fig. 4)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from zfnet.model.zfnet import ZFNet
from zfnet.runs.weights import ModelMetadata, save_model

_NAME = re.compile(r"epoch-(\d{4,})\.safetensors")


class Snapshots:
    """Writes `epoch-0001.safetensors` and so on into `folder`, after each of `epochs` (counted from 1).

    They have model.safetensors' format. A run that goes on after a stop keeps those it has and writes the
    rest; an epoch that is trained again gives the same file again.
    """

    def __init__(self, folder: Path, epochs: Sequence[int], metadata: ModelMetadata) -> None:
        self.folder, self.epochs, self.metadata = folder, frozenset(epochs), metadata

    def take(self, epoch: int, model: ZFNet) -> None:
        """Write the weights if this epoch is one of those to keep; raise UserError if that fails."""
        if epoch in self.epochs:
            self.folder.mkdir(exist_ok=True)
            save_model(self.folder / f"epoch-{epoch:04d}.safetensors", model, self.metadata)


def list_snapshots(folder: Path) -> dict[int, Path]:
    """Return the snapshots in a folder by epoch, in their order; empty where there is no such folder."""
    found = {int(match[1]): p for p in folder.glob("epoch-*") if (match := _NAME.fullmatch(p.name))}
    return dict(sorted(found.items()))
