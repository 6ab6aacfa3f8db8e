"""The settings that `auto` resolves to; and that one run's switches do not affect the next run."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import compose, compose_checked
from zfnet.config.errors import UserError
from zfnet.training import device as device_module
from zfnet.training.device import resolve_runtime, set_switches
from zfnet.training.processes import World


def runtime(*words: str):
    return resolve_runtime(compose_checked(*words).trainer)


def test_exact_trainer_is_deterministic_fp32() -> None:
    exact = runtime("trainer=exact", "trainer.device=cpu")
    assert (exact.precision, exact.compile, exact.deterministic) == ("fp32", False, True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
    assert "deterministic" in exact.describe()


@pytest.mark.parametrize(("trainer", "loose"), [("exact", False), ("cpu", True)])
def test_the_older_names_of_tf32_can_be_read(trainer: str, loose: bool) -> None:
    """Lightning and torch.compile read these. Reading raises an error if only the newer names have been set."""
    runtime(f"trainer={trainer}", "trainer.device=cpu")
    assert torch.backends.cuda.matmul.allow_tf32 is loose
    assert torch.backends.cudnn.allow_tf32 is loose
    assert torch.get_float32_matmul_precision() == ("high" if loose else "highest")
    assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is loose


@pytest.mark.parametrize("rank", [0, 1])
def test_too_few_gpus_for_the_processes(monkeypatch, rank: int) -> None:
    """All processes must raise the error: a process that does not would wait for the others."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"trainer\.devices=2: PyTorch sees 1 CUDA devices"):
        resolve_runtime(compose("trainer.device=cuda", "trainer.devices=2").trainer, World(rank, 2, rank))


def test_a_run_that_is_not_deterministic_leaves_the_switch_alone(monkeypatch) -> None:
    """Calling `use_deterministic_algorithms` imports PyTorch's compiler, which takes a second."""
    calls: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    set_switches(False)
    assert calls == []
    set_switches(True)
    assert calls == [True]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    set_switches(False)
    assert calls == [True, False]


def test_a_later_run_is_not_touched_by_an_earlier_one() -> None:
    threads = torch.get_num_threads()
    runtime("trainer=exact", "trainer.device=cpu", "trainer.threads=3")
    assert torch.get_num_threads() == 3
    runtime("trainer=cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("vendor", "flags", "precision"),
    [
        ("GenuineIntel", {"avx512_bf16", "amx_bf16"}, "bf16"),
        ("GenuineIntel", {"avx512_bf16"}, "fp32"),
        ("AuthenticAMD", {"avx512_bf16"}, "bf16"),
        ("AuthenticAMD", {"avx2"}, "fp32"),
        ("", set(), "fp32"),
    ],
)
def test_bf16_on_the_cpu_only_where_it_pays(monkeypatch, vendor: str, flags: set[str], precision: str) -> None:
    metadata = {"vendor_id": vendor, "flags": " ".join(flags)}
    monkeypatch.setattr(device_module, "cpu_info", lambda: metadata)
    assert runtime("trainer=cpu").precision == precision
    assert runtime("trainer=cpu", "trainer.precision=fp32").precision == "fp32"


def test_autocast() -> None:
    with runtime("trainer=cpu", "trainer.precision=bf16").autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with runtime("trainer=cpu", "trainer.precision=fp32").autocast():
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_memory_format() -> None:
    assert runtime("trainer=cpu").memory_format == torch.channels_last
    off = runtime("trainer=cpu", "trainer.channels_last=false")
    assert off.memory_format == torch.contiguous_format
    assert "NCHW" in off.describe()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cuda:99", "CUDA devices on this machine"),
        ("cuda:x", "trainer.device=cuda:x: must be one of auto, cpu, cuda, cuda:N, mps"),
        ("cuda:01", "must be one of auto, cpu, cuda, cuda:N, mps"),
        (f"cuda:{10**30}", "must be one of auto, cpu, cuda, cuda:N, mps"),
        ("mps", "no Apple GPU"),
    ],
)
def test_a_device_that_is_not_there(name: str, expected: str) -> None:
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this is an Apple machine")
    with pytest.raises(UserError, match=expected):
        runtime(f"trainer.device={name}")
