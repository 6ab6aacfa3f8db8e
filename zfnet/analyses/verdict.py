"""job=verdict: measure explanations by seven metrics, each between chance (0) and the best (1).

Units of each convolution layer are explained by deconvnet, guided and gradient; classes also by integrated gradients
and Grad-CAM. The baselines are pictures that do not depend on the network. `explain/targets.py` makes the pictures,
`explain/faithfulness.py` contains the metrics, and docs/verdict.md defines each metric.
"""

import itertools
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from zfnet.analyses.deconvnet import shuffle_weights
from zfnet.config.errors import UserError, did_you_mean, log
from zfnet.config.randomness import CONTROL, make_key, permutation, random_bits, uniform
from zfnet.config.schema import Config, Positive, ShapesData
from zfnet.data.shapes import draw_without
from zfnet.explain.boxes import box_cells, boxes_in_input, cell_means, share_in_boxes
from zfnet.explain.crops import frame_size
from zfnet.explain.deconvnet import RULES, Deconvnet
from zfnet.explain.faithfulness import (
    FILLINGS,
    Removal,
    rank_among_others,
    removal_scores,
    structural_similarity,
    support,
)
from zfnet.explain.maps import Ablation
from zfnet.explain.selection import Look, Split, chosen_split, pick_layers, sample, to_inputs
from zfnet.explain.targets import BASELINES, GRAD_CAM, INTEGRATED, Target, blur
from zfnet.explain.top_activations import MapStatistics, TopActivations, collect
from zfnet.model.chain import OUTPUT
from zfnet.plots.figures import INK, PALE, PALETTE, SOFT, WHITE, new_figure, save_figure, styled
from zfnet.runs.directory import RunDirectory
from zfnet.runs.session import continued_directory
from zfnet.runs.statistics import LEVEL, clustered_mean, clustered_tests, rank_correlation, standard_ranks
from zfnet.runs.tables import to_rows
from zfnet.runs.weights import weights_hash
from zfnet.training.loaded import LoadedRun

Numbers = Mapping[tuple[str, str, str], Mapping[str, Any]]  # rows of verdict.csv by target, method and measure
Looks = Mapping[str, dict[str, Any]]  # how each method is drawn

CLASS, UNITS = "class", "units"  # targets other than layers: the class, and the units of all layers together
# the scores in the table, the figure and the tests, in the order of the table
SCORES = {
    "weights": "depends on the weights",
    "own": "specific to its unit or class",
    "deletion": "removing it lowers the output",
    "insertion": "it alone restores the output",
    "box": "in the object's box",
    "mosaic": "in the correct quarter of a mosaic",
    "parts": "predicts the effect of a part",
    "stability": "stable under ±1/255",
}
_PAIRS_AT_ONCE = 256  # pairs of a unit and another unit's picture
_SHORT_NAMES = {"deletion": "delete", "insertion": "insert", "stability": "stable"}  # for 80 columns


@dataclass(kw_only=True)
class VerdictJob(Look):
    """See conf/job/verdict.yaml."""

    metrics: Optional[list[str]]
    layers: Optional[list[str]]
    images: Annotated[int, Field(ge=4)]
    units: Annotated[int, Field(ge=2)]
    others: Optional[Positive]
    cells: Annotated[int, Field(ge=2, le=12)]
    support: Annotated[float, Field(gt=0, lt=1)]
    sectors: Annotated[int, Field(ge=3)]
    ablation_images: Positive

    def main(self, config: Config, output: Path) -> None:
        """Measure the explanations of the network of `run=…`. A stopped job resumes in its directory."""
        loaded = LoadedRun(config)
        chain = loaded.chain
        layers = pick_layers(chain, "job.layers", self.layers, chain.conv_layers, only_conv=True)
        metrics = list(dict.fromkeys(METRICS if self.metrics is None else self.metrics))
        if not metrics:
            raise UserError("job.metrics=[]: names no metric; null means all of them")
        for name in metrics:
            if name not in METRICS:
                raise UserError(f"job.metrics={name}: there is no such metric{did_you_mean(name, list(METRICS))}")
        Deconvnet(chain).check(OUTPUT)
        split = chosen_split(loaded)
        with continued_directory(config, output) as (run, stop):
            origin = {"weights": weights_hash(loaded.model.state_dict()), "data": loaded.splits.fingerprint}
            study = prepare(self, loaded, split, layers)
            all_rows: list[Row] = []
            for name in metrics:
                rows = saved_rows(run, name, origin)
                if rows is None:
                    start, used, plain = time.perf_counter(), time.process_time(), []
                    for row in METRICS[name](study):
                        plain.append(row.to_dict())
                        stop.check()
                    seconds = {"seconds": round(time.perf_counter() - start, 1)}
                    seconds["cpu_seconds"] = round(time.process_time() - used, 1)
                    (run.folder / "metrics").mkdir(exist_ok=True)
                    run.write_json(f"metrics/{name}.json", {"of": origin, **seconds, "rows": plain})
                    log.info("%s: %.0f s", name, seconds["seconds"])
                    rows = [Row.from_dict(row) for row in plain]  # rounded, as a resumed job reads them
                all_rows += rows
            if not all_rows:
                names, data = ",".join(metrics), loaded.data.name
                raise UserError(
                    f"job.metrics=[{names}]: data={data} does not have the parts, boxes or four classes these need; "
                    "add another metric, such as own"
                )
            report(run, study, all_rows, origin)


@dataclass(frozen=True)
class Row:
    """The `measure` of the pictures by `method`, one number for each unit (or class, or map); NaN if undefined.

    target: a layer, or `class`; clusters: the image of each number
    """

    target: str
    method: str
    measure: str
    values: Tensor
    clusters: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values for JSON."""
        values = [None if math.isnan(v) else round(v, 5) for v in self.values.double().tolist()]
        return vars(self) | {"values": values, "clusters": self.clusters.tolist()}

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "Row":
        """Return the row from the plain values of JSON."""
        values = [math.nan if v is None else v for v in plain["values"]]
        named = {key: plain[key] for key in ("target", "method", "measure")}
        return Row(**named, values=torch.tensor(values).double(), clusters=torch.tensor(plain["clusters"]).long())


def saved_rows(run: RunDirectory, metric: str, origin: Mapping[str, str]) -> list[Row] | None:
    """Return the saved rows of a metric; None if there are none, or if they belong to other weights or data.

    Raises UserError if the file is damaged.
    """
    path = run.folder / "metrics" / f"{metric}.json"
    if not path.exists():
        return None
    try:
        saved = run.read_json(f"metrics/{metric}.json")
        return [Row.from_dict(row) for row in saved["rows"]] if saved["of"] == origin else None
    except (KeyError, TypeError, ValueError, RuntimeError, UserError) as error:
        raise UserError(f"{path} is damaged: delete it to measure the metric again") from error


# ---- subjects


@dataclass(frozen=True)
class Subject:
    """A named target, and the numbers of its N images in the split: int64 [N]."""

    name: str
    target: Target
    numbers: Tensor

    @property
    def methods(self) -> tuple[str, ...]:
        return (*self.target.methods, *BASELINES)

    def row(self, method: str, measure: str, values: Tensor) -> Row:
        return Row(self.name, method, measure, values, self.numbers[self.target.units[:, 0]])


@dataclass(frozen=True)
class Study:
    """The input of the metrics: the job's settings, its subjects (the class is last), and the run's images."""

    job: VerdictJob
    loaded: LoadedRun
    split: Split
    subjects: list[Subject]
    statistics: dict[str, MapStatistics]

    @property
    def seed(self) -> int:
        return self.loaded.config.seed

    def each(self, metric: str) -> Iterator[tuple[Subject, str]]:
        """Yield each subject with each of its methods, and show a progress bar."""
        pairs = [(subject, method) for subject in self.subjects for method in subject.methods]
        with tqdm(pairs, metric, disable=None, leave=False, dynamic_ncols=True) as bar:
            for subject, method in bar:
                bar.set_postfix_str(f"{subject.name}, {method}")
                yield subject, method


def prepare(job: VerdictJob, loaded: LoadedRun, split: Split, layers: Sequence[str]) -> Study:
    """Choose units and images. A layer's units are its maps' strongest activations in the split, up to `job.units`.

    Raises UserError if no map of any layer is ever active.
    """
    chain, images = loaded.chain, split.images
    fewest = min(step.output_shape[0] for step in chain.steps if step.name in layers)
    search = TopActivations(-(-job.units // fewest), len(images.classes), images.labels)
    collect(chain, images, loaded.batches, layers, search)
    subjects, whole = [], []
    for layer in layers:
        record = search.layers[layer]
        order = permutation(make_key(loaded.config.seed, CONTROL, 20, chain.layers.index(layer)), len(record.values))
        rank, place = record.filled.cpu()[order].T.nonzero()[: job.units].unbind(1)
        if len(rank) < 2:
            log.info("%s: fewer than two maps are ever active, so its units are left out", layer)
            continue
        image, y, x = record.places().cpu()[order[place], rank].unbind(1)
        numbers, item = image.unique(return_inverse=True)
        inputs = to_inputs(loaded, images.pixels(numbers))
        target = Target(chain, layer, inputs, torch.stack((item, order[place], y, x), 1))
        subjects.append(Subject(layer, target, numbers))
        if frame_size(chain, layer) == chain.image_size:
            whole.append(layer)
    if not subjects:
        raise UserError(f"job.layers: no map of {', '.join(layers)} is ever active, so there is no unit to explain")
    if whole:
        log.info("%s: the receptive field is larger than the image; units see all of it", ", ".join(whole))
    numbers = sample(loaded, images, job.images)
    labels = images.labels[numbers]
    units = torch.stack([torch.arange(len(labels)), labels, *torch.zeros(2, len(labels), dtype=torch.int64)], 1)
    subjects.append(Subject(CLASS, Target(chain, OUTPUT, to_inputs(loaded, images.pixels(numbers)), units), numbers))
    statistics = {layer: search.statistics(layer) for layer in layers}
    count = sum(len(s.target.units) for s in subjects[:-1])
    log.info("%d units, and the classes of %d images; %s", count, len(labels), split.name)
    return Study(job, loaded, split, subjects, statistics)


# ---- the metrics


def measure_weights(study: Study) -> Iterator[Row]:
    """Compare pictures with those after shuffling layers one by one, from the top down and from the bottom up."""
    for subject in study.subjects:
        target = subject.target
        own = {method: _ranked(target, method) for method in subject.methods}
        names = [step.name for step in target.chain.up_to(target.layer) if step.name in target.chain.layers]
        ways = {"top-down": names[::-1], "bottom-up": names}
        stages = {
            (way, layers[k]): frozenset(layers[: k + 1]) for way, layers in ways.items() for k in range(len(names))
        }
        top, every = frozenset(names[-1:]), frozenset(names)
        correlations: dict[tuple[str, frozenset[str]], dict[str, Tensor]] = {}
        twin = target.chain
        for (_, layer), only in tqdm(stages.items(), f"weights: {subject.name}", disable=None, leave=False):
            # shuffles only one more layer than the previous stage, because a large layer takes seconds
            twin = shuffle_weights(target.chain if len(only) == 1 else twin, target.layer, study.seed, only=[layer])
            for method in (m for m in subject.methods if m in target.methods or only == top):
                if (method, only) not in correlations:  # both ways end with all layers shuffled
                    (size, ranks), (other_size, others) = own[method], _ranked(target, method, chain=twin, draw=1)
                    correlations[method, only] = {kind: (ranks[kind] * others[kind]).sum(1) for kind in ranks}
                    correlations[method, only]["ssim"] = structural_similarity(size, other_size, target.inside)
        for method in subject.methods:
            known = method in target.methods
            for (way, layer), only in stages.items():
                if known or (way, only) == ("top-down", top):
                    for kind, values in correlations[method, only].items():
                        yield subject.row(method, f"{way} {layer} {kind}", values)
            yield subject.row(method, "weights", 1 - correlations[method, every if known else top]["unsigned"].abs())


def _ranked(target: Target, method: str, **settings: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the absolute values of a method's pictures, and the ranks of signed and of absolute values."""
    picture, inside = target.picture(method, **settings), target.inside
    size = picture.abs().sum(1)
    return size, {"signed": standard_ranks(picture, inside[:, None]), "unsigned": standard_ranks(size, inside)}


def measure_own(study: Study) -> Iterator[Row]:
    """Rank each unit's activation on the support of its own picture among those on the supports of other pictures."""
    for subject, method in study.each("own"):
        target, units = subject.target, subject.target.units
        if method in BASELINES:  # the same for every unit at a place, so all tie
            yield subject.row(method, "own", torch.zeros(len(units)))
            continue
        every = torch.cat([units[:, 1:2], _others(study, target)], 1)
        inside, frames, left = target.inside, target.cut(target.images), torch.full(every.shape, math.nan)
        item, column = (every >= 0).nonzero().unbind(1)
        asked = units[item]
        asked[:, 1] = every[item, column]
        for part in torch.arange(len(item)).split(_PAIRS_AT_ONCE):
            at = item[part]
            size = target.picture(method, units=asked[part]).abs().sum(1)
            kept = support(size, inside[at], study.job.support)
            value = target.value(frames[at] * kept[:, None].to(frames), at).cpu()
            left[at, column[part]] = torch.where(size.flatten(1).any(1), value, torch.nan)
        score = rank_among_others(left[:, 0], left[:, 1:])
        yield subject.row(method, "own", torch.where(left[:, 0].isfinite(), score, torch.nan))


def _others(study: Study, target: Target) -> Tensor:
    """Return other channels active at each unit's place, or other classes: int64 [U, others], filled up with −1."""
    count, channels = len(target.units), target.chain.num_classes
    active = torch.ones(count, channels, dtype=torch.bool)
    if not target.of_class:
        with torch.no_grad():
            maps = target.chain.activations(target.images, [target.layer])[target.layer].cpu()
        active = maps[target.units[:, 0], :, target.units[:, 2], target.units[:, 3]] > 0
    active[torch.arange(count), target.units[:, 1]] = False
    chance = uniform(make_key(study.seed, CONTROL, 21), torch.arange(active.numel())).view(active.shape)
    most = int(active.sum(1).max())  # the size of the largest choice; job.others=null takes all
    picked = torch.where(active, 1 + chance, 0).topk(min(study.job.others or most, most), dim=1)
    return torch.where(picked.values > 0, picked.indices, -1)


def measure_removal(study: Study) -> Iterator[Row]:
    """Delete and insert pixels in the order of the pictures, with three fillings."""
    pairs = list(itertools.product(study.subjects, FILLINGS))
    means: dict[tuple[str, str, str], list[Tensor]] = {}
    for subject, filling in tqdm(pairs, "removal", disable=None, leave=False, dynamic_ncols=True):
        target, boxes = subject.target, subject.target.boxes
        frames = target.cut(target.images)
        sides = boxes[:, 2:] - boxes[:, :2]
        side = min(study.job.cells, int(sides.max()))  # so that each cell has pixels
        clipped = sides.amin(1) < side  # a box clipped at the image's edge, with cells that have no pixels
        cells = box_cells(boxes, (frames.shape[2], frames.shape[3]), side)
        sizes = {method: target.picture(method).abs().sum(1, keepdim=True) for method in subject.methods}
        relevance = {method: cell_means(size, cells, side**2)[0][:, 0] for method, size in sizes.items()}
        blurred = target.cut(blur(target.images, frames.shape[2] // 4))
        measure = Removal(frames, boxes, target.value, side, filling, blurred)
        for method, scores in removal_scores(measure, relevance, side, study.seed).items():
            for name, values in zip(("deletion", "insertion"), scores, strict=True):
                values = values.masked_fill(clipped, torch.nan)
                yield subject.row(method, f"{name}, {filling}", values)
                means.setdefault((subject.name, method, name), []).append(values)
                if filling == FILLINGS[-1]:
                    yield subject.row(method, name, torch.stack(means[subject.name, method, name]).nanmean(0))


def measure_pointing(study: Study) -> Iterator[Row]:
    """Measure the share of a class's picture in the object's box, and in its quarter of a mosaic of four classes."""
    subject = study.subjects[-1]
    target, labels = subject.target, subject.target.units[:, 1]
    boxes = study.split.images.boxes
    if boxes is None:
        log.info("the data have no boxes around the objects: pointing is measured only on mosaics")
    order = torch.stack([labels[:k].eq(label).sum() for k, label in enumerate(labels)])  # so that classes alternate
    order = (order * len(study.loaded.classes) + labels).argsort()
    fours = [four for four in order.split(4) if len(labels[four].unique()) == 4]
    if not fours:
        log.info("fewer than four classes: there are no mosaics")
    else:
        half = F.interpolate(target.images, scale_factor=0.5, mode="area")
        edge = half.shape[-1]
        mosaics = torch.zeros(len(fours), *target.images.shape[1:]).to(target.images)
        corners = [(0, 0), (0, edge), (edge, 0), (edge, edge)]
        for (top, left), members in zip(corners, torch.stack(fours, 1), strict=True):
            mosaics[:, :, top : top + edge, left : left + edge] = half[members]
        units = torch.tensor([[n, int(labels[i]), 0, 0] for n, four in enumerate(fours) for i in four])
        mosaic = Target(target.chain, OUTPUT, mosaics, units)
        areas = torch.tensor([[t, x, t + edge, x + edge] for t, x in corners]).float()
        right = torch.arange(4).repeat(len(fours))
    for method in tqdm(subject.methods, "pointing", disable=None, leave=False, dynamic_ncols=True):
        if boxes is not None:
            here = boxes_in_input(boxes[subject.numbers], study.split.images, study.loaded.data)
            shares = share_in_boxes(target.picture(method), here)
            own = shares.diagonal()
            others = (shares.sum(1) - own) / (len(own) - 1)
            yield subject.row(method, "box", (own - others) / (1 - others))
        if fours:
            shares = share_in_boxes(mosaic.picture(method), areas)
            share = shares[torch.arange(len(right)), right] / shares.sum(1)
            yield Row(CLASS, method, "mosaic", (share - 0.25) / 0.75, units[:, 0])


def measure_parts(study: Study) -> Iterator[Row]:
    """Redraw each shape without one sector, and compare the picture's mass there with the change of the number."""
    data, split = study.loaded.data, study.split
    if not isinstance(data, ShapesData):
        log.info("only data=shapes can be drawn without a part: part removal is left out")
        return
    changes: dict[str, tuple[Tensor, Tensor]] = {}
    for subject, method in study.each("parts"):
        target, item = subject.target, torch.arange(len(subject.target.units))
        if subject.name not in changes:
            drops, where = [], []
            whole = target.value(target.cut(target.images), item)
            rows, side = split.images.rows[subject.numbers], split.images.images.shape[1]
            for sector in range(study.job.sectors):
                pixels = draw_without(rows, side, int(split.name == "test"), sector, study.job.sectors)
                altered = to_inputs(study.loaded, pixels)
                drops.append((whole - target.value(target.cut(altered), item)).cpu())
                where.append(target.cut((altered != target.images).any(1, keepdim=True).float())[:, 0].cpu() > 0)
            changes[subject.name] = torch.stack(drops, 1), torch.stack(where, 1)
        change, places = changes[subject.name]
        mass = (target.picture(method).abs().sum(1)[:, None] * places).sum((2, 3))
        seen = places.flatten(2).any(2)
        values = rank_correlation(mass, change, seen)
        yield subject.row(method, "parts", torch.where(seen.sum(1) >= 3, values, torch.nan))


def measure_ablation(study: Study) -> Iterator[Row]:
    """Set each map to zero, and measure the change of accuracy and logits, and the map's class selectivity."""
    images, loaded, chain = study.split.images, study.loaded, study.loaded.chain
    numbers = sample(loaded, images, study.job.ablation_images)
    labels, classes = images.labels[numbers], len(loaded.classes)
    present = torch.bincount(labels, minlength=classes)
    for layer, stats in study.statistics.items():
        alive = (~stats.dead.cpu()).nonzero().flatten()
        accuracy, logits = torch.zeros(len(stats.dead)), torch.zeros(len(stats.dead), classes)
        for some in torch.arange(len(numbers)).split(100):
            ablation = Ablation(chain, to_inputs(loaded, images.pixels(numbers[some])), layer)
            outputs = ablation.before.cpu()
            for number, rows, after in ablation.each():
                rows, after = rows.cpu(), after.cpu()
                truth, before = labels[some][rows], outputs[rows]
                hit = (after.argmax(1) == truth).float() - (before.argmax(1) == truth).float()
                accuracy[number] += hit.sum() / len(numbers)
                change = (after - before).gather(1, truth[:, None])[:, 0]
                logits[number].index_add_(0, truth, change / present[truth])
        accuracy, logits = accuracy[alive], logits[alive]
        most_reduced = logits.masked_fill(present == 0, torch.inf).argmin(1)
        unchanged = logits.amin(1) >= 0  # for example if the map is not active in these images
        best, selectivity = stats.best_class.cpu()[alive], stats.selectivity.cpu()[alive]
        guessed = 1 / int((present > 0).sum())  # chance among the present classes; NaN below if there is only one
        agrees = ((most_reduced == best).double() - guessed) / (1 - guessed or math.nan)
        agrees = agrees.masked_fill(unchanged, torch.nan)
        columns = {
            "accuracy change": accuracy,
            "largest logit loss": logits.amin(1),
            "class of it": most_reduced.double().masked_fill(unchanged, torch.nan),
            "selectivity": selectivity,
            "best class": best,
            "agreement": agrees,
        }
        for name, values in columns.items():
            yield Row(layer, "ablation", name, values, alive)


def measure_stability(study: Study) -> Iterator[Row]:
    """Compare pictures with those of the same images after a random change of each value by ±1/255."""
    step = 1 / 255 / torch.tensor(study.loaded.data.std).view(3, 1, 1)
    for subject, method in study.each("stability"):
        target = subject.target
        bits = random_bits(make_key(study.seed, CONTROL, 22), torch.arange(target.images.numel())) & 1
        noise = (2 * bits - 1).view(target.images.shape) * step
        other = target.picture(method, images=target.images + noise.to(target.images), draw=1)
        yield subject.row(method, "stability", rank_correlation(target.picture(method), other, target.inside[:, None]))


METRICS: dict[str, Callable[[Study], Iterator[Row]]] = {
    "removal": measure_removal,
    "weights": measure_weights,
    "own": measure_own,
    "pointing": measure_pointing,
    "ablation": measure_ablation,
    "parts": measure_parts,
    "stability": measure_stability,
}


# ---- the report


def report(run: RunDirectory, study: Study, rows: Sequence[Row], origin: Mapping[str, str]) -> None:
    """Write the tables and the figure, and log the significant results."""
    rows = [*rows, *_pooled(rows)]
    table = [
        {"target": r.target, "method": r.method, "measure": r.measure, **clustered_mean(r.values, r.clusters)}
        for r in rows
    ]
    differences, ablation = compare_methods(rows), _ablation_table(rows, study.loaded.classes)
    run.write_csv("verdict.csv", table)
    others = {"maps.csv": map_scores(study, rows), "differences.csv": differences, "ablation.csv": ablation}
    for name, content in others.items():
        if content:
            run.write_csv(name, content)
    scores = [row for row in table if row["measure"] in SCORES]
    agreement: dict[str, dict[str, Any]] = {str(row["target"]): row for row in table if row["measure"] == "agreement"}
    holds = [sentence for target in (UNITS, CLASS) for sentence in significance_lines(target, differences)]
    run.write_json(
        "verdict.json",
        {"run": str(study.loaded.source.folder), "split": study.split.name, **origin, "scores": scores}
        | {"ablation": agreement, "holds": holds},
    )
    if scores:  # job.metrics=[ablation] has none
        save_figure(draw_verdict(table, [s.name for s in study.subjects]), run.figures / "verdict.png")
    log.info("\n".join([*_table_lines(scores), *_ablation_lines(agreement)]))
    if holds:
        log.info("Significant differences (paired t-tests by image, p < %g after Holm):", LEVEL)
    for line in holds:
        log.info(textwrap.fill(line, 80, subsequent_indent="  "))
    log.info("written to %s", run.folder)


def map_scores(study: Study, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return each map's scores for its page in the atlas: `clustered_mean` over the map's units, for each method."""
    channels = {subject.name: subject.target.units[:, 1] for subject in study.subjects[:-1]}
    table = []
    for row in rows:
        if row.target in channels and row.measure in SCORES and row.method in RULES:
            for number in channels[row.target].unique().tolist():
                of = channels[row.target] == number
                summary = clustered_mean(row.values[of], row.clusters[of])
                if summary["n"]:
                    named = {"layer": row.target, "map": number, "method": row.method, "measure": row.measure}
                    table.append(named | summary)
    return table


def _pooled(rows: Sequence[Row]) -> list[Row]:
    """Return the scores of the units of all layers together."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.target != CLASS and row.measure in SCORES:
            groups.setdefault((row.method, row.measure), []).append(row)
    return [
        Row(UNITS, method, measure, torch.cat([r.values for r in of]), torch.cat([r.clusters for r in of]))
        for (method, measure), of in groups.items()
    ]


def compare_methods(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Test the difference of each pair of methods in each score, paired by unit and clustered by image."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row.measure in SCORES:
            groups.setdefault((row.target, row.measure), {})[row.method] = row
    tests = []
    for (target, measure), methods in groups.items():
        values = {name: row.values for name, row in methods.items()}
        (clusters, *_) = (row.clusters for row in methods.values())  # the same for all methods
        differences = clustered_tests(values, clusters, itertools.combinations(methods, 2))
        tests += [{"target": target, "measure": measure, **row} for row in differences]
    return tests


def significance_lines(target: str, differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each score the methods that beat the random picture, and which of these beat every baseline."""
    lines = []
    for measure in SCORES:
        if measure in ("weights", "stability"):  # here the random picture is not the chance level
            continue
        of = [d for d in differences if (d["target"], d["measure"]) == (target, measure)]
        names = dict.fromkeys(d[end] for d in of for end in ("first", "second"))
        above: dict[str, set[str]] = {name: set() for name in names}
        for d in (d for d in of if d["p_holm"] < LEVEL):
            high, low = (d["first"], d["second"]) if d["difference"] > 0 else (d["second"], d["first"])
            above[high].add(low)
        good = [n for n in names if n not in BASELINES and "random" in above[n]]
        better = [n for n in good if above[n] >= set(BASELINES) & set(names)]
        if of:
            every = "; above all baselines: " + (", ".join(better) or "none")
            lines.append(f"{target}, {measure}: above chance: {', '.join(good) or 'none'}{every if good else ''}")
    return lines


def _ablation_table(rows: Sequence[Row], classes: Sequence[str]) -> list[dict[str, Any]]:
    of = [row for row in rows if row.method == "ablation"]
    table = []
    for layer in dict.fromkeys(row.target for row in of):
        columns = {row.measure: row.values.tolist() for row in of if row.target == layer and row.measure != "agreement"}
        for key in ("class of it", "best class"):
            columns[key] = ["" if math.isnan(c) else classes[int(c)] for c in columns[key]]
        maps = next(row.clusters.tolist() for row in of if row.target == layer)
        table += to_rows(layer=[layer] * len(maps), map=maps, **columns)
    return table


def _table_lines(scores: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table in the log, at most 80 columns wide, with scores in hundredths."""
    for target in (UNITS, CLASS):
        of = {(row["method"], row["measure"]): row for row in scores if row["target"] == target}
        columns = [measure for measure in SCORES if any(key[1] == measure for key in of)]
        if not columns:
            continue
        most = max(row["n"] for row in of.values())
        yield f"{target}, n up to {most}: 100 × mean ± standard error; 0 chance, 100 best"
        yield f"{'':10}" + "".join(f"{_SHORT_NAMES.get(name, name):>8}" for name in columns)
        for method in dict.fromkeys(key[0] for key in of):
            cells = []
            for measure in columns:
                row = of.get((method, measure), {"mean": None, "se": None})
                error = "" if row["se"] is None else f"±{100 * row['se']:.0f}"
                cells.append("–" if row["mean"] is None else f"{round(100 * row['mean'])}{error}")  # an int is never -0
            yield f"{method:10}" + "".join(f"{cell:>8}" for cell in cells)


def _ablation_lines(agreement: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    known = {layer: row for layer, row in agreement.items() if row["mean"] is not None}
    if known:
        cells = (f"{layer} {100 * row['mean']:.0f}±{100 * (row['se'] or 0):.0f}" for layer, row in known.items())
        yield "maps set to zero: the class that loses most is the one that the map selects"
        yield "(in hundredths; 0 chance, 100 always):"
        yield "  " + ", ".join(cells)


@styled()
def draw_verdict(table: Sequence[Mapping[str, Any]], targets: Sequence[str]) -> Figure:
    """Draw a panel for each score, by layer and for the class, and the curves for shuffled weights.

    table: rows of verdict.csv; targets: the layers and `class`
    """
    of = {(r["target"], r["method"], r["measure"]): r for r in table if r["mean"] is not None}
    methods = [*RULES, INTEGRATED, GRAD_CAM, *BASELINES]
    looks = {
        method: {"color": PALETTE[n] if method not in BASELINES else SOFT, "marker": "osD^vP*Xd"[n]}
        | ({} if method not in BASELINES else {"ls": ":", "mfc": WHITE, "alpha": 0.8})
        for n, method in enumerate(methods)
    }
    panels = [m for m in SCORES if any(key[2] == m for key in of)]
    last = [t for t in targets if t != CLASS][-1:]
    cascades = [t for t in (*last, CLASS) if any(k[0] == t and k[2].startswith("top-down") for k in of)]
    count = len(panels) + len(cascades)
    columns, rows = min(count, 5), -(-count // 5)
    figure = new_figure(figsize=(max(8, 3.2 * columns), 4.3 * rows))
    figure.suptitle("Scores of the explanation methods: mean ± standard error; 0: chance, 1: best")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, measure in zip(axes, panels, strict=False):
        _draw_score(axis, measure, targets, of, looks)
    for axis, target in zip(axes[len(panels) :], cascades, strict=False):
        _draw_cascade(axis, target, of, looks)
    for axis in axes[count:]:
        axis.set_visible(False)
    handles: dict[str, Any] = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=9)
    return figure


def _draw_score(axis: Axes, measure: str, targets: Sequence[str], of: Numbers, looks: Looks) -> None:
    for number, (method, look) in enumerate(looks.items()):
        at = [k for k, target in enumerate(targets) if (target, method, measure) in of]
        scores = [of[targets[k], method, measure] for k in at]
        if scores:
            x = [k + (number - 4) * 0.06 for k in at]
            style = look | ({} if look.get("ls") else {"ls": "none" if len(at) == 1 else "-"})
            errors = [row["se"] or 0 for row in scores]
            axis.errorbar(x, [row["mean"] for row in scores], errors, ms=5, lw=1, elinewidth=1, label=method, **style)
    axis.axhline(0, color=INK, lw=0.8)
    axis.axhline(1, color=PALE, lw=0.8)
    shown = [k for k, target in enumerate(targets) if (target, "random", measure) in of]
    axis.set_xticks(shown, [targets[k] for k in shown], rotation=45)
    axis.set_xlim(min(shown, default=0) - 0.5, max(shown, default=0) + 0.5)
    axis.set_title(f"{measure}: {SCORES[measure]}", fontsize=10)


def _draw_cascade(axis: Axes, target: str, of: Numbers, looks: Looks) -> None:
    """Draw the rank correlation with pictures of shuffled weights: unsigned solid, signed dashed."""
    stages = list(dict.fromkeys(k[2].split()[1] for k in of if k[0] == target and k[2].startswith("top-down")))
    for method, look in looks.items():
        for kind, dashes in (("unsigned", "-"), ("signed", "--")):
            rows = [row for stage in stages if (row := of.get((target, method, f"top-down {stage} {kind}")))]
            if len(rows) == len(stages):
                mean, error = [row["mean"] for row in rows], [row["se"] or 0 for row in rows]
                axis.errorbar(range(len(rows)), mean, error, color=look["color"], ls=dashes, elinewidth=1)
    axis.axhline(0, color=INK, lw=0.8)
    axis.set_xticks(range(len(stages)), stages, rotation=45)
    axis.set_title(f"{target}: rank correlation, weights shuffled\ndown to this layer (dashed: signed)", fontsize=10)
