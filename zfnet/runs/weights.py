"""Weights and what is needed to use them: model.safetensors, and `load_run` for notebooks and jobs.

Weights are safetensors with a JSON header; no pickle is read, so a stranger's file cannot run code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zfnet.config.errors import UserError
from zfnet.config.schema import Config, DataConfig, ModelConfig, check, read_data, refuse_interpolation, upgrade_data
from zfnet.model.build import build_model
from zfnet.runs.directory import RunDirectory, find_run, write_tensors

WEIGHTS_FORMAT = "zfnet-1"


@dataclass(frozen=True)
class ModelMetadata:
    """What must be known to use a file of weights: the network's settings, its classes and its preprocessing."""

    model: ModelConfig | dict[str, Any]
    classes: tuple[str, ...]
    data: DataConfig
    stored_size: int
    format: str = WEIGHTS_FORMAT


def load_model(path: Path, imports: Sequence[str] = ()) -> tuple[Any, ModelMetadata]:
    """Rebuild a network from model.safetensors, in evaluation mode; raise UserError if that cannot be done.

    imports: packages that a network may come from, beside PyTorch, torchvision and this one
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})["zfnet"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header.pop("format") != WEIGHTS_FORMAT:
            raise UserError(f"{path} was written by another version of this program")
        refuse_interpolation(header)
        network = header["model"]
        is_own = isinstance(network, dict) and "_target_" in network
        metadata = ModelMetadata(
            model=network if is_own else check(ModelConfig, network, "model"),
            data=read_data(upgrade_data(header["data"])),
            classes=tuple(str(c) for c in header["classes"]),
            stored_size=int(header["stored_size"]),
        )
    except FileNotFoundError:
        raise UserError(f"{path}: there are no weights; did the run finish?") from None
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file of ZFNet weights, or is damaged ({error})") from error
    model = build_model(metadata.model, len(metadata.classes), metadata.data.image_size, imports)
    try:
        getattr(model, "load_weights", model.load_state_dict)(state)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit its network ({str(error).splitlines()[-1].strip()})") from error
    return model.eval(), metadata


def save_model(path: Path, model: nn.Module, metadata: ModelMetadata) -> str:
    """Write the weights with what is needed to rebuild the network; return the weights' hash."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_tensors(path, state, {"zfnet": json.dumps(asdict(metadata))})
    return weights_hash(state)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, ready to use: `model` is in evaluation mode on the CPU."""

    run: RunDirectory
    config: Config
    model: Any  # a ZFNet, or a network of your own
    metadata: ModelMetadata

    @property
    def classes(self) -> tuple[str, ...]:
        return self.metadata.classes

    @property
    def results(self) -> dict[str, Any]:
        """What results.json holds."""
        return dict(self.run.read_json("results.json"))

    def __repr__(self) -> str:
        return f"TrainedRun({str(self.run.folder)!r}, {type(self.model).__name__}, {len(self.classes)} classes)"


def load_run(folder: str | Path, imports: Sequence[str] = ()) -> TrainedRun:
    """Load a run directory (or `last`): its network with the weights to use, its classes and its config.

        model = load_run("outputs/train/2026-01-31_12-00-00-000000").model

    Raises UserError where there is no finished run.
    """
    run = find_run(str(folder))
    model, metadata = load_model(run.weights, imports)
    return TrainedRun(run, run.read_config(imports), model, metadata)


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 over names and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
