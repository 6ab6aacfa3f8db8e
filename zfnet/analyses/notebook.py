"""Results of the analyses as arrays for `imshow`: occlusion, projections and top activations of a loaded run.

    run = load_run("last")
    occlusion(run, "cat.jpg").probability        # [P, P]
    projections(run, "cat.jpg", "conv5").pictures  # uint8 [9, S, S, 3]

The network computes in fp32 on its own device: the CPU, unless `run.model.to(…)` has moved it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from zfnet.analyses.occlusion import occlude, resolve_patch_and_stride
from zfnet.config.errors import UserError, did_you_mean
from zfnet.data import Batches, load_splits
from zfnet.explain.crops import view_maps
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.maps import peaks
from zfnet.explain.selection import pick_layers, pick_maps
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.model.chain import Chain, Network
from zfnet.plots.pictures import on_grey, to_pixels
from zfnet.runs.weights import TrainedRun

_SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class OcclusionMaps:
    """The network's outputs for an image while a square hides a part of it, at P × P places.

    picture: uint8 [S, S, 3], the image as the network sees it; centres: [P], the square's centres in its pixels
    label: the class; whole: its probability for the whole image; probability: [P, P], with the square at each place
    predicted: [P, P], the name of the most probable class
    activation: [P, P], sum of the activations of the map that is strongest on the whole image; None without maps
    """

    picture: np.ndarray
    centres: np.ndarray
    label: str
    whole: float
    probability: np.ndarray
    predicted: np.ndarray
    activation: np.ndarray | None


@dataclass(frozen=True)
class Projections:
    """The strongest units of M maps for one image, projected to pixel space.

    pictures: uint8 [M, S, S, 3], grey means 0, each on its own scale; values: float [M, S, S, 3], unscaled
    units: int [M, 4], (image, channel, y, x); activations: [M]; picture: uint8 [S, S, 3], the image
    """

    pictures: np.ndarray
    values: np.ndarray
    units: np.ndarray
    activations: np.ndarray
    picture: np.ndarray


@dataclass(frozen=True)
class StrongestImages:
    """The `top` images of a split that excite each of M maps most; grey and 0 if there are fewer.

    projections, patches: uint8 [M, top, s, s, 3], s: side of the receptive field; activations: [M, top]
    images: int [M, top], numbers in the split; −1 means no image
    """

    projections: np.ndarray
    patches: np.ndarray
    activations: np.ndarray
    images: np.ndarray


def occlusion(
    run: TrainedRun,
    image: str | Path,
    label: str | None = None,
    layer: str | None = None,
    patch: int | None = None,
    stride: int | None = None,
) -> OcclusionMaps:
    """Hide one part of an image file after another behind a square of the data's mean colour (paper, Fig. 7).

    label: a class (None: the predicted one); layer: one with maps (None: the last one); patch, stride: in input pixels
    Raises UserError for an unknown class or layer, an unreadable image and an unsuitable square.
    """
    data, inputs = run.metadata.data, run.inputs(image)
    network = Network.of(run.model, data.image_size)
    layer = pick_maps(network, "layer", layer)
    label = next(iter(run.predict(image))) if label is None else label
    if label not in run.classes:
        raise UserError(f"label={label}: no such class{did_you_mean(label, run.classes)}")
    patch, stride = resolve_patch_and_stride(data.image_size, patch, stride)
    number = torch.tensor([run.classes.index(label)], device=inputs.device)
    few, fill = min(data.batch_size, 64), torch.zeros(3)
    result = occlude(network, inputs, number, layer=layer, patch=patch, stride=stride, fill=fill, batch_size=few)
    return OcclusionMaps(
        picture=to_pixels(inputs, data)[0].numpy(),
        centres=(result.starts + patch / 2).numpy(),
        label=label,
        whole=float(result.whole.probability[0]),
        probability=result.occluded.probability[0].numpy(),
        predicted=np.array(run.classes)[result.occluded.predicted[0].numpy()],
        activation=None if result.strongest is None else result.strongest.occluded[0].numpy(),
    )


@torch.no_grad()
def projections(
    run: TrainedRun, image: str | Path, layer: str, maps: Sequence[int] | int = 9, rule: str = "deconvnet"
) -> Projections:
    """Project the strongest unit of each map of a convolution to pixel space, for an image file (paper, section 2.1).

    maps: numbers of maps, or how many maps to take, those with the strongest units first
    Raises UserError for an unknown layer, map or rule and an unreadable image.
    """
    chain, inputs = _chain(run), run.inputs(image)
    (layer,) = pick_layers(chain, "layer", layer, [], only_conv=True)
    ((strongest,), (places,)) = peaks(chain.activations(inputs, [layer])[layer])
    chosen = _map_numbers(maps, len(strongest), strongest.argsort(descending=True, stable=True).tolist())
    units = [(0, k, *places[k].tolist()) for k in chosen]
    values = Deconvnet(chain, rule).project(inputs, layer, units)
    return Projections(
        pictures=on_grey(values).numpy(),
        values=values.permute(0, 2, 3, 1).cpu().numpy(),
        units=np.array(units),
        activations=strongest[chosen].cpu().numpy(),
        picture=to_pixels(inputs, run.metadata.data)[0].numpy(),
    )


def top_activations(
    run: TrainedRun, layer: str, maps: Sequence[int] | int = 9, top: int = 9, split: str = "validation"
) -> StrongestImages:
    """Search a split of the run's data for the images that excite maps of a convolution most (paper, Fig. 2).

    maps: numbers of maps, or how many of the first maps. Raises UserError for an unknown layer, map or split.
    """
    chain, data = _chain(run), run.config.data
    (layer,) = pick_layers(chain, "layer", layer, [], only_conv=True)
    if top < 1:
        raise UserError(f"top={top}: must be at least 1")
    images = getattr(load_splits(data, run.config.imports), split) if split in _SPLITS else None
    if images is None:
        raise UserError(f"split={split}: the run has no such images; known: {', '.join(_SPLITS)}")
    device = next(run.model.parameters()).device
    search = TopActivations(top, len(images.classes))
    record = collect(chain, images, lambda s: Batches(s, data, device), [layer], search).layers[layer]
    chosen = _map_numbers(maps, len(record.values), range(len(record.values)))
    filled = record.filled.cpu()[chosen]
    if not filled.any():
        raise UserError(f"maps={maps}: none of these maps of {layer} is active on any image")
    views = view_maps(Deconvnet(chain), images, data, layer, record, torch.tensor(chosen))
    return StrongestImages(
        projections=views.tiles[:, 0].numpy(),
        patches=views.tiles[:, 1].numpy(),
        activations=record.values.cpu()[chosen].where(filled, 0.0).numpy(),
        images=record.index.cpu()[chosen].where(filled, -1).numpy(),
    )


def _chain(run: TrainedRun) -> Chain:
    return Chain.of(run.model, run.metadata.data.image_size)


def _map_numbers(maps: Sequence[int] | int, count: int, order: Sequence[int]) -> list[int]:
    """Return the numbers of the wanted maps; raise UserError for one that a layer of `count` maps does not have."""
    given = np.asarray(maps).tolist()  # a tensor or an array has numbers of its own types
    numbers = list(order[: max(0, given)]) if isinstance(given, int) else given
    if not isinstance(numbers, list) or not numbers or not all(isinstance(k, int) and 0 <= k < count for k in numbers):
        raise UserError(f"maps={maps}: must be a number of maps, or numbers from 0 to {count - 1}")
    return numbers
