"""job=train: load the data, train, test once, and write everything into one run directory."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from zfnet.config.errors import UserError, describe_fault, log
from zfnet.config.reading import read_config
from zfnet.config.schema import Config, DataConfig, DatasetData, Job, Parent, TrainerConfig, model_name
from zfnet.data import Batches, Splits, load_splits
from zfnet.data.images import data_hash
from zfnet.plots.figures import save_figure
from zfnet.plots.results import draw_curves, draw_results, log_per_class, log_result, results_of
from zfnet.runs.command import compose_raw, prepare_overrides, read_command
from zfnet.runs.console import explain
from zfnet.runs.directory import RunDirectory, in_sweep, objective, remove_if_empty
from zfnet.runs.hydra_record import record_data
from zfnet.runs.provenance import changed_code, describe_environment, recorded_changes
from zfnet.runs.session import Pruned, StopRequest, claim_directory, recorded_state
from zfnet.runs.weights import ModelMetadata, TrainedRun, load_run, save_model, weights_hash
from zfnet.sweeps.callback import in_search, trial_report
from zfnet.sweeps.launch import NoObjective
from zfnet.training import callbacks as cb
from zfnet.training.build import (
    build_callbacks,
    build_loggers,
    build_state,
    check_initial_weights,
    check_recipe,
    training_batches,
)
from zfnet.training.checkpoint import BEST_FILE, Checkpoint, CheckpointWriter, read_checkpoint, read_newest, step_files
from zfnet.training.compiling import resolve_compile
from zfnet.training.device import recorded_threads, resolve_runtime, threads_of_each
from zfnet.training.loggers import LoggedRun, Logger, call_loggers
from zfnet.training.loop import evaluate
from zfnet.training.loop import fit as run_loop
from zfnet.training.processes import World, processes, run_worker, torchrun_world
from zfnet.training.schedule import schedule_span
from zfnet.training.state import LOWER_RATE, TrainingState, set_optimizer_mode

Report = Callable[[float, int], bool]  # (validation accuracy, epoch) → whether to prune
# a longer run on a CPU with another model than these, which are made for CPUs, suggests experiments with them
_CPU_MODELS, _LONG_RUN_SECONDS = ("fast", "small"), 1200
_FEW_IMAGES = 100  # below this number, one image changes the accuracy by more than 1 %
_MAX_CLASS_NAMES = 12  # class names in one line


@dataclass(kw_only=True)
class TrainJob(Job):
    """Train the network that the config describes; this job has no settings of its own."""

    trains: ClassVar[bool] = True

    def main(self, config: Config, output: Path) -> float | None:
        """Train in the directory `output`, or continue there if it contains the same run, unfinished."""
        return None if run_as_worker(config, output) else train(config, RunDirectory(output), trial_report())


def run_as_worker(config: Config, output: Path) -> bool:
    """Train as a worker if torchrun started this process with rank > 0; return whether it did."""
    world = torchrun_world()
    if world is None or world.is_main:
        return False
    run_worker(world, partial(_train_worker, **_of_command(config)))
    remove_if_empty(output)  # Hydra created it for this worker; process 0 uses its own
    return True


def compose(overrides: Sequence[str] = ()) -> Config:
    """Return the checked config that these overrides would give on the command line, for use in Python:

    config = compose(["experiment=quickstart", "optimizer.lr=3e-3"])

    Raises UserError for an invalid key, choice or value.
    """
    if isinstance(overrides, str):
        raise UserError(f"compose({overrides!r}): give a list of overrides, as in compose([{overrides!r}])")
    overrides = prepare_overrides([str(each) for each in overrides])
    try:
        config = read_command(compose_raw(overrides), overrides, sources=())
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(explain(error, overrides)) from error
    if config.job.trains:
        check_recipe(config)
    return config


@torch.inference_mode(False)  # a caller can have disabled gradients
def fit(config: Config, folder: str | Path) -> TrainedRun:
    """Train a config from `compose` in the directory `folder`, and return the finished run.

    The same call continues a stopped run and returns a finished one. Raises UserError.
    """
    if not isinstance(config, Config):
        raise UserError(f"fit: needs a config from compose(list of overrides), not a {type(config).__name__}")
    if not config.job.trains or config.job.name in ("resume", "reproduce"):
        raise UserError(f"job={config.job.name}: fit trains only (job=train, job=extend or job=fork)")
    read_config(config.to_dict(), config.imports)  # check it again, because the caller can have changed it
    check_recipe(config)
    config.job.main(config, Path(folder))
    return load_run(folder, config.imports)


def train(
    config: Config, run: RunDirectory, report: Report | None = None, begin: Callable[[], None] | None = None
) -> float | None:
    """Train in a free directory, or continue this run in its directory from its newest checkpoint.

    Returns the objective of a sweep; None if the run was pruned or has no validation images.

    report: receives the validation accuracy of each epoch and can prune the run
    begin: writes the first checkpoint of a run that branches from another, if there is none yet
    """
    if run.state == "none" and config.parent is None:
        check_initial_weights(config)  # before the run claims the directory
    with claim_directory(run, config, "train.log", config.composed) as stop:
        if begin is not None:
            begin()
        if config.job.name == "train" and run.state != "none":
            print(f"{run.folder} already contains this run")
        if run.state == "done":
            if not run.weights.is_file():
                raise UserError(
                    f"{run.folder} is finished, but its {run.weights.name} is missing: python run.py job=reproduce "
                    f"run={run.folder} trains it again, in a new directory"
                )
            if config.data.root != run.read_config(config.imports).data.root:
                _refuse_other_images(run, load_splits(config.data, config.imports))
                record_data(run, config.data)
            print(f"nothing to do: {run.folder} is finished")  # the log of a finished run does not change
            try:
                return objective(run.read_json("results.json"))
            except (LookupError, TypeError) as error:
                raise UserError(f"{run.folder / 'results.json'} is damaged: it has no validation accuracy") from error
        try:
            with (
                recorded_state(run, f"stopped; continue with\npython run.py job=resume run={run.folder}"),
                recorded_threads(run.threads if step_files(run.checkpoints) else None, config.trainer.devices),
            ):
                results = train_and_test(config, run, stop, report)
        except Pruned:
            return None
        return objective(results)


def train_and_test(
    config: Config,
    run: RunDirectory,
    stop: StopRequest,
    report: Report | None = None,
    compiled: bool | None = None,
    epochs: int | None = None,
) -> dict[str, Any]:
    """Train, evaluate and write everything except the status; return the content of results.json.

    compiled: the value of trainer.compile=auto in the run that this one repeats
    epochs: stop after this epoch, without the final evaluation and report; the result is then {}
    """
    threads = threads_of_each(config.trainer.devices)
    work = partial(_train_worker, **_of_command(config), threads=threads, epochs=epochs)
    with processes(config.trainer.devices, work, run.folder) as world:
        return _train(config, run, stop, world, report, compiled, epochs)


def _of_command(config: Config) -> dict[str, Any]:
    """Return the parts of a command's config that can differ from the record although the run is the same."""
    return {"imports": config.imports, "data": config.data, "trainer": config.trainer, "parent": config.parent}


def _train_worker(
    world: World,
    folder: Path,
    imports: list[str],
    data: DataConfig,
    trainer: TrainerConfig,
    parent: Parent | None,
    threads: int | None = None,
    epochs: int | None = None,
) -> None:
    """Train in a process with rank > 0, like process 0 but without files and logs.

    data, trainer, parent: those of the command, as in process 0; the record can have other paths, devices or log_every
    threads: number of CPU threads of process 0
    """
    log.addHandler(logging.NullHandler())
    log.propagate = False
    run = RunDirectory(folder)
    config = run.read_config(imports)
    config = replace(config, data=data, trainer=trainer, parent=parent or config.parent)
    with recorded_threads(threads, world.size):
        _train(config, run, StopRequest(), world, epochs=epochs)


def _train(
    config: Config,
    run: RunDirectory,
    stop: StopRequest,
    world: World,
    report: Report | None = None,
    compiled: bool | None = None,
    epochs: int | None = None,
) -> dict[str, Any]:
    runtime = resolve_runtime(config.trainer, world, isinstance(config.model, dict))
    splits = load_splits(config.data, config.imports)
    if splits.validation is None and in_search():
        raise NoObjective()
    saved, problems = read_newest(run.checkpoints)
    if saved is not None:
        _refuse_other_images(run, splits)
    _check_images(splits, config)
    images_hash = data_hash({"data_fingerprint": splits.fingerprint, "data": splits.describe()})
    resumed = saved is not None
    train = training_batches(config, runtime, splits.train, world)
    sets = {
        name: Batches(split, config.data, runtime.device, channels_last=runtime.channels_last)
        for name, split in (("validation", splits.validation), ("test", splits.test))
        if split is not None
    }
    each_epoch = {k: v for k, v in sets.items() if k == "validation" or config.trainer.test_each_epoch}
    metadata = ModelMetadata(config.model, splits.train.classes, config.data, stored_size=splits.train.images.shape[1])
    loggers = build_loggers(config) if world.is_main else {}
    writer = CheckpointWriter(run.checkpoints if world.is_main else None)
    callbacks = _callbacks(config, run, world, loggers, writer, stop, metadata, report)
    classes = len(splits.train.classes)
    counts = splits.train.labels.bincount(minlength=classes).tolist()
    state = build_state(
        *(config, runtime, classes, len(train), world, callbacks), resumed=resumed, counts=counts, folder=run.folder
    )
    if saved is not None and saved.metadata.get("identity", config.identity()) != config.identity():
        raise UserError(
            f"{run.folder / 'config.yaml'} is not the config that the checkpoint was made with: restore the old one, "
            "or start a new run"
        )
    if saved is None and config.parent is not None:
        raise UserError(
            f"{run.checkpoints} no longer has the state that the run began with: branch from {config.parent.run} again"
        )
    if not world.is_main:
        if saved is not None:
            state.restore(saved, images_hash)
        run_loop(state, train, each_epoch, stop, epochs)
        return {}
    for message in problems:
        log.warning("%s; using an earlier one", message)
    _log_images(config, splits)
    record_data(run, config.data)
    for name in state.new_weights:
        log.info("trainer.init_from: %s is new, since the number of classes differs", name)
    if saved is not None:
        compiled = saved.metadata.get("compiled", compiled)
    if (decision := resolve_compile(state, train, compiled)) is not None:
        log.info(decision)
    _write_environment(config, run, state, splits, resumed)
    if saved is not None:
        state.restore(saved, images_hash)
        if state.epoch == config.trainer.epochs:
            log.info("all %d epochs are trained; evaluating", state.epoch)
        else:
            log.info("continuing from epoch %d, step %d", state.epoch + 1, state.step)
        if "branches" in saved.metadata:
            log.info(_describe_schedule(state))
        if state.epoch < config.trainer.epochs and (problem := _best_checkpoint(run, state)[1]):
            log.warning("%s; unless a later epoch is better, the run will have to start again", problem)
    samples = splits.train.pixels(range(min(16, len(splits.train))))
    started = LoggedRun(run.folder, config.to_dict(), state.step, state.model, config.data.image_size, samples)
    try:
        for name, logger in loggers.items():
            try:
                logger.start(started)
            except Exception as error:  # fail now, because nothing has been trained yet
                raise UserError(describe_fault(f"logger.{name}", logger, error)) from error
        run_loop(state, train, each_epoch, stop, epochs)
        if epochs is not None:
            return {}
        _load_best_weights(run, state)
        return _report(config, run, state, metadata, splits, sets, loggers)
    finally:
        writer.close()
        call_loggers(loggers, "close")


def _log_images(config: Config, splits: Splits) -> None:
    sizes = ", ".join(f"{count:,} {name}" for name, count in splits.sizes().items())
    log.info(
        "%s on %s: %s images of %d classes",
        model_name(config.model),
        config.data.title,
        sizes,
        len(splits.train.classes),
    )
    if splits.validation_reports:
        log.warning("no test images: validation chooses the epoch and gives the result, so its accuracy is optimistic")
    environment = RunDirectory(config.run).environment if config.run is not None else {}
    if changed := splits.difference(environment, sizes=config.data.eval_subset is None):
        log.warning("the images are not those of run=%s: %s", config.run, changed)
    for name, images in (("training", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if images is not None and name != "training" and len(images) < _FEW_IMAGES:
            log.warning("few images: one of %d %s images is %.1f%% of accuracy", len(images), name, 100 / len(images))
        if images is not None and (absent := images.classes_without_images()):
            shown = ", ".join(absent[:_MAX_CLASS_NAMES]) + " …" * (len(absent) > _MAX_CLASS_NAMES)
            log.warning("no %s images in %d of %d classes: %s", name, len(absent), len(images.classes), shown)


def _load_best_weights(run: RunDirectory, state: TrainingState) -> None:
    """Load the weights of the epoch that is best on validation; without validation, keep those of the last epoch."""
    if state.best is None or state.best["epoch"] == state.epoch:
        set_optimizer_mode(state.optimizer, "eval")
        return
    best, problem = _best_checkpoint(run, state)
    if best is None:  # the weights of a worse epoch must not replace the best ones
        raise UserError(
            f"{problem}: delete {run.checkpoints} and run job=resume run={run.folder} to train again from the start"
        )
    state.eval_model.load_state_dict(best.tensors)
    state.best = best.metadata


def _callbacks(
    config: Config,
    run: RunDirectory,
    world: World,
    loggers: dict[str, Logger],
    writer: CheckpointWriter,
    stop: StopRequest,
    metadata: ModelMetadata,
    report: Report | None,
) -> list[cb.Callback]:
    """Return the callbacks of this process, in the order in which they are called."""
    trainer, made = config.trainer, cb.weight_callbacks(config)
    made.append(cb.BestWeights(writer))
    if world.is_main and trainer.snapshots:
        made.append(cb.Snapshots(run.snapshots, trainer.snapshots, metadata))
    made.append(cb.Metrics(run if world.is_main else None, loggers))
    made += build_callbacks(config)
    if world.is_main:
        if trainer.profile:
            made.append(cb.Profiler(run.folder / "profile"))
        made.append(cb.ProgressBar(_advise))
    made.append(cb.Checkpoints(writer, trainer.checkpoint_minutes, trainer.checkpoint_epochs))
    if world.is_main and report is not None:
        made.append(cb.Pruning(report))  # after the checkpoint of an epoch in trainer.checkpoint_epochs
    return [*made, cb.StopOnSignal(stop)]


def _advise(state: TrainingState, seconds: float) -> str:
    """Return the expected duration of a run and, if it is long on a CPU, the experiments made for CPUs."""
    device = {"cpu": "this CPU", "cuda": "this GPU"}.get(state.runtime.device.type, "this device")
    advice = f"about {cb.format_duration(seconds)} on {device}, estimated from the first steps"
    alone = state.runtime.device.type == "cpu" and state.world.size == 1
    if alone and seconds >= _LONG_RUN_SECONDS and model_name(state.config.model) not in _CPU_MODELS:
        advice += "; experiments for CPUs: cifar10_fast and, for photographs, photos_small"
    return advice


def _write_environment(config: Config, run: RunDirectory, state: TrainingState, splits: Splits, resumed: bool) -> None:
    runtime = replace(state.runtime, compile=state.compiled)
    environment = describe_environment(runtime.device, config.trainer.name, config.imports)
    if resumed:
        before = run.environment
        if changed := changed_code(before, environment):
            log.warning("the code of %s has changed since the run was stopped", ", ".join(changed))
        if ever := sorted({*recorded_changes(before), *changed}):
            environment["code"]["changed"] = ever
    environment |= {
        "data_fingerprint": splits.fingerprint,
        "data": splits.describe(),
        "plan": runtime.describe(),
        "compiled": runtime.compile,
        "imports": config.imports,
    }
    if config.trainer.init_from is not None and config.parent is None:
        # a resumed network has trained weights by now; None if the file was lost
        recorded = run.environment.get("initial_weights_sha256") if resumed else weights_hash(state.model.state_dict())
        environment["initial_weights_sha256"] = recorded
    run.write_json("environment.json", environment)
    how = runtime.describe() + (f", {state.world.size} processes" if state.world.size > 1 else "")
    log.info("%s parameters; %s", f"{sum(p.numel() for p in state.model.parameters()):,}", how)


def _refuse_other_images(run: RunDirectory, splits: Splits) -> None:
    """Raise UserError if these are not the images that the run was trained on."""
    if changed := splits.difference(run.environment):
        raise UserError(
            f"{run.folder} was trained on other images ({changed}): restore those, or start a new run in another "
            "directory (hydra.run.dir=…)"
        )


def _check_images(splits: Splits, config: Config) -> None:
    """Check the config against the loaded images; raise UserError."""
    data = config.data
    if splits.validation is None and config.monitored == "validation_loss":
        missing = "data.val is null" if isinstance(data, DatasetData) else f"data.root={data.root} has no val/ folder"
        raise UserError(
            f"{missing} and data.validation=0 holds no images out: hold some out, or set trainer.monitor=train_loss"
        )
    count = len(splits.train)
    if data.subset is not None and data.subset > count:
        raise UserError(f"data.subset={data.subset}: there are {count} training images; null uses all of them")
    side = data.crop_size or splits.train.images.shape[1]
    if config.augment.cutout > side:
        raise UserError(
            f"augment.cutout={config.augment.cutout}: must be at most {side}, the side of the images it is cut from"
        )


def _best_checkpoint(run: RunDirectory, state: TrainingState) -> tuple[Checkpoint | None, str | None]:
    """Return the weights of the best epoch so far, or None and a message that says why they are lost.

    If a process was killed after its last checkpoint, the weights can belong to a later and better epoch.
    """
    if state.best is None:
        return None, None
    path, problem = run.checkpoints / BEST_FILE, "contains the weights of a worse epoch"
    try:
        best = read_checkpoint(path)
        if not state.is_better(state.best, best.metadata):
            return best, None
    except UserError:
        problem = "cannot be read" if path.exists() else "is missing"
    return None, f"{path} {problem}: the weights of the best epoch, {state.best['epoch']}, are lost"


def _describe_schedule(state: TrainingState) -> str:
    """Return one line about the learning rate at the start of a branch."""
    assert state.config.parent is not None
    first, epochs = schedule_span(state.config.to_dict())
    name = str(state.config.scheduler["_target_"]).rpartition(".")[2]
    return (
        f"learning rate (job.schedule={state.config.parent.schedule}): {name} over epochs {first + 1} to "
        f"{first + epochs}; {state.history[-1]['lr']:.3g} before, {state.schedule.lr(state.step):.3g} now"
    )


def _report(
    config: Config,
    run: RunDirectory,
    state: TrainingState,
    metadata: ModelMetadata,
    splits: Splits,
    sets: Mapping[str, Batches],
    loggers: dict[str, Logger],
) -> dict[str, Any]:
    """Evaluate validation and test with the final weights, and write figures, weights and results.json."""
    model = state.eval_model
    measured = {name: evaluate(model, batches, state.runtime, name) for name, batches in sets.items()}
    for name, evaluation in measured.items():
        if math.isnan(evaluation.loss):  # the training loss is measured before each step
            raise UserError(f"training diverged in its last steps: the loss of the {name} images is NaN: {LOWER_RATE}")
    run.check_record()
    digest = save_model(run.weights, model, metadata)
    begun = config.parent.epoch if config.parent else 0
    own = [row["seconds"] for row in state.history if row["epoch"] > begun]  # the parent can have used other images
    results: dict[str, Any] = {
        name: results_of(measured[name], metadata.classes) if name in measured else None
        for name in ("validation", "test")
    }
    accuracies = {f"result/{name}_accuracy": r["accuracy"] for name, r in results.items() if r is not None}
    results |= {
        "epochs": state.epoch,
        "best_epoch": state.best["epoch"] if state.best else None,
        "seconds": round(state.elapsed(), 2),
        "images_per_second": round(len(splits.train) * len(own) / sum(own), 1),
        "weights_sha256": digest,
        "test_seen_each_epoch": config.trainer.test_each_epoch and "test" in sets,
    }
    if splits.validation_reports:
        results["validation_chose_and_reports"] = True
    results |= splits.remarks()
    save_figure(draw_curves(state.history), run.figures / "curves.png")
    for name, split in (("test", splits.test), ("validation", splits.validation)):
        if split is not None:
            draw_results(run, measured[name], split, name)
            break
    for path in sorted(run.figures.glob("*.png")):
        call_loggers(loggers, "figure", path.stem, path, state.step)
    call_loggers(loggers, "finish", accuracies)
    run.write_json("results.json", results)
    _print_results(config, run, results)
    return results


def _print_results(config: Config, run: RunDirectory, results: dict[str, Any]) -> None:
    # in a sweep, do not print the test accuracy, because it must not guide the choice of settings
    names = [name for name in ("validation", "test") if results[name] and not (name == "test" and in_sweep())]
    for name in names:
        log_result(name, results[name])
    best, last = results["best_epoch"], results["epochs"]
    if best is not None and best < last:
        parents = config.parent is not None and best <= config.parent.epoch
        log.info("the weights are those of epoch %d%s, the best of %d", best, " (the parent's)" * parents, last)
    if names:
        log_per_class(results[names[-1]])
    if results["test_seen_each_epoch"]:
        log.info("the test set was measured after each epoch: do not choose an epoch or a setting by it")
    log.info("written to %s", run.folder)
