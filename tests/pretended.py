"""A simulated GPU, which reveals operations that mix devices on machines without a GPU.

Within `simulated_gpu()` the device `cuda` exists. Its tensors, `OnGpu`, report this device, compute on the CPU, and
raise an error where CUDA does: operations on tensors of both devices, a CPU tensor indexed by a GPU tensor, and
`numpy()`. `simulated_gpu` yields a list of operations that would make the host wait for the device.

CUDA's arithmetic, streams and memory are not simulated. Calls inside PyTorch's C++ functions are not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
READING = (aten._local_scalar_dense, aten.equal, aten.nonzero, aten._unique2)  # the host reads their results
_waits: list[str] = []


class MixedDevices(RuntimeError):
    """An operation mixes tensors of both devices where CUDA would raise an error."""


class OnGpu(Tensor):
    """A tensor that reports a GPU as its device. `inner`, a CPU tensor of the same shape, contains its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda _: torch.device("cuda", 0))  # type: ignore[assignment]
    is_cuda = property(lambda _: True)  # type: ignore[assignment]
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        self = Tensor._make_wrapper_subclass(cls, inner.shape, **layout)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, given = kwargs or {}, {}
        _refuse_mixed(func, args, kwargs)
        if func.overloadpacket in READING:
            _waits.append(str(func))

        def unpack(x: OnGpu) -> Tensor:
            given[id(x.inner)] = x
            return x.inner

        out = func(*tree_map_only(OnGpu, unpack, args), **tree_map_only(OnGpu, unpack, kwargs))
        if func is aten.copy_.default and not isinstance(args[0], OnGpu):
            _waits.append("a copy to the CPU")
            return args[0]
        # in-place operations return the tensor that they were given
        return tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else OnGpu(t), out)


def _refuse_mixed(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Raise MixedDevices where CUDA would raise an error."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    cpu_tensors = [x for x in tensors if not isinstance(x, OnGpu)]
    if not cpu_tensors or func.overloadpacket in (aten.copy_, aten.fill_):
        return
    target_on_gpu = isinstance(args[0], OnGpu)
    if func.overloadpacket in INDEXING and target_on_gpu:
        indices = {id(i) for i in args[1]}  # CUDA accepts indices on the CPU, but copying them waits
        if any(id(x) in indices for x in cpu_tensors):
            _waits.append(f"{func} by an index on the CPU")
        cpu_tensors = [x for x in cpu_tensors if id(x) not in indices and x.ndim]
    elif torch.Tag.pointwise in func.tags and (target_on_gpu or not func._schema.is_mutable):
        cpu_tensors = [x for x in cpu_tensors if x.ndim]  # CUDA accepts a scalar on the CPU: it is passed by value
    if cpu_tensors:
        raise MixedDevices(f"{func}: {', '.join(f'{list(x.shape)} on {x.device}' for x in tensors)}")


class _Gpu(TorchFunctionMode):
    """Makes Python calls create tensors on the simulated device and move tensors to and from it."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, first = dict(kwargs or {}), args[0] if args else None
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return _move(func, *args, **kwargs)
        if func is Tensor.pin_memory:
            return first.clone()
        if isinstance(first, OnGpu):
            if func is Tensor.numpy:
                raise MixedDevices("can't convert a CUDA tensor to numpy")
            if func is Tensor.tolist:
                _waits.append("tolist")
                return first.inner.tolist()
            if func is F.one_hot:  # creates CPU tensors in C++
                return OnGpu(func(first.inner, *args[1:], **kwargs))
        if _is_cuda(kwargs.get("device")):
            if func in (torch.tensor, torch.as_tensor):
                _waits.append(f"torch.tensor({first}, device=…)")
            made = func(*args, **{**kwargs, "device": "cpu"})
            return made if isinstance(made, OnGpu) else OnGpu(made)
        return func(*args, **kwargs)


def _is_cuda(device: Any) -> bool:
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _move(func: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Replace Tensor.to, Tensor.cpu and Tensor.cuda."""
    rest, there = list(args), isinstance(x, OnGpu)
    device = kwargs.pop("device", None)
    if func is not Tensor.to:
        device = "cpu" if func is Tensor.cpu else "cuda"
    elif rest and isinstance(rest[0], Tensor):
        device, rest[0] = rest[0].device, rest[0].dtype
    elif rest and (rest[0] is None or isinstance(rest[0], (str, torch.device))):
        device = rest.pop(0)
    blocking = not kwargs.pop("non_blocking", any(value is True for value in rest))
    rest = [value for value in rest if value is not None and not isinstance(value, bool)]
    if device is None or _is_cuda(device) == there:
        return Tensor.to(x, *rest, **kwargs) if rest or kwargs else x
    if blocking:
        _waits.append(f"a move to {device}")
    return _Move.apply(x, rest, kwargs)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rest, kwargs):
        source = x.inner if isinstance(x, OnGpu) else x
        moved = source.detach().to(*rest, **{**kwargs, "copy": True})
        return moved if isinstance(x, OnGpu) else OnGpu(moved)

    @staticmethod
    def backward(ctx, grad):
        return (grad.inner.clone() if isinstance(grad, OnGpu) else OnGpu(grad)), None, None


class _Threads(ThreadPoolExecutor):
    """A pool whose threads see the simulated device too."""

    def submit(self, call: Callable, /, *args: Any, **kwargs: Any) -> Future:
        def work() -> Any:
            with _Gpu():
                return call(*args, **kwargs)

        return super().submit(work)


@contextmanager
def simulated_gpu() -> Iterator[list[str]]:
    """Simulate one GPU of 80 GiB within this block. Yield a growing list of operations that would wait for it."""
    stream = SimpleNamespace(record_event=lambda: SimpleNamespace(synchronize=lambda: None))
    metadata = SimpleNamespace(name="pretended", total_memory=80 << 30, major=9, minor=0)
    with pytest.MonkeyPatch.context() as patch, _Gpu():
        for name, value in {
            "device_count": 1,
            "is_available": False,  # so that PyTorch's own code does not use CUDA
            "get_device_name": "pretended",
            "get_device_properties": metadata,
            "mem_get_info": (80 << 30, 80 << 30),
            "is_bf16_supported": True,
            "current_stream": stream,
            "set_device": None,
            "synchronize": None,
        }.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
        patch.setattr("zfnet.data.batches.ThreadPoolExecutor", _Threads)
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data` cannot change its tensor type
        _waits.clear()
        try:
            yield _waits
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
