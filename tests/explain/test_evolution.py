"""Projections and comparisons of maps across snapshots, against plain computations."""

from __future__ import annotations

import numpy as np
import torch

from tests.explain.trained import Trained
from zfnet.data import Batches
from zfnet.explain import Deconvnet
from zfnet.explain.evolution import correlation, draw_lots, look, project_strongest


def test_correlation_is_that_of_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(30, 4, generator=generator) for _ in range(2))
    b[:, 1], b[:, 2], a[:, 3] = 2 * a[:, 1] + 1, -a[:, 2], 5
    expected = np.corrcoef(a[:, 0].numpy(), b[:, 0].numpy())[0, 1]
    found = correlation(a, b)
    torch.testing.assert_close(found[:3], torch.tensor([expected, 1, -1], dtype=torch.float64))
    assert found[3].isnan()


def test_a_look_finds_and_projects_the_strongest_activation_of_all(trained: Trained) -> None:
    images, data = trained.images.take(torch.arange(60)), trained.run.read_config().data
    seen = look(
        trained.model,
        images,
        lambda s: Batches(s, data, torch.device("cpu")),
        trained.inputs[:10],
        ["conv2", "conv5"],
        batch_size=4,
    )
    for layer in ("conv2", "conv5"):  # of conv5 a unit sees more than the image, of conv2 less
        with torch.no_grad():
            maps = trained.model.activations(trained.inputs[:60], [layer])[layer]
        torch.testing.assert_close(seen.answers[layer], maps[:10].amax((2, 3)), rtol=1e-4, atol=1e-5)
        number = int(maps.amax((0, 2, 3)).argmax())
        image, y, x = np.unravel_index(int(maps[:, number].argmax()), maps[:, number].shape)
        found = project_strongest(
            trained.model, layer, seen.strongest[layer], torch.tensor([number]), lambda i: trained.inputs[i]
        )
        deconvnet = Deconvnet(trained.model)
        project = deconvnet.project_fields if layer == "conv2" else deconvnet.project
        expected = project(trained.inputs[image : image + 1], layer, [(0, number, int(y), int(x))])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_lots_fall_on_maps_that_are_alive() -> None:
    alive = torch.tensor([True, False, True, True, False, True])
    assert draw_lots(alive, 10, seed=0).tolist() == [0, 2, 3, 5]
    drawn = {tuple(draw_lots(alive, 2, seed).tolist()) for seed in range(20)}
    assert len(drawn) > 2
    assert all(alive[list(pair)].all() and pair[0] < pair[1] for pair in drawn)
