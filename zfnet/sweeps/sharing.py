"""Several jobs on one machine: each of a launcher's processes takes one GPU, in turn.

CPU threads need no care here: joblib's workers start with the cores divided among them.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from filelock import FileLock, Timeout

_slot: FileLock | None = None  # held as long as this process lives


def share_machine(parallel: int, folder: Path) -> None:
    """Show this process one of the GPUs, if it is one of `parallel` that run side by side; -1 means one a core.

    Must come before the process first uses CUDA, which looks at CUDA_VISIBLE_DEVICES once. The processes agree
    by locks in `folder`, which the system lets go of when a process ends. A process keeps its GPU for all its jobs.
    """
    global _slot
    if parallel in (0, 1) or _slot is not None:
        return
    devices = visible_devices()
    if len(devices) < 2:
        return
    _slot, number = take_slot(folder / ".slots")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]


def visible_devices() -> list[str]:
    """Return the GPUs of this process, as CUDA_VISIBLE_DEVICES writes them. Does not start CUDA."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


def take_slot(folder: Path) -> tuple[FileLock, int]:
    """Return the first number that no living process holds, and the lock that holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        lock = FileLock(folder / str(number))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            number += 1
        else:
            return lock, number
