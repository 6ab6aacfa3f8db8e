"""Feature maps as pictures: their strongest units' projections, and the image patches that these units see.

All are in frames of one size: the receptive field, or the whole image where the field is larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zfnet.config.schema import DataConfig
from zfnet.data import ImageSet, preprocess
from zfnet.explain.deconvnet import Deconvnet, inside_map, take_windows
from zfnet.explain.receptive_field import receptive_field
from zfnet.explain.selection import conv_layers
from zfnet.explain.top_activations import LayerRecord
from zfnet.model.zfnet import ZFNet
from zfnet.plots.pictures import GREY, on_grey, to_pixels

_IMAGES = 64  # how many are on the device at once


@dataclass(frozen=True)
class Views:
    """The strongest units of M maps, U in all, and their pictures; all on the CPU.

    units: int64 [U, 4], (image, channel, y, x); rank: int64 [U], 0 is the map's strongest unit
    projections: [U, 3, s, s]; patches: uint8 [U, s, s, 3], grey outside the image
    tiles: uint8 [M, 2, top, s, s, 3], each map's projections on grey, then its patches; grey where there is no unit
    """

    units: Tensor
    rank: Tensor
    projections: Tensor
    patches: Tensor
    tiles: Tensor


def frame_size(model: ZFNet, layer: str) -> int:
    """Return the side of the frame in pixels."""
    if layer not in conv_layers(model):
        return model.image_size
    return min(receptive_field(model, layer).size, model.image_size)


def project_frames(
    deconvnet: Deconvnet, images: Tensor, layer: str, units: Tensor, **settings: Any
) -> Tensor:
    """Return the projections [U, 3, s, s] of units, cut to their frames; `settings` are those of `project`.

    Outside the receptive field a projection is 0.
    """
    whole = frame_size(deconvnet.model, layer) == deconvnet.model.image_size
    project = deconvnet.project if whole else deconvnet.project_fields
    return project(images, layer, units, **settings)


def view_maps(
    deconvnet: Deconvnet, images: ImageSet, data: DataConfig, layer: str, record: LayerRecord, maps: Tensor
) -> Views:
    """Return the views of the `maps` [M] of a layer, at least one of them active, from the record of a search."""
    model = deconvnet.model
    device, side, size = next(model.parameters()).device, frame_size(model, layer), model.image_size
    number, rank = record.filled.cpu()[maps].nonzero().unbind(1)
    places = record.places().cpu()[maps[number], rank]
    units = torch.stack((places[:, 0], maps[number], places[:, 1], places[:, 2]), 1)
    corners = torch.zeros(len(units), 2, dtype=torch.int64)
    if side < size:
        corners = receptive_field(model, layer).corners(units[:, 2:])
    projections = torch.empty(len(units), 3, side, side)
    windows = torch.empty(len(units), 3, side, side)
    for group in units[:, 0].unique().split(_IMAGES):
        members = torch.isin(units[:, 0], group).nonzero().flatten()
        inputs = preprocess(images.pixels(group).to(device), data, channels_last=False)
        here = units[members].clone()
        here[:, 0] = torch.searchsorted(group, here[:, 0].contiguous())
        projections[members] = project_frames(deconvnet, inputs, layer, here).cpu()
        windows[members] = take_windows(inputs.cpu(), here[:, 0], corners[members], (side, side))
    inside = inside_map(corners, (side, side), (size, size)).permute(0, 2, 3, 1)
    patches = torch.where(inside, to_pixels(windows, data), GREY)
    tiles = torch.full((len(maps), 2, record.values.shape[1], side, side, 3), GREY, dtype=torch.uint8)
    tiles[number, 0, rank] = on_grey(projections)
    tiles[number, 1, rank] = patches
    return Views(units, rank, projections, patches, tiles)
