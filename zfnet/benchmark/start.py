"""The time from `python run.py` to the end of the first step, and what a sweep adds to each of its jobs."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.runs.directory import RunDirectory
from zfnet.runs.provenance import ROOT
from zfnet.training.device import Runtime

# run.py as it is, ended by the first step once its loss is known
FIRST_STEP = """
import os, runpy, sys, time
from zfnet.training import loop

real = loop.train_step

def first_step(state, batch):
    begun = time.time()
    real(state, batch)
    state.metrics.read()
    print("first step", begun, time.time(), flush=True)
    os._exit(0)

loop.train_step = first_step
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# a job that is over at once
SHORT = (
    "experiment=quickstart",
    "trainer.epochs=1",
    "trainer.threads=1",
    "data.train_images=200",
    "data.test_images=50",
)
JOBS = 4


def measure(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Start the program again and again, in processes of its own; return what benchmark.json holds."""
    words = [w for w in _own_words() if not w.startswith(("job=", "job.", "hydra."))]
    first, jobs = [], []
    with tempfile.TemporaryDirectory(prefix="zfnet-start-") as place:
        for number in tqdm(range(config.job.rounds), "starts", unit="round", disable=None, leave=False):
            first.append(_first_step([*words, f"hydra.run.dir={place}/{number}"]))
            jobs.append(_per_job(Path(place, f"sweep{number}")))
    return {
        "command_words": words,
        "first_step_begins": [begins for begins, _ in first],
        "first_step_ends": [ends for _, ends in first],
        "sweep_adds_per_job": [added for added, _ in jobs],
        "job_aside_from_its_epochs": [aside for _, aside in jobs],
    }


def say(result: dict[str, Any]) -> None:
    """Print medians with their extremes."""
    print()
    for name, key in (
        ("from the command to the first step", "first_step_begins"),
        ("                   and to its end", "first_step_ends"),
        ("what a sweep adds to each job", "sweep_adds_per_job"),
        ("a short job's records, tests and figures", "job_aside_from_its_epochs"),
    ):
        found = result[key]
        print(f"{name:<42}{statistics.median(found):6.2f} s  ({min(found):.2f} to {max(found):.2f})")


def _own_words() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def _first_step(words: list[str]) -> tuple[float, float]:
    """Return the seconds until the first step begins, and until it is done."""
    started = time.time()
    answer = _python("-c", FIRST_STEP, str(ROOT / "run.py"), *words)
    for line in answer.stdout.splitlines():
        if line.startswith("first step "):
            begun, done = map(float, line.split()[2:])
            return begun - started, done - started
    raise UserError(f"no step was taken: {_last_words(answer)}")


def _per_job(folder: Path) -> tuple[float, float]:
    """Return what a job of a sweep takes beside the job's own work, and its own work beside its epochs, in seconds.

    A sweep of JOBS jobs is longer than one of one job by JOBS - 1 jobs. A job works from the moment when it claims
    its directory to the moment when it notes that it is done.
    """
    seconds = []
    for count in (1, JOBS):
        seeds = ",".join(str(number) for number in range(count))
        started = time.perf_counter()
        words = (str(ROOT / "run.py"), "-m", *SHORT, f"seed={seeds}", f"hydra.sweep.dir={folder}/{count}")
        answer = _python(*words)
        seconds.append(time.perf_counter() - started)
        if answer.returncode:
            raise UserError(f"the sweep failed: {_last_words(answer)}")
    runs = [path.parent for path in (folder / str(JOBS)).glob("*/history.csv")]
    work = statistics.mean(
        (run / "status.json").stat().st_mtime - (run / "config.yaml").stat().st_mtime for run in runs
    )
    epochs = statistics.mean(
        sum(row["seconds"] or 0.0 for row in RunDirectory(run).read_history()) for run in runs
    )
    return (seconds[1] - seconds[0]) / (JOBS - 1) - work, work - epochs


def _last_words(answer: subprocess.CompletedProcess[str]) -> str:
    return (answer.stderr.strip().splitlines() or ["no message"])[-1].removeprefix("error: ")


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    # this process itself lets Hydra pass errors on; its children shall end in one line
    surroundings = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | {
        "PYTHONPATH": str(ROOT)
    }
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=surroundings, check=False
    )
