"""Built-in images: ten shapes on noisy gradients, drawn from formulas.

Every image is a function of (split, index), without files, downloads or generator state. The box around each
shape is known, so a test can measure whether an explanation highlights the object.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from zfnet.config.randomness import SHAPES, make_key, uniform
from zfnet.data.images import ImageSet, image_set

_AT_ONCE = 100  # images; glibc returns larger blocks to the system after each step, and the system zeroes them again


def draw_shapes(count: int, size: int, part: int) -> ImageSet:
    """Return `count` images of size × size pixels; `part` is 0 for training and 1 for test.

    Labels cycle, so classes are balanced. Colours, position, size and rotation (up to ±0.3 rad) vary.
    """
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    boxes = torch.empty(count, 4, dtype=torch.long)
    labels = torch.arange(count) % len(CLASSES)
    for index in torch.arange(count).split(_AT_ONCE):
        pixels, boxes[index] = _draw(index, labels[index], size, part)
        images[index] = pixels.numpy()
    return image_set(images, labels, CLASSES, boxes)


def draw_without(index: Tensor, size: int, part: int, sector: int, sectors: int) -> Tensor:
    """Return the images at `index` [n], uint8 [n, size, size, 3], each shape without one of `sectors` equal sectors.

    The background replaces the sector; nothing else changes.
    """
    return _draw(index, index % len(CLASSES), size, part, (sector, sectors))[0]


def _draw(
    index: Tensor, labels: Tensor, size: int, part: int, missing: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    def between(number: int, low: float, high: float) -> Tensor:
        """Return one random number per image, shaped for broadcasting over the image's pixels."""
        return (low + (high - low) * uniform(make_key(SHAPES, part, number), index))[:, None, None]

    radius = between(0, 0.17, 0.33)
    centre_x, centre_y = (between(n, 0.0, 1.0) * (1 - 2 * radius) + radius for n in (1, 2))
    turn = between(3, -0.3, 0.3)
    axis = (torch.arange(size) + 0.5) / size
    dx, dy = axis[None, None, :] - centre_x, axis[None, :, None] - centre_y
    x, y = (dx * turn.cos() + dy * turn.sin()) / radius, (dy * turn.cos() - dx * turn.sin()) / radius

    distance = torch.empty(len(index), size, size)
    for label, inside in enumerate(_FORMULAS.values()):
        chosen = labels == label
        distance[chosen] = inside(x[chosen], y[chosen])
    # soften the edge over one pixel; `distance` is in units of the radius
    cover = (0.5 - distance * radius * size).clamp(0, 1)
    if missing is not None:
        sector, sectors = missing
        cover = cover * ((torch.atan2(y, x) / (2 * math.pi) % 1 * sectors).floor() % sectors != sector)

    direction = between(4, 0.0, 2 * math.pi)
    ramp = (axis[None, None, :] - 0.5) * direction.cos() + (axis[None, :, None] - 0.5) * direction.sin()
    rows = torch.arange(size * size).view(1, size, size)
    noise = uniform(make_key(SHAPES, part, 5), index[:, None, None] * size * size + rows) - 0.5
    channels = []
    for c in range(3):
        ground = between(10 + c, 0.15, 0.85)
        # the shape differs from the background by at least 0.15 of full scale in each channel
        step = between(20 + c, 0.15, 0.5) * (1 - 2 * (between(30 + c, 0.0, 1.0) < ground).float())
        background = ground + ramp * between(40 + c, 0.0, 0.5)
        channels.append(background * (1 - cover) + (ground + step) * cover + 0.2 * noise)
    pixels = (torch.stack(channels, dim=-1).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels, _boxes(cover > 0.5)


def _boxes(mask: Tensor) -> Tensor:
    """Return (top, left, bottom, right) around the True pixels of each mask [n, size, size]."""
    size = mask.shape[-1]
    rows, columns = mask.any(2).int(), mask.any(1).int()
    return torch.stack(
        [rows.argmax(1), columns.argmax(1), size - rows.flip(1).argmax(1), size - columns.flip(1).argmax(1)], dim=1
    )


def _polygon(x: Tensor, y: Tensor, sides: int) -> Tensor:
    """Return the distance to a regular polygon: the largest distance beyond any of its edges."""
    angles = [math.pi / 2 + math.pi / sides + 2 * math.pi * k / sides for k in range(sides)]
    edges = torch.stack([x * math.cos(a) - y * math.sin(a) for a in angles])
    return edges.amax(0) - math.cos(math.pi / sides)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    upright = torch.maximum(x.abs() - 0.3, y.abs() - 0.95)
    return torch.minimum(upright, torch.maximum(y.abs() - 0.3, x.abs() - 0.95))


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance to a star of five points: its radius varies between 1 at the points and 0.4 between them."""
    angle = torch.atan2(-y, x) - math.pi / 2
    swing = (torch.remainder(angle * 5 / (2 * math.pi) + 0.5, 1.0) - 0.5).abs() * 2
    return torch.hypot(x, y) - (1 - 0.6 * swing)


def _box(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs())


# Signed distances (negative inside) in a frame where the shape fits the unit circle; only their sign and
# their slope near zero matter.
_FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": lambda x, y: torch.hypot(x, y) - 1,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.78).abs() - 0.22,
    "square": lambda x, y: _box(x, y) - 0.7,
    "frame": lambda x, y: (_box(x, y) - 0.55).abs() - 0.16,
    "triangle": lambda x, y: _polygon(x, y, 3),
    "cross": _cross,
    "star": _star,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.85 - torch.hypot(x - 0.5, y)),
    "hexagon": lambda x, y: _polygon(x, y, 6),
    "bars": lambda x, y: torch.maximum((y.abs() - 0.5).abs() - 0.22, x.abs() - 0.68),
}
CLASSES = tuple(_FORMULAS)
