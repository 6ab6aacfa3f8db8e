"""How feature maps change while a network learns: one look at each of its snapshots (paper, Fig. 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zfnet.data import Batches, ImageSet
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.receptive_field import receptive_field
from zfnet.explain.top_activations import LayerRecord, TopActivations, collect
from zfnet.model.zfnet import ZFNet


@dataclass(frozen=True)
class EpochView:
    """One snapshot: for each layer the strongest activation of every map, and every map's answers to the probes.

    strongest: layer → its record with one place for each of the C maps
    answers: layer → float [P, C] on the CPU, each map's largest activation on each probe image
    """

    strongest: dict[str, LayerRecord]
    answers: dict[str, Tensor]


@torch.no_grad()
def look(
    model: ZFNet,
    images: ImageSet,
    batches_of: Callable[[ImageSet], Batches],
    probes: Tensor,
    layers: Sequence[str],
    batch_size: int,
) -> EpochView:
    """Search all `images` for the strongest activations, and ask the maps about the probes [P, 3, S, S]."""
    found = collect(model, images, batches_of, layers, TopActivations(1, len(images.classes)))
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    for part in probes.split(batch_size):
        for layer, maps in model.activations(part, layers).items():
            parts[layer].append(maps.amax((2, 3)).cpu())
    return EpochView(found.layers, {layer: torch.cat(answers) for layer, answers in parts.items()})


def project_strongest(
    model: ZFNet,
    layer: str,
    strongest: LayerRecord,
    maps: Tensor,
    inputs_of: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the projections of these maps' strongest activations, [M, 3, h, w].

    Cut to the units' receptive field, where that is smaller than the image. inputs_of: image numbers → network
    inputs. A map that was not active on any image projects to nothing.
    """
    places = strongest.places().cpu()[maps, 0]
    images, item = places[:, 0].unique(return_inverse=True)
    units = torch.stack([item, maps, places[:, 1], places[:, 2]], 1)
    deconvnet = Deconvnet(model)
    narrow = receptive_field(model, layer).size < model.image_size
    return (deconvnet.project_fields if narrow else deconvnet.project)(inputs_of(images), layer, units)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation of each column of a with that of b, [P, C] each; NaN where one does not vary."""
    a, b = a.double() - a.double().mean(0), b.double() - b.double().mean(0)
    norm = a.norm(dim=0) * b.norm(dim=0)
    return torch.where(norm > 0, (a * b).sum(0) / norm, torch.nan)


def draw_lots(alive: Tensor, count: int, seed: int) -> Tensor:
    """Return up to `count` of the maps that are alive (bool [C]), chosen by the seed, in ascending order."""
    maps = alive.nonzero().flatten()
    order = torch.randperm(len(maps), generator=torch.Generator().manual_seed(seed))
    return maps[order[:count]].sort().values
