"""Divide boxes into cells, also where a box begins outside the frame."""

from __future__ import annotations

import torch

from zfnet.explain.boxes import box_cells, cell_means


def test_box_cells_divide_the_box_and_nothing_else() -> None:
    cells = box_cells(torch.tensor([[1, 0, 5, 2], [-2, 0, 2, 4]]), (6, 4), 2)
    assert cells[0].tolist() == [[-1] * 4, [0, 1, -1, -1], [0, 1, -1, -1], [2, 3, -1, -1], [2, 3, -1, -1], [-1] * 4]
    assert cells[1, :3].tolist() == [[2, 2, 3, 3], [2, 2, 3, 3], [-1] * 4]  # the box begins above the frame
    means, known = cell_means(torch.arange(24.0).view(1, 1, 6, 4).expand(2, 1, 6, 4), cells, 4)
    assert means[0, 0].tolist() == [6, 7, 14, 15]
    assert known.tolist() == [[True] * 4, [False, False, True, True]]
