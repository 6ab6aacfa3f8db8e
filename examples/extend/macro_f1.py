"""A metric of your own: a callback with a column of history.csv. Loggers receive it; other callbacks can monitor it."""

from collections.abc import Mapping

from zfnet.training.callbacks import Callback
from zfnet.training.metrics import Evaluation
from zfnet.training.state import TrainingState


class MacroF1(Callback):
    """Validation F1, averaged over classes: 2 · correct / (predicted + true), or 0 where both counts are 0."""

    columns = ("validation_f1",)
    monitor = "validation_loss"  # stops a run without validation images before its first step

    def measure(self, state: TrainingState, results: Mapping[str, Evaluation]) -> dict[str, float]:
        confusion = results["validation"].confusion().double()  # [true class, predicted class]
        both = confusion.sum(0) + confusion.sum(1)
        return {"validation_f1": float((2 * confusion.diagonal() / both.clamp_min(1)).mean())}
