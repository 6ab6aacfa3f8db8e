"""job=train: load, train, test once, write it all down."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from zfnet.config import Config
from zfnet.console import log_to
from zfnet.data import Batches, ImageSet, Splits, load_splits
from zfnet.environment import describe_environment
from zfnet.errors import UserError
from zfnet.hydra_record import write_hydra_record
from zfnet.report.board import TensorBoard
from zfnet.report.figures import draw_confusion, draw_curves, draw_per_class, draw_samples, save_figure
from zfnet.run import RunDirectory, objective
from zfnet.sweeps.pruning import trial_watcher
from zfnet.training.checkpoint import CheckpointWriter, read_checkpoint, read_newest
from zfnet.training.device import choose
from zfnet.training.loop import BEST, evaluate, fit
from zfnet.training.metrics import Evaluation
from zfnet.training.recorder import Recorder, Watcher
from zfnet.training.signals import Pruned, StopRequest
from zfnet.training.state import TrainingState
from zfnet.weights import ModelFacts, save_model

log = logging.getLogger("zfnet")


def main(config: Config, output: Path, overrides: list[str]) -> float | None:
    """Train `config` in the directory `output`; go on there if it holds the same run, unfinished."""
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
    with run.lock(), log_to(run.folder / "train.log"), StopRequest() as stop:
        if run.state == "done":
            log.info("nothing to do: %s is finished", run.folder)
            return objective(run.read_json("results.json"))
        run.set_status("running")
        try:
            results = _train(config, run, stop, watcher)
        except Pruned as reason:
            run.set_status("pruned", str(reason))
            log.info("pruned: %s", reason)
            return None
        except KeyboardInterrupt as error:
            run.set_status("stopped", str(error) or "stopped by the keyboard")
            log.info("stopped; go on with: python run.py job=resume run=%s", run.folder)
            raise
        except SystemExit:  # a cluster's launcher, before it queues the job again
            run.set_status("stopped", "the launcher ended the process")
            raise
        except BaseException as error:
            run.set_status(
                "failed",
                f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error),
            )
            log.debug("failed", exc_info=True)
            raise
        run.set_status("done")
        return objective(results)


def _train(
    config: Config, run: RunDirectory, stop: StopRequest, watcher: Watcher | None = None
) -> dict[str, Any]:
    plan = choose(config.trainer)
    splits = load_splits(config.data)
    train = Batches(
        splits.train,
        config.data,
        plan.device,
        seed=config.seed,
        augment=config.augment,
        channels_last=plan.channels_last,
    )
    validation, test = (
        None if part is None else Batches(part, config.data, plan.device, channels_last=plan.channels_last)
        for part in (splits.validation, splits.test)
    )
    state = TrainingState(config, plan, len(splits.train.classes), len(train))
    saved, problems = read_newest(run.checkpoints)
    for problem in problems:
        log.warning("%s; using an earlier one", problem)
    run.write_json(
        "environment.json", describe_environment(plan.device, splits.fingerprint, config.trainer.name)
    )
    log.info("%s on %s: %s", config.model.name, config.data.name, _sizes(splits))
    log.info("%s parameters; %s", f"{sum(p.numel() for p in state.model.parameters()):,}", plan.describe())
    if saved is not None:
        state.restore(saved)
        log.info("going on from epoch %d, step %d", state.epoch + 1, state.step)
    board = TensorBoard(run.tensorboard, state.step) if config.trainer.tensorboard else None
    if board is not None and saved is None:
        board.graph(state.model, config.data.image_size)
        board.images("train/samples", splits.train.pixels(range(min(16, len(splits.train)))))
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
        )
        if state.best is not None:  # the best on validation; without validation, the last
            best = read_checkpoint(run.checkpoints / BEST)
            state.evaluated.load_state_dict(best.tensors)
        return _report(config, run, state, splits, validation, test, board)
    finally:
        writer.close()
        if board is not None:
            board.close()


def _sizes(splits: Splits) -> str:
    parts = {"training": splits.train, "validation": splits.validation, "test": splits.test}
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in parts.items() if part is not None)
    return f"{sizes} images of {len(splits.train.classes)} classes"


def _report(
    config: Config,
    run: RunDirectory,
    state: TrainingState,
    splits: Splits,
    validation: Batches | None,
    test: Batches | None,
    board: TensorBoard | None,
) -> dict[str, Any]:
    """Measure validation and test with the weights to keep, and write figures, weights and results.json."""
    model, plan, classes = state.evaluated, state.plan, splits.train.classes
    found = {
        name: None if batches is None else evaluate(model, batches, plan, name)
        for name, batches in (("validation", validation), ("test", test))
    }
    facts = ModelFacts(config.model, classes, config.data, stored_size=splits.train.images.shape[1])
    digest = save_model(run.weights, model, facts)
    steps = sum(row["seconds"] for row in state.history)
    results: dict[str, Any] = {
        name: None if f is None else _figures_of(f, classes) for name, f in found.items()
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
        _draw(run, shown, part, classes, board, state.step)
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


def _figures_of(found: Evaluation, classes: tuple[str, ...]) -> dict[str, Any]:
    return {
        **found.summary(),
        "images": len(found.labels),
        "per_class": dict(zip(classes, found.per_class(), strict=True)),
        "confusion": found.confusion().tolist(),
    }


def _draw(
    run: RunDirectory,
    found: Evaluation,
    part: ImageSet,
    classes: tuple[str, ...],
    board: TensorBoard | None,
    step: int,
) -> None:
    figures = {
        "confusion": draw_confusion(found, classes),
        "per_class": draw_per_class(found, classes),
        "samples": draw_samples(part, found),
    }
    for name, figure in figures.items():
        save_figure(figure, run.figures / f"{name}.png")
        if board is not None:
            board.figure(name, figure, step)


def _say(config: Config, run: RunDirectory, results: dict[str, Any]) -> None:
    for name in ("validation", "test"):
        if results[name]:
            log.info(
                "%-10s accuracy %.2f %%, top-5 %.2f %%, loss %.4f (%d images)",
                name,
                100 * results[name]["accuracy"],
                100 * results[name]["top5"],
                results[name]["loss"],
                results[name]["images"],
            )
    measured = results["test"] or results["validation"]
    if measured:
        width = max(len(c) for c in measured["per_class"])
        for name, accuracy in measured["per_class"].items():
            log.info("  %-*s %s", width, name, "no images" if accuracy is None else f"{accuracy:7.2%}")
    if config.trainer.test_each_epoch:
        log.info("the test set was measured after each epoch: do not choose an epoch or a setting by it")
    log.info("written to %s", run.folder)
