"""The targets of explanations (units of a convolution layer, or classes), and pictures of them by every method.

A target has a frame (the part of the image that it sees), the pixels of the frame that count, and the explained number
as a function of the frame. A unit's frame is its receptive field: `window_activations` computes the unit from it. If
the field is larger than the image, the frame is the whole image.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.config.errors import UserError
from zfnet.config.randomness import CONTROL, make_key, uniform
from zfnet.explain.boxes import box_cells
from zfnet.explain.crops import frame_size
from zfnet.explain.deconvnet import RULES, Deconvnet
from zfnet.explain.receptive_field import receptive_boxes, receptive_field, window_steps
from zfnet.explain.windows import inside_map, take_windows, window_of
from zfnet.model.chain import OUTPUT, Chain, Network
from zfnet.model.layers import full_precision

INTEGRATED, GRAD_CAM = "integrated", "Grad-CAM"
BASELINES = ("Sobel", "|input|", "centre", "random")
_INTEGRATION_POINTS = 16  # between the mean colour and the image
_BATCH = 128  # images


@dataclass(frozen=True)
class Target:
    """U units or classes of N images.

    layer: a convolution, or `OUTPUT` for classes; images: [N, 3, S, S]
    units: int64 [U, 4], (image, channel, y, x), or (image, class, 0, 0)
    """

    chain: Chain
    layer: str
    images: Tensor
    units: Tensor

    @property
    def of_class(self) -> bool:
        return self.layer == OUTPUT

    @property
    def methods(self) -> tuple[str, ...]:
        return (*RULES, INTEGRATED, GRAD_CAM) if self.of_class else RULES

    @functools.cached_property
    def cut_out(self) -> bool:
        """Whether frames are receptive fields instead of whole images."""
        if self.of_class or frame_size(self.chain, self.layer) == self.chain.image_size:
            return False
        windowed = (nn.Conv2d, nn.MaxPool2d)  # an average pooling divides by the number of cells inside the map
        return all(isinstance(step.module, windowed) for step in window_steps(self.chain, self.layer))

    @functools.cached_property
    def boxes(self) -> Tensor:
        """The pixels that count, (top, left, bottom, right) in the frame: int64 [U, 4]."""
        if self.of_class:
            return torch.tensor([0, 0, *self.images.shape[2:]]).expand(len(self.units), -1)
        boxes = receptive_boxes(self.chain, self.layer, self.units[:, 2:])
        return boxes - self._corners.repeat(1, 2)

    @property
    def inside(self) -> Tensor:
        """`boxes` as a mask, bool [U, h, w]."""
        return box_cells(self.boxes, self._extent, side=1) == 0

    def cut(self, maps: Tensor) -> Tensor:
        """Cut each unit's frame out of the maps [N, C, S, S] of its image: [U, C, h, w]."""
        item, corners = self.units[:, 0].to(maps.device), self._corners.to(maps.device)
        return take_windows(maps, item, corners, self._extent)

    def value(self, frames: Tensor, item: Tensor) -> Tensor:
        """Return the activations or logits [B] of the units `item` [B] for frames [B, 3, h, w]."""
        return torch.cat([self._value(f, i) for f, i in zip(frames.split(_BATCH), item.split(_BATCH), strict=True)])

    @torch.no_grad()
    def _value(self, frames: Tensor, item: Tensor) -> Tensor:
        _, channel, y, x = self.units[item].unbind(1)
        rows = torch.arange(len(item))
        if self.cut_out:
            return window_activations(self.chain, self.layer, frames, self.units[item, 2:])[rows, channel]
        out = self.chain.activations(frames, [self.layer])[self.layer]
        return out[rows, channel] if out.ndim == 2 else out[rows, channel, y, x]

    def picture(
        self,
        method: str,
        *,
        chain: Chain | None = None,
        images: Tensor | None = None,
        units: Tensor | None = None,
        draw: int = 0,
    ) -> Tensor:
        """Return the pictures of the units by a method, [U, C, h, w], on the CPU.

        chain, images, units: replace the target's own, for example by shuffled weights, noisy images, or other channels
        at the same places; draw: number of the random picture
        """
        chain = self.chain if chain is None else chain
        images = self.images if images is None else images
        units = self.units if units is None else units
        if method in RULES:
            net, seeds = Deconvnet(chain, method), torch.ones(len(units))
            return net.project(images, self.layer, units, seeds=seeds, fields=self.cut_out).cpu()
        if method in (INTEGRATED, GRAD_CAM):
            explain = integrated_gradients if method == INTEGRATED else grad_cam
            parts = [(images[part[:, 0]], part[:, 1].to(images.device)) for part in units.split(_BATCH)]
            return torch.cat([explain(chain, *part).cpu() for part in parts])
        if method == "random":
            shape = (len(units), 1, *self._extent)
            numbers = torch.arange(len(units) * shape[2] * shape[3])
            return uniform(make_key(draw, CONTROL, 13), numbers).view(shape)
        if method == "centre":
            top, left, bottom, right = (self.boxes[:, k, None].float() for k in range(4))
            y = (torch.arange(self._extent[0]) + 0.5 - (top + bottom) / 2) / (bottom - top)
            x = (torch.arange(self._extent[1]) + 0.5 - (left + right) / 2) / (right - left)
            return (1 - torch.hypot(y[:, :, None], x[:, None, :])).clamp(min=0)[:, None]
        maps = images.abs().sum(1, keepdim=True) if method == "|input|" else sobel(images)
        return self.cut(maps).cpu()

    @functools.cached_property
    def _extent(self) -> tuple[int, int]:
        if self.cut_out:
            return receptive_field(self.chain, self.layer).kernel
        return self.images.shape[2], self.images.shape[3]

    @functools.cached_property
    def _corners(self) -> Tensor:
        places = self.units[:, 2:]
        return receptive_field(self.chain, self.layer).corners(places) if self.cut_out else torch.zeros_like(places)


@full_precision()
def window_activations(chain: Chain, layer: str, frames: Tensor, places: Tensor) -> Tensor:
    """Return all channels of `layer` at places (y, x) [B, 2] from the receptive fields [B, 3, h, w]: [B, channels].

    They equal the activations for the whole image, because cells outside a feature map are treated as its padding.
    Convolutions and max poolings are the only supported modules with windows.
    """
    steps = chain.up_to(layer)
    corner, corners = places.to(frames.device), []
    for step in reversed(steps):
        corners.append(corner)  # corner of the window in the step's output
        if isinstance(step.module, (nn.Conv2d, nn.MaxPool2d)):
            corner = window_of(step.module).corners(corner)
    x, extent = frames, steps[0].input_shape[1:]
    for step, after in zip(steps, reversed(corners), strict=True):
        module = step.module
        if isinstance(module, nn.Conv2d):
            x = F.conv2d(x, module.weight, module.bias, module.stride, 0, module.dilation, module.groups)
        elif isinstance(module, nn.MaxPool2d):
            inside = inside_map(corner, (x.shape[2], x.shape[3]), extent)
            x = F.max_pool2d(x.masked_fill(~inside, -torch.inf), module.kernel_size, module.stride, 0, module.dilation)
        else:
            x = step(x)
        corner, extent = after, step.output_shape[1:]
        x = x.masked_fill(~inside_map(corner, (x.shape[2], x.shape[3]), extent), 0)
    return x[:, :, 0, 0]


@full_precision()
def grad_cam(network: Network, images: Tensor, labels: Tensor, layer: str | None = None) -> Tensor:
    """Return Grad-CAM (Selvaraju et al. 2017) of the classes `labels` [N]: [N, 1, S, S].

    layer: the layer whose maps are weighted; None means the last one with maps
    Raises UserError if the logits have no gradient with respect to the layer.
    """
    layer = network.conv_layers[-1] if layer is None else layer
    rows = torch.arange(len(labels), device=labels.device)
    # captum's version hooks a module, but a network can use the same ReLU module for all layers
    outputs = network.activations(images.detach().requires_grad_(), [layer, OUTPUT])
    slope = _slope(outputs[OUTPUT][rows, labels], outputs[layer], f"layer {layer}")
    cam = (slope.mean((2, 3), keepdim=True) * outputs[layer]).sum(1, keepdim=True).relu().detach()
    return F.interpolate(cam, size=images.shape[2:], mode="bilinear", align_corners=False)


@full_precision()
def gradient(network: Network, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the logits of the classes `labels` [N] with respect to the images: [N, C, S, S]."""
    rows = torch.arange(len(labels), device=labels.device)
    inputs = images.detach().requires_grad_()
    return _slope(network.activations(inputs, [OUTPUT])[OUTPUT][rows, labels], inputs, "the images")


def _slope(logits: Tensor, inputs: Tensor, name: str) -> Tensor:
    """Return the gradient of the sum of `logits`; raise UserError if they have none."""
    if logits.requires_grad and inputs.requires_grad:
        (slope,) = torch.autograd.grad(logits.sum(), inputs, allow_unused=True)
        if slope is not None:
            return slope
    raise UserError(f"the logits have no gradient with respect to {name}")


@full_precision()
def integrated_gradients(network: Network, images: Tensor, labels: Tensor, points: int = _INTEGRATION_POINTS) -> Tensor:
    """Return integrated gradients (Sundararajan et al. 2017) of the classes `labels` [N]; baseline: the mean colour."""
    total = torch.zeros_like(images)
    for point in range(points):
        total += gradient(network, images * ((point + 0.5) / points), labels)
    return total / points * images


def sobel(images: Tensor) -> Tensor:
    """Return the gradient magnitude of the grey image, [N, 1, H, W] of [N, C, H, W]; borders are replicated."""
    grey = F.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=images.device, dtype=images.dtype)
    return torch.hypot(F.conv2d(grey, slope[None, None]), F.conv2d(grey, slope.T[None, None]))


def blur(images: Tensor, side: int) -> Tensor:
    """Blur images [N, C, H, W] by three box filters of about `side` px, which approximate a Gaussian."""
    side = max(3, side // 2 * 2 + 1)
    for _ in range(3):
        images = F.avg_pool2d(images, side, 1, side // 2, count_include_pad=False)
    return images
