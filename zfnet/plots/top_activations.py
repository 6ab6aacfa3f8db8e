"""Tables of the strongest activations and of the maps' habits."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from zfnet.data import ImageSet
from zfnet.explain.receptive_field import receptive_boxes
from zfnet.explain.top_activations import TopActivations
from zfnet.model.zfnet import ZFNet
from zfnet.runs.directory import write_atomically


def write_tables(found: TopActivations, model: ZFNet, images: ImageSet, folder: Path) -> None:
    """Write top_activations.csv, one row for each activation, and maps.csv, one for each map."""
    classes = images.classes
    tops: list[tuple[Any, ...]] = []
    maps: list[tuple[Any, ...]] = []
    for layer, record in found.layers.items():
        habits = found.statistics(layer)
        channel, rank = record.filled.nonzero().cpu().unbind(1)
        places = record.places().cpu()[channel, rank]
        labels = images.labels[places[:, 0]]
        boxes = receptive_boxes(model, layer, places[:, 1:])
        values = record.values.cpu()[channel, rank]
        for c, r, v, place, label, box in zip(
            channel.tolist(), rank.tolist(), values.tolist(), places.tolist(), labels.tolist(), boxes.tolist(),
            strict=True,
        ):  # fmt: skip
            tops.append((layer, c, r + 1, f"{v:.6g}", place[0], classes[label], *place[1:], *box))
        columns = (habits.mean, habits.image_share, habits.position_share, habits.selectivity)
        for c, (mean, share, spots, selective, best, dead) in enumerate(
            zip(*(x.tolist() for x in columns), habits.best_class.tolist(), habits.dead.tolist(), strict=True)
        ):
            numbers = (f"{x:.6g}" for x in (mean, share, spots, selective))
            maps.append((layer, c, *numbers, "" if dead else classes[best], int(dead)))
    _write_csv(
        folder / "top_activations.csv",
        "layer,map,rank,activation,image,class,y,x,top,left,bottom,right",
        tops,
    )
    _write_csv(
        folder / "maps.csv",
        "layer,map,mean_activation,image_share,position_share,selectivity,class,dead",
        maps,
    )


def _write_csv(path: Path, header: str, rows: list[tuple[Any, ...]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header.split(","))
    table.writerows(rows)
    write_atomically(path, text.getvalue())
