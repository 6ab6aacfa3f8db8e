"""A loss of your own: any `nn.Module` that takes (logits, labels) and returns the mean over the batch."""

import torch.nn.functional as F
from torch import Tensor, nn


class FocalLoss(nn.Module):
    """(1 − p)^gamma · (−log p), where p is the probability of the label: easy images have less weight.

    Source: Lin et al. 2017. With `gamma` 0, this is cross-entropy.
    """

    def __init__(self, gamma: float = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean loss of logits [N, C] with labels [N]."""
        cross_entropy = F.cross_entropy(logits, labels, reduction="none")
        return ((1 - (-cross_entropy).exp()) ** self.gamma * cross_entropy).mean()
