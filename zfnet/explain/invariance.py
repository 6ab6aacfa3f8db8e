"""Invariance: how far features move while an image is shifted, scaled or turned, and what becomes of the answer.

The measurements of the paper's Fig. 5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from zfnet.model.zfnet import ZFNet

TRANSFORMS = ("vertical translation", "horizontal translation", "scale", "rotation")


@dataclass(frozen=True)
class Curves:
    """One transform's curves of N images at A amounts; all on the CPU.

    amounts: float [A], in pixels (down or right), as a factor, or in degrees (counter-clockwise)
    distances: layer → [N, A], Euclidean distance of the layer's activations to those of the untransformed image
    probability: [N, A], of the true class
    """

    amounts: Tensor
    distances: dict[str, Tensor]
    probability: Tensor


def make_amounts(
    size: int, translation: float, scale: float, rotation: float, steps: int
) -> dict[str, Tensor]:
    """Return each transform's amounts, float [A]; each holds its identity (0 px, ×1, 0°) exactly once.

    size: side of the image in pixels; translation: largest shift as a share of it (whole pixels are used);
    scale: largest factor; rotation: largest angle in degrees; steps: how many amounts, at most.
    """
    reach = round(translation * size)
    # the same number on both sides of 0, and never the same pixel twice
    side = torch.linspace(0, reach, steps // 2 + 1).round().unique()
    shifts = torch.cat([-side.flip(0)[:-1], side])
    return {
        "vertical translation": shifts,
        "horizontal translation": shifts,
        "scale": torch.linspace(1, scale, steps),
        "rotation": torch.linspace(0, rotation, steps),
    }


def identity(transform: str) -> float:
    """Return the amount that changes nothing."""
    return 1.0 if transform == "scale" else 0.0


def transform_images(images: Tensor, transform: str, amounts: Tensor) -> Tensor:
    """Return every image at every amount: [N, A, 3, S, S] from images [N, 3, S, S] and amounts [A].

    Bilinear; what comes from outside is 0, the mean colour in the network's units. The identity returns the
    image itself, bit by bit.
    """
    count, size = len(amounts), images.shape[-1]
    matrices = torch.zeros(count, 2, 3)
    matrices[:, 0, 0] = matrices[:, 1, 1] = 1
    # a matrix says where each output pixel comes from, in units of half the image's side
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
    # one grid serves all images: they go as channels
    stacked = images.reshape(1, -1, size, size).expand(count, -1, -1, -1)
    moved = F.grid_sample(stacked, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    moved = moved.view(count, len(images), 3, size, size).transpose(0, 1)
    same = (amounts == identity(transform)).to(images.device)
    return torch.where(same[None, :, None, None, None], images[:, None], moved)


@torch.no_grad()
def measure(
    model: ZFNet,
    images: Tensor,
    labels: Tensor,
    amounts: dict[str, Tensor],
    layers: Sequence[str],
    batch_size: int,
) -> dict[str, Curves]:
    """Return the curves of each transform for images [N, 3, S, S] with labels [N], on the images' device.

    Every batch holds all amounts of its images, the identity among them, so that the identity's distance is 0
    exactly, whatever the arithmetic.
    """
    curves = {}
    total = len(images) * len(amounts)
    with tqdm(
        total=total, desc="invariance", unit="curve", disable=None, leave=False, dynamic_ncols=True
    ) as bar:
        for transform, steps in amounts.items():
            origin = int((steps == identity(transform)).nonzero())
            distances: dict[str, list[Tensor]] = {layer: [] for layer in layers}
            probability = []
            size = max(1, batch_size // len(steps))
            for part, truth in zip(images.split(size), labels.split(size), strict=True):
                moved = transform_images(part, transform, steps).flatten(0, 1)
                found = model.activations(moved, [*layers, "fc8"])
                for layer in layers:
                    features = found[layer].reshape(len(part), len(steps), -1)
                    distances[layer].append((features - features[:, origin : origin + 1]).norm(dim=2))
                chances = found["fc8"].softmax(1).view(len(part), len(steps), -1)
                probability.append(chances[torch.arange(len(part), device=truth.device), :, truth])
                bar.update(len(part))
            curves[transform] = Curves(
                steps,
                {layer: torch.cat(parts).cpu() for layer, parts in distances.items()},
                torch.cat(probability).cpu(),
            )
    return curves


@torch.no_grad()
def typical_distance(
    model: ZFNet, images: Tensor, layers: Sequence[str], batch_size: int
) -> dict[str, float]:
    """Return, for each layer, the root mean square distance between the activations of two different images.

    The paper's axis is a "canonical distance" that it does not define; divided by this, 1 means as far apart
    as two images of the set are. From sums: the mean square over pairs is 2·n/(n−1)·(mean ‖f‖² − ‖mean f‖²).
    """
    sums: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    kind = torch.float32 if images.device.type == "mps" else torch.float64
    for part in images.split(batch_size):
        for layer, features in model.activations(part, layers).items():
            flat = features.flatten(1).to(kind)
            none = flat.new_zeros(())
            sums[layer] = sums.get(layer, none) + flat.sum(0)
            squares[layer] = squares.get(layer, none) + flat.square().sum()
    n = len(images)
    return {
        layer: math.sqrt(max(0.0, 2 / (n - 1) * float(squares[layer] - sums[layer].square().sum() / n)))
        for layer in layers
    }
