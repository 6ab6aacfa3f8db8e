"""The deconvnet: one unit's activation, projected back down to the pixels (paper, section 2.1).

From the unit down, each layer is undone by its adjoint: a pooling sends the signal back to the places of its
maxima (`switches.py`), a ReLU rectifies it, a convolution filters it with the transposed filters. Biases have no
part in it. Except for the ReLU this is the gradient (Simonyan et al. 2013, section 4), so that one
implementation has three rules, which differ in what the ReLU lets through:

    deconvnet   where the signal is positive              (Zeiler & Fergus 2013)
    gradient    where the unit was active                 (Simonyan et al. 2013)
    guided      where both hold                           (Springenberg et al. 2014)

A projection shows what in *this* image excited the unit, through this image's switches. It is no sample of
what the unit would respond to, and says little about the class (Nie et al. 2018): see `controls.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.config.errors import UserError, did_you_mean
from zfnet.explain.receptive_field import receptive_field
from zfnet.explain.switches import DEAD_WINDOWS, pool_with_switches, side, unpool
from zfnet.explain.transposed import transposed
from zfnet.explain.windows import Signal
from zfnet.model.layers import LocalResponseNorm
from zfnet.model.sizes import CONV_LAYERS
from zfnet.model.zfnet import Dropout, ZFNet

RULES = ("deconvnet", "guided", "gradient")
LRN_RULES = ("identity", "gradient")

# Images whose forward pass is kept at once; and bytes that the largest signal of a chunk of units may take:
# on a CPU about what its cache holds.
_IMAGES = 16
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}


@dataclass
class _Trace:
    """What a forward pass leaves for the way back. Each dict goes by the names of the model's steps."""

    output: Tensor
    input_shapes: dict[str, torch.Size] = field(default_factory=dict)  # without the batch
    switches: dict[str, Tensor] = field(default_factory=dict)
    active: dict[str, Tensor] = field(default_factory=dict)  # of a ReLU: where its output is positive
    inputs: dict[str, Tensor] = field(default_factory=dict)  # of an LRN, for its gradient


@contextlib.contextmanager
def _exactly() -> Iterator[None]:
    """Without gradients; on CUDA with deterministic kernels in full precision, whatever training has chosen."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    conv = cudnn.conv  # type: ignore[attr-defined]
    before = cudnn.deterministic, cudnn.benchmark, conv.fp32_precision, matmul.fp32_precision
    try:
        cudnn.deterministic, cudnn.benchmark = True, False
        conv.fp32_precision = matmul.fp32_precision = "ieee"
        with torch.no_grad():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark, conv.fp32_precision, matmul.fp32_precision = before


class Deconvnet:
    """Projects units of a network to the pixels. Reads the model's own modules; changes nothing about it.

    model: a ZFNet of any variant, on any device; its forward pass is that of evaluation mode, whatever its mode
    rule: `deconvnet`, `guided` or `gradient`
    dead_windows: `first`, `mask` or `all`, see `pool_with_switches`. The deconvnet sends signals through pooling
        windows without an active cell, and the choice changes conv5's projections by a quarter or more
    lrn: `identity` leaves contrast normalisation out of the way back, as the paper does; `gradient` goes
        through it. (Batch normalisation is linear: its adjoint scales by γ/σ.)

    Raises UserError for an unknown choice.
    """

    def __init__(
        self, model: ZFNet, rule: str = "deconvnet", dead_windows: str = "first", lrn: str = "identity"
    ) -> None:
        for key, value, known in (
            ("rule", rule, RULES),
            ("dead_windows", dead_windows, DEAD_WINDOWS),
            ("lrn", lrn, LRN_RULES),
        ):
            if value not in known:
                raise UserError(f"{key}={value}: must be one of {', '.join(known)}")
        self.model, self.rule, self.dead_windows, self.lrn = model, rule, dead_windows, lrn
        self.whole_maps = False  # work on whole maps, not on what the units see: slow, for tests

    def project(
        self,
        images: Tensor,
        layer: str,
        units: Sequence[Sequence[int]] | Tensor,
        *,
        switches_from: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Return the projection of each unit, [len(units), 3, H, W], on the model's device.

        images: [N, 3, H, W], normalised as the network sees them
        units: (image, channel, y, x) in `layer`'s output before pooling, as `model.activations` gives it;
            for fc layers (image, feature) or (image, feature, 0, 0)
        switches_from: images [N, 3, H, W] whose pooling switches are used instead (a control)
        seeds: [len(units)], what to project instead of each unit's own activation

        Raises UserError for a layer or a unit that the network has not, and for shapes that do not fit.
        """
        wanted = self._check(images, layer, units, switches_from, seeds)
        extent = (images.shape[2], images.shape[3])
        out = self.model.fc8.weight.new_zeros(len(wanted), 3, *extent)
        for chosen, signal in self._project(images, layer, wanted, switches_from, seeds):
            out[chosen] = signal.cut(torch.zeros_like(signal.corner), extent)
        return out

    def project_fields(
        self,
        images: Tensor,
        layer: str,
        units: Sequence[Sequence[int]] | Tensor,
        *,
        switches_from: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Return projections cut to the units' receptive fields: [len(units), 3, size, size], for conv layers.

        `receptive_field(model, layer).corner(y, x)` tells where one lies; its cells outside the image are 0.
        """
        wanted = self._check(images, layer, units, switches_from, seeds)
        if layer not in CONV_LAYERS:
            raise UserError(f"{layer}: its units see the whole image; use project")
        field = receptive_field(self.model, layer)
        corners = wanted[:, 2:] * field.stride + field.offset
        out = self.model.fc8.weight.new_zeros(len(wanted), 3, field.size, field.size)
        for chosen, signal in self._project(images, layer, wanted, switches_from, seeds):
            out[chosen] = signal.cut(corners.to(out.device)[chosen], (field.size, field.size))
        return out

    # -- what is asked for

    def _check(
        self,
        images: Tensor,
        layer: str,
        units: Sequence[Sequence[int]] | Tensor,
        switches_from: Tensor | None,
        seeds: Tensor | None,
    ) -> Tensor:
        """Return the units as int64 [U, 4] on the CPU."""
        if layer not in self.model.layers:
            raise UserError(f"{layer}: no such layer{did_you_mean(layer, self.model.layers)}")
        if images.ndim != 4 or images.shape[1] != 3:
            raise UserError(f"images of shape {list(images.shape)}: must be [N, 3, H, W]")
        if switches_from is not None and switches_from.shape != images.shape:
            raise UserError(
                f"switches_from of shape {list(switches_from.shape)}: must be {list(images.shape)}, as images"
            )
        wanted = torch.as_tensor(units, dtype=torch.int64).cpu()
        if wanted.numel() == 0:
            wanted = wanted.reshape(0, 4)
        if wanted.ndim == 2 and wanted.shape[1] == 2 and layer not in CONV_LAYERS:
            wanted = F.pad(wanted, (0, 2))
        if wanted.ndim != 2 or wanted.shape[1] != 4:
            kind = "(image, channel, y, x)" if layer in CONV_LAYERS else "(image, feature)"
            raise UserError(f"units of {layer} must be given as {kind}")
        if seeds is not None and seeds.shape != (len(wanted),):
            raise UserError(f"seeds of shape {list(seeds.shape)}: must be [{len(wanted)}], one for each unit")
        return wanted

    def _project(
        self,
        images: Tensor,
        layer: str,
        units: Tensor,
        switches_from: Tensor | None,
        seeds: Tensor | None,
    ) -> Iterator[tuple[Tensor, Signal]]:
        """Yield (numbers of units, their signals at the pixels), some units at a time."""
        weight = self.model.fc8.weight
        images = images.to(weight)
        _check_range(units[:, 0], len(images), "image", layer)
        needed = units[:, 0].unique()
        for group in needed.split(_IMAGES):
            trace = self._forward(images[group.to(weight.device)], layer)
            if switches_from is not None:
                other = self._forward(switches_from.to(weight)[group.to(weight.device)], layer)
                trace.switches = other.switches
            shape = trace.output.shape[1:]
            mine = torch.isin(units[:, 0], group).nonzero().flatten()
            for column, name in enumerate(("channel" if len(shape) > 1 else "feature", "y", "x"), 1):
                limit = shape[column - 1] if column <= len(shape) else 1
                _check_range(units[mine, column], limit, name, layer)
            for chosen in mine.split(self._chunk(layer, trace)):
                unit = units[chosen].to(weight.device)
                unit[:, 0] = torch.searchsorted(group, units[chosen, 0]).to(weight.device)
                seed = None if seeds is None else seeds[chosen].to(weight)
                yield chosen.to(weight.device), self._backward(trace, layer, unit, seed)

    def _chunk(self, layer: str, trace: _Trace) -> int:
        """How many units go down together."""
        size = 1 if layer in CONV_LAYERS and not self.whole_maps else trace.output.numel()
        largest = 1
        for name in reversed(self._steps(layer)):
            module, shape = getattr(self.model, name), trace.input_shapes[name]
            if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
                size = min((size - 1) * side(module.stride) + side(module.kernel_size), max(shape[1:]))
                largest = max(largest, size * size * shape[0])
        budget = _CHUNK_BYTES.get(trace.output.device.type, 256 << 20)
        return max(1, budget // (largest * trace.output.element_size()))

    def _steps(self, layer: str) -> list[str]:
        """The model's steps up to the one that ends `layer`."""
        end = next(step for step, name in self.model.output_of.items() if name == layer)
        return self.model.steps[: self.model.steps.index(end) + 1]

    # -- up

    @_exactly()
    def _forward(self, x: Tensor, layer: str) -> _Trace:
        """Run images [n, 3, H, W] up to `layer` as in evaluation mode, and keep what the way back needs."""
        # channels last: as windows are cut out, and as convolutions like it best
        x = x.contiguous(memory_format=torch.channels_last)
        trace = _Trace(x)
        for name in self._steps(layer):
            module = getattr(self.model, name)
            trace.input_shapes[name] = x.shape[1:]
            if isinstance(module, nn.MaxPool2d):
                x, trace.switches[name] = pool_with_switches(x, module, self.dead_windows)
            elif isinstance(module, nn.BatchNorm2d):
                x = F.batch_norm(
                    x, module.running_mean, module.running_var, module.weight, module.bias, eps=module.eps
                )
            elif isinstance(module, nn.Linear):
                x = module(x.flatten(1))
            elif not isinstance(module, Dropout):
                if isinstance(module, LocalResponseNorm) and self.lrn == "gradient":
                    trace.inputs[name] = x
                x = module(x)
                if isinstance(module, nn.ReLU) and self.rule != "deconvnet":
                    trace.active[name] = x > 0
        trace.output = x
        return trace

    # -- and down

    @_exactly()
    def _backward(self, trace: _Trace, layer: str, units: Tensor, seeds: Tensor | None) -> Signal:
        """Return the signals of the units at the pixels; units: int64 [u, 4], counting the trace's images.

        On its way down a signal is a window of the feature map, just what the unit sees.
        """
        item, channel, y, x = units.unbind(1)
        top = trace.output[:, :, None, None] if trace.output.ndim == 2 else trace.output
        values = top.new_zeros(len(units), top.shape[1], 1, 1)
        values[torch.arange(len(units), device=units.device), channel, 0, 0] = (
            top[item, channel, y, x] if seeds is None else seeds
        )
        signal = Signal(values, item, torch.stack((y, x), 1))
        if self.whole_maps:
            signal = Signal(
                signal.cut(0 * signal.corner, (top.shape[2], top.shape[3])), item, 0 * signal.corner
            )
        for name in reversed(self._steps(layer)):
            self._undo(name, signal, trace)
        return signal

    def _undo(self, name: str, signal: Signal, trace: _Trace) -> None:
        """Take the signal from the output of a step to its input."""
        module, shape = getattr(self.model, name), trace.input_shapes[name]
        if isinstance(module, nn.ReLU):
            if self.rule != "gradient":
                signal.values = signal.values.clamp(min=0)
            if self.rule != "deconvnet":
                signal.values = signal.values * signal.see(trace.active[name])
        elif isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            if isinstance(module, nn.Conv2d):
                signal.values = transposed(signal.values, module.weight, side(module.stride))
            else:
                signal.values = unpool(signal.values, signal.see(trace.switches[name]), module)
            signal.corner = signal.corner * side(module.stride) - side(module.padding)
            signal.keep_inside((shape[1], shape[2]))
        elif isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            scale = module.weight / (module.running_var + module.eps).sqrt()
            signal.values = signal.values * scale[:, None, None]
        elif isinstance(module, LocalResponseNorm) and self.lrn == "gradient":
            signal.values = _gradient(module, signal.see(trace.inputs[name]), signal.values)
        elif isinstance(module, nn.Linear):
            below = signal.values.flatten(1) @ module.weight
            signal.values = below.reshape(-1, *shape) if len(shape) == 3 else below[:, :, None, None]
            signal.corner = torch.zeros_like(signal.corner)


def _gradient(module: nn.Module, x: Tensor, signal: Tensor) -> Tensor:
    """Return the vector-Jacobian product of a module at x."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(module(x), x, signal)[0]


def _check_range(values: Tensor, limit: int, name: str, layer: str) -> None:
    wrong = values[(values < 0) | (values >= limit)]
    if len(wrong):
        raise UserError(f"{layer}: {name} {int(wrong[0])} is out of range, 0 … {limit - 1}")
