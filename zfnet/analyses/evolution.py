"""job=evolution: show how feature maps develop during training, at the epochs with saved weights.

Source: Zeiler & Fergus 2013, section 4 and Fig. 4: for a random subset of maps, the projection of the strongest
activation over all training images at each epoch, contrast enhanced. The stability curves are ours: how similar a map's
responses to a fixed set of images are from snapshot to snapshot, and how many maps change their strongest image.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from zfnet.config.errors import UserError, log
from zfnet.config.schema import Config, Positive
from zfnet.data import ImageSet
from zfnet.explain.crops import project_frames
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.maps import standard_columns, strongest_activations
from zfnet.explain.selection import Look, chosen_split, pick_layers, sample, to_inputs
from zfnet.explain.top_activations import LayerRecord, TopActivations, collect
from zfnet.model.chain import Chain
from zfnet.plots.figures import PALETTE, epoch_axis, new_figure, save_figure, styled
from zfnet.plots.pictures import on_grey, show_mosaic
from zfnet.runs.session import own_directory
from zfnet.runs.weights import load_model
from zfnet.training.checkpoint import epoch_files
from zfnet.training.loaded import LoadedRun

_CONTRAST = 0.6  # exponent of the drawn values; the paper also enhances the contrast


@dataclass(kw_only=True)
class EvolutionJob(Look):
    """See conf/job/evolution.yaml."""

    max_images: Optional[Positive]
    layers: Optional[list[str]]
    maps: Annotated[int, Field(ge=1, le=50)]
    probe_images: Annotated[int, Field(ge=3)]

    def main(self, config: Config, output: Path) -> None:
        """Write figures/evolution.png and stability.png, strongest.csv (every map, every epoch) and stability.csv."""
        loaded = LoadedRun(config)
        layers = pick_layers(loaded.chain, "job.layers", self.layers, loaded.chain.conv_layers, only_conv=True)
        for layer in layers:
            Deconvnet(loaded.chain).check(layer)
        snapshots = epoch_files(loaded.source.snapshots)
        if len(snapshots) < 2:
            raise UserError(
                f"run={loaded.source.folder}: has snapshots of {len(snapshots)} of its epochs, and a comparison "
                "needs two: train with 'trainer.snapshots=[1,2,5,10]'"
            )
        split = chosen_split(loaded)
        numbers = sample(loaded, split.images, self.max_images or len(split.images))
        images = split.images.take(numbers)
        probes = to_inputs(loaded, images.pixels(sample(loaded, images, self.probe_images)))
        with own_directory(config, output) as run:
            views: dict[int, EpochView] = {}
            projections: dict[int, dict[str, Tensor]] = {}
            maps: dict[str, Tensor] = {}
            for epoch in reversed(snapshots):  # start with the last one, because its active maps are sampled
                log.info("epoch %d of %s", epoch, ", ".join(map(str, snapshots)))
                model, _ = load_model(snapshots[epoch], config.imports)
                model = model.to(loaded.runtime.device).to(memory_format=loaded.runtime.memory_format)
                chain = Chain.of(model, loaded.data.image_size)
                search = collect(chain, images, loaded.batches, layers, TopActivations(1, len(images.classes)))
                responses = strongest_activations(chain, probes.split(loaded.data.batch_size), layers)
                views[epoch] = view = EpochView(search.layers, responses)
                for layer, record in view.strongest.items():
                    if layer not in maps:
                        maps[layer] = sample_maps(record.filled[:, 0].cpu(), self.maps, config.seed)
                    projections.setdefault(epoch, {})[layer] = project_strongest(
                        chain, layer, record, maps[layer], lambda i: to_inputs(loaded, images.pixels(i))
                    )
            views = {epoch: views[epoch] for epoch in snapshots}
            stability = _stability(views, layers)
            title = f"Strongest projection of each map over {len(images):,} {split.name} images, by epoch"
            save_figure(draw_evolution(title, projections, maps, list(snapshots)), run.figures / "evolution.png")
            save_figure(draw_stability(stability, layers), run.figures / "stability.png")
            run.write_csv("strongest.csv", _strongest(views, images, numbers))
            run.write_csv("stability.csv", stability)
            for row in stability[-len(layers) :]:
                share = row["strongest_image_changed"]
                changed = "no map is active" if math.isnan(share) else f"strongest image changed in {share:.0%} of maps"
                log.info(
                    f"{row['layer']}: correlation with epoch {row['previous']}: "
                    f"{row['correlation_with_previous']:.2f}; {changed}"
                )


# ---- measurement


@dataclass(frozen=True)
class EpochView:
    """The network at one epoch.

    strongest: layer → its record with the strongest activation of each of the C maps
    responses: layer → float [P, C] on the CPU, each map's largest activation on each probe image
    """

    strongest: dict[str, LayerRecord]
    responses: dict[str, Tensor]


def project_strongest(
    chain: Chain, layer: str, strongest: LayerRecord, maps: Tensor, inputs_of: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the projections of the maps' strongest activations, [M, 3, h, w], cut to their receptive fields.

    inputs_of: image numbers → network inputs. The projection of a map that was never active is 0.
    """
    places = strongest.places().cpu()[maps, 0]
    images, item = places[:, 0].unique(return_inverse=True)
    units = torch.stack([item, maps, places[:, 1], places[:, 2]], 1)
    return project_frames(Deconvnet(chain), inputs_of(images), layer, units)


def sample_maps(alive: Tensor, count: int, seed: int) -> Tensor:
    """Sample up to `count` of the maps that are alive (bool [C]) and return their numbers in ascending order."""
    maps = alive.nonzero().flatten()
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(seed))
    return maps[order[:count]].sort().values


def _strongest(views: Mapping[int, EpochView], images: ImageSet, numbers: Tensor) -> list[dict[str, Any]]:
    """Return one row for each epoch, layer and map: its strongest activation and the position.

    numbers: int64 [N], the images' numbers in their split
    """
    rows: list[dict[str, Any]] = []
    for epoch, view in views.items():
        for layer, record in view.strongest.items():
            places = zip(record.values[:, 0].tolist(), record.places()[:, 0].tolist(), strict=True)
            for number, (value, (image, y, x)) in enumerate(places):
                where: dict[str, Any] = dict.fromkeys(("image", "class", "y", "x"), "")
                if value > 0:  # a map that is never active has no place
                    label = images.classes[int(images.labels[image])]
                    where = {"image": int(numbers[image]), "class": label, "y": y, "x": x}
                rows.append({"epoch": epoch, "layer": layer, "map": number, "activation": value, **where})
    return rows


def _stability(views: Mapping[int, EpochView], layers: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row for each epoch except the first, and layer: means over the maps that vary at both epochs."""
    rows, last = [], list(views.values())[-1]
    for (previous, before), (epoch, now) in itertools.pairwise(views.items()):
        for layer in layers:
            first, second, end = (standard_columns(view.responses[layer]) for view in (before, now, last))
            similar, with_last = (first * second).sum(0), (first * end).sum(0)  # correlations
            different = (first * second.roll(1, 1)).sum(0)  # baseline: two unrelated maps
            if len(different) == 1:
                different = similar * torch.nan  # there is no other map
            alive = (before.strongest[layer].filled & now.strongest[layer].filled)[:, 0]
            changed = (before.strongest[layer].index != now.strongest[layer].index)[:, 0]
            rows.append(
                {
                    "previous": previous,
                    "epoch": epoch,
                    "layer": layer,
                    "correlation_with_previous": float(similar.nanmean()),
                    "correlation_of_previous_with_last": float(with_last.nanmean()),
                    "correlation_of_different_maps": float(different.nanmean()),
                    "strongest_image_changed": float(changed[alive].double().mean()),
                    "maps": int(similar.isfinite().sum()),
                }
            )
    return rows


# ---- figures


@styled()
def draw_evolution(
    title: str, projections: Mapping[int, Mapping[str, Tensor]], maps: Mapping[str, Tensor], epochs: Sequence[int]
) -> Figure:
    """Draw a block for each layer: a row for each map, a column for each epoch (paper, Fig. 4).

    projections: epoch → layer → [M, 3, h, w]; maps: layer → the M maps' numbers.
    """
    count = max(len(numbers) for numbers in maps.values())
    rows = -(-len(maps) // 5)
    columns = -(-len(maps) // rows)
    width = max(2.4, 0.55 * len(epochs) + 0.5)
    figure = new_figure(figsize=(width * columns, (0.55 * count + 0.75) * rows + 0.4))
    figure.suptitle(f"{title} (grey: no signal; each on its own scale)")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes[len(maps) :]:
        panel.axis("off")
    for panel, (layer, numbers) in zip(axes, maps.items(), strict=False):
        panel.set(title=layer, xlabel="epoch", ylabel="map")
        if len(numbers) == 0:
            panel.set(xticks=[], yticks=[], xlabel="no map is active at the last epoch")
            continue
        values = torch.stack([projections[epoch][layer] for epoch in epochs], 1).flatten(0, 1)  # [M · E, …]
        tiles = on_grey(values.sign() * values.abs() ** _CONTRAST)
        gap = max(2, max(48, tiles.shape[1]) // 24)
        show_mosaic(panel, tiles, [f"{e}" for e in epochs], [f"{m}" for m in numbers.tolist()], gap, side=48)
    return figure


@styled()
def draw_stability(rows: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> Figure:
    """Draw by epoch how similar maps are to those of the previous and of the last snapshot, and how many change.

    Dotted: the correlation of different maps of consecutive snapshots.
    """
    figure = new_figure(figsize=(13, 3.9))
    figure.suptitle("Stability of feature maps, mean over each layer's maps")
    axes = figure.subplots(1, 3)
    dotted = "Similarity to the previous snapshot\n(dotted: of different maps)"
    panels = (
        ("epoch", "correlation_with_previous", dotted, "correlation"),
        ("previous", "correlation_of_previous_with_last", "Similarity to the last snapshot", "correlation"),
        ("epoch", "strongest_image_changed", "Maps with a new strongest image", "fraction of the layer's maps"),
    )
    for axis, (at, key, title, label) in zip(axes, panels, strict=True):
        for k, layer in enumerate(layers):
            own = [row for row in rows if row["layer"] == layer]
            colour = PALETTE[k % len(PALETTE)]
            epochs, maps = [row[at] for row in own], own[-1]["maps"]
            axis.plot(epochs, [row[key] for row in own], "o-", color=colour, label=f"{layer}, {maps} maps")
            if axis is axes[0]:  # measured only between consecutive snapshots
                control = [row["correlation_of_different_maps"] for row in own]
                axis.plot(epochs, control, ":", marker="_", color=colour)  # two snapshots give a single point
        drawn = (key, "correlation_of_different_maps") if axis is axes[0] else (key,)
        lowest = min(0.0, *(row[k] for row in rows for k in drawn))
        axis.set(title=title, ylabel=label, ylim=(lowest - 0.02, 1.02))
        epoch_axis(axis, [row[at] for row in rows])
    axes[2].yaxis.set_major_formatter("{x:.0%}")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return figure
