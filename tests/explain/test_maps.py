"""Numbers about single maps, compared with results by hand and with a network that really sets a map to zero."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.explain.networks import NETWORKS, chain, network, random_inputs
from zfnet.explain.maps import BINS, Ablation, MapResponses, ablation_effects, nearest_maps, strongest_activations
from zfnet.model.chain import Chain


def test_histogram_by_hand() -> None:
    strongest = torch.tensor([[0.0, 0.0], [12.0, 0.0], [0.5, 0.0], [1.0, 0.0], [1.01, -1.0]])
    counts, highest = MapResponses(strongest, None).histogram()
    assert counts.shape == (2, 1 + BINS)
    assert counts[0].tolist() == [1, 2, 1, *[0] * (BINS - 3), 1]  # the bins have width 1, and 1.0 is in the first
    assert counts[1].tolist() == [5, *[0] * BINS]  # never active
    assert highest.tolist() == [12, 0]


@pytest.mark.parametrize("name", ["pad", "mixed"])
def test_ablation_is_the_change_of_the_mean_output(name: str) -> None:
    own = network(name).chain if name == "pad" else chain(name)
    images = random_inputs(own, 3)
    layer = own.conv_layers[1]
    effect = ablation_effects(own, images.split(2), [layer])[layer]
    channel = 2

    def without(module, inputs, output):
        output = output.clone()
        output[:, channel] = 0
        return output

    with torch.no_grad():
        before = own.model(images).mean(0)
        if name == "pad":  # the mixed network has one ReLU for all layers, so a hook on it would change all
            handle = own.up_to(layer)[-1].module.register_forward_hook(without)
            after = own.model(images).mean(0)
            handle.remove()
            torch.testing.assert_close(effect[channel], after - before)
    assert effect.shape == (len(own.activations(images, [layer])[layer][0]), len(before))
    assert effect.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", [*NETWORKS, "linear over the width"])
def test_ablation_computes_what_the_later_steps_give_for_a_map_of_zeros(name: str) -> None:
    if name == "linear over the width":
        torch.manual_seed(0)
        over_width = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Linear(6, 6), nn.Flatten(), nn.Linear(108, 4))
        own = Chain(over_width.double(), 8)
    else:
        own = chain(name)
    images = random_inputs(own, 3)
    for layer in own.conv_layers:
        ablation = Ablation(own, images, layer)
        number, rows, after = next(ablation.each())
        changed = own.activations(images[rows], [layer])[layer]
        changed[:, number] = 0
        for step in own.steps[len(own.up_to(layer)) :]:
            changed = step(changed)
        torch.testing.assert_close(after, changed, msg=lambda text, layer=layer: f"{layer}: {text}")
        torch.testing.assert_close(ablation.before, own.model(images))
        assert not torch.equal(after, ablation.before[rows])


def test_nearest_maps_finds_each_maps_copy_in_another_network() -> None:
    own = network("pad").chain
    batches = random_inputs(own, 8).split(3)
    strongest = strongest_activations(own, batches, ["conv1", "conv3"])
    maps = own.activations(torch.cat(batches), ["conv3"])["conv3"]
    torch.testing.assert_close(strongest["conv3"], maps.flatten(2).amax(2).detach())
    others = {"a": strongest["conv3"].flip(1) * 3 + 1, "b": strongest["conv1"]}
    others["b"][:, 0] = 5  # a constant map is similar to none
    found = nearest_maps(strongest, others)
    for number, row in enumerate(found["conv3"]):
        if strongest["conv3"][:, number].std() > 0:
            assert row[0][:2] == ("a", 6 - number)
            assert row[0][2] == pytest.approx(1)
    assert ("b", 0) not in [entry[:2] for rows in found.values() for row in rows for entry in row]
    assert nearest_maps({"x": torch.ones(8, 1)}, others) == {"x": [[]]}
