"""job=filters: draw and measure the first-layer filters of one run, or of two runs side by side.

Source: Zeiler & Fergus 2013, section 4.1 and Fig. 6: one filter can dominate unless the RMS is limited to 0.1 (section
3); AlexNet's 11×11 filters at stride 4 have very high and low frequencies, cause aliasing, and some are dead. The
measures (RMS, dead, flat, spectrum, aliasing) are ours and defined below. Filters of white noise alias by
1 − 1/stride² without any training, so aliasing is reported together with that of noise filters of the same shape.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from pydantic import Field
from torch import Tensor, nn

from zfnet.config.errors import UserError, log
from zfnet.config.schema import Config, model_name
from zfnet.data import Batch
from zfnet.explain.selection import Look, chosen_split
from zfnet.model.chain import ACTIVATIONS, Network, Step, run_steps
from zfnet.model.layers import full_precision
from zfnet.plots.figures import INK, PALETTE, RED, new_figure, plain, save_figure, styled
from zfnet.plots.pictures import enlarge, mosaic, show
from zfnet.runs.directory import find_run
from zfnet.runs.session import own_directory
from zfnet.runs.tables import to_rows
from zfnet.training.loaded import LoadedRun

FLAT = 0.1  # a filter whose RMS is below this share of the layer's median counts as flat
_GRID = 64  # frequencies are sampled on a grid of this many points a side
_BANDS = 16  # number of bands of radial frequencies
_NOISE = 200  # number of white-noise filters, for comparison
_FILTERS_AT_ONCE = 16  # in one Fourier transform on the images' grid
_SIDE, _GAP = 44, 4  # side of a drawn filter and gap between two, in pixels of the sheet


@dataclass(kw_only=True)
class FiltersJob(Look):
    """See conf/job/filters.yaml."""

    other: Optional[str]
    limit: Annotated[float, Field(gt=0)]

    def main(self, config: Config, output: Path) -> None:
        """Write figures/filters.png, filters.csv (one row per filter) and filters.json (a summary of each run)."""
        runs = [LoadedRun(config)]
        if self.other is not None:
            other = find_run(self.other, "job.other")  # with its own data, but on this command's device
            recorded = dataclasses.replace(
                other.read_config(config.imports), job=self, trainer=config.trainer, run=str(other.folder), images=None
            )
            if recorded.data.root is None:  # an imported run has no images, so use this command's
                recorded = dataclasses.replace(recorded, data=dataclasses.replace(recorded.data, root=config.data.root))
            runs.append(LoadedRun(recorded))
        networks = [loaded.network for loaded in runs]
        for network in networks:
            first_layer(network)  # a network without one raises here, before images are read
        sets = [chosen_split(loaded).images for loaded in runs]
        with own_directory(config, output) as run:
            measured: dict[str, Filters] = {}
            summaries: dict[str, dict[str, Any]] = {}
            for letter, loaded, network, images in zip("AB", runs, networks, sets, strict=False):
                name = f"{letter}: {loaded.source.folder.name}"
                measured[name] = measure_filters(network, loaded.batches(images).in_order())
                summaries[name] = row = {
                    "run": str(loaded.source.folder),
                    "model": model_name(loaded.metadata.model),
                    "images": len(images),
                    **_summarise(measured[name], loaded.data.std, self.limit),
                }
                rms, beyond = row["rms"], row["beyond_limit_for_inputs_of_0_to_255"]
                log.info(f"{name}: {measured[name]}")
                log.info(f"  RMS: median {rms['median']:#.4g}, largest {rms['max']:#.4g}")
                log.info(f"  {row['beyond_limit']} beyond {self.limit:g} (for inputs of 0 … 255: {beyond})")
                log.info(f"  {row['dead']} dead on {len(images)} images, {row['flat']} flat")
                for key, what in (("aliasing_energy", "of the filters'"), ("aliasing_response", "of their responses'")):
                    own, noise = row[key]["median"], row[f"{key}_of_noise"]
                    log.info(f"  {what} energy aliases: {own:.1%} (median; filters of white noise: {noise:.1%})")
            save_figure(draw_filters(measured, self.limit), run.figures / "filters.png")
            run.write_csv("filters.csv", [row for name in measured for row in _rows(name, measured[name])])
            run.write_json("filters.json", {"limit": self.limit, "flat_below": FLAT, "runs": summaries})


# ---- measurement


@dataclass(frozen=True)
class Filters:
    """The F filters of a first layer and their measures. All tensors are on the CPU, and float64 except for flags.

    weight: [F, 3, k, l]; stride: the larger stride of the convolution, in pixels
    rms: [F], root mean square of each filter's weights
    dead: bool [F], the filter's map was 0 everywhere on every image
    flat: bool [F], the RMS is below a tenth of the layer's median, so the filter has almost no effect
    peak: [F], the largest activation on any image
    spectrum: [F, R], power density by radial frequency; frequencies: [R], upper ends, in cycles per pixel
    aliasing: [F], share of the filter's energy beyond the Nyquist frequency of its stride
    response_aliasing: [F], the same share of the energy of its responses to the images
    noise_aliasing, noise_response_aliasing: medians of both over filters of white noise of the same shape
    """

    weight: Tensor
    stride: int
    rms: Tensor
    dead: Tensor
    flat: Tensor
    peak: Tensor
    spectrum: Tensor
    frequencies: Tensor
    aliasing: Tensor
    response_aliasing: Tensor
    noise_aliasing: float
    noise_response_aliasing: float

    def __str__(self) -> str:
        return f"{len(self.rms)} filters {'×'.join(map(str, self.weight.shape[2:]))}, stride {self.stride}"


def first_layer(network: Network) -> tuple[nn.Conv2d, list[Step], list[Step]]:
    """Return the first convolution, the steps before it, and the steps from it to its layer's output.

    Raises UserError if the modules from the image to it are not a chain, or its filters are not grey or in colour.
    """
    # modules before it, such as a conversion to grey or a pooling, change the images
    before = list(itertools.takewhile(lambda step: not isinstance(step.module, nn.Conv2d), network.steps))
    if len(before) == len(network.steps):
        if not any(isinstance(module, nn.Conv2d) for module in network.model.modules()):
            raise UserError("job=filters: the network has no convolution")
        raise UserError(f"job=filters: no chain of modules from the image to a convolution: {network.problem}")
    name, convolution = network.steps[len(before)].name, network.steps[len(before)].module
    assert isinstance(convolution, nn.Conv2d)
    if (channels := convolution.weight.shape[1]) not in (1, 3):
        raise UserError(f"job=filters: {name} has filters of {channels} channels; only grey or colour is drawn")
    return convolution, before, network.up_to(name)[len(before) :]


@torch.no_grad()
@full_precision()
def measure_filters(network: Network, batches: Iterable[Batch]) -> Filters:
    """Measure the filters of the first convolution, and its maps on all images of `batches`."""
    convolution, before, layer = first_layer(network)
    if not any(isinstance(step.module, ACTIVATIONS) for step in layer):
        log.warning(
            "%s: no activation function follows it directly as a module, so only filters without any response are dead",
            layer[0].name,
        )
    weight = convolution.weight.detach().cpu().double()
    peak = torch.full((len(weight),), -torch.inf, device=convolution.weight.device)
    dead = torch.ones_like(peak, dtype=torch.bool)
    spectra = CrossSpectra()
    for batch in batches:
        inputs = run_steps(before, batch.images)
        spectra.add(inputs)
        maps = run_steps(layer, inputs)
        peak = torch.maximum(peak, maps.amax((0, 2, 3)).float())
        dead &= maps.abs().amax((0, 2, 3)) == 0
    rms = weight.square().mean((1, 2, 3)).sqrt()
    spectrum, frequencies = radial_spectrum(weight)
    rows, columns = map(int, convolution.stride)
    noise = torch.randn(_NOISE, *weight.shape[1:], generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    return Filters(
        weight=weight,
        stride=max(rows, columns),
        rms=rms,
        dead=dead.cpu(),
        flat=rms < FLAT * rms.median(),
        peak=peak.cpu().double(),
        spectrum=spectrum,
        frequencies=frequencies,
        aliasing=aliasing_energy(weight, (rows, columns)),
        response_aliasing=spectra.aliasing(weight, (rows, columns), convolution.groups),
        noise_aliasing=float(aliasing_energy(noise, (rows, columns)).median()),
        noise_response_aliasing=float(spectra.aliasing(noise, (rows, columns), convolution.groups).median()),
    )


class CrossSpectra:
    """Sums the cross-spectra of images, which determine the power spectrum of any filter's responses.

    The mean of each colour is subtracted, and a Hann window fades out the image towards its borders, because borders
    would otherwise act as edges.
    """

    def __init__(self) -> None:
        self.sum: Tensor | None = None  # [C, C, S, S], complex

    def add(self, images: Tensor) -> None:
        """Add images [N, C, S, S]."""
        size = images.shape[-1]
        window = torch.hann_window(size + 2, periodic=False, dtype=torch.float32, device=images.device)[1:-1]
        window = window[:, None] * window
        images = images.float()
        level = (images * window).sum((2, 3), keepdim=True) / window.sum()
        power = torch.fft.fft2((images - level) * window)
        # torch.einsum would multiply a small matrix for each frequency, which takes several times as long on a CPU
        spectra = torch.stack([(power * colour[:, None].conj()).sum(0) for colour in power.unbind(1)], 1).cpu()
        self.sum = spectra if self.sum is None else self.sum + spectra

    def aliasing(self, weight: Tensor, stride: tuple[int, int], groups: int = 1) -> Tensor:
        """Return the share of each filter's response energy that a grid of `stride` pixels cannot represent: [F].

        weight: float64 [F, C / groups, k, l]. As in `aliasing_energy`, energy beyond 1 / (2·stride) cycles per pixel in
        x or in y counts; energy exactly at this limit counts half. A filter without a response has 0.
        """
        assert self.sum is not None
        size = self.sum.shape[-1]
        frequency = torch.fft.fftfreq(size, dtype=torch.float64).abs()
        row, column = (0.5 + 0.5 * torch.sign(0.5 / step - frequency + 1e-12 * (step == 1)) for step in stride)
        carried = row[:, None] * column
        shares = []
        for number, chunk in enumerate(weight.split(1 if groups > 1 else _FILTERS_AT_ONCE)):
            first = number * groups // len(weight) * weight.shape[1]
            colours = slice(first, first + weight.shape[1])
            response = torch.fft.fft2(chunk.float(), s=(size, size)).conj()  # a Conv2d computes a correlation
            power = torch.einsum("fchw,cdhw,fdhw->fhw", response, self.sum[colours, colours], response.conj())
            power = power.real.double().clamp(min=0)
            whole = power.sum((1, 2))
            shares.append(torch.where(whole > 0, 1 - (power * carried).sum((1, 2)) / whole.clamp(min=1e-300), 0.0))
        return torch.cat(shares).clamp(0, 1)


def aliasing_energy(weight: Tensor, stride: tuple[int, int]) -> Tensor:
    """Return the share of each filter's energy that a grid of `stride` pixels cannot represent: [F] in 0 … 1.

    weight: float64 [F, C, k, l]; stride: (rows, columns). Energy beyond 1 / (2·stride) cycles per pixel in x or in y
    counts: after the convolution it appears as a lower frequency that is not in the image. The exact integral of
    |W(f)|² over the band is Σ w_ab w_cd K_ac K_bd with K_ij = sinc((i − j) / stride) / stride.
    The share is 0 for stride 1 and for a filter of zeros, and 1 − 1/stride² for an impulse.
    """
    kernels = []
    for size, step in zip(weight.shape[2:], stride, strict=True):
        along = torch.arange(size, dtype=weight.dtype)
        kernels.append(torch.sinc((along[:, None] - along) / step) / step)
    inside = (weight * torch.einsum("ac,bd,nkcd->nkab", *kernels, weight)).sum((1, 2, 3))
    energy = weight.square().sum((1, 2, 3))
    return torch.where(energy > 0, 1 - inside / energy, 0.0).clamp(0, 1)


def radial_spectrum(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return each filter's power density by distance from frequency 0, [F, _BANDS], and the bands' upper ends.

    The mean over all frequencies is 1, the density of white noise. The bands evenly divide 0 … √½ cycles per
    pixel (the corner of the square of frequencies). Colours are summed. A filter of zeros has density 0.
    """
    power = torch.fft.fft2(weight, s=(_GRID, _GRID)).abs().square().sum(1).flatten(1)
    frequency = torch.fft.fftfreq(_GRID, dtype=weight.dtype)
    radius = torch.hypot(frequency[:, None], frequency).flatten()
    width = math.sqrt(0.5) / _BANDS
    band = (radius / width).long().clamp(max=_BANDS - 1)
    sums = torch.zeros(len(weight), _BANDS, dtype=weight.dtype).index_add_(1, band, power)
    mean = power.mean(1, keepdim=True)
    density = sums / torch.bincount(band, minlength=_BANDS)
    return torch.where(mean > 0, density / mean, 0.0), width * torch.arange(1, _BANDS + 1, dtype=weight.dtype)


def _summarise(filters: Filters, std: Sequence[float], limit: float) -> dict[str, Any]:
    def spread(values: Tensor) -> dict[str, float]:
        return {name: float(getattr(values, name)()) for name in ("min", "median", "mean", "max")}

    pixels = filters.rms / (255 * sum(std) / len(std))  # for inputs of 0 … 255, the paper's scale
    height, width = filters.weight.shape[2:]
    frequencies = [f"{f:.3f}" for f in filters.frequencies.tolist()]
    return {
        "filters": len(filters.rms),
        "kernel_size": height if height == width else [height, width],
        "stride": filters.stride,
        "rms": spread(filters.rms),
        "rms_for_inputs_of_0_to_255": spread(pixels),
        "beyond_limit": int((filters.rms > limit).sum()),
        "beyond_limit_for_inputs_of_0_to_255": int((pixels > limit).sum()),
        "dead": int(filters.dead.sum()),
        "flat": int(filters.flat.sum()),
        "aliasing_energy": spread(filters.aliasing),
        "aliasing_energy_of_noise": filters.noise_aliasing,
        "aliasing_response": spread(filters.response_aliasing),
        "aliasing_response_of_noise": filters.noise_response_aliasing,
        "mean_power_density_up_to": dict(zip(frequencies, filters.spectrum.mean(0).tolist(), strict=True)),
    }


def _rows(name: str, filters: Filters) -> list[dict[str, Any]]:
    """Return one row for each filter."""
    ends = (f"density_to_{end:.3f}" for end in filters.frequencies.tolist())
    return to_rows(
        run=[name] * len(filters.rms),
        filter=range(len(filters.rms)),
        rms=filters.rms.tolist(),
        dead=filters.dead.tolist(),
        flat=filters.flat.tolist(),
        largest_activation=filters.peak.tolist(),
        aliasing_energy=filters.aliasing.tolist(),
        aliasing_response=filters.response_aliasing.tolist(),
        **dict(zip(ends, filters.spectrum.T.tolist(), strict=True)),
    )


# ---- figure


@styled()
def draw_filters(measured: Mapping[str, Filters], limit: float) -> Figure:
    """Draw the filters of each run, largest RMS first (paper, Fig. 6), and their measures below."""
    columns = 12 if len(measured) > 1 else 24
    rows = max(-(-len(filters.rms) // columns) for filters in measured.values())
    tall = 0.8 + 13 / len(measured) * rows / columns
    figure = new_figure(figsize=(13, tall + 3.9))
    figure.suptitle("First-layer filters, largest RMS first (grey: 0; red frame: dead)")
    upper, lower = figure.subfigures(2, 1, height_ratios=(tall, 3.6))  # type: ignore[misc]
    sheets = upper.subplots(1, len(measured), squeeze=False)[0]
    axes = lower.subplots(1, 3)
    values = torch.cat([filters.rms for filters in measured.values()]).clamp(min=1e-6)
    low, high = min(float(values.min()), limit) / 1.3, max(float(values.max()), limit) * 1.3
    wide = high > 10 * low
    bins = np.geomspace(low, high, 25) if wide else np.linspace(low, high, 25)
    responses = [float(v) for f in measured.values() for v in (f.response_aliasing.max(), f.noise_response_aliasing)]
    most = min(1.0, 1.15 * max(0.04, *responses))
    quartiles = torch.tensor([0.25, 0.75], dtype=torch.float64)
    for panel, colour, (name, filters) in zip(sheets, PALETTE, measured.items(), strict=False):
        _draw_sheet(panel, filters, columns)
        dead, flat = int(filters.dead.sum()), int(filters.flat.sum())
        panel.set_title(f"{plain([name])[0]}\n{filters}; {dead} dead, {flat} flat")
        name = name.partition(":")[0]
        axes[0].hist(filters.rms.clamp(min=1e-6).numpy(), bins, color=colour, alpha=0.55, label=name)
        centres = filters.frequencies - filters.frequencies[0] / 2
        axes[1].plot(centres, filters.spectrum.mean(0), ".-", color=colour, label=name)
        band = filters.spectrum.quantile(quartiles, 0).numpy()
        axes[1].fill_between(centres.numpy(), *band, color=colour, alpha=0.15, lw=0)
        axes[1].axvline(0.5 / filters.stride, color=colour, ls="--", lw=1)
        axes[2].hist(filters.response_aliasing.numpy(), np.linspace(0, most, 26), color=colour, alpha=0.55, label=name)
        axes[2].axvline(filters.noise_response_aliasing, color=colour, ls="--", lw=1)
    axes[0].axvline(limit, color=INK, ls="--", lw=1)
    title = f"Size of the weights (dashed: job.limit, {limit:g})"
    axes[0].set(title=title, xlabel="RMS of a filter's weights", ylabel="filters")
    if wide:
        axes[0].set_xscale("log")
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if low <= t <= high]
        axes[0].set_xticks(ticks or [low, high], [f"{t:.2g}" for t in ticks or [low, high]])
        axes[0].xaxis.minorticks_off()
    axes[1].set(
        title="Power by frequency: mean, middle half\n(dashed: the stride's Nyquist frequency)",
        xlabel="frequency (cycles per pixel)",
        ylabel="power density (white noise: 1)",
        xlim=(0, 0.72),
        ylim=(0, None),
    )
    axes[2].set(
        title="Response beyond the stride's Nyquist frequency\n(dashed: median of white-noise filters)",
        xlabel="fraction of the energy of the filter's responses",
        xlim=(0, most),
        ylabel="filters",
    )
    axes[2].xaxis.set_major_formatter(PercentFormatter(1))
    if len(measured) > 1:
        axes[1].legend()
    return figure


def _draw_sheet(panel: Axes, filters: Filters, columns: int) -> None:
    order = filters.rms.argsort(descending=True, stable=True)
    weight = filters.weight[order]
    scale = weight.abs().amax().clamp(min=1e-12)  # one scale for all, so that a dominant filter is visible
    tiles = enlarge((127.5 * (1 + weight / scale)).round().to(torch.uint8).permute(0, 2, 3, 1), _SIDE)
    height, width = tiles.shape[1:3]
    show(panel, mosaic(tiles, columns, _GAP))
    panel.set_xlabel(f"brightest and darkest: ±{float(scale):.3g}")
    for place in filters.dead[order].nonzero().flatten().tolist():
        left, top = (place % columns) * (width + _GAP) - 2, (place // columns) * (height + _GAP) - 2
        panel.add_patch(Rectangle((left, top), width + 3, height + 3, fill=False, color=RED, lw=2))
