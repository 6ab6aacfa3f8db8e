"""The figures of a sweep: curves of all jobs, and validation accuracy against the swept keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from zfnet.plots.figures import PALETTE
from zfnet.sweeps.summary import Setting, Sweep, format_value, plain_name, short_names

BLUE, ORANGE, GREY = PALETTE[0], PALETTE[1], "#8c959f"
NAMED = 8  # settings with a colour and a name of their own; the rest is grey
_CELLS = 400  # a heat map with more cells is a search, and is drawn as points
_ACCURACY = "validation accuracy"


def draw_sweep(sweep: Sweep) -> dict[str, Figure]:
    """Return the figures that suit this sweep, by name."""
    figures: dict[str, Figure] = {}
    if any(job.history for job in sweep.jobs):
        figures["curves"] = draw_sweep_curves(sweep)
    scored = [s for s in sweep.settings if s.scores()]
    keys = [key for key in sweep.keys if len({repr(s.values[key]) for s in scored}) > 1]
    if keys:
        draw = {1: draw_one_key, 2: draw_two_keys}.get(len(keys), draw_parallel)
        figures["objective"] = draw(scored, keys)
    return figures


def _bare(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _colour_bar(axis: Axes, colours: ScalarMappable) -> None:
    bar = axis.figure.colorbar(colours, ax=axis, format=PercentFormatter(1), label=_ACCURACY)
    bar.outline.set_visible(False)


def _means(settings: Sequence[Setting]) -> list[float]:
    return [s.mean_and_std()[0] or 0.0 for s in settings]


def draw_sweep_curves(sweep: Sweep) -> Figure:
    """Training loss and validation accuracy of every job; a colour for each of the best settings, a line a seed."""
    short = short_names(sweep.keys)
    labels = [
        ", ".join(f"{short[key]} {format_value(setting.values[key])}" for key in sweep.keys) or "all jobs"
        for setting in sweep.settings[:NAMED]
    ]
    longest = max(map(len, labels), default=0)
    columns = 1 if longest > 70 else 2 if longest > 32 else 4
    figure = Figure(figsize=(12, 4.3 + 0.22 * -(-len(labels) // columns)), layout="constrained")
    axes = figure.subplots(1, 2)
    for place, setting in reversed(list(enumerate(sweep.settings))):
        named = place < NAMED
        style: dict[str, Any] = {"color": GREY, "linewidth": 0.7, "alpha": 0.4}
        if named:
            style = {"color": PALETTE[place], "linewidth": 1.3, "alpha": 0.9}
        for number, job in enumerate(setting.jobs):
            for axis, key in zip(axes, ("train_loss", "validation_accuracy"), strict=True):
                points = [(row["epoch"], row[key]) for row in job.history if row.get(key) is not None]
                axis.plot(
                    [epoch for epoch, _ in points],
                    [value for _, value in points],
                    marker="." if len(points) < 15 else None,
                    linestyle="--" if job.state in ("pruned", "failed", "stopped") else "-",
                    label=labels[place] if named and number == 0 else None,
                    **style,
                )
    axes[0].set(title="Training loss", ylabel="training loss")
    axes[1].set(title="Validation accuracy (dashed: not finished)", ylabel=_ACCURACY)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        _bare(axis)
    handles, texts = axes[1].get_legend_handles_labels()
    if handles:
        more = len(sweep.settings) - NAMED
        figure.legend(
            handles[::-1],
            texts[::-1],
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            title="best first" + (f" ({more} more in grey)" if more > 0 else ""),
            fontsize=9,
        )
    return figure


class _Scale:
    """Places one key's values on an axis: numbers by size (by their logarithm, if they span much), others in a row."""

    def __init__(self, values: Sequence[Any], even: bool = False) -> None:
        self.numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        self.values = sorted({self._hashable(v) for v in values})
        self.even = even or not self.numeric
        self.log = self.numeric and self.values[0] > 0 and self.values[-1] / self.values[0] >= 8

    def _hashable(self, value: Any) -> Any:
        return value if self.numeric else format_value(value)

    def place(self, value: Any) -> float:
        if self.even:
            return float(self.values.index(self._hashable(value)))
        return math.log10(value) if self.log else float(value)

    def ticks(self, most: int = 12) -> tuple[list[float], list[str]]:
        """Return places and texts: of the values themselves, or, where there are many numbers, of even steps."""
        values = self.values
        if len(values) > most and not self.even:
            places = np.linspace(self.place(values[0]), self.place(values[-1]), most).tolist()
            return places, [f"{10**place if self.log else place:.2g}" for place in places]
        if len(values) > most:
            values = [values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int)]
        return [self.place(v) for v in values], [format_value(v) for v in values]


def draw_one_key(settings: Sequence[Setting], keys: Sequence[str]) -> Figure:
    """Validation accuracy against the one swept key: mean ± std, and every seed as a dot."""
    [key] = keys
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    scale = _Scale([s.values[key] for s in settings])
    ordered = sorted(settings, key=lambda s: scale.place(s.values[key]))
    places = [scale.place(s.values[key]) for s in ordered]
    for place, setting in zip(places, ordered, strict=True):
        axis.plot([place] * len(setting.scores()), setting.scores(), ".", color=GREY, zorder=2)
    stds = [s.mean_and_std()[1] or 0.0 for s in ordered]
    line = "o-" if scale.numeric else "o"
    axis.errorbar(places, _means(ordered), stds, fmt=line, color=BLUE, capsize=4, zorder=3)
    tick_places, texts = scale.ticks()
    long = sum(map(len, texts)) > 60
    axis.set_xticks(tick_places, texts, rotation=45 if long else 0, ha="right" if long else "center")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.margins(x=0.08, y=0.12)
    axis.set(title="Validation accuracy (mean ± std; a dot a seed)", xlabel=plain_name(key), ylabel=_ACCURACY)
    _bare(axis)
    return figure


def draw_two_keys(settings: Sequence[Setting], keys: Sequence[str]) -> Figure:
    """A heat map of the mean accuracy over two keys; points in their plane where values hardly repeat."""
    columns, rows = (_Scale([s.values[key] for s in settings], even=True) for key in keys)
    cells = len(columns.values) * len(rows.values)
    if cells > _CELLS or cells > 4 * len(settings):
        return _draw_points(settings, keys)
    grid = np.full((len(rows.values), len(columns.values)), np.nan)
    figure = Figure(figsize=(3.2 + 1.05 * grid.shape[1], 2.0 + 0.75 * grid.shape[0]), layout="constrained")
    axis = figure.subplots()
    middle = (min(_means(settings)) + max(_means(settings))) / 2
    for setting in settings:
        x, y = (int(s.place(setting.values[key])) for s, key in zip((columns, rows), keys, strict=True))
        mean, std = setting.mean_and_std()
        assert mean is not None
        grid[y, x] = mean
        text = f"{mean:.1%}" + (f"\n± {100 * std:.1f}" if std is not None else "")
        colour = "white" if mean > middle else "black"
        axis.text(x, y, text, ha="center", va="center", fontsize=9, color=colour)
    image = axis.imshow(grid, cmap="Blues", origin="lower", aspect="auto")
    axis.set_xticks(range(grid.shape[1]), [format_value(v) for v in columns.values])
    axis.set_yticks(range(grid.shape[0]), [format_value(v) for v in rows.values])
    title = "Validation accuracy\n(mean ± std over seeds)"
    axis.set(xlabel=plain_name(keys[0]), ylabel=plain_name(keys[1]), title=title)
    axis.spines[:].set_visible(False)
    _colour_bar(axis, image)
    return figure


def _draw_points(settings: Sequence[Setting], keys: Sequence[str]) -> Figure:
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axis = figure.subplots()
    scales = [_Scale([s.values[key] for s in settings]) for key in keys]
    ordered = settings[::-1]  # the best on top
    x, y = ([scale.place(s.values[key]) for s in ordered] for scale, key in zip(scales, keys, strict=True))
    dots = axis.scatter(x, y, c=_means(ordered), cmap="viridis", s=55, edgecolor="white", linewidth=0.6)
    axis.scatter(x[-1], y[-1], s=170, facecolor="none", edgecolor=ORANGE, linewidth=1.8)
    for scale, line, key in zip(scales, (axis.xaxis, axis.yaxis), keys, strict=True):
        line.set_label_text(plain_name(key))
        if scale.log:
            line.set_major_formatter(lambda place, _: f"{10**place:.2g}")
        elif scale.even:
            line.set_ticks(*scale.ticks())
    axis.set_title("Validation accuracy (ring: the best)")
    _bare(axis)
    _colour_bar(axis, dots)
    return figure


def draw_parallel(settings: Sequence[Setting], keys: Sequence[str]) -> Figure:
    """Parallel coordinates: an axis a key and one for the accuracy, a line a setting, the best on top."""
    figure = Figure(figsize=(max(7.0, 1.9 * (len(keys) + 1)), 4.8), layout="constrained")
    axis = figure.subplots()
    means = _means(settings)
    scales = [_Scale([s.values[key] for s in settings]) for key in keys]
    bounds = [(min(map(s.place, s.values)), max(map(s.place, s.values))) for s in scales]
    bounds.append((min(means), max(means)))

    def height(value: float, which: int) -> float:
        low, high = bounds[which]
        return (value - low) / (high - low) if high > low else 0.5

    shades = matplotlib.colormaps["viridis"]
    for place, (setting, mean) in reversed(list(enumerate(zip(settings, means, strict=True)))):
        values = [*(scale.place(setting.values[key]) for scale, key in zip(scales, keys, strict=True)), mean]
        style: dict[str, Any] = {"color": shades(height(mean, len(keys))), "linewidth": 1.2, "alpha": 0.75}
        if place == 0:
            style = {"color": ORANGE, "linewidth": 2.4}
        axis.plot([height(value, which) for which, value in enumerate(values)], **style)
    accuracies = np.linspace(*bounds[-1], 5).tolist()
    ticks = [*(scale.ticks(7) for scale in scales), (accuracies, [f"{value:.1%}" for value in accuracies])]
    for which, (places, texts) in enumerate(ticks):
        axis.axvline(which, color=GREY, linewidth=0.8, zorder=1)
        left = which < len(keys)  # of its axis
        for value, text in zip(places, texts, strict=True):
            axis.annotate(
                text,
                (which, height(value, which)),
                (-4 if left else 6, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
                zorder=5,
            )
    names = short_names(keys)
    axis.set_xticks(range(len(ticks)), [*(names[key] for key in keys), "validation\naccuracy"])
    axis.set_yticks([])
    axis.set_xlim(-0.45, len(keys) + 0.4)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_title("Settings and their validation accuracy (orange: the best)")
    return figure
