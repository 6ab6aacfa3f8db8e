"""A job of your own: it shows which pixels change the class's score, for any network.

Source: Simonyan et al. 2013, section 3. The control is the map of another class: where the two maps agree, they say
little about the class.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn

from zfnet.config.schema import Config
from zfnet.explain.selection import Look, choose_images
from zfnet.plots.figures import new_figure, plain, save_figure, styled
from zfnet.plots.pictures import show, to_pixels
from zfnet.runs.session import own_directory
from zfnet.training.loaded import LoadedRun

log = logging.getLogger("zfnet")


@dataclass(kw_only=True)
class Saliency(Look):
    """count: number of images, taken from the classes in turn, unless `images=[…]` names files"""

    reads_images: ClassVar[bool] = True

    count: Annotated[int, Field(ge=1, le=24)]

    def main(self, config: Config, output: Path) -> None:
        """Write figures/saliency.png and saliency.csv."""
        loaded = LoadedRun(config)
        chosen = choose_images(loaded, config, self.count)
        maps = saliency(loaded.model, chosen.inputs, chosen.labels)
        others = saliency(loaded.model, chosen.inputs, (chosen.labels + 1) % len(loaded.classes))
        agreement = [
            float(torch.corrcoef(torch.stack(pair).flatten(1))[0, 1]) for pair in zip(maps, others, strict=True)
        ]
        with own_directory(config, output) as run:
            rows = [
                {"image": name, "largest": float(m.max()), "agreement_with_other_class": r}
                for name, m, r in zip(chosen.names, maps, agreement, strict=True)
            ]
            run.write_csv("saliency.csv", rows)
            pixels = to_pixels(chosen.inputs, loaded.data)
            save_figure(draw(pixels, maps, others, chosen.names), run.figures / "saliency.png")
            log.info("agreement with the map of another class: %.2f on average", sum(agreement) / len(agreement))


def saliency(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return |∂ logit of the label / ∂ pixel|, the maximum over the channels: [N, S, S] on the CPU."""
    inputs = inputs.detach().requires_grad_()
    score = model(inputs).gather(1, labels[:, None]).sum()
    (gradient,) = torch.autograd.grad(score, inputs)
    return gradient.abs().amax(1).cpu()


@styled()
def draw(pixels: Tensor, maps: Tensor, others: Tensor, names: tuple[str, ...]) -> Figure:
    """Draw each image with its map and the control. The brightest colour is the largest value of both maps."""
    figure = new_figure(figsize=(6, 2.1 * len(names)), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(names), 3, squeeze=False)):
        largest = float(torch.maximum(maps[row], others[row]).max())
        show(axes[0], pixels[row])
        show(axes[1], maps[row], cmap="magma", vmin=0, vmax=largest)
        show(axes[2], others[row], cmap="magma", vmin=0, vmax=largest)
        axes[0].set_xlabel(plain([names[row]])[0])
        axes[1].set_xlabel("its class")
        axes[2].set_xlabel("another class")
    return figure
