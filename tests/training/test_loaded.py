"""A loaded run: with its own images, or with other images prepared as in its training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tests.helpers import load_for_job


def test_images_that_are_divided_otherwise_are_named(tiny_run, caplog) -> None:
    load_for_job(tiny_run, "trainer.threads=1").split("all")
    assert "divided" not in caplog.text
    load_for_job(tiny_run, "data.split_seed=1").split("all")
    assert "split these images with data.split_seed=0: it trained on some that are now held out" in caplog.text


def test_photos_of_any_size_are_stored_as_the_runs_images_were(tiny_run, tmp_path: Path) -> None:
    for kind, sizes in (("disc", [(100, 100)] * 5), ("star", [(90, 120), (30, 20), (64, 64), (65, 64), (9, 9)])):
        (tmp_path / kind).mkdir()
        for n, (width, height) in enumerate(sizes):
            pixels = np.full((height, width, 3), 20 * n, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / kind / f"{n}.png")
    run = load_for_job(tiny_run, "data=folder", f"data.root={tmp_path}")
    part = run.split("all")
    assert part.images.shape[1:] == (64, 64, 3)
    assert sorted(part.labels.tolist()) == [0] * 5 + [6] * 5  # the run's class numbers of disc and star
    # keys on the command line have precedence
    assert load_for_job(tiny_run, "data=folder", f"data.root={tmp_path}", "data.fit=stretch").data.fit == "stretch"
    assert load_for_job(tiny_run, "data.subset=9").data.store_size == tiny_run.read_config().data.store_size
