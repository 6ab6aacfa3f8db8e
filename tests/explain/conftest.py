"""Run these tests on one thread: their tensors are tiny, and on a busy machine a second thread slows them down."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
