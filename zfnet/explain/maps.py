"""Numbers about single feature maps: activations, effects on the classes, and similar maps of another network."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from zfnet.model.chain import NEUTRAL, Chain, run_steps
from zfnet.model.layers import full_precision

BINS = 12
NEAREST = 3  # how many similar maps of another network are listed


@dataclass(frozen=True)
class MapResponses:
    """The responses of the C maps of a layer to n images, and their effects, on the CPU.

    strongest: [n, C], each map's strongest activation in each image
    effect: [C, classes], the change of each class's mean output if a map is set to zero; None if not measured
    """

    strongest: Tensor
    effect: Tensor | None

    def histogram(self) -> tuple[Tensor, Tensor]:
        """Return the counts of images, int64 [C, 1 + BINS], and each map's highest activation [C]. The first bin counts
        images where the map is not active; the others are equal steps from 0 to the highest activation.
        """
        highest = self.strongest.amax(0).clamp(min=0)
        step = (self.strongest * BINS / highest.clamp(min=1e-30)).ceil().long().clamp(0, BINS)
        counts = torch.zeros(self.strongest.shape[1], 1 + BINS, dtype=torch.int64)
        counts.scatter_add_(1, step.T, torch.ones_like(step.T))
        return counts, highest


def peaks(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest value of each map, [N, C] for [N, C, h, w], and its position (y, x), int64 [N, C, 2]."""
    value, place = maps.flatten(2).max(2)
    return value, torch.stack((place // maps.shape[3], place % maps.shape[3]), 2)


@torch.no_grad()
@full_precision()
def strongest_places(
    chain: Chain, batches: Iterable[Tensor], layers: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the `peaks` of each layer's maps in each image, on the CPU, for batches [b, 3, S, S]."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    for batch in batches:
        for layer, maps in chain.activations(batch, layers).items():
            value, place = peaks(maps)
            found[layer].append((value.cpu(), place.cpu()))
    return {layer: (torch.cat([v for v, _ in of]), torch.cat([p for _, p in of])) for layer, of in found.items()}


def strongest_activations(chain: Chain, batches: Iterable[Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """Return each map's strongest activation in each image [n, C], on the CPU, for batches [b, 3, S, S]."""
    return {layer: values for layer, (values, _) in strongest_places(chain, batches, layers).items()}


# modules that process each channel separately and give zeros for zeros
_KEEP_ZEROS = (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d, nn.Flatten, *NEUTRAL)


class Ablation:
    """The outputs of a network for images [B, 3, S, S] when single maps of one convolution are set to zero.

    before: [B, classes], outputs with all maps; active: bool [B, C], whether a map has a value other than 0
    """

    @torch.no_grad()
    @full_precision()
    def __init__(self, chain: Chain, images: Tensor, layer: str) -> None:
        self.layer = layer
        x, steps = chain.activations(images, [layer])[layer], chain.steps[len(chain.up_to(layer)) :]
        self.active = (x != 0).flatten(2).any(2)
        kept = 0
        while kept < len(steps) and isinstance(steps[kept].module, _KEEP_ZEROS):
            kept += 1
        inputs, following = run_steps(steps[:kept], x), steps[kept].module if kept < len(steps) else None
        # the next layer's output is a sum over the maps, so subtract one map's term instead of computing it again
        self._weight: Tensor | None = None
        if (type(following) is nn.Linear and inputs.ndim == 2) or (
            type(following) is nn.Conv2d and following.groups == 1 and following.padding_mode == "zeros"
        ):
            self._weight, self._following, self._sum = following.weight, following, following(inputs)
            x, steps = inputs, steps[kept + 1 :]
        self._maps, self._steps = x, steps
        self.before = run_steps(steps, x if self._weight is None else self._sum)

    def each(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield each map that is active in an image, and what `without` returns for it. Shows a progress bar."""
        numbers = self.active.any(0).nonzero().flatten().tolist()
        for number in tqdm(numbers, f"{self.layer}: ablation", unit="map", disable=None, leave=False):
            yield number, *self.without(number)

    @torch.no_grad()
    @full_precision()
    def without(self, number: int) -> tuple[Tensor, Tensor]:
        """Return a mask, bool [B], of the images in which this map is active, and their outputs without the map.

        The outputs for the other images do not change.
        """
        rows = self.active[:, number]
        if self._weight is None:
            x = self._maps[rows]
            x[:, number] = 0
        else:
            size = self._maps.shape[1] // self.active.shape[1]  # after a flatten, each map has several features
            part = slice(number * size, (number + 1) * size)
            maps, weight = self._maps[rows, part], self._weight[:, part]
            if isinstance(self._following, nn.Conv2d):
                conv = self._following
                term = F.conv2d(maps, weight, None, conv.stride, conv.padding, conv.dilation)
            else:
                term = F.linear(maps, weight)
            x = self._sum[rows] - term
        return rows, run_steps(self._steps, x)


def ablation_effects(chain: Chain, batches: Sequence[Tensor], layers: Sequence[str]) -> dict[str, Tensor]:
    """Return for each layer how each class's mean output changes if one map is set to zero: [C, classes]."""
    effects: dict[str, Tensor] = {}
    for layer in layers:
        sums = []
        for batch in batches:
            ablation = Ablation(chain, batch, layer)
            change = batch.new_zeros(ablation.active.shape[1], ablation.before.shape[1])
            for number, rows, after in ablation.each():
                change[number] = (after - ablation.before[rows]).sum(0)
            sums.append(change)
        effects[layer] = torch.stack(sums).sum(0).cpu() / sum(len(batch) for batch in batches)
    return effects


def standard_columns(values: Tensor) -> Tensor:
    """Scale the columns of values [n, C] to mean 0 and norm 1 (NaN if constant), so dot products are correlations."""
    centred = values.double() - values.double().mean(0)
    return centred / centred.norm(dim=0)


def nearest_maps(
    own: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> dict[str, list[list[tuple[str, int, float]]]]:
    """Return for each map of `own` the NEAREST maps of `others`, (layer, map, r), by correlation over the same images.

    own, others: layer → strongest activations [n, C]. A constant map has no correlation, and is left out.
    """
    names = [(layer, number) for layer, values in others.items() for number in range(values.shape[1])]
    theirs = torch.cat([standard_columns(values) for values in others.values()], 1)
    nearest = {}
    for layer, values in own.items():
        r = (standard_columns(values).T @ theirs).nan_to_num(-2)
        best = r.topk(min(NEAREST, r.shape[1]), dim=1)
        nearest[layer] = [
            [(*names[k], value) for value, k in zip(row, places, strict=True) if value > -2]
            for row, places in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
    return nearest
