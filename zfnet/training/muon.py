"""Muon: an optimizer for weights of convolutions that makes all singular values of a step about equal."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_QUINTIC = (3.4445, -4.7750, 2.0315)  # steep at 0: five steps map singular values of at least 0.01 into 0.7 … 1.2


class Muon(Optimizer):
    """SGD with momentum orthogonalised by Newton–Schulz steps; for biases and groups with orthogonalize=False, SGD.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon, airbench94_muon). `torch.optim.Muon` accepts only
    weights of two dimensions; this class treats the weights of a convolution as a matrix [out, in · k · k].

    lr: the spectral norm of a step, times √(rows / columns) for a matrix with more rows than columns
    weight_decay: decoupled (weights shrink by lr · weight_decay) if a step is orthogonalised, otherwise as in SGD
    steps: number of Newton–Schulz steps; with fewer, small singular values stay smaller
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        steps: int = 5,
        orthogonalize: bool = True,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps={steps}: must be at least 1")
        settings = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, settings | {"steps": steps, "orthogonalize": orthogonalize})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step(weight, weight.grad, group)

    def _step(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        matrix = group["orthogonalize"] and weight.ndim > 1
        if group["weight_decay"] and not matrix:
            grad = grad.add(weight, alpha=group["weight_decay"])
        state, momentum = self.state[weight], group["momentum"]
        if momentum:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grad)
            buffer = state["momentum_buffer"].mul_(momentum).add_(grad)
            grad = grad.add(buffer, alpha=momentum) if group["nesterov"] else buffer
        if matrix:
            grad = orthogonalized(grad.flatten(1), group["steps"]).reshape(grad.shape)
            grad = grad * max(1.0, len(grad) / grad[0].numel()) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(grad, alpha=-group["lr"])


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """Return approximately U Vᵀ for a matrix U S Vᵀ [m, n]: each step maps singular values s to a s + b s³ + c s⁵."""
    a, b, c = _QUINTIC
    x = matrix / matrix.norm().clamp_min(1e-12)  # then no singular value is above 1
    wide = x if len(x) <= x.shape[1] else x.T
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if wide.shape == x.shape else wide.T
