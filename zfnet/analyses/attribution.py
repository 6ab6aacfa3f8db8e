"""job=attribution: show which pixels of an image are evidence for its class, by five methods.

All methods explain the logit of the class. The deconvnet (Zeiler & Fergus 2013), guided backpropagation (Springenberg
et al. 2014) and the gradient (Simonyan et al. 2013) are in `explain/deconvnet.py`; integrated gradients (Sundararajan
et al. 2017) and Grad-CAM (Selvaraju et al. 2017) are in `explain/targets.py`. For a network that is not a chain of
modules with rules, the gradient is autograd's, and the deconvnet and guided backpropagation are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Optional

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from zfnet.config.errors import UserError, log
from zfnet.config.schema import Config, Positive
from zfnet.explain.boxes import in_boxes, share_in_boxes
from zfnet.explain.deconvnet import RULES, Deconvnet
from zfnet.explain.selection import ChosenImages, Look, choose_images, pick_maps
from zfnet.explain.targets import GRAD_CAM, grad_cam, gradient, integrated_gradients
from zfnet.model.chain import OUTPUT, Network
from zfnet.model.layers import full_precision
from zfnet.plots.figures import WHITE, new_figure, plain, save_figure, styled
from zfnet.plots.pictures import on_grey, outline_box, show, to_pixels
from zfnet.runs.directory import write_tensors
from zfnet.runs.session import own_directory
from zfnet.runs.statistics import compare_own_with_others, format_percent
from zfnet.runs.tables import shorten, to_rows
from zfnet.training.loaded import LoadedRun

INTEGRATED = "integrated gradients"
_CLIP = 0.99  # quantile of the absolute integrated gradients at which the colour scale ends


@dataclass(kw_only=True)
class AttributionJob(Look):
    """See conf/job/attribution.yaml."""

    reads_images: ClassVar[bool] = True

    count: Positive
    boxed_images: Annotated[int, Field(ge=2)]
    layer: Optional[str]
    steps: Annotated[int, Field(ge=2, le=10_000)]

    def main(self, config: Config, output: Path) -> None:
        """Write figures/attribution.png, the maps (maps.safetensors), attribution.csv and, with boxes, boxes.json."""
        loaded = LoadedRun(config)
        network = loaded.network
        layer = pick_maps(network, "job.layer", self.layer)
        problem = None
        try:
            Deconvnet(network).check(OUTPUT)
        except UserError as error:
            problem = error
        # raises before the work
        image = torch.zeros(1, network.channels, network.image_size, network.image_size, device=loaded.runtime.device)
        label = torch.zeros(1, dtype=torch.int64, device=image.device)
        attribute(network, image, label, layer, 1, 1, problem is None)
        chosen = choose_images(loaded, config, self.count)
        with own_directory(config, output) as run:
            if problem is not None:
                log.info("without the deconvnet and guided backpropagation: %s", problem)
            if layer is None:
                log.info("without Grad-CAM: the network has no feature maps")
            settings = layer, self.steps, loaded.data.batch_size, problem is None
            result = attribute(network, chosen.inputs, chosen.labels, *settings)
            pixels = to_pixels(chosen.inputs, loaded.data)
            figure = draw_attribution(result, pixels, chosen.names, layer, chosen.boxes)
            save_figure(figure, run.figures / "attribution.png")
            tensors = {name.replace(" ", "_"): maps.contiguous() for name, maps in result.maps.items()}
            write_tensors(run.folder / "maps.safetensors", tensors, {})
            run.write_csv("attribution.csv", _rows(result, chosen))
            change = result.output - result.baseline_output
            gap = (result.maps[INTEGRATED].sum((1, 2, 3)) - change).abs().max()
            log.info(f"integrated gradients differ from the change of the output by at most {gap:.2g}")
            if gap > 0.1 * (typical := change.abs().median()):
                log.warning("the output changes by %.2g (median): raise job.steps to reduce the error", typical)
            if chosen.boxes is not None:
                many = choose_images(loaded, config, self.boxed_images)
                boxed = attribute(network, many.inputs, many.labels, *settings)
                evidence = box_evidence(boxed.maps, many.boxes)
                run.write_json("boxes.json", evidence)
                log.info(
                    f"attribution inside the object's box and inside other images' boxes, {len(many)} images, "
                    f"{int(boxed.correct.sum())} of them correctly classified:"
                )
                for method, row in evidence.items():
                    own, others = (format_percent(row[key]) for key in ("own", "others"))
                    log.info(
                        f"  {method:<20} {own}, {others}; difference {format_percent(row['difference'], 'points')}"
                    )


# ---- measurement


@dataclass(frozen=True)
class Attributions:
    """Attributions of N images, on the CPU.

    maps: method → [N, 3, S, S], or [N, 1, S, S] for Grad-CAM, which is never negative
    output, baseline_output: [N], the logit of the class for the image and for an image of the mean colour; integrated
    gradients add up to the difference, and more steps reduce the error
    correct: bool [N], whether the class has the image's largest logit
    """

    maps: dict[str, Tensor]
    output: Tensor
    baseline_output: Tensor
    correct: Tensor


@full_precision()
def attribute(
    network: Network,
    images: Tensor,
    labels: Tensor,
    layer: str | None,
    steps: int,
    batch_size: int,
    deconvnet: bool = True,
) -> Attributions:
    """Return the attributions of images [N, 3, S, S] to their classes `labels` [N], by five methods.

    layer: the layer whose maps Grad-CAM weights, None without Grad-CAM; steps: points of integrated gradients
    deconvnet: include the deconvnet and guided backpropagation, which need a `Chain` without unknown modules
    Raises UserError if the logits have no gradient with respect to the layer or the images.
    """
    units = torch.stack([torch.arange(len(labels)), labels.cpu()], 1)
    ones = torch.ones(len(labels))  # the logit would only scale the projection, and can be negative
    parts = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    if deconvnet:
        maps = {rule: Deconvnet(network, rule).project(images, OUTPUT, units, seeds=ones).cpu() for rule in RULES}
    else:
        maps = {"gradient": torch.cat([gradient(network, *part).cpu() for part in parts])}
    maps[INTEGRATED] = torch.cat([integrated_gradients(network, *part, steps).cpu() for part in parts])
    if layer is not None:
        maps[GRAD_CAM] = torch.cat([grad_cam(network, *part, layer).cpu() for part in parts])
    rows = torch.arange(len(labels), device=labels.device)
    with torch.no_grad():
        logits, baseline = (network.model(x) for x in (images, torch.zeros_like(images)))
    correct = (logits.argmax(1) == labels).cpu()
    return Attributions(maps, logits[rows, labels].cpu(), baseline[rows, labels].cpu(), correct)


def box_evidence(maps: Mapping[str, Tensor], boxes: Tensor | None) -> dict[str, dict[str, Any]]:
    """Compare the shares of each method's maps [N, C, S, S] in the images' own boxes and in the others', [N, 4]."""
    assert boxes is not None
    return {method: compare_own_with_others(share_in_boxes(each, boxes)) for method, each in maps.items()}


def _rows(result: Attributions, chosen: ChosenImages) -> list[dict[str, Any]]:
    """Return one row for each image and method. The columns of boxes are empty if boxes are not known."""
    count, boxes, rows = len(chosen), chosen.boxes, []
    for method, maps in result.maps.items():
        areas = None if boxes is None else in_boxes(torch.arange(maps.shape[-1]) + 0.5, boxes).float().mean((1, 2))
        rows += to_rows(
            image=chosen.names,
            method=[method] * count,
            sum=maps.sum((1, 2, 3)).tolist(),
            largest=maps.abs().amax((1, 2, 3)).tolist(),
            output=result.output.tolist(),
            output_of_mean_colour=result.baseline_output.tolist(),
            share_in_box=[""] * count if boxes is None else share_in_boxes(maps, boxes).diagonal().tolist(),
            box_area=[""] * count if areas is None else areas.tolist(),
        )
    return rows


# ---- figure


@styled()
def draw_attribution(
    result: Attributions, pictures: Tensor, names: Sequence[str], layer: str | None, boxes: Tensor | None
) -> Figure:
    """Draw a row for each image and a column for each method. Each picture has its own scale.

    Projections are on grey, integrated gradients in red (for) and blue (against), and Grad-CAM is over the image.
    pictures: uint8 [N, S, S, 3]; boxes: [N, 4] in input pixels, drawn dashed
    """
    methods = list(result.maps)
    count, columns = len(names), 1 + len(methods)
    figure = new_figure(figsize=(2.1 * columns, 1.3 + 2.1 * count))
    figure.suptitle("Evidence for the class named on the left, each picture on its own scale")
    grid = figure.add_gridspec(count + 1, columns, height_ratios=[1] * count + [0.06])  # colour bars at the bottom
    axes = np.array([[figure.add_subplot(grid[r, c]) for c in range(columns)] for r in range(count)])
    projections = {name: on_grey(maps) for name, maps in result.maps.items() if name in RULES}
    for row, panels in enumerate(axes):
        show(panels[0], pictures[row])
        panels[0].set_ylabel(plain(names, 28)[row])
        for panel, method in zip(panels[1:], methods, strict=True):
            maps = result.maps[method][row]
            if method in RULES:
                show(panel, projections[method][row])
            elif method == INTEGRATED:
                heat = maps.sum(0).numpy()
                heat = heat / max(float(np.quantile(np.abs(heat), _CLIP)), 1e-12)
                show(panel, heat, cmap="RdBu_r", vmin=-1, vmax=1)
            else:
                show(panel, pictures[row].float().mean(-1), cmap="gray", vmin=0, vmax=255)
                show(panel, maps[0] / maps.max().clamp(min=1e-12), cmap="inferno", alpha=0.6, vmin=0, vmax=1)
        for panel in panels if boxes is not None else ():
            outline_box(panel, boxes[row], WHITE)  # type: ignore[index]
    titles = {INTEGRATED: "red: for, blue: against", GRAD_CAM: f"of {shorten(layer or '', 20)}, over the image"}
    axes[0, 0].set_title("image" if boxes is None else "image\ndashed: the object's box")
    for panel, method in zip(axes[0, 1:], methods, strict=True):
        panel.set_title(f"{method}\n{titles.get(method, 'grey: no signal')}")
    scales = {
        "gray": (-1, tuple(projections), "1: the 99.9 % quantile\nof the absolute values"),
        "RdBu_r": (-1, (INTEGRATED,), f"1: the {100 * _CLIP:g}% quantile\nof the absolute values"),
        "inferno": (0, (GRAD_CAM,), "1: the largest value"),
    }
    for colours, (low, drawn, meaning) in scales.items():
        if drawn[0] not in methods:
            continue
        first, last = (1 + methods.index(drawn[k]) for k in (0, -1))
        figure.colorbar(
            ScalarMappable(Normalize(low, 1), colours),
            cax=figure.add_subplot(grid[-1, first : last + 1]),
            orientation="horizontal",
            label=meaning,
            ticks=range(low, 2),
        )
    return figure
