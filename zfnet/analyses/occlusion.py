"""job=occlusion: what a network predicts while a grey square hides one part of an image after another.

Source: Zeiler & Fergus 2013, section 4.2 and Fig. 7. The paper gives neither the square's size nor its steps; ours
follow the image's size. Places cover the whole image; at the borders the square extends beyond it and hides less. Where
the objects' boxes are known, the place of the lowest probability tells whether the object matters: it is in its own
image's box more often than in the boxes of other images, which are in the middle of most images, too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Optional

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from zfnet.config.errors import UserError
from zfnet.config.schema import Config, Positive
from zfnet.data import ImageSet
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.selection import (
    Chosen,
    Look,
    choose_images,
    chosen_split,
    in_boxes,
    mean_colour,
    pick_layers,
    to_inputs,
    to_rows,
)
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.model.chain import OUTPUT, Chain
from zfnet.plots.figures import PALETTE, RED, WHITE, new_figure, plain, save_figure, styled
from zfnet.plots.pictures import on_grey, outline_box, show, to_pixels
from zfnet.runs.session import own_directory
from zfnet.runs.statistics import own_and_others, percent
from zfnet.training.loaded import LoadedRun

log = logging.getLogger("zfnet")

OTHERS = 3  # images beside the occluded one, in panel c (paper, Fig. 7)
_NAMED = 8  # classes in a legend


@dataclass(kw_only=True)
class OcclusionJob(Look):
    """See conf/job/occlusion.yaml."""

    reads_images: ClassVar[bool] = True

    count: Positive
    boxed_images: Annotated[int, Field(ge=2)]
    layer: Optional[str]
    patch: Optional[Positive]
    stride: Optional[Positive]
    fill: Optional[Annotated[float, Field(ge=0, le=255)]]

    def main(self, config: Config, output: Path) -> None:
        """Write figures/occlusion.png, every number of its maps (maps.csv), and a summary (occlusion.json)."""
        loaded = LoadedRun(config)
        chain, data = loaded.chain, loaded.data
        (layer,) = pick_layers(chain, "job.layer", self.layer, chain.conv_layers[-1:], only_conv=True)
        patch, stride = square_and_steps(data.image_size, self.patch, self.stride)
        square_starts(data.image_size, patch, stride)  # raises before any data is read
        Deconvnet(chain).check(layer)
        split = chosen_split(loaded)
        chosen = choose_images(loaded, config, self.count, split)
        fill = mean_colour(loaded, self.fill)
        with own_directory(config, output) as run:
            settings: dict[str, Any] = {"layer": layer, "patch": patch, "fill": fill, "batch_size": data.batch_size}
            result = occlude(chain, chosen.inputs, chosen.labels, stride=stride, **settings)
            boxes = None
            if chosen.boxes is not None:
                many = choose_images(loaded, config, self.boxed_images, split)
                coarse = max(stride, patch // 2)  # finer steps are for maps
                boxes = box_evidence(occlude(chain, many.inputs, many.labels, stride=coarse, **settings), many.boxes)
            pictures = to_pixels(chosen.inputs, data).numpy()
            colour = (to_pixels(fill.view(1, 3, 1, 1), data).flatten() / 255).tolist()
            panels = project_strongest_map(loaded, layer, chosen.inputs, result, split.images)
            figure = draw_occlusion(result, pictures, chosen, loaded.classes, layer, panels, colour)
            save_figure(figure, run.figures / "occlusion.png")
            run.write_csv("maps.csv", _rows(result, chosen, loaded.classes))
            run.write_json("occlusion.json", _summarise(result, chosen, loaded.classes, boxes))


# ---- measurement


class Outputs(NamedTuple):
    """The network's outputs for images, whole ones [N] or occluded at P × P places [N, P, P].

    activation: sum over the map that is strongest on the whole image (panel b); probability: of the true class
    (panel d); predicted: int64, the most probable class (panel e); confidence: its probability
    """

    activation: Tensor
    probability: Tensor
    predicted: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class Occlusion:
    """The outputs for N images without and with a square at P × P places; all on the CPU.

    starts: int64 [P], the first row (and column) of the square at each place; it may lie outside the image
    patch: side of the square in pixels
    channel: int64 [N], the map with the largest sum of activations on the whole image
    peak: int64 [N, 2], where (y, x) that map is strongest on the whole image
    """

    starts: Tensor
    patch: int
    channel: Tensor
    peak: Tensor
    whole: Outputs
    occluded: Outputs


def square_and_steps(size: int, patch: int | None, stride: int | None) -> tuple[int, int]:
    """Return the side of the square and the pixels between its places: None is a fifth of the image, or 24 places."""
    patch = patch or max(1, size // 5)
    return patch, stride or max(1, min(patch, round(size / 24)))


def square_starts(size: int, patch: int, stride: int) -> Tensor:
    """Return the first row of the square at each place: int64 [⌈size / stride⌉], `stride` apart.

    The places are centred on the image and cover all of it; at the borders the square may extend beyond it.
    Raises UserError if the square covers the whole image, or its steps leave gaps.
    """
    if patch >= size:
        raise UserError(f"job.patch={patch}: the occluder must be smaller than the image, which is {size} px")
    if stride > patch:
        raise UserError(f"job.stride={stride}: must be at most job.patch={patch}, or pixels are never covered")
    places = -(-size // stride)
    beyond = (places - 1) * stride + patch - size
    return torch.arange(places) * stride - beyond // 2


@torch.no_grad()
def occlude(
    chain: Chain, images: Tensor, labels: Tensor, *, layer: str, patch: int, stride: int, fill: Tensor, batch_size: int
) -> Occlusion:
    """Slide a square over each image and record the network's outputs.

    images: [N, 3, S, S], normalised; labels: int64 [N]; fill: [3], the square's colour in the same units.
    Occluded images are made batch by batch on the images' device. Raises UserError (see `square_starts`).
    """
    count, size, device = len(images), images.shape[-1], images.device
    starts = square_starts(size, patch, stride).to(device)
    side = len(starts)
    channels, peaks, whole = [], [], []
    for chunk, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        maps = chain.activations(chunk, [layer])[layer]
        strongest = maps.sum((2, 3)).argmax(1)
        peak = maps[torch.arange(len(chunk), device=device), strongest].flatten(1).argmax(1)
        channels.append(strongest)
        peaks.append(torch.stack([peak // maps.shape[3], peak % maps.shape[3]], 1))
        whole.append(_outputs(chain, chunk, layer, strongest, truth))
    channel = torch.cat(channels)
    along = torch.arange(size, device=device)
    hidden = (along >= starts[:, None]) & (along < starts[:, None] + patch)  # [P, S]
    colour = fill.to(images).view(1, 3, 1, 1)
    occluded, total = [], count * side**2
    with tqdm(total=total, desc="occlusion", unit="image", disable=None, leave=False, dynamic_ncols=True) as bar:
        for number in torch.arange(total, device=device).split(batch_size):
            image, row, column = number // side**2, number // side % side, number % side
            square = (hidden[row][:, :, None] & hidden[column][:, None, :])[:, None]
            inputs = torch.where(square, colour, images[image])
            occluded.append(_outputs(chain, inputs, layer, channel[image], labels[image]))
            bar.update(len(number))
    return Occlusion(
        starts.cpu(),
        patch,
        channel.cpu(),
        torch.cat(peaks).cpu(),
        Outputs(*(torch.cat(chunks).cpu() for chunks in zip(*whole, strict=True))),
        Outputs(*(torch.cat(chunks).cpu().view(count, side, side) for chunks in zip(*occluded, strict=True))),
    )


def _outputs(chain: Chain, images: Tensor, layer: str, channel: Tensor, labels: Tensor) -> Outputs:
    outputs = chain.activations(images, [layer, OUTPUT])
    rows = torch.arange(len(images), device=images.device)
    probabilities = outputs[OUTPUT].softmax(1)
    confidence, predicted = probabilities.max(1)
    activation = outputs[layer][rows, channel].sum((1, 2))
    return Outputs(activation, probabilities[rows, labels], predicted, confidence)


def box_evidence(result: Occlusion, boxes: Tensor | None) -> dict[str, Any]:
    """Return `own_and_others` of the objects' boxes [N, 4]: how often the lowest probability, and what mean, is inside.

    For a box as for the places, the square's centre counts.
    """
    assert boxes is not None
    inside = in_boxes(result.starts + result.patch / 2, boxes).flatten(1)  # [box, place]
    probability = result.occluded.probability.flatten(1)
    within, outside = (
        torch.where(where, probability[:, None], torch.nan).nanmean(2) for where in (inside[None], ~inside[None])
    )
    return {
        "share_of_places_in_the_box": float(inside.float().mean()),
        "lowest_in_the_box": own_and_others(inside[:, probability.argmin(1)].T.double()),
        "probability_outside_minus_inside": own_and_others(outside - within),
    }


def _rows(result: Occlusion, chosen: Chosen, classes: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each image and place: the numbers that the figure's maps show."""
    starts, columns = (result.starts.tolist(), {k: v.flatten().tolist() for k, v in result.occluded._asdict().items()})
    columns["predicted"] = [classes[c] for c in columns["predicted"]]
    return to_rows(
        image=[name for name in chosen.names for _ in range(len(starts) ** 2)],
        top=[top for top in starts for _ in starts] * len(chosen),
        left=starts * len(starts) * len(chosen),
        **columns,
    )


def _summarise(
    result: Occlusion, chosen: Chosen, classes: Sequence[str], boxes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return and log the results of each image and, if the objects' boxes are known, whether the objects matter."""
    images, lowest = [], result.occluded.probability.flatten(1).argmin(1)
    for number, name in enumerate(chosen.names):
        y, x = divmod(int(lowest[number]), len(result.starts))
        row = {
            "image": name,
            "class": classes[int(chosen.labels[number])],
            "class_is_the_truth": chosen.known,
            "map": int(result.channel[number]),
            "activation": float(result.whole.activation[number]),
            "probability": float(result.whole.probability[number]),
            "predicted": classes[int(result.whole.predicted[number])],
            "lowest_probability": float(result.occluded.probability[number, y, x]),
            "lowest_at": [int(result.starts[y]), int(result.starts[x])],
            "predicted_at_lowest": classes[int(result.occluded.predicted[number, y, x])],
        }
        log.info(
            f"{name}: P {row['probability']:.1%}, at the lowest {row['lowest_probability']:.1%}, "
            f"where the prediction is {row['predicted_at_lowest']}"
        )
        images.append(row)
    summary: dict[str, Any] = {"patch": result.patch, "starts": result.starts.tolist(), "images": images}
    if boxes is not None:
        summary["boxes"], lowest_in = boxes, boxes["lowest_in_the_box"]
        log.info(
            f"lowest in the object's box: {percent(lowest_in['own'])} of {lowest_in['own']['n']} images, "
            f"in other images' boxes: {percent(lowest_in['others'])}; difference {percent(lowest_in['difference'])}"
        )
    return summary


# ---- figure


class Panels(NamedTuple):
    """Panel c: images and their projections, uint8 [1 + M, S, S, 3], the occluded image's first, each with a title."""

    images: np.ndarray
    projections: np.ndarray
    titles: Sequence[str]


def project_strongest_map(
    loaded: LoadedRun, layer: str, inputs: Tensor, result: Occlusion, images: ImageSet
) -> list[Panels]:
    """Project each image's strongest map in that image and in the images of the split that excite it most."""
    search = TopActivations(OTHERS + 1, len(loaded.classes))
    strongest = collect(loaded.chain, images, loaded.batches, [layer], search).layers[layer]
    deconvnet, shown = Deconvnet(loaded.chain), []
    for number, channel in enumerate(result.channel.tolist()):
        places = strongest.places()[channel][strongest.filled[channel]].cpu()
        others = to_inputs(loaded, images.pixels(places[:, 0]))
        # the image itself may be among the strongest of its split
        new = [k for k in range(len(others)) if not torch.equal(others[k], inputs[number])][:OTHERS]
        row = torch.cat([inputs[number : number + 1], others[new]])
        where = torch.cat([result.peak[number : number + 1], places[new, 1:]])
        units = [(k, channel, int(y), int(x)) for k, (y, x) in enumerate(where.tolist())]
        titles = ["this image", *(loaded.classes[c] for c in images.labels[places[new, 0]].tolist())]
        projections = on_grey(deconvnet.project(row, layer, units)).numpy()
        shown.append(Panels(to_pixels(row, loaded.data).numpy(), projections, titles))
    return shown


@styled
def draw_occlusion(
    result: Occlusion,
    pictures: np.ndarray,
    chosen: Chosen,
    classes: Sequence[str],
    layer: str,
    projections: Sequence[Panels],
    fill: Sequence[float],
) -> Figure:
    """Draw five panels for each image (paper, Fig. 7). The square is where the probability is lowest; dashed: the box.

    pictures: uint8 [N, S, S, 3] of the chosen images; fill: the square's colour, in 0 … 1
    """
    rows, size, boxes = len(pictures), pictures.shape[1], chosen.boxes
    figure = new_figure(figsize=(18, 1.1 + 2.9 * rows))
    dashed = "" if boxes is None else "; dashed: the object's box"
    figure.suptitle(f"Occlusion by a square of {result.patch} px; maps are drawn at the square's centre{dashed}")
    axes = figure.subplots(rows, 7, squeeze=False, width_ratios=(1, 1, 0.05, 2, 1, 0.05, 1))
    titles = (
        "(a) Image and square where\nthe probability is lowest",
        f"(b) Activation of the strongest\nmap of {layer}, summed",
        f"(c) Image and projection of that map of {layer},\nhere and where it is strongest (grey: no signal)",
        "(d) Probability\nof the class",
        "(e) Most probable\nclass",
    )
    for panel, title in zip(axes[0, [0, 1, 3, 4, 6]], titles, strict=True):
        panel.set_title(title)
    extent = _extent(result, size)
    predicted_classes = result.occluded.predicted.unique().tolist()  # sorted; their colours are the same in every row
    colours = {c: PALETTE[n % len(PALETTE)] for n, c in enumerate(predicted_classes)}
    for row, (image, activation, bar_b, projected, probability, bar_d, predicted) in enumerate(axes):
        show(image, pictures[row])
        y, x = divmod(int(result.occluded.probability[row].argmin()), len(result.starts))
        corner = (float(result.starts[x]) - 0.5, float(result.starts[y]) - 0.5)
        image.add_patch(Rectangle(corner, result.patch, result.patch, fc=tuple(fill), ec=WHITE, lw=0.8))
        image.set_ylabel(plain(chosen.names)[row])
        heat = show(activation, result.occluded.activation[row], cmap="magma", extent=extent, vmin=0)
        whole = float(result.whole.activation[row])
        activation.set_xlabel(f"map {int(result.channel[row])}; whole image: {whole:.3g}")
        figure.colorbar(heat, cax=bar_b)
        _draw_projections(projected, projections[row])
        heat = show(probability, result.occluded.probability[row], cmap="viridis", extent=extent, vmin=0, vmax=1)
        probability.set_xlabel(f"whole image: {float(result.whole.probability[row]):.1%}")
        figure.colorbar(heat, cax=bar_d)
        bar_d.yaxis.set_major_formatter("{x:.0%}")
        _draw_classes(predicted, result.occluded.predicted[row].numpy(), classes, colours, extent)
        for panel in (image, activation, probability, predicted):
            panel.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
            if boxes is not None and panel is not image:
                outline_box(panel, boxes[row], WHITE)
    return figure


def _extent(result: Occlusion, size: int) -> tuple[float, float, float, float]:
    """Return the edges of the maps in the image's pixels: each cell is centred on its square."""
    stride = float(result.starts[1] - result.starts[0]) if len(result.starts) > 1 else float(size)
    low = float(result.starts[0]) + result.patch / 2 - stride / 2 - 0.5
    high = float(result.starts[-1]) + result.patch / 2 + stride / 2 - 0.5
    return low, high, high, low


def _draw_projections(panel: Axes, shown: Panels) -> None:
    """Draw image and projection side by side, two by two, the occluded image's first and in a red frame."""
    panel.axis("off")
    for number, title in enumerate(shown.titles):
        left, bottom = 0.51 * (number % 2), 0.53 * (1 - number // 2)
        tile = panel.inset_axes((left, bottom, 0.49, 0.43))
        show(tile, np.concatenate([shown.images[number], shown.projections[number]], axis=1))
        tile.set_title(title, fontsize=8, pad=2, parse_math=False)
        if number == 0:
            tile.spines[:].set(visible=True, color=RED, linewidth=1.5)


def _draw_classes(
    panel: Axes,
    labels: np.ndarray,
    classes: Sequence[str],
    colours: Mapping[int, str],
    extent: tuple[float, float, float, float],
) -> None:
    """Draw a map of class numbers, with a legend of those that occur, most frequent first."""
    place = {c: n for n, c in enumerate(colours)}
    show(
        panel,
        np.vectorize(place.__getitem__)(labels),
        cmap=ListedColormap(list(colours.values())),
        extent=extent,
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        interpolation="nearest",
    )
    order = sorted(set(labels.ravel().tolist()), key=lambda c: -int((labels == c).sum()))
    names = plain(classes[c] for c in order[:_NAMED])
    patches = [Patch(color=colours[c], label=name) for c, name in zip(order, names, strict=False)]
    panel.legend(handles=patches, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=1)
