"""What in an image speaks for a class: five methods, each about the class's output before the softmax.

The deconvnet, guided backpropagation and the gradient are this project's own (`deconvnet.py`); integrated
gradients and Grad-CAM are captum's.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.config.errors import UserError
from zfnet.explain.deconvnet import RULES, Deconvnet
from zfnet.model.zfnet import ZFNet

INTEGRATED, GRAD_CAM = "integrated gradients", "Grad-CAM"
METHODS = (*RULES, INTEGRATED, GRAD_CAM)


@dataclass(frozen=True)
class Attributions:
    """maps: method → [N, 3, S, S], or [N, 1, S, S] for Grad-CAM, which is never negative; on the CPU.

    output, baseline_output: [N], the class's output for the images and for an image of the mean colour.
    Integrated gradients sum up to their difference, the better the more steps are taken.
    """

    maps: dict[str, Tensor]
    output: Tensor
    baseline_output: Tensor


def load_captum() -> ModuleType:
    """Return captum.attr; raise UserError where captum is not installed."""
    try:
        import captum.attr
    except ImportError as error:
        raise UserError("job=attribution needs captum: pip install -e '.[explain]'") from error
    found: ModuleType = captum.attr
    return found


def attribute(
    model: ZFNet, images: Tensor, labels: Tensor, layer: str, steps: int, batch_size: int
) -> Attributions:
    """Return the five attributions of images [N, 3, S, S] to their classes `labels` [N].

    layer: the convolution whose output Grad-CAM weighs. Raises UserError without captum.
    """
    captum = load_captum()
    units = torch.stack([torch.arange(len(labels)), labels.cpu()], 1)
    ones = torch.ones(len(labels))  # a class's own output may be negative, and only scales
    maps = {rule: Deconvnet(model, rule).project(images, "fc8", units, seeds=ones).cpu() for rule in RULES}
    integrated = captum.IntegratedGradients(model).attribute(
        images,
        torch.zeros_like(images),
        labels,
        n_steps=steps,
        internal_batch_size=max(batch_size, len(images)),
    )
    maps[INTEGRATED] = integrated.detach().float().cpu()
    end = next(name for name, of in model.output_of.items() if of == layer)
    module = getattr(model, end)
    assert isinstance(module, nn.Module)
    cam = captum.LayerGradCam(model, module).attribute(images, labels, relu_attributions=True).detach()
    maps[GRAD_CAM] = F.interpolate(cam, size=images.shape[2:], mode="bilinear", align_corners=False).cpu()
    rows = torch.arange(len(labels), device=labels.device)
    with torch.no_grad():
        output, plain = (model(x)[rows, labels].cpu() for x in (images, torch.zeros_like(images)))
    return Attributions(maps, output, plain)


def share_in_boxes(maps: Tensor, boxes: Tensor) -> Tensor:
    """Return the share of the attributions' sizes, |maps| [N, C, S, S], inside each box [N, 4]; NaN if all are 0.

    boxes: (top, left, bottom, right) in pixels; a pixel counts if its centre is inside.
    """
    size = maps.abs().sum(1)
    inside = in_boxes(boxes, maps.shape[-1])
    return (size * inside).sum((1, 2)) / size.sum((1, 2))


def in_boxes(boxes: Tensor, side: int) -> Tensor:
    """Return which pixels have their centre in the box: bool [N, side, side]."""
    centre = torch.arange(side) + 0.5
    rows = (centre >= boxes[:, 0:1]) & (centre < boxes[:, 2:3])
    columns = (centre >= boxes[:, 1:2]) & (centre < boxes[:, 3:4])
    return rows[:, :, None] & columns[:, None, :]
