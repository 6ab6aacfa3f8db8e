"""Does a projection say something about the unit, or only about the image? Three controls for the pictures.

A projection that hardly changes when the weights are random, when the switches are another image's, or when
another unit is projected from the same place, is not evidence about that unit (Adebayo et al. 2018; Nie et al.
2018; Mahendran & Vedaldi 2016). So figures come with these comparisons.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from zfnet.config.randomness import CONTROL, make_key, permutation, randint
from zfnet.explain.crops import frame_size
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.receptive_field import window_steps
from zfnet.explain.switches import DEAD_WINDOWS
from zfnet.model.zfnet import ZFNet

CONTROLS = {
    "random_weights": "the same network with each layer's weights shuffled",
    "other_switches": "pooling switches of another image",
    "other_unit": "another unit of the layer, at the same place",
}


@dataclass(frozen=True)
class Controls:
    """Projections of some units within their receptive fields, [U, 3, s, s] each: the true ones, and each control's."""

    own: Tensor
    others: dict[str, Tensor]

    def similarity(self) -> dict[str, dict[str, float | int | None]]:
        """Return for each control the mean and standard deviation of the rank correlation with the true projections.

        `rank_correlation` is of the signed values, `rank_correlation_abs` of their sizes. Units of which either
        projection is constant have none; `units` counts the others.
        """
        found: dict[str, dict[str, float | int | None]] = {}
        for name, other in self.others.items():
            row: dict[str, float | int | None] = {}
            for key, change in (
                ("rank_correlation", torch.nn.Identity()),
                ("rank_correlation_abs", torch.abs),
            ):
                values = rank_correlation(change(self.own), change(other))
                values = values[values.isfinite()]
                row["units"] = len(values)
                row[key] = float(values.mean()) if len(values) else None
                row[f"{key}_std"] = float(values.std(correction=0)) if len(values) else None
            found[name] = row
        return found


def project_controls(
    deconvnet: Deconvnet, images: Tensor, layer: str, units: Tensor, seed: int = 0
) -> Controls:
    """Project units (image, channel, y, x) of [N ≥ 2, 3, H, W] images truly and with each control that applies.

    All are seeded with 1, since a control's own activation may be 0; the seed only scales a projection. With
    `rule=guided` or `gradient` an inactive unit still projects to nothing.
    """
    model = deconvnet.model
    ones = torch.ones(len(units), dtype=images.dtype)
    channels = model.activations(images[:1], [layer])[layer].shape[1]
    neighbours = units.clone()
    step = 1 + randint(make_key(seed, CONTROL, 1), torch.arange(len(units)), max(1, channels - 1))
    neighbours[:, 1] = (units[:, 1] + step) % channels
    shuffled = Deconvnet(
        shuffle_weights(model, layer, seed), deconvnet.rule, deconvnet.dead_windows, deconvnet.lrn
    )
    # what lies outside the receptive field is 0 in all of them, and would only make them look alike
    whole = frame_size(model, layer) == model.image_size
    project, project_shuffled = (d.project if whole else d.project_fields for d in (deconvnet, shuffled))
    others = {
        "random_weights": project_shuffled(images, layer, units, seeds=ones),
        "other_unit": project(images, layer, neighbours, seeds=ones),
    }
    if any(step.name.startswith("pool") for step in window_steps(model, layer)):
        others["other_switches"] = project(images, layer, units, seeds=ones, switches_from=images.roll(1, 0))
    return Controls(project(images, layer, units, seeds=ones), others)


def dead_window_sensitivity(
    deconvnet: Deconvnet, images: Tensor, layer: str, units: Tensor
) -> dict[str, dict[str, float | None]]:
    """Return how far projections move where pooling windows without activation are treated in another way.

    For each other choice of `dead_windows`: the mean change relative to the projection's norm, and the mean
    cosine; None where no unit projects to anything.
    """
    own = deconvnet.project(images, layer, units).flatten(1)
    norm = own.norm(dim=1)
    found: dict[str, dict[str, float | None]] = {}
    for choice in DEAD_WINDOWS:
        if choice != deconvnet.dead_windows:
            other = Deconvnet(deconvnet.model, deconvnet.rule, choice, deconvnet.lrn)
            there = other.project(images, layer, units).flatten(1)[norm > 0]
            here = own[norm > 0]
            change = ((there - here).norm(dim=1) / here.norm(dim=1)).mean()
            cosine = torch.cosine_similarity(there, here).mean()
            found[choice] = {
                "relative_change": float(change) if len(here) else None,
                "cosine": float(cosine) if len(here) else None,
            }
    return found


@torch.no_grad()
def shuffle_weights(model: ZFNet, layer: str, seed: int = 0) -> ZFNet:
    """Return a copy whose weights up to `layer` are shuffled, layer by layer: the same numbers in no order."""
    twin = copy.deepcopy(model)
    for number, name in enumerate(twin.layers[: twin.layers.index(layer) + 1]):
        weight: Tensor = getattr(twin, name).weight
        order = permutation(make_key(seed, CONTROL, 0, number), weight.numel()).to(weight.device)
        weight.copy_(weight.flatten()[order].view_as(weight))
    return twin


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's correlation of each row pair of a, b [U, …] (ties: mean rank); NaN where one is constant."""
    ranks = [torch.stack([_ranks(row) for row in x.flatten(1).cpu()]) for x in (a, b)]
    centred = [r - r.mean(1, keepdim=True) for r in ranks]
    norm = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    return (centred[0] * centred[1]).sum(1) / torch.where(norm > 0, norm, torch.nan)


def _ranks(row: Tensor) -> Tensor:
    _, group, counts = row.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[group]
