"""Loss and accuracy accumulators kept on the device; `read()` and `result()` are the only host syncs."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# A mean cross-entropy this large comes from logits beyond 10⁵; no training recovers from that.
DIVERGED_LOSS = 1e5


class RunningMetrics:
    """Loss and accuracy over the images seen since `reset`, without synchronising per step.

    Also keeps the first step that diverged: its mean loss is NaN, or at least DIVERGED_LOSS.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        # loss sum, correct, images, first step that diverged (−1: none)
        self.sums = torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=dtype, device=device)

    def reset(self) -> None:
        self.sums[:3] = 0

    @torch.no_grad()
    def add(self, losses: Tensor, correct: Tensor, count: int, step: int) -> None:
        """Add one batch: the sum of its losses, the numbers of correct images and of all images, and its step."""
        self.sums[0] += losses
        self.sums[1] += correct
        self.sums[2] += count
        bad = self.sums[3]
        # `where` would copy a Python number to the device and synchronise, so give it a tensor there
        now = torch.full_like(bad, step)
        bad.copy_(torch.where((bad < 0) & ~(losses < DIVERGED_LOSS * count), now, bad))

    def read(self) -> tuple[float, float, int | None]:
        """Return (mean loss, accuracy, first step that diverged or None). This waits for the device."""
        loss, correct, count, bad = self.sums.tolist()
        count = max(count, 1.0)
        return loss / count, correct / count, None if bad < 0 else int(bad)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of a network on a set of images. `predictions` [N] and `confidences` [N] are in the set's order.

    top5: None with fewer than six classes, since it would always be 1
    probabilities: [N, classes], if they were kept
    """

    loss: float
    accuracy: float
    top5: float | None
    predictions: Tensor
    confidences: Tensor
    labels: Tensor
    num_classes: int
    probabilities: Tensor | None = None

    def confusion(self) -> Tensor:
        """Return counts [true class, predicted class]."""
        cells = self.labels * self.num_classes + self.predictions
        return torch.bincount(cells, minlength=self.num_classes**2).view(self.num_classes, self.num_classes)

    def per_class(self) -> list[float | None]:
        """Return the accuracy of each class; None for a class without images."""
        confusion = self.confusion()
        return [
            int(right) / int(total) if total else None
            for right, total in zip(confusion.diagonal(), confusion.sum(1), strict=True)
        ]

    def mean_class_accuracy(self) -> float:
        """Return the mean of the accuracies of those classes that have images (the paper's metric for Caltech)."""
        known = [a for a in self.per_class() if a is not None]
        return sum(known) / len(known)


class EvaluationSums:
    """Collects an Evaluation batch by batch, on the device; `probabilities`: keep the probabilities of all classes."""

    def __init__(self, probabilities: bool = False) -> None:
        self.with_probabilities, self.num_classes = probabilities, 0
        self.batches: list[tuple[Tensor, ...]] = []

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add one batch: logits [B, C] (any float type) and labels [B]."""
        logits = logits.float()
        self.num_classes = logits.shape[1]
        losses = F.cross_entropy(logits, labels, reduction="none")
        best = logits.topk(min(5, self.num_classes), dim=1).indices
        probabilities = logits.softmax(1)
        batch = (losses, (best == labels[:, None]).any(1), best[:, 0], probabilities.amax(1), labels)
        self.batches.append((*batch, probabilities) if self.with_probabilities else batch)

    def result(self) -> Evaluation:
        """Return the metrics. This waits for the device."""
        losses, top5, predictions, confidences, labels, *probabilities = (
            torch.cat(parts).cpu() for parts in zip(*self.batches, strict=True)
        )
        return Evaluation(
            loss=losses.double().mean().item(),
            accuracy=(predictions == labels).double().mean().item(),
            top5=top5.double().mean().item() if self.num_classes > 5 else None,
            predictions=predictions,
            confidences=confidences,
            labels=labels,
            num_classes=self.num_classes,
            probabilities=probabilities[0] if probabilities else None,
        )
