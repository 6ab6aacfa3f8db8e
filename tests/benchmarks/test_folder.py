"""The photographs that stand for ImageNet's, and the two ways to read them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks import folder
from benchmarks.folder import DISTINCT, HEIGHT, WIDTH, pillow_loader, write_pictures
from tests.helpers import data_config
from zfnet.data.decode import image_size


def test_pictures_are_of_imagenets_size_and_pillow_loader_gives_batches(tmp_path: Path) -> None:
    count = DISTINCT + 3
    written = write_pictures(tmp_path, count)
    files = sorted(tmp_path.glob("*/*.jpg"))
    assert (len(files), sum(f.stat().st_size for f in files)) == (count, written)
    assert 60e3 < written / count < 200e3  # ImageNet's files have 110 kB on average
    assert image_size(files[0]) == (WIDTH, HEIGHT)
    assert files[0].read_bytes() != files[1].read_bytes()
    data = data_config(store_size=73, crop_size=64, batch_size=16)
    loader = pillow_loader(tmp_path, data, 0, torch.device("cpu"))
    assert [images.shape for images, _ in loader] == [(16, 3, 64, 64), (16, 3, 64, 64), (3, 3, 64, 64)]


def test_main_times_both_ways(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["folder.py", "--pictures", "12", "--rounds", "1"])
    folder.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split("  ")[0] for line in lines[2:4]] == ["from the cache", "decoded by Pillow"]
    assert "the cache is" in lines[-1]
