"""Targets of explanations: a unit's frame contains all that the unit sees, and pictures follow their methods."""

from __future__ import annotations

import pytest
import torch

from tests.explain.networks import VARIANTS, network, random_inputs
from zfnet.explain.receptive_field import receptive_field
from zfnet.explain.targets import BASELINES, GRAD_CAM, INTEGRATED, Target, blur, sobel, window_activations
from zfnet.explain.windows import take_windows
from zfnet.model.chain import OUTPUT


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_window_activations_are_those_of_the_whole_image(name: str) -> None:
    model = network(name)
    images = random_inputs(model, 2)
    for layer in model.chain.conv_layers:
        maps = model.chain.activations(images, [layer])[layer].detach()
        height, width = maps.shape[2:]
        places = torch.cartesian_prod(
            torch.tensor([0, height // 2, height - 1]), torch.tensor([0, width // 2, width - 1])
        )
        field = receptive_field(model, layer)
        item = torch.arange(len(places)) % 2
        frames = take_windows(images, item, field.corners(places), field.kernel)
        with torch.no_grad():
            found = window_activations(model.chain, layer, frames, places)
        torch.testing.assert_close(found, maps[item, :, places[:, 0], places[:, 1]])


def test_target_value_of_its_own_frames_is_the_activation() -> None:
    model = network("pad")
    images = random_inputs(model, 2)
    out = model.chain.activations(images, ["conv2", "conv5", OUTPUT])
    for layer, unit, cut in (
        ("conv2", (1, 3, 4, 0), True),
        ("conv5", (0, 2, 1, 1), False),
        (OUTPUT, (1, 2, 0, 0), False),
    ):
        target = Target(model.chain, layer, images, torch.tensor([unit]))
        assert target.cut_out == cut
        frames = target.cut(images)
        expected = out[layer][unit[:2]] if layer == OUTPUT else out[layer][unit]
        torch.testing.assert_close(target.value(frames, torch.zeros(1, dtype=torch.int64))[0], expected.detach())
        inside = target.inside[:, None]  # the unit does not see pixels outside its box
        changed = torch.where(inside, frames, 5.0) if layer != "conv2" else frames
        torch.testing.assert_close(target.value(changed, torch.zeros(1, dtype=torch.int64))[0], expected.detach())


def test_pictures_of_all_methods_have_one_frame() -> None:
    model = network("pad")
    images = random_inputs(model, 2)
    for layer, unit in (("conv2", (1, 3, 4, 0)), (OUTPUT, (1, 2, 0, 0))):
        target = Target(model.chain, layer, images, torch.tensor([unit]))
        for method in (*target.methods, *BASELINES):
            assert target.picture(method).shape[2:] == target.inside.shape[1:], method
        assert not torch.equal(target.picture("random"), target.picture("random", draw=1))


def test_integrated_gradients_add_up_to_the_change_of_the_output() -> None:
    model = network("no_pool")
    images = random_inputs(model, 3)
    labels = torch.tensor([2, 0, 3])
    units = torch.tensor([[0, 2, 0, 0], [1, 0, 0, 0], [2, 3, 0, 0]])
    target = Target(model.chain, OUTPUT, images, units)
    with torch.no_grad():
        change = (model(images) - model(torch.zeros_like(images)))[torch.arange(3), labels]
    torch.testing.assert_close(target.picture(INTEGRATED).sum((1, 2, 3)), change, rtol=0.05, atol=0.02)
    assert target.picture(GRAD_CAM).min() >= 0


def test_sobel_and_blur_by_hand() -> None:
    ramp = torch.arange(6.0).expand(1, 3, 6, 6)
    assert sobel(ramp)[0, 0, :, 1:-1].tolist() == [[8.0] * 4] * 6
    assert sobel(ramp.mT)[0, 0, 1:-1].tolist() == [[8.0] * 6] * 4
    torch.testing.assert_close(blur(torch.full((1, 3, 9, 9), 2.0), 4), torch.full((1, 3, 9, 9), 2.0))
    assert blur(ramp, 3)[0, 0, 3, 2:4].tolist() == pytest.approx([2, 3], abs=0.2)
