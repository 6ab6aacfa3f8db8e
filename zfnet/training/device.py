"""Decide how a run uses the hardware: resolve every `auto` once, when the run starts."""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from zfnet.config.errors import UserError
from zfnet.config.schema import TrainerConfig
from zfnet.runs.provenance import cpu_info
from zfnet.training.processes import SINGLE_PROCESS, World

DEFAULT_THREADS = torch.get_num_threads()  # PyTorch's own choice, before any run changes it


@dataclass(frozen=True)
class Runtime:
    """The resolved settings of one run."""

    device: torch.device
    precision: str
    channels_last: bool
    compile: bool
    deterministic: bool

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the mixed-precision context; bf16 needs no loss scaling."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def choose_kernels(self, full: bool) -> None:
        """Let cuDNN benchmark its kernels for full batches only.

        A benchmark takes some tenths of a second for each new shape, too long for the short last batch.
        """
        torch.backends.cudnn.benchmark = full and not self.deterministic

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def describe(self) -> str:
        """Return one line for the log."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else str(self.device)
        parts = [name, self.precision, "NHWC" if self.channels_last else "NCHW"]
        parts += ["compiled"] * self.compile + ["deterministic"] * self.deterministic
        if self.device.type == "cpu":
            count = torch.get_num_threads()
            parts.append(f"{count} thread{'s' * (count > 1)}")
        return ", ".join(parts)


def resolve_runtime(trainer: TrainerConfig, world: World = SINGLE_PROCESS, own_network: bool = False) -> Runtime:
    """Resolve every `auto` and set the process-wide switches that the results need; raise UserError.

    own_network: whether the network is not ZFNet. On a CPU it then keeps the default memory format, because in PyTorch
        2.14 the backward pass of a 1×1 convolution with stride 2 on three channels corrupts memory in channels_last
    """
    device = _device(trainer.device)
    if world.size > 1 and device.type == "cuda":
        # all processes on this machine raise this error, not only those without a GPU
        count = torch.cuda.device_count()
        if max(world.local_rank + 1, trainer.devices) > count:
            raise UserError(f"trainer.devices={world.size}: PyTorch sees {count} CUDA devices on this machine")
        device = torch.device("cuda", world.local_rank)
    if device.type == "cuda":  # pinned memory and more use the current GPU, which is GPU 0 by default
        torch.cuda.set_device(device.index or 0)
    torch.set_num_threads(trainer.threads or threads_of_each(world.size))
    if trainer.compile is True or (trainer.compile == "auto" and device.type == "cuda"):
        torch.compiler.reset()  # otherwise later jobs of a sweep reach the recompilation limit and run eager
    precision = trainer.precision
    if precision == "auto":
        precision = "bf16" if _is_bf16_faster(device) else "fp32"
    channels_last = device.type == "cuda" or (device.type == "cpu" and not own_network)
    if isinstance(trainer.channels_last, bool):
        channels_last = trainer.channels_last
    set_switches(trainer.deterministic)
    if device.type == "cpu":
        keep_memory(True)
    return Runtime(device, precision, channels_last, trainer.compile is True, trainer.deterministic)


def threads_of_each(processes: int) -> int:
    """Return the number of CPU threads of each process on this machine, unless trainer.threads sets it."""
    return max(1, DEFAULT_THREADS // processes)


@contextlib.contextmanager
def recorded_threads(count: int | None, devices: int) -> Iterator[None]:
    """Use the recorded number of CPU threads within the block, because the last bits of sums depend on it.

    A launcher can have given the recorded run fewer threads than PyTorch's default. `trainer.threads` has precedence.
    """
    global DEFAULT_THREADS
    before = DEFAULT_THREADS, torch.get_num_threads()
    if count is not None:
        DEFAULT_THREADS = count * devices
    try:
        yield
    finally:
        DEFAULT_THREADS = before[0]
        torch.set_num_threads(before[1])


def _device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"trainer.device={name}: PyTorch sees {torch.cuda.device_count()} CUDA devices on this machine; "
            "try trainer.device=auto"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"trainer.device={name}: this machine has no Apple GPU; try trainer.device=auto")
    return device


def _is_bf16_faster(device: torch.device) -> bool:
    """Return whether the device trains faster in bf16 than in fp32.

    CPUs with matrix units (AMX) do (measured: 3.9 times as fast at 224 px). AMD's Zen 4 and later do, because their
    bf16 dot products have twice the rate of fp32 (1.9 times as fast). Intel's CPUs without AMX are slower in bf16
    (measured with AMX turned off: 0.3 times as fast with plain AVX-512, 0.7 times with its bf16 dot products).
    """
    if device.type != "cpu":
        return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    metadata = cpu_info()
    flags = metadata.get("flags", "").split()
    return "amx_bf16" in flags or (metadata.get("vendor_id") == "AuthenticAMD" and "avx512_bf16" in flags)


def keep_memory(keep: bool) -> None:
    """Let glibc keep freed memory for reuse, or restore its defaults.

    Each step allocates the same large blocks. By default glibc returns freed blocks to the system, which zeroes each
    page when it is allocated again. That takes a tenth of the CPU time of a step at 224 px.
    """
    if sys.platform != "linux":
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # the parameters' numbers in malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0 if keep else 65536)
        # glibc raises both thresholds to these defaults when large blocks are freed
        libc.mallopt(mmap_threshold, 32 << 20)
        libc.mallopt(trim_threshold, -1 if keep else 64 << 20)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that one call takes, including its work on the device."""
    synchronize(device)
    started = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - started


def set_switches(deterministic: bool) -> None:
    """Set PyTorch's global switches. Every run sets all of them, so that no job of a sweep affects the next."""
    # PyTorch reads it when it creates the first cuBLAS handle; it is harmless if it is not needed
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if deterministic or torch.are_deterministic_algorithms_enabled():  # it imports PyTorch's compiler, which takes 1 s
        torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    # deterministic runs use IEEE fp32, others TF32 for what autocast leaves in fp32; the older names set the newer ones
    # too, but after the newer ones are set, reading an older one (as Lightning and parts of torch.compile and
    # torch.export do) raises an error
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
