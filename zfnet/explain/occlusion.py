"""Occlusion: what a network says while a grey square hides one part of an image after another (paper, Fig. 7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from zfnet.config.errors import UserError
from zfnet.model.zfnet import ZFNet


@dataclass(frozen=True)
class Occlusion:
    """What was seen of N images at P × P places of the square; all on the CPU.

    starts: int64 [P], the first row (and column) of the square at each place; it may lie outside the image
    patch: side of the square in pixels
    channel: int64 [N], the map with the largest sum of activations on the whole image
    peak: int64 [N, 2], where (y, x) that map is strongest on the whole image
    activation: [N, P, P], the sum over that map (panel b); whole_activation: [N], without a square
    probability: [N, P, P], of the true class (panel d); whole_probability: [N]
    predicted: int64 [N, P, P], the most probable class (panel e); whole_predicted: [N]
    confidence: [N, P, P], its probability
    """

    starts: Tensor
    patch: int
    channel: Tensor
    peak: Tensor
    activation: Tensor
    whole_activation: Tensor
    probability: Tensor
    whole_probability: Tensor
    predicted: Tensor
    whole_predicted: Tensor
    confidence: Tensor


def square_starts(size: int, patch: int, stride: int) -> Tensor:
    """Return the first row of the square at each place: int64 [⌈size / stride⌉], `stride` apart.

    The places are centred on the image and cover all of it; at the borders the square may hang over.
    Raises UserError where the square leaves nothing to see, or its steps leave gaps.
    """
    if patch >= size:
        raise UserError(f"job.patch={patch}: the occluder must be smaller than the image, which is {size} px")
    if stride > patch:
        raise UserError(
            f"job.stride={stride}: must be at most job.patch={patch}, or pixels are never covered"
        )
    places = -(-size // stride)
    beyond = (places - 1) * stride + patch - size
    return torch.arange(places) * stride - beyond // 2


@torch.no_grad()
def occlude(
    model: ZFNet,
    images: Tensor,
    labels: Tensor,
    *,
    layer: str = "conv5",
    patch: int,
    stride: int,
    fill: Tensor,
    batch_size: int,
) -> Occlusion:
    """Slide a square over each image and record the network's answers.

    images: [N, 3, S, S], normalised; labels: int64 [N]; fill: [3], the square's colour in the same units.
    Occluded images are made batch by batch on the images' device. Raises UserError (see `square_starts`).
    """
    count, size, device = len(images), images.shape[-1], images.device
    starts = square_starts(size, patch, stride).to(device)
    side = len(starts)
    channel, peak, whole = _whole(model, images, labels, layer, batch_size)
    along = torch.arange(size, device=device)
    hidden = (along >= starts[:, None]) & (along < starts[:, None] + patch)  # [P, S]
    colour = fill.to(images).view(1, 3, 1, 1)

    answers = []
    total = count * side * side
    bar = tqdm(total=total, desc="occlusion", unit="image", disable=None, leave=False, dynamic_ncols=True)
    with bar:
        for number in torch.arange(total, device=device).split(batch_size):
            image, row, column = number // side**2, number // side % side, number % side
            square = (hidden[row][:, :, None] & hidden[column][:, None, :])[:, None]
            occluded = torch.where(square, colour, images[image])
            answers.append(_answers(model, occluded, layer, channel[image], labels[image]))
            bar.update(len(number))
    maps = [torch.cat(part).cpu().view(count, side, side) for part in zip(*answers, strict=True)]
    return Occlusion(
        starts.cpu(),
        patch,
        channel.cpu(),
        peak.cpu(),
        activation=maps[0],
        whole_activation=whole[0].cpu(),
        probability=maps[1],
        whole_probability=whole[1].cpu(),
        predicted=maps[2],
        whole_predicted=whole[2].cpu(),
        confidence=maps[3],
    )


def _whole(
    model: ZFNet, images: Tensor, labels: Tensor, layer: str, batch_size: int
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Return the strongest map of each unoccluded image, its peak (y, x), and the network's answers."""
    channels, peaks, answers = [], [], []
    for part, truth in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        maps = model.activations(part, [layer])[layer]
        channel = maps.sum((2, 3)).argmax(1)
        strongest = maps[torch.arange(len(part), device=maps.device), channel].flatten(1).argmax(1)
        channels.append(channel)
        peaks.append(torch.stack([strongest // maps.shape[3], strongest % maps.shape[3]], 1))
        answers.append(_answers(model, part, layer, channel, truth))
    return (
        torch.cat(channels),
        torch.cat(peaks),
        tuple(torch.cat(part) for part in zip(*answers, strict=True)),
    )


def _answers(model: ZFNet, images: Tensor, layer: str, channel: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    """Return (sum over the map, probability of the label, most probable class, its probability), each [B]."""
    found = model.activations(images, [layer, "fc8"])
    rows = torch.arange(len(images), device=images.device)
    probabilities = found["fc8"].softmax(1)
    confidence, predicted = probabilities.max(1)
    return found[layer][rows, channel].sum((1, 2)), probabilities[rows, labels], predicted, confidence


def centres_in_boxes(starts: Tensor, patch: int, boxes: Tensor) -> Tensor:
    """Return which places have the square's centre in the box of the object: bool [N, P, P]."""
    centre = starts + patch / 2
    rows = (centre >= boxes[:, 0:1]) & (centre < boxes[:, 2:3])
    columns = (centre >= boxes[:, 1:2]) & (centre < boxes[:, 3:4])
    return rows[:, :, None] & columns[:, None, :]


def inside_and_outside(maps: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of each map [N, P, P] over the places that `inside` marks, and over the others: two [N]."""
    weight = inside.to(maps)
    within = (maps * weight).sum((1, 2)) / weight.sum((1, 2))
    outside = (maps * (1 - weight)).sum((1, 2)) / (1 - weight).sum((1, 2))
    return within, outside
