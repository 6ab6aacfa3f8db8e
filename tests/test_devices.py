"""No operation mixes CPU and GPU tensors, and no training step waits for the GPU, checked with a simulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.explain.networks import network, random_inputs, some_units
from tests.gpu.test_cuda import FAST
from tests.helpers import (
    EVERY_STEP,
    TINY_EXACT,
    assert_full_precision,
    compose,
    data_config,
    load_for_job,
    random_images,
    train_tiny_exact,
    training_state,
    weights_and_history,
)
from tests.pretended import MixedDevices, OnGpu, simulated_gpu
from zfnet.analyses import correspondence
from zfnet.analyses.correspondence import Masks, mark_quarters
from zfnet.analyses.deconvnet import compare_controls, dead_window_sensitivity, inside_frames, project_controls
from zfnet.analyses.evolution import project_strongest
from zfnet.analyses.filters import measure_filters
from zfnet.analyses.invariance import make_amounts, measure, typical_distance
from zfnet.analyses.occlusion import occlude
from zfnet.data import Batches, load_splits, preprocess
from zfnet.data.images import image_set
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.maps import strongest_activations
from zfnet.explain.selection import choose_images
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.plots.pictures import on_grey, to_pixels
from zfnet.runs.directory import RunDirectory
from zfnet.training.build import training_batches
from zfnet.training.loop import evaluate, train_step

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real CUDA device is present")
ON_GPU = ("trainer.device=cuda", "trainer.precision=fp32")
GPU = torch.device("cuda")


@pytest.fixture
def waits() -> Iterator[list[str]]:
    with simulated_gpu() as waits:
        yield waits


@pytest.fixture
def in_full_precision() -> Iterator[None]:
    with assert_full_precision():
        yield


def test_fast_configs_use_bf16_and_a_resize() -> None:
    """TINY_EXACT has neither. Those tests need a GPU, so this one checks their configs on machines without one."""
    for trainer in ("cuda", "auto"):
        config = compose(*TINY_EXACT, f"trainer={trainer}", *FAST)
        assert (config.trainer.precision, config.trainer.deterministic) == ("bf16", False)
        assert config.data.store_size < config.data.image_size
        assert config.model.fc7 is not None


def test_the_simulated_gpu_raises_where_cuda_does(waits: list[str]) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert isinstance(there, OnGpu)
    for mixed in (
        lambda: here + there,
        lambda: torch.cat([here, there]),
        lambda: here[there.long()],
        lambda: there.numpy(),
        lambda: torch.zeros(()).add_(there.sum()),
        lambda: there.index_put((there.long(),), here),
    ):
        with pytest.raises(MixedDevices):
            mixed()
    assert waits == []
    assert torch.equal((there * torch.tensor(2.0) + 1).cpu(), 2 * here + 1)
    assert there[torch.tensor([0])].sum().item() == 1
    assert len(waits) == 3  # for cpu(), for the index on the CPU, for item()


@pytest.mark.parametrize(
    "words",
    [
        ("optimizer=sgd", "model.norm=lrn", "model.dropout=0.5", "augment=crop_flip_cutout"),
        ("optimizer=adam", "data.device_memory=0", "trainer.accumulate=3"),
        ("optimizer=adagrad", "model.norm=batch", "loss.label_smoothing=0.1"),
        ("optimizer=nadam", "model.rms_limit=0.1", "data.mean=[0.4,0.5,0.6]", "augment=crop_flip"),
        ("optimizer=rmsprop", "scheduler.warmup_epochs=1"),
        (
            "optimizer=adamw",
            "loss.weight=[1,1,1,1,1,1,1,1,1,2]",
            "+optimizer.param_groups=[{ndim:1,weight_decay:0}]",
            "model.norm=batch",
            "trainer.freeze=[conv1,norm1]",
            "trainer.ema=0.9",
        ),
    ],
)
def test_a_step_mixes_no_devices_and_does_not_wait(waits: list[str], words: tuple[str, ...]) -> None:
    config = compose(*TINY_EXACT, "data.subset=27", *ON_GPU, *words)
    state = training_state(config)
    batches = training_batches(config, state.runtime, load_splits(config.data).train)
    state.train()
    steps = batches.epoch(0)
    train_step(state, next(steps))
    waits.clear()
    for batch in steps:
        train_step(state, batch)
    assert waits == []
    assert all(p.device.type == "cuda" for p in state.model.parameters())


def test_a_run_resumes_from_a_checkpoint(waits: list[str], tmp_path: Path) -> None:
    words = (EVERY_STEP, "data.subset=27", "trainer.ema=0.9", "trainer.clip_norm=1", "model.dropout=0.5")
    whole = train_tiny_exact(tmp_path / "gpu", *ON_GPU, *words)
    (tmp_path / "gpu" / "checkpoints" / "step-000000006.safetensors").unlink()
    before = weights_and_history(whole)
    (whole.folder / "results.json").unlink()
    whole.set_status("stopped")
    assert weights_and_history(train_tiny_exact(tmp_path / "gpu", *ON_GPU, *words)) == before
    assert (
        weights_and_history(train_tiny_exact(tmp_path / "cpu", *words)) == before
    )  # because `OnGpu` computes on the CPU


@pytest.mark.parametrize(("stored", "wanted"), [(32, 224), (32, 64), (64, 20), (48, 48)])
def test_the_gpus_way_of_preprocessing_is_within_a_grey_level(waits: list[str], stored: int, wanted: int) -> None:
    data = data_config(image_size=wanted, mean=[0.0] * 3, std=[1 / 255] * 3)
    pixels = random_images(4, stored)
    assert (preprocess(pixels.to("cuda"), data).cpu() - preprocess(pixels, data)).abs().max() <= 1.001


@pytest.mark.parametrize(("variant", "rule"), [("lrn", "deconvnet"), ("batch", "guided"), ("no_pool", "gradient")])
def test_projections(waits: list[str], in_full_precision: None, variant: str, rule: str) -> None:
    model = network(variant)
    images, layers = random_inputs(model), ("conv1", "conv5", "fc8")
    units = {layer: some_units(model, images, layer)[:6] for layer in layers}
    expected = {layer: Deconvnet(model, rule).project(images, layer, units[layer]) for layer in layers}
    model.to("cuda")
    for layer in layers:
        projection = Deconvnet(model, rule).project(images.to("cuda"), layer, units[layer])
        assert projection.device.type == "cuda"
        torch.testing.assert_close(projection.cpu(), expected[layer])


def test_explanations(waits: list[str], in_full_precision: None) -> None:
    model = network("lrn").to("cuda")
    size, labels = model.image_size, torch.arange(4, device="cuda")
    inputs = random_inputs(model, 4).to("cuda")
    deconvnet = Deconvnet(model, "guided", "all", "gradient")
    units = torch.tensor([[0, 0, 1, 1], [1, 2, 0, 1], [3, 1, 0, 0]])
    assert deconvnet.project(inputs, "conv2", units, fields=True).device.type == "cuda"
    inside = inside_frames(model.chain, "conv3", units)
    assert compare_controls(project_controls(deconvnet, inputs, "conv3", units), inside)
    assert dead_window_sensitivity(deconvnet, inputs, "conv2", units)
    occluded = occlude(
        model.chain, inputs, labels, layer="conv5", patch=30, stride=30, fill=torch.zeros(3), batch_size=5
    )
    assert type(occluded.occluded.probability) is torch.Tensor
    assert occluded.strongest is not None
    assert type(occluded.strongest.occluded) is torch.Tensor
    amounts = make_amounts(size, 0.1, 1.5, 90, 3)
    curves = measure(model.chain, inputs, labels, amounts, ["conv1", "fc7"], 4)
    assert all(type(c.probability) is torch.Tensor for c in curves.values())
    assert typical_distance(model.chain, inputs, ["conv1"], 2)["conv1"] > 0
    boxes = torch.tensor([[4.0, 4, 40, 50]] * 4)
    marked = mark_quarters(inputs, boxes, torch.zeros(4, dtype=torch.int64))
    assert correspondence.measure(model.chain, marked, ["fc7"], Masks(9, torch.zeros(3), 3), 9, 0).table["fc7"]
    assert on_grey(inputs).numpy().shape == to_pixels(inputs, data_config()).numpy().shape


def test_searches_over_a_set(waits: list[str], in_full_precision: None) -> None:
    model = network("pad").float().to("cuda")
    images = image_set(random_images(20, model.image_size).numpy(), torch.arange(20) % 4, "abcd")
    data = data_config(image_size=model.image_size)

    def batches(part) -> Batches:
        return Batches(part, data, GPU)

    strongest = collect(model, images, batches, ["conv2", "fc7"], TopActivations(3, 4, images.labels))
    again = TopActivations.from_state(*strongest.state(), GPU)
    assert again.statistics("conv2").class_means.device.type == "cuda"
    probes = random_inputs(model, 2).float().to("cuda")
    assert len(strongest_activations(model.chain, probes.split(2), ["conv2"])["conv2"]) == 2
    seen = collect(model.chain, images, batches, ["conv2"], TopActivations(1, len(images.classes)))
    maps = torch.tensor([0, 3])

    def inputs(index: torch.Tensor) -> torch.Tensor:
        return preprocess(images.pixels(index).to("cuda"), data)

    assert len(project_strongest(model.chain, "conv2", seen.layers["conv2"], maps, inputs)) == 2
    assert type(measure_filters(model.chain, batches(images).in_order()).peak) is torch.Tensor


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # of the device that stands for the GPU
def test_a_run_trained_on_a_cpu_loads_on_a_gpu(tiny_run: RunDirectory, waits: list[str]) -> None:
    run = load_for_job(tiny_run, *ON_GPU)
    assert choose_images(run, run.config, 3).labels.device.type == "cuda"
    evaluation = evaluate(run.model, run.batches(run.split("test")), run.runtime, "test")
    assert evaluation.accuracy == run.source.read_json("results.json")["test"]["accuracy"]
