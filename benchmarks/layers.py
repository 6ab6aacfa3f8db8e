"""Compare the FLOP rate of each layer's forward and backward pass with that of a large matrix product; time pooling.

    python benchmarks/layers.py data=shapes data.store_size=32 data.batch_size=32

It accepts overrides of `model`, `data` and `trainer`. The network, built for ten classes, must be a chain of layers.
Each layer is timed alone, convolutions in NHWC and NCHW: the best of five calls, without gradients of the images.
For ZFNet's own config, the last line compares whole forward and backward passes with pooling after and before ReLU.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from zfnet import compose
from zfnet.config.errors import UserError
from zfnet.config.schema import Config, ModelConfig
from zfnet.jobs.benchmark import matmul_peak
from zfnet.model.build import build_model
from zfnet.model.chain import WEIGHTED, Chain
from zfnet.model.zfnet import ZFNet
from zfnet.runs.hydra_record import register_resolvers
from zfnet.runs.tables import format_table
from zfnet.training.device import Runtime, resolve_runtime, time_call

CALLS = 5
ROUNDS = 16


class Pass(NamedTuple):
    """Floating-point operations and seconds of one batch."""

    operations: float
    seconds: float

    @property
    def cells(self) -> tuple[str, str]:
        return f"{self.operations / self.seconds / 1e9:.1f}", f"{1000 * self.seconds:.1f} ms"


def main() -> None:
    register_resolvers()
    try:
        config = compose(sys.argv[1:])
        runtime = resolve_runtime(config.trainer, own_network=isinstance(config.model, dict))
        layers = dict(time_layers(config, runtime))
    except UserError as error:
        sys.exit(f"error: {error}")
    rows: list[tuple[str, ...]] = [("", "forward", "", "backward", "")]
    rows += [(name, *there.cells, *back.cells) for name, (there, back) in layers.items()]
    peak = matmul_peak(runtime) / 1e9
    print(
        f"{runtime.device}, {runtime.precision}, {torch.get_num_threads()} threads, batches of {config.data.batch_size}"
    )
    print(f"GFLOP/s; a large matrix product {peak:.1f}\n")
    print("\n".join(format_table(rows, "<>>>>", 80, shrink=[0])))
    if isinstance(config.model, ModelConfig):
        low, middle, high = statistics.quantiles(time_orders(config, runtime))
        print(
            f"\npooling before ReLU: {middle:.3f} times as fast (quartiles of {ROUNDS} rounds: {low:.3f}, {high:.3f})"
        )


def time_orders(config: Config, runtime: Runtime) -> list[float]:
    """Return, for each round, the seconds of a forward and backward pass divided by those with pooling before ReLU."""
    size = config.data.image_size
    model = ZFNet(10, size, config.model).to(runtime.device).to(memory_format=runtime.memory_format)
    images = torch.randn(config.data.batch_size, 3, size, size, device=runtime.device)
    images = images.contiguous(memory_format=runtime.memory_format)

    def turn(steps: list[str]) -> float:
        model.steps = steps

        def call() -> None:
            with runtime.autocast():
                logits = model(images)
            logits.float().logsumexp(1).sum().backward()
            model.zero_grad(set_to_none=True)

        return time_call(call, runtime.device)

    orders = [model.steps, pool_before_relu(model.steps)]
    for steps in orders:
        turn(steps)  # warm-up
    ratios = []
    for number in range(ROUNDS):
        first = number % 2  # each order is first in every second round
        seconds = {n: turn(orders[n]) for n in (first, 1 - first)}
        ratios.append(seconds[0] / seconds[1])
    return ratios


def pool_before_relu(steps: Sequence[str]) -> list[str]:
    """Return ZFNet's steps with each pooling before its ReLU, which then has a quarter of the values to process.

    The outputs and the gradients are the same, bit for bit: ReLU keeps the order of a window's values, and blocks the
    gradient of a window without positive values in both orders.
    """
    order = list(steps)
    for number, name in enumerate(steps):
        if name.startswith("pool"):
            order[number - 1 : number + 1] = [name, steps[number - 1]]
    return order


def time_layers(config: Config, runtime: Runtime) -> Iterator[tuple[str, tuple[Pass, Pass]]]:
    """Yield each layer's name and its forward and backward pass. Raise UserError for a network that is not a chain."""
    model = build_model(config.model, 10, config.data.image_size, config.imports).to(runtime.device)
    # in networks other than ZFNet, PyTorch's NHWC convolutions can corrupt memory (see `resolve_runtime`)
    formats = {"NHWC": torch.channels_last} if runtime.channels_last else {}
    trained = False  # whether an earlier layer has parameters, so that training needs the gradient of the input
    for step in Chain.of(model, config.data.image_size).steps:
        module: Any = step.module
        if isinstance(module, WEIGHTED):
            images = torch.randn(config.data.batch_size, *step.input_shape, device=runtime.device)
            if images.ndim == 4:
                for name, memory_format in {**formats, "NCHW": torch.contiguous_format}.items():
                    module.to(memory_format=memory_format)
                    inputs = images.contiguous(memory_format=memory_format)
                    yield f"{step.name}, {name}", time_layer(module, inputs, runtime, trained)
            else:
                yield step.name, time_layer(module, images, runtime, trained)
        trained = trained or any(True for _ in module.parameters())


def time_layer(module: Any, images: torch.Tensor, runtime: Runtime, to_input: bool) -> tuple[Pass, Pass]:
    """Return the forward and the backward pass of a layer for a batch [N, …]."""
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
    times = [min(time_call(call, runtime.device) for _ in range(CALLS)) for call in (forward, backward)]
    return Pass(operations, times[0]), Pass(operations * (1 + to_input), times[1])


if __name__ == "__main__":
    main()
