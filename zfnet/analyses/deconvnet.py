"""job=deconvnet: what excites each feature map, by the deconvnet (paper, Fig. 2), with controls and an atlas."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Optional

import torch
from tqdm import tqdm

from zfnet.config.errors import UserError, did_you_mean
from zfnet.config.randomness import CONTROL, make_key, permutation
from zfnet.config.ranges import limits, one_of
from zfnet.config.schema import Config, DataConfig, Job
from zfnet.data import ImageSet, preprocess
from zfnet.explain.controls import dead_window_sensitivity, project_controls
from zfnet.explain.crops import look
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.model.sizes import CONV_LAYERS
from zfnet.model.zfnet import ZFNet
from zfnet.plots.atlas import Atlas, write_atlas
from zfnet.plots.figures import save_figure
from zfnet.plots.pictures import GREY, on_grey, to_pixels
from zfnet.plots.projections import draw_controls, draw_projections
from zfnet.plots.top_activations import write_tables
from zfnet.runs.directory import RunDirectory, write_tensors
from zfnet.runs.hydra_record import write_hydra_record
from zfnet.runs.session import hold, recorded_state
from zfnet.runs.signals import StopRequest
from zfnet.runs.weights import weights_hash
from zfnet.training.checkpoint import Checkpoint, CheckpointWriter, read_checkpoint
from zfnet.training.loaded import LoadedRun

log = logging.getLogger("zfnet")

SEARCH = "search.safetensors"
_SAVE_SECONDS = 30.0
_CONTROL_UNITS = 16  # for each layer


@dataclass(frozen=True)
class Subject:
    """What is looked at: the network, and the images of one split."""

    used: LoadedRun
    images: ImageSet
    split: str
    layers: list[str]
    metadata: dict[str, Any]  # what a saved search belongs to

    @property
    def model(self) -> ZFNet:
        return self.used.model

    @property
    def device(self) -> torch.device:
        return self.used.runtime.device

    @property
    def data(self) -> DataConfig:
        return self.used.data


@dataclass(kw_only=True)
class DeconvnetJob(Job):
    """See conf/job/deconvnet.yaml."""

    reads_run: ClassVar[str] = "needed"

    layers: Optional[list[str]]
    top: int = limits(low=1, high=100)
    maps: int = limits(low=1, high=100)
    split: str = one_of("auto", "train", "validation", "test")
    max_images: Optional[int] = limits(low=1)
    rule: str = one_of("deconvnet", "guided", "gradient")
    dead_windows: str = one_of("first", "mask", "all")
    lrn: str = one_of("identity", "gradient")
    controls: bool
    atlas: bool

    def main(self, config: Config, output: Path) -> None:
        """Look into the network of `run=…`; all is written to `output`, where a stopped job goes on."""
        run, subject = RunDirectory(output), _load(config)
        _claim(config, run)
        again = f"stopped; to go on, give the command again with hydra.run.dir={run.folder}"
        with hold(run, "deconvnet.log") as stop:
            if run.state == "done":
                print(f"nothing to do: {run.folder} is finished")
                return
            with recorded_state(run, again):
                _explain(config, subject, run, stop)
            log.info("written to %s", run.folder)


def _claim(config: Config, run: RunDirectory) -> None:
    """Take the directory; raise UserError where it holds anything but this very job."""
    if not run.claim(config):
        write_hydra_record(run.folder, config)
        return
    before, now = run.plain_config(), config.to_dict()
    if (before["job"], before["run"]) != (now["job"], now["run"]):
        raise UserError(
            f"{run.folder} holds a job with other settings: choose another directory (hydra.run.dir=…)"
        )


def _explain(config: Config, subject: Subject, run: RunDirectory, stop: StopRequest) -> None:
    job = config.job
    deconvnet = Deconvnet(subject.model, job.rule, job.dead_windows, job.lrn)
    log.info("%s: %s", subject.used.source.folder, ", ".join(subject.layers))
    log.info(
        "%s %s images on %s, rule %s", f"{len(subject.images):,}", subject.split, subject.device, job.rule
    )
    found = _search(subject, job.top, run, stop)
    write_tables(found, subject.model, subject.images, run.folder)
    for layer in subject.layers:
        dead = found.statistics(layer).dead
        if bool(dead.any()):
            log.info("%s: %d of %d maps are never active", layer, int(dead.sum()), len(dead))
    similarity, sensitivity = {}, {}
    for layer in tqdm(subject.layers, "figures", unit="layer", disable=None, leave=False):
        units = _draw_layer(config, subject, deconvnet, found, layer, run)
        if job.controls and len(units) > 1:
            inputs = preprocess(subject.images.pixels(units[:, 0]).to(subject.device), subject.data)
            units[:, 0] = torch.arange(len(units))
            similarity[layer] = project_controls(deconvnet, inputs, layer, units, config.seed).similarity()
            sensitivity[layer] = dead_window_sensitivity(deconvnet, inputs, layer, units)
        stop.check()
    if similarity:
        run.write_json("controls.json", similarity)
        run.write_json("dead_windows.json", sensitivity)
        save_figure(draw_controls(similarity), run.figures / "controls.png")
        _say(similarity)
    if job.atlas:
        title = f"{config.model.name} on {config.data.name}"
        atlas = Atlas(title, subject.split, deconvnet, subject.images, subject.data, found)
        log.info("open %s in a browser", write_atlas(atlas, run.folder / "atlas", stop.check))


def _load(config: Config) -> Subject:
    used, job = LoadedRun(config), config.job
    known = [layer for layer in used.model.layers if layer in CONV_LAYERS]
    for layer in job.layers or ():
        if layer not in known:
            raise UserError(f"job.layers={layer}: no such convolution layer{did_you_mean(layer, known)}")
    if job.layers == []:
        raise UserError("job.layers=[]: names no layer; null is all of them")
    splits = used.splits()
    split = job.split
    if split == "auto":
        split = "validation" if splits.validation is not None else "test"
    images = used.split(split, splits)
    if job.max_images is not None and job.max_images < len(images):
        images = images.take(torch.linspace(0, len(images) - 1, job.max_images).round().long())
    metadata = {"weights": weights_hash(used.model.state_dict()), "data": splits.fingerprint}
    layers = [layer for layer in known if job.layers is None or layer in job.layers]
    return Subject(used, images, split, layers, metadata)


def _search(subject: Subject, top: int, run: RunDirectory, stop: StopRequest) -> TopActivations:
    """Find the strongest activations; a search that was stopped here goes on."""
    found, path = TopActivations(top, len(subject.images.classes)), run.folder / SEARCH
    if path.exists():
        saved = read_checkpoint(path)
        if saved.metadata["of"] != subject.metadata:
            raise UserError(
                f"{path} belongs to other weights or images: choose another directory (hydra.run.dir=…)"
            )
        found = TopActivations.from_state(saved.tensors, saved.metadata["search"], subject.device)
        log.info("going on after %d images", found.images)
    writer = CheckpointWriter(run.folder)

    def keep() -> None:
        tensors, metadata = found.state()
        writer.write(SEARCH, Checkpoint(tensors, {"search": metadata, "of": subject.metadata}), prune=False)

    last = time.monotonic()

    def after_batch(_: TopActivations) -> None:
        nonlocal last
        if stop.number is not None or time.monotonic() - last > _SAVE_SECONDS:
            keep()
            last = time.monotonic()
        stop.check()

    try:
        with stop.deferred():
            collect(subject.model, subject.images, subject.used.batches, subject.layers, found, after_batch)
        keep()
    finally:
        writer.close()
    return found


def _draw_layer(
    config: Config,
    subject: Subject,
    deconvnet: Deconvnet,
    found: TopActivations,
    layer: str,
    run: RunDirectory,
) -> torch.Tensor:
    """Draw a layer's figure and write the values that it shows; return some of its units, for the controls."""
    record = found.layers[layer]
    alive = record.filled[:, 0].cpu().nonzero().flatten()
    if len(alive) == 0:
        log.info("%s: no map is ever active, so there is nothing to draw", layer)
        return torch.zeros(0, 4, dtype=torch.int64)
    order = permutation(make_key(config.seed, CONTROL, 2, int(layer[-1])), len(alive))
    chosen = alive[order[: config.job.maps]].sort().values
    filled, places = record.filled.cpu()[chosen], record.places().cpu()[chosen]
    number, rank = filled.nonzero().unbind(1)
    place = places[number, rank]
    units = torch.stack((place[:, 0], chosen[number], place[:, 1], place[:, 2]), 1)
    views = look(deconvnet, subject.images, subject.data, layer, units)
    side = views.patches.shape[-1]
    blank = torch.full((len(chosen), config.job.top, side, side, 3), GREY, dtype=torch.uint8)
    projections, patches = blank.clone(), blank
    projections[number, rank] = on_grey(views.projections)
    pixels = torch.where(views.inside.permute(0, 2, 3, 1), to_pixels(views.patches, subject.data), GREY)
    patches[number, rank] = pixels
    title = (
        f"{layer}: the strongest activations of {len(chosen)} of {len(record.values)} maps "
        f"over {found.images:,} {subject.split} images"
    )
    figure = draw_projections(title, chosen.tolist(), list(projections), list(patches))
    save_figure(figure, run.figures / f"deconvnet_{layer}.png")
    folder = run.folder / "projections"
    folder.mkdir(exist_ok=True)
    shown = {"units": units, "projections": views.projections, "patches": pixels}
    write_tensors(folder / f"{layer}.safetensors", shown, {})
    first = units[rank == 0]
    return first[:_CONTROL_UNITS]


def _say(similarity: dict[str, dict[str, dict[str, Any]]]) -> None:
    log.info("rank correlation of projections with those of controls")
    log.info("(near 1: the pictures do not tell the unit):")
    for layer, rows in similarity.items():
        words = [
            f"{name} {row['rank_correlation']:+.2f}" if row["rank_correlation"] is not None else f"{name} –"
            for name, row in rows.items()
        ]
        log.info("  %s  %s", layer, "  ".join(words))
