"""What needs a CUDA device: it computes what the CPU does, and a run on it resumes to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import augment_config, data_config, learned, random_images, tiny_model_config, train_minute
from zfnet.data.batches import Batches, augment, preprocess
from zfnet.data.images import image_set
from zfnet.model import ZFNet
from zfnet.normalization import LocalResponseNorm
from zfnet.randomness import make_key, random_bits, uniform
from zfnet.training import loop

pytestmark = pytest.mark.gpu
CUDA = ("trainer.device=cuda", "trainer.checkpoint_minutes=1e-9")


def test_random_numbers_are_the_cpus() -> None:
    index = torch.arange(100_000)
    for draw in (random_bits, uniform):
        assert torch.equal(draw(make_key(3), index), draw(make_key(3), index.cuda()).cpu())


def test_augmentation_is_the_cpus() -> None:
    pixels, index = random_images(64, 32), torch.arange(64)
    how, data = augment_config(4, 0.5, 8), data_config()
    on_gpu = augment(pixels.cuda(), index.cuda(), how, data, 0, 0)
    assert torch.equal(on_gpu.cpu(), augment(pixels, index, how, data, 0, 0))


@pytest.mark.parametrize(("stored", "wanted"), [(32, 224), (32, 64), (64, 20), (48, 48)])
def test_preprocessing_is_within_a_grey_level(stored: int, wanted: int) -> None:
    data = data_config(image_size=wanted, mean=[0.0] * 3, std=[1 / 255] * 3)
    pixels = random_images(4, stored)
    difference = preprocess(pixels.cuda(), data).cpu() - preprocess(pixels, data)
    assert difference.abs().max() <= 1.001


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_batches_from_memory_and_from_the_host_are_equal(memory: float) -> None:
    images = image_set(random_images(50, 16).numpy(), torch.arange(50) % 3, "abc")
    device = torch.device("cuda")
    data = data_config(image_size=16, batch_size=8, device_memory=memory)
    parts = Batches(images, data, device, augment=augment_config(2, 0.5))
    assert (parts.resident is not None) is (memory > 0)
    reference = Batches(images, data, torch.device("cpu"), augment=augment_config(2, 0.5))
    for a, b in zip(parts.epoch(2, 3), reference.epoch(2, 3), strict=True):
        torch.testing.assert_close(a.images.cpu(), b.images)
        assert torch.equal(a.labels.cpu(), b.labels)


def test_the_network_is_the_cpus() -> None:
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.manual_seed(0)
    model = ZFNet(10, 64, tiny_model_config(norm="lrn", dropout=0.5)).train()
    images = torch.randn(8, 3, 64, 64)
    model.set_step(0, 5)
    expected = model(images)
    model = model.cuda()
    model.set_step(0, 5)
    torch.testing.assert_close(model(images.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)


def test_normalisation_under_autocast_is_in_single_precision() -> None:
    x = (20 * torch.randn(2, 96, 5, 5, device="cuda")).bfloat16().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = LocalResponseNorm()(x)
    torch.testing.assert_close(y, LocalResponseNorm()(x.float()), rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


def test_exact_is_exact_and_resumes(tmp_path: Path, monkeypatch) -> None:
    words = (*CUDA, "augment=crop_flip", "model.dropout=0.5", "model.norm=lrn", "trainer.ema=0.9")
    whole = learned(train_minute(tmp_path / "a", *words))
    assert learned(train_minute(tmp_path / "b", *words)) == whole

    class Killed(BaseException):
        pass

    real = loop.train_step

    def dying(state, batch) -> None:
        if state.step == 11:
            raise Killed
        real(state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dying)
        with pytest.raises(Killed):
            train_minute(tmp_path / "c", *words)
    assert learned(train_minute(tmp_path / "c", *words)) == whole


@pytest.mark.parametrize("trainer", ["cuda", "auto"])
def test_the_fast_ways_train(tmp_path: Path, trainer: str) -> None:
    words = (f"trainer={trainer}", "trainer.device=cuda", "trainer.deterministic=false", "optimizer.lr=3e-3")
    history = train_minute(tmp_path / "r", *words, "trainer.epochs=6").read_history()
    assert history[-1]["train_loss"] < history[0]["train_loss"]
