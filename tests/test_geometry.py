"""The arithmetic of sizes agrees with what PyTorch does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from zfnet.config.errors import UserError
from zfnet.config.schema import Conv, ModelConfig
from zfnet.model.sizes import Pool, feature_sizes, pool_of
from zfnet.model.zfnet import ZFNet


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("ceil", [False, True])
def test_pool_size_is_pytorchs(padding: int, ceil: bool) -> None:
    for n in range(1, 80):
        try:
            x = torch.empty(1, 1, n, n, device="meta")
            theirs = nn.MaxPool2d(3, 2, padding, ceil_mode=ceil)(x).shape[-1]
        except RuntimeError:
            theirs = 0
        assert Pool(padding, ceil).size(n) == theirs


convs = st.builds(
    lambda kernel, stride, padding, pool: Conv(2, kernel, stride, padding, pool),
    st.integers(1, 11),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(
    st.builds(
        ModelConfig,
        conv1=convs,
        conv2=convs,
        conv3=st.none() | convs,
        conv4=st.none() | convs,
        conv5=convs,
        fc6=st.none(),
        fc7=st.none(),
        pooling=st.sampled_from(["pad", "ceil"]),
    ),
    st.integers(1, 128),
)
def test_feature_sizes_are_the_networks_or_are_refused(config: ModelConfig, size: int) -> None:
    try:
        sizes = feature_sizes(config, size)
    except UserError:
        assert not _torch_can(config, size)
        return
    with torch.device("meta"):
        model = ZFNet(3, size, config).eval()
        found = model.activations(torch.empty(2, 3, size, size), list(sizes))
        assert model(torch.empty(2, 3, size, size)).shape == (2, 3)
    assert {layer: x.shape[-1] for layer, x in found.items()} == {layer: s[0] for layer, s in sizes.items()}


def _torch_can(config: ModelConfig, size: int) -> bool:
    """Whether PyTorch's own layers get through with pixels left."""
    x = torch.empty(1, 3, size, size, device="meta")
    try:
        for name in ("conv1", "conv2", "conv3", "conv4", "conv5"):
            if (conv := getattr(config, name)) is None:
                continue
            layer = nn.Conv2d(x.shape[1], 2, conv.kernel_size, conv.stride, conv.padding, device="meta")
            x = layer(x)
            if conv.pool:
                ceil = config.pooling == "ceil"
                padding = 0 if ceil or name == "conv5" else 1
                x = nn.MaxPool2d(3, 2, padding, ceil_mode=ceil)(x)
    except RuntimeError:
        return False
    return x.numel() > 0


def test_the_papers_sizes() -> None:
    """Fig. 3: 110, 55, 26, 13, 13, 13, 13, 6; both kinds of pooling give them."""
    for pooling in ("pad", "ceil"):
        sizes = feature_sizes(ModelConfig(pooling=pooling), 224)
        assert sizes == {
            "conv1": (110, 55),
            "conv2": (26, 13),
            "conv3": (13, 13),
            "conv4": (13, 13),
            "conv5": (13, 6),
        }


def test_pooling_modes_place_their_windows_apart() -> None:
    assert pool_of(ModelConfig(), "conv1") == Pool(1, False)
    assert pool_of(ModelConfig(), "conv5") == Pool(0, False)
    assert pool_of(ModelConfig(pooling="ceil"), "conv1") == Pool(0, True)
    assert pool_of(ModelConfig(), "conv3") is None


@pytest.mark.parametrize("size", [*range(64, 257, 13), 65, 225, 255, 256])
def test_every_size_from_64_works(size: int) -> None:
    with torch.device("meta"):
        assert ZFNet(10, size).eval()(torch.empty(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize(("pooling", "smallest"), [("pad", 53), ("ceil", 47)])
def test_the_smallest_image(pooling: str, smallest: int) -> None:
    """ZFNet's docstring and conf/model/small.yaml name it."""
    config = ModelConfig(pooling=pooling)
    with pytest.raises(UserError):
        feature_sizes(config, smallest - 1)
    assert feature_sizes(config, smallest)["conv5"][1] == 1


def test_the_layer_that_runs_out_of_pixels_is_named() -> None:
    with pytest.raises(UserError, match=r"conv2 receives 4×4 pixels, too few for its 5×5 kernel"):
        feature_sizes(ModelConfig(), 20)
    with pytest.raises(UserError, match=r"the pooling after conv5 receives 2×2 pixels"):
        feature_sizes(ModelConfig(), 50)
