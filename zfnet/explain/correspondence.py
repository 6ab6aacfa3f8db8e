"""Correspondence: does hiding the same part of different images change features in the same way (paper, Table 1)?

ε_i is the change of image i's features when the part is masked. Δ is the mean, over pairs of images and over
dimensions, of H(sign ε_i, sign ε_j), H being 1 where two signs differ. Signs have three values: most features
stay 0, and zeros agree. A small Δ says that the part matters in the same way everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zfnet.config.errors import UserError
from zfnet.model.zfnet import ZFNet

MARGIN = 1.6  # built-in shapes are then as large as the larger ones that the network was trained on


@dataclass(frozen=True)
class Agreement:
    """One part in one layer.

    delta: the mean over pairs of differing shares of dimensions; spread: their standard deviation
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
    model: ZFNet, images: Tensor, masked: Tensor, layers: Sequence[str], batch_size: int
) -> dict[str, Tensor]:
    """Return, for each layer, the signs of ε = features(image) − features(masked): int8 [N, D]."""
    signs: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for part, hidden in zip(images.split(batch_size), masked.split(batch_size), strict=True):
        # side by side in one batch, so that what is equal in both comes out equal to the bit
        found = model.activations(torch.cat([part, hidden]), layers)
        for layer in layers:
            whole, without = found[layer].flatten(1).split(len(part))
            signs[layer].append((whole - without).sign().to(torch.int8))
    return {layer: torch.cat(parts) for layer, parts in signs.items()}


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
    The test: were part and place alike, each image's two changes could be exchanged. It draws such exchanges and
    counts how often Δ(random) − Δ(part) is as large as observed. Raises UserError where no two images share a group.
    """
    count = len(groups)
    pair = ((groups[:, None] == groups) & ~torch.eye(count, dtype=torch.bool)).double()
    if not pair.any():
        raise UserError("there are no two images of one class to compare: raise job.count")
    table = disagreement(torch.cat([part, at_random])).double()
    generator = torch.Generator().manual_seed(seed)
    swaps = torch.rand(permutations, count, generator=generator) < 0.5
    own = torch.arange(count)
    observed = _difference(table, pair, own[None], own[None] + count)[0]
    drawn = torch.cat(
        [
            _difference(table, pair, own + count * chunk, own + count * (1 - chunk.long()))
            for chunk in swaps.split(200)
        ]
    )
    p = (1 + int((drawn >= observed - 1e-12).sum())) / (1 + permutations)
    upper = pair.bool().triu()
    here, there = table[:count, :count][upper], table[count:, count:][upper]
    random_facts = (float(there.mean()), float(there.std(correction=0)))
    return (
        Agreement(float(here.mean()), float(here.std(correction=0)), len(here), *random_facts, p),
        Agreement(*random_facts, len(there), *random_facts, None),
    )


def _difference(table: Tensor, pair: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return Δ(second) − Δ(first) [B] for rows of the table, int64 [B, N] each."""
    means = [(table[r[:, :, None], r[:, None, :]] * pair).sum((1, 2)) / pair.sum() for r in (first, second)]
    return means[1] - means[0]


def cut_to_boxes(images: Tensor, boxes: Tensor, margin: float = MARGIN) -> Tensor:
    """Return images [N, 3, S, S] cut to a square around each box, as large as the image; outside: 0, the mean colour.

    boxes: [N, 4] (top, left, bottom, right). The square's side is `margin` times the box's longer side, so the
    object fills 1 / margin of the image and parts of equal objects stand in equal places.
    """
    size = images.shape[-1]
    side = margin * torch.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    matrices = torch.zeros(len(images), 2, 3)
    matrices[:, 0, 0] = matrices[:, 1, 1] = side / size
    matrices[:, 0, 2] = (boxes[:, 1] + boxes[:, 3]) / size - 1
    matrices[:, 1, 2] = (boxes[:, 0] + boxes[:, 2]) / size - 1
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False).to(images)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def quarter_centres(boxes: Tensor, size: int, margin: float = MARGIN) -> dict[str, Tensor]:
    """Return the centres (y, x) [N, 2] of the boxes' quarters in images that `cut_to_boxes` made."""
    extent = torch.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], 1)
    reach = extent / extent.amax(1, keepdim=True) * size / margin / 4
    return {
        f"{vertical} {horizontal}": size / 2 - 0.5 + reach * torch.tensor([down, right])
        for vertical, down in (("upper", -1.0), ("lower", 1.0))
        for horizontal, right in (("left", -1.0), ("right", 1.0))
    }
