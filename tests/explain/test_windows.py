"""Windows of feature maps."""

from __future__ import annotations

import torch

from zfnet.explain.windows import Signal, take_windows


def test_windows_beyond_the_border_are_zero() -> None:
    maps = torch.arange(1, 19).view(2, 1, 3, 3)
    windows = take_windows(maps, torch.tensor([1, 0]), torch.tensor([[-1, -1], [2, 1]]), (2, 3))
    assert windows[:, 0].tolist() == [[[0, 0, 0], [0, 10, 11]], [[8, 9, 0], [0, 0, 0]]]


def test_a_signal_drops_what_lies_outside_and_is_never_larger_than_the_map() -> None:
    ones, item = torch.ones(1, 1, 4, 4), torch.tensor([0])
    small = Signal(ones[..., :2, :2], item, torch.tensor([[-1, 2]]))
    small.keep_inside((3, 3))
    assert small.values[0, 0].tolist() == [[0, 0], [1, 0]]
    assert small.corner.tolist() == [[-1, 2]]
    large = Signal(ones, item, torch.tensor([[-2, 0]]))
    large.keep_inside((3, 3))
    assert large.values[0, 0].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 0]]
    assert large.corner.tolist() == [[0, 0]]
