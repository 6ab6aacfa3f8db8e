"""What can be measured about first-layer filters: size, dead ones, frequencies, aliasing (paper, Fig. 6)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zfnet.data import Batch
from zfnet.model.zfnet import ZFNet

FLAT = 0.1  # a filter whose RMS is below this share of the layer's median counts as flat
_GRID = 64  # frequencies are sampled on a grid of this many points a side


@dataclass(frozen=True)
class Filters:
    """The F filters of a first layer and what was measured on them; all on the CPU, float64 but for flags.

    weight: [F, 3, k, k]; stride: of the convolution
    rms: [F], root mean square of each filter's weights
    silent: bool [F], the map was 0 everywhere on every image: such a filter is dead
    flat: bool [F], the RMS is below a tenth of the layer's median: such a filter does next to nothing
    peak: [F], the largest activation on any image
    spectrum: [F, R], power density by radial frequency; frequencies: [R], upper ends, in cycles per pixel
    aliasing: [F], share of the filter's energy beyond the Nyquist frequency of its stride
    """

    weight: Tensor
    stride: int
    rms: Tensor
    silent: Tensor
    flat: Tensor
    peak: Tensor
    spectrum: Tensor
    frequencies: Tensor
    aliasing: Tensor


@torch.no_grad()
def measure_filters(model: ZFNet, batches: Iterable[Batch]) -> Filters:
    """Measure the filters of conv1; its maps are watched on all images of `batches`."""
    convolution = model.conv1
    assert isinstance(convolution, nn.Conv2d)
    weight = convolution.weight.detach().cpu().double()
    peak = torch.zeros(len(weight), device=convolution.weight.device)
    for batch in batches:
        maps = model.activations(batch.images, ["conv1"])["conv1"]
        peak = torch.maximum(peak, maps.amax((0, 2, 3)).float())
    rms = weight.square().mean((1, 2, 3)).sqrt()
    spectrum, frequencies = radial_spectrum(weight)
    (stride, _) = convolution.stride
    return Filters(
        weight=weight,
        stride=stride,
        rms=rms,
        silent=(peak <= 0).cpu(),
        flat=rms < FLAT * rms.median(),
        peak=peak.cpu().double(),
        spectrum=spectrum,
        frequencies=frequencies,
        aliasing=aliasing_energy(weight, stride),
    )


def aliasing_energy(weight: Tensor, stride: int) -> Tensor:
    """Return the share of each filter's energy that a grid of `stride` pixels cannot carry: [F] in 0 … 1.

    weight: float64 [F, C, k, k]. Counted is what lies beyond 1 / (2·stride) cycles per pixel in x or in y: after
    the convolution it comes back as a lower frequency that is not there. The integral of |W(f)|² over the band
    is Σ w_ab w_cd K_ac K_bd with K_ij = sinc((i − j) / stride) / stride, exactly. Stride 1: 0. An impulse:
    1 − 1/stride². A filter of zeros: 0.
    """
    along = torch.arange(weight.shape[-1], dtype=weight.dtype)
    kernel = torch.sinc((along[:, None] - along) / stride) / stride
    inside = (weight * torch.einsum("ac,bd,nkcd->nkab", kernel, kernel, weight)).sum((1, 2, 3))
    energy = weight.square().sum((1, 2, 3))
    return torch.where(energy > 0, 1 - inside / energy, 0.0).clamp(0, 1)


def radial_spectrum(weight: Tensor, bands: int = 16) -> tuple[Tensor, Tensor]:
    """Return each filter's power density by distance from frequency 0, [F, bands], and the bands' upper ends.

    1 is the density of white noise: the mean over all frequencies is 1. The bands divide 0 … √½ cycles per
    pixel (the corner of the square of frequencies) evenly. Colours are added up. A filter of zeros: zeros.
    """
    power = torch.fft.fft2(weight, s=(_GRID, _GRID)).abs().square().sum(1).flatten(1)
    frequency = torch.fft.fftfreq(_GRID, dtype=weight.dtype)
    radius = torch.hypot(frequency[:, None], frequency).flatten()
    width = math.sqrt(0.5) / bands
    band = (radius / width).long().clamp(max=bands - 1)
    sums = torch.zeros(len(weight), bands, dtype=weight.dtype).index_add_(1, band, power)
    mean = power.mean(1, keepdim=True)
    density = sums / torch.bincount(band, minlength=bands)
    return torch.where(mean > 0, density / mean, 0.0), width * torch.arange(1, bands + 1, dtype=weight.dtype)


def in_pixel_units(rms: Tensor, std: tuple[float, ...] | list[float]) -> Tensor:
    """Return RMS values [F] as they would be for inputs of 0 … 255, the paper's scale: divided by 255 · std."""
    return rms / (255 * sum(std) / len(std))
