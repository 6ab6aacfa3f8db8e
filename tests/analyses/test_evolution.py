"""Compare projections and correlations of maps across snapshots with direct computations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.explain.trained import Trained
from tests.helpers import read_csv
from zfnet.analyses.evolution import EpochView, _stability, _strongest, project_strongest, sample_maps
from zfnet.data import Batches
from zfnet.data.images import image_set
from zfnet.explain import Deconvnet
from zfnet.explain.maps import standard_columns
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.runs.weights import load_model
from zfnet.training.checkpoint import epoch_files


def test_products_of_standard_columns_are_correlations() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, 4, generator=generator) for _ in range(2))
    b[:, 1], b[:, 2], a[:, 3] = 2 * a[:, 1] + 1, -a[:, 2], 5
    expected = np.corrcoef(a[:, 0].numpy(), b[:, 0].numpy())[0, 1]
    result = (standard_columns(a) * standard_columns(b)).sum(0)
    torch.testing.assert_close(result[:3], torch.tensor([expected, 1, -1], dtype=torch.float64))
    assert result[3].isnan()


def test_project_strongest_projects_the_strongest_activation_of_all(trained: Trained) -> None:
    images, data = trained.images.take(torch.arange(60)), trained.run.read_config().data
    seen = collect(
        trained.model.chain,
        images,
        lambda s: Batches(s, data, torch.device("cpu")),
        ["conv2", "conv5"],
        TopActivations(1, len(images.classes)),
    )
    for layer in ("conv2", "conv5"):  # a unit of conv5 sees more than the image, and a unit of conv2 less
        with torch.no_grad():
            maps = trained.model.activations(trained.inputs[:60], [layer])[layer]
        number = int(maps.amax((0, 2, 3)).argmax())
        image, y, x = np.unravel_index(int(maps[:, number].argmax()), maps[:, number].shape)
        result = project_strongest(
            trained.model.chain, layer, seen.layers[layer], torch.tensor([number]), lambda i: trained.inputs[i]
        )
        deconvnet = Deconvnet(trained.model)
        units = [(0, number, int(y), int(x))]
        expected = deconvnet.project(trained.inputs[image : image + 1], layer, units, fields=layer == "conv2")
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)


def test_sample_maps_samples_maps_that_are_alive() -> None:
    alive = torch.tensor([True, False, True, True, False, True])
    assert sample_maps(alive, 10, seed=0).tolist() == [0, 2, 3, 5]
    drawn = {tuple(sample_maps(alive, 2, seed).tolist()) for seed in range(20)}
    assert len(drawn) > 2
    assert all(alive[list(pair)].all() and pair[0] < pair[1] for pair in drawn)


def test_a_map_is_not_compared_with_itself_where_there_is_no_other() -> None:
    """The correlation of different maps is NaN. In addition, a map that is never active has no strongest image."""
    views = {}
    for epoch in (1, 2):
        maps = {
            "conv1": torch.rand(20, 1, 2, 2),
            "conv2": torch.rand(20, 2, 2, 2) * torch.tensor([0.0, 1.0]).view(2, 1, 1),
        }
        seen = TopActivations(1, 2)
        seen.add(maps, torch.arange(20), torch.zeros(20, dtype=torch.int64))
        views[epoch] = EpochView(seen.layers, {name: values.amax((2, 3)) for name, values in maps.items()})
    alone, two = _stability(views, ["conv1", "conv2"])
    assert math.isnan(alone["correlation_of_different_maps"])
    assert -1 <= alone["correlation_with_previous"] <= 1
    assert two["maps"] == 1
    images = image_set(np.zeros((20, 2, 2, 3), np.uint8), torch.zeros(20, dtype=torch.int64), "ab")
    dead = [row for row in _strongest(views, images, torch.arange(20)) if row["activation"] == 0]
    assert [(row["layer"], row["map"], row["image"], row["class"], row["y"]) for row in dead] == [
        ("conv2", 0, "", "", "")
    ] * 2


@pytest.mark.drawn
def test_evolution_names_each_maps_strongest_image_at_each_epoch(run_py, trained: Trained) -> None:
    answer = run_py(
        "job=evolution", f"run={trained.run.folder}", "job.split=test", "job.layers=[conv1,conv5]", "job.maps=3",
        "job.probe_images=20", "job.max_images=90", "hydra.run.dir=out", "trainer.threads=1",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    rows = read_csv(Path("out/strongest.csv"))
    assert len(rows) == 3 * (12 + 48)
    early, _ = load_model(epoch_files(trained.run.snapshots)[3])
    with torch.no_grad():
        peaks = early.activations(trained.inputs, ["conv5"])["conv5"].amax((2, 3))
    images = set()
    for row in rows:
        if row["layer"] == "conv5" and row["epoch"] == "3" and row["image"]:
            image, number = int(row["image"]), int(row["map"])
            images.add(image)
            assert float(peaks[image, number]) == pytest.approx(float(row["activation"]), rel=1e-4)
            assert row["class"] == trained.images.classes[int(trained.images.labels[image])]
    assert max(images) >= 90  # numbers of the split, not of the sample
    steps = read_csv(Path("out/stability.csv"))
    assert [(r["previous"], r["epoch"]) for r in steps] == [("1", "3")] * 2 + [("3", "6")] * 2
    last = [r for r in steps if r["epoch"] == "6"]
    assert all(r["correlation_with_previous"] == r["correlation_of_previous_with_last"] for r in last)
    assert Image.open("out/figures/evolution.png").width > 500
    assert Path("out/figures/stability.png").exists()
