"""Draw the figures of docs/results.md that stand beside other people's numbers, or over several files of results.

python docs/figures/draw.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from zfnet.plots.figures import BLUE, PURPLE, SOFT, epoch_axis, new_figure, save_figure, styled

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"


@styled
def draw_blog(result: dict[str, Any]) -> Figure:
    """Draw loss and accuracy of the blog's network by epoch: this program's run, and what the blog prints."""
    figure = new_figure(figsize=(8.5, 3.2))
    loss, accuracy = figure.subplots(1, 2)
    epochs = result["runs"][0]["epochs"]
    numbers = [row["epoch"] for row in epochs]
    blog = result["blog"]
    theirs = {"test_loss": blog["test_loss"]} | {key: blog[key] for key in ("train_accuracy", "test_accuracy")}
    for name, axis in (("loss", loss), ("accuracy", accuracy)):
        scale = 100 if name == "accuracy" else 1
        for split, colour in (("train", BLUE), ("test", PURPLE)):
            column = f"{split}_{name}"
            axis.plot(
                numbers, [scale * row[column] for row in epochs], marker=".", color=colour, label=f"{split}, here"
            )
            if column in theirs:
                values = [scale * value for value in theirs[column]]
                axis.plot(numbers, values, marker=".", ls="--", color=colour, alpha=0.6, label=f"{split}, the blog")
        epoch_axis(axis, numbers)
    loss.set(title="Cross-entropy", ylabel="loss")
    accuracy.set(title="Accuracy", ylabel="accuracy in %")
    accuracy.legend(loc="lower right")
    loss.legend()
    return figure


@styled
def draw_time(small: dict[str, Any], fast: dict[str, Any]) -> Figure:
    """Draw test accuracy on CIFAR-10 against the minutes of a training on one core."""
    figure = new_figure(figsize=(6.5, 3.4))
    axis = figure.subplots()
    for settings, name, colour in ((small["dial"], "cifar10_small", SOFT), (fast["dial"], "cifar10_fast", BLUE)):
        minutes = [row["minutes"] for row in settings]
        means = [100 * statistics.fmean(row["test"]) for row in settings]
        spread = [100 * statistics.stdev(row["test"]) for row in settings]
        axis.errorbar(minutes, means, yerr=spread, marker="o", color=colour, label=f"experiment={name}")
        for row, x, y in zip(settings, minutes, means, strict=True):
            axis.annotate(row["setting"], (x, y), xytext=(6, -11), textcoords="offset points", fontsize=8)
    axis.set(xlabel="minutes of one core (AMD Zen 4, bf16)", ylabel="test accuracy in %", xlim=(0, None))
    axis.set_title("CIFAR-10 on a CPU (bars: standard deviation over seeds)")
    axis.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    results = {
        name: json.loads((RESULTS / f"{name}.json").read_text()) for name in ("blog", "cifar10_small", "cifar10_fast")
    }
    save_figure(draw_blog(results["blog"]), HERE / "blog_curves.png")
    save_figure(draw_time(results["cifar10_small"], results["cifar10_fast"]), HERE / "cifar10_minutes.png")
