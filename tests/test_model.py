"""The network: the paper's figures, the blog's class as an oracle, and what each setting does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers import compose, tiny_model_config
from zfnet.config.errors import UserError
from zfnet.config.schema import Conv, Linear, ModelConfig
from zfnet.model.zfnet import Dropout, ZFNet


class BlogZFNet(nn.Module):
    """The network of the blog post, written down from its listing: an oracle that shares no code with ours."""

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
def test_parameter_counts(num_classes: int, expected: int) -> None:
    assert parameters(num_classes) == expected
    assert parameters(num_classes, compose("model=zfnet").model) == expected
    assert parameters(num_classes, compose("model=zfnet_paper").model) == expected  # LRN has none


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
def test_table_3_variants(changes: dict, ten: int, thousand: int) -> None:
    assert parameters(10, ModelConfig(**changes)) == ten
    assert parameters(1000, ModelConfig(**changes)) == thousand


def test_the_blogs_weights_give_the_blogs_logits() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):  # 58 million numbers are drawn once
        blog, ours = BlogZFNet().eval(), ZFNet().eval()
    blog.to_empty(device="cpu")
    ours.to_empty(device="cpu")
    for parameter in blog.parameters():
        nn.init.normal_(parameter, std=0.02)
    ours.load_weights({f"module.{name}": value for name, value in blog.state_dict().items()})
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected, found = blog(images), ours(images)
    assert expected.std() > 1e-4
    torch.testing.assert_close(found, expected)


def test_blog_names_and_prefixes_load() -> None:
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


def test_weights_that_do_not_fit_are_refused() -> None:
    model = ZFNet(3, 64, tiny_model_config())
    state = dict(model.state_dict())
    with pytest.raises(UserError, match=r"the weights' fc8.weight is \[4, 11\], this network's is \[3, 11\]"):
        model.load_weights({**state, "fc8.weight": torch.zeros(4, 11)})
    with pytest.raises(UserError, match=r"the weights hold fc9.bias, which this network has not"):
        model.load_weights({**state, "fc9.bias": torch.zeros(1)})
    del state["conv2.bias"]
    with pytest.raises(UserError, match=r"the weights lack conv2.bias"):
        model.load_weights(state)


@pytest.mark.parametrize("norm", ["none", "lrn", "batch"])
def test_activations_are_the_forward_pass(norm: str) -> None:
    torch.manual_seed(1)
    model = ZFNet(3, 71, tiny_model_config(norm=norm, pooling="ceil")).eval()
    images = torch.randn(2, 3, 71, 71)
    found = model.activations(images, model.layers)
    assert model.layers == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    shapes = {name: tuple(x.shape) for name, x in found.items()}
    assert shapes["conv1"] == (2, 4, 34, 34)
    assert shapes["conv2"] == (2, 6, 7, 7)
    assert shapes["conv3"] == shapes["conv4"] == (2, 5, 3, 3)
    assert shapes["fc6"] == (2, 12)
    assert torch.equal(found["fc8"], model(images))
    assert all((found[name] >= 0).all() for name in model.layers[:-1])  # after the ReLU
    first = model.conv1(images) if norm != "batch" else model.norm1(model.conv1(images))
    assert torch.equal(found["conv1"], first.relu())
    assert torch.equal(found["fc8"], model.fc8(found["fc7"]))
    with pytest.raises(UserError, match=r"conv6: no such layer; did you mean 'conv"):
        model.activations(images, ["conv6"])


def test_where_normalisation_stands() -> None:
    """LRN after the pooling of layers 1 and 2 (Fig. 3); batch normalisation before each ReLU."""
    lrn = ZFNet(3, 64, tiny_model_config(norm="lrn")).steps
    assert lrn[:8] == ["conv1", "relu1", "pool1", "norm1", "conv2", "relu2", "pool2", "norm2"]
    assert "norm3" not in lrn
    batch = ZFNet(3, 64, tiny_model_config(norm="batch")).steps
    assert batch[:4] == ["conv1", "norm1", "relu1", "pool1"]
    assert [s for s in batch if s.startswith("norm")] == ["norm1", "norm2", "norm3", "norm4", "norm5"]


def test_ceil_and_pad_pooling_look_at_other_windows() -> None:
    row = torch.arange(8.0).view(1, 1, 8, 1).expand(1, 1, 8, 8).contiguous()
    pools = {p: ZFNet(2, 64, tiny_model_config(pooling=p)).pool1 for p in ("pad", "ceil")}
    assert pools["pad"](row)[0, 0, :, 0].tolist() == [1, 3, 5, 7]  # windows start at pixel −1
    assert pools["ceil"](row)[0, 0, :, 0].tolist() == [2, 4, 6, 7]  # and at pixel 0


def test_initialisations() -> None:
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


def test_filters_beyond_the_rms_limit_get_exactly_it() -> None:
    torch.manual_seed(0)
    model = ZFNet(3, 64, tiny_model_config(rms_limit=0.1))
    with torch.no_grad():
        model.conv1.weight.mul_(torch.tensor([0.1, 1.0, 10.0, 100.0]).view(4, 1, 1, 1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.renormalize()
    rms = {n: p.square().mean((1, 2, 3)).sqrt() for n, p in before.items() if p.dim() == 4}
    assert (rms["conv1.weight"] > 0.1).any()
    assert (rms["conv1.weight"] < 0.1).any()
    for name, parameter in model.named_parameters():
        if parameter.dim() != 4:
            assert torch.equal(parameter, before[name])
            continue
        over = rms[name] > 0.1
        assert torch.equal(parameter[~over], before[name][~over])  # to the bit
        after = parameter[over].square().mean((1, 2, 3)).sqrt()
        torch.testing.assert_close(after, torch.full_like(after, 0.1), rtol=1e-6, atol=0)
        direction = F.cosine_similarity(parameter[over].flatten(1), before[name][over].flatten(1))
        torch.testing.assert_close(direction, torch.ones_like(direction))
    once = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.renormalize()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, once[name], rtol=3e-7, atol=0)


def test_without_a_limit_no_filter_moves() -> None:
    model = ZFNet(3, 64, tiny_model_config())
    with torch.no_grad():
        model.conv1.weight.mul_(100)
    before = model.conv1.weight.detach().clone()
    model.renormalize()
    assert torch.equal(model.conv1.weight, before)


def _dropped(p: float, seed: int, step: int, first: int, rows: int, features: int = 200) -> torch.Tensor:
    layer = Dropout(p)
    layer.set_key(seed * 1000 + step, first)
    return layer.train()(torch.ones(rows, features))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(1, 40), st.floats(0.05, 0.95))
def test_dropout_does_not_depend_on_how_a_batch_is_divided(cut: int, rest: int, p: float) -> None:
    whole = _dropped(p, 1, 2, 0, cut + rest)
    assert torch.equal(whole[cut:], _dropped(p, 1, 2, cut, rest))
    assert torch.equal(whole, _dropped(p, 1, 2, 0, cut + rest))
    assert not torch.equal(whole, _dropped(p, 1, 3, 0, cut + rest))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_mean_and_drops_at_its_rate(p: float) -> None:
    x = _dropped(p, 0, 0, 0, 500)
    assert (x == 0).double().mean().item() == pytest.approx(p, abs=0.005)
    assert x.mean().item() == pytest.approx(1, abs=0.06)
    assert sorted(x.unique().tolist()) == pytest.approx([0, 1 / (1 - p)])


def test_dropout_rests_in_evaluation_and_passes_gradients_of_what_it_kept() -> None:
    layer = Dropout(0.5)
    x = torch.randn(8, 50, requires_grad=True)
    assert layer.eval()(x) is x
    layer.train().set_key(5, 0)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(x.grad, torch.where(y != 0, 2.0, 0.0))


def test_dropout_without_a_key_is_pytorchs() -> None:
    torch.manual_seed(0)
    x = Dropout(0.5).train()(torch.ones(100, 100))
    torch.manual_seed(0)
    assert torch.equal(x, F.dropout(torch.ones(100, 100), 0.5))


def test_set_step_gives_each_layer_and_step_its_own_mask() -> None:
    model = ZFNet(3, 64, tiny_model_config(fc6=Linear(50), fc7=Linear(50), dropout=0.5))
    keys = []
    for step in range(3):
        model.set_step(seed=0, step=step)
        keys += [model.dropout6.key.item(), model.dropout7.key.item()]
    model.set_step(seed=1, step=0)
    keys.append(model.dropout6.key.item())
    assert len(set(keys)) == 7
    assert "key" not in "".join(model.state_dict())


@pytest.mark.parametrize("part", [slice(0, 2), slice(2, 6)])
def test_logits_of_part_of_a_batch(part: slice) -> None:
    torch.manual_seed(0)
    model = ZFNet(3, 64, tiny_model_config(dropout=0.5)).train()
    images = torch.randn(6, 3, 64, 64)
    model.set_step(0, 0, 0)
    whole = model(images)
    model.set_step(0, 0, part.start)
    torch.testing.assert_close(model(images[part]), whole[part])
