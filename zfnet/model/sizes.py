"""Sizes of the feature maps: plain integer arithmetic, shared by the config's checks and the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zfnet.config.errors import UserError

if TYPE_CHECKING:
    from zfnet.config.schema import ModelConfig

CONV_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")
FC_LAYERS = ("fc6", "fc7")
POOL_SIZE, POOL_STRIDE = 3, 2  # paper, Fig. 3: 3×3 max pooling with stride 2


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
