"""The figure of an attribution job: one row an image, one column a method."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from zfnet.explain.attribution import GRAD_CAM, INTEGRATED, Attributions
from zfnet.plots.pictures import on_grey, outline_box

_CUT = 0.99  # of the sizes of integrated gradients: larger ones are drawn as this quantile


def draw_attribution(
    found: Attributions, pictures: Tensor, names: Sequence[str], layer: str, boxes: Tensor | None
) -> Figure:
    """Projections on grey, integrated gradients in red (for) and blue (against), Grad-CAM over the image.

    Each picture is scaled for itself. pictures: uint8 [N, S, S, 3]; boxes: [N, 4] in input pixels, dashed.
    """
    methods = list(found.maps)
    figure = Figure(figsize=(2.35 * (1 + len(methods)), 0.4 + 2.35 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 1 + len(methods), squeeze=False)
    drawn = {name: on_grey(maps) for name, maps in found.maps.items() if maps.shape[1] == 3}
    for row, panels in enumerate(axes):
        panels[0].imshow(pictures[row].numpy())
        panels[0].set_ylabel(names[row], fontsize=9)
        for panel, method in zip(panels[1:], methods, strict=True):
            maps = found.maps[method][row]
            if method == INTEGRATED:
                heat = maps.sum(0).numpy()
                limit = max(float(np.quantile(np.abs(heat), _CUT)), 1e-12)
                panel.imshow(heat, cmap="RdBu_r", vmin=-limit, vmax=limit)
            elif method == GRAD_CAM:
                panel.imshow(pictures[row].float().mean(-1).numpy(), cmap="gray", vmin=0, vmax=255)
                panel.imshow(maps[0].numpy(), cmap="inferno", alpha=0.6, vmin=0)
            else:
                panel.imshow(drawn[method][row].numpy())
        for panel in panels:
            panel.set(xticks=[], yticks=[])
            if boxes is not None:
                outline_box(panel, boxes[row], "#57606a")
    titles = ["image", *(f"{m} ({layer})" if m == GRAD_CAM else m for m in methods)]
    for panel, title in zip(axes[0], titles, strict=True):
        panel.set_title(title, fontsize=10)
    return figure
