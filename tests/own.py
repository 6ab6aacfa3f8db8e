"""Classes that a user's own package can provide, for every config group. Commands need imports=[tests] to use them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from tests.helpers import random_images
from zfnet.training.callbacks import Callback
from zfnet.training.loggers import Logger
from zfnet.training.state import TrainingState


class NestedState(Optimizer):
    """Descent along the last two gradients. Its state contains lists and dicts."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["last"] = [torch.zeros_like(p), torch.zeros_like(p)]
                    state["sums"] = {"squares": torch.zeros_like(p), "count": 0, "names": ("a", None)}
                sums = state["sums"]
                state["last"] = [p.grad.clone(), state["last"][0]]
                sums["squares"] += p.grad**2
                sums["count"] += 1
                scale = (sums["squares"] / sums["count"]).sqrt() + 1e-3
                p -= group["lr"] * (state["last"][0] + 0.5 * state["last"][1]) / scale


class TwoModes(Optimizer):
    """Descent that is evaluated at the mean of its iterates, like schedule-free optimizers. It starts in mode eval."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "mode": "eval"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            if group["mode"] != "train":
                raise Exception("this optimizer is not in training mode")
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                p -= group["lr"] * p.grad
                state["count"] = state.get("count", 0) + 1
                other = state.setdefault("other", torch.zeros_like(p))
                other += (p - other) / state["count"]

    def train(self) -> None:
        self._become("train")

    def eval(self) -> None:
        self._become("eval")

    @torch.no_grad()
    def _become(self, mode: str) -> None:
        for group in self.param_groups:
            if group["mode"] != mode:
                group["mode"] = mode
                for p in (p for p in group["params"] if "other" in self.state[p]):
                    kept = p.clone()
                    p.copy_(self.state[p]["other"])
                    self.state[p]["other"].copy_(kept)


class Counting(Optimizer):
    """Descent in ever smaller steps. The groups have a step count, either by default or from the first step on."""

    def __init__(self, params: Any, lr: float = 0.01, weight_decay: float = 0.0, from_defaults: bool = True) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay} | ({"count": 0} if from_defaults else {}))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["count"] = group.get("count", 0) + 1
            for p in (p for p in group["params"] if p.grad is not None):
                p -= group["lr"] / group["count"] * (p.grad + group["weight_decay"] * p)


class MeanCrossEntropy(nn.Module):
    """The mean over the batch. It has no argument `reduction`."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)


class NoGradient(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) != labels).float().mean()


class ErrorWithoutMessage(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError


class SoftTargets(nn.Module):
    """Expects probabilities [N, C]. Labels [N] raise no error if N equals C, because they broadcast."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return -(labels * logits.log_softmax(1)).sum(1).mean()


class TenClasses(nn.Module):
    """Cross-entropy with a weight for each of exactly ten classes."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (torch.arange(10.0) * F.one_hot(labels, 10) * -logits.log_softmax(1)).sum(1).mean()


class UnreducedLoss(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")


class LossWithParameter(MeanCrossEntropy):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))


class Network(nn.Module):
    """A user's own network."""

    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, width, 7, stride=8)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).relu().mean((2, 3)))


class Fixed(nn.Module):
    """A network with a fixed number of outputs. With `second`, it returns two results in training mode."""

    def __init__(self, outputs: int = 10, dropout: float = 0.5, second: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.LazyLinear(outputs))
        self.layers(torch.zeros(1, 3, 64, 64))
        self.dropout, self.second = dropout, second

    def forward(self, images: Tensor) -> Any:
        logits = F.dropout(self.layers(images), self.dropout, self.training)
        return (logits, logits) if self.second and self.training else logits


class Detached(Fixed):
    """A network that cuts the gradient."""

    def forward(self, images: Tensor) -> Any:
        return super().forward(images).detach()


class ExtraState(Fixed):
    """A network whose state is more than tensors."""

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}


class LateNorm(nn.Module):
    """A network without convolutions. The last parameters in its state dict are not those of its last layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(5, num_classes)
        self.norm = nn.BatchNorm1d(5)
        self.body = nn.Linear(3, 5, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.body(images.mean((2, 3)))))


class GradNorm(Callback):
    """Reports the norm of the last step's gradients as a column. `measure` returns no other `column`."""

    def __init__(self, column: str = "grad_norm") -> None:
        self.columns = (column,)
        self.norm = 0.0

    def on_before_optimizer_step(self, state: Any) -> None:
        self.norm = float(nn.utils.get_total_norm([p.grad for p in state.model.parameters()]))

    def measure(self, state: Any, results: Mapping[str, Any]) -> dict[str, float]:
        return {"grad_norm": self.norm}

    def state_dict(self) -> dict[str, Any]:
        return {"norm": self.norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norm = state["norm"]


class Writer(Callback):
    def on_epoch_end(self, state: Any, row: Any) -> None:
        row["written"] = json.dumps(row)


class NoMeasure(Callback):
    columns = ("a",)


class ColumnsAsText(GradNorm):
    columns = "grad_norm"  # not a list

    def __init__(self) -> None:
        self.norm = 0.0


class Misspelt(GradNorm):
    def on_epoch_ends(self, state: Any, row: Any) -> None:
        raise AssertionError


class StepCounter(Callback):
    """Counts steps. Its state contains numbers, lists and tensors."""

    def __init__(self) -> None:
        self.steps, self.epochs, self.total = 0, [], torch.zeros(())

    def on_step_end(self, state: Any) -> None:
        self.steps += 1
        self.total += next(state.model.parameters()).detach().sum()

    def on_epoch_end(self, state: Any, row: Mapping[str, Any]) -> None:
        self.epochs.append((row["epoch"], self.steps))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "epochs": list(self.epochs), "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.epochs, self.total = state["steps"], state["epochs"], state["total"]


class HookRecorder(Callback):
    """Records each call of a hook, in order, with the step count."""

    calls: ClassVar[list[tuple[str, int]]] = []

    def __init__(self) -> None:
        for hook in (name for name in dir(Callback) if name.startswith("on_")):
            setattr(self, hook, lambda state, *_, hook=hook: self.calls.append((hook, getattr(state, "step", 0))))


class Broken(Callback, Logger):
    """Raises KeyError in one of its methods, as code with a misspelled key does."""

    def __init__(self, method: str) -> None:
        setattr(self, method, lambda *_: {}["val_loss"])

    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}


class Items(Dataset):
    """`count` images of noise, in one of the forms that items of a data set can have."""

    def __init__(self, count: int, form: str = "pil", side: int = 64, classes: int = 3, seed: int = 0) -> None:
        self.images, self.form, self.number = random_images(count, side, seed), form, classes
        self.canvas = Image.new("RGB", (side, side))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> tuple[Any, Any]:
        pixels: Any = self.images[k]
        made = {
            "pil": lambda: Image.fromarray(pixels.numpy()),
            "array": lambda: pixels.numpy(),
            "bytes": lambda: pixels.permute(2, 0, 1),
            "floats": lambda: pixels.permute(2, 0, 1) / 255,
            "channels first": lambda: pixels.permute(2, 0, 1).numpy(),
            "channels last": lambda: pixels,
            "flat": lambda: pixels.flatten(),
            "wide": lambda: pixels[: len(pixels) // 2].numpy(),
            "random": lambda: np.random.randint(0, 256, pixels.shape, dtype=np.uint8),
            "int32": lambda: pixels.numpy().astype(np.int32),
            "words": lambda: "no image",
            "0 to 255": lambda: pixels.permute(2, 0, 1).float(),
            "normalised": lambda: pixels.permute(2, 0, 1) / 127.5 - 1,
            "rounded": lambda: (pixels.permute(2, 0, 1) / 255) * 1.0004 - 0.0002,
            "not a number": lambda: torch.full((3, *pixels.shape[:2]), torch.nan),
            "16 bits": lambda: Image.fromarray(pixels[..., 0].numpy().astype(np.uint16) * 257),
            "transparent": lambda: Image.new("LA", (64, 64), (0, 0)),
            "one object": lambda: self.canvas.paste(Image.fromarray(pixels.numpy())) or self.canvas,
        }[self.form]()
        return made, torch.tensor(k % self.number) if k % 2 else k % self.number


class Negative(Items):
    def __getitem__(self, k: int) -> tuple[Any, Any]:
        return super().__getitem__(k)[0], -1


class Identifiers(Items):
    def __getitem__(self, k: int) -> tuple[Any, Any]:
        return super().__getitem__(k)[0], k * 100_000


class Fractions(Items):
    def __getitem__(self, k: int) -> tuple[Any, Any]:
        return super().__getitem__(k)[0], k / 2


class FromOne(Items):
    def __getitem__(self, k: int) -> tuple[Any, Any]:
        return super().__getitem__(k)[0], 1 + k % 3


class OneHot(Items):
    def __getitem__(self, k: int) -> tuple[Any, Any]:
        return super().__getitem__(k)[0], torch.eye(3)[k % 3]


class Words(Items):
    def __getitem__(self, k: int) -> tuple[Any, Any]:
        return super().__getitem__(k)[0], "bcd"[k % 3]


class Mappings(Items):
    def __getitem__(self, k: int) -> Any:
        return dict(zip(("image", "label"), super().__getitem__(k), strict=True))


class Triples(Items):
    def __getitem__(self, k: int) -> Any:
        return (*super().__getitem__(k), k)


class Named(Items):
    classes = ("cat", "dog", "eel")


class Squash(nn.Module):
    """A transform that changes the shape: it keeps `keep` rows, or a square whose size depends on the pixels."""

    def __init__(self, keep: int = 0) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, image: Tensor) -> Tensor:
        side = self.keep or 8 + int(image.sum()) % 8
        return image[:, :side, : side if not self.keep else None]


class Floats(nn.Module):
    """A transform that returns floats: 0 to 255, divided by `divisor`."""

    def __init__(self, divisor: float = 1.0) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, image: Tensor) -> Tensor:
        return image.float() / self.divisor


class StopAtStep(Callback):
    def on_step_end(self, state: TrainingState) -> None:
        state.should_stop |= state.step >= 3


class NoColumns(Callback):
    def measure(self, state: TrainingState, results: Any) -> dict[str, float]:
        return {"mine": 1.0}


class NoLength(Dataset):
    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (8, 8)), 0
