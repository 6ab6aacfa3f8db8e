"""A table of parts in one's own images: which file, which part, where."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from zfnet.config.errors import UserError
from zfnet.config.schema import DataConfig
from zfnet.data.decode import UnreadableImage, fit_square, read_image
from zfnet.explain.selection import to_inputs
from zfnet.training.loaded import LoadedRun

COLUMNS = ("image", "part", "x", "y")


@dataclass(frozen=True)
class Marked:
    """Images with parts.

    inputs: [N, 3, S, S], normalised, on the device; parts: name → centres (y, x) [N, 2] in input pixels
    groups: int64 [N], images of one group are compared with each other
    """

    inputs: Tensor
    parts: dict[str, Tensor]
    groups: Tensor


def read_points(used: LoadedRun, table: Path) -> Marked:
    """Read a CSV with the columns image, part, x, y: files beside the table, and pixels in them from the top left.

    Every image must have every part once. Raises UserError naming the first thing that is wrong.
    """
    places, order = _read(table)
    pixels, centres = [], {part: torch.zeros(len(places), 2) for part in order}
    size = used.metadata.stored_size
    for number, (name, parts) in enumerate(places.items()):
        try:
            image = read_image(table.parent / name)
        except UnreadableImage as error:
            raise UserError(f"{table.parent / name} cannot be read as an image ({error})") from error
        pixels.append(torch.from_numpy(fit_square(image, size, used.data.fit).copy()))
        for part in order:
            if part not in parts:
                raise UserError(f"{table}: image {name} has no {part}: every image needs every part")
            point = to_input_pixels(parts[part], image.size, size, used.data)
            if not all(0 <= p < used.data.image_size for p in point):
                raise UserError(f"{table}: {part} of {name} lies outside what the network sees of the image")
            centres[part][number] = torch.tensor(point)
    inputs = to_inputs(used, torch.stack(pixels))
    return Marked(inputs, centres, torch.zeros(len(places), dtype=torch.int64))


def to_input_pixels(
    point: tuple[float, float], image_size: tuple[int, int], stored: int, data: DataConfig
) -> tuple[float, float]:
    """Return (y, x) in network input of a point (x, y) in a file of (width, height) pixels."""
    window = data.crop_size or stored
    found = []
    for value, length in zip(point, image_size, strict=True):
        seen = min(image_size) if data.fit == "crop" else length
        kept = (value - (length - seen) / 2) * stored / seen
        found.append((kept - (stored - window) // 2) * data.image_size / window)
    return found[1], found[0]


def _read(table: Path) -> tuple[dict[str, dict[str, tuple[float, float]]], list[str]]:
    """Return image → part → (x, y), and the parts in the table's order."""
    places: dict[str, dict[str, tuple[float, float]]] = {}
    order: list[str] = []
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            missing = [c for c in COLUMNS if c not in (rows.fieldnames or ())]
            if missing:
                raise UserError(f"{table}: lacks the column {missing[0]}; it needs {', '.join(COLUMNS)}")
            for line, row in enumerate(rows, 2):
                parts = places.setdefault(row["image"], {})
                if row["part"] in parts:
                    raise UserError(f"{table}, line {line}: {row['part']} of {row['image']} is there already")
                try:
                    parts[row["part"]] = (float(row["x"]), float(row["y"]))
                except (TypeError, ValueError):
                    raise UserError(
                        f"{table}, line {line}: x={row['x']}, y={row['y']} are not numbers"
                    ) from None
                if row["part"] not in order:
                    order.append(row["part"])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"job.points={table} cannot be read ({error})") from error
    if len(places) < 2:
        raise UserError(f"{table}: names {len(places)} images; it takes two to compare")
    return places, order
