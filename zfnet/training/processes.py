"""Train one network with several processes: their ranks, their collectives, and how they start.

One Hydra job has one run directory, and only process 0 writes to it. `trainer.devices=N` starts N − 1 more processes
on this machine; `torchrun` starts all processes, on any number of machines that share the folders of the run and of
the data. All processes have the same state after every step, so the checkpoint of process 0 is enough.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from tqdm.auto import tqdm

from zfnet.config.errors import UserError
from zfnet.runs.directory import RunDirectory
from zfnet.runs.session import STOP_SIGNALS

PATIENCE_S = 20  # seconds for the other processes to notice a dead process themselves


@dataclass(frozen=True)
class World:
    """This process's rank among `size` processes; `local_rank` is its rank on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def all_reduce(self, value: Tensor) -> Tensor:
        """Sum `value` over all processes in place, and return it; on a GPU the host does not wait for the sum."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process. All processes must call it."""
        if self.size == 1:
            return flag
        result = torch.tensor([float(flag)])
        dist.all_reduce(result, dist.ReduceOp.MAX)
        return bool(result.item())

    def broadcast(self, value: Any) -> Any:
        """Return process 0's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def wrap(self, model: nn.Module, device: torch.device, gradients: str) -> nn.Module:
        """Return the module to call in training: it averages gradients over all processes."""
        if self.size == 1:
            return model
        # each process has its own dropout offset in its buffers, so they must not be broadcast
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # older releases lack broadcast_buffers' new name
            wrapped = nn.parallel.DistributedDataParallel(
                model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,
                gradient_as_bucket_view=True,
            )
        if gradients == "bf16":
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped


SINGLE_PROCESS = World()


def torchrun_world() -> World | None:
    """Return the world of this process if torchrun started it, otherwise None."""
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        return None
    return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def init_process_group(world: World, init_method: str = "env://") -> None:
    """Join the other processes; GPUs communicate by NCCL, everything else by gloo."""
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend,
        init_method=init_method,
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(minutes=30),  # the others wait while one process decodes the data set
    )


@contextlib.contextmanager
def processes(count: int, work: Callable[[World, Path], None], folder: Path) -> Iterator[World]:
    """Start `count − 1` processes that call `work(world, folder)`, and run this block as process 0.

    If one dies, the block raises a UserError; if process 0 is blocked, a thread prints the error and ends process 0.
    """
    if (world := torchrun_world()) is not None:
        init_process_group(world)
        world.broadcast(str(folder))  # `run_worker` receives it
        try:
            yield world
        finally:
            dist.destroy_process_group()
        return
    if count == 1:
        yield SINGLE_PROCESS
        return
    if not torch.cuda.is_available() and count > (os.cpu_count() or 1):
        raise UserError(f"trainer.devices={count}: this machine has {os.cpu_count()} CPU cores and no CUDA device")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="zfnet-") as place:
        init_method = f"file://{place}/meet"
        children: list[BaseProcess] = [
            context.Process(target=_child, args=(World(rank, count, rank), init_method, work, folder), daemon=True)
            for rank in range(1, count)
        ]
        for child in children:
            child.start()
        watch = _Watchdog(children, folder)
        try:
            init_process_group(World(0, count), init_method)
            yield World(0, count)
            for child in children:
                child.join()
        except RuntimeError as error:  # a collective raises it when a peer has died
            if death := watch.death(wait=5):
                raise UserError(death) from error
            raise
        finally:
            watch.done.set()
            for child in children:
                child.kill()  # it ignores SIGTERM
            if dist.is_initialized():
                dist.destroy_process_group()


def run_worker(world: World, work: Callable[[World, Path], None]) -> None:
    """Run `work` in a process of torchrun with rank > 0, with the folder that process 0 broadcasts."""
    init_process_group(world)
    try:
        work(world, Path(world.broadcast(None)))
    finally:
        dist.destroy_process_group()


def _child(
    world: World, init_method: str, work: Callable[[World, Path], None], folder: Path
) -> None:  # pragma: no cover (runs in a separate process)
    # a signal can reach the whole process group, but process 0 decides when to stop
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # tqdm's default semaphore would outlive a killed process
    try:
        init_process_group(world, init_method)
        work(world, folder)
        dist.destroy_process_group()
    except KeyboardInterrupt:  # all processes stop after the same step, and process 0 saves
        os._exit(0)
    except UserError:
        os._exit(3)  # process 0 raises and reports the same error
    except RuntimeError:
        os._exit(4)


class _Watchdog:
    """Watches the other processes from a thread, because process 0 can be inside a call that never returns."""

    def __init__(self, children: list[BaseProcess], folder: Path) -> None:
        self.children, self.folder, self.done = children, folder, threading.Event()
        threading.Thread(target=self._watch_children, daemon=True).start()

    def death(self, wait: float = 0) -> str | None:
        """Return a message about how the first dead process ended; None if all are alive or succeeded."""
        for child in self.children:
            child.join(wait)
            if child.exitcode not in (None, 0):
                code = int(child.exitcode)
                how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
                which = f"training process {self.children.index(child) + 2} of {len(self.children) + 1}"
                return (
                    f"{which} {how}: continue from the last checkpoint with job=resume run={self.folder} "
                    "(trainer.devices may differ)"
                )
        return None

    def _watch_children(self) -> None:
        while not self.done.wait(0.5):
            if (death := self.death()) and not self.done.wait(PATIENCE_S):
                RunDirectory(self.folder).set_status("failed", death)
                print(f"error: {death}", flush=True)
                os._exit(1)
