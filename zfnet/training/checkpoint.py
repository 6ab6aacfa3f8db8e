"""Checkpoints: tensors and plain values, written so that a crash cannot damage the last good checkpoint.

A checkpoint is one safetensors file: the tensors, and a JSON header with everything else, without pickle. A thread
writes copies of the tensors, syncs the file and renames it to a name that sorts by step; only then it removes older
ones. A truncated file fails its length check, a changed file fails its checksum, and the reader uses the previous one.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.optim import Optimizer

from zfnet.config.errors import UserError
from zfnet.model.build import read_tensors
from zfnet.runs.directory import write_atomically, write_tensors

KEPT = 2
CHECKPOINT_FORMAT = 3  # 2 had no checksum; 1 had another format of the optimizer's state
BEST_FILE = "best.safetensors"
_NAME = re.compile(r"step-(\d{9})\.safetensors")


@dataclass
class Checkpoint:
    """tensors: by name; metadata: values that JSON can represent."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time; without a folder it writes nothing."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None

    def write(self, name: str, checkpoint: Checkpoint, prune: bool = True) -> None:
        """Start writing `name`. The tensors are copied before this returns, so training can change them.

        Raises the UserError of the previous write, if that failed.
        """
        self.wait()
        if self.folder is None:
            return
        # copies from a GPU go to pinned memory in stream order, so the loop does not wait for them
        tensors = checkpoint.tensors
        copies = {k: v.detach().to("cpu", non_blocking=v.is_cuda, copy=True) for k, v in tensors.items()}
        gpu = next((v.device for v in tensors.values() if v.is_cuda), None)
        copied = None if gpu is None else torch.cuda.current_stream(gpu).record_event()
        header = json.dumps({"format": CHECKPOINT_FORMAT, **checkpoint.metadata})
        self.pending = self.thread.submit(_write, self.folder, name, copies, copied, header, prune)

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
    folder: Path, name: str, tensors: dict[str, Tensor], copied: torch.Event | None, header: str, prune: bool
) -> None:
    if copied is not None:
        copied.synchronize()
    folder.mkdir(parents=True, exist_ok=True)
    ready = {key: value.contiguous() for key, value in tensors.items()}
    write_tensors(folder / name, ready, {"checkpoint": header, "checksum": checksum(ready, header)})
    if prune:
        # files of later steps could not be read, otherwise the run would have continued from them
        for old in [file for file in step_files(folder) if file.name <= name][:-KEPT]:
            old.unlink(missing_ok=True)


def checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    """Return a CRC-32 over the header and each tensor's name, type, shape and bytes: it detects damage, not forgery.

    For the 0.7 GB of the blog's network it takes the writing thread 0.2 s; SHA-256 takes twice as long.
    """
    crc = zlib.crc32(header.encode())
    for name in sorted(tensors):
        value = tensors[name]
        crc = zlib.crc32(f"{name} {value.dtype} {list(value.shape)}".encode(), crc)
        crc = zlib.crc32(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def step_files(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; raise UserError if the folder cannot be read."""
    try:
        return sorted(folder / name for name in os.listdir(folder) if _NAME.fullmatch(name))
    except FileNotFoundError:
        return []
    except OSError as error:  # otherwise training would restart and lose the checkpoints
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error


def step_name(step: int) -> str:
    return f"step-{step:09d}.safetensors"


def epoch_name(epoch: int, best: bool = False) -> str:
    """Return the file name of an epoch's state or snapshot (epochs count from 1), or of the best weights up to it."""
    return f"epoch-{epoch:04d}{'-best' * best}.safetensors"


def epoch_files(folder: Path) -> dict[int, Path]:
    """Return the states or snapshots in a folder by epoch, in ascending order; {} if the folder does not exist."""
    names = ((re.fullmatch(r"epoch-(\d{4,})\.safetensors", p.name), p) for p in folder.glob("epoch-*"))
    return dict(sorted((int(name[1]), p) for name, p in names if name))


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy a file atomically; raise UserError."""
    write_atomically(target, partial(shutil.copyfile, source))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of this format or an earlier one; raise UserError if it is damaged or has another format."""
    try:
        header, tensors = read_tensors(path)
        metadata = json.loads(header["checkpoint"])
        if not isinstance(metadata, dict):
            raise ValueError("its header is not a mapping")
        version = metadata.pop("format", None)
        if version not in (1, 2, CHECKPOINT_FORMAT):
            raise UserError(f"{path} was written by another version of this program")
        if version == CHECKPOINT_FORMAT and header.get("checksum") != checksum(tensors, header["checkpoint"]):
            raise ValueError("its checksum differs")
        checkpoint = Checkpoint(tensors, metadata)
        return _from_format_1(checkpoint) if version == 1 and "optimizer" in metadata else checkpoint
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or not a checkpoint ({error})") from error


def read_newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest intact checkpoint (None if there is none), and the errors of newer, damaged ones.

    Raises UserError if the system cannot read a file: the run would otherwise start again and replace it.
    """
    problems: list[str] = []
    for path in reversed(step_files(folder)):
        try:
            return read_checkpoint(path), problems
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise
            problems.append(str(error))
    return None, problems


# -- nested values as named tensors and JSON


def pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a nested value that JSON can represent; put its tensors into `tensors`, with names that start with `name`.

    Raises UserError for anything but tensors, numbers, text, None, and lists, tuples and dicts of them.
    """
    if isinstance(value, Tensor):
        while name in tensors:  # names can collide: keys can contain dots, and 1 and "1" are two keys
            name += "'"
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int, float)) and key is not None:
                raise UserError(f"{name}: a checkpoint cannot store a key that is a {type(key).__name__}")
        return {"dict": [[k, pack(v, f"{name}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [pack(v, f"{name}.{n}", tensors) for n, v in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"{name}: a checkpoint cannot store a {type(value).__name__}; only tensors, numbers and text")


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `pack` was called with."""
    if isinstance(value, list):
        return [unpack(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(unpack(v, tensors) for v in value["tuple"])
    return {k: unpack(v, tensors) for k, v in value["dict"]}


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's unpacked `state_dict()` into it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def like(value: Any, parameter: Tensor) -> Any:
        # safetensors drops the memory format; fused kernels would then mix NCHW momentum and NHWC weights
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        return value

    state = {
        index: {key: like(value, parameters[index]) for key, value in values.items()}
        for index, values in saved["state"].items()
    }
    fresh = optimizer.state_dict()["param_groups"]
    groups = []
    for new, old in zip(fresh, saved["param_groups"], strict=True):
        # the choice of kernels depends on the device, which can differ from the device of the saved run
        kernels = {key: new[key] for key in ("fused", "foreach") if key in new}
        groups.append({**new, **old, "params": new["params"], **kernels})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _from_format_1(old: Checkpoint) -> Checkpoint:
    """Return a checkpoint of format 1 in the current format."""
    tensors, metadata = dict(old.tensors), dict(old.metadata)
    state: dict[int, dict[str, Any]] = {}
    for name in [n for n in tensors if n.startswith("optimizer.")]:
        _, index, key = name.split(".", 2)
        state.setdefault(int(index), {})[key] = tensors.pop(name)
    optimizer = metadata["optimizer"]
    for index, key, value in optimizer["numbers"]:
        state.setdefault(index, {})[key] = value
    # JSON turned tuples into lists, such as AdamW's betas
    groups = [{k: tuple(v) if isinstance(v, list) else v for k, v in group.items()} for group in optimizer["groups"]]
    metadata["optimizer"] = pack({"state": state, "param_groups": groups}, "optimizer", tensors)
    callbacks = {}
    if "average_count" in tensors:
        model = {n.removeprefix("average."): tensors.pop(n) for n in list(tensors) if n.startswith("average.")}
        callbacks["ema"] = {"model": model, "count": tensors.pop("average_count")}
    metadata["callbacks"] = pack(callbacks, "callbacks", tensors)
    metadata.pop("identity", None)  # format 1 computed it differently
    return Checkpoint(tensors, metadata)


def strip_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with names that start with `prefix.`, under names without it."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(prefix + ".")}
