"""job=correspondence: does hiding the same part of different objects change features alike (paper, Table 1)?

ε_i is the change of image i's features when a part of its object is masked. Δ is the mean, over pairs of images and
over dimensions, of H(sign ε_i, sign ε_j), H being 1 where two signs differ. Signs have three values: most features
stay 0, and zeros agree. A small Δ says that the part matters in the same way in every image.

Source: Zeiler & Fergus 2013, section 4.4, Fig. 8 and Table 1. Ours: the control "same place" (one random place for
all images) and the permutation test against random places.
"""

from __future__ import annotations

import csv
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Optional

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from zfnet.config.errors import UserError
from zfnet.config.schema import Config, DataConfig
from zfnet.data.decode import UnreadableImage, fit_square, read_image
from zfnet.explain.selection import Look, chosen_split, mean_colour, pick_layers, predict, sample, take, to_inputs
from zfnet.model.chain import Chain
from zfnet.plots.figures import LIGHT_BLUE, PALE, SOFT, new_figure, plain, save_figure, styled
from zfnet.plots.pictures import show_mosaic, to_pixels
from zfnet.runs.session import own_directory
from zfnet.training.loaded import LoadedRun

log = logging.getLogger("zfnet")

SAME, RANDOM = "same place", "random"
MARGIN = 1.6  # built-in shapes are then as large as the larger ones that the network was trained on
COLUMNS = ("image", "part", "x", "y")  # of a table of points
_EXAMPLES = 4  # images in the figure


@dataclass(kw_only=True)
class CorrespondenceJob(Look):
    """See conf/job/correspondence.yaml."""

    points: Optional[str]
    count: Annotated[int, Field(ge=2)]
    layers: Optional[list[str]]
    patch: Optional[Annotated[int, Field(ge=1)]]
    fill: Optional[Annotated[float, Field(ge=0, le=255)]]
    permutations: Annotated[int, Field(ge=1, le=1_000_000)]

    def main(self, config: Config, output: Path) -> None:
        """Write figures/correspondence.png, and correspondence.csv and .json, a table like the paper's."""
        loaded = LoadedRun(config)
        chain, size, batch_size = loaded.chain, loaded.data.image_size, loaded.data.batch_size
        last_conv_and_last_hidden = [*chain.conv_layers[-1:], *chain.layers[-2:-1]]
        layers = pick_layers(chain, "job.layers", self.layers, last_conv_and_last_hidden)
        patch = self.patch or max(1, size // 4)
        if patch >= size:
            raise UserError(f"job.patch={patch}: the masks must be smaller than the image, which is {size} px")
        marked = quarters_of_boxes(loaded) if self.points is None else read_points(loaded, Path(self.points))
        with own_directory(config, output) as run:
            count, fill = len(marked.groups), mean_colour(loaded, self.fill)
            centres = {
                **marked.parts,
                SAME: random_centres(1, size, patch, config.seed + 1).expand(count, -1),
                RANDOM: random_centres(count, size, patch, config.seed),
            }
            masked = {part: mask(marked.inputs, places, patch, fill) for part, places in centres.items()}
            signs = {k: sign_changes(chain, marked.inputs, hidden, layers, batch_size) for k, hidden in masked.items()}
            table: dict[str, dict[str, Agreement]] = {layer: {} for layer in layers}
            for layer, agreements in table.items():
                for part in (*marked.parts, SAME):
                    pair = signs[part][layer], signs[RANDOM][layer]
                    agreements[part], baseline = compare(*pair, marked.groups, self.permutations, config.seed)
                agreements[RANDOM] = baseline  # last, as in the paper
            examples = {part: to_pixels(hidden[:_EXAMPLES], loaded.data) for part, hidden in masked.items()}
            save_figure(draw_correspondence(table, examples), run.figures / "correspondence.png")
            rows = {k: {p: dataclasses.asdict(a) for p, a in parts.items()} for k, parts in table.items()}
            flat = [{"layer": k, "part": p, **row} for k, parts in rows.items() for p, row in parts.items()]
            run.write_csv("correspondence.csv", flat)
            accuracy = None
            if self.points is None:
                correct = predict(loaded, marked.inputs).argmax(1) == marked.groups
                accuracy = float(correct.float().mean())
            summary = {"images": count, "patch": patch, "aligned": self.points is None, "accuracy": accuracy}
            run.write_json("correspondence.json", {**summary, "table": rows})
            log.info("Δ over pairs of %d images, ± its standard deviation; p: against random places", count)
            for part in table[layers[0]]:
                cells = []
                for layer in layers:
                    row = table[layer][part]
                    p = "" if row.p is None else f", p {row.p:.4f}"
                    cells.append(f"{layer} {row.delta:.3f} ± {row.spread:.3f}{p}")
                log.info("  %-12s %s", part, "; ".join(cells))
            log.info("written to %s", run.folder)


# ---- images with parts


@dataclass(frozen=True)
class Marked:
    """Images with marked parts of their objects.

    inputs: [N, 3, S, S], normalised, on the device; parts: name → centres (y, x) [N, 2] in input pixels
    groups: int64 [N]; images of one group are compared with each other
    """

    inputs: Tensor
    parts: dict[str, Tensor]
    groups: Tensor


def quarters_of_boxes(loaded: LoadedRun) -> Marked:
    """Return images of the split whose boxes are known, cut to the boxes, with the boxes' quarters as parts."""
    split = chosen_split(loaded)
    if split.images.boxes is None:
        raise UserError(
            f"data={loaded.data.name}: only data=shapes knows where parts are; name them in a table, job.points=…"
        )
    chosen = take(loaded, split, sample(loaded, split.images, loaded.config.job.count))
    assert chosen.boxes is not None
    return Marked(
        cut_to_boxes(chosen.inputs, chosen.boxes),
        quarter_centres(chosen.boxes, loaded.data.image_size),
        chosen.labels.cpu(),
    )


def cut_to_boxes(images: Tensor, boxes: Tensor, margin: float = MARGIN) -> Tensor:
    """Return images [N, 3, S, S] cut to a square around each box, as large as the image; outside: 0, the mean colour.

    boxes: [N, 4] (top, left, bottom, right). The square's side is `margin` times the box's longer side, so the
    object fills 1 / margin of the image and parts of equal objects are at equal places.
    """
    size = images.shape[-1]
    top, left, bottom, right = boxes.T
    side = margin * torch.maximum(bottom - top, right - left)
    matrices = torch.zeros(len(images), 2, 3)
    matrices[:, 0, 0] = matrices[:, 1, 1] = side / size
    matrices[:, 0, 2] = (left + right) / size - 1
    matrices[:, 1, 2] = (top + bottom) / size - 1
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False).to(images)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def quarter_centres(boxes: Tensor, size: int, margin: float = MARGIN) -> dict[str, Tensor]:
    """Return the centres (y, x) [N, 2] of the boxes' quarters in images that `cut_to_boxes` made."""
    extent = boxes[:, 2:] - boxes[:, :2]
    reach = extent / extent.amax(1, keepdim=True) * size / margin / 4
    return {
        f"{vertical} {horizontal}": size / 2 - 0.5 + reach * torch.tensor([down, right])
        for vertical, down in (("upper", -1.0), ("lower", 1.0))
        for horizontal, right in (("left", -1.0), ("right", 1.0))
    }


def read_points(loaded: LoadedRun, table: Path) -> Marked:
    """Read a CSV with the columns image, part, x, y: files beside the table, and pixels in them from the top left.

    Every image must have every part once. Raises UserError naming the first thing that is wrong.
    """
    places, order = _read_table(table)
    pixels, centres = [], {part: torch.zeros(len(places), 2) for part in order}
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
                raise UserError(f"{table}: {part} of {name} lies outside what the network sees of the image")
            centres[part][number] = torch.tensor(point)
    inputs = to_inputs(loaded, torch.stack(pixels))
    return Marked(inputs, centres, torch.zeros(len(places), dtype=torch.int64))


def to_input_pixels(
    point: tuple[float, float], image_size: tuple[int, int], stored: int, data: DataConfig
) -> tuple[float, float]:
    """Return (y, x) in network input of a point (x, y) in a file of (width, height) pixels."""
    window = data.crop_size or stored
    moved = []
    for value, length in zip(point, image_size, strict=True):
        seen = min(image_size) if data.fit == "crop" else length
        kept = (value - (length - seen) / 2) * stored / seen
        moved.append((kept - (stored - window) // 2) * data.image_size / window)
    return moved[1], moved[0]


def _read_table(table: Path) -> tuple[dict[str, dict[str, tuple[float, float]]], list[str]]:
    """Return image → part → (x, y), and the parts in the table's order."""
    places: dict[str, dict[str, tuple[float, float]]] = {}
    order: dict[str, None] = {}
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (rows.fieldnames or ())]
            if missing:
                raise UserError(f"{table}: lacks the column {missing[0]}; it needs {', '.join(COLUMNS)}")
            for line, row in enumerate(rows, 2):
                parts = places.setdefault(row["image"], {})
                if row["part"] in parts:
                    raise UserError(f"{table}, line {line}: {row['part']} of {row['image']} is there already")
                try:
                    parts[row["part"]] = (float(row["x"]), float(row["y"]))
                except (TypeError, ValueError):
                    raise UserError(f"{table}, line {line}: x={row['x']}, y={row['y']} are not numbers") from None
                order[row["part"]] = None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"job.points={table} cannot be read ({error})") from error
    if len(places) < 2:
        raise UserError(f"{table}: names {len(places)} images; it takes two to compare")
    return places, list(order)


def random_centres(count: int, size: int, patch: int, seed: int) -> Tensor:
    """Return places (y, x) [N, 2] where a mask lies within the image, each as likely as any other."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, size - patch + 1, (count, 2), generator=generator) + (patch - 1) / 2


# ---- measurement


@dataclass(frozen=True)
class Agreement:
    """How far one part's changes differ between images, in one layer.

    delta: Δ, the mean over pairs of the share of dimensions that differ; spread: its standard deviation over pairs
    pairs: how many; random_delta, random_spread: the same for masks at random places
    p: of the paired permutation test that the part is no better than random places; None for these themselves
    """

    delta: float
    spread: float
    pairs: int
    random_delta: float
    random_spread: float
    p: float | None


def mask(images: Tensor, centres: Tensor, patch: int, fill: Tensor) -> Tensor:
    """Return images [N, 3, S, S] with a square of side `patch` around each one's centre (y, x) [N, 2] filled, [3]."""
    along = torch.arange(images.shape[-1], device=images.device)
    start = (centres.to(images.device) - (patch - 1) / 2).round()
    hidden = (along >= start[..., None]) & (along < start[..., None] + patch)  # [N, 2, S]
    square = hidden[:, 0, :, None] & hidden[:, 1, None, :]
    return torch.where(square[:, None], fill.to(images).view(1, 3, 1, 1), images)


@torch.no_grad()
def sign_changes(
    chain: Chain, images: Tensor, masked: Tensor, layers: Sequence[str], batch_size: int
) -> dict[str, Tensor]:
    """Return, for each layer, the signs of ε = features(image) − features(masked): int8 [N, D]."""
    signs: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for whole, hidden in zip(images.split(batch_size), masked.split(batch_size), strict=True):
        # side by side in one batch, so that equal inputs give outputs that are equal to the bit
        outputs = chain.activations(torch.cat([whole, hidden]), layers)
        for layer in layers:
            before, after = outputs[layer].flatten(1).split(len(whole))
            signs[layer].append((before - after).sign().to(torch.int8))
    return {layer: torch.cat(chunks) for layer, chunks in signs.items()}


def disagreement(signs: Tensor) -> Tensor:
    """Return the share of dimensions in which each pair of rows differs: float [N, N] from signs [N, D] of −1, 0, 1."""
    agree = torch.zeros(len(signs), len(signs), device=signs.device)
    for value in (-1, 0, 1):
        members = (signs == value).float()
        agree += members @ members.T  # whole numbers below 2²⁴: exact in float32
    return (1 - agree / signs.shape[1]).cpu()


def compare(
    part: Tensor, at_random: Tensor, groups: Tensor, permutations: int, seed: int
) -> tuple[Agreement, Agreement]:
    """Return how well a part agrees, and how well random places do.

    part, at_random: signs [N, D] of the same images; groups: int64 [N], pairs are formed within a group only.
    The test: if part and random place were alike, each image's two changes could be exchanged. It samples such
    exchanges and counts how often Δ(random) − Δ(part) is as large as observed. Raises UserError where no two images
    share a group.
    """
    count = len(groups)
    pair = ((groups[:, None] == groups) & ~torch.eye(count, dtype=torch.bool)).double()
    if not pair.any():
        raise UserError("there are no two images of one class to compare: raise job.count")
    table = disagreement(torch.cat([part, at_random])).double()
    own = torch.arange(count)
    observed = _difference(table, pair, own[None], own[None] + count)[0]
    generator = torch.Generator().manual_seed(seed)
    swaps = (torch.rand(permutations, count, generator=generator) < 0.5).long()
    permuted = [_difference(table, pair, own + count * s, own + count * (1 - s)) for s in swaps.split(200)]
    p = (1 + int((torch.cat(permuted) >= observed - 1e-12).sum())) / (1 + permutations)
    upper = pair.bool().triu()
    here, there = table[:count, :count][upper], table[count:, count:][upper]
    mean, spread = float(there.mean()), float(there.std(correction=0))
    return (
        Agreement(float(here.mean()), float(here.std(correction=0)), len(here), mean, spread, p),
        Agreement(mean, spread, len(there), mean, spread, None),
    )


def _difference(table: Tensor, pair: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return Δ(second) − Δ(first) [B] for rows of the table, int64 [B, N] each."""
    means = [(table[r[:, :, None], r[:, None, :]] * pair).sum((1, 2)) / pair.sum() for r in (first, second)]
    return means[1] - means[0]


# ---- figure


@styled
def draw_correspondence(table: Mapping[str, Mapping[str, Agreement]], examples: Mapping[str, Tensor]) -> Figure:
    """Draw a column of masked images for each part (paper, Fig. 8) and Δ by part for each layer, random places last.

    table: layer → part → its agreement; examples: part → uint8 [M, S, S, 3].
    """
    parts, widths = list(examples), (1.15 * len(examples) + 0.3, 3.6 * len(table))
    figure = new_figure(figsize=(sum(widths), 5.2))
    figure.suptitle("Does hiding the same part of different images change features alike?")
    left, right = figure.subfigures(1, 2, width_ratios=widths)  # type: ignore[misc]
    count, size = next(iter(examples.values())).shape[:2]
    panel = left.subplots()
    tiles = torch.stack([examples[part][n] for n in range(count) for part in parts])
    show_mosaic(panel, tiles, plain(parts), gap=max(2, size // 24))
    panel.set_title(f"Masks on the first {count} images")
    axes = right.subplots(1, len(table), squeeze=False, sharey=True)[0]
    for axis, (layer, rows) in zip(axes, table.items(), strict=True):
        for y, row in enumerate(rows.values()):
            colour = PALE if row.p is None else LIGHT_BLUE
            axis.barh(y, row.delta, xerr=row.spread, color=colour, ecolor=SOFT, height=0.65)
            p = "" if row.p is None else f"  p = {row.p:.3g}"
            axis.text(row.delta + row.spread, y, f" {row.delta:.3f}{p}", va="center")
        axis.axvline(rows[RANDOM].delta, color=SOFT, ls="--", lw=1)
        axis.set_yticks(range(len(rows)), plain(rows))
        axis.grid(axis="y", visible=False)
        axis.set(
            title=f"{layer} (dashed: random places)",
            xlabel="sign difference Δ: mean and deviation over pairs\n(small: the part matters alike)",
            xlim=(0, 1.75 * max(row.delta + row.spread for row in rows.values())),
        )
    axes[0].invert_yaxis()
    return figure
