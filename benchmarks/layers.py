"""The rate of each layer's forward and backward pass, in both memory formats, beside a large matrix product.

    python benchmarks/layers.py data=shapes data.store_size=32 data.batch_size=32

takes a network's words as `run.py` does (of those that are a chain of layers), and times each layer alone: the best of
five calls. As in training, no gradient with respect to the images is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from zfnet import compose
from zfnet.jobs.benchmark import matmul_peak
from zfnet.model.build import build_model
from zfnet.model.chain import WEIGHTED, Chain, Step
from zfnet.runs.hydra_record import register_resolvers
from zfnet.runs.tables import format_table
from zfnet.training.device import Runtime, resolve_runtime, timed

CALLS = 5


def main() -> None:
    register_resolvers()
    config = compose(sys.argv[1:])
    runtime = resolve_runtime(config.trainer)
    model = build_model(config.model, 10, config.data.image_size).to(runtime.device)
    layers = [step for step in Chain.of(model, config.data.image_size).steps if isinstance(step.module, WEIGHTED)]
    peak = matmul_peak(runtime) / 1e12
    rows: list[tuple[str, ...]] = [("", "forward", "", "backward", "")]
    for name, memory_format in (("NHWC", torch.channels_last), ("NCHW", torch.contiguous_format)):
        flops = seconds = 0.0
        for number, layer in enumerate(layers):
            parts = time_layer(layer, config.data.batch_size, memory_format, runtime, number > 0)
            rows.append(
                (f"{layer.name}, {name}", *(w for n, s in parts for w in (f"{n / s / 1e12:.3f}", f"{s * 1e3:.1f} ms")))
            )
            flops, seconds = flops + sum(n for n, _ in parts), seconds + sum(s for _, s in parts)
        rows.append((f"together, {name}", f"{flops / seconds / 1e12:.3f}", f"{seconds * 1e3:.1f} ms", "", ""))
    print(f"{runtime.describe()}, batches of {config.data.batch_size}; TFLOP/s, a large matrix product {peak:.3f}\n")
    print("\n".join(format_table(rows, "<>>>>", 80)))


def time_layer(
    layer: Step, batch: int, memory_format: torch.memory_format, runtime: Runtime, to_input: bool
) -> list[tuple[float, float]]:
    """Return (floating-point operations, seconds) of the forward and of the backward pass of a batch."""
    images = torch.randn(batch, *layer.input_shape, device=runtime.device)
    if images.ndim == 4:
        images = images.contiguous(memory_format=memory_format)
    module: Any = layer.module
    module.to(memory_format=memory_format)
    images.requires_grad_(to_input)

    def forward() -> torch.Tensor:
        with runtime.autocast():
            output: torch.Tensor = module(images)
        return output

    output = forward()
    gradient = torch.randn_like(output)

    def backward() -> None:
        images.grad = None
        module.zero_grad()
        output.backward(gradient, retain_graph=True)

    operations = 2.0 * output.numel() * module.weight[0].numel()
    return [(operations, best_of(forward, runtime)), (operations * (1 + to_input), best_of(backward, runtime))]


def best_of(call: Callable[[], object], runtime: Runtime) -> float:
    return min(timed(call, runtime.device) for _ in range(CALLS))


if __name__ == "__main__":
    main()
