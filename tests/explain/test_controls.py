"""The controls: each changes what it says, and similarity is Spearman's."""

from __future__ import annotations

import pytest
import torch

from tests.explain.networks import network, pictures
from zfnet.explain import Deconvnet
from zfnet.explain.controls import (
    CONTROLS,
    Controls,
    dead_window_sensitivity,
    project_controls,
    rank_correlation,
    shuffle_weights,
)


def test_rank_correlation_by_hand() -> None:
    a = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [1, 2, 2, 3], [5, 5, 5, 5]])
    b = torch.tensor([[1.0, 8, 27, 64], [4, 3, 2, 1], [1, 2, 3, 4], [1, 2, 3, 4]])
    found = rank_correlation(a, b)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / √(4.5 · 5)
    assert found[:3].tolist() == pytest.approx([1, -1, (4.5 / 5) ** 0.5])
    assert found[3].isnan()


def test_controls_of_a_random_network() -> None:
    model = network("pad")
    images = pictures(model, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    units = torch.tensor([[0, 1, 1, 1], [1, 2, 1, 1], [2, 3, 0, 1]])
    deconvnet = Deconvnet(model)
    controls = project_controls(deconvnet, images, "conv4", units)
    assert controls.others.keys() == CONTROLS.keys()
    assert project_controls(deconvnet, images, "conv1", units).others.keys() == CONTROLS.keys() - {
        "other_switches"  # there is no pooling below conv1
    }
    own = deconvnet.project(images, "conv4", units, seeds=torch.ones(3))
    assert torch.equal(controls.own, own)
    for other in controls.others.values():
        assert other.abs().sum() > 0
        assert not torch.allclose(other, own)
    again = project_controls(deconvnet, images, "conv4", units)
    assert all(torch.equal(again.others[k], v) for k, v in controls.others.items())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_dead_windows_matter_above_a_pooling_and_not_below() -> None:
    model = network("pad")
    images = pictures(model, 2)
    strongest = {}
    for layer in ("conv1", "conv5"):
        maps = model.activations(images, [layer])[layer]
        strongest[layer] = (maps >= maps.amax()).nonzero()
    below = dead_window_sensitivity(Deconvnet(model), images, "conv1", strongest["conv1"])
    assert below == {choice: {"relative_change": 0, "cosine": pytest.approx(1)} for choice in ("mask", "all")}
    units = strongest["conv5"]
    above = dead_window_sensitivity(Deconvnet(model), images, "conv5", units)
    ours, other = (
        Deconvnet(model, dead_windows=choice).project(images, "conv5", units) for choice in ("first", "mask")
    )
    assert above["mask"]["relative_change"] == pytest.approx(((ours - other).norm() / ours.norm()).item())
    assert min(row["relative_change"] for row in above.values()) > 0.01
    silent = dead_window_sensitivity(Deconvnet(model), images, "conv5", units[:0])
    assert silent["mask"] == {"relative_change": None, "cosine": None}


def test_similarity_of_equal_and_of_constant_projections() -> None:
    own = torch.randn(4, 3, 5, 5)
    found = Controls(own, {"same": own.clone(), "negated": -own, "empty": torch.zeros_like(own)}).similarity()
    assert found["same"]["rank_correlation"] == pytest.approx(1)
    assert found["negated"]["rank_correlation"] == pytest.approx(-1)
    assert found["negated"]["rank_correlation_abs"] == pytest.approx(1)
    assert found["empty"]["units"] == 0
    assert found["empty"]["rank_correlation"] is None


def test_shuffled_weights_are_the_same_numbers() -> None:
    model = network("pad")
    twin = shuffle_weights(model, "conv3")
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
    assert not torch.equal(model.conv3.weight, twin.conv3.weight)
    assert torch.equal(model.conv4.weight, twin.conv4.weight)
