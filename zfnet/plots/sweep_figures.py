"""The figures of a sweep: curves of all jobs, and the objective against the swept keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from zfnet.plots.sweep import Setting, Sweep, say, short_names

GREY, ORANGE, BLUE = "#8c959f", "#bc4c00", "#0969da"
NAMED = 8  # settings with a colour and a name of their own; the rest is grey
_PALETTE = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#9a6700", "#1b7c83", "#bf3989")
_CELLS = 400  # a heat map with more cells is a search, and is drawn as points


def draw_sweep(sweep: Sweep) -> dict[str, Figure]:
    """Return the figures that suit this sweep, by name."""
    figures: dict[str, Figure] = {}
    if any(job.history for job in sweep.jobs):
        figures["curves"] = draw_sweep_curves(sweep)
    scored = [s for s in sweep.settings if s.scores()]
    if len(scored) < 2 or not sweep.keys:
        return figures
    if len(sweep.keys) == 1:
        figures["objective"] = draw_one_key(scored, sweep.keys[0])
    elif len(sweep.keys) == 2:
        figures["objective"] = draw_two_keys(scored, sweep.keys)
    else:
        figures["objective"] = draw_parallel(scored, sweep.keys)
    return figures


def _bare(axis: Axes) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _label(setting: Setting, keys: Sequence[str], short: dict[str, str]) -> str:
    return ", ".join(f"{short[key]} {say(setting.values[key])}" for key in keys) or "all jobs"


def draw_sweep_curves(sweep: Sweep) -> Figure:
    """Training loss and validation accuracy of every job; a colour for each of the best settings, a line a seed."""
    labels = [_label(s, sweep.keys, short_names(sweep.keys)) for s in sweep.settings[:NAMED]]
    columns = (
        1 if max(map(len, labels), default=0) > 70 else 2 if max(map(len, labels), default=0) > 32 else 4
    )
    rows = -(-len(labels) // columns)
    figure = Figure(figsize=(12, 4.3 + 0.22 * rows), layout="constrained")
    axes = figure.subplots(1, 2)
    for place, setting in reversed(list(enumerate(sweep.settings))):
        named = place < NAMED
        label = labels[place] if named else None
        for job in setting.jobs:
            epochs = [row["epoch"] for row in job.history]
            for axis, key in zip(axes, ("train_loss", "validation_accuracy"), strict=True):
                points = [(e, row[key]) for e, row in zip(epochs, job.history, strict=True) if row.get(key)]
                axis.plot(
                    [e for e, _ in points],
                    [v for _, v in points],
                    marker="." if len(points) < 15 else None,
                    color=_PALETTE[place] if named else GREY,
                    linewidth=1.3 if named else 0.7,
                    alpha=0.9 if named else 0.4,
                    linestyle="--" if job.state in ("pruned", "failed", "stopped") else "-",
                    label=label,
                    zorder=3 if named else 2,
                )
            label = None
    for axis, title in zip(axes, ("Training loss", "Validation accuracy"), strict=True):
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        _bare(axis)
    axes[1].yaxis.set_major_formatter("{x:.0%}")
    handles, labels = axes[1].get_legend_handles_labels()
    if handles:
        more = len(sweep.settings) - NAMED
        title = "best first" + (f" ({more} more in grey)" if more > 0 else "")
        figure.legend(
            handles[::-1],
            labels[::-1],
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            title=title,
            fontsize=9,
        )
    return figure


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class _Scale:
    """Places one key's values on an axis: numbers by size (by their logarithm, if they span much), others in a row."""

    def __init__(self, values: Sequence[Any], even: bool = False) -> None:
        self.numeric = all(_is_number(v) for v in values)
        self.values = sorted(set(values)) if self.numeric else sorted({_hashable(v) for v in values}, key=str)
        self.even = even or not self.numeric
        self.log = self.numeric and self.values[0] > 0 and self.values[-1] / self.values[0] >= 8

    def place(self, value: Any) -> float:
        if self.even:
            return float(self.values.index(value if self.numeric else _hashable(value)))
        return math.log10(value) if self.log else float(value)

    def ticks(self, most: int = 12) -> tuple[list[float], list[str]]:
        """Return places and texts: of the values themselves, or, where there are many numbers, of even steps."""
        values = self.values
        if len(values) <= most:
            return [self.place(v) for v in values], [say(v) for v in values]
        if self.even:
            values = [values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int)]
            return [self.place(v) for v in values], [say(v) for v in values]
        places = np.linspace(self.place(values[0]), self.place(values[-1]), most).tolist()
        return places, [f"{10**place if self.log else place:.2g}" for place in places]


def _hashable(value: Any) -> Any:
    return str(value) if isinstance(value, (list, dict)) else say(value)


def draw_one_key(settings: Sequence[Setting], key: str) -> Figure:
    """The objective against the one swept key: mean ± std, and every seed as a dot."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    scale = _Scale([s.values[key] for s in settings])
    for setting in settings:
        place = scale.place(setting.values[key])
        axis.plot([place] * len(setting.scores()), setting.scores(), ".", color=GREY, zorder=2)
    ordered = sorted(settings, key=lambda s: scale.place(s.values[key]))
    places = [scale.place(s.values[key]) for s in ordered]
    means = [s.mean_and_std()[0] or 0.0 for s in ordered]
    stds = [s.mean_and_std()[1] or 0.0 for s in ordered]
    axis.errorbar(places, means, stds, fmt="o-" if scale.numeric else "o", color=BLUE, capsize=4, zorder=3)
    _set_ticks(axis, scale)
    axis.yaxis.set_major_formatter("{x:.1%}")
    axis.margins(x=0.08, y=0.12)
    axis.set(title="Validation accuracy (mean ± std; a dot a seed)", xlabel=key)
    _bare(axis)
    return figure


def _set_ticks(axis: Axes, scale: _Scale) -> None:
    places, texts = scale.ticks()
    long = sum(len(t) for t in texts) > 60
    axis.set_xticks(places, texts, rotation=45 if long else 0, ha="right" if long else "center")


def draw_two_keys(settings: Sequence[Setting], keys: Sequence[str]) -> Figure:
    """A heat map of the mean objective over two keys; points in their plane where values hardly repeat."""
    columns, rows = (_Scale([s.values[key] for s in settings], even=True) for key in keys)
    cells = len(columns.values) * len(rows.values)
    if cells > _CELLS or cells > 4 * len(settings):
        return _draw_points(settings, keys)
    grid = np.full((len(rows.values), len(columns.values)), np.nan)
    figure = Figure(figsize=(3.2 + 1.05 * grid.shape[1], 2.0 + 0.75 * grid.shape[0]), layout="constrained")
    axis = figure.subplots()
    for setting in settings:
        y, x = int(rows.place(setting.values[keys[1]])), int(columns.place(setting.values[keys[0]]))
        grid[y, x] = setting.mean_and_std()[0]
    image = axis.imshow(grid, cmap="Blues", origin="lower", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for setting in settings:
        y, x = int(rows.place(setting.values[keys[1]])), int(columns.place(setting.values[keys[0]]))
        mean, std = setting.mean_and_std()
        assert mean is not None
        text = f"{mean:.1%}" + (f"\n± {100 * std:.1f}" if std is not None else "")
        axis.text(
            x, y, text, ha="center", va="center", fontsize=9, color="white" if mean > middle else "black"
        )
    axis.set_xticks(range(grid.shape[1]), [say(v) for v in columns.values])
    axis.set_yticks(range(grid.shape[0]), [say(v) for v in rows.values])
    axis.set(xlabel=keys[0], ylabel=keys[1], title="Validation accuracy (mean ± std over seeds)")
    axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axis, format=StrMethodFormatter("{x:.1%}"), shrink=0.9).outline.set_visible(
        False
    )
    return figure


def _draw_points(settings: Sequence[Setting], keys: Sequence[str]) -> Figure:
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axis = figure.subplots()
    scales = [_Scale([s.values[key] for s in settings]) for key in keys]
    ordered = settings[::-1]  # the best on top
    points = [[scale.place(s.values[key]) for s in ordered] for scale, key in zip(scales, keys, strict=True)]
    dots = axis.scatter(
        points[0], points[1], c=_means(ordered), cmap="viridis", s=55, edgecolor="white", linewidth=0.6
    )
    axis.scatter(points[0][-1], points[1][-1], s=170, facecolor="none", edgecolor=ORANGE, linewidth=1.8)
    for scale, which, key in zip(scales, (axis.xaxis, axis.yaxis), keys, strict=True):
        which.set_label_text(key)
        if scale.log:
            which.set_major_formatter(lambda place, _: f"{10**place:.2g}")
        elif scale.even:
            places, texts = scale.ticks()
            which.set_ticks(places, texts)
    axis.set_title("Validation accuracy (ring: the best)")
    _bare(axis)
    figure.colorbar(dots, ax=axis, format=StrMethodFormatter("{x:.1%}"), shrink=0.9).outline.set_visible(
        False
    )
    return figure


def _means(settings: Sequence[Setting]) -> list[float]:
    return [s.mean_and_std()[0] or 0.0 for s in settings]


def draw_parallel(settings: Sequence[Setting], keys: Sequence[str]) -> Figure:
    """Parallel coordinates: an axis a key and one for the objective, a line a setting, the best on top."""
    figure = Figure(figsize=(max(7.0, 1.9 * (len(keys) + 1)), 4.8), layout="constrained")
    axis = figure.subplots()
    means = _means(settings)
    scales = [_Scale([s.values[key] for s in settings]) for key in keys]
    bounds = [(min(map(s.place, s.values)), max(map(s.place, s.values))) for s in scales]
    bounds.append((min(means), max(means)))
    colour = Normalize(min(means), max(means))
    shades = matplotlib.colormaps["viridis"]

    def height(value: float, which: int) -> float:
        low, high = bounds[which]
        return (value - low) / (high - low) if high > low else 0.5

    for place, (setting, mean) in reversed(list(enumerate(zip(settings, means, strict=True)))):
        places = [scale.place(setting.values[key]) for scale, key in zip(scales, keys, strict=True)]
        line = [height(v, i) for i, v in enumerate([*places, mean])]
        axis.plot(
            range(len(line)),
            line,
            color=ORANGE if place == 0 else shades(colour(mean)),
            linewidth=2.4 if place == 0 else 1.2,
            alpha=1.0 if place == 0 else 0.75,
        )
    for which, scale in enumerate(scales):
        axis.axvline(which, color=GREY, linewidth=0.8, zorder=1)
        for value, text in zip(*scale.ticks(7), strict=True):
            axis.annotate(
                text,
                (which, height(value, which)),
                (-4, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
                zorder=5,
            )
    last = len(scales)
    axis.axvline(last, color=GREY, linewidth=0.8, zorder=1)
    for value in np.linspace(*bounds[-1], 5):
        axis.annotate(
            f"{value:.1%}",
            (last, height(value, last)),
            (6, 0),
            textcoords="offset points",
            ha="left",
            va="center",
            fontsize=8,
        )
    short = short_names(keys)
    axis.set_xticks(range(last + 1), [*(short[key] for key in keys), "validation\naccuracy"])
    axis.set_yticks([])
    axis.set_xlim(-0.45, last + 0.4)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_title("Settings and what they reach on validation (orange: the best)")
    return figure
