"""Independent implementations of the deconvnet, slow and simple, to compare ours with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.model import Chain


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


def project_by_autograd(chain: Chain, images: Tensor, layer: str, unit: tuple[int, ...], rule: str) -> Tensor:
    """Return the projection [C, H, W] of one unit by autograd through ReLUs with modified backward passes.

    Autograd uses the true gradient of LRN, which corresponds to `lrn="gradient"`.
    """
    x = start = images[unit[0] : unit[0] + 1].clone().requires_grad_()
    for step in chain.up_to(layer):
        if isinstance(step.module, nn.ReLU):
            x = F.relu(x) if rule == "gradient" else _Relu.apply(x, rule == "guided")
        else:
            x = step.module(x)
    value = x[(0, *unit[1 : x.ndim])]
    return torch.autograd.grad(value, start, value.detach())[0][0]


def project_by_mirror(chain: Chain, images: Tensor, layer: str, unit: tuple[int, ...], dead_windows: str) -> Tensor:
    """Return the paper's projection [C, H, W] by an explicit mirror network on whole maps.

    Unpooling uses `unfold` and `fold`; filtering is `conv_transpose2d`, cropped or padded to the map below; average
    pooling uses its gradient; LRN is skipped in the backward pass; batch normalisation scales.
    """
    x, ways_back = images[unit[0] : unit[0] + 1], []
    for step in chain.up_to(layer):
        module, before = step.module, x
        x = module(x.clone())
        if isinstance(module, nn.Linear):
            ways_back.append(lambda r, m=module: r @ m.weight)
        elif isinstance(module, nn.Flatten):
            ways_back.append(lambda r, b=before: r.view(b.shape))
        elif isinstance(module, nn.MaxPool2d):
            ways_back.append(lambda r, m=module, b=before: _maxima_back(r, m, b, dead_windows))
        elif isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            ways_back.append(lambda r, m=module, b=before: torch.autograd.functional.vjp(m, b, r)[1])
        elif isinstance(module, nn.Conv2d):
            ways_back.append(lambda r, m=module, b=before: _filter_back(r, m, b))
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            scale = 1 / (module.running_var + module.eps).sqrt()
            scale = scale if module.weight is None else scale * module.weight
            scale = scale.view(1, -1, *[1] * (x.ndim - 2))
            ways_back.append(lambda r, s=scale: r * s)
        elif isinstance(module, nn.ReLU):
            ways_back.append(lambda r: r.clamp(min=0))
    signal, place = torch.zeros_like(x), (0, *unit[1 : x.ndim])
    signal[place] = x[place]
    for way_back in reversed(ways_back):
        signal = way_back(signal)
    return signal[0]


def _filter_back(signal: Tensor, conv: nn.Conv2d, below: Tensor) -> Tensor:
    full = F.conv_transpose2d(signal, conv.weight, None, conv.stride, groups=conv.groups, dilation=conv.dilation)
    left, _, top, _ = conv._reversed_padding_repeated_twice
    height, width = below.shape[2:]
    full = F.pad(full, (0, max(0, left + width - full.shape[3]), 0, max(0, top + height - full.shape[2])))
    return full[:, :, top : top + height, left : left + width]


def _maxima_back(signal: Tensor, pool: nn.MaxPool2d, below: Tensor, dead_windows: str) -> Tensor:
    def pair(value) -> tuple[int, int]:
        return value if isinstance(value, tuple) else (value, value)

    kernel, stride, padding = pair(pool.kernel_size), pair(pool.stride), pair(pool.padding)
    spacing = pair(pool.dilation)
    covered = [
        (n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(signal.shape[2:], stride, kernel, spacing, strict=True)
    ]
    beyond = [c - n - p for c, n, p in zip(covered, below.shape[2:], padding, strict=True)]
    # negative if no window covers the last cells
    padded = F.pad(below, (padding[1], beyond[1], padding[0], beyond[0]), value=float("-inf"))
    cells = F.unfold(padded, kernel, spacing, stride=stride).view(below.shape[1], -1, signal[0, 0].numel())
    highest = cells.max(1, keepdim=True).values
    if dead_windows == "all":
        chosen = cells == highest
    else:
        chosen = F.one_hot(cells.argmax(1), cells.shape[1]).transpose(1, 2).bool()
        if dead_windows == "mask":
            chosen &= highest > 0
    spread = (chosen * signal.reshape(below.shape[1], 1, -1)).reshape(1, -1, cells.shape[2])
    back = F.fold(spread, covered, kernel, spacing, stride=stride)
    height, width = below.shape[2:]
    back = F.pad(back, (0, max(0, -beyond[1]), 0, max(0, -beyond[0])))
    return back[:, :, padding[0] : padding[0] + height, padding[1] : padding[1] + width]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
