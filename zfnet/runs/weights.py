"""Weights and what is needed to use them: model.safetensors, and `load_run` for notebooks and jobs.

Weights are safetensors with a JSON header; no pickle is read, so a stranger's file cannot run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from zfnet.config.errors import UserError
from zfnet.config.schema import Config, DataConfig, ModelConfig, read_part
from zfnet.model.zfnet import ZFNet
from zfnet.runs.directory import RunDirectory, find_run, write_tensors

WEIGHTS_FORMAT = "zfnet-1"


@dataclass(frozen=True)
class ModelMetadata:
    """What must be known to use a file of weights: the network's settings, its classes and its preprocessing."""

    model: ModelConfig
    classes: tuple[str, ...]
    data: DataConfig
    stored_size: int
    format: str = WEIGHTS_FORMAT


def load_model(path: Path) -> tuple[ZFNet, ModelMetadata]:
    """Rebuild a network from model.safetensors, in evaluation mode; raise UserError if that cannot be done."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["zfnet"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header.pop("format") != WEIGHTS_FORMAT:
            raise UserError(f"{path} was written by another version of this program")
        metadata = ModelMetadata(
            model=read_part(ModelConfig, header["model"], "model"),
            data=read_part(DataConfig, header["data"], "data"),
            classes=tuple(str(c) for c in header["classes"]),
            stored_size=int(header["stored_size"]),
        )
    except FileNotFoundError:
        raise UserError(f"{path}: there are no weights; did the run finish?") from None
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file of ZFNet weights, or is damaged ({error})") from error
    model = ZFNet(len(metadata.classes), metadata.data.image_size, metadata.model)
    model.load_weights(state)
    return model.eval(), metadata


def save_model(path: Path, model: ZFNet, metadata: ModelMetadata) -> str:
    """Write the weights with what is needed to rebuild the network; return the weights' hash."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_tensors(path, state, {"zfnet": json.dumps(asdict(metadata))})
    return weights_hash(state)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, ready to use: `model` is in evaluation mode on the CPU."""

    run: RunDirectory
    config: Config
    model: ZFNet
    metadata: ModelMetadata

    @property
    def classes(self) -> tuple[str, ...]:
        return self.metadata.classes


def load_run(folder: str | Path) -> TrainedRun:
    """Load a run directory (or `last`): its network with the weights to use, its classes and its config.

        model = load_run("outputs/train/2026-01-31_12-00-00-000000").model

    Raises UserError where there is no finished run.
    """
    run = find_run(str(folder))
    model, metadata = load_model(run.weights)
    return TrainedRun(run, run.read_config(), model, metadata)


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
