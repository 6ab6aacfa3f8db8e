"""ZFNet (Zeiler & Fergus 2013, Fig. 3): five convolutions, three fully connected layers.

The paper's layer numbers are the names everywhere: `conv1 … conv5`, `fc6, fc7, fc8`, in this file, in the
weights' names, in configs and in figures.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from zfnet.config.errors import UserError
from zfnet.config.schema import ModelConfig
from zfnet.model.chain import Chain
from zfnet.model.layers import Dropout, LocalResponseNorm

CONV_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
FC_LAYERS = ("fc6", "fc7")
POOL_SIZE, POOL_STRIDE = 3, 2  # paper, Fig. 3: 3×3 max pooling with stride 2

# where the blog's nn.Sequential keeps each layer
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
    image_size: side of the images in pixels; fc6's input follows from it. The default network takes 53 and up.
    config: kernels, channels, normalisation …; the default is the blog's network, with 58,301,578
        parameters at 10 classes and 224 px.

    Raises UserError where the settings leave a layer without pixels.
    """

    def __init__(
        self, num_classes: int = 10, image_size: int = 224, config: ModelConfig | None = None
    ) -> None:
        super().__init__()
        self.config = config = config or ModelConfig()
        self.num_classes, self.image_size = num_classes, image_size
        sizes = feature_sizes(config, image_size)
        channels = 3
        for layer in sizes:
            channels = self._add_convolution(layer, channels)
        features = channels * sizes["conv5"][1] ** 2
        for layer in FC_LAYERS:
            if (settings := getattr(config, layer)) is not None:
                number = layer[-1]
                self.add_module(layer, nn.Linear(features, settings.features))
                self.add_module(f"relu{number}", nn.ReLU())
                self.add_module(f"dropout{number}", Dropout(config.dropout))
                features = settings.features
        self.fc8 = nn.Linear(features, num_classes)
        # the order of registration is the order of the forward pass
        self.steps = [name for name, _ in self.named_children()]
        self._initialise()

    def _add_convolution(self, layer: str, channels: int) -> int:
        """Register a layer's modules in forward order: convolution, [batch norm], ReLU, [pooling], [LRN]."""
        settings, number = getattr(self.config, layer), layer[-1]
        self.add_module(
            layer,
            nn.Conv2d(channels, settings.channels, settings.kernel_size, settings.stride, settings.padding),
        )
        if self.config.norm == "batch":
            self.add_module(f"norm{number}", nn.BatchNorm2d(settings.channels))
        self.add_module(f"relu{number}", nn.ReLU())
        if (pool := pool_of(self.config, layer)) is not None:
            self.add_module(
                f"pool{number}", nn.MaxPool2d(POOL_SIZE, POOL_STRIDE, pool.padding, ceil_mode=pool.ceil)
            )
        # the paper's Fig. 3: pool, then normalise
        if self.config.norm == "lrn" and layer in ("conv1", "conv2"):
            self.add_module(f"norm{number}", LocalResponseNorm())
        return settings.channels

    def _initialise(self) -> None:
        if self.config.init == "default":
            return
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if self.config.init == "normal":
                    # paper, section 3: "1e-2", which must be a standard deviation
                    nn.init.normal_(module.weight, std=0.01)
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, image_size, image_size]."""
        x = images
        for name in self.steps:
            module = self._modules[name]
            assert module is not None
            x = module(x.flatten(1) if isinstance(module, nn.Linear) else x)
        return x

    @functools.cached_property
    def chain(self) -> Chain:
        """The network as what explanations work on: a list of steps."""
        return Chain(self, self.image_size)

    @property
    def layers(self) -> list[str]:
        """The layers that hold weights, in order: conv1 … fc8, less those that the config leaves out."""
        return self.chain.layers

    def activations(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return each named layer's output: after the ReLU and before pooling, the logits for fc8.

        Shapes: conv layers [N, channels, y, x], fc layers [N, features]. Raises UserError for an unknown layer.
        """
        return self.chain.activations(images, layers)

    @staticmethod
    def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict under this class's names: the blog's are translated, prefixes of wrappers dropped."""
        renamed = {}
        for name, value in state.items():
            name = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
            prefix, _, rest = name.rpartition(".")
            renamed[f"{_BLOG_NAMES.get(prefix, prefix)}.{rest}"] = value
        return renamed

    def load_weights(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict of this class or of the blog's, with or without DataParallel's `module.` prefix.

        The program reads safetensors only. A `.pth` file is converted once, in a place where its pickle may
        be trusted: `save_file(torch.load("zfnet.pth", weights_only=True), "zfnet.safetensors")`, with
        `save_file` from `safetensors.torch`; then `model.load_weights(load_file("zfnet.safetensors"))`.

        Raises UserError where names or shapes do not fit.
        """
        renamed = self.own_names(state)
        own = self.state_dict()
        for name in own.keys() - renamed.keys():
            raise UserError(f"the weights lack {name}")
        for name, value in renamed.items():
            if name not in own:
                raise UserError(f"the weights hold {name}, which this network does not have")
            if own[name].shape != value.shape:
                raise UserError(
                    f"the weights' {name} is {list(value.shape)}, this network's is {list(own[name].shape)}"
                )
        self.load_state_dict(renamed)


@dataclass(frozen=True)
class Pool:
    """How one pooling layer places its 3×3/2 windows."""

    padding: int
    ceil: bool

    def size(self, n: int) -> int:
        """Return the output side for an input side of `n` pixels."""
        span = n + 2 * self.padding - POOL_SIZE
        out = (-(-span // POOL_STRIDE) if self.ceil else span // POOL_STRIDE) + 1
        # PyTorch drops a window that would start in the padding beyond the last pixel
        if self.ceil and (out - 1) * POOL_STRIDE >= n + self.padding:
            out -= 1
        return out


def pool_of(model: ModelConfig, layer: str) -> Pool | None:
    """Return the pooling after `layer`, or None.

    `pad` is the blog's: one pixel of padding, except after conv5. `ceil` is cuda-convnet's, and so most
    probably the paper's: windows start at pixel 0 and the last one may hang over the edge.
    """
    conv = getattr(model, layer)
    if not conv.pool:
        return None
    if model.pooling == "ceil":
        return Pool(padding=0, ceil=True)
    return Pool(padding=0 if layer == "conv5" else 1, ceil=False)


def feature_sizes(model: ModelConfig, image_size: int) -> dict[str, tuple[int, int]]:
    """Return, for each convolution, the side of its output and the side after its pooling (if any).

    Raises UserError where a layer would be left without pixels.
    """
    sizes: dict[str, tuple[int, int]] = {}
    n = image_size
    for layer in CONV_LAYERS:
        conv = getattr(model, layer)
        if conv is None:
            continue
        out = (n + 2 * conv.padding - conv.kernel_size) // conv.stride + 1
        if n + 2 * conv.padding < conv.kernel_size or out < 1:
            raise UserError(
                f"{layer} receives {n}×{n} pixels, too few for its {conv.kernel_size}×{conv.kernel_size} kernel "
                f"(padding {conv.padding}): raise data.image_size={image_size} or lower the kernel sizes and strides"
            )
        pool = pool_of(model, layer)
        pooled = pool.size(out) if pool else out
        if pooled < 1:
            raise UserError(
                f"the pooling after {layer} receives {out}×{out} pixels, too few for its 3×3 window: "
                f"raise data.image_size={image_size} or lower the kernel sizes and strides"
            )
        sizes[layer] = (out, pooled)
        n = pooled
    return sizes
