"""What `auto` becomes, and that one run's switches do not reach the next."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import checked
from zfnet.errors import UserError
from zfnet.training import device as device_module
from zfnet.training.device import choose


def plan(*words: str):
    return choose(checked(*words).trainer)


def test_exact_is_exact() -> None:
    exact = plan("trainer=exact", "trainer.device=cpu")
    assert (exact.precision, exact.compile, exact.deterministic) == ("fp32", False, True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert "deterministic" in exact.describe()


def test_a_later_run_is_not_touched_by_an_earlier_one() -> None:
    threads = torch.get_num_threads()
    plan("trainer=exact", "trainer.device=cpu", "trainer.threads=3")
    assert torch.get_num_threads() == 3
    plan("trainer=cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("flags", "precision"), [({"amx_bf16"}, "bf16"), ({"avx2"}, "fp32")])
def test_bf16_on_the_cpu_only_where_it_pays(monkeypatch, flags: set[str], precision: str) -> None:
    monkeypatch.setattr(device_module, "_cpu_flags", lambda: flags)
    assert plan("trainer=cpu").precision == precision
    assert plan("trainer=cpu", "trainer.precision=fp32").precision == "fp32"


def test_autocast() -> None:
    with plan("trainer=cpu", "trainer.precision=bf16").autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with plan("trainer=cpu", "trainer.precision=fp32").autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_memory_format() -> None:
    assert plan("trainer=cpu").memory_format == torch.channels_last
    off = plan("trainer=cpu", "trainer.channels_last=false")
    assert off.memory_format == torch.contiguous_format
    assert "NCHW" in off.describe()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("cuda:99", "CUDA devices to PyTorch"), ("cuda:x", "is not a device name"), ("mps", "no Apple GPU")],
)
def test_a_device_that_is_not_there(name: str, expected: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this is an Apple machine")
    with pytest.raises(UserError, match=expected):
        plan(f"trainer.device={name}")
