"""The photographs that stand for ImageNet's, and the two ways to read them."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers import data_config
from zfnet.benchmark.folder import DISTINCT, HEIGHT, WIDTH, _live, write_pictures
from zfnet.data.decode import image_size
from zfnet.training.device import Runtime


def test_pictures_are_of_imagenets_size_and_live_decoding_gives_batches(tmp_path: Path) -> None:
    count = DISTINCT + 3
    written = write_pictures(tmp_path, count)
    files = sorted(tmp_path.glob("*/*.jpg"))
    assert (len(files), sum(f.stat().st_size for f in files)) == (count, written)
    assert 60e3 < written / count < 200e3  # ImageNet's files have 110 kB on average
    assert image_size(files[0]) == (WIDTH, HEIGHT)
    assert files[0].read_bytes() != files[1].read_bytes()
    runtime = Runtime(torch.device("cpu"), "fp32", True, False, False)
    loader = _live(tmp_path, data_config(store_size=73, crop_size=64, batch_size=16), 0, runtime)
    assert [images.shape for images, _ in loader] == [(16, 3, 64, 64), (16, 3, 64, 64), (3, 3, 64, 64)]
