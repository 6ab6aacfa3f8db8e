"""job=deconvnet: what excites each feature map, by the deconvnet (paper, Fig. 2), with controls and an atlas."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from zfnet.config import Config, DataConfig
from zfnet.data import ImageSet, preprocess
from zfnet.errors import UserError, did_you_mean
from zfnet.explain.controls import dead_window_sensitivity, project_controls
from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.explain.views import look
from zfnet.geometry import CONV_LAYERS
from zfnet.hydra_record import write_hydra_record
from zfnet.jobs.common import UsedRun, hold, recorded_state
from zfnet.model import ZFNet
from zfnet.randomness import CONTROL, make_key, permutation
from zfnet.report.atlas import Atlas, write_atlas
from zfnet.report.figures import save_figure
from zfnet.report.pictures import GREY, on_grey, to_pixels
from zfnet.report.projections import draw_controls, draw_projections
from zfnet.report.top_activations import write_tables
from zfnet.run import RunDirectory, write_tensors
from zfnet.training.checkpoint import Checkpoint, CheckpointWriter, read_checkpoint
from zfnet.training.signals import StopRequest
from zfnet.weights import weights_hash

log = logging.getLogger("zfnet")

SEARCH = "search.safetensors"
_SAVE_SECONDS = 30.0
_CONTROL_UNITS = 16  # for each layer


@dataclass(frozen=True)
class Subject:
    """What is looked at: the network, and the images of one split."""

    used: UsedRun
    images: ImageSet
    split: str
    layers: list[str]
    facts: dict[str, Any]  # what a saved search belongs to

    @property
    def model(self) -> ZFNet:
        return self.used.model

    @property
    def device(self) -> torch.device:
        return self.used.plan.device

    @property
    def data(self) -> DataConfig:
        return self.used.data


def main(config: Config, output: Path, overrides: list[str]) -> None:
    """Look into the network of `run=…`; all is written to `output`, where a stopped job goes on."""
    run, subject = RunDirectory(output), _load(config, overrides)
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
    before = run.read_config()
    if (before.job, before.run) != (config.job, config.run):
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


def _load(config: Config, overrides: list[str]) -> Subject:
    used, job = UsedRun(config, overrides), config.job
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
    facts = {"weights": weights_hash(used.model.state_dict()), "data": splits.fingerprint}
    layers = [layer for layer in known if job.layers is None or layer in job.layers]
    return Subject(used, images, split, layers, facts)


def _search(subject: Subject, top: int, run: RunDirectory, stop: StopRequest) -> TopActivations:
    """Find the strongest activations; a search that was stopped here goes on."""
    found, path = TopActivations(top, len(subject.images.classes)), run.folder / SEARCH
    if path.exists():
        saved = read_checkpoint(path)
        if saved.facts["of"] != subject.facts:
            raise UserError(
                f"{path} belongs to other weights or images: choose another directory (hydra.run.dir=…)"
            )
        found = TopActivations.from_state(saved.tensors, saved.facts["search"], subject.device)
        log.info("going on after %d images", found.images)
    writer = CheckpointWriter(run.folder)

    def keep() -> None:
        tensors, facts = found.state()
        writer.write(SEARCH, Checkpoint(tensors, {"search": facts, "of": subject.facts}), prune=False)

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
