"""job=train: load, train, test once, write it all down."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zfnet.config.errors import UserError
from zfnet.config.schema import Config, Job
from zfnet.data import Batches, Splits, load_splits
from zfnet.plots.figures import draw_curves, save_figure
from zfnet.plots.results import draw_results, results_of, say_per_class, say_result
from zfnet.runs.directory import RunDirectory, objective
from zfnet.runs.hydra_record import write_hydra_record
from zfnet.runs.provenance import describe_environment
from zfnet.runs.session import hold, recorded_state
from zfnet.runs.signals import Pruned, StopRequest
from zfnet.runs.weights import ModelMetadata, save_model
from zfnet.sweeps.pruning import trial_watcher
from zfnet.training.board import TensorBoard
from zfnet.training.checkpoint import Checkpoint, CheckpointWriter, read_checkpoint, read_newest
from zfnet.training.compiling import settle_auto
from zfnet.training.device import choose
from zfnet.training.loop import BEST, evaluate, fit
from zfnet.training.processes import World, follow, processes, torchrun_world
from zfnet.training.recorder import Recorder, Watcher
from zfnet.training.snapshots import Snapshots
from zfnet.training.state import TrainingState, training_batches

log = logging.getLogger("zfnet")


@dataclass(kw_only=True)
class TrainJob(Job):
    """train: no settings of its own."""

    def main(self, config: Config, output: Path) -> float | None:
        """Train `config` in the directory `output`; go on there if it holds the same run, unfinished."""
        world = torchrun_world()
        if world is not None and not world.is_main:
            follow(world, _work)
            with contextlib.suppress(OSError):
                output.rmdir()  # Hydra made it for this process; process 0 has another
            return None
        run = RunDirectory(output)
        if run.claim(config):
            print(f"{output} holds this run already")
        else:
            write_hydra_record(output)
        return train(config, run, trial_watcher())


def train(config: Config, run: RunDirectory, watcher: Watcher | None = None) -> float | None:
    """Train in a claimed directory, from its newest checkpoint if it has one. Returns the objective of a sweep.

    `watcher` sees every epoch and may end the run (`Pruned`); it then has no objective.
    """
    with hold(run, "train.log") as stop:
        if run.state == "done":
            if not run.weights.is_file():
                raise UserError(
                    f"{run.folder} is finished, but its {run.weights.name} is gone: python run.py job=reproduce "
                    f"run={run.folder} trains it again, in a new directory"
                )
            print(f"nothing to do: {run.folder} is finished")  # and not into its log: it does not change
            return objective(run.read_json("results.json"))
        try:
            with recorded_state(run, f"stopped; go on with: python run.py job=resume run={run.folder}"):
                results = train_and_test(config, run, stop, watcher)
        except Pruned:
            return None
        return objective(results)


def train_and_test(
    config: Config,
    run: RunDirectory,
    stop: StopRequest,
    watcher: Watcher | None = None,
    compiled: bool | None = None,
) -> dict[str, Any]:
    """Train, measure and write everything but the state; returns what results.json holds.

    compiled: what trainer.compile=auto became in the run that this one repeats.
    """
    with processes(config.trainer.devices, _work, run.folder) as world:
        return _train(config, run, stop, world, watcher, compiled)


def _work(world: World, folder: Path) -> None:
    """What the other processes of a run do: the same, without writing or saying anything."""
    log.addHandler(logging.NullHandler())
    log.propagate = False
    run = RunDirectory(folder)
    _train(run.read_config(), run, StopRequest(), world)


def _train(
    config: Config,
    run: RunDirectory,
    stop: StopRequest,
    world: World,
    watcher: Watcher | None = None,
    compiled: bool | None = None,
) -> dict[str, Any]:
    plan = choose(config.trainer, world)
    splits = load_splits(config.data)
    _check_against(splits, config)
    train = training_batches(config, plan, splits.train, world)
    validation, test = (
        None if part is None else Batches(part, config.data, plan.device, channels_last=plan.channels_last)
        for part in (splits.validation, splits.test)
    )
    state = TrainingState(config, plan, len(splits.train.classes), len(train), world)
    saved, problems = read_newest(run.checkpoints)
    if saved is not None and saved.metadata.get("identity") != config.identity():
        raise UserError(
            f"{run.folder / 'config.yaml'} is not the config that the checkpoint was made with: put the old one back, "
            "or start a new run"
        )
    if not world.is_main:
        if saved is not None:
            state.restore(saved)
        fit(state, train, validation, None, CheckpointWriter(None), Recorder(None, None), stop)
        return {}
    for problem in problems:
        log.warning("%s; using an earlier one", problem)
    log.info("%s on %s: %s", config.model.name, config.data.name, _sizes(splits))
    if saved is not None:
        compiled = saved.metadata.get("compiled", compiled)
    if (words := settle_auto(state, train, compiled)) is not None:
        log.info(words)
    plan = replace(plan, compile=state.compiled)
    surroundings = describe_environment(plan.device, splits.fingerprint, config.trainer.name)
    how_it_ran = {"plan": plan.describe(), "compiled": plan.compile}
    run.write_json("environment.json", {**surroundings, **how_it_ran})
    how = plan.describe() + (f", {world.size} processes" if world.size > 1 else "")
    log.info("%s parameters; %s", f"{sum(p.numel() for p in state.model.parameters()):,}", how)
    if saved is not None:
        state.restore(saved)
        log.info("going on from epoch %d, step %d", state.epoch + 1, state.step)
        if state.epoch < config.trainer.epochs and (lost := _best(run, state)[1]):
            log.warning("%s; unless a later epoch is better, the run will have to start again", lost)
    board = TensorBoard(run.tensorboard, state.step) if config.trainer.tensorboard else None
    if board is not None and saved is None:
        board.graph(state.model, config.data.image_size)
        board.images("train/samples", splits.train.pixels(range(min(16, len(splits.train)))))
    metadata = ModelMetadata(
        config.model, splits.train.classes, config.data, stored_size=splits.train.images.shape[1]
    )
    writer = CheckpointWriter(run.checkpoints)
    try:
        fit(
            state,
            train,
            validation,
            test if config.trainer.test_each_epoch else None,
            writer,
            Recorder(run, board, watcher),
            stop,
            Snapshots(run.snapshots, config.trainer.snapshots, metadata),
        )
        # the best on validation; without validation, the last
        if state.best is not None and state.best["epoch"] != state.epoch:
            best, lost = _best(run, state)
            if best is None:  # no worse ones take their place
                raise UserError(
                    f"{lost}: delete {run.checkpoints} and give job=resume run={run.folder} to train from the "
                    "start again"
                )
            state.evaluated.load_state_dict(best.tensors)
            state.best = best.metadata
        return _report(config, run, state, metadata, splits, validation, test, board)
    finally:
        writer.close()
        if board is not None:
            board.close()


def _check_against(splits: Splits, config: Config) -> None:
    """Compare the config with the images themselves; raise UserError."""
    data = config.data
    if splits.validation is None and config.trainer.monitor == "validation_loss":
        raise UserError(
            f"data.root={data.root} has no val/ folder and data.validation=0 holds no images out: "
            "hold some out, or set trainer.monitor=train_loss"
        )
    if data.subset is not None and data.subset > len(splits.train):
        raise UserError(
            f"data.subset={data.subset}: there are {len(splits.train)} training images; null takes all of them"
        )
    side = data.crop_size or splits.train.images.shape[1]
    if config.augment.cutout > side:
        raise UserError(
            f"augment.cutout={config.augment.cutout}: must be at most {side}, the side of the images it is cut from"
        )


def _best(run: RunDirectory, state: TrainingState) -> tuple[Checkpoint | None, str | None]:
    """Return the weights of the best epoch so far, or None and how they were lost.

    Where a killed process had come further than its last checkpoint, they may be of a later and better epoch.
    """
    if state.best is None:
        return None, None
    path, problem = run.checkpoints / BEST, "holds the weights of a worse epoch"
    try:
        best = read_checkpoint(path)
        if best.metadata.get("validation_accuracy", -1) >= state.best["validation_accuracy"]:
            return best, None
    except UserError:
        problem = "cannot be read" if path.exists() else "is missing"
    return None, f"{path} {problem}: the weights of the best epoch, {state.best['epoch']}, are lost"


def _sizes(splits: Splits) -> str:
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in parts.items() if part is not None)
    return f"{sizes} images of {len(splits.train.classes)} classes"


def _report(
    config: Config,
    run: RunDirectory,
    state: TrainingState,
    metadata: ModelMetadata,
    splits: Splits,
    validation: Batches | None,
    test: Batches | None,
    board: TensorBoard | None,
) -> dict[str, Any]:
    """Measure validation and test with the weights to keep, and write figures, weights and results.json."""
    model, plan, classes = state.evaluated, state.plan, metadata.classes
    found = {
        name: None if batches is None else evaluate(model, batches, plan, name)
        for name, batches in (("validation", validation), ("test", test))
    }
    digest = save_model(run.weights, model, metadata)
    steps = sum(row["seconds"] for row in state.history)
    results: dict[str, Any] = {
        name: None if f is None else results_of(f, classes) for name, f in found.items()
    }
    results |= {
        "epochs": state.epoch,
        "best_epoch": state.best["epoch"] if state.best else None,
        "seconds": round(state.elapsed(), 2),
        "images_per_second": round(len(splits.train) * len(state.history) / steps, 1),
        "weights_sha256": digest,
        "test_seen_each_epoch": config.trainer.test_each_epoch,
    }
    save_figure(draw_curves(state.history), run.figures / "curves.png")
    shown, part = next(
        (
            (f, p)
            for f, p in ((found["test"], splits.test), (found["validation"], splits.validation))
            if f is not None and p is not None
        ),
        (None, None),
    )
    if shown is not None and part is not None:
        draw_results(run, shown, part, board, state.step)
    if board is not None:
        flat = {
            f"result/{name}_accuracy": r["accuracy"] for name, r in results.items() if isinstance(r, dict)
        }
        board.hyperparameters(
            {k: v for k, v in config.to_dict().items() if k not in ("job", "run", "images")}, flat
        )
    run.write_json("results.json", results)
    _say(config, run, results)
    return results


def _say(config: Config, run: RunDirectory, results: dict[str, Any]) -> None:
    for name in ("validation", "test"):
        if results[name]:
            say_result(name, results[name])
    measured = results["test"] or results["validation"]
    if measured:
        say_per_class(measured)
    if config.trainer.test_each_epoch:
        log.info("the test set was measured after each epoch: do not choose an epoch or a setting by it")
    log.info("written to %s", run.folder)
