"""What the hardware can do, measured, and what the network asks of it, counted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from zfnet.model.zfnet import ZFNet
from zfnet.training.device import Runtime, timed


@dataclass(frozen=True)
class Peaks:
    """Best rates seen on this device, by timing the plainest operations."""

    matmul_tflops: float  # multiply-adds count as two
    copy_gb_per_second: float  # bytes read plus bytes written


def measure_peaks(runtime: Runtime) -> Peaks:
    """Time a large matrix product in the plan's precision, and a large copy; the best of ten counts."""
    on_cpu = runtime.device.type == "cpu"
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    n = 2048 if on_cpu else 8192
    a, b = (torch.randn(n, n, device=runtime.device).to(dtype) for _ in range(2))
    product = min(timed(lambda: a @ b, runtime.device) for _ in range(10))
    source = torch.ones(2**26 if on_cpu else 2**29, device=runtime.device)  # 256 MiB or 2 GiB
    target = torch.empty_like(source)
    copy = min(timed(lambda: target.copy_(source), runtime.device) for _ in range(10))
    return Peaks(2 * n**3 / product / 1e12, 2 * source.nbytes / copy / 1e9)


def training_flops(model: ZFNet) -> int:
    """Return the floating-point operations of one image's forward and backward pass, counted by PyTorch.

    The first layer's gradient with respect to the image is not computed and not counted.
    """
    twin = _on_meta(model)
    images = torch.empty(1, 3, model.image_size, model.image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        twin(images).sum().backward()
    total: int = counter.get_total_flops()
    return total


def _on_meta(model: ZFNet) -> ZFNet:
    with torch.device("meta"):
        return ZFNet(model.num_classes, model.image_size, model.config)


def roofline_seconds(model: ZFNet, batch_size: int, runtime: Runtime, peaks: Peaks) -> float:
    """Return the least time of one training step if each layer ran at its own roofline.

    A layer's forward pass takes the larger of (operations / matmul peak) and (bytes / copy rate), its bytes
    being input, output and weights once; the backward pass computes two such products (conv1: one). ReLU,
    pooling and the loss are taken as free. The optimizer moves 7 fp32 numbers a parameter (AdamW).
    """
    element = 2 if runtime.precision == "bf16" else 4
    flops_rate, bytes_rate = peaks.matmul_tflops * 1e12, peaks.copy_gb_per_second * 1e9
    total = 0.0
    for name, layer, x, y in _layers(model):
        weights = layer.weight.numel()
        products = y.numel() // y.shape[1] * weights  # multiply-adds per image
        moved = (x.numel() + y.numel()) * batch_size + weights
        once = max(2 * products * batch_size / flops_rate, moved * element / bytes_rate)
        total += once * (2 if name == "conv1" else 3)
    parameters = sum(p.numel() for p in model.parameters())
    return total + parameters * 7 * 4 / bytes_rate


def _layers(model: ZFNet) -> list[tuple[str, nn.Conv2d | nn.Linear, Tensor, Tensor]]:
    """Return (name, module, input, output) of each layer with weights, for one image, as empty tensors."""
    twin, found = _on_meta(model), []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append((names[module], module, inputs[0], output))

    names: dict[nn.Module, str] = {
        m: n for n, m in twin.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))
    }
    for module in names:
        module.register_forward_hook(note)
    twin(torch.empty(1, 3, model.image_size, model.image_size, device="meta"))
    return found  # type: ignore[return-value]
