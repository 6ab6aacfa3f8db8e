"""job=attribution: deconvnet, guided backpropagation and gradient beside integrated gradients and Grad-CAM."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zfnet.config.ranges import limits
from zfnet.config.schema import Config
from zfnet.explain.attribution import (
    INTEGRATED,
    Attributions,
    attribute,
    in_boxes,
    load_captum,
    share_in_boxes,
)
from zfnet.explain.selection import Chosen, Look, check_layer, choose_images
from zfnet.plots.attribution import draw_attribution
from zfnet.plots.figures import save_figure
from zfnet.plots.pictures import to_pixels
from zfnet.runs.directory import write_tensors
from zfnet.runs.session import own_directory
from zfnet.training.loaded import LoadedRun

log = logging.getLogger("zfnet")


@dataclass(kw_only=True)
class AttributionJob(Look):
    """`layer` is Grad-CAM's; integrated gradients take `steps` points."""

    reads_images: ClassVar[bool] = True

    count: int = limits(low=1)
    layer: str
    steps: int = limits(low=2, high=10_000)

    def main(self, config: Config, output: Path) -> None:
        """Write figures/attribution.png, the maps themselves (maps.safetensors) and attribution.csv."""
        load_captum()  # complains before anything is read
        used, job = LoadedRun(config), config.job
        check_layer(used.model, "job.layer", job.layer, only_conv=True)
        chosen = choose_images(used, config, job.count)
        with own_directory(config, output) as run:
            found = attribute(
                used.model, chosen.inputs, chosen.labels, job.layer, job.steps, used.data.batch_size
            )
            figure = draw_attribution(
                found, to_pixels(chosen.inputs, used.data), chosen.names, job.layer, chosen.boxes
            )
            save_figure(figure, run.figures / "attribution.png")
            tensors = {name.replace(" ", "_"): maps.contiguous() for name, maps in found.maps.items()}
            write_tensors(run.folder / "maps.safetensors", tensors, {})
            rows = _rows(found, chosen)
            run.write_csv("attribution.csv", rows)
            _say(found, chosen)
            log.info("written to %s", run.folder)


def _rows(found: Attributions, chosen: Chosen) -> list[dict[str, Any]]:
    """One row for each image and method; the box's columns are empty where it is not known."""
    rows = []
    for method, maps in found.maps.items():
        shares = None if chosen.boxes is None else share_in_boxes(maps, chosen.boxes).tolist()
        areas = (
            None
            if chosen.boxes is None
            else in_boxes(chosen.boxes, maps.shape[-1]).float().mean((1, 2)).tolist()
        )
        for n, name in enumerate(chosen.names):
            rows.append(
                {
                    "image": name,
                    "method": method,
                    "sum": float(maps[n].sum()),
                    "largest": float(maps[n].abs().max()),
                    "output": float(found.output[n]),
                    "output_of_mean_colour": float(found.baseline_output[n]),
                    "share_in_box": "" if shares is None else shares[n],
                    "box_area": "" if areas is None else areas[n],
                }
            )
    return rows


def _say(found: Attributions, chosen: Chosen) -> None:
    gap = found.maps[INTEGRATED].sum((1, 2, 3)) - (found.output - found.baseline_output)
    log.info("integrated gradients miss the outputs' difference by up to %.2g", gap.abs().max())
    if chosen.boxes is None:
        return
    area = in_boxes(chosen.boxes, chosen.inputs.shape[-1]).float().mean()
    log.info("share inside the objects' boxes, which are %.0f %% of the images:", 100 * area)
    for method, maps in found.maps.items():
        log.info("  %-20s %5.1f %%", method, 100 * share_in_boxes(maps, chosen.boxes).nanmean())
