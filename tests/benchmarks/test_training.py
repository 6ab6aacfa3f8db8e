"""The blog's loop is a fair opponent: the same network, and it trains. The script prints a table of all loops."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import training
from benchmarks.training import BlogLoop, BlogZFNet, PillowImages, TorchvisionLoop
from tests.helpers import compose, random_images
from zfnet.data import preprocess
from zfnet.data.images import image_set
from zfnet.data.shapes import draw_shapes
from zfnet.model.zfnet import ZFNet
from zfnet.training.device import resolve_runtime


def test_blog_network_gives_our_logits() -> None:
    blog, ours = BlogZFNet(10).eval(), ZFNet(10).eval()
    ours.load_weights(blog.state_dict())
    images = torch.rand(1, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(images), blog(images), rtol=1e-4, atol=1e-6)


def test_pillow_images_are_our_inputs() -> None:
    images = draw_shapes(2, 32, part=0)
    data = compose("data=shapes").data
    theirs = torch.stack([PillowImages(images, 224)[i][0] for i in range(2)])
    torch.testing.assert_close(preprocess(images.pixels([0, 1]), data), theirs, rtol=0, atol=1e-5)


def blog_network_of_few_features(classes: int) -> BlogZFNet:
    network = BlogZFNet(classes)
    for n, sizes in ((0, (9216, 16)), (3, (16, 16)), (6, (16, classes))):
        network.classifier[n] = torch.nn.Linear(*sizes)
    return network


def test_blog_loop_trains_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "BlogZFNet", blog_network_of_few_features)  # AdamW is slow with 58 million weights
    loop = BlogLoop(draw_shapes(4, 32, part=0), 2, torch.device("cpu"), workers=0)
    before = loop.net.classifier[6].bias.clone()
    assert loop.time_turn(steps=1, warmup=1) > 0
    assert not torch.equal(before, loop.net.classifier[6].bias)


def test_torchvision_loop_trains_fewer_than_five_classes() -> None:
    config = compose("data=shapes", "model=small", "data.image_size=64", "data.batch_size=2", "trainer.device=cpu")
    images = image_set(random_images(4, 32).numpy(), torch.arange(4) % 3, "abc")
    assert TorchvisionLoop(config, resolve_runtime(config.trainer), images, workers=0).time_turn(steps=1, warmup=0) > 0


@pytest.mark.drawn
def test_main_times_this_program_beside_the_others(tmp_path: Path, monkeypatch, capsys) -> None:
    words = "data=shapes model=small data.image_size=64 data.store_size=32 data.train_images=20 data.test_images=10"
    sizes = "data.batch_size=8 job.rounds=1 job.steps=2"
    monkeypatch.setattr("zfnet.jobs.benchmark.matmul_peak", lambda _: 1e11)  # takes two seconds
    monkeypatch.setattr(sys, "argv", ["training.py", *words.split(), *sizes.split(), "--output", str(tmp_path)])
    training.main()
    assert max(len(line) for line in capsys.readouterr().out.splitlines() if "written" not in line) <= 80
    ours, *others = json.loads((tmp_path / "benchmark.json").read_text())["contenders"]
    assert ours["name"] == "zfnet"
    assert "torchvision reference" in [row["name"] for row in others]
    for row in others:
        assert row["first_is_faster_by"] == pytest.approx(ours["median"] / row["median"])
    assert (tmp_path / "figures/benchmark.png").stat().st_size > 5000
