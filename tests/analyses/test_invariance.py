"""Compare transforms with array operations and distances with direct computations; the identity's distance is 0."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.explain.networks import network, random_inputs
from tests.explain.trained import Trained
from tests.helpers import read_csv
from zfnet.analyses.invariance import TRANSFORMS, identity, make_amounts, measure, transform_images, typical_distance
from zfnet.runs.directory import RunDirectory


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_images_by_the_identity_changes_no_bit(transform: str) -> None:
    model = network("no_pool").chain
    images, labels = random_inputs(model, 3), torch.tensor([0, 1, 2])
    amounts = make_amounts(32, 0.3, 1.8, 350, 5)
    moved = transform_images(images, transform, amounts[transform])
    origin = int((amounts[transform] == identity(transform)).nonzero())
    assert torch.equal(moved[:, origin], images)
    result = measure(model, images, labels, amounts, ["conv1", "fc7"], batch_size=7)[transform]
    for distances in result.distances.values():
        assert (distances[:, origin] == 0).all()
        assert (distances.sum(0) > 0).sum() == len(amounts[transform]) - 1


def test_transform_images_by_whole_pixels() -> None:
    images = torch.randn(2, 3, 20, 20, dtype=torch.float64)
    moved = transform_images(images, "vertical translation", torch.tensor([-4.0, 0, 3]))
    torch.testing.assert_close(moved[:, 2, :, 3:], images[:, :, :-3], rtol=0, atol=1e-4)
    assert (moved[:, 2, :, :2] == 0).all()
    torch.testing.assert_close(moved[:, 0, :, :-4], images[:, :, 4:], rtol=0, atol=1e-4)
    sideways = transform_images(images, "horizontal translation", torch.tensor([5.0, 0]))
    torch.testing.assert_close(sideways[:, 0, :, :, 5:], images[..., :-5], rtol=0, atol=1e-4)


def test_transform_images_turns_counter_clockwise_and_enlarges() -> None:
    images = torch.randn(1, 3, 20, 20, dtype=torch.float64)
    turned = transform_images(images, "rotation", torch.tensor([0.0, 90, 180]))[0]
    torch.testing.assert_close(turned[1], images[0].rot90(1, (1, 2)), rtol=0, atol=1e-4)
    torch.testing.assert_close(turned[2], images[0].rot90(2, (1, 2)), rtol=0, atol=1e-4)
    wide = torch.zeros(1, 3, 20, 20)
    wide[..., 8:12, 8:12] = 1  # a square of 4 px has 8 px at twice the size
    assert transform_images(wide, "scale", torch.tensor([2.0]))[0, 0, 0].sum() == pytest.approx(64)


def test_measure_equals_one_image_at_a_time() -> None:
    model = network("no_pool").chain
    images, labels = random_inputs(model, 3), torch.tensor([3, 1, 2])
    amounts = make_amounts(32, 0.25, 1.5, 90, 4)
    result = measure(model, images, labels, amounts, ["conv2"], batch_size=1000)
    for transform, curves in result.items():
        for n, k in itertools.product(range(3), range(len(curves.amounts))):
            moved = transform_images(images[n : n + 1], transform, curves.amounts[k : k + 1])[0]
            there, here = (model.activations(x, ["conv2", "fc8"]) for x in (moved, images[n : n + 1]))
            expected = (there["conv2"] - here["conv2"]).norm()
            torch.testing.assert_close(curves.distances["conv2"][n, k], expected, rtol=1e-9, atol=1e-9)
            chance = there["fc8"].softmax(1)[0, labels[n]]
            torch.testing.assert_close(curves.probability[n, k], chance)


def test_typical_distance_is_that_of_all_pairs() -> None:
    model = network("no_pool").chain
    images = random_inputs(model, 5)
    features = model.activations(images, ["conv5"])["conv5"].flatten(1).detach()
    squares = [(a - b).square().sum() for a, b in itertools.combinations(features, 2)]
    expected = float(torch.stack(squares).mean().sqrt())
    assert typical_distance(model, images, ["conv5"], batch_size=2)["conv5"] == pytest.approx(expected)


def test_make_amounts_hold_the_identity_once_and_reach_the_limits() -> None:
    amounts = make_amounts(224, 60 / 224, 1.8, 350, 25)
    assert amounts["vertical translation"].min() == -60
    assert amounts["vertical translation"].max() == 60
    assert len(amounts["vertical translation"]) == 25
    assert amounts["scale"].max() == pytest.approx(1.8)
    assert amounts["rotation"].max() == 350
    assert {0, 90, 180, 270} <= set(amounts["rotation"].tolist())
    for steps in (3, 4, 7, 36):
        few = make_amounts(224, 60 / 224, 1.8, 270, steps)
        assert all(3 <= len(values) <= steps for values in few.values())
        assert few["rotation"].max() == 270
        assert steps < 4 or {0, 90, 180, 270} <= set(few["rotation"].tolist())
    assert make_amounts(8, 0.001, 1.1, 10, 31)["vertical translation"].tolist() == [-1, 0, 1]
    for transform, values in {**make_amounts(8, 0.2, 1.1, 10, 31), **amounts}.items():
        assert (values == identity(transform)).sum() == 1
        assert len(values.unique()) == len(values)


def test_measure_of_a_trained_network_is_lowest_for_turns(trained: Trained) -> None:
    """Shapes are drawn upright (±17°) at any place, so rotation costs more than translation (paper, section 4.1)."""
    images, labels, _ = trained.correctly_classified(40)
    result = measure(trained.model.chain, images, labels, make_amounts(64, 0.1, 1.2, 90, 3), ["conv1"], batch_size=256)
    mean = {transform: curves.probability.mean(0).min() for transform, curves in result.items()}
    assert mean["rotation"] < mean["vertical translation"]


@pytest.mark.drawn
def test_invariance_writes_every_point_that_it_draws(run_py, tiny_run: RunDirectory) -> None:
    answer = run_py(
        "job=invariance", f"run={tiny_run.folder}", "job.count=2", "job.mean_images=6", "job.steps=3",
        "job.split=test", "hydra.run.dir=out", "trainer.threads=1",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    rows = read_csv(Path("out/curves.csv"))
    assert len(rows) == (2 + 6) * 4 * 3
    metadata = json.loads(Path("out/invariance.json").read_text())
    assert metadata["layers"] == ["conv1", "fc7"]
    for row in rows:
        scaled = float(row["distance_fc7"]) / metadata["distance_between_two_images"]["fc7"]
        assert float(row["canonical_fc7"]) == pytest.approx(scaled, rel=1e-5)
        if float(row["amount"]) == (1 if row["transform"] == "scale" else 0):
            assert row["distance_conv1"] == row["distance_fc7"] == "0.0"
    assert Image.open("out/figures/invariance.png").width > 1000


def test_a_mean_of_one_image_is_refused(run_py, tiny_run: RunDirectory) -> None:
    answer = run_py("job=invariance", f"run={tiny_run.folder}", "data.eval_subset=1", "trainer.threads=1")
    assert answer.error == "job.split=validation: has one image, and a mean needs two"
