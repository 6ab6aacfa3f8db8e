"""job=evolution: feature maps at the epochs whose weights a run kept (paper, Fig. 4)."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor

from zfnet.config.errors import UserError
from zfnet.config.ranges import limits
from zfnet.config.schema import Config
from zfnet.explain.evolution import EpochView, correlation, draw_lots, look, project_strongest
from zfnet.explain.selection import Look, check_layer, part_to_show, sample, to_inputs
from zfnet.model.sizes import CONV_LAYERS
from zfnet.plots.evolution import draw_evolution, draw_steadiness
from zfnet.plots.figures import save_figure
from zfnet.runs.session import own_directory
from zfnet.runs.weights import load_model
from zfnet.training.callbacks import list_snapshots
from zfnet.training.loaded import LoadedRun

log = logging.getLogger("zfnet")


@dataclass(kw_only=True)
class EvolutionJob(Look):
    """`maps` of each layer are drawn; on `probe_images` maps are compared across epochs."""

    max_images: Optional[int] = limits(low=1)
    layers: Optional[list[str]]
    maps: int = limits(low=1, high=50)
    probe_images: int = limits(low=3)

    def main(self, config: Config, output: Path) -> None:
        """Write figures/evolution.png and steadiness.png, strongest.csv (every map, every epoch) and steadiness.csv."""
        used, job = LoadedRun(config), config.job
        layers = job.layers or [name for name in used.model.layers if name in CONV_LAYERS]
        for layer in layers:
            check_layer(used.model, "job.layers", layer, only_conv=True)
        snapshots = list_snapshots(used.source.snapshots)
        if len(snapshots) < 2:
            raise UserError(
                f"run={used.source.folder}: kept the weights of {len(snapshots)} epochs, and it takes two to see "
                "something grow: train with 'trainer.snapshots=[1,2,5,10]'"
            )
        part = part_to_show(used).images
        if job.max_images:
            part = part.take(sample(used, part, job.max_images))
        probes = to_inputs(used, part.pixels(sample(used, part, job.probe_images)))
        with own_directory(config, output) as run:
            looks: dict[int, EpochView] = {}
            pictures: dict[int, dict[str, Tensor]] = {}
            chosen: dict[str, Tensor] = {}
            for epoch in reversed(snapshots):  # the last one first: it says which maps are alive
                log.info("epoch %d of %s", epoch, ", ".join(map(str, snapshots)))
                model, _ = load_model(snapshots[epoch])
                model = model.to(used.runtime.device).to(memory_format=used.runtime.memory_format)
                looks[epoch] = look(model, part, used.batches, probes, layers, used.data.batch_size)
                strongest = looks[epoch].strongest
                if not chosen:
                    chosen = {
                        layer: draw_lots(record.filled[:, 0].cpu(), job.maps, config.seed)
                        for layer, record in strongest.items()
                    }
                pictures[epoch] = {
                    layer: project_strongest(
                        model,
                        layer,
                        strongest[layer],
                        maps,
                        lambda index: to_inputs(used, part.pixels(index)),
                    )
                    for layer, maps in chosen.items()
                }
            epochs = list(snapshots)
            steadiness = _steadiness(looks, epochs, layers)
            save_figure(draw_evolution(pictures, chosen, epochs), run.figures / "evolution.png")
            save_figure(draw_steadiness(steadiness, layers), run.figures / "steadiness.png")
            run.write_csv("strongest.csv", _strongest(looks, epochs, layers, used.classes, part.labels))
            run.write_csv("steadiness.csv", steadiness)
            for row in steadiness:
                if row["epoch"] == epochs[-1]:
                    log.info(
                        "%s: correlation with epoch %d: %.2f; strongest image new in %.0f %% of maps",
                        row["layer"],
                        row["previous"],
                        row["correlation_with_previous"],
                        100 * row["strongest_image_changed"],
                    )
            log.info("written to %s", run.folder)


def _strongest(
    looks: dict[int, EpochView],
    epochs: list[int],
    layers: list[str],
    classes: tuple[str, ...],
    labels: Tensor,
) -> list[dict[str, Any]]:
    """One row for each epoch, layer and map: its strongest activation and where that is."""
    rows = []
    for epoch in epochs:
        for layer in layers:
            record = looks[epoch].strongest[layer]
            for number, (value, (image, y, x)) in enumerate(
                zip(record.values[:, 0].tolist(), record.places()[:, 0].tolist(), strict=True)
            ):
                rows.append(
                    {
                        "epoch": epoch,
                        "layer": layer,
                        "map": number,
                        "activation": value,
                        "image": image,
                        "class": classes[int(labels[image])],
                        "y": y,
                        "x": x,
                    }
                )
    return rows


def _steadiness(looks: dict[int, EpochView], epochs: list[int], layers: list[str]) -> list[dict[str, Any]]:
    """One row for each epoch but the first, and layer: means over the maps that vary at both epochs."""
    rows = []
    for previous, epoch in itertools.pairwise(epochs):
        for layer in layers:
            before, now, end = (looks[e] for e in (previous, epoch, epochs[-1]))
            alike = correlation(before.answers[layer], now.answers[layer])
            with_last = correlation(before.answers[layer], end.answers[layer])
            alive = (before.strongest[layer].filled & now.strongest[layer].filled)[:, 0]
            moved = (before.strongest[layer].index != now.strongest[layer].index)[:, 0]
            rows.append(
                {
                    "previous": previous,
                    "epoch": epoch,
                    "layer": layer,
                    "correlation_with_previous": _mean(alike),
                    "correlation_of_previous_with_last": _mean(with_last),
                    "strongest_image_changed": _mean(torch.where(alive, moved.double(), torch.nan)),
                    "maps": int(alike.isfinite().sum()),
                }
            )
    return rows


def _mean(values: Tensor) -> float:
    """The mean of what is a number; NaN if nothing is."""
    return float(values.nanmean())
