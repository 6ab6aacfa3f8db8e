"""A metric of your own: a callback with a column, which history.csv and the loggers get and others may monitor."""

from collections.abc import Mapping

from zfnet.training.callbacks import Callback
from zfnet.training.metrics import Evaluation
from zfnet.training.state import TrainingState


class MacroF1(Callback):
    """F1 of the validation images, averaged over the classes: 2 · right / (predicted + true), 0 for neither."""

    columns = ("validation_f1",)
    monitor = "validation_loss"  # a run without validation images ends before its first step

    def measure(self, state: TrainingState, results: Mapping[str, Evaluation]) -> dict[str, float]:
        confusion = results["validation"].confusion().double()  # [true class, predicted class]
        both = confusion.sum(0) + confusion.sum(1)
        return {"validation_f1": float((2 * confusion.diagonal() / both.clamp_min(1)).mean())}
