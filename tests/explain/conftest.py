"""Tiny tensors on one thread: on a busy machine a second one waits more than it helps."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
