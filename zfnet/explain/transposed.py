"""The adjoint of a convolution without padding, as fast as it gets: filtering with the transposed filters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FEW_CHANNELS = 4


def transposed(signal: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Return what `F.conv_transpose2d(signal, weight, stride=stride)` does.

    signal: [N, C, h, w]; weight: [C, I, k, k]. Returns [N, I, (h−1)·stride + k, (w−1)·stride + k]. Down to few
    channels, such as an image's three, that function is slow on a CPU. There each of the stride² phases of the
    output becomes channels of an ordinary convolution with every stride-th row and column of the filters.
    """
    if weight.shape[1] > _FEW_CHANNELS or signal.device.type != "cpu":
        return F.conv_transpose2d(signal.contiguous(memory_format=torch.channels_last), weight, stride=stride)
    channels, images, kernel, _ = weight.shape
    taps = -(-kernel // stride)  # of the filter, for one phase
    missing = taps * stride - kernel
    phases = F.pad(weight, (0, missing, 0, missing)).view(channels, images, taps, stride, taps, stride)
    phases = phases.permute(1, 3, 5, 0, 2, 4).flip(4, 5).reshape(-1, channels, taps, taps)
    out = F.pixel_shuffle(F.conv2d(signal, phases, padding=taps - 1), stride)
    height, width = ((n - 1) * stride + kernel for n in signal.shape[2:])
    return out[:, :, :height, :width]
