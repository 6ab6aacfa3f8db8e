"""ZFNet (Zeiler & Fergus 2013, Fig. 3): five convolutions, three fully connected layers.

The paper's layer numbers are the names everywhere: `conv1 … conv5`, `fc6, fc7, fc8`, in this file, in the
weights' names, in configs and in figures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.config.errors import UserError, did_you_mean
from zfnet.config.randomness import DROPOUT, make_key, uniform
from zfnet.config.schema import ModelConfig
from zfnet.model.layers import LocalResponseNorm
from zfnet.model.sizes import CONV_LAYERS, FC_LAYERS, POOL_SIZE, POOL_STRIDE, feature_sizes, pool_of

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


class Dropout(nn.Module):
    """Dropout whose mask is a function of a key and of each image's place in the global batch.

    Until `set_key` is called it is ordinary dropout. With a key, a step's mask is the same after a resume,
    on any device, and however the batch is divided among parts or processes.
    """

    key: Tensor
    first: Tensor

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.keyed = p, False
        # tensors, so that changing them does not recompile; not persistent, since they are functions of the step
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("first", torch.zeros((), dtype=torch.int64), persistent=False)

    def set_key(self, key: int, first: int) -> None:
        """Use this key from now on; `first` is the place of image 0 in the global batch."""
        self.key.fill_(key)
        self.first.fill_(first)
        self.keyed = True

    def forward(self, x: Tensor) -> Tensor:
        """Drop entries of x [N, features] in training mode; scale the others by 1 / (1 − p)."""
        if not self.training or self.p == 0:
            return x
        if not self.keyed:
            return F.dropout(x, self.p)
        rows = torch.arange(x.shape[0], device=x.device) + self.first
        index = rows[:, None] * x.shape[1] + torch.arange(x.shape[1], device=x.device)
        return x * (uniform(self.key, index) >= self.p).to(x.dtype).mul_(1 / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


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
        self.output_of: dict[str, str] = {}  # the module that ends a layer → the layer's name
        sizes = feature_sizes(config, image_size)
        channels = 3
        for layer in sizes:
            channels = self._add_convolution(layer, channels)
        features = channels * sizes["conv5"][1] ** 2
        for layer in FC_LAYERS:
            if (settings := getattr(config, layer)) is not None:
                number = layer[-1]
                self.add_module(layer, nn.Linear(features, settings.features))
                self._add_relu(layer)
                self.add_module(f"dropout{number}", Dropout(config.dropout))
                features = settings.features
        self.fc8 = nn.Linear(features, num_classes)
        self.output_of["fc8"] = "fc8"
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
        self._add_relu(layer)
        if (pool := pool_of(self.config, layer)) is not None:
            self.add_module(
                f"pool{number}", nn.MaxPool2d(POOL_SIZE, POOL_STRIDE, pool.padding, ceil_mode=pool.ceil)
            )
        if self.config.norm == "lrn" and layer in (
            "conv1",
            "conv2",
        ):  # the paper's Fig. 3: pool, then normalise
            self.add_module(f"norm{number}", LocalResponseNorm())
        return settings.channels

    def _add_relu(self, layer: str) -> None:
        self.add_module(f"relu{layer[-1]}", nn.ReLU())
        self.output_of[f"relu{layer[-1]}"] = layer

    def _initialise(self) -> None:
        if self.config.init == "default":
            return
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                if (
                    self.config.init == "normal"
                ):  # paper, section 3: "1e-2", which must be a standard deviation
                    nn.init.normal_(module.weight, std=0.01)
                else:
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, image_size, image_size]."""
        return self._run(images, {})

    def activations(self, images: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return each named layer's output: after the ReLU and before pooling, the logits for fc8.

        Shapes: conv layers [N, channels, y, x], fc layers [N, features]. Raises UserError for an unknown layer.
        """
        for layer in layers:
            if layer not in self.layers:
                raise UserError(f"{layer}: no such layer{did_you_mean(layer, self.layers)}")
        found: dict[str, Tensor] = dict.fromkeys(layers, images)
        self._run(images, found)
        return found

    @property
    def layers(self) -> list[str]:
        """The layers that hold weights, in order: conv1 … fc8, less those that the config leaves out."""
        return list(self.output_of.values())

    def _run(self, x: Tensor, found: dict[str, Tensor]) -> Tensor:
        for name in self.steps:
            module = self._modules[name]
            assert module is not None
            x = module(x.flatten(1) if isinstance(module, nn.Linear) else x)
            if self.output_of.get(name) in found:
                found[self.output_of[name]] = x
        return x

    def set_step(self, seed: int, step: int, first: int = 0) -> None:
        """Fix this step's dropout masks; `first` is the place of the next image in the global batch."""
        for number, module in enumerate(m for m in self.modules() if isinstance(m, Dropout)):
            module.set_key(make_key(seed, DROPOUT, step, number), first)

    @torch.no_grad()
    def renormalize(self) -> None:
        """Scale each convolution filter whose RMS exceeds `rms_limit` back to it (paper, section 3)."""
        limit = self.config.rms_limit
        if limit is None:
            return
        for layer in CONV_LAYERS:
            if (convolution := getattr(self, layer, None)) is not None:
                weight = convolution.weight
                rms = weight.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
                # torch.where, so that filters within the limit keep their bits
                weight.copy_(torch.where(rms > limit, weight * (limit / rms), weight))

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
                raise UserError(f"the weights hold {name}, which this network has not")
            if own[name].shape != value.shape:
                raise UserError(
                    f"the weights' {name} is {list(value.shape)}, this network's is {list(own[name].shape)}"
                )
        self.load_state_dict(renamed)
