"""job=invariance: features and answers under translation, scaling and rotation (paper, Fig. 5)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Optional

import torch

from zfnet.config.ranges import limits
from zfnet.config.schema import Config
from zfnet.explain.invariance import Curves, make_amounts, measure, transform_images, typical_distance
from zfnet.explain.selection import Look, check_layer, choose_images, part_to_show, sample, take
from zfnet.plots.figures import save_figure
from zfnet.plots.invariance import draw_invariance
from zfnet.plots.pictures import to_pixels
from zfnet.runs.session import own_directory
from zfnet.training.loaded import LoadedRun

log = logging.getLogger("zfnet")


@dataclass(kw_only=True)
class InvarianceJob(Look):
    """Ranges of the transforms: `translation` is a share of the side, `rotation` in degrees; `steps` amounts each."""

    reads_images: ClassVar[bool] = True

    count: int = limits(low=1)
    mean_images: int = limits(low=2)
    layers: Optional[list[str]]
    translation: float = limits(above=0, below=1)
    scale: float = limits(above=1, high=10)
    rotation: float = limits(above=0, below=360)
    steps: int = limits(low=2, high=1000)

    def main(self, config: Config, output: Path) -> None:
        """Write figures/invariance.png, every point of its curves (curves.csv), and invariance.json."""
        used, job = LoadedRun(config), config.job
        hidden = used.model.layers[:-1]
        layers = job.layers or [hidden[0], hidden[-1]]
        for layer in layers:
            check_layer(used.model, "job.layers", layer)
        amounts = make_amounts(used.data.image_size, job.translation, job.scale, job.rotation, job.steps)
        part = part_to_show(used)
        chosen = choose_images(used, config, job.count, part)
        many = take(used, part, sample(used, part.images, job.mean_images))
        with own_directory(config, output) as run:
            units = typical_distance(used.model, many.inputs, layers, used.data.batch_size)
            own, mean = (
                measure(used.model, c.inputs, c.labels, amounts, layers, used.data.batch_size)
                for c in (chosen, many)
            )
            examples = {
                name: to_pixels(
                    transform_images(chosen.inputs, name, steps[[0, len(steps) // 2, -1]]).flatten(0, 1),
                    used.data,
                )
                for name, steps in amounts.items()
            }
            save_figure(
                draw_invariance(own, mean, units, examples, chosen.names), run.figures / "invariance.png"
            )
            rows = _rows(own, units, chosen.names, "own curve") + _rows(mean, units, many.names, "mean")
            run.write_csv("curves.csv", rows)
            run.write_json(
                "invariance.json",
                {
                    "images_in_the_mean": len(many),
                    "layers": layers,
                    "distance_between_two_images": units,
                    "mean_at_largest": {name: _ends(curves, units) for name, curves in mean.items()},
                },
            )
            _say(mean, units, len(many))
            log.info("written to %s", run.folder)


def _rows(
    curves: dict[str, Curves], units: dict[str, float], names: Sequence[str], used_for: str
) -> list[dict[str, Any]]:
    """One row for each image, transform and amount."""
    rows = []
    for transform, curve in curves.items():
        columns = {f"distance_{layer}": d.tolist() for layer, d in curve.distances.items()}
        columns |= {f"canonical_{layer}": (d / units[layer]).tolist() for layer, d in curve.distances.items()}
        columns["probability"] = curve.probability.tolist()
        rows += [
            {
                "used_for": used_for,
                "image": name,
                "transform": transform,
                "amount": amount,
                **{key: values[n][k] for key, values in columns.items()},
            }
            for n, name in enumerate(names)
            for k, amount in enumerate(curve.amounts.tolist())
        ]
    return rows


def _ends(curve: Curves, units: dict[str, float]) -> dict[str, float]:
    """Return the mean curve's largest distances and its lowest probability."""
    largest = {
        f"canonical_{layer}": float(d.mean(0).max() / units[layer]) for layer, d in curve.distances.items()
    }
    return {**largest, "probability": float(curve.probability.mean(0).min())}


def _say(mean: dict[str, Curves], units: dict[str, float], count: int) -> None:
    log.info("mean over %d images; distance 1: as far apart as two different images", count)
    width = max(len(name) for name in mean)
    for name, curve in mean.items():
        moved = ", ".join(
            f"{layer} up to {d.mean(0).max() / units[layer]:.2f}" for layer, d in curve.distances.items()
        )
        start = curve.probability[
            torch.arange(count), int(curve.distances[next(iter(units))].sum(0).argmin())
        ]
        log.info(
            "  %-*s %s; P from %.2f to %.2f",
            width,
            name,
            moved,
            start.mean(),
            curve.probability.mean(0).min(),
        )
