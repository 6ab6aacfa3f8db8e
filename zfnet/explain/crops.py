"""Feature maps as pictures: their strongest units' projections, and the image patches that these units see.

All pictures of a layer have one frame size: the receptive field, or the whole image if the field is larger.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zfnet.config.schema import DataConfig
from zfnet.data import ImageSet, preprocess
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.receptive_field import receptive_field
from zfnet.explain.top_activations import LayerRecord
from zfnet.explain.windows import inside_map, take_windows
from zfnet.model.chain import Chain
from zfnet.plots.pictures import GREY, on_grey, to_pixels

_IMAGES_AT_ONCE = 64  # on the device


@dataclass(frozen=True)
class Views:
    """The U strongest units of M maps and their pictures, all on the CPU.

    units: int64 [U, 4], (image, channel, y, x)
    projections: [U, 3, s, s]; patches: uint8 [U, s, s, 3], grey outside the image
    tiles: uint8 [M, 2, top, s, s, 3], each map's projections on grey, then its patches; grey where there is no unit
    """

    units: Tensor
    projections: Tensor
    patches: Tensor
    tiles: Tensor


def frame_size(chain: Chain, layer: str) -> int:
    """Return the side of a layer's frame in pixels."""
    if layer not in chain.conv_layers:
        return chain.image_size
    return min(max(receptive_field(chain, layer).kernel), chain.image_size)


def project_frames(deconvnet: Deconvnet, inputs: Tensor, layer: str, units: Tensor, **settings: Any) -> Tensor:
    """Return the projections of units [U, 3, h, w], cut to their receptive fields if these are smaller than the image.
    `settings` are passed to `Deconvnet.project`.
    """
    fields = frame_size(deconvnet.chain, layer) < deconvnet.chain.image_size
    return deconvnet.project(inputs, layer, units, fields=fields, **settings)


def view_units(
    deconvnet: Deconvnet, images: ImageSet, data: DataConfig, layer: str, units: Tensor, project: bool = True
) -> tuple[Tensor, Tensor]:
    """Return projections [U, 3, s, s] and patches, uint8 [U, s, s, 3], of units (image, channel, y, x) of a set.

    A patch is grey outside the image. A field that is not square fills the upper left of its frame.
    project: False leaves the projections at 0.
    """
    chain = deconvnet.chain
    device, side = next(chain.model.parameters()).device, frame_size(chain, layer)
    extent, corners = (side, side), torch.zeros(len(units), 2, dtype=torch.int64)
    if side < chain.image_size:
        field = receptive_field(chain, layer)
        extent, corners = field.kernel, field.corners(units[:, 2:])
    projections = torch.zeros(len(units), chain.channels, side, side)
    windows, inside = torch.zeros_like(projections), torch.zeros(len(units), side, side, 1, dtype=torch.bool)
    rows, columns = slice(extent[0]), slice(extent[1])
    inside[:, rows, columns] = inside_map(corners, extent, (chain.image_size,) * 2).permute(0, 2, 3, 1)
    for group in units[:, 0].unique().split(_IMAGES_AT_ONCE):
        members = torch.isin(units[:, 0], group).nonzero().flatten()
        inputs = preprocess(images.pixels(group).to(device), data, channels_last=False)
        here = units[members].clone()
        here[:, 0] = torch.searchsorted(group, here[:, 0].contiguous())
        if project:
            projections[members, :, rows, columns] = project_frames(deconvnet, inputs, layer, here).cpu()
        windows[members, :, rows, columns] = take_windows(inputs.cpu(), here[:, 0], corners[members], extent)
    return projections, torch.where(inside, to_pixels(windows, data), GREY)


def view_maps(
    deconvnet: Deconvnet, images: ImageSet, data: DataConfig, layer: str, record: LayerRecord, maps: Tensor
) -> Views:
    """Return the views of a layer's `maps` [M] from the record of a search. At least one map must be active."""
    number, rank = record.filled.cpu()[maps].nonzero().unbind(1)
    image, y, x = record.places().cpu()[maps[number], rank].unbind(1)
    units = torch.stack((image, maps[number], y, x), 1)
    projections, patches = view_units(deconvnet, images, data, layer, units)
    tiles = torch.full((len(maps), 2, record.values.shape[1], *patches.shape[1:]), GREY, dtype=torch.uint8)
    tiles[number, 0, rank] = on_grey(projections)
    tiles[number, 1, rank] = patches
    return Views(units, projections, patches, tiles)
