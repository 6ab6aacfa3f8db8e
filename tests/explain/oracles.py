"""Independent implementations of the deconvnet, slow and plain, to hold ours against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.model.zfnet import ZFNet


class _Relu(torch.autograd.Function):
    """A ReLU with the backward pass of the deconvnet or of guided backpropagation."""

    @staticmethod
    def forward(ctx, x, guided):
        ctx.save_for_backward(x)
        ctx.guided = guided
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        grad = grad.clamp(min=0)
        return (grad * (x > 0) if ctx.guided else grad), None


def by_autograd(model: ZFNet, images: Tensor, layer: str, unit: tuple[int, ...], rule: str) -> Tensor:
    """Return the projection [3, H, W] of one unit by autograd through ReLUs with changed backward passes.

    LRN's gradient is autograd's, so it is the `gradient` choice.
    """
    x = start = images[unit[0] : unit[0] + 1].clone().requires_grad_()
    for name in model.steps:
        module = getattr(model, name)
        x = x.flatten(1) if isinstance(module, nn.Linear) else x
        if isinstance(module, nn.ReLU) and rule != "gradient":
            x = _Relu.apply(x, rule == "guided")
        else:
            x = module(x)
        if model.output_of.get(name) == layer:
            break
    value = x[(0, *unit[1 : x.ndim])]
    return torch.autograd.grad(value, start, value.detach())[0][0]


def by_mirror(model: ZFNet, images: Tensor, layer: str, unit: tuple[int, ...]) -> Tensor:
    """Return the paper's projection [3, H, W] by a mirror network written out by hand.

    Unpooling adds with `scatter_add_`; filtering is `conv_transpose2d` with the output padding that gives the
    size of the map below; LRN is left out of the way back; batch normalisation scales.
    """
    x, ways_back = images[unit[0] : unit[0] + 1], []
    for name in model.steps:
        module, before = getattr(model, name), x
        if isinstance(module, nn.Linear):
            x = module(x.flatten(1))
            ways_back.append(lambda r, m=module, b=before: (r @ m.weight).view(b.shape))
        elif isinstance(module, nn.MaxPool2d):
            x, where = F.max_pool2d(x, 3, 2, module.padding, ceil_mode=module.ceil_mode, return_indices=True)
            ways_back.append(
                lambda r, b=before, w=where: (
                    torch.zeros_like(b).flatten(2).scatter_add_(2, w.flatten(2), r.flatten(2)).view(b.shape)
                )
            )
        else:
            x = module(x)
            if isinstance(module, nn.Conv2d):
                ways_back.append(lambda r, m=module, b=before: _filter_back(r, m, b.shape[2:]))
            elif isinstance(module, nn.BatchNorm2d):
                scale = module.weight / (module.running_var + module.eps).sqrt()
                ways_back.append(lambda r, s=scale: r * s[:, None, None])
            elif isinstance(module, nn.ReLU):
                ways_back.append(lambda r: r.clamp(min=0))
        if model.output_of.get(name) == layer:
            break
    signal, place = torch.zeros_like(x), (0, *unit[1 : x.ndim])
    signal[place] = x[place]
    for way_back in reversed(ways_back):
        signal = way_back(signal)
    return signal[0]


def _filter_back(signal: Tensor, module: nn.Conv2d, size: torch.Size) -> Tensor:
    kernel, stride, padding = module.kernel_size[0], module.stride[0], int(module.padding[0])
    missing = size[0] - ((signal.shape[2] - 1) * stride - 2 * padding + kernel)
    return F.conv_transpose2d(signal, module.weight, None, stride, padding, output_padding=missing)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
