"""job=deconvnet: show what excites each feature map, by the deconvnet, with controls and an atlas of all maps.

Source: Zeiler & Fergus 2013, section 2.1 and Fig. 2: the strongest activations of a map over a whole set, projected to
pixel space. `explain/deconvnet.py` computes projections, and `explain/top_activations.py` finds the activations.

The controls are ours. A projection is no evidence about its unit if it hardly changes with shuffled weights, with the
pooling switches of another image, or for another unit at the same place (Adebayo et al. 2018; Nie et al. 2018;
Mahendran & Vedaldi 2016).
"""

import copy
import functools
import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Optional

import numpy as np
import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from zfnet.config.errors import UserError, log
from zfnet.config.randomness import CONTROL, make_key, permutation, uniform
from zfnet.config.schema import Config, NotNegative, Positive, model_name
from zfnet.data import ImageSet, preprocess
from zfnet.data.batches import resize
from zfnet.data.images import image_set
from zfnet.explain.atlas import (
    Atlas,
    Photograph,
    Strongest,
    find_atlas,
    find_verdict,
    link_to,
    write_atlas,
    write_photographs,
    write_single,
)
from zfnet.explain.boxes import box_cells
from zfnet.explain.crops import frame_size, project_frames, view_maps, view_units
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.maps import MapResponses, ablation_effects, nearest_maps, peaks, strongest_activations
from zfnet.explain.receptive_field import receptive_boxes, receptive_field, window_steps
from zfnet.explain.selection import Look, chosen_split, load_other, pick_layers, predict, read_files, to_inputs
from zfnet.explain.top_activations import SHUFFLES, TopActivations, collect
from zfnet.explain.windows import DEAD_WINDOWS
from zfnet.jobs.predict import prediction_rows
from zfnet.model.chain import Chain
from zfnet.plots.figures import BLUE, INK, ORANGE, PURPLE, SOFT, new_figure, save_figure, styled
from zfnet.plots.pictures import enlarge, mosaic, on_grey, show, show_mosaic, to_pixels
from zfnet.runs.directory import RunDirectory, write_tensors
from zfnet.runs.session import StopRequest, continued_directory, own_directory
from zfnet.runs.statistics import Summary, describe, false_discovery_rate, rank_correlation
from zfnet.runs.tables import shorten, to_rows
from zfnet.runs.weights import ModelMetadata, weights_hash
from zfnet.training.checkpoint import Checkpoint, CheckpointWriter, read_checkpoint
from zfnet.training.loaded import LoadedRun

CONTROLS = {
    "random_weights": "the same network with each layer's weights shuffled",
    "other_switches": "pooling switches of another image",
    "other_unit": "another unit of the layer, at the same place",
}
SEARCH = "search.safetensors"
_SAVE_SECONDS = 30.0
_CONTROL_UNITS = 64  # units per layer to compare with controls
_SHUFFLES = 3  # how often the weights are shuffled
SIMILARITIES = {"signed": "of the values", "unsigned": "of their sizes"}


@dataclass(kw_only=True)
class DeconvnetJob(Look):
    """See conf/job/deconvnet.yaml."""

    layers: Optional[list[str]]
    top: Annotated[int, Field(ge=1, le=100)]
    maps: Annotated[int, Field(ge=1, le=100)]
    max_images: Optional[Positive]
    rule: Literal["deconvnet", "guided", "gradient"]
    dead_windows: Literal["first", "mask", "all"]
    lrn: Literal["identity", "gradient"]
    controls: bool
    atlas: bool | Literal["single"]
    sample: Annotated[int, Field(ge=2)]
    ablation: NotNegative
    other: Optional[str]
    pages: Optional[str]
    verdict: Optional[str]

    reads_images: ClassVar[bool] = True

    def main(self, config: Config, output: Path) -> None:
        """Explain the network of `run=…` and write the results to `output`, where a stopped job resumes.

        With `images=[…]` explain only these images, with links to an existing atlas.
        """
        loaded = LoadedRun(config)
        chain = loaded.chain
        named = pick_layers(chain, "job.layers", self.layers, chain.conv_layers, only_conv=True)
        layers = [layer for layer in chain.conv_layers if layer in named]
        deconvnet = Deconvnet(chain, self.rule, self.dead_windows, self.lrn)
        for layer in layers:  # raise errors before the search, which takes long
            deconvnet.check(layer)
            frame_size(chain, layer)
        if self.controls:
            check_weights(chain)
        if config.images is not None:
            explain_photographs(self, config, output, loaded, deconvnet, layers)
            return
        other = None if self.other is None else load_other(self.other, loaded)
        if other is not None:  # raises if it has no convolution
            pick_layers(other[0], f"job.other={self.other}", None, other[0].conv_layers, only_conv=True)
        weights = weights_hash(loaded.model.state_dict())
        verdict = None
        if (deconvnet.dead_windows, deconvnet.lrn) == ("first", "identity"):  # job=verdict scores only these pictures
            verdict = find_verdict(weights, self.rule, self.verdict)
        elif self.verdict is not None:
            raise UserError("job.verdict: its scores need job.dead_windows=first and job.lrn=identity")
        split = chosen_split(loaded)
        images, numbers = split.images, torch.arange(len(split.images))
        if self.max_images is not None and self.max_images < len(images):
            numbers = torch.linspace(0, len(images) - 1, self.max_images).round().long()
            images = images.take(numbers)
        finished = RunDirectory(output).state == "done"
        with continued_directory(config, output) as (run, stop):
            if finished:
                print(f"nothing to do: {run.folder} is finished")
                return
            log.info("%s: %s", loaded.source.folder, ", ".join(layers))
            device = loaded.runtime.device
            log.info("%s %s images on %s, rule %s", f"{len(images):,}", split.name, device, self.rule)
            search = TopActivations(self.top, len(images.classes), images.labels)
            origin: dict[str, Any] = {
                "weights": weights,
                "data": loaded.splits.fingerprint,
                "shuffles": SHUFFLES,  # older versions did not save it
            }
            search = search_or_continue(search, loaded, images, layers, run, origin, stop)
            write_tables(run, search, chain, images, numbers)
            title = f"{model_name(loaded.metadata.model)} on {config.data.title}"
            atlas = Atlas(
                title, split.name, deconvnet, images, loaded.data, search, weights, verdict=verdict, numbers=numbers
            )
            similarity, sensitivity = {}, {}
            for layer in tqdm(layers, "figures", unit="layer", disable=None, leave=False):
                units = draw_layer(atlas, layer, self.maps, config.seed, run)
                if self.controls and len(units) > 1:
                    shown, units[:, 0] = units[:, 0].unique(return_inverse=True)
                    inputs = preprocess(images.pixels(shown).to(device), loaded.data)
                    controls = project_controls(deconvnet, inputs, layer, units, config.seed)
                    similarity[layer] = compare_controls(controls, inside_frames(chain, layer, units))
                    sensitivity[layer] = dead_window_sensitivity(deconvnet, inputs, layer, units)
                stop.check()
            if similarity:
                write_controls(run, similarity, sensitivity)
            if self.atlas:
                atlas = self._with_responses(atlas, loaded, layers, other, run.folder)
                page = write_atlas(atlas, run.folder / "atlas", stop.check)
                log.info("open %s in a browser", page if self.atlas is True else write_single(page.parent))
            log.info("written to %s", run.folder)

    def _with_responses(
        self,
        atlas: Atlas,
        loaded: LoadedRun,
        layers: Sequence[str],
        other: tuple[Chain, ModelMetadata] | None,
        folder: Path,
    ) -> Atlas:
        """Return the atlas with statistics of each map over `job.sample` of its images, at even intervals."""
        chain, count = loaded.chain, min(self.sample, len(atlas.images))
        chosen = torch.linspace(0, len(atlas.images) - 1, count).round().long()
        pixels = [atlas.images.pixels(part) for part in chosen.split(loaded.data.batch_size)]
        batches = [to_inputs(loaded, part) for part in pixels]
        strongest = strongest_activations(chain, batches, layers)
        effects: dict[str, Tensor] = {}
        ablated = min(count, self.ablation)
        if ablated:
            log.info("setting each map to zero on %d images (job.ablation)", ablated)
            few = torch.cat(batches)[torch.linspace(0, count - 1, ablated).round().long()]
            effects = ablation_effects(chain, few.split(loaded.data.batch_size), layers)
        responses = {layer: MapResponses(strongest[layer], effects.get(layer)) for layer in layers}
        atlas = replace(atlas, responses=responses, ablated=ablated)
        if other is None:
            return atlas
        there, metadata = other
        theirs = []
        for part in pixels:  # the same images, in the other network's stored size
            stored = resize(part.permute(0, 3, 1, 2), metadata.stored_size).permute(0, 2, 3, 1)
            theirs.append(preprocess(stored.to(loaded.runtime.device), metadata.data, channels_last=False))
        nearest = nearest_maps(strongest, strongest_activations(there, theirs, there.conv_layers))
        page = find_atlas(weights_hash(there.model.state_dict()))
        link = None if page is None else link_to(page, folder if self.atlas == "single" else folder / "atlas")
        return replace(atlas, nearest=nearest, other={"name": Path(str(self.other)).name, "atlas": link})


# ---- your own photographs


def explain_photographs(
    job: DeconvnetJob, config: Config, output: Path, loaded: LoadedRun, deconvnet: Deconvnet, layers: Sequence[str]
) -> None:
    """Write each layer's `job.maps` strongest maps in the images of `images=[…]`: figures, index.html, strongest.csv.

    Maps that are not active are left out, because they have nothing to project.
    """
    pixels, names = read_files(loaded, config.images or ())
    page = find_atlas(weights_hash(loaded.model.state_dict()), job.pages)
    inputs = to_inputs(loaded, pixels)
    probabilities = predict(loaded, inputs)
    images = image_set(pixels.numpy(), torch.zeros(len(pixels)), loaded.classes)
    with torch.no_grad():
        activations = loaded.chain.activations(inputs, layers)
    with own_directory(config, output) as run:
        rows: list[dict[str, Any]] = []
        photographs = []
        for number, name in enumerate(names):
            values, labels = probabilities[number].topk(min(5, len(loaded.classes)))
            best = [(loaded.classes[c], p) for c, p in zip(labels.tolist(), values.tolist(), strict=True)]
            photograph = Photograph(name, to_pixels(inputs[number : number + 1], loaded.data)[0], best, {})
            for layer in layers:
                maps = activations[layer][number].cpu()
                ((value,), (place,)) = peaks(maps[None])
                order = value.argsort(descending=True, stable=True)[: job.maps]
                order = order[value[order] > 0]
                units = torch.column_stack((torch.full_like(order, number), order, place[order]))
                projections, patches = view_units(deconvnet, images, loaded.data, layer, units)
                boxes = receptive_boxes(loaded.chain, layer, units[:, 2:])
                strongest, strengths = order.tolist(), value[order].tolist()
                photograph.layers[layer] = Strongest(strongest, strengths, on_grey(projections), patches)
                rows += to_rows(
                    image=[name] * len(order),
                    layer=[layer] * len(order),
                    rank=range(1, len(order) + 1),
                    map=strongest,
                    activation=[f"{v:.6g}" for v in strengths],
                    y=units[:, 2].tolist(),
                    x=units[:, 3].tolist(),
                    **dict(zip(("top", "left", "bottom", "right"), boxes.T.tolist(), strict=True)),
                )
            photographs.append(photograph)
            save_figure(draw_photograph(photograph), run.figures / f"photograph_{number + 1}.png")
        run.write_csv("strongest.csv", rows, list(rows[0]) if rows else ["image", "layer", "rank", "map"])
        run.write_csv("predictions.csv", prediction_rows(names, probabilities, loaded.classes))
        link = None if page is None else link_to(page, run.folder)
        write_photographs(run.folder / "index.html", photographs, str(loaded.source.folder), link)
        if link is None:
            log.info(
                "no atlas of this network was found, so the tiles have no links: make one with job=deconvnet run=%s",
                loaded.source.folder,
            )
        log.info("open %s in a browser", run.folder / "index.html")


@styled()
def draw_photograph(photograph: Photograph) -> Figure:
    """Draw an image with its predictions and, next to it, a row for each layer: projections above their patches."""
    columns = max([1, *(len(row.maps) for row in photograph.layers.values())])
    figure = new_figure(figsize=(2.6 + 0.95 * columns, max(3.4, 2.3 * len(photograph.layers)) + 0.4))
    title = f"{shorten(photograph.name, 30)}: each layer's strongest maps, projected, and what they see"
    figure.suptitle(title, parse_math=False)
    grid = figure.add_gridspec(len(photograph.layers), 2, width_ratios=[2.4, 0.95 * columns])
    picture = figure.add_subplot(grid[:, 0])
    show(picture, photograph.pixels)
    picture.set_anchor("N")
    picture.set_xlabel("\n".join(f"{shorten(c, 24)}  {p:.1%}" for c, p in photograph.predictions), parse_math=False)
    for number, (layer, row) in enumerate(photograph.layers.items()):
        axis = figure.add_subplot(grid[number, 1])
        what = "map and activation" if row.maps else "no map is active"
        axis.set_title(f"{layer}: {what}", loc="left", parse_math=False)
        if not row.maps:
            axis.axis("off")
            continue
        tiles = enlarge(torch.cat((row.projections, row.patches)), 96)
        blank = torch.full((columns - len(row.maps), *tiles.shape[1:]), 255, dtype=torch.uint8)
        upper, lower = tiles.split(len(row.maps))
        labels = [f"{m}\n{v:.3g}" for m, v in zip(row.maps, row.values, strict=True)]
        show_mosaic(axis, torch.cat((upper, blank, lower, blank)), [*labels, *[""] * len(blank)], gap=4)
    return figure


# ---- search


def search_or_continue(
    search: TopActivations,
    loaded: LoadedRun,
    images: ImageSet,
    layers: Sequence[str],
    run: RunDirectory,
    origin: Mapping[str, Any],
    stop: StopRequest,
) -> TopActivations:
    """Search for the strongest activations, or resume a search that was stopped in this directory.

    origin: fingerprints of the weights and the data. Raises UserError if those of a saved search differ, or if its file
    is damaged.
    """
    path, writer, last = run.folder / SEARCH, CheckpointWriter(run.folder), time.monotonic()
    if path.exists():
        try:
            saved = read_checkpoint(path)
        except UserError as error:
            if isinstance(error.__cause__, OSError):
                raise
            raise UserError(f"{error}: delete it to search again") from error
        if saved.metadata["of"] != origin:
            raise UserError(
                f"{path} has other weights, images or another version: choose another directory (hydra.run.dir=…)"
            )
        search = TopActivations.from_state(saved.tensors, saved.metadata["search"], loaded.runtime.device)
        log.info("continuing after %d images", search.images)

    def save() -> None:
        tensors, state = search.state()
        writer.write(SEARCH, Checkpoint(tensors, {"search": state, "of": origin}), prune=False)

    def after_batch(_: TopActivations) -> None:
        nonlocal last
        if stop.number is not None or time.monotonic() - last > _SAVE_SECONDS:
            save()
            last = time.monotonic()
        stop.check()

    try:
        with stop.deferred():
            collect(loaded.chain, images, loaded.batches, layers, search, after_batch)
        save()
    finally:
        writer.close()
    return search


def write_tables(run: RunDirectory, search: TopActivations, chain: Chain, images: ImageSet, numbers: Tensor) -> None:
    """Write top_activations.csv with one row per activation, and maps.csv with one row per map.

    numbers: int64 [N], the images' numbers in their split
    """
    tops, maps = [], []

    def short(values: Tensor) -> list[str]:
        return [f"{value:.6g}" for value in values.tolist()]

    for layer, record in search.layers.items():
        channel, rank = record.filled.nonzero().cpu().unbind(1)
        image, y, x = record.places().cpu()[channel, rank].unbind(1)
        boxes = receptive_boxes(chain, layer, torch.stack((y, x), 1))
        tops += to_rows(
            layer=[layer] * len(image),
            map=channel.tolist(),
            rank=(rank + 1).tolist(),
            activation=short(record.values.cpu()[channel, rank]),
            image=numbers[image].tolist(),
            **{"class": [images.classes[c] for c in images.labels[image].tolist()]},
            y=y.tolist(),
            x=x.tolist(),
            **dict(zip(("top", "left", "bottom", "right"), boxes.T.tolist(), strict=True)),
        )
        stats = search.statistics(layer)
        best, dead = stats.best_class.tolist(), stats.dead.tolist()
        q = false_discovery_rate(stats.p.masked_fill(stats.dead, torch.nan).cpu())
        maps += to_rows(
            layer=[layer] * len(best),
            map=range(len(best)),
            mean_activation=short(stats.mean),
            image_share=short(stats.image_share),
            position_share=short(stats.position_share),
            selectivity=short(stats.selectivity),
            selectivity_by_chance=short(stats.chance),
            selectivity_q=["" if d else q for d, q in zip(dead, short(q), strict=True)],
            **{"class": ["" if d else images.classes[c] for c, d in zip(best, dead, strict=True)]},
            dead=map(int, dead),
        )
        excess = stats.selectivity - stats.chance
        log.info("%s: class selectivity beyond that of shuffled labels: mean %.2f", layer, float(excess.mean()))
        if any(dead):
            log.info("%s: %d of %d maps are never active", layer, sum(dead), len(dead))
    if tops:
        run.write_csv("top_activations.csv", tops)
    run.write_csv("maps.csv", maps)


# ---- controls


def project_controls(
    deconvnet: Deconvnet, images: Tensor, layer: str, units: Tensor, seed: int = 0
) -> dict[str, Tensor]:
    """Project units (image, channel, y, x) of images [N, 3, H, W], without a control (`own`) and with each control.

    Returns projections cut to the units' receptive fields, [U, 3, s, s]; for `random_weights` [K, U, 3, s, s] for K
    shuffles. `other_unit` is another unit that is active at the same place; 0 if there is none. `other_switches` is
    left out if there is no max pooling or all images are equal. All seeds are 1, because a control's own activation can
    be 0, and a seed only scales a projection. With `rule=guided` or `gradient` an inactive unit still projects to 0.
    """
    chain = deconvnet.chain
    ones = torch.ones(len(units), dtype=images.dtype)
    with torch.no_grad():
        maps = chain.activations(images, [layer])[layer].cpu()
    active = maps[units[:, 0], :, units[:, 2], units[:, 3]] > 0
    active[torch.arange(len(units)), units[:, 1]] = False
    chance = torch.stack([uniform(make_key(seed, CONTROL, 1, n), torch.arange(len(a))) for n, a in enumerate(active)])
    neighbours, has_neighbour = units.clone(), active.any(1)
    neighbours[:, 1] = torch.where(active, 1 + chance, 0).argmax(1)
    # cut to the receptive field, because the zeros outside would make any two projections similar
    project = functools.partial(project_frames, layer=layer, seeds=ones)
    shuffled = (
        Deconvnet(shuffle_weights(chain, layer, seed, k), deconvnet.rule, deconvnet.dead_windows, deconvnet.lrn)
        for k in range(_SHUFFLES)
    )
    projections = {
        "own": project(deconvnet, images, units=units),
        "random_weights": torch.stack([project(twin, images, units=units) for twin in shuffled]),
        "other_unit": project(deconvnet, images, units=neighbours) * has_neighbour.to(images)[:, None, None, None],
    }
    distinct, number = images.cpu().flatten(1).unique(dim=0, return_inverse=True)  # an image can occur twice
    if len(distinct) > 1 and any(isinstance(step.module, nn.MaxPool2d) for step in window_steps(chain, layer)):
        others = distinct.roll(1, 0)[number].view_as(images)
        projections["other_switches"] = project(deconvnet, images, units=units, switches_from=others)
    return projections


def inside_frames(chain: Chain, layer: str, units: Tensor) -> Tensor:
    """Return the boxes that units see in the frames of `project_frames`: int64 [U, 4], (top, left, bottom, right)."""
    boxes = receptive_boxes(chain, layer, units[:, 2:])
    if frame_size(chain, layer) == chain.image_size:
        return boxes
    return boxes - receptive_field(chain, layer).corners(units[:, 2:]).repeat(1, 2)


def compare_controls(projections: Mapping[str, Tensor], inside: Tensor) -> dict[str, dict[str, Summary]]:
    """Return for each control `describe` of its rank correlation with the units' own projections: signed and unsigned.

    projections: from `project_controls`; inside: from `inside_frames`, [U, 4]. All projections are 0 outside this box,
    and equal ranks there would make independent pictures similar. `unsigned` compares absolute values, because pictures
    can have their energy in the same place with other signs. A unit with a constant projection has no correlation.
    """
    own, rows = projections["own"], {}
    seen = box_cells(inside, (own.shape[2], own.shape[3]), side=1)[:, None] == 0
    for name, control in projections.items():
        if name != "own":
            draws = control if control.ndim == 5 else control[None]  # the mean over several shuffles
            signed = torch.stack([rank_correlation(own, draw, seen) for draw in draws]).mean(0)
            unsigned = torch.stack([rank_correlation(own.abs(), draw.abs(), seen) for draw in draws]).mean(0)
            rows[name] = {"signed": describe(signed), "unsigned": describe(unsigned)}
    return rows


def _interval(row: Mapping[str, float | int | None]) -> str:
    if row["mean"] is None:
        return "–"
    return f"{row['mean']:+.2f}" + ("" if row["low"] is None else f" [{row['low']:+.2f}, {row['high']:+.2f}]")


def dead_window_sensitivity(
    deconvnet: Deconvnet, images: Tensor, layer: str, units: Tensor
) -> dict[str, dict[str, float | None]]:
    """Return how much projections change if pooling windows without an active cell are treated in another way.

    Contains, for each other choice of `dead_windows`, the mean change relative to the projection's norm and the mean
    cosine; None if all projections are 0.
    """
    own = deconvnet.project(images, layer, units).flatten(1)
    active = own.norm(dim=1) > 0
    rows: dict[str, dict[str, float | None]] = {}
    for choice in (c for c in DEAD_WINDOWS if c != deconvnet.dead_windows):
        other = Deconvnet(deconvnet.chain, deconvnet.rule, choice, deconvnet.lrn).project(images, layer, units)
        here, there = own[active], other.flatten(1)[active]
        change = (there - here).norm(dim=1) / here.norm(dim=1)
        cosine = torch.cosine_similarity(there, here)
        means = {"relative_change": change, "cosine": cosine}
        rows[choice] = {key: float(values.mean()) if len(values) else None for key, values in means.items()}
    return rows


def check_weights(chain: Chain) -> None:
    """Raise UserError if a hook computes weights, as with torch.nn.utils.weight_norm: a copy cannot be shuffled."""
    for name in chain.layers:
        module: Any = chain.model.get_submodule(name)
        if not parametrize.is_parametrized(module, "weight") and not isinstance(module.weight, nn.Parameter):
            raise UserError(f"{name}: a hook computes its weights; use a norm of torch.nn.utils.parametrizations")


@torch.no_grad()
def shuffle_weights(
    chain: Chain, layer: str, seed: int = 0, draw: int = 0, only: Collection[str] | None = None
) -> Chain:
    """Return a copy with shuffled weights up to `layer`: each layer has the same numbers in random order.

    only: names of the layers to shuffle; None means all of them
    Raises UserError as `check_weights` does.
    """
    check_weights(chain)
    twin = copy.deepcopy(chain)
    weighted = [(step.name, step.module) for step in twin.up_to(layer) if step.name in twin.layers]
    for number, (name, module) in enumerate(weighted):
        if only is not None and name not in only:
            continue
        if parametrize.is_parametrized(module, "weight"):  # with weight norm, for example, weight is computed
            # the copy shares its class with the original, and `remove_parametrizations` changes the class
            shared = type(module)
            module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
            parametrize.remove_parametrizations(module, "weight")
        weight: Any = module.weight
        order = permutation(make_key(seed, CONTROL, 0, number, draw), weight.numel()).to(weight.device)
        weight.copy_(weight.flatten()[order].view_as(weight))
    return twin


def write_controls(
    run: RunDirectory,
    similarity: Mapping[str, Mapping[str, Mapping[str, Any]]],
    sensitivity: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write what `compare_controls` and `dead_window_sensitivity` return for each layer, and log the former."""
    run.write_json("controls.json", similarity)
    run.write_json("dead_windows.json", sensitivity)
    save_figure(draw_controls(similarity), run.figures / "controls.png")
    log.info("rank correlation of projections with those of controls, mean [95% interval]")
    log.info("(near 1: the pictures do not depend on the unit), %s:", " and ".join(SIMILARITIES))
    for layer, rows in similarity.items():
        for name, row in rows.items():
            cells = "  ".join(f"{_interval(row[kind]):<20}" for kind in SIMILARITIES)
            log.info("  %-6s %-14s n %-3s %s", layer, name, row["signed"]["n"], cells.rstrip())


# ---- figures


def draw_layer(atlas: Atlas, layer: str, count: int, seed: int, run: RunDirectory) -> Tensor:
    """Draw `count` of a layer's maps and write the values that the figure shows; return units for the controls.

    The units, int64 [U, 4], are the strongest ones of up to _CONTROL_UNITS maps, in the same random order.
    """
    record = atlas.search.layers[layer]
    alive = record.filled[:, 0].cpu().nonzero().flatten()
    if len(alive) == 0:
        log.info("%s: no map is ever active, so there is nothing to draw", layer)
        return torch.zeros(0, 4, dtype=torch.int64)
    number = 1 + atlas.deconvnet.chain.conv_layers.index(layer)
    order = alive[permutation(make_key(seed, CONTROL, 2, number), len(alive))]
    maps, sampled = order[:count].sort().values, order[:_CONTROL_UNITS].sort().values
    views = view_maps(atlas.deconvnet, atlas.images, atlas.data, layer, record, maps)
    title = (
        f"{layer}: the strongest activations of {len(maps)} of {len(record.values)} maps "
        f"over {atlas.search.images:,} {atlas.split} images"
    )
    figure = draw_projections(title, maps.tolist(), *(list(tiles) for tiles in views.tiles.unbind(1)))
    save_figure(figure, run.figures / f"deconvnet_{layer}.png")
    path = run.folder / "projections" / f"{layer}.safetensors"
    path.parent.mkdir(exist_ok=True)
    units = torch.column_stack((torch.tensor(atlas.in_split(views.units[:, 0])), views.units[:, 1:].cpu()))
    write_tensors(path, {"units": units, "projections": views.projections, "patches": views.patches}, {})
    image, y, x = record.places().cpu()[sampled, 0].unbind(1)
    return torch.stack((image, sampled, y, x), 1)


@styled()
def draw_projections(
    title: str, maps: Sequence[int], projections: Sequence[Tensor], patches: Sequence[Tensor]
) -> Figure:
    """Draw the paper's Fig. 2 for one layer: the projections of maps on the left, their image patches on the right.

    maps: numbers of the feature maps; projections, patches: for each map uint8 [top, h, w, 3], in the same order
    """
    columns = math.ceil(math.sqrt(len(maps)))
    rows = -(-len(maps) // columns)
    figure = new_figure(figsize=(4.0 * columns + 0.4, 2.2 * rows + 0.55))
    figure.suptitle(title)
    axes = figure.subplots(1, 2)
    sides = {
        "projections (grey: no signal; each on its own scale)": projections,
        "image patches (grey: outside the image)": patches,
    }
    for axis, (name, tiles) in zip(axes, sides.items(), strict=True):
        blocks = [mosaic(block, math.ceil(math.sqrt(len(block))), gap=3, side=96) for block in tiles]
        height, width = (side + side // 9 for side in blocks[0].shape[:2])  # leaves room for the map's number
        sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
        for place, (number, block) in enumerate(zip(maps, blocks, strict=True)):
            top, left = height * (place // columns) + height - block.shape[0], width * (place % columns)
            sheet[top : top + block.shape[0], left : left + block.shape[1]] = block
            middle = left + block.shape[1] / 2
            axis.text(middle, top - height / 75, f"map {number}", ha="center", va="bottom", fontsize=8)
        show(axis, sheet, interpolation="antialiased")
        axis.set_title(name)
    return figure


@styled()
def draw_controls(similarity: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Draw the rank correlation of projections with those of each control, by layer: signed and unsigned."""
    layers = list(similarity)
    figure = new_figure(figsize=(2 * max(5.0, 1.5 * len(layers) + 1.0), 4.4))
    figure.suptitle("Similarity of projections to those of controls (1: the picture shows the image, not the unit)")
    width = 0.8 / len(CONTROLS)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (kind, of_what) in zip(axes, SIMILARITIES.items(), strict=True):
        for place, ((name, meaning), colour) in enumerate(zip(CONTROLS.items(), (BLUE, ORANGE, PURPLE), strict=True)):
            rows = [(k, similarity[layer][name][kind]) for k, layer in enumerate(layers) if name in similarity[layer]]
            rows = [(k, row) for k, row in rows if row["mean"] is not None]
            at = [k + (place - (len(CONTROLS) - 1) / 2) * width for k, _ in rows]
            means = [row["mean"] for _, row in rows]
            axis.bar(at, means, width * 0.92, color=colour, label=meaning)
            for x, (_, row) in zip(at, rows, strict=True):
                if row["low"] is not None:
                    axis.plot([x, x], [row["low"], row["high"]], color=INK, lw=1.2)
        axis.axhline(0, color=SOFT, linewidth=0.8)
        axis.axhline(1, color=SOFT, linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(layers)), [f"{k}\nn = {_unit_counts(similarity[k])}" for k in layers])
        axis.grid(axis="x", visible=False)
        axis.set(title=f"{kind}: {of_what}", ylim=(min(-0.3, axis.get_ylim()[0]), 1.15))
    axes[0].set(ylabel="rank correlation: mean over n units\nand its 95% interval")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _unit_counts(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the number of units of a layer's controls: one number, or the smallest and the largest."""
    counts = sorted({row["signed"]["n"] for row in rows.values()})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} … {counts[-1]}"
