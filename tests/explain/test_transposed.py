"""The adjoint of a convolution, against PyTorch's and against the adjoint identity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from zfnet.explain.transposed import transposed


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.integers(1, 11),
    stride=st.integers(1, 5),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    channels=st.sampled_from([1, 3, 6]),
)
def test_equals_conv_transpose_and_is_the_adjoint(kernel, stride, height, width, channels) -> None:
    signal = torch.randn(2, 5, height, width, dtype=torch.float64)
    weight = torch.randn(5, channels, kernel, kernel, dtype=torch.float64)
    ours = transposed(signal, weight, stride)
    torch.testing.assert_close(
        ours, F.conv_transpose2d(signal, weight, stride=stride), rtol=1e-10, atol=1e-10
    )
    x = torch.randn_like(ours)
    torch.testing.assert_close(
        (F.conv2d(x, weight, stride=stride) * signal).sum(), (x * ours).sum(), rtol=1e-10, atol=1e-10
    )
