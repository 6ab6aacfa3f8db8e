"""A network of your own: a small residual network, which is not a chain of layers."""

import torch.nn.functional as F
from torch import Tensor, nn


class TinyResNet(nn.Module):
    """Three residual blocks, global average pooling and dropout, for images whose side is a multiple of 8.

    Source: He et al. 2015, with `width`, 2 · width and 4 · width maps. The program passes `num_classes`.
    """

    def __init__(self, num_classes: int, width: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(3, width), Block(width, 2 * width), Block(2 * width, 4 * width))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, num_classes] for images [N, 3, S, S]."""
        return self.head(self.dropout(self.blocks(images).mean((2, 3))))


class Block(nn.Module):
    """ReLU(F(x) + W x): `outputs` maps of half the size, which is even. W follows an average pool (He et al. 2018)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(inputs, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))
