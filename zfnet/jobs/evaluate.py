"""job=evaluate: measure a run's accuracy on a split of its own data, or on other images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torchvision.transforms.functional import hflip, ten_crop

from zfnet.config.errors import UserError, log
from zfnet.config.schema import Config, DataConfig, Job
from zfnet.data import ImageSet
from zfnet.jobs.predict import prediction_rows
from zfnet.plots.figures import save_figure
from zfnet.plots.results import draw_results, draw_samples, log_per_class, log_result, results_of
from zfnet.runs.provenance import describe_environment
from zfnet.runs.session import own_directory
from zfnet.training.loaded import LoadedRun
from zfnet.training.loop import evaluate
from zfnet.training.metrics import Evaluation


@dataclass(kw_only=True)
class EvaluateJob(Job):
    reads_run: ClassVar[str] = "needed"

    split: Literal["test", "validation", "train", "all"]
    tta: Literal["none", "flip", "flip_shift", "tencrop"]
    crop_ratio: Annotated[float, Field(gt=0, le=1)]

    def main(self, config: Config, output: Path) -> None:
        """Evaluate one split; write results.json, predictions.csv and figures. Raises UserError for unknown classes."""
        loaded = LoadedRun(config)
        images, data = loaded.split(self.split), loaded.data
        model: nn.Module = loaded.model
        if self.tta != "none":
            stored = data.crop_size or images.images.shape[1]
            model = MeanOfViews(model, self.tta, data.image_size, max(1, round(data.image_size / stored))).eval()
        if self.tta == "tencrop":
            data = data_for_tencrop(data, images.images.shape[1], self.crop_ratio)
        with own_directory(config, output) as run:
            runtime, source = loaded.runtime, str(loaded.source.folder)
            what = self.split if self.tta == "none" else f"{self.split}, tta {self.tta}"
            log.info("%s on %s (%s), %s images", source, data.title, what, f"{len(images):,}")
            log.info(runtime.describe())
            environment = describe_environment(runtime.device, config.trainer.name, config.imports)
            environment |= {"data_fingerprint": loaded.splits.fingerprint, "plan": runtime.describe()}
            run.write_json("environment.json", environment)
            evaluation = evaluate(model, loaded.batches(images, data), runtime, self.split, probabilities=True)
            result = results_of(evaluation, images.classes)
            shown = {"name": data.name, "root": data.root}
            about = {"run": source, "data": shown, "tta": self.tta, **loaded.splits.remarks()}
            run.write_json("results.json", {self.split: result, **about})
            log_result(self.split, result)
            log_per_class(result)
            draw_results(run, evaluation, images, what)
            run.write_csv("predictions.csv", _rows(evaluation, images, self.split, data.root))
            if len(wrong := wrong_by_confidence(evaluation)):
                save_figure(draw_samples(images, evaluation, wrong, what), run.figures / "worst.png")
            else:
                log.info("all images are correct, so there is no figures/worst.png")
            if not math.isfinite(evaluation.loss):
                raise UserError(f"run={source}: the loss is {evaluation.loss}; its network's outputs are not finite")


def wrong_by_confidence(evaluation: Evaluation) -> Tensor:
    """Return the indices of the images with a wrong prediction, the most confident first."""
    wrong = (evaluation.predictions != evaluation.labels).nonzero().flatten()
    return wrong[evaluation.confidences[wrong].argsort(descending=True, stable=True)]


def _rows(evaluation: Evaluation, images: ImageSet, split: str, root: str | None) -> list[dict[str, Any]]:
    """Return the rows of predictions.csv, which name images by path or, without files, by their number in the split."""
    assert evaluation.probabilities is not None
    files = [str(Path(root or "", images.files[row])) for row in images.rows.tolist()] if images.files else []
    names = files or [f"{split} {number}" for number in range(len(images))]
    labels, predicted = evaluation.labels.tolist(), evaluation.predictions.tolist()
    return prediction_rows(names, evaluation.probabilities, images.classes, labels, predicted)


class MeanOfViews(nn.Module):
    """Test-time augmentation: the log of the mean probabilities over several views of each image.

    Source: Krizhevsky et al. 2012, section 4.1; the paper, section 3. flip_shift: Jordan 2024 (airbench).

    views: `flip` (the image and its mirror image), `flip_shift` (also both shifted by `shift` pixels to the upper left
        and to the lower right, with reflected edges; the four shifted views weigh as much as the other two) or
        `tencrop` (four corners and the centre, and their mirror images; images must be larger than the network's
        input, see `data_for_tencrop`)
    image_size: side S of the network's input, in pixels
    shift: the shift of `flip_shift`, in pixels of the network's input
    """

    def __init__(self, model: nn.Module, views: str, image_size: int, shift: int = 1) -> None:
        super().__init__()
        self.model, self.views, self.image_size, self.shift = model, views, image_size, shift

    def forward(self, images: Tensor) -> Tensor:
        """Return log-probabilities [N, classes] for images [N, 3, h, w]."""
        # run one view at a time, because ten at once would need ten times the memory
        views = [self.model(view).float().softmax(1) for view in self._views(images)]
        mean = torch.stack(views).mean(0)
        if self.views == "flip_shift":
            mean = (torch.stack(views[:2]).mean(0) + torch.stack(views[2:]).mean(0)) / 2
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()

    def _views(self, images: Tensor) -> Iterator[Tensor]:
        if self.views != "tencrop":
            yield from (images, hflip(images))
        if self.views == "flip_shift":
            shift = min(self.shift, self.image_size - 1)
            padded = F.pad(images, (shift,) * 4, mode="reflect")
            for first in (0, 2 * shift):
                moved = padded[:, :, first : first + self.image_size, first : first + self.image_size]
                yield from (moved, hflip(moved))
        if self.views == "tencrop":
            yield from ten_crop(images, [self.image_size, self.image_size])


def data_for_tencrop(data: DataConfig, stored_size: int, crop_ratio: float) -> DataConfig:
    """Return a config that makes images larger than the network's input, so that the ten crops have the input's size.

    The ratio of crop to image is data.crop_size / `stored_size` if data.crop_size is set, otherwise `crop_ratio`.
    """
    ratio = data.crop_size / stored_size if data.crop_size else crop_ratio
    return replace(data, crop_size=None, image_size=round(data.image_size / ratio))
