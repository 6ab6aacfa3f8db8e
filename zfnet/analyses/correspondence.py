"""job=correspondence: masks on the same part of different images, and on random places (paper, Table 1)."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import torch

from zfnet.analyses.points import Marked, read_points
from zfnet.config.errors import UserError
from zfnet.config.ranges import limits
from zfnet.config.schema import Config
from zfnet.explain.correspondence import (
    Agreement,
    compare,
    cut_to_boxes,
    mask,
    quarter_centres,
    sign_changes,
)
from zfnet.explain.selection import Look, answers, check_layer, mean_colour, part_to_show, sample, take
from zfnet.model.sizes import CONV_LAYERS
from zfnet.plots.correspondence import draw_correspondence
from zfnet.plots.figures import save_figure
from zfnet.plots.pictures import to_pixels
from zfnet.runs.session import own_directory
from zfnet.training.loaded import LoadedRun

log = logging.getLogger("zfnet")

SAME, RANDOM = "same place", "random"


@dataclass(kw_only=True)
class CorrespondenceJob(Look):
    """Masks of side `patch` on parts of images: of the split, or those that the table `points` names."""

    points: Optional[str]
    count: int = limits(low=2)
    layers: Optional[list[str]]
    patch: Optional[int] = limits(low=1)
    fill: Optional[float] = limits(low=0, high=255)
    permutations: int = limits(low=1, high=1_000_000)

    def main(self, config: Config, output: Path) -> None:
        """Write figures/correspondence.png and correspondence.csv, a table like the paper's."""
        used, job = LoadedRun(config), config.job
        size = used.data.image_size
        convolutions = [name for name in used.model.layers if name in CONV_LAYERS]
        layers = job.layers or list(dict.fromkeys([convolutions[-1], used.model.layers[-2]]))
        for layer in layers:
            check_layer(used.model, "job.layers", layer)
        patch = job.patch or max(1, size // 4)
        if patch >= size:
            raise UserError(
                f"job.patch={patch}: the masks must be smaller than the image, which is {size} px"
            )
        marked = _marked(used) if job.points is None else read_points(used, Path(job.points))
        with own_directory(config, output) as run:
            # what parts owe to standing in the same place: one random place for all images
            marked.parts[SAME] = _random_centres(1, size, patch, config.seed + 1).expand(
                len(marked.groups), -1
            )
            marked.parts[RANDOM] = _random_centres(len(marked.groups), size, patch, config.seed)
            fill = mean_colour(used, job.fill)
            masked = {
                part: mask(marked.inputs, centres, patch, fill) for part, centres in marked.parts.items()
            }
            signs = {
                part: sign_changes(used.model, marked.inputs, hidden, layers, used.data.batch_size)
                for part, hidden in masked.items()
            }
            table: dict[str, dict[str, Agreement]] = {layer: {} for layer in layers}
            for layer in layers:
                for part in list(masked)[:-1]:
                    table[layer][part], table[layer][RANDOM] = compare(
                        signs[part][layer], signs[RANDOM][layer], marked.groups, job.permutations, config.seed
                    )
                table[layer][RANDOM] = table[layer].pop(RANDOM)  # last, as in the paper
            examples = {part: to_pixels(hidden[:4], used.data) for part, hidden in masked.items()}
            save_figure(draw_correspondence(table, examples), run.figures / "correspondence.png")
            run.write_csv("correspondence.csv", _rows(table))
            right = answers(used, marked.inputs).argmax(1) == marked.groups
            run.write_json(
                "correspondence.json",
                {
                    "images": len(marked.groups),
                    "patch": patch,
                    "aligned": job.points is None,
                    "rightly_named": float(right.float().mean()) if job.points is None else None,
                    "table": {
                        layer: {part: dataclasses.asdict(a) for part, a in parts.items()}
                        for layer, parts in table.items()
                    },
                },
            )
            _say(table, len(marked.groups))
            log.info("written to %s", run.folder)


def _marked(used: LoadedRun) -> Marked:
    """Take images whose boxes are known, cut to these, with the quarters of the boxes as parts."""
    job = used.config.job
    part = part_to_show(used)
    if part.images.boxes is None:
        raise UserError(
            f"data={used.data.name}: where parts are is known of data=shapes only; name them in a table, job.points=…"
        )
    chosen = take(used, part, sample(used, part.images, job.count))
    assert chosen.boxes is not None
    return Marked(
        cut_to_boxes(chosen.inputs, chosen.boxes),
        quarter_centres(chosen.boxes, used.data.image_size),
        chosen.labels.cpu(),
    )


def _random_centres(count: int, size: int, patch: int, seed: int) -> torch.Tensor:
    """Return places (y, x) [N, 2] where a mask lies within the image, each as likely as any other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, size - patch + 1, (count, 2), generator=generator) + (patch - 1) / 2


def _rows(table: dict[str, dict[str, Agreement]]) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "part": part, **dataclasses.asdict(found)}
        for layer, parts in table.items()
        for part, found in parts.items()
    ]


def _say(table: dict[str, dict[str, Agreement]], images: int) -> None:
    log.info("Δ over pairs of %d images, ± their deviation; p: against random places", images)
    parts = list(next(iter(table.values())))
    width = max(map(len, parts))
    log.info("%-*s  %s", width, "", "".join(f"{layer:<28}" for layer in table))
    for part in parts:
        cells = []
        for layer in table:
            found = table[layer][part]
            p = "" if found.p is None else f"  p {found.p:.4f}"
            cells.append(f"{f'{found.delta:.3f} ± {found.spread:.3f}{p}':<28}")
        log.info("%-*s  %s", width, part, "".join(cells).rstrip())
