"""Find the images that excite each feature map most, and the maps' activation statistics, in one pass over a data set.

The paper's Fig. 2 shows the nine strongest activations of a map over a whole set. Only the strongest position of each
image counts, so nine activations come from nine images (the paper does not say whether an image can appear twice).
Apart from the shuffled labels, memory depends on the network and on `top`, not on the number of images.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from zfnet.config.randomness import CONTROL, make_key, permutation
from zfnet.data import Batches, ImageSet
from zfnet.explain.windows import as_maps
from zfnet.model.chain import Chain
from zfnet.model.layers import evaluation_mode
from zfnet.runs.statistics import rank_p

SHUFFLES = 19  # how often the labels are shuffled: p is at least 1/20
_NO_IMAGE = torch.iinfo(torch.int64).max  # index of an empty entry; it sorts last


@dataclass
class LayerRecord:
    """Top activations and sums of one layer's C maps. For linear layers a map is a feature, with one position.

    values: [C, top], descending, −inf if there were fewer images; index: int64 [C, top], the image's index;
    position: int64 [C, top], y·width + x
    sums: float64 [1 + shuffles, known classes, C], sums of a map's mean activation over the images of each class: with
        the true labels, then with shuffled labels
    active_images, active_positions: int64 [C], the number of images and of positions with an activation above 0
    """

    values: Tensor
    index: Tensor
    position: Tensor
    sums: Tensor
    active_images: Tensor
    active_positions: Tensor
    size: tuple[int, int]

    def places(self) -> Tensor:
        """Return (image, y, x) of each entry: int64 [C, top, 3]."""
        return torch.stack((self.index, self.position // self.size[1], self.position % self.size[1]), -1)

    @property
    def filled(self) -> Tensor:
        """Which entries are above 0: bool [C, top]. A unit that is not active has nothing to project."""
        return self.values > 0


@dataclass(frozen=True)
class MapStatistics:
    """Activation statistics of the C maps of a layer over N images.

    mean: [C], mean activation; class_means: [C, classes]; image_share, position_share: [C], the share of
    images and of positions where the map is active, 0 … 1; selectivity: [C], see `selectivity`; best_class: int64
    [C], the class with the highest mean; dead: bool [C], never active
    chance: [C], the mean selectivity with shuffled labels, NaN without them; it is high for a map that is seldom active
    even if the map ignores classes; p: [C], the share of labellings (shuffled ones and the true one) with at least
    the true selectivity
    """

    mean: Tensor
    class_means: Tensor
    image_share: Tensor
    position_share: Tensor
    selectivity: Tensor
    best_class: Tensor
    dead: Tensor
    chance: Tensor
    p: Tensor


class TopActivations:
    """Collects, batch by batch, the `top` strongest activations of every map of some layers.

    labels: int64 [images], the labels of the whole set. If given, `statistics` also measures the selectivity by chance,
    from SHUFFLES shuffles of these labels. Sums are then kept only for classes that occur in `labels`: sums for all of
    ImageNet's 1,000 classes take hundreds of megabytes, and a folder of photographs has only a few classes.
    """

    def __init__(self, top: int, num_classes: int, labels: Tensor | None = None) -> None:
        self.top, self.num_classes = top, num_classes
        labels = torch.zeros(0, dtype=torch.int64) if labels is None else labels.cpu()
        orders = [permutation(make_key(0, CONTROL, 3, k), len(labels)) for k in range(SHUFFLES if len(labels) else 0)]
        self.shuffled = torch.stack([labels[order] for order in orders]) if orders else labels.view(0, 0)
        self.known = labels.unique() if orders else torch.arange(num_classes)
        self.layers: dict[str, LayerRecord] = {}
        self.images = 0
        self.class_counts = torch.zeros(num_classes, dtype=torch.int64)

    def add(self, activations: Mapping[str, Tensor], index: Tensor, labels: Tensor) -> None:
        """Add one batch: activations [B, C, H, W] or [B, C] by layer, the images' indices [B] and labels [B].

        Equal activations are ordered by image index, and the first position in reading order counts, so the result does
        not depend on the size or the order of the batches.
        """
        device = next(iter(activations.values())).device
        index, labels = index.to(device), labels.to(device)
        exact = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        every = torch.stack([labels, *(other[index] for other in self.shuffled.to(device))])
        members = (every[..., None] == self.known.to(device)).to(exact)  # [1 + shuffles, B, known classes]
        for layer, maps in activations.items():
            maps = as_maps(maps.detach())
            record = self.layers.get(layer) or self._new(layer, maps, exact)
            flat = maps.flatten(2)
            value, position = flat.max(2)  # the first of equal values
            self._merge(record, value.T, index.expand(value.shape[1], -1), position.T)
            record.sums += members.mT @ flat.mean(2).to(exact)
            active = (flat > 0).sum(2)
            record.active_images += (active > 0).sum(0)
            record.active_positions += active.sum(0)
        self.images += len(index)
        self.class_counts += torch.bincount(labels.cpu(), minlength=self.num_classes)

    def _new(self, layer: str, maps: Tensor, exact: torch.dtype) -> LayerRecord:
        channels, device = maps.shape[1], maps.device
        whole = torch.zeros(channels, dtype=torch.int64, device=device)
        record = LayerRecord(
            values=torch.full((channels, self.top), float("-inf"), dtype=maps.dtype, device=device),
            index=torch.full((channels, self.top), _NO_IMAGE, device=device),
            position=torch.zeros(channels, self.top, dtype=torch.int64, device=device),
            sums=torch.zeros(1 + len(self.shuffled), len(self.known), channels, dtype=exact, device=device),
            active_images=whole,
            active_positions=whole.clone(),
            size=(maps.shape[2], maps.shape[3]),
        )
        self.layers[layer] = record
        return record

    def _merge(self, record: LayerRecord, value: Tensor, index: Tensor, position: Tensor) -> None:
        """Add new entries, [C, B] each, to the record and keep the `top` best."""
        values = torch.cat((record.values, value), 1)
        indices = torch.cat((record.index, index), 1)
        positions = torch.cat((record.position, position), 1)
        by_index = indices.argsort(dim=1, stable=True)
        by_value = values.gather(1, by_index).argsort(dim=1, descending=True, stable=True)
        best = by_index.gather(1, by_value)[:, : self.top]
        record.values = values.gather(1, best)
        record.index = indices.gather(1, best)
        record.position = positions.gather(1, best)

    def statistics(self, layer: str) -> MapStatistics:
        """Return the statistics of a layer's maps over all images added so far (at least one)."""
        record = self.layers[layer]
        known = self.known.to(record.sums.device)
        counts = self.class_counts.to(record.sums)[known]
        class_means = (record.sums / counts.clamp(min=1)[:, None]).mT
        selective, best = selectivity(class_means[0], counts > 0)
        shuffled = torch.stack([selective, *(selectivity(means, counts > 0)[0] for means in class_means[1:])])[1:]
        whole = record.sums.new_zeros(len(best), self.num_classes)
        positions = self.images * record.size[0] * record.size[1]
        return MapStatistics(
            mean=record.sums[0].sum(0) / self.images,
            class_means=whole.index_copy(1, known, class_means[0]),
            image_share=record.active_images / self.images,
            position_share=record.active_positions / positions,
            selectivity=selective,
            best_class=known[best],
            dead=record.active_images == 0,
            chance=shuffled.mean(0),
            p=rank_p(selective, shuffled),
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors, JSON-compatible metadata) for `from_state`."""
        tensors = {"class_counts": self.class_counts}
        for layer, record in self.layers.items():
            tensors |= {f"{layer}.{k}": v for k, v in vars(record).items() if isinstance(v, Tensor)}
        tensors |= {"shuffled": self.shuffled, "known": self.known}
        sizes = {layer: list(record.size) for layer, record in self.layers.items()}
        return tensors, {"top": self.top, "num_classes": self.num_classes, "images": self.images, "sizes": sizes}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], device: torch.device
    ) -> "TopActivations":
        """Restore a collection from the result of `state`, with its records on `device`."""
        self = cls(metadata["top"], metadata["num_classes"])
        self.images, self.class_counts = metadata["images"], tensors["class_counts"]
        self.shuffled = tensors["shuffled"]
        self.known = tensors.get("known", torch.arange(self.num_classes))  # older versions did not save it
        for layer, size in metadata["sizes"].items():
            prefix = f"{layer}."
            fields = {k.removeprefix(prefix): v.to(device) for k, v in tensors.items() if k.startswith(prefix)}
            self.layers[layer] = LayerRecord(**fields, size=(size[0], size[1]))
        return self


def selectivity(class_means: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index [C], class [C]) of maps with mean activations [C, classes]; `present` is bool [classes].

    The index is (μ − ν) / (μ + ν): μ the mean activation for the class that excites the map most, ν the mean over
    the other classes (Morcos et al. 2018, section 3.1). 0: all classes are equal; 1: only one class. Dead maps: 0.
    A mean below 0, which is only possible without a ReLU, counts as 0 in the index.
    """
    known = class_means[:, present]
    best, known = known.argmax(1), known.clamp(min=0)
    highest = known.amax(1)
    others = (known.sum(1) - highest) / max(1, known.shape[1] - 1)
    total = highest + others
    index = torch.where(total > 0, (highest - others) / total.clamp(min=1e-300), 0.0)
    return index, present.nonzero().flatten()[best]


@torch.no_grad()
def collect(
    model: nn.Module | Chain,
    images: ImageSet,
    batches_of: Callable[[ImageSet], Batches],
    layers: Sequence[str],
    collection: TopActivations,
    after_batch: Callable[[TopActivations], None] = lambda collection: None,
) -> TopActivations:
    """Run `images`, starting at number `collection.images`, through the network once and add them to `collection`.

    model: a network with a chain of its own, such as a ZFNet, or a `Chain`
    batches_of: makes batches of a set, such as `lambda s: Batches(s, data, device)`
    after_batch: called with the collection after each batch, for example to save it

    The forward pass uses fp32, because bf16 has so few digits that many activations would be equal. Raises UserError
    for layers that the network does not have.
    """
    chain = Chain.of(model)
    start = collection.images
    rest = batches_of(images.take(torch.arange(start, len(images))))
    bar = tqdm(
        rest.in_order(), "strongest activations", len(rest), unit="batch", disable=None, leave=False, dynamic_ncols=True
    )
    with evaluation_mode(chain.model):
        for batch in bar:
            collection.add(chain.activations(batch.images, layers), batch.index + start, batch.labels)
            after_batch(collection)
    return collection
