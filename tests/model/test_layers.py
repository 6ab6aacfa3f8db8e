"""Local response normalisation compared with PyTorch's, keyed dropout, and the limit on filters."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.helpers import tiny_model_config
from zfnet.config.randomness import DROPOUT, make_key
from zfnet.config.schema import Linear
from zfnet.model import ZFNet
from zfnet.model.layers import (
    Dropout,
    LocalResponseNorm,
    evaluation_mode,
    renormalize_filters,
    replace_dropout,
    set_dropout_step,
)

GOLDEN = "001010000101001111000111010001110101110101010010"


def _noise(*shape: int, scale: float = 20.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("size", "alpha", "beta", "k"), [(5, 1e-4, 0.75, 2.0), (3, 1e-2, 0.5, 1.0), (1, 0.1, 0.75, 1.0)]
)
@pytest.mark.parametrize("channels", [1, 2, 7, 96])
def test_lrn_equals_pytorchs(size: int, alpha: float, beta: float, k: float, channels: int) -> None:
    """PyTorch's α multiplies the mean of the squares; Krizhevsky's and ours multiply the sum."""
    theirs = nn.LocalResponseNorm(size, alpha * size, beta, k)
    ours = LocalResponseNorm(size, alpha, beta, k)
    x, y = _noise(2, channels, 3, 4).requires_grad_(), _noise(2, channels, 3, 4).requires_grad_()
    weight = torch.rand(2, channels, 3, 4, dtype=torch.float64)
    a, b = ours(x), theirs(y)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    (a * weight).sum().backward()
    (b * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("beta", "k"), [(0.75, 2.0), (0.5, 1.0)])
def test_lrn_gradient(beta: float, k: float) -> None:
    x = _noise(2, 6, 2, 2, scale=2.0).requires_grad_()
    assert torch.autograd.gradcheck(LocalResponseNorm(5, 0.1, beta, k), (x,))


def test_lrn_by_hand() -> None:
    """The sum of map c covers the maps c−2 … c+2."""
    x = torch.arange(1.0, 7.0, dtype=torch.float64).view(1, 6, 1, 1)
    y = LocalResponseNorm(size=5, alpha=0.5, beta=0.75, k=2.0)(x).flatten()
    for c in range(6):
        total = sum((j + 1) ** 2 for j in range(max(0, c - 2), min(6, c + 3)))
        assert y[c].item() == pytest.approx((c + 1) * (2 + 0.5 * total) ** -0.75, rel=1e-12)


@pytest.mark.parametrize(("forward", "backward"), [(False, False), (True, False), (True, True)])
def test_lrn_of_half_precision_is_single(forward: bool, backward: bool) -> None:
    """With bf16 input, as from a convolution under autocast; forward and backward, with and without autocast."""
    x = _noise(1, 8, 2, 2).bfloat16().requires_grad_()
    y = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        a = LocalResponseNorm()(x)
    b = LocalResponseNorm()(y)
    assert torch.equal(a, b)
    with torch.autocast("cpu", torch.bfloat16, enabled=backward):
        a.sum().backward()
    b.sum().backward()
    assert torch.equal(x.grad, y.grad.bfloat16())


def test_lrn_refuses_an_even_size() -> None:
    with pytest.raises(ValueError, match="size=4: must be odd"):
        LocalResponseNorm(4)


def test_renormalize_filters_scales_to_exactly_the_limit() -> None:
    torch.manual_seed(0)
    model = ZFNet(3, 64, tiny_model_config())
    with torch.no_grad():
        model.conv1.weight.mul_(torch.tensor([0.1, 1.0, 10.0, 100.0]).view(4, 1, 1, 1))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    renormalize_filters(model, 0.1)
    rms = {n: p.square().mean((1, 2, 3)).sqrt() for n, p in before.items() if p.dim() == 4}
    assert (rms["conv1.weight"] > 0.1).any()
    assert (rms["conv1.weight"] < 0.1).any()
    for name, parameter in model.named_parameters():
        if parameter.dim() != 4:
            assert torch.equal(parameter, before[name])
            continue
        over = rms[name] > 0.1
        assert torch.equal(parameter[~over], before[name][~over])  # bit-identical
        after = parameter[over].square().mean((1, 2, 3)).sqrt()
        torch.testing.assert_close(after, torch.full_like(after, 0.1), rtol=1e-6, atol=0)
        direction = F.cosine_similarity(parameter[over].flatten(1), before[name][over].flatten(1))
        torch.testing.assert_close(direction, torch.ones_like(direction))
    once = {n: p.detach().clone() for n, p in model.named_parameters()}
    renormalize_filters(model, 0.1)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, once[name], rtol=3e-7, atol=0)


def _dropped(p: float, seed: int, step: int, first: int, rows: int) -> torch.Tensor:
    layer = Dropout(p)
    layer.set_key(seed * 1000 + step, first)
    return layer.train()(torch.ones(rows, 200))


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


def test_dropout_in_evaluation_and_its_gradients() -> None:
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


def test_set_dropout_step_gives_each_layer_and_step_its_own_mask() -> None:
    model = ZFNet(3, 64, tiny_model_config(fc6=Linear(50), fc7=Linear(50), dropout=0.5))
    keys = []
    for step in range(3):
        set_dropout_step(model, seed=0, step=step)
        keys += [model.dropout6.key.item(), model.dropout7.key.item()]
    set_dropout_step(model, seed=1, step=0)
    keys.append(model.dropout6.key.item())
    assert len(set(keys)) == 7
    assert "key" not in "".join(model.state_dict())


@pytest.mark.parametrize("chunk", [slice(0, 2), slice(2, 6)])
def test_set_dropout_step_for_a_chunk_of_a_batch(chunk: slice) -> None:
    torch.manual_seed(0)
    model = ZFNet(3, 64, tiny_model_config(dropout=0.5)).train()
    images = torch.randn(6, 3, 64, 64)
    set_dropout_step(model, 0, 0, 0)
    whole = model(images)
    set_dropout_step(model, 0, 0, chunk.start)
    torch.testing.assert_close(model(images[chunk]), whole[chunk])


def test_dropout_mask_is_the_recorded_one() -> None:
    """Reproductions of recorded runs must drop the same entries; an earlier version gave GOLDEN."""
    layer = Dropout(0.5).train()
    layer.set_key(12345, 3)
    assert "".join(str(int(v > 0)) for v in layer(torch.ones(2, 24)).flatten()) == GOLDEN


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 5), st.integers(1, 5), st.sampled_from([(), (3,), (3, 4), (3, 4, 5), (2, 3, 4, 5)]), st.booleans()
)
def test_dropout_takes_any_rank(cut: int, rest: int, shape: tuple[int, ...], whole_channels: bool) -> None:
    def dropped(first: int, rows: int) -> torch.Tensor:
        layer = Dropout(0.4, whole_channels).train()
        layer.set_key(7, first)
        return layer(torch.ones(rows, 6, *shape))

    whole = dropped(0, cut + rest)
    assert torch.equal(whole[cut:], dropped(cut, rest))
    if whole_channels:
        maps = whole.reshape(len(whole), 6, -1)
        assert torch.equal(maps.amin(2), maps.amax(2))
    else:  # the mask equals that of the flattened input
        layer = Dropout(0.4).train()
        layer.set_key(7, 0)
        assert torch.equal(whole.flatten(1), layer(torch.ones(len(whole), whole[0].numel())))


def test_dropout_used_twice_in_a_pass_drops_other_entries() -> None:
    layer, x = Dropout(0.5).train(), torch.ones(4, 100)
    layer.set_key(7, 0)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    layer.set_key(7, 0)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer(x), second)


class Shared(nn.Module):
    """One dropout layer in several places, a nested one, and alpha dropout, which has no keyed version."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.Dropout2d(0.4, inplace=True), nn.Sequential(nn.ReLU(), self.drop)
        )
        self.same = self.drop
        self.alpha = nn.AlphaDropout(0.5)


def test_replace_dropout() -> None:
    model = Shared()
    model.drop.eval()
    assert replace_dropout(model) == 2
    assert model.drop is model.same is model.stem[2][1]
    assert not model.drop.training
    assert (model.drop.p, model.drop.whole_channels) == (0.3, False)
    assert (model.stem[1].p, model.stem[1].whole_channels) == (0.4, True)
    assert type(model.alpha) is nn.AlphaDropout
    assert replace_dropout(model) == 0
    set_dropout_step(model, seed=0, step=4)
    keys = {m.key.item() for m in model.modules() if isinstance(m, Dropout)}
    assert keys == {make_key(0, DROPOUT, 4, number) for number in (0, 1)}


@pytest.mark.parametrize("plain", [nn.Dropout(0.5), nn.Dropout1d(0.5), nn.Dropout2d(0.5), nn.Dropout3d(0.5)])
def test_replace_dropout_without_a_key_is_pytorchs(plain: nn.Module) -> None:
    shape = (8, 5, *[3] * {"Dropout1d": 1, "Dropout3d": 3}.get(type(plain).__name__, 2))
    keyed = nn.Sequential(copy.deepcopy(plain))
    replace_dropout(keyed)
    torch.manual_seed(0)
    expected = plain(torch.ones(shape))
    torch.manual_seed(0)
    assert torch.equal(keyed(torch.ones(shape)), expected)


def test_renormalize_filters_of_any_network() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(4, 6, (3, 1), groups=2)), nn.Linear(3, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    renormalize_filters(model, 0.5)
    torch.testing.assert_close(model[0][0].weight, torch.full((6, 2, 3, 1), 0.5))
    assert (model[1].weight == 2).all()


def test_evaluation_mode_gives_each_module_its_own_mode_back() -> None:
    class Recording(nn.Sequential):
        """A network with a `train` that does more than set the mode, for example merges weights."""

        def train(self, mode: bool = True) -> nn.Module:
            calls.append(mode)
            return super().train(mode)

    calls: list[bool] = []
    model = Recording(nn.BatchNorm2d(3), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3))).train()
    model[1].eval()
    with contextlib.suppress(RuntimeError), evaluation_mode(model):
        within = [module.training for module in model.modules()]
        raise RuntimeError("stop")
    assert not any(within)
    assert [module.training for module in model.modules()] == [True, True, False, False, False]
    assert calls == [True, False, True]


def test_lrn_refuses_a_second_derivative() -> None:
    x = torch.rand(1, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(LocalResponseNorm()(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
