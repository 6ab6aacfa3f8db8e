"""job=extend and job=fork: continue from an epoch of another run, in a new directory and with other settings."""

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Optional

import torch
from pydantic import Field

from zfnet.config.errors import UserError, log
from zfnet.config.reading import read_config
from zfnet.config.schema import Config, Job, ModelConfig, Parent, flatten
from zfnet.data.images import data_hash
from zfnet.jobs.train import run_as_worker, train, train_and_test
from zfnet.model.zfnet import ZFNet
from zfnet.runs.directory import RunDirectory, find_run
from zfnet.runs.session import StopRequest
from zfnet.runs.weights import weights_hash
from zfnet.sweeps.callback import trial_report
from zfnet.training.build import check_recipe
from zfnet.training.checkpoint import (
    BEST_FILE,
    Checkpoint,
    CheckpointWriter,
    copy_checkpoint,
    epoch_files,
    epoch_name,
    read_checkpoint,
    step_files,
    step_name,
    strip_prefix,
)
from zfnet.training.device import recorded_threads

# keys of the network that do not change the shapes of the weights
_CHANGEABLE_KEYS = ("model.name", "model.dropout", "model.rms_limit", "model.init")


@dataclass(kw_only=True)
class BranchJob(Job):
    """`schedule` chooses how the learning rate continues."""

    reads_run: ClassVar[str] = "needed"
    trains: ClassVar[bool] = True

    schedule: Literal["stretch", "continue", "restart"]

    def main(self, config: Config, output: Path) -> float | None:
        """Train from the parent's state in `output`, or continue there if it contains the same run, unfinished.

        The new run is recorded as a training, and its config contains the parent's config. Raises UserError if the
        parent does not have that state, or if the settings do not fit it.
        """
        if run_as_worker(config, output):
            return None
        parent = find_run(str(config.run))
        epoch = self.epoch_of(parent, config)
        path, best = _state_files(parent, epoch)
        saved = read_checkpoint(path)
        link = _link(parent, saved, self.schedule, config.imports)
        # do not record Hydra's composed config: it has today's defaults, and the parent's settings can differ from them
        config = replace(config, parent=link, job=Job(name="train"), run=None, composed=None)
        _check(config)
        run = RunDirectory(output)
        print(f"from {parent.folder}, after epoch {epoch} (weights {link.weights_sha256[:12]}…)")
        return train(config, run, trial_report(), partial(begin, config, run, saved, best))

    def epoch_of(self, parent: RunDirectory, config: Config) -> int:
        """Return the epoch of the parent after which the run begins; raise UserError."""
        raise NotImplementedError


@dataclass(kw_only=True)
class ExtendJob(BranchJob):
    def epoch_of(self, parent: RunDirectory, config: Config) -> int:
        if parent.state != "done":
            raise UserError(f"run={parent.folder} is not finished (state: {parent.state}): continue it with job=resume")
        epoch = len(parent.read_history())
        if config.trainer.epochs <= epoch:
            raise UserError(
                f"job=extend needs trainer.epochs=N, more than the {epoch} epochs that run={parent.folder} has trained"
            )
        return epoch


@dataclass(kw_only=True)
class ForkJob(BranchJob):
    epoch: Optional[Annotated[int, Field(ge=1)]]

    def epoch_of(self, parent: RunDirectory, config: Config) -> int:
        known = list(epoch_files(parent.checkpoints))
        if parent.state == "done":
            known = sorted({*known, len(parent.read_history())})
        if self.epoch in known and self.epoch < config.trainer.epochs:
            return self.epoch
        epochs = f"epoch{'s' * (len(known) > 1)} {', '.join(map(str, known))}" if known else "no epoch"
        keeps = f"run={parent.folder} keeps the state of {epochs}"
        if self.epoch is None:
            raise UserError(f"job=fork needs job.epoch=N; {keeps}")
        if self.epoch in known:
            raise UserError(f"trainer.epochs={config.trainer.epochs}: must be more than job.epoch={self.epoch}")
        problem = f"job.epoch={self.epoch}: {keeps}"
        if parent.state == "done" and self.epoch <= len(parent.read_history()):
            command = f"job=reproduce run={parent.folder} trainer.checkpoint_epochs=[{self.epoch}]"
            problem += f"; {command} makes a run that keeps the state of this epoch"
        raise UserError(problem)


def _state_files(parent: RunDirectory, epoch: int) -> tuple[Path, Path]:
    """Return the files of the state after an epoch and of the best weights up to that epoch."""
    if epoch in epoch_files(parent.checkpoints):
        return parent.checkpoints / epoch_name(epoch), parent.checkpoints / epoch_name(epoch, best=True)
    files = step_files(parent.checkpoints)
    if not files:
        raise UserError(f"{parent.checkpoints} has no checkpoint: job=reproduce run={parent.folder} trains it again")
    return files[-1], parent.checkpoints / BEST_FILE


def _link(
    parent: RunDirectory, saved: Checkpoint, schedule: Literal["stretch", "continue", "restart"], imports: list[str]
) -> Parent:
    """Return the new run's record of its parent."""
    config = parent.read_config(imports)
    if saved.metadata.get("identity", config.identity()) != config.identity():
        raise UserError(f"{parent.folder / 'config.yaml'} is not the config that its checkpoint was made with")
    return Parent(
        run=str(parent.folder),
        epoch=saved.metadata["epoch"],
        step=saved.metadata["step"],
        weights_sha256=weights_hash(strip_prefix("model", saved.tensors)),
        identity=config.identity(),
        schedule=schedule,
        config=config.to_dict(),
        threads=parent.threads,
        compiled=parent.environment.get("compiled"),
        data_hash=data_hash(parent.environment),
    )


def _check(config: Config) -> None:
    """Compare the config with its parent's; raise UserError for changes that a branch cannot make."""
    assert config.parent is not None
    before, now = (flatten({"model": c["model"]}) for c in (config.parent.config, config.to_dict()))
    for key in [*now, *before]:
        if before.get(key) != now.get(key) and key not in _CHANGEABLE_KEYS:
            raise UserError(f"{key}={now.get(key)}: must be {before.get(key)}, as in the parent")
    size, parents = config.data.image_size, config.parent.config["data"]["image_size"]
    if isinstance(config.model, ModelConfig) and _shapes(config.model, size) != _shapes(config.model, parents):
        raise UserError(
            f"data.image_size={size}: must be {parents}, as in the parent, because the weights have other shapes"
        )
    if config.trainer.init_from != config.parent.config["trainer"]["init_from"]:
        raise UserError(f"trainer.init_from={config.trainer.init_from}: the run begins with its parent's weights")
    check_recipe(config)  # check again, because the schedule's length has changed


def _shapes(model: ModelConfig, image_size: int) -> list[torch.Size]:
    """Return the shapes of the weights for images of this side."""
    with torch.device("meta"):
        return [weight.shape for weight in ZFNet(2, image_size, model).parameters()]


def begin(config: Config, run: RunDirectory, saved: Checkpoint, best: Path) -> None:
    """Write the parent's state as the run's first checkpoint and copy the best weights so far, unless it has one."""
    if step_files(run.checkpoints):
        return
    run.checkpoints.mkdir(exist_ok=True)
    if best.exists():
        copy_checkpoint(best, run.checkpoints / BEST_FILE)
    writer = CheckpointWriter(run.checkpoints)
    first = Checkpoint(saved.tensors, {**saved.metadata, "identity": config.identity(), "branches": True})
    # use step 0, so that every checkpoint of the run itself is newer, even if its batches are larger
    writer.write(step_name(0), first)
    writer.close()


def train_parent(config: Config, run: RunDirectory, stop: StopRequest) -> None:
    """Train a branched run's parent again in the run's directory, recursively with its own parents, and begin from it.

    The caller then compares the result with the record, because the history contains the parent's epochs.
    """
    link = config.parent
    if link is None or step_files(run.checkpoints):
        return
    before = read_config({**link.config, "logger": {}}, config.imports)
    parent = RunDirectory(run.folder / "parent")
    with parent.claim(before):
        train_parent(before, parent, stop)
        log.info("first its parent, %s, to epoch %d", link.run, link.epoch)
        with recorded_threads(link.threads, before.trainer.devices):
            train_and_test(before, parent, stop, compiled=link.compiled, epochs=link.epoch)
        saved = read_checkpoint(step_files(parent.checkpoints)[-1])
        if weights_hash(strip_prefix("model", saved.tensors)) != link.weights_sha256:
            log.warning("after epoch %d the weights are not the recorded ones", link.epoch)
        begin(config, run, saved, parent.checkpoints / BEST_FILE)
    shutil.rmtree(parent.folder)
