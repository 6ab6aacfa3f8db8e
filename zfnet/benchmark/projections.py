"""Deconvnet projections: ours, batched and cut to receptive fields, beside captum's, one unit at a time."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.data import load_splits, preprocess
from zfnet.explain import Deconvnet
from zfnet.model.sizes import CONV_LAYERS
from zfnet.model.zfnet import ZFNet
from zfnet.training.device import Runtime, timed
from zfnet.training.state import make_model

APART = (
    1e-5  # of the largest pixel: beyond the rounding of equal computations, below what a moved switch does
)


def measure(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Time projections of a freshly initialised network; return what benchmark.json holds."""
    images = load_splits(config.data).train
    model = make_model(config, len(images.classes)).to(runtime.device).eval()
    pixels = images.pixels(range(min(config.job.count, len(images))))
    inputs = preprocess(pixels.to(runtime.device), config.data, channels_last=False)
    rows = time_projections(model, inputs, config.job.maps, config.job.rounds)
    return {"layers": rows, "all_maps_top_9": all_maps(rows)}


def say(result: dict[str, Any]) -> None:
    """Print a table of layers, and what follows for all maps."""
    print(
        f"\n{'layer':<8}{'units':>7}{'zfnet, ms each':>16}{'captum, ms each':>17}{'ratio':>9}"
        f"{'difference':>12}{'apart':>7}"
    )
    for row in result["layers"]:
        ours, theirs = 1000 * row["zfnet_seconds"], 1000 * row["captum_seconds"]
        print(
            f"{row['layer']:<8}{row['units']:>7}{ours:>16.2f}{theirs:>17.2f}{row['ratio']:>8.1f}×"
            f"{row['difference']:>12.1e}{row['units_apart']:>7}"
        )
    total = result["all_maps_top_9"]
    print(
        f"\ndifference: the largest, of the largest pixel; apart: units beyond {APART:.0e}\n"
        f"all {total['projections']:,} projections (9 of each map), from the times above: "
        f"{total['zfnet_seconds']:.0f} s,\nunit by unit with captum {total['captum_seconds']:.0f} s: "
        f"{total['ratio']:.1f} times as long"
    )


def captums_deconvolution() -> Any:
    """Return captum's NeuronDeconvolution; raise UserError where captum is not installed."""
    try:
        from captum.attr import NeuronDeconvolution
    except ImportError as error:
        raise UserError("job.subject=deconvnet compares with captum: pip install -e '.[explain]'") from error
    return NeuronDeconvolution


def strongest_units(model: ZFNet, images: Tensor, layer: str, maps: int | None) -> Tensor:
    """Return units (image, channel, y, x), int64 [n, 4]: in each image, the strongest place of each map.

    `maps` of the layer's maps, evenly spread, or all; places without activation are left out.
    """
    activations = model.activations(images, [layer])[layer]
    count = activations.shape[1]
    channels = torch.linspace(0, count - 1, min(maps or count, count)).round().long().unique()
    values, places = activations[:, channels].flatten(2).max(dim=2)
    image, number = (values > 0).nonzero().unbind(1)
    place, width = places[image, number], activations.shape[3]
    return torch.stack(
        (image, channels[number.cpu()].to(place.device), place // width, place % width), 1
    ).cpu()


@torch.no_grad()
def time_projections(model: ZFNet, images: Tensor, maps: int | None, rounds: int) -> list[dict[str, Any]]:
    """Time both on the same units, in turns; one row a layer, with medians of seconds per projection.

    images: [N, 3, S, S], normalised, on the model's device. Beside the seconds a row holds what `compare` says of
    the projections. Ours start from the activations; captum's start from 1, and are multiplied by them afterwards.

    Raises UserError where none of a layer's maps is active, or captum is not installed.
    """
    theirs, ours, rows = captums_deconvolution(), Deconvnet(model), []
    layers = [layer for layer in model.layers if layer in CONV_LAYERS]
    for layer in tqdm(layers, "projections", unit="layer", disable=None, leave=False):
        units = strongest_units(model, images, layer, maps)
        if not len(units):
            raise UserError(
                f"job.maps={maps}: none of these maps of {layer} is active in the {len(images)} images; take more"
            )
        chosen = [tuple(u) for u in units.tolist()]
        seeds = model.activations(images, [layer])[layer][tuple(units.to(images.device).unbind(1))]
        deconvolution = theirs(model, getattr(model, f"relu{layer[-1]}"))
        seconds, results = _race(
            {
                "zfnet": partial(ours.project, images, layer, chosen, seeds=seeds),
                "captum": partial(_one_by_one, deconvolution, images, chosen),
            },
            rounds,
            images.device,
        )
        rows.append(
            {
                "layer": layer,
                "maps": int(getattr(model, layer).out_channels),
                "units": len(chosen),
                "zfnet_seconds": statistics.median(seconds["zfnet"]) / len(chosen),
                "captum_seconds": statistics.median(seconds["captum"]) / len(chosen),
                "ratio": statistics.median(
                    b / a for a, b in zip(seconds["zfnet"], seconds["captum"], strict=True)
                ),
                **compare(results["zfnet"], results["captum"] * seeds[:, None, None, None]),
            }
        )
    return rows


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Return the `difference` of projections [units, 3, S, S], and `units_apart`, which differ by more than `APART`.

    Both are counted in largest pixels of `theirs`. The two compute the same function: in float64 they agree to
    1e-14, in float32 to 1.5e-6 as long as their switches are the same. Our forward pass holds maps channels last and
    captum's as the model does, so that convolutions add in another order; where the two largest of a pooling window
    differ by no more than that rounding, its switch can move, and whole patches of a projection move with it. On
    9 images of shapes and a fresh network it does so in 1 of 1,699,812 live windows (largest values 2e-6 apart,
    relatively), and 14 of 10,993 units see it. Neither answer is wrong in float32.
    """
    each = (ours - theirs).abs_().amax(dim=(1, 2, 3)) / theirs.abs().max()
    return {"difference": float(each.max()), "units_apart": int((each > APART).sum())}


def _race(
    contenders: dict[str, Callable[[], Tensor]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Call each in turn; return the seconds of each round and the last results."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    results: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, call in contenders.items():
            kept: list[Tensor] = []
            seconds[name].append(timed(lambda call=call, kept=kept: kept.append(call()), device))  # type: ignore[misc]
            results[name] = kept[0]
    return seconds, results


def _one_by_one(deconvolution: Any, images: Tensor, units: Sequence[Sequence[int]]) -> Tensor:
    """Project each unit by a call of its own, as captum's interface has it."""
    found = []
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        for image, channel, y, x in units:
            picture = images[image : image + 1].clone().requires_grad_()
            found.append(deconvolution.attribute(picture, (channel, y, x)).detach())
    return torch.cat(found)


def all_maps(rows: list[dict[str, Any]], top: int = 9) -> dict[str, Any]:
    """Return the time of every map's `top` projections, by each layer's time for one, and the ratio of the sums."""
    count = sum(row["maps"] for row in rows) * top
    ours, theirs = (
        sum(row["maps"] * top * row[f"{name}_seconds"] for row in rows) for name in ("zfnet", "captum")
    )
    return {"projections": count, "zfnet_seconds": ours, "captum_seconds": theirs, "ratio": theirs / ours}
