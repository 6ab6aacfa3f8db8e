"""The blog's loop is a fair opponent: the same network, and it does learn."""

from __future__ import annotations

import torch

from tests.helpers import compose
from zfnet.benchmark.blog import BlogLoop, BlogZFNet, PillowImages
from zfnet.data import preprocess
from zfnet.data.shapes import draw_shapes
from zfnet.model.zfnet import ZFNet


def test_the_same_weights_give_the_same_logits() -> None:
    blog, ours = BlogZFNet(10).eval(), ZFNet(10).eval()
    ours.load_weights(blog.state_dict())
    images = torch.rand(1, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(images), blog(images), rtol=1e-4, atol=1e-6)


def test_its_images_are_ours() -> None:
    images = draw_shapes(2, 32, part=0)
    data = compose("data=shapes").data
    theirs = torch.stack([PillowImages(images, 224)[i][0] for i in range(2)])
    torch.testing.assert_close(preprocess(images.pixels([0, 1]), data), theirs, rtol=0, atol=1e-5)


def test_a_turn_takes_its_steps() -> None:
    loop = BlogLoop(draw_shapes(4, 32, part=0), 2, torch.device("cpu"), workers=0)
    before = loop.net.classifier[6].bias.clone()
    assert loop.turn(steps=1, warmup=1) > 0
    assert not torch.equal(before, loop.net.classifier[6].bias)
