"""job=occlusion: show what a network predicts while a grey square hides one part of an image after another.

Source: Zeiler & Fergus 2013, section 4.2 and Fig. 7. The paper gives neither the square's size nor its steps; ours
depend on the image's size. Places cover the whole image; at the borders the square extends beyond it and hides less.
A square of another colour tests each image's lowest place, which was chosen without this square. If a map depends on
its image, the probability falls more there than at the lowest places of other images. If the objects' boxes are known,
the place of the lowest probability shows whether the object matters: it is then in the box of its own image more often
than in the boxes of other images, which are near the middle, too.

The job works with any network. Panels b and c show the strongest map, and are left out if the deconvnet cannot project
it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Optional

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from zfnet.config.errors import UserError, log
from zfnet.config.schema import Config, Positive
from zfnet.data import ImageSet
from zfnet.explain.boxes import cover, in_boxes
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.maps import peaks
from zfnet.explain.selection import ChosenImages, Look, choose_images, chosen_split, fill_colour, pick_maps, to_inputs
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.model.chain import OUTPUT, Network
from zfnet.model.layers import full_precision
from zfnet.plots.figures import PALETTE, RED, WHITE, new_figure, plain, save_figure, styled
from zfnet.plots.pictures import on_grey, outline_box, show, to_pixels
from zfnet.runs.session import own_directory
from zfnet.runs.statistics import compare_own_with_others, format_percent
from zfnet.runs.tables import shorten, to_rows
from zfnet.training.loaded import LoadedRun

Extent = tuple[float, float, float, float]  # left, right, bottom and top of a map, as for `imshow`
OTHERS = 3  # images in panel c besides the occluded one (paper, Fig. 7)
_LEGEND_CLASSES = 8  # at most


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
        """Write figures/occlusion.png, the values of its maps (maps.csv), and a summary (occlusion.json)."""
        loaded = LoadedRun(config)
        data, network, problem = loaded.data, loaded.network, None
        layer = pick_maps(network, "job.layer", self.layer)
        if layer is not None:
            try:
                Deconvnet(network).check(layer)
            except UserError as error:
                problem = error
        patch, stride = resolve_patch_and_stride(data.image_size, self.patch, self.stride)
        square_starts(data.image_size, patch, stride)  # raises before any data is read
        split = chosen_split(loaded)
        chosen = choose_images(loaded, config, self.count)
        fill = fill_colour(loaded, self.fill)
        with own_directory(config, output) as run:
            if layer is None:
                log.info("without panels b and c: the network has no feature maps")
            elif problem is not None:
                log.info("without panel c, the projections: %s", problem)
            settings: dict[str, Any] = {"layer": layer, "patch": patch, "fill": fill, "batch_size": data.batch_size}
            result = occlude(network, chosen.inputs, chosen.labels, stride=stride, **settings)
            boxes = None
            if chosen.boxes is not None:
                many = choose_images(loaded, config, self.boxed_images)
                coarse = max(stride, patch // 2)  # only maps need finer steps
                occluded = occlude(network, many.inputs, many.labels, stride=coarse, **settings)
                boxes = box_evidence(occluded, many.boxes)
                boxes["correctly_classified"] = int((occluded.whole.predicted == many.labels.cpu()).sum())
            grey = sum(data.mean) / len(data.mean) * 255 if self.fill is None else self.fill
            second = fill_colour(loaded, 255 if grey < 64 else 0)
            falls = probability_falls(loaded.model, chosen.inputs, chosen.labels, result, second, data.batch_size)
            pictures = to_pixels(chosen.inputs, data).numpy()
            colour = (to_pixels(fill.view(1, 3, 1, 1), data).flatten() / 255).tolist()
            projected = layer if problem is None else None
            panels = project_strongest_map(loaded, projected, chosen.inputs, result.strongest, split.images)
            figure = draw_occlusion(result, pictures, chosen, loaded.classes, layer, panels, colour)
            save_figure(figure, run.figures / "occlusion.png")
            run.write_csv("maps.csv", _rows(result, chosen, loaded.classes))
            run.write_json("occlusion.json", _summarise(result, chosen, loaded.classes, falls, boxes))


# ---- measurement


class Outputs(NamedTuple):
    """The network's outputs for N whole images [N], or for N images occluded at P × P places [N, P, P].

    probability: that of the true class (panel d); predicted: int64, the most probable class (panel e); confidence: the
    probability of `predicted`
    """

    probability: Tensor
    predicted: Tensor
    confidence: Tensor


class StrongestMap(NamedTuple):
    """The map with the largest sum of activations on each whole image (panels b and c).

    channel: int64 [N]; peak: int64 [N, 2], its strongest position (y, x); whole: [N], its sum on the whole image;
    occluded: [N, P, P], its sum with the square at each place
    """

    channel: Tensor
    peak: Tensor
    whole: Tensor
    occluded: Tensor


@dataclass(frozen=True)
class Occlusion:
    """The outputs for N images without and with a square at P × P places, on the CPU.

    starts: int64 [P], the first row (and column) of the square at each place; can lie outside the image
    patch: side of the square in pixels
    strongest: None if no layer was given
    """

    starts: Tensor
    patch: int
    whole: Outputs
    occluded: Outputs
    strongest: StrongestMap | None

    @property
    def lowest(self) -> Tensor:
        """The place of the class's lowest probability in each image: int64 [N, 2], (row, column)."""
        return peaks(-self.occluded.probability[:, None])[1][:, 0]


def resolve_patch_and_stride(size: int, patch: int | None, stride: int | None) -> tuple[int, int]:
    """Return the side and the steps of the square in pixels. None means a fifth of the image and about 24 places.

    Raises UserError for a value below 1.
    """
    for name, value in (("patch", patch), ("stride", stride)):
        if value is not None and value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    patch = patch or max(1, size // 5)
    return patch, stride or max(1, min(patch, round(size / 24)))


def square_starts(size: int, patch: int, stride: int) -> Tensor:
    """Return the first row of the square at each place: int64 [⌈size / stride⌉], `stride` apart.

    The places are centred on the image and cover all of it. At the borders the square can extend beyond the image.
    Raises UserError if the square covers the whole image, or its steps leave gaps.
    """
    if patch >= size:
        raise UserError(f"job.patch={patch}: the occluder must be smaller than the image, which is {size} px")
    if stride > patch:
        raise UserError(f"job.stride={stride}: must be at most job.patch={patch}, so that every pixel is covered")
    places = -(-size // stride)
    beyond = (places - 1) * stride + patch - size
    return torch.arange(places) * stride - beyond // 2


@torch.no_grad()
@full_precision()
def occlude(
    network: Any,
    images: Tensor,
    labels: Tensor,
    *,
    layer: str | None,
    patch: int,
    stride: int,
    fill: Tensor,
    batch_size: int,
) -> Occlusion:
    """Slide a square over each image and record the network's outputs.

    network: an `nn.Module` in evaluation mode, or, to record the strongest map of `layer`, a `Network`
    images: [N, 3, S, S], normalised; labels: int64 [N]; fill: [3], the square's colour in the same units
    Occluded images are made batch by batch on the images' device. Raises UserError (see `square_starts`).
    """
    count, size, device = len(images), images.shape[-1], images.device
    fill = fill.to(images)
    starts = square_starts(size, patch, stride).to(device)
    side = len(starts)
    channel = peak = None
    if layer is not None:
        channel, peak = _strongest_maps(network, layer, images, batch_size)

    def outputs(inputs: Tensor, image: Tensor) -> list[Tensor]:
        sums = []
        if channel is None:
            logits = network(inputs)
        else:
            maps, logits = network.activations(inputs, [layer, OUTPUT]).values()
            sums = [maps[torch.arange(len(inputs), device=device), channel[image]].sum((1, 2))]
        probabilities = logits.softmax(1)
        confidence, predicted = probabilities.max(1)
        return [probabilities.gather(1, labels[image, None])[:, 0], predicted, confidence, *sums]

    whole = [outputs(images[index], index) for index in torch.arange(count, device=device).split(batch_size)]
    occluded, total = [], count * side**2
    with tqdm(total=total, desc="occlusion", unit="image", disable=None, leave=False, dynamic_ncols=True) as bar:
        for number in torch.arange(total, device=device).split(batch_size):
            image, row, column = number // side**2, number // side % side, number % side
            corners = torch.stack((starts[row], starts[column]), 1)
            occluded.append(outputs(cover(images[image], corners, patch, fill), image))
            bar.update(len(number))
    before = [torch.cat(chunks).cpu() for chunks in zip(*whole, strict=True)]
    there = [torch.cat(chunks).cpu().view(count, side, side) for chunks in zip(*occluded, strict=True)]
    strongest = None
    if channel is not None and peak is not None:
        strongest = StrongestMap(channel.cpu(), peak.cpu(), before[3], there[3])
    return Occlusion(starts.cpu(), patch, Outputs(*before[:3]), Outputs(*there[:3]), strongest)


@torch.no_grad()
@full_precision()
def probability_falls(
    network: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    result: Occlusion,
    fill: Tensor,
    batch_size: int,
) -> Tensor:
    """Return how much the class's probability falls in each image (row) at each image's lowest place: float64 [N, N].

    network: returns logits; images, labels: those of `result`; fill: [3], a colour other than that of `result`.
    The lowest of many places is partly lowest by chance; the other colour removes this bias of selection.
    """
    count, fill = len(images), fill.to(images)
    corners = result.starts[result.lowest].to(images.device)
    falls = []
    for number in torch.arange(count**2, device=images.device).split(batch_size):
        image = number // count
        logits = network(cover(images[image], corners[number % count], result.patch, fill))
        falls.append(logits.softmax(1).gather(1, labels[image, None])[:, 0].cpu())
    return result.whole.probability[:, None].double() - torch.cat(falls).view(count, count)


def _strongest_maps(network: Network, layer: str, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return the map with the largest sum in each image [N], and the map's strongest position (y, x) [N, 2]."""
    channels, places = [], []
    for chunk in images.split(batch_size):
        maps = network.activations(chunk, [layer])[layer]
        channels.append(maps.sum((2, 3)).argmax(1))
        places.append(peaks(maps)[1][torch.arange(len(chunk), device=maps.device), channels[-1]])
    return torch.cat(channels), torch.cat(places)


def box_evidence(result: Occlusion, boxes: Tensor | None) -> dict[str, Any]:
    """Compare own boxes with the others' [N, 4]: how often the lowest probability is inside, and the mean's change.

    A place is inside a box if the square's centre is.
    """
    assert boxes is not None
    inside = in_boxes(result.starts + result.patch / 2, boxes)  # [box, row, column]
    probability, (row, column) = result.occluded.probability, result.lowest.T
    within, outside = (probability[:, None].where(mask, torch.nan).nanmean((2, 3)) for mask in (inside, ~inside))
    return {
        "share_of_places_in_the_box": float(inside.float().mean()),
        "lowest_in_the_box": compare_own_with_others(inside[:, row, column].T),
        "probability_outside_minus_inside": compare_own_with_others(outside - within),
    }


def _rows(result: Occlusion, chosen: ChosenImages, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row for each image and place: the values of the figure's maps."""
    starts, columns = result.starts.tolist(), result.occluded._asdict()
    if result.strongest is not None:
        columns = {"activation": result.strongest.occluded, **columns}
    columns = {name: values.flatten().tolist() for name, values in columns.items()}
    columns["predicted"] = [classes[c] for c in columns["predicted"]]
    return to_rows(
        image=[name for name in chosen.names for _ in range(len(starts) ** 2)],
        top=[top for top in starts for _ in starts] * len(chosen),
        left=starts * len(starts) * len(chosen),
        **columns,
    )


def _summarise(
    result: Occlusion, chosen: ChosenImages, classes: Sequence[str], falls: Tensor, boxes: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return and log the results of each image, the control and, if boxes are known, whether the objects matter.

    falls: the result of `probability_falls`
    """
    images = []
    for number, (name, (y, x)) in enumerate(zip(chosen.names, result.lowest.tolist(), strict=True)):
        row = {
            "image": name,
            "class": classes[int(chosen.labels[number])],
            "class_is_the_truth": chosen.known,
            "probability": float(result.whole.probability[number]),
            "predicted": classes[int(result.whole.predicted[number])],
            "lowest_probability": float(result.occluded.probability[number, y, x]),
            "lowest_at": [int(result.starts[y]), int(result.starts[x])],
            "predicted_at_lowest": classes[int(result.occluded.predicted[number, y, x])],
        }
        others = torch.cat([falls[number, :number], falls[number, number + 1 :]])
        row["control"] = {"own": float(falls[number, number]), "others": float(others.mean()) if len(others) else None}
        if (strongest := result.strongest) is not None:
            row |= {"map": int(strongest.channel[number]), "activation": float(strongest.whole[number])}
        log.info(
            f"{name}: P {row['probability']:.1%}, at the lowest {row['lowest_probability']:.1%}, "
            f"where the prediction is {row['predicted_at_lowest']}"
        )
        images.append(row)
    summary: dict[str, Any] = {"patch": result.patch, "starts": result.starts.tolist(), "images": images}
    summary["control"] = control = compare_own_with_others(falls)
    if (std := control["difference"]["std"]) is not None:
        own, among, difference = (f"{100 * (row['mean'] or 0):.1f}" for row in control.values())
        log.info(
            f"a square of another colour lowers P by {own} points at the image's own lowest place, by {among} at the "
            f"other images'; difference {difference} ± {100 * std:.1f} (std, n = {len(falls)})"
        )
    if boxes is not None:
        summary["boxes"], lowest_in = boxes, boxes["lowest_in_the_box"]
        right = f"{boxes['correctly_classified']} of them correctly classified"
        own, among = (format_percent(lowest_in[key]) for key in ("own", "others"))
        difference = format_percent(lowest_in["difference"], "points")
        log.info(
            f"lowest in the object's box: {own} of {lowest_in['own']['n']} images, {right}; in other images' boxes: "
            f"{among}; difference {difference}"
        )
    return summary


# ---- figure


class Panels(NamedTuple):
    """Panel c: images, projections and titles; uint8 [1 + M, S, S, 3], with the occluded image first."""

    images: np.ndarray
    projections: np.ndarray
    titles: Sequence[str]


def project_strongest_map(
    loaded: LoadedRun, layer: str | None, inputs: Tensor, found: StrongestMap | None, images: ImageSet
) -> list[Panels]:
    """Project each image's strongest map in that image and in the images of the split that excite it most.

    Returns an empty list if `layer` is None.
    """
    if layer is None or found is None:
        return []
    search = TopActivations(OTHERS + 1, len(loaded.classes))
    strongest = collect(loaded.chain, images, loaded.batches, [layer], search).layers[layer]
    deconvnet, shown = Deconvnet(loaded.chain), []
    for number, channel in enumerate(found.channel.tolist()):
        places = strongest.places()[channel][strongest.filled[channel]].cpu()
        others = to_inputs(loaded, images.pixels(places[:, 0]))
        # the image itself can be among the strongest images of its split
        new = [k for k in range(len(others)) if not torch.equal(others[k], inputs[number])][:OTHERS]
        row = torch.cat([inputs[number : number + 1], others[new]])
        where = torch.cat([found.peak[number : number + 1], places[new, 1:]])
        units = [(k, channel, int(y), int(x)) for k, (y, x) in enumerate(where.tolist())]
        titles = ["this image", *(loaded.classes[c] for c in images.labels[places[new, 0]].tolist())]
        projections = on_grey(deconvnet.project(row, layer, units)).numpy()
        shown.append(Panels(to_pixels(row, loaded.data).numpy(), projections, titles))
    return shown


@styled()
def draw_occlusion(
    result: Occlusion,
    pictures: np.ndarray,
    chosen: ChosenImages,
    classes: Sequence[str],
    layer: str | None,
    projections: Sequence[Panels],
    fill: Sequence[float],
) -> Figure:
    """Draw five panels for each image (paper, Fig. 7), without b if there is no `layer`, and c without projections.

    The square is at the place of the lowest probability. The dashed line is the object's box.
    pictures: uint8 [N, S, S, 3] of the chosen images; fill: the square's colour, in 0 … 1
    """
    rows, size, boxes = len(pictures), pictures.shape[1], chosen.boxes
    panels = {
        "image": ("(a) Image and square where\nthe probability is lowest", 1.0),
        "activation": (f"(b) Activation of the strongest\nmap of {layer}, summed", 1.0),
        "activation bar": ("", 0.05),
        "projections": (
            f"(c) Image and projection of that map of {layer},\nhere and where it is strongest (grey: no signal)",
            2.0,
        ),
        "probability": ("(d) Probability\nof the class", 1.0),
        "probability bar": ("", 0.05),
        "predicted": ("(e) Most probable\nclass", 1.0),
    }
    missing = ["activation", "activation bar"] if result.strongest is None else []
    missing += [] if projections else ["projections"]
    panels = {name: panel for name, panel in panels.items() if name not in missing}
    widths = [width for _, width in panels.values()]
    figure = new_figure(figsize=(2.95 * sum(widths), 1.1 + 2.9 * rows))
    dashed = "" if boxes is None else "; dashed: the object's box"
    figure.suptitle(f"Occlusion by a square of {result.patch} px; maps are drawn at the square's centre{dashed}")
    axes = figure.subplots(rows, len(panels), squeeze=False, width_ratios=widths)
    extent = _extent(result, size)
    predicted_classes = result.occluded.predicted.unique().tolist()  # sorted, so that colours are the same in every row
    count = len(predicted_classes)
    palette = PALETTE if count <= len(PALETTE) else colormaps["turbo"](np.linspace(0, 1, count))
    colours = dict(zip(predicted_classes, palette, strict=False))
    for axis, (title, _) in zip(axes[0], panels.values(), strict=True):
        axis.set_title(title)
    for row, of_row in enumerate(axes):
        panel = dict(zip(panels, of_row, strict=True))
        show(panel["image"], pictures[row])
        probability = result.occluded.probability[row]
        y, x = result.lowest[row].tolist()
        corner = (float(result.starts[x]) - 0.5, float(result.starts[y]) - 0.5)
        panel["image"].add_patch(Rectangle(corner, result.patch, result.patch, fc=tuple(fill), ec=WHITE, lw=0.8))
        panel["image"].set_ylabel(plain(chosen.names, 32)[row])
        if (strongest := result.strongest) is not None:
            heat = show(panel["activation"], strongest.occluded[row], cmap="magma", extent=extent, vmin=0)
            whole = float(strongest.whole[row])
            panel["activation"].set_xlabel(f"map {int(strongest.channel[row])}; whole image: {whole:.3g}")
            figure.colorbar(heat, cax=panel["activation bar"])
        if projections:
            _draw_projections(panel["projections"], projections[row])
        heat = show(panel["probability"], probability, cmap="viridis", extent=extent, vmin=0, vmax=1)
        panel["probability"].set_xlabel(f"whole image: {float(result.whole.probability[row]):.1%}")
        figure.colorbar(heat, cax=panel["probability bar"])
        panel["probability bar"].yaxis.set_major_formatter("{x:.0%}")
        _draw_classes(panel["predicted"], result.occluded.predicted[row].numpy(), classes, colours, extent)
        for name in ("image", "activation", "probability", "predicted"):
            if name in panel:
                panel[name].set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
                if boxes is not None and name != "image":
                    outline_box(panel[name], boxes[row], WHITE)
    return figure


def _extent(result: Occlusion, size: int) -> Extent:
    """Return the edges of the maps in the image's pixels. Each cell is centred on its square."""
    stride = float(result.starts[1] - result.starts[0]) if len(result.starts) > 1 else float(size)
    low = float(result.starts[0]) + result.patch / 2 - stride / 2 - 0.5
    high = float(result.starts[-1]) + result.patch / 2 + stride / 2 - 0.5
    return low, high, high, low


def _draw_projections(panel: Axes, shown: Panels) -> None:
    """Draw pairs of image and projection in a 2 × 2 grid. The occluded image is the first, in a red frame."""
    panel.axis("off")
    for number, title in enumerate(shown.titles):
        left, bottom = 0.51 * (number % 2), 0.53 * (1 - number // 2)
        tile = panel.inset_axes((left, bottom, 0.49, 0.43))
        show(tile, np.concatenate([shown.images[number], shown.projections[number]], axis=1))
        tile.set_title(shorten(title, 20), fontsize=8, pad=2, parse_math=False)
        if number == 0:
            tile.spines[:].set(visible=True, color=RED, linewidth=1.5)


def _draw_classes(
    panel: Axes, labels: np.ndarray, classes: Sequence[str], colours: Mapping[int, Any], extent: Extent
) -> None:
    """Draw a map of class numbers, with a legend of the classes in the map, most frequent first."""
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
    names = plain((classes[c] for c in order[:_LEGEND_CLASSES]), 32)
    patches = [Patch(color=colours[c], label=name) for c, name in zip(order, names, strict=False)]
    panel.legend(handles=patches, loc="center left", bbox_to_anchor=(1.02, 0.5), handlelength=1)
