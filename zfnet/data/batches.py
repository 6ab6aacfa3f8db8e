"""Build batches from uint8 images on the training device.

Order and augmentation depend only on (seed, epoch, image). Batch k of an epoch does not need batch k−1, so a resume
in the middle of an epoch is exact and repeats no earlier batch.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from zfnet.config import randomness
from zfnet.config.errors import UserError, one_line, place_of
from zfnet.config.randomness import make_key, permutation, randint, seeded_generators, uniform
from zfnet.config.schema import AugmentConfig, DataConfig
from zfnet.data.images import ImageSet

PIECE = 2**26  # bytes per copy to a device


@dataclass(frozen=True)
class Batch:
    """images: float [B, 3, S, S], normalised; labels: int64 [B]; index: int64 [B], positions in the set (CPU).

    With several processes, each process gets a part of every batch: `first` is the position of the part's first image
    in the whole batch, `total` is the size of the whole batch.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    first: int
    total: int

    def split(self, count: int, exactly: bool = False) -> Iterator[tuple["Batch", bool]]:
        """Yield (micro-batch, whether it is the last) for up to `count` micro-batches of about equal size.

        exactly: yield `count`, the last ones possibly empty, so that all processes run equally many forward passes
        """
        size = len(self.labels)
        step = max(1, -(-size // count))
        pieces = count if exactly else max(1, -(-size // step))
        for piece in range(pieces):
            start = piece * step
            rows = slice(start, start + step)
            micro = (self.images[rows], self.labels[rows], self.index[rows], self.first + start, self.total)
            yield Batch(*micro), piece == pieces - 1


def preprocess(pixels: Tensor, data: DataConfig, channels_last: bool = True) -> Tensor:
    """Turn uint8 [B, h, w, 3] into the network's input: centre crop, bilinear resize, normalisation.

    Training, evaluation and prediction use this. A CPU resizes first, on bytes, because that is fastest: the result is
    within one grey level of the exact value, and bit-identical to Pillow's at 32 → 224 and 32 → 64 px. Other devices
    resize last, on floats, and exactly: a GPU then processes the large images once instead of four times.
    """
    size = data.crop_size or pixels.shape[1]
    top, left = (pixels.shape[1] - size) // 2, (pixels.shape[2] - size) // 2
    images = pixels[:, top : top + size, left : left + size].permute(0, 3, 1, 2)
    if images.device.type == "cpu":
        images = _normalise(resize(images, data.image_size), data)
    else:
        images = resize(_normalise(images, data), data.image_size)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.contiguous(memory_format=layout)


def resize(images: Tensor, size: int) -> Tensor:
    """Resize images [B, 3, h, h], uint8 or float, to [B, 3, size, size]."""
    if images.shape[-1] == size:
        return images
    # interpolate takes uint8 only with antialias=True, which has no effect when it enlarges
    if images.shape[-1] > size or images.dtype == torch.uint8:
        return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
    # with deterministic algorithms, `F.interpolate` runs 39 kernels to support a gradient that is never computed
    return torch.ops.aten.upsample_bilinear2d.default(images, [size, size], False)


def _normalise(images: Tensor, data: DataConfig) -> Tensor:
    """Return (images / 255 − mean) / std as floats, for uint8 images [B, 3, h, w]."""
    if len(set(data.mean)) == len(set(data.std)) == 1:  # on a CPU, scalars take half the time
        return images.float().mul_(1 / (255 * data.std[0])).sub_(data.mean[0] / data.std[0])
    # compute on whole rows of pixels, because CPUs are slow with vectors of length 3
    rows = images.permute(0, 2, 3, 1).float().contiguous().flatten(2)
    scale, shift = _scale_and_shift(tuple(data.mean), tuple(data.std), images.shape[-1], rows.device)
    return rows.mul_(scale).sub_(shift).unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


# small tensors are copied with non_blocking=True: a blocking copy would wait for all queued work
@lru_cache(maxsize=8)  # a step then copies nothing to the GPU
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], width: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    means, stds = (torch.tensor(v).repeat(width) for v in (mean, std))
    return (1 / (255 * stds)).to(device, non_blocking=True), (means / stds).to(device, non_blocking=True)


class Batches:
    """The batches of one set on one device.

    share: (rank, world size) of the processes that divide each batch.
    transforms: called in order on each training image after `augment`, see `apply_transforms`.

    If the images fit in the fraction `data.device_memory` of a GPU's free memory, they are copied there once.
    Otherwise each batch is gathered on the CPU, one batch ahead of the loop.
    """

    def __init__(
        self,
        images: ImageSet,
        data: DataConfig,
        device: torch.device,
        *,
        seed: int = 0,
        augment: AugmentConfig | None = None,
        transforms: Sequence[Callable[[Tensor], Tensor]] = (),
        channels_last: bool = True,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.rank, self.processes = share
        self.set, self.data, self.device, self.seed = images, data, device, seed
        self.augment, self.transforms, self.channels_last = augment, transforms, channels_last
        self.labels = images.labels.to(device)
        self.resident = self._resident()

    def __len__(self) -> int:
        return -(-len(self.set) // self.data.batch_size)

    def _resident(self) -> Tensor | None:
        """Return the set's images on the GPU, or None if there is no GPU or they do not fit."""
        if self.device.type != "cuda":
            return None
        needed = len(self.set) * self.set.images[0].nbytes
        free, _ = torch.cuda.mem_get_info(self.device)
        if needed > free * self.data.device_memory:
            return None
        return resident(self.set, self.device)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the shuffled, augmented batches of an epoch (counted from 0), from batch `start` on."""
        order = permutation(make_key(self.seed, randomness.ORDER, epoch), len(self.set))
        if self.data.sampler == "balanced":
            order = balanced_draws(self.set.labels, self.seed, epoch)[order]
        yield from self._batches(order, start, epoch)

    def in_order(self) -> Iterator[Batch]:
        """Yield the batches in the set's own order, without augmentation."""
        yield from self._batches(torch.arange(len(self.set)), 0, None)

    def _batches(self, order: Tensor, start: int, epoch: int | None) -> Iterator[Batch]:
        size = self.data.batch_size
        global_batches = [order[k * size : (k + 1) * size] for k in range(start, len(self))]
        bounds = [[len(w) * r // self.processes for r in (self.rank, self.rank + 1)] for w in global_batches]
        shards = [w[first:end] for w, (first, end) in zip(global_batches, bounds, strict=True)]
        for batch, whole, (first, _) in zip(self._prefetch(shards, epoch), global_batches, bounds, strict=True):
            yield Batch(*batch, first=first, total=len(whole))

    def _prefetch(self, shards: list[Tensor], epoch: int | None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (images, labels, index) of each shard; pixels that must be copied are prefetched, one shard ahead.

        The index is copied to the device and the random numbers are drawn once for all shards, because doing this for
        each batch would launch about a hundred small kernels per batch.
        """
        if not shards:
            return
        sizes = [len(draws) for draws in shards]
        all_draws = torch.cat(shards).to(self.device, non_blocking=True)
        random: list[tuple[Tensor, ...]] = [()] * len(shards)
        if epoch is not None and self.augment is not None:
            numbers = draw(all_draws, self.set.images.shape[1], self.augment, self.data, self.seed, epoch)
            random = list(zip(*(values.split(sizes) for values in numbers), strict=True)) or random
        parts = zip(shards, (all_draws % len(self.set)).split(sizes), random, strict=True)
        if self.resident is not None or self.device.type == "cpu":
            for draws, where, values in parts:
                pixels = self._read(draws) if self.resident is None else self.resident[where]
                yield self._finish(draws, where, values, pixels, epoch)
            return
        with ThreadPoolExecutor(max_workers=1) as worker:  # gather and copy the next batch while this one trains
            waiting = [worker.submit(self._read, draws) for draws in shards[:1]]
            for k, (draws, where, values) in enumerate(parts):
                pixels = waiting.pop().result()
                waiting += [worker.submit(self._read, draws) for draws in shards[k + 1 : k + 2]]
                yield self._finish(draws, where, values, pixels, epoch)

    def _read(self, draws: Tensor) -> Tensor:
        """Return the stored pixels of these draws, uint8 [B, h, w, 3], copied to the device."""
        index = draws % len(self.set)
        pixels = self.set.pixels(index)
        if self.device.type == "cuda":
            return pixels.pin_memory().to(self.device, non_blocking=True)
        return pixels.to(self.device)

    def _finish(
        self, draws: Tensor, where: Tensor, random: tuple[Tensor, ...], pixels: Tensor, epoch: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Augment and preprocess the pixels of a batch; `where` is the images' index on the device."""
        if epoch is not None and self.augment is not None:
            pixels = augment(pixels, random, self.augment, self.data)
        data = self.data
        if epoch is not None and self.transforms:
            pixels = apply_transforms(pixels, draws, self.transforms, self.seed, epoch)
            data = replace(data, crop_size=None)  # already cropped; transforms can change the size
        index = draws % len(self.set)
        return preprocess(pixels, data, self.channels_last), self.labels[where], index


def balanced_draws(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Return N draws for labels [N] in which each class is equally frequent, not yet shuffled.

    Draw i + kN is repetition k of image i, with its own random augmentation. If a class has more images than draws,
    some are left out, different ones in each epoch.
    """
    total, classes = len(labels), labels.unique().tolist()
    draws = []
    for place, label in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        members = members[permutation(make_key(seed, randomness.CLASS, epoch, label), len(members))]
        turn = torch.arange(total // len(classes) + (place < total % len(classes)))
        draws.append(members[turn % len(members)] + turn // len(members) * total)
    return torch.cat(draws)


def resident(images: ImageSet, device: torch.device) -> Tensor:
    """Copy all images of a set to the device, uint8 [N, h, w, 3], without a second full copy on the host."""
    out = torch.empty((len(images), *images.images.shape[1:]), dtype=torch.uint8, device=device)
    for part in torch.arange(len(images)).split(max(1, PIECE // images.images[0].nbytes)):
        out[part[0] : part[-1] + 1] = images.pixels(part).to(device)
    return out


def draw(index: Tensor, height: int, how: AugmentConfig, data: DataConfig, seed: int, epoch: int) -> tuple[Tensor, ...]:
    """Draw the random numbers of `augment` for one epoch of the images at `index`, int64 [N], `height` pixels high.

    Returns tensors [N]: each crop's top and left, whether it is mirrored and, with cutout, each hole's first row and
    column; an empty tuple if `how` and `data` change no image.
    """
    size = data.crop_size or height
    if not (how.crop_padding or how.flip or how.cutout or size != height):
        return ()

    def integers(purpose: int, high: int) -> Tensor:
        return randint(make_key(seed, purpose, epoch), index, high)

    windows = height + 2 * how.crop_padding - size + 1
    alternating = how.flips == "alternating" and how.flip > 0
    flipped = uniform(make_key(seed, randomness.FLIP, 0 if alternating else epoch), index) < how.flip
    if alternating and epoch % 2:
        flipped = ~flipped
    drawn: tuple[Tensor, ...] = (integers(randomness.CROP_Y, windows), integers(randomness.CROP_X, windows), flipped)
    if how.cutout:
        drawn += tuple(integers(p, size) - how.cutout // 2 for p in (randomness.CUTOUT_Y, randomness.CUTOUT_X))
    return drawn


def augment(pixels: Tensor, drawn: tuple[Tensor, ...], how: AugmentConfig, data: DataConfig) -> Tensor:
    """Apply random crop, horizontal flip and cutout, with the random numbers that `draw` returned for each image.

    pixels: uint8 [B, h, w, 3]. Returns uint8 [B, c, c, 3] with c = data.crop_size or h. Cutout fills with the mean
    colour, and so does padding unless it is reflected.
    """
    if not drawn:
        return pixels
    size = data.crop_size or pixels.shape[1]
    fill = _mean_colour(tuple(data.mean), pixels.device)
    if how.crop_padding:
        pixels = _pad(pixels, how.crop_padding, None if how.padding_mode == "reflect" else fill)
    top, left, flipped, *hole = drawn
    cut = _crop_on_cpu if pixels.device.type == "cpu" else _crop_on_gpu
    out = cut(pixels, top, left, flipped, size)
    if how.cutout:
        along = torch.arange(size, device=pixels.device)
        row, column = (along - first[:, None] for first in hole)
        hole_rows, hole_columns = ((place >= 0) & (place < how.cutout) for place in (row, column))
        out = torch.where((hole_rows[:, :, None] & hole_columns[:, None, :])[..., None], fill, out)
    return out


@lru_cache(maxsize=8)
def _mean_colour(mean: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(mean).mul(255).round().clamp(0, 255).to(torch.uint8).to(device, non_blocking=True)


def apply_transforms(
    pixels: Tensor, index: Tensor, transforms: Sequence[Callable[[Tensor], Tensor]], seed: int, epoch: int
) -> Tensor:
    """Call each transform on each image, with generators seeded by (seed, epoch, image).

    pixels: uint8 [B, h, w, 3]; index: int64 [B], on the CPU. A transform takes uint8 [3, h, w] and returns uint8, or
    floats from 0 to 1; the last transform must return squares of one size s. Returns uint8 [B, s, s, 3].

    Each image is transformed alone, so that its random numbers do not depend on the batch. Raises UserError otherwise.
    """
    out = []
    with seeded_generators(pixels.device) as set_seed:
        for image, number in zip(pixels.permute(0, 3, 1, 2), index.tolist(), strict=True):
            set_seed(make_key(seed, randomness.TRANSFORM, epoch, number))
            for place, transform in enumerate(transforms):
                try:
                    image = transform(image)
                except Exception as error:  # user code can raise any exception
                    slot = f"augment.transforms.{place} ({type(transform).__name__})"
                    given = f"image {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
                    raise UserError(f"{slot}: fails on an {given}: {one_line(error)}{place_of(error)}") from error
            if not isinstance(image, Tensor):
                raise UserError(f"augment.transforms: return {type(image).__name__}; must be a tensor, uint8 [3, s, s]")
            if image.is_floating_point():
                image = image.mul(255).round().clamp(0, 255).to(torch.uint8)
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2]:
                raise UserError(f"augment.transforms: return {list(image.shape)} of {image.dtype}, not uint8 [3, s, s]")
            out.append(image)
    if len({image.shape for image in out}) > 1:
        raise UserError("augment.transforms: return images of different sizes; end with a resize")
    return torch.stack(out).permute(0, 2, 3, 1).contiguous() if out else pixels


def _pad(pixels: Tensor, width: int, fill: Tensor | None) -> Tensor:
    """Pad images [B, h, w, 3] on all sides with the colour `fill` [3]; if it is None, reflect them at their edges."""
    batch, height, across, _ = pixels.shape
    if fill is None:
        rows, columns = (_reflection_index(side, width, pixels.device) for side in (height, across))
        return pixels[:, rows[:, None], columns]
    out = fill.expand(batch, height + 2 * width, across + 2 * width, 3).clone()
    out[:, width:-width, width:-width] = pixels
    return out


def _reflection_index(side: int, width: int, device: torch.device) -> Tensor:
    """Return the source index of each pixel of a reflect-padded row of `side` pixels, int64 [side + 2 · width]."""
    # F.pad rejects a padding as wide as the image
    turn = max(1, 2 * side - 2)
    place = torch.arange(-width, side + width, device=device) % turn
    return torch.minimum(place, turn - place)


def _crop_on_gpu(pixels: Tensor, top: Tensor, left: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Crop a square from each image [B, h, w, 3] at (top, left) [B]; mirror it where `flipped` [B] is true."""
    windows = pixels.unfold(1, size, 1).unfold(2, size, 1)  # a view: [B, tops, lefts, 3, size, size]
    out = windows[torch.arange(len(pixels), device=pixels.device), top, left]
    return torch.where(flipped[:, None, None, None], out.flip(3), out).permute(0, 2, 3, 1)


def _crop_on_cpu(pixels: Tensor, top: Tensor, left: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Do the same row by row, because that is faster on a CPU than gathering single bytes."""
    out = np.empty((len(pixels), size, size, 3), np.uint8)
    for window, image, y, x in zip(out, pixels.numpy(), top.tolist(), left.tolist(), strict=True):
        window[...] = image[y : y + size, x : x + size]
    cut = torch.from_numpy(out)
    mirrored = cut.permute(0, 3, 1, 2).flip(3).permute(0, 2, 3, 1)  # flip has a fast path for NCHW
    out[flipped.numpy()] = mirrored.numpy()[flipped.numpy()]
    return cut
