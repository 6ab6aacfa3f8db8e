"""Read the layers of a network: of a `Chain`, step by step, and of any other `Network`, the outputs of its modules.

A chain is the list of a network's leaf modules in the order in which the forward pass calls them.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from zfnet.config.errors import UserError, did_you_mean, one_line
from zfnet.model.layers import DROPOUTS, evaluation_mode, full_precision

WEIGHTED = (nn.Conv2d, nn.Linear)  # these count as layers; every other module belongs to the layer before it
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# a layer's output is the output of the next of these modules, if only BATCH_NORMS and NEUTRAL are in between
ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Softplus, nn.Tanh, nn.Sigmoid, nn.Hardsigmoid),
)
NEUTRAL = (nn.Identity, *DROPOUTS)  # identities in evaluation mode
# a module that returns feature maps is or contains one of these
_SPATIAL = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool2d)
_TRACED = 3  # images in a trace
OUTPUT = "the output"  # a layer name for what the network returns, if that is not its last layer's output


@dataclass(frozen=True)
class Step:
    """One module of a chain, with the shapes of its input and output for one image (without the batch dimension)."""

    name: str
    module: nn.Module
    input_shape: torch.Size
    output_shape: torch.Size

    def __call__(self, x: Tensor) -> Tensor:
        # an in-place module would overwrite the caller's tensor
        return self.module(x.clone() if getattr(self.module, "inplace", False) else x)

    def __str__(self) -> str:
        return f"{self.name} ({type(self.module).__name__})"


def run_steps(steps: Sequence[Step], x: Tensor) -> Tensor:
    """Pass a tensor through steps."""
    for step in steps:
        x = step(x)
    return x


class Network:
    """Any network of images to logits. Its layers are modules, and their activations what these modules return.

    model: any module of images [N, C, S, S] that returns logits [N, classes]
    image_size: side of the square images in pixels

    layers: names of the modules that run once and return a tensor [N, …], in the order in which they return: a module
        comes after its own submodules
    conv_layers: those that return feature maps [N, C, h, w] of more than one position
    last_hidden: the last layer without one feature or map for each class, in a list, which can be empty
    outputs: what each module does, for messages: that it runs several times, or the shape that it returns; empty for a
        chain, whose modules that are no layers belong to a layer
    steps: the modules from the image on, as far as they form a chain; problem: why they end there, None for a chain
    channels: channels of the images; num_classes: outputs of the network

    Raises UserError if the network cannot process the images or does not return a tensor.
    """

    def __init__(self, model: nn.Module, image_size: int, trace: "_Trace | None" = None) -> None:
        trace = trace or _trace_any_channels(model, image_size)
        self.model, self.image_size = model, image_size
        self.steps, self.problem = trace.steps, trace.problem
        self.channels, self.num_classes = trace.channels, trace.num_classes
        self.outputs, self.layers = trace.outputs, list(trace.layers)
        self.conv_layers = [name for name in self.layers if name in trace.maps]
        self.last_hidden = [n for n, shape in trace.layers.items() if shape[0] != self.num_classes][-1:]
        self._ends = {s.name: _end(self.steps, n) for n, s in enumerate(self.steps) if isinstance(s.module, WEIGHTED)}

    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits, as the model does."""
        return self.model(images)

    @staticmethod
    def of(model: nn.Module, image_size: int) -> "Network":
        """Return the `Chain` of a model or, if it is not a chain, its `Network`. Raises UserError like both."""
        if isinstance(chain := getattr(model, "chain", None), Chain):
            return chain
        trace = _trace_any_channels(model, image_size)
        return (Chain if trace.problem is None else Network)(model, image_size, trace)

    def up_to(self, layer: str) -> list[Step]:
        """Return the steps from the image to the output of a convolution or linear layer (in a chain, also `OUTPUT`).

        The output is taken after the layer's batch norm and activation function, and before its pooling.
        Raises UserError for an unknown layer, and for one after the end of `steps`.
        """
        if layer not in self._ends:
            if layer in self.layers:
                raise UserError(f"{layer} is not in a chain of modules from the image: {self.problem}")
            raise self.no_layer(layer)
        return self.steps[: self._ends[layer] + 1]

    def no_layer(self, name: str) -> UserError:
        """Return the error for a name that is not in `layers`."""
        if name in self.outputs:
            return UserError(f"{name} is not a layer: it {self.outputs[name]}")
        return UserError(f"the network has no layer {name}{did_you_mean(name, self.layers)}")

    def check(self, images: Tensor, layers: Sequence[str]) -> None:
        """Raise UserError unless these are images of the network's shape and a list of names."""
        if isinstance(layers, str):
            raise UserError(f"layers={layers!r}: must be a list, as in [{layers!r}]")
        self.check_images(images)

    def check_images(self, images: Tensor) -> None:
        """Raise UserError unless these are a tensor of floats with the network's shape."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise UserError(f"images are {kind}: the network expects a tensor of floats, normalised as in training")
        wanted = (self.channels, self.image_size, self.image_size)
        if images.shape[1:] != wanted:
            raise UserError(
                f"images of shape {list(images.shape)}: the network expects [N, {', '.join(map(str, wanted))}]"
            )

    @full_precision()
    def activations(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return what each named module returns, [N, …]; for `OUTPUT`, the logits.

        The model's mode applies. The network computes in full precision, independent of the training precision. Raises
        UserError for an unknown layer or one that does not run, and for images of another size.
        """
        self.check(images, layers)
        kept: dict[str, Tensor] = {}

        def keep(layer: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
                if _is_view(output, inputs):  # a copy would change the network if a later operation is in place
                    kept[layer] = output.clone()
                    return None
                kept[layer] = output
                return output.clone()  # an operation in place must not change what is kept

            return hook

        with contextlib.ExitStack() as stack:
            for layer in layers:
                if layer not in (*self.layers, OUTPUT):
                    raise self.no_layer(layer)
                if layer != OUTPUT:
                    module = self.model.get_submodule(layer)
                    stack.callback(module.register_forward_hook(keep(layer)).remove)
            kept[OUTPUT] = self.model(images.clone())
        for layer in layers:
            if layer not in kept or len(kept[layer]) != len(images):
                raise UserError(f"layer {layer} does not return one output for each image")
        return {layer: kept[layer] for layer in layers}


class Chain(Network):
    """The steps of a feed-forward network, found in one forward pass in evaluation mode.

    model: any module that passes its images from one leaf module to the next, with only `torch.flatten` (or an
        equivalent `view`) between them, such as ZFNet, torchvision's AlexNet and VGG, or your own
    image_size: side of the square images in pixels

    steps: in forward order; a flatten between two modules is a separate step
    layers: the names of the convolutions and linear layers, such as `conv1` or `features.0`
    conv_layers: the names of the convolutions; last_hidden: the last layer but one
    channels: channels of the images; num_classes: outputs of the network

    Raises UserError, naming the module, if the network is not a chain or cannot take the images.
    """

    def __init__(self, model: nn.Module, image_size: int, trace: "_Trace | None" = None) -> None:
        super().__init__(model, image_size, trace)
        if self.problem is not None:
            raise UserError(self.problem)
        self.layers, self.outputs = list(self._ends), {}
        self._ends[OUTPUT] = len(self.steps) - 1
        self.conv_layers = [s.name for s in self.steps if isinstance(s.module, nn.Conv2d)]
        self.last_hidden = self.layers[-2:-1]

    @staticmethod
    def of(model: nn.Module | Network, image_size: int | None = None) -> "Chain":
        """Return `model` if it is a Chain, its `chain` if it has one (ZFNet), or a new Chain for `image_size`.

        Raises UserError for a `Network` that is not a chain.
        """
        if isinstance(model, Chain):
            return model
        if isinstance(model, Network):
            if model.problem is not None:
                raise UserError(f"{type(model.model).__name__} is not a chain of layers: {model.problem}")
            return Chain(model.model, model.image_size)
        if isinstance(chain := getattr(model, "chain", None), Chain):
            return chain
        if image_size is None:
            raise UserError(f"{type(model).__name__}: its image size is not known; pass Chain(model, image_size)")
        return Chain(model, image_size)

    @full_precision()
    def activations(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the output of each named layer, after its ReLU and before its pooling; for `OUTPUT`, the logits.

        Shapes: convolutions [N, channels, y, x], linear layers [N, features]. The model's mode applies: in training
        mode dropout is active. Computes in full precision, independent of the training precision. Raises UserError for
        an unknown layer and for images of another size.
        """
        self.check(images, layers)
        ends = {layer: len(self.up_to(layer)) for layer in layers}
        outputs, x = dict.fromkeys(layers, images), images
        for number, step in enumerate(self.steps[: max(ends.values(), default=0)], 1):
            x = step(x)
            outputs |= {layer: x for layer, end in ends.items() if end == number}
        return outputs


def _end(steps: list[Step], start: int) -> int:
    """Return the index of the step that gives the output of the layer at index `start`."""
    end = start
    for number in range(start + 1, len(steps)):
        module = steps[number].module
        if isinstance(module, ACTIVATIONS):
            return number
        if isinstance(module, BATCH_NORMS):
            end = number
        elif not isinstance(module, NEUTRAL):
            break
    return end


class _Trace(NamedTuple):
    """What one forward pass shows of a network; see `Network`."""

    steps: list[Step]
    problem: str | None
    outputs: dict[str, str]  # what each module returns, for messages
    layers: dict[str, torch.Size]  # shapes for one image
    maps: set[str]  # layers that return feature maps
    channels: int
    num_classes: int


def _trace_any_channels(model: nn.Module, image_size: int) -> _Trace:
    try:
        return _trace(model, image_size, 3)
    except UserError as error:
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
        if channels == 3:
            raise
        try:  # such as an imported network for grey images
            return _trace(model, image_size, channels)
        except UserError:
            raise error from None


@torch.no_grad()
@full_precision()
def _trace(model: nn.Module, image_size: int, channels: int) -> _Trace:
    """Run random images through the model, and check that each leaf module's input is the previous output."""
    names: dict[nn.Module, str] = {}
    problem: str | None = None
    for leaf, module in _leaves(model, ""):
        if "/" in leaf or "\\" in leaf:
            problem = f"{leaf}: rename this module: its name becomes part of file names"
        names.setdefault(module, leaf)
    if not any(isinstance(module, WEIGHTED) for module in names):
        problem = "the network has no convolution or linear layer"
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.randn((_TRACED, channels, image_size, image_size), generator=generator, device="cpu")
    images = images.to(next((p for p in model.parameters() if p.is_floating_point()), images))
    steps: list[Step] = []
    last = images  # the output of the last step
    place = "at the first module"
    shapes: dict[str, torch.Size] = {}
    maps: set[str] = set()
    outputs: dict[str, str] = {}
    calls: Counter[str] = Counter()

    def connect(x: Tensor, name: str) -> str | None:
        """If `x` is the last step's output flattened, add a flatten step; return what is wrong if it is another."""
        former = steps[-1].name if steps else "the image"
        if _is_equal(x, last):
            return None
        if x.ndim != 2 or last.ndim < 2 or not _is_equal(x, last.flatten(1)):
            return (
                f"{name} is not {'the output of ' * bool(steps)}{former}; a chain has no branches, and no function but "
                "torch.flatten between two modules"
            )
        steps.append(Step(f"the flatten after {former}", nn.Flatten(), last.shape[1:], x.shape[1:]))
        return None

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal problem
        if problem is None:
            name = f"{names[module]} ({type(module).__name__})"
            if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
                problem = f"{name}: has {len(inputs)} inputs; a chain passes on one tensor"
            else:
                problem = connect(inputs[0], f"the input of {name}")

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        nonlocal problem, last, place
        place = f"after {names[module]} ({type(module).__name__})"
        if problem is None:
            step = Step(names[module], module, inputs[0].shape[1:], getattr(output, "shape", torch.Size())[1:])
            if not isinstance(output, Tensor):
                problem = f"{step}: returns a {type(output).__name__}; a chain passes on one tensor"
            elif isinstance(module, WEIGHTED) and any(s.module is module for s in steps):
                problem = f"{step}: is used twice; a chain uses each layer once"
            else:
                steps.append(step)
                last = output.clone()  # a later in-place operation such as `out += identity` would change `output`

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] += 1
            if calls[name] > 1:
                outputs[name] = f"runs {calls[name]} times"
            elif isinstance(output, Tensor):
                own = "its input, " * _is_view(output, inputs)
                outputs[name] = f"returns {own}[N, {', '.join(map(str, output.shape[1:]))}]"
            else:
                outputs[name] = f"returns a {type(output).__name__}"
            if isinstance(output, Tensor) and output.ndim > 1 and len(output) == len(images):
                shapes[name] = output.shape[1:]
                if _returns_maps(module, output) and not _is_view(output, inputs):  # a view has no gradient of its own
                    maps.add(name)

        return hook

    with contextlib.ExitStack() as stack:
        try:
            for module in names:
                stack.callback(module.register_forward_pre_hook(before).remove)
                stack.callback(module.register_forward_hook(after).remove)
            for name, module in model.named_modules():
                if name and "parametrizations" not in name.split("."):
                    stack.callback(module.register_forward_hook(note(name)).remove)
            with evaluation_mode(model):
                output = model(images)
        except UserError:
            raise
        except Exception as error:  # user code can raise any exception
            raise UserError(
                f"the network cannot process {channels}×{image_size}×{image_size} images: {place}: {one_line(error)}"
            ) from error
    if not isinstance(output, Tensor):
        raise UserError(f"{type(model).__name__}: returns a {type(output).__name__}; it must return one tensor")
    if problem is None:
        problem = connect(output, "the network's output")
    layers = {name: shape for name, shape in shapes.items() if calls[name] == 1}
    return _Trace(steps, problem, outputs, layers, maps, channels, output.shape[1] if output.ndim > 1 else 1)


def _returns_maps(module: nn.Module, output: Tensor) -> bool:
    """Whether a module returns feature maps [N, C, h, w], and not attention weights or features [N, h, w, C]."""
    if output.ndim != 4 or max(output.shape[2:]) == 1:
        return False
    known = isinstance(module, ACTIVATIONS) or any(isinstance(part, _SPATIAL) for part in module.modules())
    return isinstance(module, nn.Conv2d) or (known and output.shape[2] == output.shape[3])


def _is_view(output: Tensor, inputs: tuple[Any, ...]) -> bool:
    """Whether a module returns (a view of) its input, as `nn.Identity`, `nn.Flatten` and in-place modules do."""

    def base(x: Tensor) -> Tensor:
        return x if x._base is None else x._base

    return any(isinstance(x, Tensor) and base(x) is base(output) for x in inputs)


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    # a parametrized convolution (for example with weight norm) is a leaf with children; an empty Sequential is no leaf
    if isinstance(module, WEIGHTED) or not (isinstance(module, nn.Sequential) or any(module.children())):
        yield name, module
        return
    for child, inner in module.named_children():
        yield from _leaves(inner, f"{name}.{child}".lstrip("."))


def _is_equal(a: Tensor, b: Tensor) -> bool:
    # tensors on the meta device have no values to compare
    return a.shape == b.shape and (a is b or a.is_meta or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))
