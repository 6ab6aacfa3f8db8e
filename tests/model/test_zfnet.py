"""The network: the paper's numbers, the blog's class as a reference, and the effect of each setting."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import compose, tiny_model_config
from zfnet.config.errors import UserError
from zfnet.config.schema import Conv, Linear, ModelConfig
from zfnet.model.zfnet import CONV_LAYERS, ZFNet, feature_sizes, pool_of


class BlogZFNet(nn.Module):
    """The network of the blog post, copied from its listing: a reference that shares no code with ours."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, kernel_size=7, stride=2, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            nn.Conv2d(96, 256, kernel_size=5, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            nn.Conv2d(256, 384, kernel_size=3, stride=1, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 384, kernel_size=3, stride=1, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, kernel_size=3, stride=1, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.Linear(9216, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).flatten(1))


def parameters(num_classes: int, config: ModelConfig | None = None) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in ZFNet(num_classes, 224, config).parameters())


@pytest.mark.parametrize(("num_classes", "expected"), [(10, 58_301_578), (1000, 62_357_608)])
def test_zfnet_parameter_counts(num_classes: int, expected: int) -> None:
    assert parameters(num_classes) == expected
    assert parameters(num_classes, compose("model=zfnet").model) == expected
    assert parameters(num_classes, compose("model=zfnet_paper").model) == expected  # LRN has no parameters


WIDE = {"conv3": Conv(512, 3, 1, 1), "conv4": Conv(1024, 3, 1, 1), "conv5": Conv(512, 3, 1, 1, True)}
NONE34 = {"conv3": None, "conv4": None}


@pytest.mark.parametrize(
    ("changes", "ten", "thousand"),
    [
        ({"fc6": Linear(2048), "fc7": Linear(2048)}, 26_819_722, 28_848_232),
        ({"fc6": Linear(8192), "fc7": Linear(8192)}, 146_431_114, 154_542_184),
        (WIDE, 103_571_594, 107_627_624),
        ({**WIDE, "fc6": Linear(8192), "fc7": Linear(8192)}, 229_449_866, 237_560_936),
        ({"fc7": None}, 41_520_266, 45_576_296),
        ({"fc6": None, "fc7": None}, 3_818_634, 12_943_464),
        (NONE34, 55_794_058, 59_850_088),
        ({**NONE34, "fc6": None, "fc7": None}, 1_311_114, 10_435_944),
    ],
    ids=["fc2048", "fc8192", "wide", "wide fc8192", "no 7", "no 6,7", "no 3,4", "no 3,4,6,7"],
)
def test_zfnet_table_3_variants(changes: dict, ten: int, thousand: int) -> None:
    assert parameters(10, ModelConfig(**changes)) == ten
    assert parameters(1000, ModelConfig(**changes)) == thousand


@pytest.mark.parametrize(("width", "maps"), [(0.25, (24, 64, 96, 96, 64, 1024)), (1e-6, (1, 1, 1, 1, 1, 1))])
def test_zfnet_width_scales_every_layer_but_the_classes(width: float, maps: tuple[int, ...]) -> None:
    scaled = ModelConfig(fc6=Linear(maps[5]), fc7=Linear(maps[5]), norm="batch")
    for layer, channels in zip(CONV_LAYERS, maps, strict=False):
        setattr(scaled, layer, dataclasses.replace(getattr(scaled, layer), channels=channels))
    shapes = [
        {name: weight.shape for name, weight in ZFNet(10, 64, config).state_dict().items()}
        for config in (ModelConfig(width=width, norm="batch"), scaled)
    ]
    assert shapes[0] == shapes[1]
    assert shapes[0]["fc8.weight"] == (10, maps[5])


def test_load_weights_of_the_blog_gives_its_logits() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):  # without two initialisations of 58 million weights
        blog, ours = BlogZFNet().eval(), ZFNet().eval()
    blog.to_empty(device="cpu")
    ours.to_empty(device="cpu")
    for parameter in blog.parameters():
        nn.init.normal_(parameter, std=0.02)
    ours.load_weights({f"module.{name}": value for name, value in blog.state_dict().items()})
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, logits = blog(images), ours(images)
    assert expected.std() > 1e-4
    torch.testing.assert_close(logits, expected)


def test_load_weights_knows_the_blogs_names_and_prefixes() -> None:
    names = {"conv1": "features.0", "conv2": "features.3", "conv3": "features.6", "conv4": "features.8"}
    names |= {"conv5": "features.10", "fc6": "classifier.0", "fc7": "classifier.3", "fc8": "classifier.6"}
    model = ZFNet(3, 64, tiny_model_config())
    for prefix in ("", "module.", "_orig_mod.", "module._orig_mod."):
        state = {}
        for name, value in model.state_dict().items():
            layer, _, rest = name.partition(".")
            state[f"{prefix}{names[layer]}.{rest}"] = value
        other = ZFNet(3, 64, tiny_model_config())
        other.load_weights(state)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_load_weights_refuses_what_does_not_fit() -> None:
    model = ZFNet(3, 64, tiny_model_config())
    state = dict(model.state_dict())
    with pytest.raises(UserError, match=r"the weights' fc8.weight is \[4, 11\], this network's is \[3, 11\]"):
        model.load_weights({**state, "fc8.weight": torch.zeros(4, 11)})
    with pytest.raises(UserError, match=r"the weights contain fc9.bias, which this network does not have"):
        model.load_weights({**state, "fc9.bias": torch.zeros(1)})
    del state["conv2.bias"]
    with pytest.raises(UserError, match=r"conv2.bias is missing from the weights"):
        model.load_weights(state)


@pytest.mark.parametrize("norm", ["none", "lrn", "batch"])
def test_activations_are_the_forward_pass(norm: str) -> None:
    torch.manual_seed(1)
    model = ZFNet(3, 71, tiny_model_config(norm=norm, pooling="ceil")).eval()
    images = torch.randn(2, 3, 71, 71)
    outputs = model.activations(images, model.layers)
    assert model.layers == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    shapes = {name: tuple(x.shape) for name, x in outputs.items()}
    assert shapes["conv1"] == (2, 4, 34, 34)
    assert shapes["conv2"] == (2, 6, 7, 7)
    assert shapes["conv3"] == shapes["conv4"] == (2, 5, 3, 3)
    assert shapes["fc6"] == (2, 12)
    assert torch.equal(outputs["fc8"], model(images))
    assert all((outputs[name] >= 0).all() for name in model.layers[:-1])  # after the ReLU
    first = model.conv1(images) if norm != "batch" else model.norm1(model.conv1(images))
    assert torch.equal(outputs["conv1"], first.relu())
    assert torch.equal(outputs["fc8"], model.fc8(outputs["fc7"]))
    with pytest.raises(UserError, match=r"the network has no layer conv6; did you mean 'conv"):
        model.activations(images, ["conv6"])


def test_zfnet_order_of_normalisation() -> None:
    """LRN comes after the pooling of layers 1 and 2 (Fig. 3), batch normalisation before each ReLU."""
    lrn = ZFNet(3, 64, tiny_model_config(norm="lrn")).steps
    assert lrn[:8] == ["conv1", "relu1", "pool1", "norm1", "conv2", "relu2", "pool2", "norm2"]
    assert "norm3" not in lrn
    batch = ZFNet(3, 64, tiny_model_config(norm="batch")).steps
    assert batch[:4] == ["conv1", "norm1", "relu1", "pool1"]
    assert [s for s in batch if s.startswith("norm")] == ["norm1", "norm2", "norm3", "norm4", "norm5"]


def test_zfnet_ceil_and_pad_pooling_windows() -> None:
    row = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8).contiguous()
    pools = {p: ZFNet(2, 64, tiny_model_config(pooling=p)).pool1 for p in ("pad", "ceil")}
    assert pools["pad"](row)[0, 0, :, 0].tolist() == [1, 3, 5, 7]  # windows start at pixel −1
    assert pools["ceil"](row)[0, 0, :, 0].tolist() == [2, 4, 6, 7]  # windows start at pixel 0


def test_zfnet_initialisations() -> None:
    torch.manual_seed(0)
    config = tiny_model_config(fc6=Linear(300), conv1=Conv(64, 7, 2, 1, True))
    for init in ("default", "normal", "he"):
        config.init = init
        model = ZFNet(3, 64, config)
        deviation = {n: p.std().item() for n, p in model.named_parameters() if n.endswith("weight")}
        if init == "normal":
            assert deviation["conv1.weight"] == pytest.approx(0.01, rel=0.05)
            assert deviation["fc7.weight"] == pytest.approx(0.01, rel=0.05)
        if init == "he":
            assert deviation["conv1.weight"] == pytest.approx((2 / 147) ** 0.5, rel=0.05)
            assert deviation["fc7.weight"] == pytest.approx((2 / 300) ** 0.5, rel=0.05)
        biases = torch.cat([p for n, p in model.named_parameters() if n.endswith("bias")])
        assert (biases == 0).all().item() is (init != "default")


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
        outputs = model.activations(torch.empty(2, 3, size, size), list(sizes))
        assert model(torch.empty(2, 3, size, size)).shape == (2, 3)
    assert {layer: x.shape[-1] for layer, x in outputs.items()} == {layer: s[0] for layer, s in sizes.items()}


def _torch_can(config: ModelConfig, size: int) -> bool:
    """Return whether PyTorch's own layers accept the size and give at least one pixel."""
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


def test_feature_sizes_of_the_paper() -> None:
    """Fig. 3: 110, 55, 26, 13, 13, 13, 13, 6. Both modes of pooling give these sizes."""
    for pooling in ("pad", "ceil"):
        sizes = feature_sizes(ModelConfig(pooling=pooling), 224)
        assert sizes == {"conv1": (110, 55), "conv2": (26, 13), "conv3": (13, 13), "conv4": (13, 13), "conv5": (13, 6)}


def test_pool_of_each_pooling_mode() -> None:
    pools = [
        pool_of(ModelConfig(), "conv1"),
        pool_of(ModelConfig(), "conv5"),
        pool_of(ModelConfig(pooling="ceil"), "conv1"),
    ]
    assert [(p.kernel_size, p.stride, p.padding, p.ceil_mode) for p in pools] == [
        (3, 2, 1, False), (3, 2, 0, False), (3, 2, 0, True)
    ]  # fmt: skip
    assert pool_of(ModelConfig(), "conv3") is None


@pytest.mark.parametrize("size", [*range(64, 257, 13), 65, 225, 255, 256])
def test_zfnet_takes_every_size_from_64(size: int) -> None:
    with torch.device("meta"):
        assert ZFNet(10, size).eval()(torch.empty(1, 3, size, size)).shape == (1, 10)


@pytest.mark.parametrize(("pooling", "smallest"), [("pad", 53), ("ceil", 47)])
def test_feature_sizes_of_the_smallest_image(pooling: str, smallest: int) -> None:
    """ZFNet's docstring and conf/model/small.yaml state the smallest size."""
    config = ModelConfig(pooling=pooling)
    with pytest.raises(UserError, match=rf"set data.image_size={smallest} or more \(it is {smallest - 1}\), or lower "):
        feature_sizes(config, smallest - 1)
    assert feature_sizes(config, smallest)["conv5"][1] == 1


def test_the_smallest_size_is_found_however_odd_the_network() -> None:
    """Also if layers do not grow evenly with the image. If no size works, the message suggests none."""
    config = tiny_model_config(conv2=Conv(6, 31, 3, 0, True))
    with pytest.raises(UserError, match=r"set data.image_size=(\d+) or more") as caught:
        feature_sizes(config, 40)
    smallest = int(re.search(r"image_size=(\d+)", str(caught.value))[1])
    assert feature_sizes(config, smallest)
    with pytest.raises(UserError):
        feature_sizes(config, smallest - 1)
    with pytest.raises(UserError, match=r"kernel \(padding 1\): lower the kernel sizes and strides$"):
        feature_sizes(tiny_model_config(conv1=Conv(4, 9000, 2, 1, True)), 224)


class SlowOnMeta(TorchDispatchMode):
    """Records the operations on meta tensors that make PyTorch import sympy or its compiler, which takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in args):
            self.seen += [name for name in ("max_pool2d", "normal_") if name in str(func)]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("init", ["default", "normal", "he"])
def test_a_network_of_shapes_only_is_built_quickly(init: str) -> None:
    config = dataclasses.replace(ModelConfig(), init=init)
    with SlowOnMeta() as slow, torch.device("meta"):
        assert len(ZFNet(10, 64, config).state_dict()) == 16
    assert slow.seen == []
    with SlowOnMeta() as slow, torch.device("meta"):  # the recorder sees them
        nn.init.normal_(nn.MaxPool2d(3)(torch.empty(1, 1, 9, 9)))
    assert slow.seen == ["max_pool2d", "normal_"]


def test_images_of_another_size_are_named() -> None:
    model = ZFNet(3, 64, tiny_model_config())
    for shape in ((2, 3, 32, 32), (3, 64, 64), (2, 64, 64, 3), (2, 1, 64, 64)):
        for use in (model, lambda x: model.activations(x, ["conv5"])):
            with pytest.raises(UserError) as caught:
                use(torch.zeros(shape))
            assert str(caught.value) == f"images of shape {list(shape)}: the network expects [N, 3, 64, 64]"
    with pytest.raises(UserError, match=r"layers='conv5': must be a list, as in \['conv5'\]"):
        model.activations(torch.zeros(1, 3, 64, 64), "conv5")


def test_feature_sizes_name_the_layer_without_pixels() -> None:
    with pytest.raises(UserError, match=r"conv2 receives 4×4 pixels, too few for its 5×5 kernel"):
        feature_sizes(ModelConfig(), 20)
    with pytest.raises(UserError, match=r"the pooling after conv5 receives 2×2 pixels"):
        feature_sizes(ModelConfig(), 50)


@pytest.mark.parametrize(("classes", "size"), [(0, 64), (-1, 64), (10.0, 64), (10, 64.0), (10, 0), ("10", 64)])
def test_sizes_that_are_no_whole_numbers_are_refused(classes: Any, size: Any) -> None:
    with pytest.raises(UserError, match=r"^(num_classes|image_size)=\S+: must be a whole number of at least 1$"):
        ZFNet(classes, size)
