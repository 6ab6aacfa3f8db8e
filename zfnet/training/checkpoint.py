"""Checkpoints: tensors and plain numbers, written so that the last good one is never at risk.

A checkpoint is one safetensors file: the tensors, and a JSON header with everything else. No pickle. It is
written by a thread from copies, synced, and renamed to a name that sorts by step; only then are older ones
removed. A file that was cut short fails its own length check and the one before it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import Optimizer

from zfnet.config.errors import UserError
from zfnet.runs.directory import write_tensors

KEPT = 2
CHECKPOINT_FORMAT = 1
_NAME = re.compile(r"step-(\d{9})\.safetensors")


@dataclass
class Checkpoint:
    """tensors: by name; metadata: what JSON can hold."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; without a folder it writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None

    def write(self, name: str, checkpoint: Checkpoint, prune: bool = True) -> None:
        """Start writing `name`; the tensors are copied before this returns, so training may change them.

        Raises the UserError of the write before this one, if that failed.
        """
        self.wait()
        if self.folder is None:
            return
        # from a GPU they go to pinned memory, in the order of its work: the loop need not wait for them
        copies = {
            key: value.detach().to("cpu", non_blocking=value.is_cuda, copy=True)
            for key, value in checkpoint.tensors.items()
        }
        gpu = next((value.device for value in checkpoint.tensors.values() if value.is_cuda), None)
        copied = None if gpu is None else torch.cuda.current_stream(gpu).record_event()
        metadata = json.dumps({"format": CHECKPOINT_FORMAT, **checkpoint.metadata})
        self.pending = self.thread.submit(_write, self.folder, name, copies, copied, metadata, prune)

    def wait(self) -> None:
        """Wait until the last write is durable; raise its UserError if it failed."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for the last write and end the thread."""
        try:
            self.wait()
        finally:
            self.thread.shutdown()


def _write(
    folder: Path,
    name: str,
    tensors: dict[str, Tensor],
    copied: torch.Event | None,
    metadata: str,
    prune: bool,
) -> None:
    if copied is not None:
        copied.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    ready = {key: value.contiguous() for key, value in tensors.items()}
    write_tensors(folder / name, ready, {"checkpoint": metadata})
    if prune:
        for old in step_files(folder)[:-KEPT]:
            old.unlink(missing_ok=True)


def step_files(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*.safetensors") if _NAME.fullmatch(p.name))


def step_name(step: int) -> str:
    return f"step-{step:09d}.safetensors"


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint; raise UserError if it is damaged or of another version."""
    try:
        with safe_open(path, "pt") as file:
            metadata = json.loads((file.metadata() or {})["checkpoint"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if not isinstance(metadata, dict):
            raise ValueError("its header is no record")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged or no checkpoint ({error})") from error
    if metadata.pop("format", None) != CHECKPOINT_FORMAT:
        raise UserError(f"{path} was written by another version of this program")
    return Checkpoint(tensors, metadata)


def read_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that can be read (None if there is none) and what was wrong with newer ones."""
    problems: list[str] = []
    for path in reversed(step_files(folder)):
        try:
            return read_checkpoint(path), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def optimizer_checkpoint(optimizer: Optimizer) -> Checkpoint:
    """Divide an optimizer's state into tensors and plain numbers."""
    state = optimizer.state_dict()
    tensors, numbers = {}, []
    for index, values in state["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{key}"] = value
            elif value is not None:
                numbers.append([index, key, value])
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]]
    return Checkpoint(tensors, {"numbers": numbers, "groups": groups})


def load_optimizer(optimizer: Optimizer, saved: Checkpoint) -> None:
    """Give an optimizer the state that `optimizer_checkpoint` took."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for name, value in saved.tensors.items():
        index, _, key = name.partition(".")
        like = parameters[int(index)]
        if value.shape == like.shape:
            # safetensors drops the memory format; fused kernels would read NCHW momentum against NHWC weights
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        state.setdefault(int(index), {})[key] = value
    for index, key, value in saved.metadata["numbers"]:
        state.setdefault(index, {})[key] = value
    groups = []
    for fresh, stored in zip(optimizer.state_dict()["param_groups"], saved.metadata["groups"], strict=True):
        # JSON has no tuples: what the fresh optimizer holds as one becomes one again
        values = {k: tuple(v) if isinstance(fresh.get(k), tuple) else v for k, v in stored.items()}
        # which kernels compute a step is a matter of the device, which may be another one now
        groups.append({**fresh, **values, **{k: fresh[k] for k in ("fused", "foreach") if k in fresh}})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put `prefix.` before each name."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def under_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors below `prefix.`, without it."""
    return {
        name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")
    }
