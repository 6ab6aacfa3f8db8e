"""job=predict: what a run's network sees in image files."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from zfnet.config.errors import UserError
from zfnet.config.ranges import limits
from zfnet.config.schema import Config, Job
from zfnet.data import preprocess
from zfnet.data.decode import UnreadableImage, fit_square
from zfnet.data.named import NamedImage, find_images
from zfnet.plots.figures import save_figure
from zfnet.plots.predictions import Prediction, draw_predictions, prediction_table, shorten
from zfnet.runs.session import own_directory
from zfnet.runs.weights import weights_hash
from zfnet.training.loaded import PREPROCESSING, LoadedRun

log = logging.getLogger("zfnet")

_USED = ("batch_size", *PREPROCESSING)  # what it takes from `data`
SHOWN = 48  # images in the figure
PICTURE = 160  # pixels a side, at least


@dataclass(kw_only=True)
class PredictJob(Job):
    reads_run: ClassVar[str] = "needed"
    reads_images: ClassVar[bool] = True

    top: int = limits(low=1)

    def main(self, config: Config, output: Path) -> None:
        """Classify the images that `images=[…]` names; an unreadable one is reported, and the rest are done.

        Raises UserError where none can be read.
        """
        if not config.images:
            raise UserError("job=predict needs images, as in 'images=[cat.jpg,photos/,https://…]'")
        for word in config.overrides:
            word = word.lstrip("+~")
            key = word.split("=", 1)[0]
            if key == "data" or (key.startswith("data.") and key.removeprefix("data.") not in _USED):
                raise UserError(f"{word}: job=predict looks at images=[…] and at no data set; leave it out")
        images, problems = find_images(config.images)
        if not images:
            raise _none_readable(problems)
        used = LoadedRun(config)
        if config.job.top > len(used.classes) and any(
            word.startswith("job.top=") for word in config.overrides
        ):
            raise UserError(f"job.top={config.job.top}: the run knows {len(used.classes)} classes")
        with own_directory(config, output) as run:
            predictions: list[Prediction] = []
            for prediction, problem in predict(used, images, config.job.top, config.data.batch_size):
                if problem is None:
                    predictions.append(prediction)
                else:
                    problems[prediction.name] = problem
            run.write_json(
                "predictions.json",
                {
                    "run": str(used.source.folder),
                    "weights_sha256": weights_hash(used.model.state_dict()),
                    "images": [
                        {
                            "image": p.name,
                            "predictions": [{"class": name, "probability": share} for name, share in p.best],
                        }
                        for p in predictions
                    ],
                    "unreadable": [{"image": name, "error": problem} for name, problem in problems.items()],
                },
            )
            for name, problem in problems.items():
                log.warning("not read: %s: %s", shorten(name, 200), problem)
            if not predictions:
                raise _none_readable(problems)
            for line in prediction_table(predictions, shutil.get_terminal_size().columns):
                log.info(line)
            save_figure(draw_predictions(predictions[:SHOWN]), run.figures / "predictions.png")
            if len(predictions) > SHOWN:
                log.info("the figure shows the first %d images", SHOWN)
            log.info(
                "%d of %d images; written to %s", len(predictions), len(predictions) + len(problems), output
            )


@torch.no_grad()
def predict(
    used: LoadedRun, images: Sequence[NamedImage], top: int, batch_size: int
) -> Iterator[tuple[Prediction, str | None]]:
    """Yield for each image its prediction, or what is wrong with it, in order."""

    def load(image: NamedImage, with_picture: bool) -> tuple[np.ndarray, np.ndarray | None] | str:
        try:
            pixels = image.read()
        except UnreadableImage as error:
            return str(error)
        size, fit = used.metadata.stored_size, used.data.fit
        picture = fit_square(pixels, max(size, PICTURE), fit) if with_picture else None
        return fit_square(pixels, size, fit), picture

    done = 0
    with (
        ThreadPoolExecutor(max_workers=max(4, os.cpu_count() or 1)) as pool,
        tqdm(total=len(images), desc="predicting", unit=" images", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            loaded = list(pool.map(load, part, [done < SHOWN] * len(part)))
            good = [entry[0] for entry in loaded if not isinstance(entry, str)]
            shares = iter(_shares(used, np.stack(good)) if good else ())
            for image, entry in zip(part, loaded, strict=True):
                if isinstance(entry, str):
                    yield Prediction(image.name, []), entry
                else:
                    yield Prediction(image.name, _best(next(shares), used.classes, top), entry[1]), None
            done += len(good)
            bar.update(len(part))


def _shares(used: LoadedRun, pixels: np.ndarray) -> Tensor:
    """Return probabilities [N, classes], on the CPU, for stored pixels [N, h, w, 3]."""
    runtime = used.runtime
    batch = preprocess(torch.from_numpy(pixels).to(runtime.device), used.data, runtime.channels_last)
    with runtime.autocast():
        logits = used.model(batch)
    return logits.float().softmax(1).cpu()


def _best(shares: Tensor, classes: Sequence[str], top: int) -> list[tuple[str, float]]:
    found = shares.topk(min(top, len(classes)))
    return [
        (classes[label], share)
        for label, share in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def _none_readable(problems: dict[str, str]) -> UserError:
    name, problem = next(iter(problems.items()))
    others = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
    return UserError(f"images: none can be read: {name}: {problem}{others}")
