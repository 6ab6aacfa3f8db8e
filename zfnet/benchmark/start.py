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

from zfnet.config import Config
from zfnet.environment import ROOT
from zfnet.errors import UserError
from zfnet.run import RunDirectory
from zfnet.training.device import Plan

# run.py as it is, ended by the first step once its loss is known
FIRST_STEP = """
import os, runpy, sys, time
from zfnet.training import loop

real = loop.train_step

def first_step(state, batch):
    real(state, batch)
    state.metrics.read()
    print("first step done at", time.time(), flush=True)
    os._exit(0)

loop.train_step = first_step
sys.argv = ["run.py", *sys.argv[1:]]
runpy.run_path("run.py", run_name="__main__")
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


def measure(config: Config, plan: Plan) -> dict[str, Any]:
    """Start the program again and again, in processes of its own; return what benchmark.json holds."""
    words = [w for w in _own_words() if not w.startswith(("job=", "job.", "hydra."))]
    first, sweep = [], []
    with tempfile.TemporaryDirectory(prefix="zfnet-start-") as place:
        for number in tqdm(range(config.job.rounds), "starts", unit="round", disable=None, leave=False):
            first.append(_first_step([*words, f"hydra.run.dir={place}/{number}"]))
            sweep.append(_per_job(Path(place, f"sweep{number}")))
    return {"command_words": words, "first_step_seconds": first, "seconds_per_sweep_job": sweep}


def say(result: dict[str, Any]) -> None:
    """Print both, as medians with their extremes."""
    print()
    for name, key in (
        ("from the command to the end of the first step", "first_step_seconds"),
        ("a sweep's overhead per job, its epochs aside", "seconds_per_sweep_job"),
    ):
        found = result[key]
        print(f"{name:<48}{statistics.median(found):6.2f} s  ({min(found):.2f} to {max(found):.2f})")


def _own_words() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


def _first_step(words: list[str]) -> float:
    started = time.time()
    answer = _python("-c", FIRST_STEP, *words)
    for line in answer.stdout.splitlines():
        if line.startswith("first step done at "):
            return float(line.rpartition(" ")[2]) - started
    raise UserError(f"no step was taken: {(answer.stderr.strip().splitlines() or ['no message'])[-1]}")


def _per_job(folder: Path) -> float:
    """Return by how much a sweep of JOBS jobs is longer than one of one job, per job, less the jobs' own epochs."""
    seconds = []
    for count in (1, JOBS):
        seeds = ",".join(str(number) for number in range(count))
        started = time.perf_counter()
        words = ("run.py", "-m", *SHORT, f"seed={seeds}", f"hydra.sweep.dir={folder}/{count}")
        answer = _python(*words)
        seconds.append(time.perf_counter() - started)
        if answer.returncode:
            raise UserError(f"the sweep failed: {(answer.stderr.strip().splitlines() or ['no message'])[-1]}")
    runs = [RunDirectory(path.parent) for path in (folder / str(JOBS)).glob("*/history.csv")]
    epochs = [sum(row["seconds"] or 0.0 for row in run.read_history()) for run in runs]
    return (seconds[1] - seconds[0]) / (JOBS - 1) - statistics.mean(epochs)


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    # this process itself lets Hydra pass errors on; its children shall end in one line
    surroundings = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"} | {
        "PYTHONPATH": str(ROOT)
    }
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=surroundings, check=False
    )
