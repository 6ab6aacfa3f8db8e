"""Stateless random numbers: every random number is a function of a key and an index.

Training advances no generator. So a checkpoint stores no random state, and the numbers do not change if a step is
skipped, or if the number of workers or the device changes. A key is made from integers such as (seed, purpose, epoch);
the n-th number under a key is a hash of (key, n). The mixing function is the 32-bit finaliser of MurmurHash3, computed
in int64 so that CPU and GPU agree.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

# Purposes keep streams apart: the order of epoch 3 and the flips of epoch 3 share no numbers.
SPLIT, ORDER, CROP_Y, CROP_X, FLIP, CUTOUT_Y, CUTOUT_X = range(7)
DROPOUT, SUBSET, SHAPES, CONTROL, TRANSFORM, DATASET, CLASS = range(7, 14)

_MASK = 0xFFFFFFFF


def _mix(x):
    """Scramble 32-bit values, given as Python ints or int64 tensors."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def make_key(*parts: int) -> int:
    """Fold integers into one 32-bit key; every part and its position matter."""
    key = 0x9E3779B9
    for part in parts:
        low, high = part & _MASK, (part >> 32) & _MASK
        key = _mix((key ^ _mix((low + 0x7F4A7C15) & _MASK)) + 0x165667B1 & _MASK)
        key = _mix((key ^ high) + 0x27D4EB2F & _MASK)
    return key


def random_bits(key: int | Tensor, index: Tensor) -> Tensor:
    """Return 32 random bits (int64, 0 … 2³²−1) for each entry of `index` (int64, below 2³²); `key` is below 2³²."""
    if index.is_cuda and not torch.compiler.is_compiling() and (kernel := _one_kernel(index.device)) is not None:
        return kernel(index, key)
    return _random_bits(key, index)


def _random_bits(key: int | Tensor, index: Tensor) -> Tensor:
    first = _mix((index + 0x2545F491) & _MASK ^ key)
    return _mix((first + (key * 0x9E3779B1 & _MASK)) & _MASK)


# `_random_bits` of one entry in CUDA: a single kernel replaces 22
SOURCE = """
template <typename T> T random_bits(T index, T key) {
  unsigned int x = (unsigned int)(index + 0x2545F491) ^ (unsigned int)key;
  x ^= x >> 16; x *= 0x85EBCA6Bu; x ^= x >> 13; x *= 0xC2B2AE35u; x ^= x >> 16;
  x += (unsigned int)key * 0x9E3779B1u;
  x ^= x >> 16; x *= 0x85EBCA6Bu; x ^= x >> 13; x *= 0xC2B2AE35u; x ^= x >> 16;
  return (T)x;
}
"""


@cache
def _one_kernel(device: torch.device) -> Callable[[Tensor, int | Tensor], Tensor] | None:
    """Return `random_bits` as a single GPU kernel; None if it does not compile or returns other numbers."""
    if not torch.cuda.is_available():
        return None
    try:
        with_tensor_key = torch.cuda.jiterator._create_jit_fn(SOURCE)
        with_number_key = torch.cuda.jiterator._create_jit_fn(SOURCE, key=0)

        def kernel(index: Tensor, key: int | Tensor) -> Tensor:
            return with_tensor_key(index, key) if isinstance(key, Tensor) else with_number_key(index, key=key)

        index, number = torch.arange(4096, device=device) * 1048573, 0xC0FFEE42
        expected = _random_bits(number, index)
        keys = (number, torch.tensor(number, device=device))
        return kernel if all(torch.equal(kernel(index, key), expected) for key in keys) else None
    except Exception:  # without NVRTC or with another PyTorch, use plain operations, which give the same numbers
        return None


def uniform(key: int | Tensor, index: Tensor) -> Tensor:
    """Return a number in [0, 1) for each entry of `index`, as float32 with 24 random bits."""
    return (random_bits(key, index) >> 8).to(torch.float32) * (1.0 / (1 << 24))


def randint(key: int | Tensor, index: Tensor, high: int) -> Tensor:
    """Return an integer in [0, high) for each entry of `index`; the bias is below high / 2³²."""
    return (random_bits(key, index) * high) >> 32


def permutation(key: int, n: int) -> Tensor:
    """Return a random order of 0 … n−1 (int64, CPU)."""
    index = torch.arange(n)
    # the index in the low bits breaks ties, so that the order does not depend on the sort's stability
    return ((random_bits(key, index) << 31) | index).argsort()


@contextlib.contextmanager
def seeded_generators(device: torch.device) -> Iterator[Callable[[int], None]]:
    """Yield a function that seeds the generators of user code, to be called within this block.

    It seeds the global generators of Python, NumPy and PyTorch (CPU and `device`), which are restored afterwards.
    """
    devices = [device] if device.type == "cuda" else []
    before = random.getstate(), np.random.get_state()

    def seed(key: int) -> None:
        random.seed(key)
        np.random.seed(key)
        torch.default_generator.manual_seed(key)
        if devices:
            torch.cuda.manual_seed(key)

    with torch.random.fork_rng(devices=devices):
        try:
            yield seed
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
