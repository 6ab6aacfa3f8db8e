"""Draw the figures in docs/ that no job draws, because they combine several result files or several runs.

    python benchmarks/figures.py
    python benchmarks/figures.py --runs "AdamW=outputs/train/a" "SGD=outputs/train/b"    # their first layers

The first command reads docs/results. Both write PNG files to docs/figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from zfnet import load_run
from zfnet.config.errors import UserError
from zfnet.explain.selection import pick_layers
from zfnet.model.chain import Chain
from zfnet.plots.figures import BLUE, PURPLE, SOFT, epoch_axis, new_figure, save_figure, styled
from zfnet.plots.pictures import mosaic, on_grey, show

DOCS = Path(__file__).resolve().parent.parent / "docs"


@styled()
def draw_blog(result: dict[str, Any]) -> Figure:
    """Draw the loss and accuracy of the blog's network by epoch, for this program's run and as the blog prints them."""
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


@styled()
def draw_time(small: list[dict[str, Any]], fast: list[dict[str, Any]]) -> Figure:
    """Draw CIFAR-10 test accuracy against the training's minutes on one core, with a point for each setting."""
    figure = new_figure(figsize=(6.5, 3.4))
    axis = figure.subplots()
    lines = {
        "experiment=cifar10_small": (SOFT, small, lambda run: (run["seconds"], run["test"]["accuracy"])),
        "experiment=cifar10_fast, views": (BLUE, fast, lambda run: (run["cpu_seconds"], run["test"]["flip_shift"])),
    }
    for name, (colour, runs, measure) in lines.items():
        settings: dict[str, list[tuple[float, float]]] = {}
        for run in runs:
            wider = ", wider" if run.get("command") == "B" else ""
            settings.setdefault(f"{run['epochs']} epochs{wider}", []).append(measure(run))
        points = []
        for text, measured in settings.items():
            seconds, accuracies = zip(*measured, strict=True)
            minutes = min(filter(None, seconds)) / 60  # the minimum, because some runs shared their core
            points.append((minutes, 100 * statistics.fmean(accuracies), 100 * statistics.stdev(accuracies), text))
        x, y, spread, texts = zip(*sorted(points), strict=True)
        axis.errorbar(x, y, yerr=spread, marker="o", color=colour, label=name)
        for text, place in zip(texts, zip(x, y, strict=True), strict=True):
            axis.annotate(text, place, xytext=(5, -12), textcoords="offset points", fontsize=8)
    axis.set(xlabel="minutes of one core (AMD Zen 4, bf16)", ylabel="test accuracy in %", xlim=(0, 27))
    axis.set_title("CIFAR-10 on a CPU (bars: standard deviation over seeds)")
    axis.legend(loc="lower right")
    return figure


@styled()
def draw_first_layers(runs: Mapping[str, str]) -> Figure:
    """Draw each named run directory's first layer: rows of filters, largest RMS first, each filter on its own scale."""
    figure = new_figure(figsize=(11, 0.9 * len(runs)))
    axes = figure.subplots(len(runs), 1, squeeze=False)[:, 0]
    for axis, (name, folder) in zip(axes, runs.items(), strict=True):
        run = load_run(folder)
        chain = Chain.of(run.model, run.metadata.data.image_size)
        (layer,) = pick_layers(chain, folder, None, chain.conv_layers[:1], only_conv=True)
        weight = run.model.get_submodule(layer).weight.detach()
        order = weight.square().mean((1, 2, 3)).argsort(descending=True)
        show(axis, mosaic(on_grey(weight[order]), columns=16, gap=1, side=14))
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
    return figure


def main(words: list[str] | None = None) -> None:
    """Draw into docs/figures.

    Raises UserError if a run does not exist.
    words: command-line arguments; None: those of this process
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", nargs="+", metavar="NAME=DIR", help="draw only the first layers of these runs")
    runs = parser.parse_args(words).runs
    for run in runs or ():
        if "=" not in run:
            parser.error(f"--runs {run}: give a name and a directory, as in NAME=DIR")
    figures = DOCS / "figures"
    if runs:
        save_figure(draw_first_layers(dict(run.split("=", 1) for run in runs)), figures / "photos_first_layers.png")
        return
    blog, small, fast = (
        json.loads((DOCS / f"results/{name}.json").read_text()) for name in ("blog", "cifar10_small", "cifar10_fast")
    )
    save_figure(draw_blog(blog), figures / "blog_curves.png")
    save_figure(draw_time(small["runs"], fast["runs"]), figures / "cifar10_minutes.png")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
