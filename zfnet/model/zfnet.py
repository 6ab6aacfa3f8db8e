"""ZFNet (Zeiler & Fergus 2013, Fig. 3): five convolutions, three fully connected layers.

Layers are named by the paper's numbers, `conv1 … conv5` and `fc6, fc7, fc8`, in this file, in weight names, in
configs and in figures.
"""

import bisect
import numbers
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from zfnet.config.errors import UserError
from zfnet.config.schema import LARGEST_SIDE, ModelConfig
from zfnet.model.chain import Chain
from zfnet.model.layers import Dropout, LocalResponseNorm

CONV_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
FC_LAYERS = ("fc6", "fc7")
_LARGEST_OUTPUT_SIDE = 2 * LARGEST_SIDE  # of a convolution's output, in pixels

# the name of each layer in the blog's nn.Sequential
_BLOG_NAMES = {
    "features.0": "conv1",
    "features.3": "conv2",
    "features.6": "conv3",
    "features.8": "conv4",
    "features.10": "conv5",
    "classifier.0": "fc6",
    "classifier.3": "fc7",
    "classifier.6": "fc8",
}


class ZFNet(nn.Module):
    """ZFNet for square RGB images.

    num_classes: outputs of fc8
    image_size: side of the images in pixels; it determines fc6's inputs. The default network needs at least 53.
    config: kernels, channels, normalisation …; the default is the blog's network, with 58,301,578
        parameters at 10 classes and 224 px.

    Raises UserError if num_classes or image_size is not a whole number of at least 1, or a layer gets too few pixels.
    """

    def __init__(self, num_classes: int = 10, image_size: int = 224, config: ModelConfig | None = None) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("image_size", image_size)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise UserError(f"{name}={value!r}: must be a whole number of at least 1")
        self.config = config = config or ModelConfig()
        self.num_classes, self.image_size = num_classes, image_size
        self._traced: tuple[list[nn.Module], Chain] | None = None
        sizes = feature_sizes(config, image_size)
        channels = 3
        for layer in sizes:
            channels = self._add_convolution(layer, channels)
        features = channels * sizes["conv5"][1] ** 2
        for layer in FC_LAYERS:
            if (settings := getattr(config, layer)) is not None:
                number = layer[-1]
                width = self._scaled_width(settings.features)
                self.add_module(layer, nn.Linear(features, width))
                self.add_module(f"relu{number}", nn.ReLU())
                self.add_module(f"dropout{number}", Dropout(config.dropout))
                features = width
        self.fc8 = nn.Linear(features, num_classes)
        # modules are registered in the order of the forward pass
        self.steps = [name for name, _ in self.named_children()]
        self._initialise()

    def _add_convolution(self, layer: str, channels: int) -> int:
        """Register a layer's modules in forward order: convolution, [batch norm], ReLU, [pooling], [LRN]."""
        settings, number = getattr(self.config, layer), layer[-1]
        width = self._scaled_width(settings.channels)
        self.add_module(layer, nn.Conv2d(channels, width, settings.kernel_size, settings.stride, settings.padding))
        if self.config.norm == "batch":
            self.add_module(f"norm{number}", nn.BatchNorm2d(width))
        self.add_module(f"relu{number}", nn.ReLU())
        if (pool := pool_of(self.config, layer)) is not None:
            self.add_module(f"pool{number}", pool)
        # the paper's Fig. 3 normalises after pooling
        if self.config.norm == "lrn" and layer in ("conv1", "conv2"):
            self.add_module(f"norm{number}", LocalResponseNorm())
        return width

    def _scaled_width(self, size: int) -> int:
        return max(1, round(size * self.config.width))

    def _initialise(self) -> None:
        if self.config.init == "default" or next(self.parameters()).is_meta:
            return  # tensors on "meta" have no values, and filling them imports PyTorch's compiler, which takes 1 s
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if self.config.init == "normal":
                    # paper, section 3: "1e-2", read as a standard deviation
                    nn.init.normal_(module.weight, std=0.01)
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, image_size, image_size].

        Raises UserError for images of another size.
        """
        size = self.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise UserError(f"images of shape {list(images.shape)}: the network expects [N, 3, {size}, {size}]")
        x = images
        for name in self.steps:
            module = self._modules[name]
            assert module is not None
            x = module(x.flatten(1) if isinstance(module, nn.Linear) else x)
        return x

    @property
    def chain(self) -> Chain:
        """The network as a list of steps, as explanations use it."""
        modules = list(self.modules())
        if self._traced is None or self._traced[0] != modules:  # a module can have been replaced
            self._traced = modules, Chain(self, self.image_size)
        return self._traced[1]

    @property
    def layers(self) -> list[str]:
        """The names of the layers with weights, in order: conv1 … fc8, except those that the config leaves out."""
        return self.chain.layers

    def activations(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the output of each named layer, after its ReLU and before its pooling; for fc8, the logits.

        Shapes: conv layers [N, channels, y, x], fc layers [N, features]. Raises UserError for an unknown layer.
        """
        return self.chain.activations(images, layers)

    @staticmethod
    def translate_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict with this class's names: translate the blog's names, and drop prefixes of wrappers."""
        renamed = {}
        for name, value in state.items():
            name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
            prefix, _, rest = name.rpartition(".")
            renamed[f"{_BLOG_NAMES.get(prefix, prefix)}.{rest}"] = value
        return renamed

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict of this class or of the blog's, with or without DataParallel's `module.` prefix.

        This method takes tensors and reads no file. Convert a trusted `.pth` file once:
        `save_file(torch.load("zfnet.pth", weights_only=True), "zfnet.safetensors")`, with
        `save_file` from `safetensors.torch`; then `model.load_weights(load_file("zfnet.safetensors"))`.

        Raises UserError if names or shapes do not match.
        """
        renamed = self.translate_names(state)
        own = self.state_dict()
        for name in own.keys() - renamed.keys():
            raise UserError(f"{name} is missing from the weights")
        for name, value in renamed.items():
            if name not in own:
                raise UserError(f"the weights contain {name}, which this network does not have")
            if own[name].shape != value.shape:
                raise UserError(
                    f"the weights' {name} is {list(value.shape)}, this network's is {list(own[name].shape)}"
                )
        self.load_state_dict(renamed)


def pool_of(model: ModelConfig, layer: str) -> nn.MaxPool2d | None:
    """Return the pooling after `layer`, or None.

    `pad` is the blog's pooling: one pixel of padding, except after conv5. `ceil` is cuda-convnet's pooling, and most
    probably the paper's: windows start at pixel 0, and the last one can extend beyond the edge.
    """
    if not getattr(model, layer).pool:
        return None
    ceil = model.pooling == "ceil"
    padding = 0 if ceil or layer == "conv5" else 1
    return nn.MaxPool2d(3, 2, padding, ceil_mode=ceil)  # paper, Fig. 3: 3×3 windows with stride 2


def feature_sizes(model: ModelConfig, image_size: int) -> dict[str, tuple[int, int]]:
    """Return, for each convolution, the side of its output and the side after its pooling (if any), in pixels.

    Raises UserError if a layer would get too few pixels; the message names the smallest image size that works.
    """
    sizes, problem = _sizes(model, image_size)
    if problem is not None:
        larger = range(image_size, LARGEST_SIDE + 1)  # a larger image never makes a layer smaller
        more = bisect.bisect_left(larger, True, key=lambda size: _sizes(model, size)[1] is None)
        advice = f"set data.image_size={larger[more]} or more (it is {image_size}), or " if more < len(larger) else ""
        raise UserError(f"{problem}: {advice}lower the kernel sizes and strides")
    return sizes


def _sizes(model: ModelConfig, image_size: int) -> tuple[dict[str, tuple[int, int]], str | None]:
    """Return the sides, and a message about the first layer that gets too few pixels (None if there is none)."""
    sizes: dict[str, tuple[int, int]] = {}
    n = image_size
    for layer in CONV_LAYERS:
        if (conv := getattr(model, layer)) is None:
            continue
        if n + 2 * conv.padding < (k := conv.kernel_size):
            return sizes, f"{layer} receives {n}×{n} pixels, too few for its {k}×{k} kernel (padding {conv.padding})"
        out = n = (n + 2 * conv.padding - k) // conv.stride + 1
        if out > _LARGEST_OUTPUT_SIDE:  # large padding needs much memory, even with small weights
            raise UserError(f"{layer} outputs {out}×{out} pixels, more than {_LARGEST_OUTPUT_SIDE}: lower its padding")
        if (pool := pool_of(model, layer)) is not None:
            try:
                # not on "meta", where this imports sympy, which takes 0.5 s
                n = pool(torch.empty(1, 1, out, 3, device="cpu")).shape[2]
            except RuntimeError:
                return sizes, f"the pooling after {layer} receives {out}×{out} pixels, too few for its 3×3 window"
        sizes[layer] = (out, n)
    return sizes, None
