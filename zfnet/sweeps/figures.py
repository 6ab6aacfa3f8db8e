"""The figures of a sweep: curves of all jobs, and validation accuracy against the swept keys."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from zfnet.config.instantiate import is_number
from zfnet.plots.figures import INK, ORANGE, PALETTE, SOFT, WHITE, epoch_axis, new_figure, plain, plot_history, styled
from zfnet.runs.statistics import LEVEL
from zfnet.sweeps.summary import Setting, Sweep, format_value, group_name, p_against_best, short_names

NAMED = 8  # settings with their own colour and name; the others are grey
_MAX_HEAT_MAP_CELLS = 400  # a heat map with more cells is drawn as points
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
        if hidden := len(sweep.settings) - len(scored):
            note = f"not shown: {hidden} of {len(sweep.settings)} settings, which have no result"
            figures["objective"].suptitle(note, fontsize=9)
    return figures


@styled()
def draw_sweep_curves(sweep: Sweep) -> Figure:
    """Draw all jobs' training loss and validation accuracy: a colour for each of the best settings, a line per seed."""
    short = short_names(sweep.keys)
    labels = plain(
        ", ".join(f"{short[key]} {format_value(setting.values[key])}" for key in sweep.keys) or "all jobs"
        for setting in sweep.settings[:NAMED]
    )
    longest = max(map(len, labels), default=0)
    columns = 1 if longest > 70 else 2 if longest > 32 else 4
    figure = new_figure(figsize=(11, 4 + 0.2 * -(-len(labels) // columns)))
    axes = figure.subplots(1, 2)
    for rank, setting in reversed(list(enumerate(sweep.settings))):
        style: dict[str, Any] = {"color": SOFT, "linewidth": 0.7, "alpha": 0.4}
        if rank < NAMED:
            style = {"color": PALETTE[rank], "label": labels[rank]}
        for job in setting.jobs:
            line = "-" if job.state == "done" else "--"
            plot_history(axes, job.history, ("train_loss", "validation_accuracy"), linestyle=line, **style)
            style.pop("label", None)  # one legend entry for all seeds
    axes[0].set(title="Training loss", ylabel="training loss")
    axes[1].set(title="Validation accuracy (dashed: not finished)", ylabel=_ACCURACY)
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    for axis in axes:
        epoch_axis(axis, [row["epoch"] for job in sweep.jobs for row in job.history])
    handles, texts = axes[1].get_legend_handles_labels()
    if handles:
        more = len(sweep.settings) - NAMED
        title = "best first" + (f" ({more} more in grey)" if more > 0 else "")
        figure.legend(handles[::-1], texts[::-1], loc="outside lower center", ncols=columns, title=title)
    return figure


class _Scale:
    """Places one key's values on an axis: numbers linearly (wide ranges logarithmically), others evenly.

    many: whether there are more numbers than ticks, as in a search; raw: the values themselves, one for each setting
    """

    def __init__(self, key: str, settings: Sequence[Setting], even: bool = False) -> None:
        values = [s.values[key] for s in settings]
        self.numeric = all(map(is_number, values))
        values = [v if is_number(v) else format_value(v) for v in values]
        self.values = sorted(set(values), key=lambda v: (isinstance(v, str), v))  # numbers before null
        self.even = even or not self.numeric
        self.many, self.raw = self.numeric and len(self.values) > 12, values
        self.log = not self.even and self.values[0] > 0 and self.values[-1] / self.values[0] >= 8
        if self.log and self.many:  # the median of a uniform sample is near the arithmetic mean
            low, high = self.values[0], self.values[-1]
            self.log = statistics.median(self.values) < (math.sqrt(low * high) + (low + high) / 2) / 2
        self.places = [self._place(v) for v in values]  # one for each setting

    def _place(self, value: Any) -> float:
        if self.even:
            return float(self.values.index(value))
        return math.log10(value) if self.log else float(value)

    def ticks(self, most: int = 12) -> tuple[list[float], list[str]]:
        """Return places and texts of ticks: at the values or, if there are more than `most` numbers, at even steps."""
        if len(self.values) > most and not self.even:
            places = np.linspace(min(self.places), max(self.places), most).tolist()
            return places, [f"{10**place if self.log else place:.2g}" for place in places]
        kept = np.linspace(0, len(self.values) - 1, min(most, len(self.values))).round().astype(int)
        values = [self.values[i] for i in kept]
        return [self._place(v) for v in values], plain(format_value(v) for v in values)


def _describe_seeds(settings: Sequence[Setting]) -> str:
    """Return the words of a title that say what is drawn for each setting, with the number of seeds."""
    counts = sorted({len(s.scores()) for s in settings})
    if counts == [1]:
        return "one run each"
    return f"mean ± std over seeds, n = {counts[0]}" + (f" to {counts[-1]}" if len(counts) > 1 else "")


def _means(settings: Sequence[Setting]) -> list[float]:
    return [s.mean_and_std()[0] or 0.0 for s in settings]


@styled()
def draw_one_key(settings: Sequence[Setting], keys: Sequence[str]) -> Figure:
    """Draw validation accuracy against the one swept key: mean ± std, and every seed as a dot.

    A search, with more values than ticks, becomes a scatter plot, on a log axis if its range is wide.
    """
    figure = new_figure(figsize=(6.4, 4.2))
    axis = figure.subplots()
    scale = _Scale(keys[0], settings)
    search = scale.many
    raw = scale.raw if search else scale.places
    order = np.argsort(raw)
    places, ordered = [raw[i] for i in order], [settings[i] for i in order]
    repeated = max(len(s.scores()) for s in settings) > 1
    if repeated:
        for place, setting in zip(places, ordered, strict=True):
            axis.plot([place] * len(setting.scores()), setting.scores(), ".", color=SOFT, markersize=7)
    stds = [s.mean_and_std()[1] or 0.0 for s in ordered] if repeated else None
    line = "o-" if scale.numeric and not search else "o"
    axis.errorbar(places, _means(ordered), stds, fmt=line, color=PALETTE[0], zorder=3)
    if search:
        axis.set_xscale("log" if scale.log else "linear")
    else:
        tick_places, texts = scale.ticks()
        long = sum(map(len, texts)) > 60
        axis.set_xticks(tick_places, texts, rotation=45 if long else 0, ha="right" if long else "center")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.margins(x=0.08, y=0.12)
    title = f"Validation accuracy ({_describe_seeds(settings)}{'; one dot per seed' if repeated else ''})"
    axis.set(title=title, xlabel=group_name(keys[0]), ylabel=_ACCURACY)
    return figure


@styled()
def draw_two_keys(settings: Sequence[Setting], keys: Sequence[str]) -> Figure:
    """Draw the mean accuracy over two keys: as a heat map, or as points if it has too many or mostly empty cells.

    In the map a frame marks the best setting, and dashed frames mark settings that are not distinguishable from it.
    """
    x, y = (_Scale(key, settings, even=True) for key in keys)
    grid = np.full((len(y.values), len(x.values)), np.nan)
    is_map = grid.size <= min(_MAX_HEAT_MAP_CELLS, 4 * len(settings))
    figure = new_figure(figsize=(3.2 + 1.05 * grid.shape[1], 2 + 0.75 * grid.shape[0]) if is_map else (7, 5))
    axis = figure.subplots()
    means = _means(settings)
    if is_map:
        p = p_against_best(settings)
        unclear = [value is not None and value >= LEVEL for value in p]
        for rank, (setting, mean, column, row) in enumerate(zip(settings, means, x.places, y.places, strict=True)):
            grid[int(row), int(column)] = mean
            if rank == 0 or unclear[rank]:
                dashes = "--" if rank else "-"
                corner = (column - 0.46, row - 0.46)
                axis.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=ORANGE, lw=2, linestyle=dashes))
            std = setting.mean_and_std()[1]
            text = f"{mean:.1%}" + (f"\n± {100 * std:.1f}" if std is not None else "")
            colour = WHITE if mean > (min(means) + max(means)) / 2 else INK
            axis.text(column, row, text, ha="center", va="center", color=colour)
        colours: ScalarMappable = axis.imshow(grid, cmap="Blues", origin="lower", aspect="auto")
        axis.grid(False)
        axis.spines[:].set_visible(False)
        frames = "framed: the best" + ("; dashed: not distinguishable from it" if any(unclear) else "")
        axis.set_title(f"Validation accuracy ({_describe_seeds(settings)})\n{frames}")
    else:
        x, y = (_Scale(key, settings) for key in keys)
        across, up = (scale.raw if scale.many else scale.places for scale in (x, y))
        style: dict[str, Any] = {"cmap": "viridis", "s": 55, "edgecolor": WHITE, "linewidth": 0.6}
        colours = axis.scatter(across[::-1], up[::-1], c=means[::-1], **style)  # draws the best last, on top
        axis.scatter(across[0], up[0], s=170, facecolor="none", edgecolor=ORANGE, linewidth=1.8)
        axis.set_title("Validation accuracy (ring: the best)")
    for scale, name, key in zip((x, y), "xy", keys, strict=True):
        if scale.many and not is_map:
            axis.set(**{f"{name}scale": "log" if scale.log else "linear"})
        else:
            getattr(axis, f"{name}axis").set_ticks(*scale.ticks(20 if is_map else 8))
        axis.set(**{f"{name}label": group_name(key)})
    bar = figure.colorbar(colours, ax=axis, format=PercentFormatter(1), label=_ACCURACY)
    bar.outline.set_visible(False)
    return figure


@styled()
def draw_parallel(settings: Sequence[Setting], keys: Sequence[str]) -> Figure:
    """Draw parallel coordinates: an axis per key and one for the accuracy, a line per setting, the best on top."""
    figure = new_figure(figsize=(max(7.0, 1.9 * (len(keys) + 1)), 4.8))
    axis = figure.subplots()
    means = _means(settings)
    scales = [_Scale(key, settings) for key in keys]
    accuracies = np.linspace(min(means), max(means), 5).tolist()
    ticks = [*(scale.ticks(7) for scale in scales), (accuracies, [f"{value:.1%}" for value in accuracies])]
    columns = [*(scale.places for scale in scales), means]  # each has one place per setting

    def height(value: float, column: int) -> float:
        low, high = min(columns[column]), max(columns[column])
        return (value - low) / (high - low) if high > low else 0.5

    shades = matplotlib.colormaps["viridis"]
    for rank, row in reversed(list(enumerate(zip(*columns, strict=True)))):
        heights = [height(value, column) for column, value in enumerate(row)]
        style: dict[str, Any] = {"color": shades(heights[-1]), "alpha": max(0.15, min(0.75, 15 / len(means)))}
        if rank == 0:
            style = {"color": ORANGE, "linewidth": 2.4}
        axis.plot(heights, **style)
    for column, (places, texts) in enumerate(ticks):
        axis.axvline(column, color=SOFT, linewidth=0.8, zorder=1)
        is_key = column < len(keys)
        place, side = (column - 0.03, "right") if is_key else (column + 0.04, "left")
        box = {"facecolor": WHITE, "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
        for value, text in zip(places, texts, strict=True):
            axis.text(place, height(value, column), text, ha=side, va="center", fontsize=8, bbox=box, zorder=5)
    axis.set_xticks(range(len(ticks)), [*short_names(keys).values(), "validation\naccuracy"])
    axis.set_yticks([])
    axis.set_xlim(-0.45, len(keys) + 0.4)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_title("Settings and their validation accuracy (orange: the best)")
    return figure
