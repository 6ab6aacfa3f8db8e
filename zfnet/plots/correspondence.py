"""The figure of a correspondence job: what was masked (paper, Fig. 8), and the numbers of Table 1 as bars."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from matplotlib.figure import Figure
from torch import Tensor

from zfnet.explain.correspondence import Agreement
from zfnet.plots.palette import PALE
from zfnet.plots.pictures import mosaic


def draw_correspondence(
    table: Mapping[str, Mapping[str, Agreement]], examples: Mapping[str, Tensor]
) -> Figure:
    """Left: a column of masked images for each part. Right: Δ by part for each layer, the last part at random.

    table: layer → part → what was found; examples: part → uint8 [M, S, S, 3].
    """
    parts, layers = list(examples), list(table)
    figure = Figure(figsize=(1.5 * len(parts) + 3.3 * len(layers), 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5 * len(parts), 3.3 * len(layers)))  # type: ignore[misc]
    panel = left.subplots()
    count, size = len(examples[parts[0]]), examples[parts[0]].shape[1]
    gap = max(2, size // 24)
    # a row an image, a column a part
    tiles = [examples[part][n] for n in range(count) for part in parts]
    sheet = mosaic(torch.stack(tiles), len(parts), gap)
    panel.imshow(sheet)
    panel.set_xticks([k * (size + gap) + size / 2 for k in range(len(parts))], parts, fontsize=9)
    panel.set(yticks=[], title=f"Masks on the first {count} images")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    for axis, (layer, found) in zip(
        right.subplots(1, len(layers), squeeze=False, sharey=True)[0], table.items(), strict=True
    ):
        names = list(found)
        for y, name in enumerate(names):
            one = found[name]
            colour = PALE if one.p is None else "#54aeff"
            axis.barh(y, one.delta, xerr=one.spread, color=colour, ecolor="#57606a", capsize=2, height=0.65)
            text = "" if one.p is None else f"  p = {one.p:.3g}"
            axis.text(one.delta + one.spread, y, f" {one.delta:.3f}{text}", va="center", fontsize=9)
        axis.axvline(found[names[-1]].delta, color="#57606a", ls="--", lw=1)
        axis.set_yticks(range(len(names)), names)
        axis.set(
            title=layer,
            xlabel="mean sign difference Δ\n(small: the part matters alike)",
            xlim=(0, 1.75 * max(a.delta + a.spread for a in found.values())),
        )
        axis.spines[["top", "right"]].set_visible(False)
    right.axes[0].invert_yaxis()
    return figure
