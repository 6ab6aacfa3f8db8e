"""job=invariance: measure how features and predictions change as an image is shifted, scaled or rotated.

Source: Zeiler & Fergus 2013, section 4.1 and Fig. 5. Horizontal shifts, the mean over many images, and the unit of
distance are ours. The paper calls its axis "canonical distance" and does not define it; here 1 is the root mean square
distance between two different images.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Optional

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from zfnet.config.errors import UserError, log
from zfnet.config.schema import Config, Positive
from zfnet.explain.selection import Look, choose_images, chosen_split, pick_layers, sample, take
from zfnet.model.chain import OUTPUT, WEIGHTED, Network
from zfnet.plots.figures import INK, PALETTE, new_figure, plain, save_figure, styled
from zfnet.plots.pictures import show_mosaic, to_pixels
from zfnet.runs.session import own_directory
from zfnet.runs.tables import to_rows
from zfnet.training.loaded import LoadedRun

# transform → the unit of its amounts
TRANSFORMS = {
    "vertical translation": "shift in pixels (down: +)",
    "horizontal translation": "shift in pixels (right: +)",
    "scale": "factor",
    "rotation": "degrees counter-clockwise",
}


@dataclass(kw_only=True)
class InvarianceJob(Look):
    """See conf/job/invariance.yaml."""

    reads_images: ClassVar[bool] = True

    count: Positive
    mean_images: Annotated[int, Field(ge=2)]
    layers: Optional[list[str]]
    translation: Annotated[float, Field(gt=0, lt=1)]
    scale: Annotated[float, Field(gt=1, le=10)]
    rotation: Annotated[float, Field(gt=0, lt=360)]
    steps: Annotated[int, Field(ge=3, le=1000)]

    def main(self, config: Config, output: Path) -> None:
        """Write figures/invariance.png, every point of its curves (curves.csv), and invariance.json.

        In that file, `mean_at_largest` contains the extremes over all amounts: the largest mean distances, and the
        lowest mean probability.
        """
        loaded = LoadedRun(config)
        network, data = loaded.network, loaded.data
        weighted = [name for name in network.layers if isinstance(network.model.get_submodule(name), WEIGHTED)]
        first_and_last_hidden = [*(weighted or network.layers)[:1], *network.last_hidden]
        layers = pick_layers(network, "job.layers", self.layers, first_and_last_hidden)
        amounts = make_amounts(data.image_size, self.translation, self.scale, self.rotation, self.steps)
        split = chosen_split(loaded)
        chosen = choose_images(loaded, config, self.count)
        many = take(loaded, split, sample(loaded, split.images, self.mean_images))
        if len(many) < 2:
            raise UserError(f"job.split={split.name}: has one image, and a mean needs two")
        with own_directory(config, output) as run:
            units = typical_distance(network, many.inputs, layers, data.batch_size)
            own, mean = (measure(network, c.inputs, c.labels, amounts, layers, data.batch_size) for c in (chosen, many))
            examples = {}
            for name, steps in amounts.items():
                moved = transform_images(chosen.inputs, name, steps[[0, len(steps) // 2, -1]])
                examples[name] = to_pixels(moved.flatten(0, 1), data)
            figure = draw_invariance(own, mean, units, examples, chosen.names)
            save_figure(figure, run.figures / "invariance.png")
            rows = _rows(own, units, chosen.names, "own curve") + _rows(mean, units, many.names, "mean")
            run.write_csv("curves.csv", rows)
            log.info("mean over %d images; distance 1: as far apart as two different images", len(many))
            extremes: dict[str, dict[str, float | None]] = {}
            for name, curve in mean.items():
                largest = {layer: float(d.mean(0).max() / units[layer]) for layer, d in curve.distances.items()}
                lowest = float(curve.probability.mean(0).min())
                canonical = {f"canonical_{layer}": d if units[layer] else None for layer, d in largest.items()}
                extremes[name] = {**canonical, "probability": lowest}
                distances = ", ".join(f"{layer} up to {distance:.2f}" for layer, distance in largest.items())
                at_rest = curve.probability[:, curve.amounts == identity(name)].mean()
                log.info("  %-22s %s; P from %.2f to %.2f", name, distances, at_rest, lowest)
            summary = {"images_in_the_mean": len(many), "layers": layers, "distance_between_two_images": units}
            run.write_json("invariance.json", {**summary, "mean_at_largest": extremes})


# ---- measurement


@dataclass(frozen=True)
class Curves:
    """The curves of one transform for N images at A amounts, on the CPU.

    amounts: float [A], in pixels (down or right), as a factor, or in degrees (counter-clockwise)
    distances: layer → [N, A], Euclidean distance of the layer's activations to those of the untransformed image
    probability: [N, A], the probability of the true class
    """

    amounts: Tensor
    distances: dict[str, Tensor]
    probability: Tensor


def make_amounts(size: int, translation: float, scale: float, rotation: float, steps: int) -> dict[str, Tensor]:
    """Return each transform's amounts, float [A]. They contain the identity (0 px, ×1, 0°) exactly once.

    size: side of the image in pixels; translation: largest shift as a share of the side (in whole pixels, at least 1);
    scale: largest factor; rotation: largest angle in degrees; steps: largest number of amounts (at least 3).
    If there are enough steps, angles divide 90° evenly and so include 90°, 180° and 270°, where objects with a
    rotational symmetry look the same.
    """
    reach = max(1, round(translation * size))
    # as many shifts on both sides of 0, without duplicates
    side = torch.linspace(0, reach, (steps - 1) // 2 + 1).round().unique()
    shifts = torch.cat([-side.flip(0)[:-1], side])
    return {
        "vertical translation": shifts,
        "horizontal translation": shifts,
        "scale": torch.linspace(1, scale, steps),
        "rotation": _angles(rotation, steps),
    }


def _angles(largest: float, steps: int) -> Tensor:
    parts = int((steps - 1) * 90 / largest)  # steps per right angle
    if parts == 0:
        return torch.linspace(0, largest, steps)
    angles = torch.arange(int(largest * parts / 90) + 1) * 90.0 / parts
    return angles if largest - float(angles[-1]) < 1e-3 else torch.cat([angles, torch.tensor([largest])])


def identity(transform: str) -> float:
    """Return the amount of a transform that changes nothing."""
    return 1.0 if transform == "scale" else 0.0


def transform_images(images: Tensor, transform: str, amounts: Tensor) -> Tensor:
    """Return every image at every amount: [N, A, 3, S, S] from images [N, 3, S, S] and amounts [A].

    Bilinear; pixels from outside the image are 0, the mean colour. The identity returns an exact copy of the image.
    """
    count, size = len(amounts), images.shape[-1]
    matrices = torch.zeros(count, 2, 3)
    matrices[:, 0, 0] = matrices[:, 1, 1] = 1
    # a matrix maps output pixels to input pixels, in units of half the image's side
    if transform == "vertical translation":
        matrices[:, 1, 2] = -amounts * 2 / size
    elif transform == "horizontal translation":
        matrices[:, 0, 2] = -amounts * 2 / size
    elif transform == "scale":
        matrices[:, 0, 0] = matrices[:, 1, 1] = 1 / amounts
    else:
        turn = amounts * (math.pi / 180)
        matrices[:, 0, 0] = matrices[:, 1, 1] = turn.cos()
        matrices[:, 0, 1], matrices[:, 1, 0] = -turn.sin(), turn.sin()
    grid = F.affine_grid(matrices, [count, 3, size, size], align_corners=False).to(images)
    # all images have the same grid, so they are passed as channels
    stacked = images.reshape(1, -1, size, size).expand(count, -1, -1, -1)
    moved = F.grid_sample(stacked, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    moved = moved.view(count, len(images), 3, size, size).transpose(0, 1)
    same = (amounts == identity(transform)).to(images.device)
    return torch.where(same[None, :, None, None, None], images[:, None], moved)


@torch.no_grad()
def measure(
    network: Network, images: Tensor, labels: Tensor, amounts: dict[str, Tensor], layers: Sequence[str], batch_size: int
) -> dict[str, Curves]:
    """Return the curves of each transform for images [N, 3, S, S] with labels [N], on the images' device.

    Every batch contains all amounts of its images, including the identity, so that rounding cannot change the
    identity's distance, which is exactly 0.
    """
    curves = {}
    total = len(images) * len(amounts)
    with tqdm(total=total, desc="invariance", unit="curve", disable=None, leave=False, dynamic_ncols=True) as bar:
        for transform, steps in amounts.items():
            origin = int((steps == identity(transform)).nonzero())
            distances: dict[str, list[Tensor]] = {layer: [] for layer in layers}
            probability = []
            size = max(1, batch_size // len(steps))
            for chunk, truth in zip(images.split(size), labels.split(size), strict=True):
                moved = transform_images(chunk, transform, steps).flatten(0, 1)
                outputs = network.activations(moved, [*layers, OUTPUT])
                for layer in layers:
                    features = outputs[layer].reshape(len(chunk), len(steps), -1)
                    distances[layer].append((features - features[:, origin : origin + 1]).norm(dim=2))
                probabilities = outputs[OUTPUT].softmax(1).view(len(chunk), len(steps), -1)
                probability.append(probabilities[torch.arange(len(chunk), device=truth.device), :, truth])
                bar.update(len(chunk))
            curves[transform] = Curves(
                steps,
                {layer: torch.cat(chunks).cpu() for layer, chunks in distances.items()},
                torch.cat(probability).cpu(),
            )
    return curves


@torch.no_grad()
def typical_distance(network: Network, images: Tensor, layers: Sequence[str], batch_size: int) -> dict[str, float]:
    """Return, for each layer, the root mean square distance between the activations of two different images.

    Computed from sums: the mean square over pairs is 2·n/(n−1)·(mean ‖f‖² − ‖mean f‖²).
    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    dtype = torch.float32 if images.device.type == "mps" else torch.float64
    for chunk in images.split(batch_size):
        for layer, features in network.activations(chunk, layers).items():
            flat = features.flatten(1).to(dtype)
            zero = flat.new_zeros(())
            sums[layer] = sums.get(layer, zero) + flat.sum(0)
            squares[layer] = squares.get(layer, zero) + flat.square().sum()
    n = len(images)
    spread = {layer: float(squares[layer] - sums[layer].square().sum() / n) for layer in layers}
    return {layer: math.sqrt(max(0.0, 2 / (n - 1) * total)) for layer, total in spread.items()}


def _rows(
    curves: Mapping[str, Curves], units: Mapping[str, float], names: Sequence[str], used_for: str
) -> list[dict[str, Any]]:
    """Return one row for each image, transform and amount."""
    rows = []
    for transform, curve in curves.items():
        each, count = len(curve.amounts), len(names) * len(curve.amounts)
        distances = {layer: d.flatten() for layer, d in curve.distances.items()}
        rows += to_rows(
            used_for=[used_for] * count,
            image=[name for name in names for _ in range(each)],
            transform=[transform] * count,
            amount=curve.amounts.tolist() * len(names),
            **{f"distance_{layer}": d.tolist() for layer, d in distances.items()},
            **{f"canonical_{layer}": (d / units[layer]).tolist() for layer, d in distances.items()},
            probability=curve.probability.flatten().tolist(),
        )
    return rows


# ---- figure


@styled()
def draw_invariance(
    own: Mapping[str, Curves],
    mean: Mapping[str, Curves],
    units: Mapping[str, float],
    examples: Mapping[str, Tensor],
    names: Sequence[str],
) -> Figure:
    """Draw a row for each transform: images, distances in each layer, probability of the class (paper, Fig. 5).

    Thin lines show single images of `own`. The black line shows the mean over the images of `mean`, and the band the
    middle half of them. units: layer → the distance that is drawn as 1; examples: transform → uint8 [3 · N, S, S, 3],
    each image of `own` at three amounts
    """
    columns = len(units) + 2
    height = max(2.75, 0.55 * len(names))
    figure = new_figure(figsize=(3.2 + 3.6 * (columns - 1), 1.4 + height * len(own)))
    figure.suptitle("Invariance of features and predictions (distance 1: as far apart as two different images)")
    axes = figure.subplots(len(own), columns, squeeze=False, width_ratios=[0.8] + [1] * (columns - 1))
    count = len(next(iter(mean.values())).probability)
    labels = (*plain(names, 48), f"mean of {count} images", f"middle half of {count} images")
    for panels, (transform, curves) in zip(axes, own.items(), strict=True):
        _draw_examples(panels[0], transform, curves.amounts, examples[transform])
        for panel, layer in zip(panels[1:], units, strict=False):
            everyone = mean[transform].distances[layer] / units[layer]
            _draw_curves(panel, curves.amounts, curves.distances[layer] / units[layer], everyone, labels)
            panel.set_ylabel(f"distance in {layer}")
        _draw_curves(panels[-1], curves.amounts, curves.probability, mean[transform].probability, labels)
        panels[-1].set(ylabel="probability of the class", ylim=(0, 1.02))
        for panel in panels[1:]:
            panel.set_xlabel(TRANSFORMS[transform])
            panel.margins(x=0)
    highest = max(panel.get_ylim()[1] for panel in axes[:, 1:-1].flat)
    for panel in axes[:, 1:-1].flat:
        panel.set_ylim(0, highest)
    figure.legend(*axes[0, -1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _draw_examples(panel: Axes, transform: str, amounts: Tensor, pictures: Tensor) -> None:
    """Draw one row for each image, at the first, the middle and the last amount, next to its curve's colour."""
    size, count = pictures.shape[1], len(pictures) // 3
    gap = max(2, size // 16)
    numbers = [f"{float(a):.0f}" if "translation" in transform else f"{float(a):.3g}" for a in amounts]
    show_mosaic(panel, pictures, [numbers[0], numbers[len(numbers) // 2], numbers[-1]], gap=gap)
    for n in range(count):
        middle = n * (size + gap) + size / 2
        panel.plot([-2 * gap], [middle], "s", color=PALETTE[n % len(PALETTE)], clip_on=False)
    panel.set_xlim(-3 * gap, 3 * (size + gap))
    panel.set(title=transform.capitalize(), xlabel=TRANSFORMS[transform])


def _draw_curves(panel: Axes, amounts: Tensor, own: Tensor, many: Tensor, labels: Sequence[str]) -> None:
    """Draw the curves `own` of single images [N, A], and the mean and the quartile band of `many` [M, A]."""
    for n, line in enumerate(own):
        panel.plot(amounts, line, color=PALETTE[n % len(PALETTE)], lw=1.2, label=labels[n])
    low, high = np.quantile(many.numpy(), [0.25, 0.75], axis=0)
    panel.fill_between(amounts.numpy(), low, high, color=INK, alpha=0.12, lw=0, label=labels[-1])
    panel.plot(amounts, many.mean(0), color=INK, lw=2, label=labels[-2])
