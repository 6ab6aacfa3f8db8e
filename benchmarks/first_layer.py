"""Compare ways to compute ZFNet's first layer (convolution, ReLU, pooling): a forward and a backward pass, in turns.

    python benchmarks/first_layer.py data=shapes data.store_size=32 data.batch_size=128

It accepts overrides of `model`, `data` and `trainer`, except `trainer.compile`. The first layer has few arithmetic
operations and the largest maps. A CPU with matrix units (AMX) therefore spends a large share of a step on it. Each line
gives the median of the rounds and the largest difference of the pooled maps from those of the layer as built, relative
to their largest value.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet import compose
from zfnet.config.errors import UserError, one_line
from zfnet.config.schema import ModelConfig
from zfnet.model.zfnet import ZFNet
from zfnet.runs.hydra_record import register_resolvers
from zfnet.runs.tables import format_table
from zfnet.training.device import keep_memory, resolve_runtime, time_call

ROUNDS = 9
GROUP = 16  # images
COMPILED = "pooling first, compiled"
Call = Callable[[Tensor], Tensor]


def main() -> None:
    register_resolvers()
    try:
        config = compose(sys.argv[1:])
        if not isinstance(config.model, ModelConfig):
            raise UserError("model: this benchmark compares ways to compute ZFNet's first layer")
        runtime = resolve_runtime(config.trainer)
        model = ZFNet(10, config.data.image_size, config.model)
        calls = ways(model)
    except UserError as error:
        sys.exit(f"error: {error}")
    keep_memory(runtime.device.type == "cpu")
    model.to(runtime.device).to(memory_format=runtime.memory_format)
    shape = config.data.batch_size, 3, config.data.image_size, config.data.image_size
    images = torch.randn(shape, device=runtime.device).contiguous(memory_format=runtime.memory_format)
    with torch.no_grad(), runtime.autocast():
        expected = calls["as built"](images)
    gradient = torch.randn_like(expected)

    def turn(call: Call) -> tuple[float, float, float]:
        outputs: list[Tensor] = []
        with runtime.autocast():
            forward = time_call(lambda: outputs.append(call(images)), runtime.device)
        (output,) = outputs
        backward = time_call(lambda: output.backward(gradient), runtime.device)
        model.zero_grad(set_to_none=True)
        difference = (output.detach() - expected).abs().max() / expected.max()
        return forward, backward, float(difference)

    try:
        turn(calls[COMPILED])
    except Exception as error:  # such as no C++ compiler
        del calls[COMPILED]
        print(f"{COMPILED}: left out, because it fails here ({one_line(error)})")
    rows: list[tuple[str, ...]] = [("", "forward", "backward", "speedup", "difference")]
    turns: dict[str, list[tuple[float, float, float]]] = {name: [] for name in calls}
    for number in range(ROUNDS + 2):
        for name, call in calls.items():
            measured = turn(call)
            if number >= 2:  # the first two turns warm up
                turns[name].append(measured)
    totals = {name: [forward + backward for forward, backward, _ in values] for name, values in turns.items()}
    for name, values in turns.items():
        forward, backward = (1000 * statistics.median(value[k] for value in values) for k in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(totals["as built"], totals[name], strict=True))
        largest = max(value[2] for value in values)
        rows.append((name, f"{forward:.1f} ms", f"{backward:.1f} ms", f"{ratio:.2f}×", f"{largest:.1g}"))
    print(f"{runtime.describe()}, batches of {config.data.batch_size}, {ROUNDS} rounds\n")
    print("\n".join(format_table(rows, "<>>>>", 80, shrink=[0])))


def ways(model: ZFNet) -> dict[str, Call]:
    """Return functions of images [N, 3, S, S] that compute the pooled maps of conv1, by name.

    Raises UserError if the first layer is not a convolution with stride 2, ReLU and pooling.
    """
    if model.steps[:3] != ["conv1", "relu1", "pool1"] or model.config.conv1.stride != 2:
        raise UserError("model: conv1 must have stride 2, ReLU and pooling, and no normalisation before the pooling")
    conv, relu, pool = (model.get_submodule(name) for name in model.steps[:3])
    assert isinstance(conv, nn.Conv2d)
    compiled = torch.compile(lambda maps: relu(pool(maps)))
    return {
        "as built": lambda images: pool(relu(conv(images))),
        "ReLU in place": lambda images: pool(F.relu_(conv(images))),
        "pooling before ReLU": lambda images: relu(pool(conv(images))),
        f"pooling first, groups of {GROUP}": lambda images: torch.cat(
            [relu(pool(conv(group))) for group in images.split(GROUP)]
        ),
        "pooling first, deeper pixels": lambda images: relu(pool(deeper(conv, images))),
        COMPILED: lambda images: compiled(conv(images)),
    }


def deeper(conv: nn.Conv2d, images: Tensor) -> Tensor:
    """Compute a convolution with stride 2 as one with stride 1 over blocks of 2×2 pixels, which have 12 channels.

    images: [N, 3, S, S]. The kernel gets zeros, so that its side is even.
    """
    pad, side = int(conv.padding[0]), conv.kernel_size[0]
    odd = images.shape[-1] % 2
    end = pad + (odd if side % 2 else -odd)  # the last row is dropped if no window of an even kernel reaches it
    blocks = F.pixel_unshuffle(F.pad(images, (pad, end, pad, end)), 2)
    kernel = F.pixel_unshuffle(F.pad(conv.weight, (0, side % 2, 0, side % 2)), 2)
    return F.conv2d(blocks, kernel, conv.bias)


if __name__ == "__main__":
    main()
