"""Tests that need a CUDA device: its results agree with the CPU's, and a run on it resumes bit-exactly."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.explain.networks import network, random_inputs, some_units
from tests.helpers import (
    TINY_EXACT,
    augment_config,
    compose,
    data_config,
    load_for_job,
    random_images,
    tiny_model_config,
    train_tiny_exact,
    train_until_killed,
    training_state,
    weights_and_history,
)
from zfnet.config.randomness import _one_kernel, make_key, random_bits, uniform
from zfnet.data import load_splits
from zfnet.data.batches import Batches, augment, draw, preprocess
from zfnet.data.images import image_set
from zfnet.explain import Deconvnet
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.model.layers import Dropout, LocalResponseNorm, set_dropout_step
from zfnet.model.zfnet import ZFNet
from zfnet.runs.directory import RunDirectory
from zfnet.training import loop
from zfnet.training.build import build_optimizer, training_batches
from zfnet.training.checkpoint import load_optimizer
from zfnet.training.device import resolve_runtime
from zfnet.training.processes import World, init_process_group

pytestmark = pytest.mark.gpu
CUDA = ("trainer.device=cuda", "trainer.checkpoint_minutes=1e-9")
# overrides that give TINY_EXACT what it lacks of a usual run with trainer=cuda: bf16, a resize, and both dropout layers
FAST = (
    "trainer.device=cuda",
    "trainer.deterministic=false",
    "trainer.precision=bf16",
    "data.store_size=32",
    "model.fc7={features:16}",
)
OPTIMIZERS = ("sgd", "adamw", "adam", "rmsprop", "adagrad", "nadam", "muon")


def test_auto_is_the_gpu_in_bf16() -> None:
    runtime = resolve_runtime(compose("trainer=auto").trainer)
    assert runtime.device.type == "cuda"
    expected = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    assert runtime.precision == expected
    assert torch.cuda.get_device_name() in runtime.describe()


def test_random_numbers_equal_the_cpus() -> None:
    index = torch.arange(100_000)
    for numbers in (random_bits, uniform):
        for key in (make_key(3), torch.tensor(make_key(4))):
            there = key.cuda() if isinstance(key, torch.Tensor) else key
            assert torch.equal(numbers(key, index), numbers(there, index.cuda()).cpu())


def test_random_numbers_are_drawn_in_one_kernel() -> None:
    device = torch.device("cuda", 0)
    assert _one_kernel(device) is not None


@pytest.mark.parametrize("padding", ["constant", "reflect"])
def test_augmentation_equals_the_cpus(padding: str) -> None:
    pixels, index = random_images(64, 32), torch.arange(64)
    how, data = augment_config(crop_padding=4, padding_mode=padding, flip=0.5, cutout=8), data_config()
    drawn, there = (draw(i, 32, how, data, 0, 0) for i in (index, index.cuda()))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(drawn, there, strict=True))
    on_gpu = augment(pixels.cuda(), there, how, data)
    assert torch.equal(on_gpu.cpu(), augment(pixels, drawn, how, data))


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
    parts = Batches(images, data, device, augment=augment_config(crop_padding=2, flip=0.5))
    assert (parts.resident is not None) is (memory > 0)
    reference = Batches(images, data, torch.device("cpu"), augment=augment_config(crop_padding=2, flip=0.5))
    for a, b in zip(parts.epoch(2, 3), reference.epoch(2, 3), strict=True):
        torch.testing.assert_close(a.images.cpu(), b.images)
        assert torch.equal(a.labels.cpu(), b.labels)


def test_the_network_agrees_with_the_cpus() -> None:
    resolve_runtime(compose("trainer=exact", "trainer.device=cuda").trainer)  # no TF32
    torch.manual_seed(0)
    model = ZFNet(10, 64, tiny_model_config(norm="lrn", dropout=0.5)).train()
    images = torch.randn(8, 3, 64, 64)
    set_dropout_step(model, 0, 5)
    expected = model(images)
    model = model.cuda()
    set_dropout_step(model, 0, 5)
    torch.testing.assert_close(model(images.cuda()).cpu(), expected, rtol=1e-4, atol=1e-5)


def test_normalisation_under_autocast_is_in_single_precision() -> None:
    x = (20 * torch.randn(2, 96, 5, 5, device="cuda")).bfloat16().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = LocalResponseNorm()(x)
        y.backward(torch.ones_like(y))
    there = x.detach().double().cpu().requires_grad_()
    expected = LocalResponseNorm()(there)
    expected.sum().backward()
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-3, atol=1e-3)  # TF32 has 11 bits
    torch.testing.assert_close(x.grad.double().cpu(), there.grad, rtol=1e-2, atol=1e-2)  # x.grad is in bf16


@pytest.fixture
def resumed() -> Callable[..., RunDirectory]:
    """Return a function that trains in a folder, is killed before the twelfth step, and resumes to the end."""

    def call(folder: Path, *words: str) -> RunDirectory:
        train_until_killed(folder, 11, *words)
        return train_tiny_exact(folder, *words)

    return call


@pytest.mark.parametrize(
    "words",
    [
        ("augment=crop_flip", "model.dropout=0.5", "model.norm=lrn", "trainer.ema=0.9"),
        ("augment=crop_flip_cutout", "model.norm=batch", "model.rms_limit=0.1", "data.device_memory=0"),
        ("trainer.accumulate=3", "trainer.clip_norm=1", "loss.label_smoothing=0.1", "model.pooling=ceil"),
        (
            "augment.transforms=[{_target_:torchvision.transforms.v2.ColorJitter,brightness:0.5}]",
            "+optimizer.param_groups=[{ndim:1,weight_decay:0}]",
            "model.norm=batch",
            "trainer.freeze=[conv1,norm1]",
        ),
        ("data.store_size=32", "augment=crop_flip", "model.dropout=0.5"),
        ("trainer.precision=bf16", "data.store_size=32", "augment=crop_flip", "model.dropout=0.5", "model.norm=lrn"),
    ],
)
def test_exact_is_exact_and_resumes(resumed, tmp_path: Path, words: tuple[str, ...]) -> None:
    whole = weights_and_history(train_tiny_exact(tmp_path / "a", *CUDA, *words))
    assert weights_and_history(train_tiny_exact(tmp_path / "b", *CUDA, *words)) == whole
    assert weights_and_history(resumed(tmp_path / "c", *CUDA, *words)) == whole


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes(resumed, tmp_path: Path, name: str) -> None:
    words = (*CUDA, f"optimizer={name}")
    assert weights_and_history(resumed(tmp_path / "b", *words)) == weights_and_history(
        train_tiny_exact(tmp_path / "a", *words)
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_state_from_the_cpu_loads_on_the_gpu(name: str) -> None:
    config = compose(f"optimizer={name}")
    values, gradient = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(1, 2, 12).view(3, 4)

    def make(device: str):
        layer = torch.nn.Linear(4, 3, bias=False, device=device)
        layer.weight.data.copy_(values)
        return layer.weight, build_optimizer(config, layer, fused=True)

    def step(parameter, optimizer) -> None:
        parameter.grad = gradient.to(parameter.device)
        optimizer.step()

    here, optimizer = make("cpu")
    step(here, optimizer)
    there, on_gpu = make("cuda")
    there.data.copy_(here.data)
    load_optimizer(on_gpu, copy.deepcopy(optimizer.state_dict()))
    step(here, optimizer)
    step(there, on_gpu)
    torch.testing.assert_close(there.detach().cpu(), here.detach())


@pytest.mark.parametrize("trainer", ["cuda", "auto"])
def test_fast_configs_train(tmp_path: Path, trainer: str) -> None:
    words = (f"trainer={trainer}", *FAST, "optimizer.lr=3e-3", "trainer.epochs=6")
    history = train_tiny_exact(tmp_path / "r", *words).read_history()
    assert history[-1]["train_loss"] < history[0]["train_loss"]


@pytest.mark.skipif(shutil.which("cc") is None, reason="Triton needs a C compiler")
def test_compiled_training(tmp_path: Path) -> None:
    words = ("trainer=cuda", *FAST, "trainer.compile=true", "model.norm=lrn", "model.dropout=0.1")
    run = train_tiny_exact(tmp_path / "r", *words, "optimizer.lr=3e-3", "trainer.epochs=6")
    history = run.read_history()
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert "compiled" in run.read_json("environment.json")["plan"]


def test_the_fast_way_evaluates_as_the_cpu_does(tiny_run: RunDirectory) -> None:
    evaluations = []
    for words in (("trainer.device=cpu", "trainer.precision=fp32"), ("trainer=cuda",)):
        run = load_for_job(tiny_run, *words)
        evaluations.append(loop.evaluate(run.model, run.batches(run.split("test")), run.runtime, "test"))
    assert evaluations[1].loss == pytest.approx(evaluations[0].loss, rel=0.02)  # bf16 has 8 bits
    assert (evaluations[1].predictions == evaluations[0].predictions).double().mean() >= 0.9


@pytest.mark.parametrize(
    "words",
    [
        ("augment=crop_flip_cutout", "model.norm=lrn", "trainer.ema=0.9", "trainer.clip_norm=1"),
        ("optimizer=sgd", "model.norm=batch", "trainer.accumulate=3", "data.mean=[0.4,0.5,0.6]"),
    ],
)
def test_no_step_waits_for_the_device(words: tuple[str, ...]) -> None:
    config = compose(*TINY_EXACT, "trainer=cuda", *FAST, "trainer.compile=false", "model.dropout=0.5", *words)
    state = training_state(config)
    batches = training_batches(config, state.runtime, load_splits(config.data).train)
    state.train()
    for batch in batches.epoch(0):  # warm-up: allocates memory and selects kernels
        loop.train_step(state, batch)
    torch.cuda.set_sync_debug_mode("error")  # a step that waits raises
    try:
        for batch in batches.epoch(1):
            loop.train_step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_after_a_resume_waits_for_the_device(name: str) -> None:
    if name == "nadam":
        pytest.xfail("PyTorch's NAdam keeps a number on the GPU and reads it twice per parameter after a resume")
    config = compose(*TINY_EXACT, "trainer=cuda", *FAST, "trainer.compile=false", f"optimizer={name}")
    state = training_state(config)
    batches = training_batches(config, state.runtime, load_splits(config.data).train)
    state.train()
    for batch in batches.epoch(0):
        loop.train_step(state, batch)
    state.restore(state.checkpoint())
    loop.train_step(state, next(batches.epoch(1)))
    torch.cuda.set_sync_debug_mode("error")  # a step that waits raises
    try:
        for batch in batches.epoch(1, 1):
            loop.train_step(state, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_an_epochs_seconds_are_those_of_the_gpu() -> None:
    """The network is so large that each step takes the GPU longer than the host."""
    words = ("model=zfnet", "data.image_size=224", "data.store_size=32", "data.batch_size=36")
    state = training_state(compose("data=shapes", "data.train_images=400", *words, "trainer=cuda"), steps=10)
    batches = training_batches(state.config, state.runtime, load_splits(state.config.data).train)
    for epoch in range(2):  # the first epoch selects kernels
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        state.epoch, state.step, state.epoch_seconds = epoch, epoch * 10, 0.0
        start.record()
        loop.train_epoch(state, batches)
        end.record()
        torch.cuda.synchronize()
    assert len(batches) == 10
    assert state.epoch_seconds == pytest.approx(start.elapsed_time(end) / 1000, rel=0.03)


@pytest.mark.skipif(shutil.which("cc") is None, reason="Triton needs a C compiler")
def test_a_compiled_dropout_drops_what_the_cpu_drops() -> None:
    layer = Dropout(0.5).cuda().train()
    layer.set_key(12345, 3)
    there = torch.compile(layer)(torch.ones(64, 300, device="cuda"))
    layer.cpu().set_key(12345, 3)
    assert torch.equal(there.cpu(), layer(torch.ones(64, 300)))


def test_a_search_is_the_same_twice_whatever_training_has_chosen() -> None:
    resolve_runtime(compose("trainer=auto", "trainer.device=cuda").trainer)
    model = network("pad").float().cuda()
    images = image_set(random_images(50, model.image_size).numpy(), torch.arange(50) % 4, "abcd")

    def search(batch_size: int) -> dict[str, torch.Tensor]:
        data = data_config(image_size=model.image_size, batch_size=batch_size)
        batches = partial(Batches, data=data, device=torch.device("cuda"))
        return collect(model, images, batches, ["conv2", "fc7"], TopActivations(3, 4)).state()[0]

    once, twice = search(16), search(16)
    assert all(torch.equal(once[name], twice[name]) for name in once)


@pytest.mark.parametrize("trainer", ["exact", "auto"])
def test_projections_are_the_same_twice_and_close_to_the_cpus(trainer: str) -> None:
    """The deconvnet uses full precision and deterministic kernels, whatever switches a training has set."""
    resolve_runtime(compose(f"trainer={trainer}", "trainer.device=cuda").trainer)
    model = network("lrn").float()
    images = random_inputs(model).float()
    units = {layer: some_units(model, images, layer) for layer in ("conv1", "conv5", "fc7")}
    deconvnet = Deconvnet(model, lrn="gradient")
    expected = {layer: deconvnet.project(images, layer, of) for layer, of in units.items()}
    model.cuda()
    for layer, cpus in expected.items():
        once, twice = (deconvnet.project(images.cuda(), layer, units[layer]).cpu() for _ in range(2))
        assert torch.equal(once, twice)
        torch.testing.assert_close(once, cpus, rtol=1e-3, atol=1e-4 * float(cpus.abs().max()))


def test_normalisation_is_the_same_twice() -> None:
    resolve_runtime(compose("trainer=exact", "trainer.device=cuda").trainer)
    x = torch.randn(8, 96, 27, 27, device="cuda")
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = LocalResponseNorm()(leaf)
        y.backward(torch.ones_like(y))
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("gradients", ["fp32", "bf16"])
def test_the_process_group_uses_nccl(tmp_path: Path, gradients: str) -> None:
    """Check the group, its two backends, and the wrapped network. One process, because there may be only one GPU."""
    init_process_group(World(), f"file://{tmp_path}/meet")
    try:
        here, there = torch.ones(2), torch.ones(2, device="cuda")
        dist.all_reduce(here)
        dist.all_reduce(there)
        assert here.tolist() == there.tolist() == [1, 1]
        values: list[object] = [None]
        dist.all_gather_object(values, "a word")
        assert values == ["a word"]
        model = torch.nn.Linear(3, 2).cuda()
        wrapped = World(size=2).wrap(model, torch.device("cuda", 0), gradients)
        assert isinstance(wrapped, DistributedDataParallel)
        wrapped(torch.ones(4, 3, device="cuda")).sum().backward()
        assert model.weight.grad is not None
        assert torch.equal(model.weight.grad.cpu(), torch.full((2, 3), 4.0))
    finally:
        dist.destroy_process_group()
