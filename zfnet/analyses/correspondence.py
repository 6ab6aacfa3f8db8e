"""job=correspondence: does hiding the same part of different objects change features similarly (paper, Table 1)?

ε_i is the change of image i's features when a part of its object is masked. Δ is the mean of H(sign ε_i, sign ε_j) over
pairs of images and over dimensions; H is 1 if the signs differ, otherwise 0. A sign is −1, 0 or 1. Most features stay
0, and zeros agree, so Δ is small if little changes. κ = 1 − Δ / E[Δ] corrects for this: E[Δ] is the Δ of independent
signs with the same frequencies as in the two images. κ is 0 by chance and 1 for equal changes.

Source: Zeiler & Fergus 2013, section 4.4, Fig. 8 and Table 1. κ and the test are ours. Masks at the same place of all
objects change features similarly even in an untrained network, so a part is ranked among many such places, drawn at
random: p is the share of places with at least the κ of the part (Holm's correction over parts and layers).
"""

import csv
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from zfnet.config.errors import UserError, log
from zfnet.config.schema import Config, DataConfig, Positive
from zfnet.data.decode import UnreadableImage, fit_square, read_image
from zfnet.explain.boxes import cover
from zfnet.explain.selection import Look, chosen_split, fill_colour, pick_layers, predict, sample, take, to_inputs
from zfnet.model.chain import Network
from zfnet.plots.figures import LIGHT_BLUE, PALE, SOFT, new_figure, plain, save_figure, styled
from zfnet.plots.pictures import show_mosaic, to_pixels
from zfnet.runs.session import own_directory
from zfnet.runs.statistics import holm, rank_p
from zfnet.runs.tables import shorten
from zfnet.training.loaded import LoadedRun

SAME, RANDOM = "same place", "random"
MARGIN = 1.6  # built-in shapes become as large as the larger shapes in the training images
COLUMNS = ("image", "part", "x", "y")  # required columns of a table of points
_CORNERS = {"\0first": ("left", "top"), "\0last": ("right", "bottom")}  # the optional columns of an object's box
_PLACES_AT_ONCE = 8  # in one forward pass, so that they share the outputs for the unmasked image
_EXAMPLES = 4  # number of images in the figure


@dataclass(kw_only=True)
class CorrespondenceJob(Look):
    """See conf/job/correspondence.yaml."""

    points: Optional[str]
    count: Annotated[int, Field(ge=2)]
    layers: Optional[list[str]]
    patch: Optional[Positive]
    fill: Optional[Annotated[float, Field(ge=0, le=255)]]
    places: Annotated[int, Field(ge=99, le=100_000)]

    def main(self, config: Config, output: Path) -> None:
        """Write figures/correspondence.png, correspondence.csv and .json (for parts), and same_places.csv."""
        loaded = LoadedRun(config)
        network, size = loaded.network, loaded.data.image_size
        last_conv_and_last_hidden = [*network.conv_layers[-1:], *network.last_hidden]
        layers = pick_layers(network, "job.layers", self.layers, last_conv_and_last_hidden)
        patch = self.patch or max(1, size // 4)
        if patch >= size:
            raise UserError(f"job.patch={patch}: the masks must be smaller than the image, which is {size} px")
        marked = quarters_of_boxes(loaded) if self.points is None else read_points(loaded, Path(self.points))
        with own_directory(config, output) as run:
            masks = Masks(patch, fill_colour(loaded, self.fill), loaded.data.batch_size)
            measured = measure(network, marked, layers, masks, self.places, config.seed)
            pictures = {
                part: to_pixels(mask(marked.inputs[:_EXAMPLES], centres[:_EXAMPLES], patch, masks.fill), loaded.data)
                for part, centres in measured.centres.items()
            }
            save_figure(draw_correspondence(measured, pictures), run.figures / "correspondence.png")
            rows = {k: {p: dataclasses.asdict(a) for p, a in parts.items()} for k, parts in measured.table.items()}
            flat = [{"layer": k, "part": p, **row} for k, parts in rows.items() for p, row in parts.items()]
            run.write_csv("correspondence.csv", flat)
            run.write_csv("same_places.csv", _place_rows(measured))
            accuracy = None
            if self.points is None:
                correct = predict(loaded, marked.inputs).argmax(1) == marked.groups
                accuracy = float(correct.float().mean())
            about = {"images": len(marked.groups), "patch": patch, "places": self.places, "accuracy": accuracy}
            run.write_json("correspondence.json", {**about, "table": rows})
            tests = len(layers) * len(marked.parts)
            pairs = measured.table[layers[0]][RANDOM].pairs
            log.info("%d images, %d pairs; Δ ± std over pairs", about["images"], pairs)
            log.info("p: rank of κ among %d same places on the object", self.places)
            log.info("(%d tests; the smallest p by Holm's correction: %.2g)", tests, tests / (1 + self.places))
            width, wide = (max(len(shorten(name, 32)) for name in names) for names in (layers, measured.centres))
            for layer, parts in measured.table.items():
                for part, row in parts.items():
                    kappa = "  –  " if row.kappa is None else f"{row.kappa:.3f}"
                    p = "" if row.p_holm is None else f", p {row.p:.2g} (Holm {row.p_holm:.2g})"
                    std = "" if row.std is None else f" ± {row.std:.3f}"
                    measures = f"κ {kappa}, Δ {row.delta:.3f}{std}, {row.changed:.0%} changed{p}"
                    log.info(f"  {shorten(layer, 32):<{width}} {shorten(part, 32):<{wide}} {measures}")


# ---- images with parts


@dataclass(frozen=True)
class MarkedImages:
    """Images with marked parts of their objects.

    inputs: [N, 3, S, S], normalised, on the device; parts: name → centres (y, x) [N, 2] in input pixels,
    from the first pixel's centre
    boxes: [N, 4], the objects' (top, left, bottom, right) in input pixels: random masks are centred in them
    groups: int64 [N]; images of one group are compared with each other
    """

    inputs: Tensor
    parts: dict[str, Tensor]
    boxes: Tensor
    groups: Tensor

    def on_objects(self, places: Tensor) -> Tensor:
        """Convert places [M, N or 1, 2], in 0 … 1 of each object's box, to centres (y, x) in pixels: [M, N, 2]."""
        return self.boxes[:, :2] + places * (self.boxes[:, 2:] - self.boxes[:, :2]) - 0.5


def quarters_of_boxes(loaded: LoadedRun) -> MarkedImages:
    """Return images of the split, cut to their boxes, with the quarters of the boxes as parts."""
    split = chosen_split(loaded)
    if split.images.boxes is None:
        raise UserError(
            f"data={loaded.data.name}: only data=shapes records where parts are; list them in a table, job.points=…"
        )
    chosen = take(loaded, split, sample(loaded, split.images, loaded.config.job.count))
    assert chosen.boxes is not None
    return mark_quarters(chosen.inputs, chosen.boxes, chosen.labels.cpu())


def mark_quarters(images: Tensor, boxes: Tensor, groups: Tensor) -> MarkedImages:
    """Cut images [N, 3, S, S] to a square around each box, resized to S × S, with the quarters of the boxes as parts.

    boxes: [N, 4] (top, left, bottom, right). The square's side is MARGIN times the box's longer side, so the object
    fills 1 / MARGIN of the image, and equal objects have their parts at equal places. Pixels outside the image are 0.
    """
    size, extent = images.shape[-1], boxes[:, 2:] - boxes[:, :2]
    longer = extent.amax(1, keepdim=True)
    matrices = torch.zeros(len(images), 2, 3)
    matrices[:, [0, 1], [0, 1]] = MARGIN * longer / size
    matrices[:, :, 2] = (boxes[:, :2] + boxes[:, 2:]).flip(1) / size - 1
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False).to(images)
    cut = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    middle, half = size / 2, extent / longer * (size / 2) / MARGIN
    marked = MarkedImages(cut, {}, torch.cat([middle - half, middle + half], 1), groups)
    for vertical, y in (("upper", 0.25), ("lower", 0.75)):
        for horizontal, x in (("left", 0.25), ("right", 0.75)):
            marked.parts[f"{vertical} {horizontal}"] = marked.on_objects(torch.tensor([[[y, x]]]))[0]
    return marked


def read_points(loaded: LoadedRun, table: Path) -> MarkedImages:
    """Read a CSV with the columns image (a file next to the table), part, x and y (pixels from the file's top left).

    Every image must have every part once. The columns left, top, right, bottom contain the object's box; without them
    the smallest box around the parts is used. Raises UserError that names the first problem.
    """
    places, order = _read_table(table)
    pixels, boxes = [], torch.zeros(len(places), 4)
    centres = {part: torch.zeros(len(places), 2) for part in order}
    size = loaded.metadata.stored_size
    for number, (name, parts) in enumerate(places.items()):
        try:
            image = read_image(table.parent / name, loaded.data.max_pixels)
        except UnreadableImage as error:
            raise UserError(f"{table.parent / name} cannot be read as an image ({error})") from error
        pixels.append(torch.from_numpy(fit_square(image, size, loaded.data.fit).copy()))
        for part in order:
            if part not in parts:
                raise UserError(f"{table}: image {name} has no {part}: every image needs every part")
            point = to_input_pixels(parts[part], image.size, size, loaded.data)
            if not all(0 <= p < loaded.data.image_size for p in point):
                raise UserError(f"{table}: {part} of {name} is outside the area of the image that the network sees")
            centres[part][number] = torch.tensor(point)
        around = torch.stack([centres[part][number] for part in order])
        boxes[number] = torch.cat([around.amin(0), around.amax(0)])
        if _CORNERS.keys() <= parts.keys():
            corners = [to_input_pixels(parts[corner], image.size, size, loaded.data) for corner in _CORNERS]
            boxes[number] = torch.tensor(corners).flatten().clamp(0, loaded.data.image_size)
        extent = boxes[number, 2:] - boxes[number, :2]
        if not (extent.min() >= 0 and extent.max() >= 1):
            raise UserError(f"{table}: {name} has no box: give the object's in the columns left, top, right, bottom")
    inputs = to_inputs(loaded, torch.stack(pixels))
    indices = {part: points - 0.5 for part, points in centres.items()}  # as `on_objects`: 0 is the first pixel's centre
    return MarkedImages(inputs, indices, boxes, torch.zeros(len(places), dtype=torch.int64))


def to_input_pixels(
    point: tuple[float, float], image_size: tuple[int, int], stored: int, data: DataConfig
) -> tuple[float, float]:
    """Convert a point (x, y) in a file of (width, height) pixels to (y, x) in the network's input."""
    window = data.crop_size or stored
    moved = []
    for value, length in zip(point, image_size, strict=True):
        seen = min(image_size) if data.fit == "crop" else length
        kept = (value - (length - seen) / 2) * stored / seen
        moved.append((kept - (stored - window) // 2) * data.image_size / window)
    return moved[1], moved[0]


def _read_table(table: Path) -> tuple[dict[str, dict[str, tuple[float, float]]], list[str]]:
    """Return image → part → (x, y), and the parts in the order of the table."""
    places: dict[str, dict[str, tuple[float, float]]] = {}
    order: dict[str, None] = {}
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (rows.fieldnames or ())]
            if missing:
                raise UserError(f"{table}: has no column {missing[0]}; it needs {', '.join(COLUMNS)}")
            boxed = {"left", "top", "right", "bottom"} <= set(rows.fieldnames or ())
            for line, row in enumerate(rows, 2):
                if empty := next((c for c in COLUMNS if not row[c]), None):
                    raise UserError(f"{table}, line {line}: has no {empty}; it needs {', '.join(COLUMNS)}")
                if row["part"] in (SAME, RANDOM):
                    raise UserError(
                        f"{table}, line {line}: part={row['part']}: is the name of a control; rename the part"
                    )
                parts = places.setdefault(row["image"], {})
                if row["part"] in parts:
                    raise UserError(f"{table}, line {line}: {row['part']} of {row['image']} is already listed")
                for part, (x, y) in {row["part"]: ("x", "y"), **(_CORNERS if boxed else {})}.items():
                    try:
                        parts[part] = (float(row[x]), float(row[y]))
                    except (TypeError, ValueError):
                        raise UserError(f"{table}, line {line}: {x}={row[x]}, {y}={row[y]} are not numbers") from None
                order[row["part"]] = None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"job.points={table} cannot be read ({error})") from error
    if len(places) < 2:
        raise UserError(f"{table}: names {len(places)} images; a comparison needs two")
    return places, list(order)


# ---- measurement


class Masks(NamedTuple):
    """patch: side of the squares in input pixels; fill: [3], their colour; batch_size: images in one forward pass."""

    patch: int
    fill: Tensor
    batch_size: int


@dataclass(frozen=True)
class Agreement:
    """How well the changes of one part agree between images, in one layer.

    delta: Δ, the mean over pairs of the share of dimensions that differ; std: its sample standard deviation over pairs
    pairs: number of pairs (not independent, since they share images); changed: mean share of dimensions that change
    kappa: 1 − Δ / E[Δ], see the top of this file; None if nothing changes
    p: share of same places, including the part, with at least this κ (1 if nothing changes)
    p_holm: p after Holm's correction over all parts and layers
    """

    delta: float
    std: float | None
    pairs: int
    changed: float
    kappa: float | None
    p: float | None = None
    p_holm: float | None = None


@dataclass(frozen=True)
class Measured:
    """table: layer → row → agreement. The rows are the parts, `same place` (the mean of many) and `random`.

    places: [K, 2], the same places (y, x) in 0 … 1 of the objects' boxes; same: layer → the agreement of each place
    centres: row → the centres of its masks in the images, [N, 2]; for `same place` those of the first place
    """

    table: dict[str, dict[str, Agreement]]
    places: Tensor
    same: dict[str, list[Agreement]]
    centres: dict[str, Tensor]


def measure(
    network: Network, marked: MarkedImages, layers: Sequence[str], masks: Masks, places: int, seed: int
) -> Measured:
    """Measure the agreement of every part, of a random place on each object, and of `places` same places on all.

    Raises UserError if no two images are in the same group.
    """
    generator = torch.Generator().manual_seed(seed)
    anywhere = marked.on_objects(torch.rand(1, len(marked.groups), 2, generator=generator))[0]
    same_places = torch.rand(places, 2, generator=generator)
    every = torch.cat([torch.stack([*marked.parts.values(), anywhere]), marked.on_objects(same_places[:, None])])
    agreements: dict[str, list[Agreement]] = {layer: [] for layer in layers}
    with tqdm(total=len(every), desc="correspondence", unit="place", disable=None, leave=False) as bar:
        for centres in every.split(_PLACES_AT_ONCE):
            for layer, signs in sign_changes(network, marked.inputs, centres, masks, layers).items():
                agreements[layer] += [agreement(one, marked.groups) for one in signs]
            bar.update(len(centres))
    count = len(marked.parts)
    same = {layer: rows[count + 1 :] for layer, rows in agreements.items()}
    p = torch.stack([rank_p(_kappas(agreements[layer][:count]), _kappas(same[layer])[:, None]) for layer in layers])
    corrected, table = torch.tensor(holm(p.flatten().tolist()), dtype=p.dtype).view_as(p), {}
    for (layer, rows), alone, by_holm in zip(agreements.items(), p.tolist(), corrected.tolist(), strict=True):
        tests = zip(marked.parts, rows[:count], alone, by_holm, strict=True)
        parts = {part: dataclasses.replace(row, p=one, p_holm=all_) for part, row, one, all_ in tests}
        table[layer] = {**parts, SAME: _mean(same[layer]), RANDOM: rows[count]}
    shown = {**marked.parts, SAME: every[count + 1], RANDOM: anywhere}  # random is last, as in the paper
    return Measured(table, same_places, same, shown)


def _kappas(agreements: Sequence[Agreement]) -> Tensor:
    """Return the κ of each agreement, float64 [K]; −inf if nothing changes."""
    return torch.tensor([-torch.inf if a.kappa is None else a.kappa for a in agreements], dtype=torch.float64)


def _mean(agreements: Sequence[Agreement]) -> Agreement:
    kappas = [a.kappa for a in agreements if a.kappa is not None]
    return Agreement(
        delta=statistics.fmean(a.delta for a in agreements),
        std=None,
        pairs=agreements[0].pairs,
        changed=statistics.fmean(a.changed for a in agreements),
        kappa=statistics.fmean(kappas) if kappas else None,
    )


def mask(images: Tensor, centres: Tensor, patch: int, fill: Tensor) -> Tensor:
    """Fill a square of side `patch` around each image's centre (y, x) [N, 2] with the colour `fill`, [3]."""
    return cover(images, (centres.to(images.device) - (patch - 1) / 2).round(), patch, fill)


@torch.no_grad()
def sign_changes(
    network: Network, images: Tensor, centres: Tensor, masks: Masks, layers: Sequence[str]
) -> dict[str, Tensor]:
    """Return, for each layer, the signs of ε = features(image) − features(masked): int8 [M, N, D].

    images: [N, 3, S, S]; centres: [M, N, 2], the centre of each of M masks in each image
    """
    signs: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    size = max(1, masks.batch_size // (1 + len(centres)))
    for whole, where in zip(images.split(size), centres.split(size, 1), strict=True):
        hidden = [mask(whole, places, masks.patch, masks.fill) for places in where]
        # all in one batch, so that equal inputs have outputs that are equal bit for bit
        outputs = network.activations(torch.cat([whole, *hidden]), layers)
        for layer in layers:
            before, *after = outputs[layer].flatten(1).split(len(whole))
            signs[layer].append((before - torch.stack(after)).sign().to(torch.int8))
    return {layer: torch.cat(chunks, 1) for layer, chunks in signs.items()}


def disagreement(signs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the share of dimensions in which each pair of rows differs, and its expectation: float64 [N, N] each.

    signs: [N, D] of −1, 0 and 1. The expectation assumes independent signs with the frequencies of the two rows.
    """
    members = torch.stack([(signs == value).float() for value in (-1, 0, 1)])
    agree = (members @ members.mT).sum(0)  # integers below 2²⁴ are exact in float32
    often = members.mean(2).cpu().double()
    return 1 - agree.cpu().double() / signs.shape[1], 1 - often.T @ often


def agreement(signs: Tensor, groups: Tensor) -> Agreement:
    """Return the agreement of signs [N, D] within groups, int64 [N]; raise UserError if no group has two images."""
    pair = (groups[:, None] == groups).triu(1)
    if not pair.any():
        raise UserError("there are no two images of one class to compare: raise job.count or choose another job.split")
    differ, expected = (table[pair] for table in disagreement(signs))
    chance = float(expected.mean())
    return Agreement(
        delta=float(differ.mean()),
        std=float(differ.std(correction=1)) if len(differ) > 1 else None,
        pairs=len(differ),
        changed=float((signs != 0).float().mean()),
        kappa=1 - float(differ.mean()) / chance if chance > 1e-12 else None,
    )


def _place_rows(measured: Measured) -> list[dict[str, Any]]:
    """Return one row for each layer and same place."""
    return [
        {"layer": layer, "y_in_box": y, "x_in_box": x, "delta": a.delta, "changed": a.changed, "kappa": a.kappa}
        for layer, agreements in measured.same.items()
        for (y, x), a in zip(measured.places.tolist(), agreements, strict=True)
    ]


# ---- figure


@styled()
def draw_correspondence(measured: Measured, examples: Mapping[str, Tensor]) -> Figure:
    """Draw a column of masked images for each row of the table (paper, Fig. 8), and its κ in each layer.

    examples: row → uint8 [M, S, S, 3]
    """
    parts, widths = list(examples), (1.15 * len(examples) + 0.3, 3.9 * len(measured.table))
    figure = new_figure(figsize=(sum(widths), 5.2))
    marked = len(next(iter(measured.centres.values())))
    figure.suptitle(f"Does hiding the same part of {marked} images change features in the same way?")
    left, right = figure.subfigures(1, 2, width_ratios=widths)  # type: ignore[misc]
    count, size = next(iter(examples.values())).shape[:2]
    panel = left.subplots()
    tiles = torch.stack([examples[part][n] for n in range(count) for part in parts])
    show_mosaic(panel, tiles, plain(parts, 16), gap=max(2, size // 24))
    panel.set_title(f"Masks on the first {count} images")
    axes = right.subplots(1, len(measured.table), squeeze=False, sharex=True, sharey=True)[0]
    nulls = {layer: (k := _kappas(same))[k.isfinite()] for layer, same in measured.same.items()}
    every = [row.kappa or 0.0 for rows in measured.table.values() for row in rows.values()]
    lowest, largest = min([0.0, *every]), max([0.01, *every, *torch.cat(list(nulls.values())).tolist()])
    for axis, (layer, rows) in zip(axes, measured.table.items(), strict=True):
        null = nulls[layer]
        if len(null):
            low, high = null.quantile(torch.tensor([0.025, 0.975], dtype=null.dtype)).tolist()
            axis.axvspan(low, high, color=PALE, alpha=0.6, lw=0, zorder=0)
        for y, row in enumerate(rows.values()):
            axis.barh(y, row.kappa or 0.0, color=LIGHT_BLUE if row.p_holm is not None else SOFT, height=0.65)
            p = "" if row.p_holm is None else f"\np = {row.p:.2g}, by Holm {row.p_holm:.2g}"
            text = "nothing changes" if row.kappa is None else f"Δ {row.delta:.3f}, {row.changed:.0%} changed{p}"
            axis.text(1.03 * largest, y, text, va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), plain(rows, 20))
        axis.grid(axis="y", visible=False)
        axis.set(
            title=f"{shorten(layer, 40)}\n(grey: middle 95% of {len(measured.places)} same places)",
            xlabel="agreement κ beyond chance\n(1: the same change of features in every image)",
            xlim=(lowest, 1.9 * largest),
        )
    axes[0].set_xticks([tick for tick in axes[0].get_xticks() if lowest <= tick <= 1])
    axes[0].invert_yaxis()
    return figure
