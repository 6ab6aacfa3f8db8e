"""Pooling before bias and ReLU gives the same bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import tiny_model_config
from zfnet.benchmark.pool_first import PoolFirstZFNet
from zfnet.config.schema import ModelConfig
from zfnet.model.zfnet import ZFNet


def pair(image_size: int, config: ModelConfig) -> tuple[ZFNet, ZFNet]:
    torch.manual_seed(3)
    plain, first = ZFNet(10, image_size, config), PoolFirstZFNet(10, image_size, config)
    first.load_state_dict(plain.state_dict())
    for model in (plain, first):
        model.to(memory_format=torch.channels_last).set_step(0, 0)
    return plain, first


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "lrn", "pooling": "ceil"}, {"conv3": None}, {"norm": "batch"}]
)
def test_logits_loss_and_gradients_are_equal_to_the_bit(changes) -> None:
    models = pair(64, tiny_model_config(**changes))
    assert [*models[0].state_dict()] == [*models[1].state_dict()]
    images, labels = torch.randn(8, 3, 64, 64), torch.arange(8)
    logits = [model(images) for model in models]
    assert torch.equal(*logits)
    for out in logits:
        F.cross_entropy(out, labels).backward()
    for (name, a), (_, b) in zip(models[0].named_parameters(), models[1].named_parameters(), strict=True):
        if name.startswith("conv") and name.endswith(
            "bias"
        ):  # a sum over other terms: as many, but for the zeros
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
        else:
            assert torch.equal(a.grad, b.grad), name


def test_the_blogs_network_too_and_activations_are_those_of_before() -> None:
    plain, first = (model.eval() for model in pair(224, ModelConfig()))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(plain(images), first(images))
        layers = ["conv1", "conv5"]
        a, b = plain.activations(images, layers), first.activations(images, layers)
    assert all(torch.equal(a[layer], b[layer]) for layer in layers)
