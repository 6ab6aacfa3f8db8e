"""TensorBoard: scalars, graph, sample images and hyperparameters, all in one run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zfnet.config.schema import flatten
from zfnet.model.zfnet import ZFNet

log = logging.getLogger("zfnet")


class TensorBoard:
    """Writes event files below `folder`. On a resume, what was written from `step` on is marked as void."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.writer = SummaryWriter(str(folder), purge_step=step or None)

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        for name, value in values.items():
            if value is not None:
                self.writer.add_scalar(name, value, step)

    def graph(self, model: ZFNet, image_size: int) -> None:
        """Draw the network's graph, from a copy on the CPU, so that the model itself is not touched."""
        with torch.device("meta"):  # the values do not matter, so none are drawn
            twin = ZFNet(model.num_classes, image_size, model.config).eval()
        twin.to_empty(device="cpu")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.writer.add_graph(twin, torch.zeros(1, 3, image_size, image_size))
        except Exception as error:  # the tracer is PyTorch's; a picture less is no reason to stop a training
            log.warning("TensorBoard: the graph could not be drawn (%s)", str(error).splitlines()[0])

    def images(self, name: str, pixels: Tensor) -> None:
        """Show images, uint8 [N, h, w, 3]."""
        self.writer.add_images(name, pixels, dataformats="NHWC")

    def picture(self, name: str, path: Path, step: int) -> None:
        """Show a PNG file as it is: `SummaryWriter.add_figure` would draw it once more."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        with Image.open(path) as file:
            width, height = file.size
            channels = len(file.getbands())
        image = Summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=path.read_bytes()
        )
        self.writer._get_file_writer().add_summary(
            Summary(value=[Summary.Value(tag=name, image=image)]), step
        )

    def hyperparameters(self, config: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """Record settings and results in this run; `SummaryWriter.add_hparams` would open a second one."""
        from torch.utils.tensorboard.summary import hparams

        # TensorBoard takes plain values only: lists and nulls become text
        plain = {
            k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flatten(config).items()
        }
        for part in hparams(plain, dict(results)):
            self.writer._get_file_writer().add_summary(part)
        for name, value in results.items():
            self.writer.add_scalar(name, value)

    def close(self) -> None:
        self.writer.close()
