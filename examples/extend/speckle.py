"""An augmentation of your own: any `nn.Module` that takes one image and returns one."""

import torch
from torch import Tensor, nn


class Speckle(nn.Module):
    """Multiplies each value by 1 + strength · noise. The program seeds PyTorch, NumPy and Python before each image."""

    def __init__(self, strength: float = 0.1) -> None:
        super().__init__()
        self.strength = strength

    def forward(self, image: Tensor) -> Tensor:
        """Return floats from 0 to 1, [3, h, w], for uint8 [3, h, w]. Results of type uint8 are accepted too."""
        return (image / 255 * (1 + self.strength * torch.randn(image.shape, device=image.device))).clamp(0, 1)
