"""Compare measures of filters with closed forms and a numerical integral."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tests.explain.networks import network
from tests.explain.trained import Trained
from tests.helpers import read_csv
from zfnet.analyses.filters import CrossSpectra, aliasing_energy, draw_filters, measure_filters, radial_spectrum
from zfnet.config.errors import UserError
from zfnet.data import Batch
from zfnet.model import Chain
from zfnet.runs.directory import RunDirectory
from zfnet.runs.weights import load_model


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_aliasing_energy_is_the_integral_beyond_nyquist(stride: int) -> None:
    weight = torch.randn(3, 3, 7, 7, dtype=torch.float64)
    grid = 24 * 32  # the band's edge is a sample for every stride, and counts half
    frequency = torch.fft.fftfreq(grid, dtype=torch.float64).abs()
    edge = 0.5 / stride
    inside = (frequency < edge - 1e-9).double() + 0.5 * ((frequency - edge).abs() <= 1e-9).double()
    if stride == 1:
        inside = torch.ones_like(inside)
    power = torch.fft.fft2(weight, s=(grid, grid)).abs().square().sum(1)
    expected = 1 - (power * inside[:, None] * inside).sum((1, 2)) / power.sum((1, 2))
    torch.testing.assert_close(aliasing_energy(weight, (stride, stride)), expected, rtol=0, atol=1e-5)


def test_aliasing_energy_of_known_filters() -> None:
    impulse, board, zeros = (torch.zeros(1, 1, 8, 8, dtype=torch.float64) for _ in range(3))
    impulse[0, 0, 3, 5] = 2
    board[0, 0] = (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))
    smooth = torch.ones(1, 1, 32, 32, dtype=torch.float64)
    assert float(aliasing_energy(impulse, (4, 4))) == pytest.approx(1 - 1 / 16)
    assert float(aliasing_energy(impulse, (1, 1))) == pytest.approx(0, abs=1e-12)
    assert float(aliasing_energy(board, (2, 2))) > 0.99
    assert float(aliasing_energy(smooth, (2, 2))) < 0.06
    assert float(aliasing_energy(zeros, (2, 2))) == 0


def test_aliasing_of_random_filters_equals_that_of_noise() -> None:
    """Noise aliases by 1 − 1/stride² without any training, so random filters must match that baseline."""
    batch = [Batch(torch.randn(2, 3, 24, 24), torch.zeros(2), torch.zeros(2), 0, 2)]
    for size, stride, expected in ((7, 2, 0.75), (11, 4, 0.9375)):
        torch.manual_seed(0)
        result = measure_filters(Chain(nn.Sequential(nn.Conv2d(3, 40, size, stride), nn.ReLU()), 24), batch)
        assert result.noise_aliasing == pytest.approx(expected, abs=0.01)
        assert float(result.aliasing.median()) == pytest.approx(result.noise_aliasing, abs=0.02)


def test_cross_spectra_give_the_energy_of_the_responses() -> None:
    images, weight = torch.randn(4, 3, 24, 24), torch.randn(5, 3, 7, 7, dtype=torch.float64)
    spectra = CrossSpectra()
    spectra.add(images[:3])
    spectra.add(images[3:])
    window = torch.hann_window(26, periodic=False)[1:-1]
    window = window[:, None] * window
    faded = (images - (images * window).sum((2, 3), keepdim=True) / window.sum()) * window
    responses = F.conv2d(F.pad(faded, (0, 6, 0, 6), mode="circular"), weight.float())
    power = torch.fft.fft2(responses).abs().square().sum(0)
    inside = torch.tensor([1.0] * 6 + [0.5] + [0] * 11 + [0.5] + [1] * 5)  # below 1/4 cycles per pixel, at 1/4, beyond
    expected = 1 - (power * inside[:, None] * inside).sum((1, 2)) / power.sum((1, 2))
    result = spectra.aliasing(weight, (2, 2)).float()
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)
    assert (spectra.aliasing(weight, (1, 1)) < 1e-6).all()
    assert spectra.aliasing(torch.zeros_like(weight), (2, 2)).tolist() == [0] * 5


def test_response_aliasing_counts_only_what_the_images_hold() -> None:
    """Noise filters alias little on smooth images, and a filter of fine stripes aliases only on striped images."""
    coarse = F.interpolate(torch.randn(8, 3, 5, 5), size=(32, 32), mode="bicubic")
    stripes = 0.3 * (-1.0) ** torch.arange(32)
    noise, fine = torch.randn(30, 3, 7, 7, dtype=torch.float64), ((-1.0) ** torch.arange(7)).expand(1, 3, 7, 7).double()
    smooth, striped = CrossSpectra(), CrossSpectra()
    smooth.add(coarse)
    striped.add(coarse + stripes)
    assert smooth.aliasing(noise, (2, 2)).median() < 0.1
    assert aliasing_energy(noise, (2, 2)).median() > 0.7
    assert smooth.aliasing(fine, (2, 2)) < striped.aliasing(fine, (2, 2))
    assert striped.aliasing(fine, (2, 2)) > 0.9


def test_cross_spectra_of_grouped_filters() -> None:
    images, weight = torch.randn(4, 4, 16, 16), torch.randn(6, 2, 3, 3, dtype=torch.float64)
    spectra = CrossSpectra()
    spectra.add(images)
    whole = torch.zeros(6, 4, 3, 3, dtype=torch.float64)
    whole[:3, :2], whole[3:, 2:] = weight[:3], weight[3:]
    torch.testing.assert_close(spectra.aliasing(weight, (2, 2), 2), spectra.aliasing(whole, (2, 2)))


def test_radial_spectrum_of_a_wave_is_at_its_frequency() -> None:
    wave = torch.cos(2 * torch.pi * 0.25 * torch.arange(16.0, dtype=torch.float64)).expand(1, 3, 16, 16)
    impulse = torch.zeros_like(wave)
    impulse[..., 7, 7] = 3
    density, ends = radial_spectrum(torch.cat([wave, torch.ones_like(wave), impulse, torch.zeros_like(wave)]))
    torch.testing.assert_close(density[2], torch.ones(16, dtype=torch.float64))
    assert (density[3] == 0).all()
    assert float(ends[-1]) == pytest.approx(0.5**0.5)
    assert ends[density[0].argmax() - 1] < 0.25 + 1e-9 <= ends[density[0].argmax()] + 1e-9
    assert density[1].argmax() == 0


def test_measure_filters_finds_dead_and_flat_ones() -> None:
    model = network("no_pool")
    with torch.no_grad():
        model.conv1.bias[:] = 0.1
        model.conv1.weight[1] = 0
        model.conv1.bias[1] = -1.0  # never active
        model.conv1.weight[3] *= 1e-3  # flat, but active because of its bias
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    nothing = torch.zeros(2, dtype=torch.int64)
    batches = [Batch(part, nothing, nothing, 0, 2) for part in images.split(2)]
    result = measure_filters(model.chain, batches)
    assert result.dead.tolist() == [False, True, False, False, False]
    assert result.flat.tolist() == [False, True, False, True, False]
    with torch.no_grad():
        peaks = model.activations(images, ["conv1"])["conv1"].amax((0, 2, 3))
        torch.testing.assert_close(result.peak, peaks, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result.rms[0], model.conv1.weight[0].square().mean().sqrt())


def test_measure_filters_uses_the_images_that_the_first_convolution_receives() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 5, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)]
    images, nothing = torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.int64)
    pooled = F.avg_pool2d(images, 2)
    whole = measure_filters(Chain(nn.Sequential(nn.AvgPool2d(2), *layers), 32), [Batch(images, nothing, nothing, 0, 4)])
    own = measure_filters(Chain(nn.Sequential(*layers), 16), [Batch(pooled, nothing, nothing, 0, 4)])
    torch.testing.assert_close(whole.response_aliasing, own.response_aliasing)
    grouped = Chain(nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 4, 5, stride=2), *layers[1:]), 32)
    with pytest.raises(UserError, match="filters of 12 channels; only grey or colour"):
        measure_filters(grouped, [Batch(images, nothing, nothing, 0, 4)])


@pytest.mark.parametrize("activation", [nn.Identity(), nn.LeakyReLU(), nn.SiLU()])
def test_filters_whose_output_is_negative_are_not_dead(activation: nn.Module) -> None:
    convolution = nn.Conv2d(3, 3, 3)
    with torch.no_grad():
        convolution.weight[1:] = 0
        convolution.bias[:] = torch.tensor([0.1, -1.0, 0.0])
    chain, images = Chain(nn.Sequential(convolution, activation), 12), torch.randn(2, 3, 12, 12)
    result = measure_filters(chain, [Batch(images, torch.zeros(2), torch.zeros(2), 0, 2)])
    assert result.dead.tolist() == [False, False, True]
    assert float(result.peak[1]) == pytest.approx(float(activation(torch.tensor(-1.0))))


def test_measure_filters_that_are_not_square() -> None:
    torch.manual_seed(0)
    chain = Chain(nn.Sequential(nn.Conv2d(3, 4, (3, 5), (1, 2)), nn.ReLU()), 12)
    nothing = torch.zeros(2, dtype=torch.int64)
    result = measure_filters(chain, [Batch(torch.randn(2, 3, 12, 12), nothing, nothing, 0, 2)])
    assert str(result) == "4 filters 3×5, stride 2"
    turned = aliasing_energy(result.weight.transpose(2, 3), (2, 1))
    torch.testing.assert_close(result.aliasing, turned)
    assert (aliasing_energy(result.weight, (1, 1)) < result.aliasing).all()
    assert (result.aliasing < aliasing_energy(result.weight, (2, 2))).all()
    draw_filters({"A": result}, 0.1)


@pytest.mark.drawn
def test_filters_of_two_runs_stand_side_by_side(run_py, tiny_run: RunDirectory, trained: Trained) -> None:
    answer = run_py(
        "job=filters",
        f"run={tiny_run.folder}",
        f"job.other={trained.run.folder}",
        "hydra.run.dir=out",
        "trainer.threads=1",
    )
    assert answer.code == 0, answer.err
    metadata = list(json.loads(Path("out/filters.json").read_text())["runs"].values())
    assert [f["filters"] for f in metadata] == [32, 12]
    rows = read_csv(Path("out/filters.csv"))
    assert len(rows) == 44
    assert max(float(r["rms"]) for r in rows[32:]) == pytest.approx(metadata[1]["rms"]["max"])
    weight = load_model(trained.run.weights)[0].conv1.weight.detach()
    assert metadata[1]["rms"]["max"] == pytest.approx(float(weight.square().mean((1, 2, 3)).max().sqrt()), rel=1e-5)
    assert Image.open("out/figures/filters.png").width > 1000
