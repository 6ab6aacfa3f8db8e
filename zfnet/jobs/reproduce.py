"""job=reproduce: train a run again from its record, and compare the two."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from zfnet.config.errors import UserError, log
from zfnet.config.schema import Config, Job
from zfnet.jobs.branch import train_parent
from zfnet.jobs.train import train_and_test
from zfnet.runs.compare import compare_runs
from zfnet.runs.directory import RunDirectory, find_run
from zfnet.runs.session import StopRequest, claim_directory, hold_directory, recorded_state
from zfnet.training.build import check_initial_weights
from zfnet.training.device import recorded_threads
from zfnet.training.processes import torchrun_world


@dataclass(kw_only=True)
class ReproduceJob(Job):
    reads_run: ClassVar[str] = "needed"
    trains: ClassVar[bool] = True

    def main(self, config: Config, output: Path) -> None:
        """Train the recorded config in `output` and compare; overrides make it a variation.

        Raises UserError if there is nothing to compare with, or if the same config gives a different result.
        """
        if torchrun_world() is not None:
            raise UserError("job=reproduce does not run under torchrun: set trainer.devices=<processes> instead")
        original = _find_finished(config)
        if output.resolve().is_relative_to(original.folder.resolve()):
            raise UserError(f"hydra.run.dir={output}: is inside the run's own directory; choose another")
        check_initial_weights(config)
        run = RunDirectory(output)
        with claim_directory(run, config, "reproduce.log", new=True) as stop:
            _reproduce(config, run, original, stop)


def reproduce(config: Config, run: RunDirectory) -> None:
    """Continue a reproduction in its directory, and compare with `config.run`."""
    original = _find_finished(config)
    with hold_directory(run, "reproduce.log") as stop:
        if run.state == "done":
            print(f"nothing to do: {run.folder} is finished; see its reproduction.json")
            return
        _reproduce(config, run, original, stop)


def _reproduce(config: Config, run: RunDirectory, original: RunDirectory, stop: StopRequest) -> None:
    """Train in a locked directory, from its newest checkpoint if there is one, and compare."""
    with recorded_state(run, f"stopped; continue with\npython run.py job=resume run={run.folder}"):
        train_parent(config, run, stop)
        with recorded_threads(original.threads, config.trainer.devices):
            compiled = original.environment.get("compiled")  # what trainer.compile=auto chose there
            train_and_test(config, run, stop, compiled=None if compiled is None else bool(compiled))
        comparison = compare_runs(original, run)
        run.write_json("reproduction.json", comparison)
        _log(comparison)
    if not comparison["identical"] and not comparison["variation"]:
        others = ", ".join(d["what"] for d in comparison["surroundings"])
        raise UserError(
            f"not identical to {original.folder}: {_describe_first_difference(comparison)}; "
            f"{f'the environment differs in {others}' if others else 'the recorded environment is the same'} "
            f"({run.folder / 'reproduction.json'})"
        )


def _find_finished(config: Config) -> RunDirectory:
    """Return the run to repeat. Raise UserError if it cannot be compared, so that no training is wasted."""
    original = find_run(str(config.run))
    if original.job not in ("train", "reproduce"):
        raise UserError(f"run={original.folder} was made by job={original.job}: only a training can be run again")
    nothing = "so there is nothing to compare with"
    if original.state != "done":
        raise UserError(
            f"run={original.folder} is not finished (state: {original.state}), {nothing}: continue it with job=resume"
        )
    results, history = original.read_json("results.json"), original.read_history()
    if not isinstance(results, dict) or "weights_sha256" not in results:
        raise UserError(f"{original.folder / 'results.json'} contains no results, {nothing}")
    if not history or any("train_loss" not in row for row in history):
        raise UserError(f"{original.folder / 'history.csv'} contains no epochs, {nothing}")
    return original


def _describe_first_difference(comparison: dict[str, Any]) -> str:
    first = comparison["first_difference"]
    if first is None:
        return "all metrics agree, but the weights do not"
    where = "at the end" if first["epoch"] is None else f"epoch {first['epoch']}"
    return f"{where}, {first['metric']} was {first['recorded']}, is {first['now']}"


def _log(comparison: dict[str, Any]) -> None:
    variation = comparison["variation"]
    if variation:
        log.info("a variation of %s:", comparison["run"])
        _log_differences(variation)
    if comparison["identical"]:
        epochs = f"{comparison['epochs']} epoch" + "s" * (comparison["epochs"] != 1)
        log.info("identical: every metric of %s, the results and the weights", epochs)
        log.info("sha256 of the weights: %s…", comparison["weights_sha256"]["now"][:48])
    else:
        log.info("%s: %s", "differs" if variation else "NOT identical", _describe_first_difference(comparison))
        if comparison["largest_differences"]:
            log.info("largest differences:")
        for metric, d in comparison["largest_differences"].items():
            log.info("  %-20s %-12g → %-12g (epoch %d)", metric, d["recorded"], d["now"], d["epoch"])
    if comparison["surroundings"]:
        log.info("differences in the environment:")
        _log_differences(comparison["surroundings"])


def _log_differences(differences: list[dict[str, Any]]) -> None:
    for d in differences:
        was, now = (f"{d[k]!s:.23}" + "…" * (len(str(d[k])) > 23) for k in ("recorded", "now"))
        log.info("  %-24s %s → %s", d["what"], was, now)
