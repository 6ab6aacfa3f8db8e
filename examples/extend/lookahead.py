"""A callback of your own: it runs in each step, and checkpoints contain its state."""

from typing import Any

import torch

from zfnet.training.callbacks import Callback
from zfnet.training.state import TrainingState


class Lookahead(Callback):
    """Every `every` steps, moves slow weights by `rate` towards the trained weights and trains on from the result.

    Source: Zhang et al. 2019.
    """

    def __init__(self, every: int = 5, rate: float = 0.5) -> None:
        self.every, self.rate = every, rate

    def on_fit_start(self, state: TrainingState) -> None:
        self.slow = [p.detach().clone() for p in state.model.parameters()]

    @torch.no_grad()
    def on_optimizer_step(self, state: TrainingState) -> None:
        if (state.step + 1) % self.every:  # `state.step` counts the steps before this one
            return
        for slow, fast in zip(self.slow, state.model.parameters(), strict=True):
            fast.copy_(slow.lerp_(fast, self.rate))

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for slow, saved in zip(self.slow, state["slow"], strict=True):
            slow.copy_(saved)
