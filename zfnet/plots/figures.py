"""The style of all figures: `zfnet.mplstyle`, the palette, and the way to make and save a figure.

matplotlib takes a quarter of a second to import, so only functions that draw import it; training starts without it.
"""

import contextlib
import functools
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zfnet.config.errors import log
from zfnet.runs.directory import write_atomically
from zfnet.runs.tables import shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any

BLUE, ORANGE, PURPLE, GREEN, RED = "#0969da", "#bc4c00", "#8250df", "#1a7f37", "#cf222e"
LIGHT_BLUE, PALE_BLUE = "#54aeff", "#b6e3ff"
INK, SOFT, PALE, PALEST, WHITE = "#24292f", "#57606a", "#d0d7de", "#f6f8fa", "#ffffff"
CSS = f":root{{--ink:{INK};--soft:{SOFT};--pale:{PALE};--palest:{PALEST}}}"  # for HTML pages
PALETTE = (BLUE, ORANGE, PURPLE, GREEN, RED, "#9a6700", LIGHT_BLUE, "#ff9bce", SOFT, "#7ee787")
SPLIT_COLOURS = {"train": BLUE, "validation": ORANGE, "test": PURPLE}
# Chinese and Japanese fonts of Linux, Windows and macOS, for letters that matplotlib's default font does not have
_FALLBACKS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Noto Sans JP", "WenQuanYi Micro Hei"),
    *("WenQuanYi Zen Hei", "Microsoft YaHei", "Yu Gothic", "PingFang SC", "Hiragino Sans"),
)
_STYLE = Path(__file__).with_name("zfnet.mplstyle")


def plain(names: Iterable[str], width: int = 100) -> list[str]:
    """Shorten names for a figure, and escape dollar signs, because matplotlib draws text between two as a formula."""
    return [shorten(name, width).replace("$", r"\$") for name in names]


def epoch_axis(axis: Axes, epochs: Sequence[Any]) -> None:
    """Label the x axis with whole epochs; centre a single epoch."""
    axis.set_xlabel("epoch")
    if len(set(epochs)) == 1:
        axis.set(xlim=(epochs[0] - 1, epochs[0] + 1), xticks=epochs[:1])
    else:
        axis.locator_params(axis="x", integer=True)


def plot_history(
    axes: Sequence[Axes], history: Sequence[Mapping[str, Any]], columns: Sequence[str], **style: Any
) -> None:
    """Plot one column of a history against the epoch in each of the axes; `style` is passed to `Axes.plot`."""
    for axis, column in zip(axes, columns, strict=True):
        points = [(row["epoch"], row[column]) for row in history if row.get(column) is not None]
        marker = "." if len(points) < 15 else None
        axis.plot([epoch for epoch, _ in points], [value for _, value in points], marker=marker, **style)


@contextlib.contextmanager
def styled() -> Iterator[None]:
    """Apply the project's style within a block or a decorated function, then restore the caller's settings."""
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context({"axes.prop_cycle": cycler(color=PALETTE), "font.family": _families()}, _STYLE):
        yield


@functools.cache
def _families() -> list[str]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}  # matplotlib warns about fonts that are not installed
    return ["DejaVu Sans", *(name for name in _FALLBACKS if name in installed)]


_warn_once = functools.cache(log.warning)


def new_figure(**settings: Any) -> Figure:
    """Return an empty figure; `settings` are passed to `matplotlib.figure.Figure`."""
    from matplotlib.figure import Figure

    return Figure(**settings)


def save_figure(figure: Figure, path: Path) -> bytes:
    """Write a PNG and return its bytes; it names no program version, so that equal figures give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with styled(), warnings.catch_warnings(record=True) as caught:  # ticks are drawn when a figure is saved
        warnings.filterwarnings("always", "Glyph .* missing")
        figure.savefig(buffer, metadata={"Software": None})
    for warning in caught:
        if str(warning.message).startswith("Glyph"):
            _warn_once("some letters are empty boxes in figures: install a font that has them, such as Noto Sans CJK")
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    write_atomically(path, buffer.getvalue())
    return buffer.getvalue()
