"""Order and augmentation depend only on (seed, epoch, image); preprocessing equals Pillow's resize."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from tests.helpers import assert_resumes_exactly, augment_config, data_config, random_images, train_tiny_exact
from tests.own import Squash
from zfnet.config.errors import UserError
from zfnet.data import batches as batches_module
from zfnet.data.batches import (
    Batches,
    _crop_on_cpu,
    _crop_on_gpu,
    _normalise,
    balanced_draws,
    draw,
    preprocess,
    resident,
    resize,
)
from zfnet.data.images import image_set

CPU = torch.device("cpu")


def augment(pixels: torch.Tensor, index: torch.Tensor, how, data, seed: int, epoch: int) -> torch.Tensor:
    drawn = draw(index, pixels.shape[1], how, data, seed, epoch)
    return batches_module.augment(pixels, drawn, how, data)


def batches(count: int, batch_size: int = 4, size: int = 16, seed: int = 0, how=None, transforms=()) -> Batches:
    images = image_set(random_images(count, size).numpy(), torch.arange(count) % 3, "abc")
    data = data_config(batch_size=batch_size, image_size=size)
    return Batches(images, data, CPU, seed=seed, augment=how, transforms=transforms)


def by_image(parts: Batches, epoch: int = 0) -> torch.Tensor:
    """Return an epoch's images in the set's order."""
    made = list(parts.epoch(epoch))
    return torch.cat([b.images for b in made])[torch.cat([b.index for b in made]).argsort()]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5), st.integers(0, 2**40))
def test_an_epoch_shows_each_image_once(count: int, batch_size: int, epoch: int, seed: int) -> None:
    parts = batches(count, batch_size, 4, seed)
    epoch_batches = list(parts.epoch(epoch))
    assert len(epoch_batches) == len(parts) == -(-count // batch_size)
    assert torch.cat([b.index for b in epoch_batches]).sort().values.tolist() == list(range(count))
    for b in epoch_batches:
        assert torch.equal(b.labels, b.index % 3)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(torch.cat([b.index for b in batches(30, seed=seed).epoch(epoch)]).tolist())
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    again = torch.cat([b.index for b in batches(30, seed=2).epoch(1)])
    assert tuple(again.tolist()) in orders


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=5).filter(any), st.integers(0, 5), st.integers(0, 2**40))
def test_a_balanced_epoch_shows_each_class_equally_often(sizes: list[int], epoch: int, seed: int) -> None:
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    draws = balanced_draws(labels, seed, epoch)
    assert len(draws) == len(draws.unique()) == len(labels)  # each repetition has its own draw number
    index = draws % len(labels)
    classes = labels[index].bincount(minlength=len(sizes))[torch.tensor(sizes) > 0]
    assert classes.max() - classes.min() <= 1
    for label in range(len(sizes)):  # within a class, each image is equally frequent
        times = index.bincount(minlength=len(labels))[labels == label]
        assert not len(times) or times.max() - times.min() <= 1


def test_balanced_epochs_differ_and_repetitions_are_augmented_anew() -> None:
    images = image_set(random_images(30, 16).numpy(), (torch.arange(30) > 27).long(), "ab")
    how, data = augment_config(crop_padding=2, flip=0.5), data_config(batch_size=7, image_size=16, sampler="balanced")
    parts = Batches(images, data, CPU, augment=how)
    epochs = [list(parts.epoch(epoch)) for epoch in range(2)]
    orders = [torch.cat([b.index for b in epoch]) for epoch in epochs]
    assert orders[0].tolist() != orders[1].tolist()
    assert {*orders[0].tolist()} != {*orders[1].tolist()}  # epochs leave out different images of the large class
    repeated = torch.cat([b.images for b in epochs[0]])[orders[0] == 28]
    assert len(repeated) in (7, 8)
    assert len(repeated.flatten(1).unique(dim=0)) > 4
    for batch, again in zip(epochs[0][2:], parts.epoch(0, 2), strict=True):  # a resume starts at batch 2
        assert torch.equal(batch.labels, (batch.index > 27).long())
        assert torch.equal(batch.images, again.images)


def test_random_numbers_are_drawn_once_an_epoch(monkeypatch) -> None:
    """On a GPU, each draw launches many small kernels."""
    drawn = []

    def noted(index: torch.Tensor, *rest):
        drawn.append(len(index))
        return draw(index, *rest)

    monkeypatch.setattr(batches_module, "draw", noted)
    how = augment_config(crop_padding=2, flip=0.5, cutout=5)
    assert len(list(batches(30, how=how).epoch(3, 2))) == 6
    assert drawn == [22]


def test_floats_are_resized_as_pytorch_does() -> None:
    """`resize` calls the kernel directly, because `F.interpolate` is slow on a GPU in deterministic mode."""
    images = torch.rand(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    expected = torch.nn.functional.interpolate(images, size=(20, 20), mode="bilinear")
    assert torch.equal(resize(images, 20), expected)


def test_batch_k_without_the_ones_before() -> None:
    parts = batches(30, how=augment_config(crop_padding=2, flip=0.5, cutout=5))
    whole = list(parts.epoch(3))
    for start in range(len(whole) + 1):
        rest = list(parts.epoch(3, start))
        assert len(rest) == len(whole) - start
        for a, b in zip(whole[start:], rest, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)


def test_augmentation_is_a_function_of_seed_epoch_and_image() -> None:
    how = augment_config(crop_padding=3, flip=0.5, cutout=4)
    whole = by_image(batches(24, 24, how=how))
    for batch_size in (1, 5):
        assert torch.equal(whole, by_image(batches(24, batch_size, how=how)))
    for other in (by_image(batches(24, 24, seed=1, how=how)), by_image(batches(24, 24, how=how), epoch=1)):
        changed = (whole != other).flatten(1).any(1)
        assert changed.sum() > 18


@pytest.mark.parametrize("piece", [1, 200, 10_000])
def test_a_set_moves_to_a_device_in_pieces(monkeypatch, piece: int) -> None:
    monkeypatch.setattr("zfnet.data.batches.PIECE", piece)
    images = image_set(random_images(7, 4).numpy(), torch.zeros(7), "a").take(torch.tensor([5, 0, 6, 2, 3]))
    assert torch.equal(resident(images, CPU), images.pixels(range(5)))


def test_in_order_is_neither_shuffled_nor_augmented() -> None:
    parts = batches(10, how=augment_config(crop_padding=3, flip=1.0, cutout=4))
    made = list(parts.in_order())
    assert torch.cat([b.index for b in made]).tolist() == list(range(10))
    plain = preprocess(parts.set.pixels(range(10)), parts.data)
    assert torch.equal(torch.cat([b.images for b in made]), plain)


def numbered(count: int = 1) -> torch.Tensor:
    """Return images in which pixel (y, x) is 10 y + x + 1 in all channels; 0 is the fill colour in these tests."""
    grid = 10 * torch.arange(6)[:, None] + torch.arange(6)[None] + 1
    return grid[None, :, :, None].expand(count, 6, 6, 3).to(torch.uint8).contiguous()


def test_no_augmentation_is_the_identity() -> None:
    pixels = numbered(5)
    assert augment(pixels, torch.arange(5), augment_config(), data_config(), 0, 0) is pixels


def test_flip_reverses_columns_at_its_rate() -> None:
    pixels, index, data = numbered(4000), torch.arange(4000), data_config(mean=[0.0] * 3)
    always = augment(pixels, index, augment_config(flip=1.0), data, 0, 0)
    assert torch.equal(always, pixels.flip(2))
    some = augment(pixels, index, augment_config(flip=0.3), data, 0, 0)
    flipped = (some == pixels.flip(2)).flatten(1).all(1)
    assert torch.equal(some[~flipped], pixels[~flipped])
    assert flipped.double().mean().item() == pytest.approx(0.3, abs=0.03)


def test_alternating_flips_show_each_image_both_ways_in_two_epochs() -> None:
    pixels, index, data = numbered(2000), torch.arange(2000), data_config(mean=[0.0] * 3)

    def flipped(seed: int, epoch: int, flips: str = "alternating") -> torch.Tensor:
        out = augment(pixels, index, augment_config(flip=0.5, flips=flips), data, seed, epoch)
        return (out == pixels.flip(2)).flatten(1).all(1)

    first = flipped(0, 0)
    assert first.double().mean().item() == pytest.approx(0.5, abs=0.05)
    for epoch in range(5):
        assert torch.equal(flipped(0, epoch), first ^ (epoch % 2 == 1))
    assert flipped(1, 0).logical_xor(first).sum() > 800  # another seed flips another half
    assert torch.equal(flipped(0, 0, flips="random"), first)
    assert flipped(0, 1, flips="random").logical_xor(~first).sum() > 800
    assert not draw(index, 6, augment_config(cutout=1, flips="alternating"), data, 0, 1)[2].any()  # flip=0


def test_crop_is_a_window_of_the_padded_image() -> None:
    pad, size, count = 2, 6, 3000
    data = data_config(mean=[0.0] * 3)
    out = augment(numbered(count), torch.arange(count), augment_config(crop_padding=pad), data, 0, 0)
    padded = torch.nn.functional.pad(numbered()[0, :, :, 0], (pad,) * 4)
    windows = {
        tuple(padded[y : y + size, x : x + size].flatten().tolist()): (y, x)
        for y in range(2 * pad + 1)
        for x in range(2 * pad + 1)
    }
    places = [windows[tuple(image[:, :, 0].flatten().tolist())] for image in out]
    counts = torch.bincount(torch.tensor([y * 5 + x for y, x in places]), minlength=25)
    assert ((counts - count / 25) ** 2 / (count / 25)).sum() < 60  # 24 degrees of freedom
    assert torch.equal(out[..., 0], out[..., 2])


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 20))
def test_padding_reflects_as_numpy_does(side: int, width: int) -> None:
    how = augment_config(crop_padding=width, padding_mode="reflect")
    image, index = random_images(1, side), torch.arange(30)
    out = augment(image.expand(30, -1, -1, -1), index, how, data_config(), 0, 0)
    padded = np.pad(image[0].numpy(), [(width, width)] * 2 + [(0, 0)], mode="reflect")
    tops, lefts, _ = draw(index, side, how, data_config(), 0, 0)
    for cut, top, left in zip(out.numpy(), tops.tolist(), lefts.tolist(), strict=True):
        assert np.array_equal(cut, padded[top : top + side, left : left + side])


def test_crop_size_takes_windows_inside() -> None:
    data = data_config(crop_size=4, mean=[0.0] * 3)
    out = augment(numbered(500), torch.arange(500), augment_config(), data, 0, 0)
    assert out.shape == (500, 4, 4, 3)
    corners = {tuple(c) for c in torch.stack([out[:, 0, 0, 0], out[:, 3, 3, 0]], 1).tolist()}
    assert corners == {(10 * y + x + 1, 10 * (y + 3) + x + 4) for y in range(3) for x in range(3)}


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(2, 9), st.integers(1, 9), st.integers(0, 2**16))
def test_crops_on_cpu_and_gpu_are_equal(count: int, stored: int, size: int, seed: int) -> None:
    size = min(size, stored)
    chance = torch.Generator().manual_seed(seed)
    top, left = torch.randint(0, stored - size + 1, (2, count), generator=chance)
    flipped = torch.rand(count, generator=chance) < 0.5
    pixels = random_images(count, stored)
    copied, gathered = (cut(pixels, top, left, flipped, size) for cut in (_crop_on_cpu, _crop_on_gpu))
    assert torch.equal(copied, gathered)


def test_cutout_blots_one_square_of_mean_colour() -> None:
    data = data_config(mean=[0.2, 0.4, 1.0])
    pixels = torch.full((400, 9, 9, 3), 7, dtype=torch.uint8)
    out = augment(pixels, torch.arange(400), augment_config(cutout=4), data, 0, 0)
    centres = set()
    for image in out:
        hole = image[..., 0] != 7
        assert image[hole].unique(dim=0).tolist() == [[51, 102, 255]]
        rows, columns = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        assert hole.sum() == len(rows) * len(columns)
        assert 2 <= len(rows) <= 4
        assert 2 <= len(columns) <= 4
        if len(rows) < 4:  # only the border can shorten a hole
            assert rows[0] == 0 or rows[-1] == 8
        centres.add((rows[0].item(), columns[0].item()))
    assert len(centres) > 40


def test_flips_crops_and_holes_are_independent() -> None:
    """Flips and crops use independent random numbers, so they must not correlate."""
    data, count = data_config(mean=[0.0] * 3), 4000
    how = augment_config(crop_padding=1, flip=0.5)
    out = augment(numbered(count), torch.arange(count), how, data, 0, 0)[:, 3, :, 0].long()
    flipped = out[:, 2] > out[:, 3]
    upper = augment(numbered(count), torch.arange(count), how, data, 0, 0)[:, 0].amax((1, 2)) == 0
    both = torch.stack([flipped.double(), upper.double()])
    assert abs(torch.corrcoef(both)[0, 1]) < 5 / count**0.5


BYTES = {"mean": [0.0] * 3, "std": [1 / 255] * 3}  # normalisation then leaves 0 … 255


@pytest.mark.parametrize("wanted", [64, 224])
def test_resizing_cifar_equals_pillow_to_the_bit(wanted: int) -> None:
    pixels = random_images(4, 32)
    out = preprocess(pixels, data_config(image_size=wanted, **BYTES))
    assert out.shape == (4, 3, wanted, wanted)
    for image, resized in zip(pixels, out, strict=True):
        expected = Image.fromarray(image.numpy()).resize((wanted, wanted), Image.Resampling.BILINEAR)
        assert np.array_equal(resized.permute(1, 2, 0).round().numpy(), np.asarray(expected, dtype=np.float32))


@pytest.mark.parametrize(("stored", "wanted"), [(32, 33), (64, 20), (48, 48), (64, 224), (256, 224), (40, 1)])
def test_resizing_is_exact_to_a_grey_level(stored: int, wanted: int) -> None:
    """Compare with float64; the uint8 resize rounds twice. Noise images have the largest errors."""
    pixels = random_images(4, stored)
    exact = torch.nn.functional.interpolate(
        pixels.permute(0, 3, 1, 2).double(), size=(wanted, wanted), mode="bilinear", antialias=True
    )
    resized = preprocess(pixels, data_config(image_size=wanted, **BYTES)).double()
    assert (resized - exact).abs().max() <= 1.001


@pytest.mark.parametrize(("stored", "wanted"), [(32, 224), (64, 20), (48, 48)])
def test_resizing_last_as_on_a_gpu_is_within_a_grey_level(stored: int, wanted: int) -> None:
    data = data_config(image_size=wanted, mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.25])
    pixels = random_images(4, stored)
    last = resize(_normalise(pixels.permute(0, 3, 1, 2), data), wanted)
    apart = (preprocess(pixels, data) - last).abs() * torch.tensor(data.std).view(3, 1, 1) * 255
    assert apart.max() <= 1.001


def test_normalisation() -> None:
    data = data_config(image_size=4, mean=[0.1, 0.5, 0.9], std=[0.2, 0.3, 0.4])
    pixels = random_images(3, 4)
    expected = (pixels.permute(0, 3, 1, 2).double() / 255 - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(
        data.std
    ).view(3, 1, 1)
    torch.testing.assert_close(preprocess(pixels, data).double(), expected, rtol=1e-5, atol=1e-5)
    grey = data_config(image_size=4)  # equal means and deviations use the faster path
    expected = (pixels.permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.5
    torch.testing.assert_close(preprocess(pixels, grey).double(), expected, rtol=1e-5, atol=1e-6)


def test_crop_size_cuts_the_centre() -> None:
    data = data_config(image_size=2, crop_size=2, mean=[0.0] * 3, std=[1 / 255] * 3)
    assert preprocess(numbered(1), data)[0, 0].round().tolist() == [[23, 24], [33, 34]]


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format(channels_last: bool) -> None:
    out = preprocess(random_images(2, 8), data_config(image_size=8), channels_last)
    assert out.is_contiguous(memory_format=torch.channels_last) is channels_last


# -- torchvision's and custom transforms

JITTER = ("ColorJitter", {"brightness": 0.5, "hue": 0.2}), ("RandomRotation", {"degrees": 30})


def transforms() -> list[nn.Module]:
    return [getattr(v2, name)(**settings) for name, settings in JITTER]


def with_transforms(count: int, batch_size: int, operations: list[Any], seed: int = 0) -> Batches:
    return batches(count, batch_size, seed=seed, how=augment_config(flip=0.5), transforms=operations)


def test_transforms_are_a_function_of_seed_epoch_and_image() -> None:
    whole = by_image(with_transforms(12, 12, transforms()))
    for batch_size in (1, 5):
        assert torch.equal(whole, by_image(with_transforms(12, batch_size, transforms())))
    for other in (
        by_image(with_transforms(12, 12, transforms(), seed=1)),
        by_image(with_transforms(12, 12, transforms()), epoch=1),
        by_image(with_transforms(12, 12, [])),
    ):
        assert (whole != other).flatten(1).any(1).sum() > 9


def test_transforms_of_batch_k_need_none_before_and_touch_no_generator() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    parts = with_transforms(12, 5, transforms())
    whole = list(parts.epoch(1))
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    for a, b in zip(whole[1:], parts.epoch(1, 1), strict=True):
        assert torch.equal(a.images, b.images)


def test_transforms_do_not_touch_evaluation() -> None:
    parts = with_transforms(6, 4, transforms())
    plain = preprocess(parts.set.pixels(range(6)), parts.data)
    assert torch.equal(torch.cat([b.images for b in parts.in_order()]), plain)


def test_transforms_may_give_floats_and_another_size() -> None:
    operations = [v2.CenterCrop(8), v2.ToDtype(torch.float32, scale=True)]
    parts, cropped = with_transforms(6, 4, operations), with_transforms(6, 4, [v2.CenterCrop(8)])
    assert torch.equal(by_image(parts), by_image(cropped))
    assert by_image(parts).shape == (6, 3, 16, 16)


@pytest.mark.parametrize("side", [8, 24])
def test_transforms_that_change_the_size_come_after_the_window(side: int) -> None:
    """The output of the transforms is not cropped to data.crop_size again."""
    given = random_images(1, side)
    parts = with_transforms(6, 4, [v2.Lambda(lambda image: given[0].permute(2, 0, 1))])
    parts.data = dataclasses.replace(parts.data, crop_size=12)
    expected = preprocess(given, dataclasses.replace(parts.data, crop_size=None))
    assert torch.equal(by_image(parts), expected.expand(6, -1, -1, -1))


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (Squash(4), "augment.transforms: return [3, 4, 16] of torch.uint8, not uint8 [3, s, s]"),
        (Squash(), "augment.transforms: return images of different sizes; end with a resize"),
        (v2.Grayscale(), "augment.transforms: return [1, 16, 16] of torch.uint8"),
        (v2.ToDtype(torch.int32), "augment.transforms: return [3, 16, 16] of torch.int32"),
    ],
)
def test_transforms_that_give_other_shapes_are_refused(operation: nn.Module, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        by_image(with_transforms(12, 12, [operation]))


TRANSFORMS = (
    "augment.transforms=["
    + ",".join(
        f"{{_target_:torchvision.transforms.v2.{name},{','.join(f'{k}:{v}' for k, v in settings.items())}}}"
        for name, settings in JITTER
    )
    + "]"
)


def test_transforms_resume_exactly_and_accumulate_alike(tmp_path: Path) -> None:
    words = ("augment=crop_flip", TRANSFORMS)
    run = assert_resumes_exactly(tmp_path, [11], *words)
    parts = train_tiny_exact(tmp_path / "parts", *words, "trainer.accumulate=3").read_history()
    for row, other in zip(parts, run.read_history(), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
    plain = train_tiny_exact(tmp_path / "plain", words[0]).read_history()
    assert plain[0]["train_loss"] != pytest.approx(parts[0]["train_loss"], rel=1e-4)
