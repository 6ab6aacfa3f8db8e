"""Units as they are shown: the projection, and the part of the image that the unit sees, in frames of one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zfnet.config.schema import DataConfig
from zfnet.data import ImageSet, preprocess
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.receptive_field import receptive_field
from zfnet.explain.selection import conv_layers
from zfnet.explain.windows import inside_map, take_windows
from zfnet.model.zfnet import ZFNet

_IMAGES = 64  # how many are on the device at once


@dataclass(frozen=True)
class Views:
    """Projections and patches [U, 3, s, s], patches as network inputs; inside: bool [U, 1, s, s], whether a pixel
    lies in the image."""

    projections: Tensor
    patches: Tensor
    inside: Tensor


def frame_size(model: ZFNet, layer: str) -> int:
    """Return the side of the frame: the receptive field, or the whole image where the field is larger."""
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


def view_units(deconvnet: Deconvnet, images: ImageSet, data: DataConfig, layer: str, units: Tensor) -> Views:
    """Return the views of units (image, channel, y, x) [U ≥ 1, 4] of a set, on the CPU, in the order of `units`."""
    model = deconvnet.model
    device, side = next(model.parameters()).device, frame_size(model, layer)
    corners = torch.zeros(len(units), 2, dtype=torch.int64)
    if side < model.image_size:
        field = receptive_field(model, layer)
        corners = units[:, 2:] * field.stride + field.offset
    projections = torch.empty(len(units), 3, side, side)
    patches = torch.empty(len(units), 3, side, side)
    for group in units[:, 0].unique().split(_IMAGES):
        members = torch.isin(units[:, 0], group).nonzero().flatten()
        inputs = preprocess(images.pixels(group).to(device), data, channels_last=False)
        here = units[members].clone()
        here[:, 0] = torch.searchsorted(group, here[:, 0].contiguous())
        projections[members] = project_frames(deconvnet, inputs, layer, here).cpu()
        patches[members] = take_windows(inputs.cpu(), here[:, 0], corners[members], (side, side))
    inside = inside_map(corners, (side, side), (model.image_size, model.image_size))
    return Views(projections, patches, inside)
