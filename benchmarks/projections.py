"""Compare the speed of Deconvnet.project with three other ways to compute the same deconvnet projections:

    captum     captum's NeuronDeconvolution, one unit per call, as its interface suggests
    repeated   the same, but with copies of the image for many units in one call
    autograd   torch.autograd.grad(…, is_grads_batched=True) for many units at once, with the deconvnet's rule for ReLUs

    pip install -e '.[explain]'
    python benchmarks/projections.py data=shapes data.store_size=32 --maps 16 --rounds 3

The network is freshly initialised. All ways project the strongest unit of each of `--maps` feature maps per layer in
each of `--count` images, in turns. The table shows the time per projection, the speedup over the fastest other way, and
the largest difference from any other way; projections.json is written to outputs/benchmarks/projections.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from zfnet import compose
from zfnet.config.errors import UserError
from zfnet.data import load_splits, preprocess
from zfnet.explain import Deconvnet
from zfnet.model.chain import Chain
from zfnet.runs.directory import write_atomically
from zfnet.runs.hydra_record import register_resolvers
from zfnet.runs.provenance import describe_environment
from zfnet.runs.tables import format_table
from zfnet.training.build import initial_model
from zfnet.training.device import resolve_runtime, time_call

# relative to the largest pixel: above the rounding errors of equal computations, below the effect of another switch
TOLERANCE = 1e-5
RIVALS = ("captum", "repeated", "autograd")
TOP = 9  # projections of each map in the paper's Figure 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=8, help="feature maps per layer, evenly spaced (0: all)")
    parser.add_argument("--count", type=int, default=9, help="number of images")
    parser.add_argument("--chunk", type=int, default=32, help="units per call, for ways that batch units")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; the table shows medians")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/projections"))
    parser.add_argument("overrides", nargs="*", help="config overrides, such as data.image_size=64")
    options = parser.parse_intermixed_args()
    register_resolvers()
    config = compose(options.overrides)
    runtime = resolve_runtime(config.trainer, own_network=isinstance(config.model, dict))
    images = load_splits(config.data, config.imports).train
    model = initial_model(config, len(images.classes))[0].to(runtime.device).eval()
    pixels = images.pixels(range(min(options.count, len(images))))
    inputs = preprocess(pixels.to(runtime.device), config.data, channels_last=False)
    rows = time_projections(model, inputs, options.maps or None, options.rounds, options.chunk)
    result = {
        "layers": rows,
        "all_maps_top_9": extrapolate(rows),
        "chunk": options.chunk,
        "rounds": options.rounds,
        "config": config.to_dict(),
        "environment": describe_environment(runtime.device, config.trainer.name, []),
    }
    print_result(result)
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(options.output / "projections.json", json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


@torch.no_grad()
def time_projections(
    model: Any, images: Tensor, maps: int | None, rounds: int, chunk: int = 32
) -> list[dict[str, Any]]:
    """Time all methods on the same units, in turns. Return one row per layer, with median seconds per projection.

    images: [N, 3, S, S], normalised, on the model's device; maps: per layer, or None for all; chunk: units that a
    rival projects at once
    Our method seeds each unit with its activation. The rivals use the seed 1; their results are then scaled by it.

    Raises UserError if no map of a layer is active, or if captum is not installed.
    """
    try:
        from captum.attr import NeuronDeconvolution
    except ImportError as error:
        raise UserError("this comparison needs captum: pip install -e '.[explain]'") from error
    # the rivals propagate through contrast normalisation too
    deconvnet, rows = Deconvnet(model, lrn="gradient", image_size=images.shape[-1]), []
    chain = deconvnet.chain
    for layer in tqdm(chain.conv_layers, "projections", unit="layer", disable=None, leave=False):
        units = strongest_units(chain, images, layer, maps)
        if not units:
            raise UserError(f"{maps} maps of {layer}: none is active in the {len(images)} images; use more images")
        index = torch.tensor(units, device=images.device).unbind(1)
        seeds = chain.activations(images, [layer])[layer][index]
        captum = NeuronDeconvolution(chain.model, chain.up_to(layer)[-1].module)
        calls = {
            "zfnet": partial(deconvnet.project, images, layer, units, seeds=seeds),
            "captum": partial(project_one_by_one, captum, images, units),
            "repeated": partial(project_repeated, captum, images, units, chunk),
            "autograd": partial(project_by_autograd, chain, images, layer, units, chunk),
        }
        seconds, projections = _take_turns(calls, rounds, images.device)
        medians = {name: statistics.median(s) for name, s in seconds.items()}
        best = min(RIVALS, key=medians.__getitem__)
        ratios = {
            name: statistics.median(theirs / ours for ours, theirs in zip(seconds["zfnet"], seconds[name], strict=True))
            for name in RIVALS
        }
        compared = [compare(projections["zfnet"], projections[r] * seeds[:, None, None, None]) for r in RIVALS]
        rows.append(
            {
                "layer": layer,
                "maps": chain.up_to(layer)[-1].output_shape[0],
                "units": len(units),
                **{f"{name}_seconds": median / len(units) for name, median in medians.items()},
                "ratio": ratios["captum"],
                "best": best,
                "ratio_to_best": ratios[best],
                **{key: max(each[key] for each in compared) for key in compared[0]},
            }
        )
    return rows


def strongest_units(chain: Chain, images: Tensor, layer: str, maps: int | None) -> list[tuple[int, int, int, int]]:
    """Return units (image, channel, y, x): the strongest position of each map in each image, if it is active.

    maps: number of maps, evenly spaced; None: all
    """
    activations = chain.activations(images, [layer])[layer].cpu()
    count, width = activations.shape[1], activations.shape[3]
    channels = torch.linspace(0, count - 1, min(maps or count, count)).round().long().unique()
    values, places = activations[:, channels].flatten(2).max(dim=2)
    return [
        (image, int(channels[k]), *divmod(int(places[image, k]), width)) for image, k in (values > 0).nonzero().tolist()
    ]


def project_one_by_one(captum: Any, images: Tensor, units: Sequence[Sequence[int]]) -> Tensor:
    """Project each unit in a separate call, as captum's interface suggests. Return [units, 3, S, S]."""
    projections = []
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        for image, channel, y, x in units:
            inputs = images[image : image + 1].clone().requires_grad_()
            projections.append(captum.attribute(inputs, (channel, y, x)).detach())
    return torch.cat(projections)


def project_repeated(captum: Any, images: Tensor, units: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """Project `chunk` units per call. Each has its own copy of its image, and a position in that copy's output."""
    projections = []
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        for image, channel, y, x in (part.unbind(1) for part in torch.tensor(units).split(chunk)):
            inputs, each = images[image].clone().requires_grad_(), torch.arange(len(image))
            select = partial(_at, places=(each, channel, y, x))
            projections.append(captum.attribute(inputs, select).detach())
    return torch.cat(projections)


def _at(output: Tensor, places: tuple[Tensor, ...]) -> Tensor:
    return output[places]


class _DeconvReLU(torch.autograd.Function):
    """A ReLU whose backward pass keeps only positive gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(min=0)


def project_by_autograd(chain: Chain, images: Tensor, layer: str, units: Sequence[Sequence[int]], chunk: int) -> Tensor:
    """Project `chunk` units of an image at once by batched gradients, with one forward pass per image."""
    wanted = torch.tensor(units)
    projections = images.new_zeros(len(units), *images.shape[1:])
    for number in wanted[:, 0].unique().tolist():
        with torch.enable_grad():
            x = inputs = images[number : number + 1].clone().requires_grad_()
            for step in chain.up_to(layer):
                x = _DeconvReLU.apply(x) if isinstance(step.module, nn.ReLU) else step(x)
        for rows in (wanted[:, 0] == number).nonzero().flatten().split(chunk):
            seeds = x.new_zeros(len(rows), *x.shape)
            channel, row, column = wanted[rows, 1:].unbind(1)
            seeds[torch.arange(len(rows)), 0, channel, row, column] = 1
            (grads,) = torch.autograd.grad(x, inputs, seeds, retain_graph=True, is_grads_batched=True)
            projections[rows] = grads[:, 0]
    return projections


def _take_turns(
    calls: Mapping[str, Callable[[], Tensor]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Run the calls in turns. Return each one's seconds per round, and its last result."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    results: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(time_call(lambda n=name, c=call: results.update({n: c()}), device))  # type: ignore[misc]
    return seconds, results


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Return the largest `difference` of projections [units, 3, S, S], relative to the largest pixel of `theirs`, and
    `units_apart`, the number of units that differ by more than TOLERANCE.

    Both compute the same function: in float64 they agree to 1e-14, in float32 to 1.5e-6 if their pooling switches are
    equal. Our forward pass uses channels last and captum's uses the model's memory format, so convolutions sum in a
    different order. If the two largest values of a pooling window differ by no more than this rounding, the switch
    can move, and patches of the projection move too. On 9 images of shapes and a fresh network, it moves in 1 of
    1,699,812 live windows (largest values 2e-6 apart, relatively), which changes 14 of 10,993 units. Both are correct.
    """
    each = (ours - theirs).abs_().amax(dim=(1, 2, 3)) / theirs.abs().max()
    return {"difference": float(each.max()), "units_apart": int((each > TOLERANCE).sum())}


def extrapolate(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Estimate the seconds of TOP projections of every map from each layer's seconds for one. Return sums and ratios.

    `ratio_to_best` uses each layer's fastest rival.
    """
    seconds = {n: sum(row["maps"] * TOP * row[f"{n}_seconds"] for row in rows) for n in ("zfnet", *RIVALS)}
    best = sum(row["maps"] * TOP * row[f"{row['best']}_seconds"] for row in rows)
    return {
        "projections": TOP * sum(row["maps"] for row in rows),
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "ratio": seconds["captum"] / seconds["zfnet"],
        "ratio_to_best": best / seconds["zfnet"],
    }


def print_result(result: dict[str, Any]) -> None:
    """Print a table of the layers, and the estimated time for all maps."""
    lines = [("layer", "units", "zfnet", *RIVALS, "best", "difference", "apart")]
    for row in result["layers"]:
        times = (f"{1000 * row[f'{name}_seconds']:.2f}" for name in ("zfnet", *RIVALS))
        differences = f"{row['difference']:.1e}", str(row["units_apart"])
        lines.append((row["layer"], str(row["units"]), *times, f"{row['ratio_to_best']:.1f}×", *differences))
    print("\n".join(format_table(lines, "<>>>>>>>>")))
    total = result["all_maps_top_9"]
    print(
        f"\ntimes: ms per projection; best: the fastest other way, relative to zfnet"
        f"\ndifference: largest, relative to the largest pixel; apart: units above {TOLERANCE:.0e}\n"
        f"estimate for all {total['projections']:,} projections ({TOP} per map): "
        f"{total['zfnet_seconds']:.0f} s;\nunit by unit with captum {total['captum_seconds']:.0f} s, "
        f"{total['ratio']:.1f} times as long;\nwith each layer's fastest other way {total['ratio_to_best']:.1f} times"
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
