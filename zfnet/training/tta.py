"""Test-time augmentation: several views of each image, and the mean of what the network says to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import hflip, ten_crop

from zfnet.config.schema import DataConfig
from zfnet.model.zfnet import ZFNet


class MeanOfViews(nn.Module):
    """Answers with log mean softmax over views of each image (Krizhevsky 2012, section 4.1; the paper, section 3).

    views: `flip` (the image and its mirror image) or `tencrop` (four corners and the centre, and their mirror
        images; images must come larger than the network's, see `data_for_views`)
    """

    def __init__(self, model: ZFNet, views: str) -> None:
        super().__init__()
        self.model, self.views = model, views

    def forward(self, images: Tensor) -> Tensor:
        """Return log-probabilities [N, classes] for images [N, 3, S, S]."""
        total: Tensor | None = None
        count = 0
        for view in self._each(images):
            shares = self.model(view).float().softmax(1)
            total = shares if total is None else total + shares
            count += 1
        assert total is not None
        return (total / count).clamp_min(torch.finfo(total.dtype).tiny).log()

    def _each(self, images: Tensor) -> Iterator[Tensor]:
        if self.views == "flip":
            yield from (images, hflip(images))
        else:
            yield from ten_crop(images, [self.model.image_size] * 2)


def data_for_views(data: DataConfig, views: str, stored_size: int, crop_ratio: float) -> DataConfig:
    """Return how images must be prepared: for ten crops larger than the network's, so that crops are its size.

    A crop's side is data.crop_size of the `stored_size` pixels where that is set, else `crop_ratio` of the image.
    """
    if views != "tencrop":
        return data
    ratio = data.crop_size / stored_size if data.crop_size else crop_ratio
    return replace(data, crop_size=None, image_size=round(data.image_size / ratio))
