"""job=predict: classify image files with a run's network."""

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from zfnet.config.errors import UserError, log
from zfnet.config.schema import Config, Job, Positive
from zfnet.data import preprocess
from zfnet.data.decode import UnreadableImage, fit_square
from zfnet.data.files import find_images, read_named
from zfnet.plots.figures import LIGHT_BLUE, PALE_BLUE, PALEST, SOFT, Figure, new_figure, save_figure, styled
from zfnet.runs.session import own_directory
from zfnet.runs.tables import cut, format_table, shorten
from zfnet.runs.weights import weights_hash
from zfnet.training.loaded import PREPROCESSING, LoadedRun

# the keys of `data` that job=predict uses; each image is read at the network's size
_DATA_KEYS = ("batch_size", "max_pixels", *(key for key in PREPROCESSING if key != "store_size"))
SHOWN = 48  # images in the figure
MOST_COLUMNS = 100  # up to this many classes, predictions.csv has a column for each class
PICTURE_SIZE = 160  # smallest side of an image in the figure, in pixels


@dataclass(frozen=True)
class Prediction:
    """The name of an image and its (class, probability) pairs, most probable first, or the error of reading it.

    probabilities: [classes], all classes in the run's order
    picture: uint8 [h, w, 3], only for images in the figure
    """

    name: str
    best: Sequence[tuple[str, float]] = ()
    probabilities: Tensor | None = None
    picture: np.ndarray | None = None
    error: str | None = None


@dataclass(kw_only=True)
class PredictJob(Job):
    reads_run: ClassVar[str] = "needed"
    reads_images: ClassVar[bool] = True

    top: Positive

    def main(self, config: Config, output: Path) -> None:
        """Classify the images in `images=[…]`; print a table, and write predictions.json, predictions.csv and a figure.

        Unreadable images are reported and skipped. Raises UserError if no image can be read.
        """
        if not config.images:
            raise UserError("job=predict needs images, as in 'images=[cat.jpg,photos/,https://…]'")
        for key, override in config.overridden.items():
            if key == "data" or (key.startswith("data.") and key.removeprefix("data.") not in _DATA_KEYS):
                raise UserError(f"{override}: job=predict reads only images=[…], not a data set; leave it out")
        images, errors = find_images(config.images)
        if not images:
            raise _none_readable(errors)
        loaded = LoadedRun(config)
        if self.top > len(loaded.classes) and "job.top" in config.overridden:
            raise UserError(f"job.top={self.top}: the run has {len(loaded.classes)} classes")
        with own_directory(config, output) as run:
            results = list(predict(loaded, images, self.top, config.data.batch_size))
            predictions = [p for p in results if p.error is None]
            errors |= {p.name: p.error for p in results if p.error is not None}
            content = {
                "run": str(loaded.source.folder),
                "weights_sha256": weights_hash(loaded.model.state_dict()),
                "images": [
                    {"image": p.name, "predictions": [{"class": c, "probability": v} for c, v in p.best]}
                    for p in predictions
                ],
                "unreadable": [{"image": name, "error": error} for name, error in errors.items()],
            }
            run.write_json("predictions.json", content)
            if len(errors) > 1 or predictions:  # `_none_readable` reports a single failure
                for name, error in errors.items():
                    log.warning("not read: %s: %s", shorten(name, 200), error)
            if not predictions:
                raise _none_readable(errors)
            names, known = [p.name for p in predictions], [p.probabilities for p in predictions]
            rows = prediction_rows(names, torch.stack([p for p in known if p is not None]), loaded.classes)
            run.write_csv("predictions.csv", rows)
            for line in prediction_table(predictions, shutil.get_terminal_size().columns):
                log.info(line)
            save_figure(draw_predictions(predictions[:SHOWN]), run.figures / "predictions.png")
            if len(predictions) > SHOWN:
                log.info("the figure shows the first %d images", SHOWN)
            log.info("classified %d of %d images", len(predictions), len(predictions) + len(errors))


@torch.no_grad()
def predict(loaded: LoadedRun, images: Sequence[str], top: int, batch_size: int) -> Iterator[Prediction]:
    """Yield each image's prediction, with its `top` classes or its error, in order."""

    size, fit, runtime = loaded.metadata.stored_size, loaded.data.fit, loaded.runtime
    top, count = min(top, len(loaded.classes)), 0

    def read(image: str, with_picture: bool) -> tuple[np.ndarray, np.ndarray | None] | str:
        try:
            picture = read_named(image, loaded.data.max_pixels, size * loaded.data.draft)
        except UnreadableImage as error:
            return str(error)
        share = min(picture.size) / max(picture.size)
        if fit == "crop" and share < 0.5:
            log.info("%s: data.fit=crop keeps the central %.0f%%; stretch keeps all", shorten(image, 200), 100 * share)
        shown = fit_square(picture, max(size, PICTURE_SIZE), fit) if with_picture else None
        return fit_square(picture, size, fit), shown

    def classify(stored: list[np.ndarray]) -> Tensor:
        pixels = torch.from_numpy(np.stack(stored)).to(runtime.device)
        with runtime.autocast():
            logits = loaded.model(preprocess(pixels, loaded.data, runtime.channels_last))
        return logits.float().softmax(1).cpu()

    with (
        ThreadPoolExecutor(max_workers=max(4, os.cpu_count() or 1)) as pool,
        tqdm(total=len(images), desc="predicting", unit=" images", disable=None, leave=False) as bar,
    ):
        for start in range(0, len(images), batch_size):
            chunk = images[start : start + batch_size]
            files = list(pool.map(read, chunk, [count < SHOWN] * len(chunk)))
            stored = [file[0] for file in files if not isinstance(file, str)]
            probabilities = iter(classify(stored) if stored else ())
            for image, file in zip(chunk, files, strict=True):
                if isinstance(file, str):
                    yield Prediction(image, error=file)
                    continue
                own = next(probabilities)
                values, labels = (x[:top] for x in own.sort(descending=True, stable=True))
                classes = [loaded.classes[label] for label in labels.tolist()]
                yield Prediction(image, list(zip(classes, values.tolist(), strict=True)), own, file[1])
            count += len(stored)
            bar.update(len(chunk))


def prediction_rows(
    names: Sequence[str],
    probabilities: Tensor,
    classes: Sequence[str],
    labels: Sequence[int] = (),
    predicted: Sequence[int] = (),
) -> list[dict[str, Any]]:
    """Return the rows of predictions.csv, one for each image of `probabilities` [N, classes].

    labels: the true classes, if known; predicted: the predicted classes, which decide between equal probabilities
    If there are more than MOST_COLUMNS classes, they have no columns of their own.
    """
    rows: list[dict[str, Any]] = []
    for number, (name, values) in enumerate(zip(names, probabilities.tolist(), strict=True)):
        best = predicted[number] if predicted else max(range(len(classes)), key=values.__getitem__)
        true = {"true": classes[labels[number]]} if labels else {}
        row = {"image": name, **true, "predicted": classes[best], "probability": f"{values[best]:.6g}"}
        if labels:
            row["probability_of_true"] = f"{values[labels[number]]:.6g}"
        if len(classes) <= MOST_COLUMNS:
            row |= {f"P({c})": f"{value:.6g}" for c, value in zip(classes, values, strict=True)}
        rows.append(row)
    return rows


def _none_readable(errors: dict[str, str]) -> UserError:
    name, error = next(iter(errors.items()))
    others = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
    return UserError(f"images: none can be read: {name}: {error}{others}")


def prediction_table(predictions: Sequence[Prediction], width: int) -> list[str]:
    """Return lines of at most `width` characters: one per image or, if that is too wide, one per class."""
    count = max(len(p.best) for p in predictions)
    rows = [[p.name, *(cell for c, value in p.best for cell in (c, f"{value:.1%}"))] for p in predictions]
    lines = format_table(rows, "<" + count * "<>", width, shrink=[0])
    if max(map(len, lines)) <= width:
        return lines
    rows = [["" if n else p.name, c, f"{v:.1%}"] for p in predictions for n, (c, v) in enumerate(p.best)]
    return format_table(rows, "<<>", width, shrink=[0, 1])


@styled()
def draw_predictions(predictions: Sequence[Prediction]) -> Figure:
    """Draw each picture with bars for its most probable classes below it."""
    shown = [p for p in predictions if p.picture is not None]
    columns = min(6, len(shown))
    rows, bars = -(-len(shown) // columns), min(3, max(len(p.best) for p in shown))
    figure = new_figure(figsize=(2.1 * columns, (2.35 + 0.24 * bars) * rows + 0.4))
    figure.suptitle("Predictions")
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[2.0, 0.24 * bars] * rows)
    for number, prediction in enumerate(shown):
        row, column = divmod(number, columns)
        picture, chart = (figure.add_subplot(grid[2 * row + k, column]) for k in (0, 1))
        assert prediction.picture is not None
        picture.imshow(prediction.picture)
        picture.set_title(shorten(prediction.name, 26), fontsize=8, color=SOFT, parse_math=False)
        picture.axis("off")
        for place, (name, value) in enumerate(prediction.best[:bars]):
            text = cut(name, 18)
            weight, colour = ("normal", PALE_BLUE) if place else ("bold", LIGHT_BLUE)
            chart.barh(place, value, height=0.82, color=colour)
            chart.text(0.02, place, text, va="center", fontsize=8, weight=weight, parse_math=False)
            chart.text(0.98, place, f"{value:.1%}", va="center", ha="right", fontsize=8, weight=weight)
        chart.set(xlim=(0, 1), ylim=(bars - 0.5, -0.5), facecolor=PALEST, xticks=[], yticks=[])
        chart.spines[:].set_visible(False)
    return figure
