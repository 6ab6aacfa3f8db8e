"""Metrics of how well a picture explains one number that a network computes, as functions of tensors.

They use the network as a `Measure`, which returns an item's number after some cells of its frame are removed. The cells
form a grid over the pixels that count, so that every method, the random order and the greedy order remove equal amounts
(like the regions of Samek et al. 2017).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zfnet.config.randomness import CONTROL, make_key, uniform
from zfnet.explain.boxes import box_cells, cell_means

Measure = Callable[[Tensor, Tensor], Tensor]  # (item int64 [B], removed bool [B, P]) → float [B]

FILLINGS = ("mean colour", "blur", "noisy linear")
_RANDOM_ORDERS = 4  # each is used forwards and backwards
_FINE = 2  # grid points of noisy linear imputation along each side of a cell
_MEAN_COLOUR_WEIGHT = 1e-4  # without it the equations are singular if every point is removed
_NOISE_STD = 0.01
_PIXELS_AT_ONCE = 4 << 20


# ---- deletion and insertion


def removal_scores(
    measure: Measure, relevance: Mapping[str, Tensor], steps: int, seed: int = 0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the (deletion, insertion) scores, [U] each, of each method's relevance of cells [U, P].

    Deletion removes the most relevant cells first, in `steps` equal steps, and takes the area under the curve of the
    number. Insertion adds the most relevant cells first: this is the curve of removing the least relevant cells first,
    read backwards. A score is 0 for a random order and 1 for the greedy order, in which each step removes the cells
    that, removed alone, lower the number most (insertion: keep it highest). NaN where the two orders hardly differ.
    """
    count, cells = next(iter(relevance.values())).shape
    item = torch.arange(count)
    nothing = torch.zeros(count, cells, dtype=torch.bool)
    whole, empty = measure(item, nothing), measure(item, ~nothing)

    def areas(scores: Tensor, key: int) -> tuple[Tensor, Tensor]:
        rank, curves = ranks_of(scores, key), []
        for place in (rank, cells - 1 - rank):
            left = [measure(item, place < cells * step // steps) for step in range(1, steps)]
            curves.append(_area([whole, *left, empty]))
        return curves[0], curves[1]

    number = torch.arange(count * cells).view(count, cells)
    draws = [areas(uniform(make_key(seed, CONTROL, 10, k), number), k) for k in range(_RANDOM_ORDERS)]
    chance = torch.stack([area for pair in draws for area in pair]).mean(0)
    lowest, highest = greedy_areas(measure, whole, empty, cells, steps)
    enough = 0.01 * whole.abs()
    scores = {}
    for method, given in relevance.items():
        deletion, insertion = areas(given, make_key(seed, CONTROL, 11))
        scores[method] = (
            torch.where(chance - lowest > enough, (chance - deletion) / (chance - lowest), torch.nan),
            torch.where(highest - chance > enough, (insertion - chance) / (highest - chance), torch.nan),
        )
    return scores


def greedy_areas(measure: Measure, whole: Tensor, empty: Tensor, cells: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return the areas [U] under the curves of two greedy orders: lower the number most, and keep it highest."""
    every = torch.arange(len(whole))
    alone = measure(every.repeat_interleave(cells), torch.eye(cells, dtype=torch.bool).repeat(len(whole), 1))
    areas = []
    for sign in (1, -1):
        removed, curve = torch.zeros(len(whole), cells, dtype=torch.bool), [whole]
        for step in range(1, steps):
            item, cell = (~removed).nonzero().unbind(1)
            trial = removed[item]
            trial[torch.arange(len(item)), cell] = True
            left = alone if step == 1 else measure(item, trial)
            table = torch.full(removed.shape, torch.inf).index_put((item, cell), sign * left.float())
            amount = cells * step // steps - cells * (step - 1) // steps
            removed = removed.scatter(1, table.topk(amount, largest=False).indices, True)
            curve.append(measure(every, removed))
        areas.append(_area([*curve, empty]))
    return areas[0], areas[1]


def ranks_of(relevance: Tensor, key: int) -> Tensor:
    """Return each cell's rank, 0 for the most relevant: int64 [U, P]. Ties are broken at random."""
    chance = uniform(key, torch.arange(relevance.numel()).view_as(relevance)).argsort(1)
    order = chance.gather(1, relevance.gather(1, chance).argsort(dim=1, descending=True, stable=True))
    return torch.empty_like(order).scatter(1, order, torch.arange(order.shape[1]).expand_as(order))


def _area(curve: list[Tensor]) -> Tensor:
    return torch.trapezoid(torch.stack(curve), dim=0) / (len(curve) - 1)


@dataclass(frozen=True)
class Removal:
    """A `Measure` that removes cells of U items and returns their numbers without these cells.

    frames: [U, 3, h, w], the network's input for each item; boxes: int64 [U, 4], the pixels that count
    value: (frames [B, 3, h, w], item [B]) → [B]; side: cells along each side
    filling: `mean colour` (0), `blur` (needs `blurred` frames), or `noisy linear`: each removed point is the mean of
        its neighbours (direct ones 1/6, diagonal ones 1/12) plus noise (Rong et al. 2022)
    """

    frames: Tensor
    boxes: Tensor
    value: Callable[[Tensor, Tensor], Tensor]
    side: int
    filling: str = FILLINGS[0]
    blurred: Tensor | None = None

    @property
    def _extent(self) -> tuple[int, int]:
        return self.frames.shape[2], self.frames.shape[3]

    @functools.cached_property
    def _cells(self) -> Tensor:
        return box_cells(self.boxes, self._extent, self.side)

    @functools.cached_property
    def _points(self) -> tuple[Tensor, Tensor, Tensor]:
        """The grid of noisy linear imputation: its points, which of them contain pixels, each pixel's place."""
        fine = self.side * _FINE
        points, known = cell_means(self.frames.cpu(), box_cells(self.boxes, self._extent, fine), fine**2)
        places = _places_in_boxes(self.boxes, self._extent)
        return points.unflatten(2, (fine, fine)), known.unflatten(1, (fine, fine)), places

    def __call__(self, item: Tensor, removed: Tensor) -> Tensor:
        """Return the numbers after the removal, float [B], on the CPU."""
        extent, out = self._extent, []
        for rows in torch.arange(len(item)).split(max(1, _PIXELS_AT_ONCE // (extent[0] * extent[1]))):
            at, gone = item[rows], removed[rows]
            mine = self._cells[at].flatten(1)
            hidden = (gone.gather(1, mine.clamp(min=0)) & (mine >= 0)).view(-1, 1, *extent).to(self.frames.device)
            frames = self.frames[at]
            if self.filling == FILLINGS[0]:
                fill = torch.zeros_like(frames)
            elif self.filling == FILLINGS[1]:
                assert self.blurred is not None
                fill = self.blurred[at]
            else:
                points, known, where = self._points
                lost = gone.unflatten(1, (self.side, self.side)).repeat_interleave(_FINE, 1).repeat_interleave(_FINE, 2)
                solved = impute(points[at], lost | ~known[at])
                fill = F.grid_sample(solved, where[at], align_corners=False, padding_mode="border").to(frames)
                noise = uniform(make_key(0, CONTROL, 12), torch.arange(frames[0].numel())).view_as(frames[0]) - 0.5
                fill = fill + _NOISE_STD * 12**0.5 * noise.to(frames)
            out.append(self.value(torch.where(hidden, fill, frames), at).cpu())
        return torch.cat(out)


def _places_in_boxes(boxes: Tensor, extent: tuple[int, int]) -> Tensor:
    """Return each pixel's (x, y) in its item's box, −1 … 1: [U, h, w, 2], as `grid_sample` expects."""
    top, left, bottom, right = (boxes[:, k, None].float() for k in range(4))
    y = 2 * (torch.arange(extent[0]) + 0.5 - top) / (bottom - top) - 1
    x = 2 * (torch.arange(extent[1]) + 0.5 - left) / (right - left) - 1
    return torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), -1)


def impute(points: Tensor, removed: Tensor) -> Tensor:
    """Return points [B, C, g, g] in which each removed one, bool [B, g, g], is the weighted mean of its neighbours."""
    side = points.shape[-1]
    line = torch.arange(side)
    away = (line[:, None] - line).abs()
    steps = away[:, None, :, None] + away[None, :, None, :]
    near = (away[:, None, :, None] <= 1) & (away[None, :, None, :] <= 1)
    weight = torch.where(near & (steps > 0), torch.where(steps == 1, 1 / 6, 1 / 12), 0.0).reshape(side**2, side**2)
    weight = weight / weight.sum(1, keepdim=True) * (1 - _MEAN_COLOUR_WEIGHT)
    gone = removed.flatten(1).to(points)[:, :, None]
    system = torch.eye(side**2, dtype=points.dtype) - gone * weight.to(points)
    solved = torch.linalg.solve(system, points.flatten(2).mT * (1 - gone))
    return solved.mT.reshape(points.shape)


# ---- support, and the similarity of pictures


def support(size: Tensor, inside: Tensor, share: float) -> Tensor:
    """Return a mask [U, h, w] of the `share` of pixels in `inside` [U, h, w] with the largest `size` [U, h, w]."""
    ranked = size.masked_fill(~inside, -1).flatten(1)
    amount = (inside.flatten(1).sum(1) * share).ceil().long().clamp(min=1)
    place = ranked.argsort(dim=1, descending=True).argsort(1)
    return (place < amount[:, None]).view_as(size) & inside


def rank_among_others(own: Tensor, others: Tensor) -> Tensor:
    """Return the rank of own values [U] among others [U, K], ignoring NaN: 1 above all, 0 by chance, −1 below all."""
    known = others.isfinite()
    higher = (own[:, None] > others).double() + 0.5 * (own[:, None] == others).double()
    return 2 * (higher * known).sum(1) / torch.where(known.any(1), known.sum(1), torch.nan) - 1


def structural_similarity(a: Tensor, b: Tensor, inside: Tensor) -> Tensor:
    """Return the mean SSIM [U] (Wang et al. 2004) of pictures ≥ 0, [U, h, w], scaled to 1, over windows inside.

    NaN where a picture is 0 everywhere or no window is inside.
    """
    side = min(7, *a.shape[1:])
    scaled = [(x * inside)[:, None].double() for x in (a, b)]
    peaks = [x.amax((1, 2, 3), keepdim=True) for x in scaled]
    first, second = (x / torch.where(peak > 0, peak, torch.nan) for x, peak in zip(scaled, peaks, strict=True))
    mean_a, mean_b, square_a, square_b, product = (
        F.avg_pool2d(x, side, 1) for x in (first, second, first**2, second**2, first * second)
    )
    variance_a, variance_b = square_a - mean_a**2, square_b - mean_b**2
    bright, contrast = 0.01**2, 0.03**2
    similarity = (2 * mean_a * mean_b + bright) * (2 * (product - mean_a * mean_b) + contrast)
    similarity = similarity / ((mean_a**2 + mean_b**2 + bright) * (variance_a + variance_b + contrast))
    counts = F.avg_pool2d(inside[:, None].double(), side, 1) > 1 - 1e-9
    windows = counts.sum((1, 2, 3))
    return (similarity * counts).sum((1, 2, 3)) / torch.where(windows > 0, windows, torch.nan)
