"""job=summary: the network's layers, as a table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torchinfo

from zfnet.config.schema import Config, Job
from zfnet.model.zfnet import ZFNet

NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "shapes": 10}


@dataclass(kw_only=True)
class SummaryJob(Job):
    reads_run: ClassVar[str] = "optional"

    def main(self, config: Config, output: Path) -> None:
        """Print output shapes, parameters and multiply-adds of each layer, for two images as in the blog."""
        classes = NUM_CLASSES.get(config.data.name)
        if classes is None:
            from zfnet.data import load_splits

            classes = len(load_splits(config.data).train.classes)
        size = config.data.image_size
        model = ZFNet(classes, size, config.model).eval()
        table = torchinfo.summary(
            model,
            (2, 3, size, size),
            verbose=0,
            device="cpu",
            depth=1,
            col_names=("output_size", "num_params", "mult_adds"),
            col_width=18,
            row_settings=("var_names",),
        )
        print(_narrow(re.sub(r"Units\.(.)\w+", r"\1", str(table))))


def _narrow(table: str) -> str:
    """Take the empty part out of the first column, so that the table fits 80 columns."""
    blank = slice(28, 41)
    lines = (
        line[: blank.start] + line[blank.stop :] if set(line[blank]) <= {" ", "="} else line
        for line in table.splitlines()
    )
    return "\n".join(line.rstrip()[:80] for line in lines)
