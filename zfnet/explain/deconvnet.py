"""The deconvnet projects the activation of one unit back to pixel space (paper, section 2.1).

The backward pass applies the adjoint of each module: a max pooling sends the signal back to the positions of its
maxima (`windows.py`), a ReLU rectifies it, and a convolution applies its transposed filters. Biases are left out.
Except at the ReLU this equals the gradient (Simonyan et al. 2013, section 4), so one implementation covers three rules.
They differ in where a ReLU passes the signal:

    deconvnet   where the signal is positive              (Zeiler & Fergus 2013)
    gradient    where the unit was active                 (Simonyan et al. 2013)
    guided      where both conditions are true            (Springenberg et al. 2014)

A projection shows what in *this* image excited the unit, through this image's switches. It does not show what else the
unit responds to, and says little about the class (Nie et al. 2018): compare it with controls.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.config.errors import UserError
from zfnet.explain.receptive_field import receptive_field, window_at
from zfnet.explain.windows import (
    DEAD_WINDOWS,
    MOST_CELLS,
    Signal,
    adaptive_windows,
    as_maps,
    pool_with_switches,
    transposed,
    unpool,
    window_of,
)
from zfnet.model.chain import BATCH_NORMS, NEUTRAL, Chain, Network, Step
from zfnet.model.layers import LocalResponseNorm, full_precision

Units = Sequence[Sequence[int]] | Tensor  # (image, channel, y, x) or (image, feature) each
RULES = ("deconvnet", "guided", "gradient")
LRN_RULES = ("identity", "gradient")

# The number of images whose forward pass is in memory at once, and the size limit in bytes for the largest signal of a
# chunk of units. On a CPU this limit is about the cache size.
_IMAGES_AT_ONCE = 16
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


class Deconvnet:
    """Projects units of a network to pixel space, through the model's own modules and without changing them.

    model: a ZFNet, a `Chain`, or any model that forms a chain, on any device; the forward pass is that of evaluation
        mode even if the model is in training mode
    rule: `deconvnet`, `guided` or `gradient`
    dead_windows: `first`, `mask` or `all`, see `pool_with_switches`. The deconvnet sends signals through pooling
        windows without an active cell, and the choice changes conv5's projections by a quarter or more
    lrn: `identity` skips contrast normalisation in the backward pass, as the paper does; `gradient` goes
        through it. (Batch normalisation is linear, and its adjoint scales by γ/σ.)
    image_size: side of the images in pixels, for a model that is neither a ZFNet nor a `Chain`

    Raises UserError for an unknown choice, and for a network that is not a chain.
    """

    def __init__(
        self,
        model: nn.Module | Network,
        rule: str = "deconvnet",
        dead_windows: str = "first",
        lrn: str = "identity",
        image_size: int | None = None,
    ) -> None:
        for key, value, known in (
            ("rule", rule, RULES),
            ("dead_windows", dead_windows, DEAD_WINDOWS),
            ("lrn", lrn, LRN_RULES),
        ):
            if value not in known:
                raise UserError(f"{key}={value}: must be one of {', '.join(known)}")
        self.chain = Chain.of(model, image_size)
        self.model: Any = self.chain.model
        self.rule, self.dead_windows, self.lrn = rule, dead_windows, lrn

    @torch.no_grad()
    @full_precision()
    def project(
        self,
        images: Tensor,
        layer: str,
        units: Units,
        *,
        switches_from: Tensor | None = None,
        seeds: Tensor | None = None,
        fields: bool = False,
    ) -> Tensor:
        """Return the projection of each unit, [len(units), 3, H, W], on the model's device.

        images: [N, 3, H, W], normalised as the network sees them
        layer: a name in `Chain.layers`, such as `conv5` or, in torchvision's AlexNet, `features.10`
        units: (image, channel, y, x) in `layer`'s output before pooling, as `Chain.activations` returns it;
            for linear layers (image, feature) or (image, feature, 0, 0)
        switches_from: images [N, 3, H, W] that supply the pooling switches instead (a control)
        seeds: [len(units)], values to project instead of the units' activations
        fields: cut the projections of a convolution's units to their receptive fields, [len(units), 3, *kernel];
            `receptive_field(model, layer).corners(places)` gives positions; cells outside the image are 0

        Raises UserError for a layer or a unit that the network does not have, for shapes that do not match, and for
        a module up to `layer` that has no rule.
        """
        units = self._check(images, layer, units, switches_from, seeds)
        if fields and layer not in self.chain.conv_layers:
            raise UserError(f"{layer}: its units see the whole image, and have no receptive fields")
        field = receptive_field(self.chain, layer) if fields else None
        weight, steps = (next(self.model.parameters()), self.chain.up_to(layer))  # for its dtype and device
        extent = (images.shape[2], images.shape[3]) if field is None else field.kernel
        corners = torch.zeros_like(units[:, 2:]) if field is None else field.corners(units[:, 2:])
        out = weight.new_zeros(len(units), self.chain.channels, *extent)
        images = images.to(weight)
        at_once = _units_per_chunk(steps, weight)
        for group in units[:, 0].unique().split(_IMAGES_AT_ONCE):
            output, kept = self._forward(images[group.to(weight.device)], steps)
            if switches_from is not None:
                _, others = self._forward(switches_from.to(weight)[group.to(weight.device)], steps)
                pools = [isinstance(step.module, nn.MaxPool2d) for step in steps]
                kept = [other if pool else own for pool, own, other in zip(pools, kept, others, strict=True)]
            mine = torch.isin(units[:, 0], group).nonzero().flatten()
            for chosen in mine.split(at_once):
                unit = units[chosen].to(weight.device)
                unit[:, 0] = torch.searchsorted(group, units[chosen, 0]).to(weight.device)
                seed = None if seeds is None else seeds[chosen].to(weight)
                signal = self._backward(steps, output, kept, unit, seed)
                out[chosen.to(weight.device)] = signal.cut(corners[chosen].to(weight.device), extent)
        return out

    def check(self, layer: str) -> None:
        """Raise UserError, naming the module, unless there is a rule for every module up to `layer`."""
        for step in self.chain.up_to(layer):
            _check_support(step)

    def _check(
        self, images: Tensor, layer: str, units: Units, switches_from: Tensor | None, seeds: Tensor | None
    ) -> Tensor:
        """Check shapes and units; return the units as int64 [U, 4] on the CPU."""
        self.check(layer)
        self.chain.check_images(images)
        if switches_from is not None and switches_from.shape != images.shape:
            raise UserError(
                f"switches_from of shape {list(switches_from.shape)}: must be {list(images.shape)}, as images"
            )
        wanted = torch.as_tensor(units, dtype=torch.int64).cpu()
        if wanted.numel() == 0:
            wanted = wanted.reshape(0, 4)
        is_conv = layer in self.chain.conv_layers
        if wanted.ndim == 2 and wanted.shape[1] == 2 and not is_conv:
            wanted = F.pad(wanted, (0, 2))
        if wanted.ndim != 2 or wanted.shape[1] != 4:
            columns = "(image, channel, y, x)" if is_conv else "(image, feature)"
            raise UserError(f"units of {layer} must be given as {columns}")
        names = ("image", "channel" if is_conv else "feature", "y", "x")
        limits = (len(images), *self.chain.up_to(layer)[-1].output_shape, 1, 1)
        for name, limit, values in zip(names, limits, wanted.unbind(1), strict=False):
            if len(wrong := values[(values < 0) | (values >= limit)]):
                raise UserError(f"{layer}: {name} {int(wrong[0])} is out of range, 0 … {limit - 1}")
        if seeds is not None and seeds.shape != (len(wanted),):
            raise UserError(f"seeds of shape {list(seeds.shape)}: must be [{len(wanted)}], one for each unit")
        return wanted

    # -- forward

    def _forward(self, x: Tensor, steps: list[Step]) -> tuple[Tensor, list[Any]]:
        """Run images [n, 3, H, W] through the steps as in evaluation mode.

        Returns the output and what each step's rule keeps for the backward pass, such as switches.
        """
        # channels_last is fastest for cutting windows and for convolutions
        x, kept = x.contiguous(memory_format=torch.channels_last), []
        for step in steps:
            x, own = _rule_of(step).forward(self, step.module, x)
            kept.append(own)
        return x, kept

    # -- backward

    def _backward(
        self, steps: list[Step], output: Tensor, kept: list[Any], units: Tensor, seeds: Tensor | None
    ) -> Signal:
        """Return the signals of units, int64 [u, 4], at the pixels. Their image numbers count the images of `output`.

        At each step a signal covers a window of the feature map: the part that the unit sees.
        """
        item, channel, y, x = units.unbind(1)
        top = as_maps(output)
        values = top.new_zeros(len(units), top.shape[1], 1, 1)
        each = torch.arange(len(units), device=units.device)
        values[each, channel, 0, 0] = top[item, channel, y, x] if seeds is None else seeds
        signal = Signal(values, item, torch.stack((y, x), 1))
        for step, own in reversed(list(zip(steps, kept, strict=True))):
            _rule_of(step).backward(self, step.module, signal, own, step.input_shape)
        return signal


def _units_per_chunk(steps: list[Step], weight: Tensor) -> int:
    """Return how many units are projected together."""
    rows = columns = largest = 1
    for step in reversed(steps):
        if len(shape := step.input_shape) == 3:
            if isinstance(step.module, (nn.Flatten, nn.AdaptiveAvgPool2d)):
                rows, columns = shape[1:]
            elif isinstance(step.module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
                window = window_of(step.module)
                rows = min((rows - 1) * window.stride[0] + window.extent[0], shape[1])
                columns = min((columns - 1) * window.stride[1] + window.extent[1], shape[2])
        largest = max(largest, rows * columns * shape[0])
    return max(1, _CHUNK_BYTES.get(weight.device.type, 256 << 20) // (largest * weight.element_size()))


# -- the rules: forward and backward for each type of module


class _Rule(NamedTuple):
    """forward(deconvnet, module, x) returns the module's output and the data that `backward` needs, or None.
    backward(deconvnet, module, signal, kept, shape) moves a signal to the module's input of `shape` [C, H, W] or [C].
    """

    forward: Callable[[Deconvnet, Any, Tensor], tuple[Tensor, Any]]
    backward: Callable[[Deconvnet, Any, Signal, Any, torch.Size], None]


def _run(net: Deconvnet, module: nn.Module, x: Tensor) -> tuple[Tensor, None]:
    return module(x), None


def _convolution_back(net: Deconvnet, conv: nn.Conv2d, signal: Signal, kept: None, shape: torch.Size) -> None:
    window = window_of(conv)
    signal.move_down(transposed(signal.values, conv.weight, window, conv.groups), window, shape)


def _relu(net: Deconvnet, relu: nn.ReLU, x: Tensor) -> tuple[Tensor, Tensor | None]:
    x = F.relu(x)  # relu(x) could change x in place
    return x, None if net.rule == "deconvnet" else x > 0


def _relu_back(net: Deconvnet, relu: nn.ReLU, signal: Signal, active: Tensor | None, shape: torch.Size) -> None:
    if net.rule != "gradient":
        signal.values = signal.values.clamp(min=0)
    if active is not None:
        signal.values = signal.values * signal.gather(active)


def _max_pool_back(net: Deconvnet, pool: nn.MaxPool2d, signal: Signal, switches: Tensor, shape: torch.Size) -> None:
    window = window_of(pool)
    signal.move_down(unpool(signal.values, signal.gather(switches), window), window, shape)


def _average_pool(net: Deconvnet, pool: nn.AvgPool2d, x: Tensor) -> tuple[Tensor, Tensor]:
    # each window's factor from sum to mean, which at the borders depends on `ceil_mode` and `count_include_pad`
    ones, window = x.new_ones(1, 1, *x.shape[2:]), window_of(pool)
    sums = F.avg_pool2d(ones, window.kernel, window.stride, window.padding, pool.ceil_mode, divisor_override=1)
    return pool(x), (pool(ones) / sums).expand(len(x), 1, -1, -1)


def _average_pool_back(net: Deconvnet, pool: nn.AvgPool2d, signal: Signal, factor: Tensor, shape: torch.Size) -> None:
    window = window_of(pool)
    signal.move_down(unpool(signal.values * signal.gather(factor), None, window), window, shape)


def _adaptive_pool(net: Deconvnet, pool: nn.AdaptiveAvgPool2d, x: Tensor) -> tuple[Tensor, torch.Size]:
    x = pool(x)
    return x, x.shape[2:]


def _adaptive_pool_back(
    net: Deconvnet, pool: nn.AdaptiveAvgPool2d, signal: Signal, size: torch.Size, shape: torch.Size
) -> None:
    covered = [adaptive_windows(n, m).to(signal.values) for n, m in zip(size, shape[1:], strict=True)]
    rows, columns = (c / c.sum(1, keepdim=True) for c in covered)
    whole = signal.cut(torch.zeros_like(signal.corner), (size[0], size[1]))
    signal.values = torch.einsum("ucij,ih,jw->uchw", whole, rows, columns)
    signal.corner = torch.zeros_like(signal.corner)


def _batch_norm(net: Deconvnet, norm: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, None]:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps), None


def _batch_norm_back(net: Deconvnet, norm: nn.BatchNorm2d, signal: Signal, kept: None, shape: torch.Size) -> None:
    assert norm.running_var is not None
    scale = (norm.weight if norm.affine else 1) / (norm.running_var + norm.eps).sqrt()
    signal.values = signal.values * scale[:, None, None]


def _contrast(net: Deconvnet, norm: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    return norm(x), x if net.lrn == "gradient" else None


def _contrast_back(net: Deconvnet, norm: nn.Module, signal: Signal, x: Tensor | None, shape: torch.Size) -> None:
    if x is not None:
        with torch.enable_grad():
            here = signal.gather(x).detach().requires_grad_()
            signal.values = torch.autograd.grad(norm(here), here, signal.values)[0]


def _linear_back(net: Deconvnet, linear: nn.Linear, signal: Signal, kept: None, shape: torch.Size) -> None:
    signal.values = (signal.values.flatten(1) @ linear.weight)[:, :, None, None]


def _flatten_back(net: Deconvnet, flatten: nn.Flatten, signal: Signal, kept: None, shape: torch.Size) -> None:
    if len(shape) == 3:
        signal.values = signal.values.reshape(-1, *shape)
        signal.corner = torch.zeros_like(signal.corner)


_RULES: dict[tuple[Any, ...], _Rule] = {
    (nn.Conv2d,): _Rule(_run, _convolution_back),
    (nn.ReLU,): _Rule(_relu, _relu_back),
    (nn.MaxPool2d,): _Rule(lambda net, pool, x: pool_with_switches(x, pool, net.dead_windows), _max_pool_back),
    (nn.AvgPool2d,): _Rule(_average_pool, _average_pool_back),
    (nn.AdaptiveAvgPool2d,): _Rule(_adaptive_pool, _adaptive_pool_back),
    BATCH_NORMS: _Rule(_batch_norm, _batch_norm_back),
    (LocalResponseNorm, nn.LocalResponseNorm): _Rule(_contrast, _contrast_back),
    (nn.Linear,): _Rule(_run, _linear_back),
    (nn.Flatten,): _Rule(_run, _flatten_back),
    NEUTRAL: _Rule(lambda net, module, x: (x, None), lambda *_: None),
}


def _rule_of(step: Step) -> _Rule:
    """Return the rule for a step's module; raise UserError if there is none."""
    for types, rule in _RULES.items():
        # a rule does not apply to a subclass that overrides `forward`
        if any(isinstance(step.module, t) and type(step.module).forward is t.forward for t in types):
            return rule
    known = dict.fromkeys(t.__name__ for types in _RULES for t in types)
    raise UserError(f"{step}: the deconvnet has no rule for it; known: {', '.join(known)}")


def _check_support(step: Step) -> None:
    """Raise UserError, naming the module, if there is no rule for it or for its settings."""
    _rule_of(step)
    module, problem = step.module, ""
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)):
        cells = math.prod(window_at(step).kernel)
        if isinstance(module, nn.MaxPool2d) and cells > MOST_CELLS:
            problem = f"its windows have {cells} cells; at most {MOST_CELLS} are supported"
    elif isinstance(module, BATCH_NORMS) and module.running_var is None:
        problem = "track_running_stats=False: its output depends on the batch"
    elif isinstance(module, nn.Linear) and len(step.input_shape) != 1:
        problem = f"its input has the shape {list(step.input_shape)}; flatten it first"
    elif isinstance(module, nn.Flatten) and len(step.output_shape) != 1:
        problem = "must flatten all dimensions but the first"
    if problem:
        raise UserError(f"{step}: {problem}")
