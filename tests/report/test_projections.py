"""The figure of projections: every tile at its place, on both sides."""

from __future__ import annotations

import numpy as np
import torch

from zfnet.plots.projections import draw_controls, draw_projections


def test_projections_left_patches_right_and_every_map_named() -> None:
    left = [torch.full((4, 7, 7, 3), 10 * n, dtype=torch.uint8) for n in (1, 2, 3)]
    right = [torch.full((4, 7, 7, 3), 100 + 10 * n, dtype=torch.uint8) for n in (1, 2, 3)]
    figure = draw_projections("conv9", [5, 17, 200], left, right)
    assert figure.get_suptitle() == "conv9"
    for axis, expected in zip(figure.axes, (left, right), strict=True):
        sheet = np.asarray(axis.images[0].get_array())
        assert [text.get_text() for text in axis.texts] == ["map 5", "map 17", "map 200"]
        for text, tiles in zip(axis.texts, expected, strict=True):
            x, y = text.get_position()
            below = sheet[int(y) + 20, int(x) - 20]
            assert (below == tiles[0, 0, 0].numpy()).all()
        shades = set(np.unique(sheet)) - {255}
        assert shades == {int(tiles[0, 0, 0, 0]) for tiles in expected}


def test_controls_that_do_not_apply_have_no_bar() -> None:
    row = {"units": 3, "rank_correlation": 0.5, "rank_correlation_std": 0.1}
    none = {"units": 0, "rank_correlation": None, "rank_correlation_std": None}
    figure = draw_controls(
        {
            "conv1": {"random_weights": row, "other_unit": none},
            "conv2": {"random_weights": row, "other_unit": row, "other_switches": row},
        }
    )
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == [0.5] * 4
