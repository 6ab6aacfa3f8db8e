"""Pooling before bias and ReLU: the same numbers from a quarter of the additions and comparisons."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from zfnet.model.zfnet import ZFNet


class PoolFirstZFNet(ZFNet):
    """ZFNet whose pooled layers add the bias and apply ReLU after pooling.

    Adding a number and ReLU keep the order of values, so they may change places with a maximum: the outputs are
    the same to the bit, and so are the state dict's names. (Batch normalisation can turn the order round, so a
    network with it stays as it is.)
    """

    def _run(self, x: Tensor, found: dict[str, Tensor]) -> Tensor:
        if self.config.norm == "batch" or found:
            return super()._run(x, found)
        bias: Tensor | None = None
        for name in self.steps:
            module = self._modules[name]
            assert module is not None
            if isinstance(module, nn.Conv2d) and f"pool{name[-1]}" in self._modules:
                bias = module.bias
                x = F.conv2d(x, module.weight, None, module.stride, module.padding)
            elif isinstance(module, nn.MaxPool2d):
                assert bias is not None
                x, bias = F.relu(module(x) + bias[:, None, None]), None
            elif not (isinstance(module, nn.ReLU) and bias is not None):
                x = module(x.flatten(1) if isinstance(module, nn.Linear) else x)
        return x
