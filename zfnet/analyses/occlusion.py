"""job=occlusion: a grey square over images, and what the network says (paper, Fig. 7)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Optional

import torch

from zfnet.config.ranges import limits
from zfnet.config.schema import Config
from zfnet.data import ImageSet
from zfnet.explain import Deconvnet
from zfnet.explain.occlusion import Occlusion, centres_in_boxes, inside_and_outside, occlude, square_starts
from zfnet.explain.selection import (
    Chosen,
    Look,
    check_layer,
    choose_images,
    mean_colour,
    part_to_show,
    to_inputs,
)
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.plots.figures import save_figure
from zfnet.plots.occlusion import Projections, draw_occlusion
from zfnet.plots.pictures import on_grey, to_pixels
from zfnet.runs.session import own_directory
from zfnet.training.loaded import LoadedRun

log = logging.getLogger("zfnet")

OTHERS = 3  # images beside the one that is looked at, in panel c (paper, Fig. 7)


@dataclass(kw_only=True)
class OcclusionJob(Look):
    """Squares of side `patch`, `stride` apart, in input pixels; `fill` is a pixel value, 0 … 255."""

    reads_images: ClassVar[bool] = True

    count: int = limits(low=1)
    layer: str
    patch: Optional[int] = limits(low=1)
    stride: Optional[int] = limits(low=1)
    fill: Optional[float] = limits(low=0, high=255)

    def main(self, config: Config, output: Path) -> None:
        """Write figures/occlusion.png, every number of its maps (maps.csv), and a summary (occlusion.json)."""
        used, job = LoadedRun(config), config.job
        check_layer(used.model, "job.layer", job.layer, only_conv=True)
        size = used.data.image_size
        patch = job.patch or max(1, size // 5)
        stride = job.stride or max(1, min(patch, round(size / 24)))
        square_starts(size, patch, stride)  # complains before any data is read
        part = part_to_show(used)
        chosen = choose_images(used, config, job.count, part)
        fill = mean_colour(used, job.fill)
        with own_directory(config, output) as run:
            found = occlude(
                used.model,
                chosen.inputs,
                chosen.labels,
                layer=job.layer,
                patch=patch,
                stride=stride,
                fill=fill,
                batch_size=used.data.batch_size,
            )
            projections = _project(used, chosen, found, part.images)
            colour = to_pixels(fill.view(1, 3, 1, 1), used.data)[0, 0, 0] / 255
            figure = draw_occlusion(
                found,
                to_pixels(chosen.inputs, used.data).numpy(),
                chosen.names,
                used.classes,
                job.layer,
                projections,
                chosen.boxes,
                colour.tolist(),
            )
            save_figure(figure, run.figures / "occlusion.png")
            run.write_csv("maps.csv", _rows(found, chosen, used.classes))
            summary = _summary(found, chosen, used.classes)
            run.write_json("occlusion.json", summary)
            for row in summary["images"]:
                log.info(
                    "%s: P %.1f %%, at worst %.1f %% and then %s",
                    row["image"],
                    100 * row["probability"],
                    100 * row["lowest_probability"],
                    row["predicted_at_lowest"],
                )
            if "boxes" in summary:
                log.info(
                    "lowest in the object's box: %.0f %% of images (the box: %.0f %% of places)",
                    100 * summary["boxes"]["share_of_images_lowest_in_the_box"],
                    100 * summary["boxes"]["share_of_places_in_the_box"],
                )
            log.info("written to %s", run.folder)


def _project(used: LoadedRun, chosen: Chosen, found: Occlusion, part: ImageSet) -> list[Projections]:
    """Project each image's strongest map in that image and in the images of the split that excite it most."""
    layer = used.config.job.layer
    strongest = collect(
        used.model, part, used.batches, [layer], TopActivations(OTHERS + 1, len(used.classes))
    ).layers[layer]
    deconvnet, shown = Deconvnet(used.model), []
    for number in range(len(chosen)):
        channel = int(found.channel[number])
        places = strongest.places()[channel][strongest.filled[channel]].cpu()
        others = to_inputs(used, part.pixels(places[:, 0]))
        # the image itself may be among the strongest of its split
        new = [k for k in range(len(others)) if not torch.equal(others[k], chosen.inputs[number])][:OTHERS]
        images = torch.cat([chosen.inputs[number : number + 1], others[new]])
        where = torch.cat([found.peak[number : number + 1], places[new, 1:]])
        units = [(k, channel, int(y), int(x)) for k, (y, x) in enumerate(where.tolist())]
        labels = part.labels[places[new, 0]].tolist()
        shown.append(
            Projections(
                on_grey(deconvnet.project(images, layer, units)).numpy(),
                to_pixels(images, used.data).numpy(),
                ["this image", *(used.classes[c] for c in labels)],
            )
        )
    return shown


def _rows(found: Occlusion, chosen: Chosen, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row for each image and place: what the figure's maps are drawn from."""
    rows = []
    starts = found.starts.tolist()
    for number, name in enumerate(chosen.names):
        maps = [
            m[number].tolist()
            for m in (found.activation, found.probability, found.predicted, found.confidence)
        ]
        rows += [
            {
                "image": name,
                "top": top,
                "left": left,
                "activation": maps[0][y][x],
                "probability": maps[1][y][x],
                "predicted": classes[maps[2][y][x]],
                "confidence": maps[3][y][x],
            }
            for y, top in enumerate(starts)
            for x, left in enumerate(starts)
        ]
    return rows


def _summary(found: Occlusion, chosen: Chosen, classes: tuple[str, ...]) -> dict[str, Any]:
    """Facts about each image and, where the objects' boxes are known, whether it is they that matter."""
    images, lowest = [], found.probability.flatten(1).argmin(1)
    side, labels = len(found.starts), chosen.labels.tolist()
    for number, name in enumerate(chosen.names):
        y, x = divmod(int(lowest[number]), side)
        images.append(
            {
                "image": name,
                "class": classes[labels[number]],
                "class_is_the_truth": chosen.known,
                "map": int(found.channel[number]),
                "activation": float(found.whole_activation[number]),
                "probability": float(found.whole_probability[number]),
                "predicted": classes[int(found.whole_predicted[number])],
                "lowest_probability": float(found.probability[number, y, x]),
                "lowest_at": [int(found.starts[y]), int(found.starts[x])],
                "predicted_at_lowest": classes[int(found.predicted[number, y, x])],
            }
        )
    summary: dict[str, Any] = {"patch": found.patch, "starts": found.starts.tolist(), "images": images}
    if chosen.boxes is not None:
        inside = centres_in_boxes(found.starts, found.patch, chosen.boxes)
        within, outside = inside_and_outside(found.probability, inside)
        summary["boxes"] = {
            "share_of_places_in_the_box": float(inside.float().mean()),
            "share_of_images_lowest_in_the_box": float(
                inside.flatten(1)[torch.arange(len(chosen)), lowest].float().mean()
            ),
            "mean_probability_in_the_box": float(within.nanmean()),
            "mean_probability_outside": float(outside.nanmean()),
        }
    return summary
