"""Test whether interrupted and damaged training runs end with the same bits as an uninterrupted run.

    python benchmarks/exactness.py --seconds 300 --seed 0 --out exactness.json

Each try trains a small network through 1 to 6 faults (killed or stopped processes, a full disk, damaged files), each
in a separate process, and then to the end. It compares the weights and the history with those of an uninterrupted run.
Some tries also start two processes in one directory at the same time. The exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from zfnet import compose
from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.data import sources
from zfnet.jobs import train as training
from zfnet.runs.directory import RunDirectory
from zfnet.runs.hydra_record import register_resolvers
from zfnet.runs.provenance import describe_environment
from zfnet.training.checkpoint import BEST_FILE, step_files

# steps that take milliseconds, with a checkpoint after each step
SMALL = (
    *("experiment=quickstart", "trainer=exact", "trainer.device=cpu", "trainer.threads=1", "logger=none"),
    *("data.train_images=80", "data.test_images=20", "data.batch_size=9", "trainer.checkpoint_minutes=1e-9"),
    *("model.conv1.channels=4", "model.conv2.channels=4", "model.conv3=null", "model.conv4=null"),
    *("model.conv5.channels=8", "model.fc6.features=16", "model.fc7=null", "trainer.epochs=3"),
)
RECIPES = {
    "adamw, onecycle, ema": ("optimizer=adamw", "scheduler=onecycle", "trainer.ema=0.9", "trainer.clip_norm=1"),
    "sgd, plateau, batch norm": ("optimizer=sgd", "scheduler=plateau", "scheduler.patience=0", "model.norm=batch"),
    "nadam, cosine, early stopping": (
        *("optimizer=nadam", "scheduler=cosine", "scheduler.warmup_epochs=0.5", "trainer.accumulate=3"),
        *("augment=crop_flip_cutout", "model.dropout=0.5", "callbacks=early_stopping"),
    ),
}
RACE_EVERY = 5  # tries
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT


class Child:
    """A training in a forked process, which need not import anything again."""

    def __init__(self, folder: Path, config: Config, prepare: Callable[[], None] = lambda: None) -> None:
        self.output, inlet = os.pipe()  # a pipe, because `small_disk` limits the size of files
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.dup2(inlet, 1)
                os.dup2(inlet, 2)
                prepare()
                training.train(config, RunDirectory(folder))
                code = 0
            except UserError as error:
                print(f"error: {error}", flush=True)
                code = 1
            except KeyboardInterrupt as error:
                code = getattr(error, "exit_code", 130)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

        os.close(inlet)

    def wait(self) -> int:
        """Wait for the process. Return its exit code, or the negative number of the signal that ended it."""
        with open(self.output, encoding="utf-8", errors="replace") as file:
            self.said = file.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def line(self) -> str:
        """Return the error line that the process printed last. Raise RuntimeError for a traceback or other output."""
        if "Traceback" in self.said or not self.said.splitlines()[-1].startswith("error: "):
            raise RuntimeError(self.said)
        return self.said.splitlines()[-1]


def die_in_write(number: int, fraction: float, note: Path) -> None:
    """Make this process die by SIGKILL in its `number`-th file write, after a fraction of the file's bytes."""
    real, writes = os.replace, 0

    def replace(beside: Any, path: Any) -> None:
        nonlocal writes
        writes += 1
        if writes == number:
            os.truncate(beside, int(fraction * os.path.getsize(beside)))
            note.write_text(Path(path).name)
            os.kill(os.getpid(), signal.SIGKILL)
        real(beside, path)

    os.replace = replace  # type: ignore[assignment]


def small_disk(size: int) -> None:
    """Make the system refuse to let this process write files of more than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Tries:
    """Runs tries with random faults and counts their outcomes."""

    def __init__(self, seed: int, place: Path) -> None:
        self.random, self.place = random.Random(seed), place
        self.configs = {name: compose([*SMALL, *words]) for name, words in RECIPES.items()}
        self.faults: Counter[str] = Counter()
        self.kills_in_writes: Counter[str] = Counter()
        self.kills_at_times: list[float] = []
        self.kills_with_half_a_file = 0
        self.lines: Counter[str] = Counter()
        self.hashes: dict[str, Counter[str]] = {name: Counter() for name in RECIPES}
        self.expected: dict[str, str] = {}
        self.races: Counter[str] = Counter()
        self.tries = 0
        for name, config in self.configs.items():  # in this process, so that forked children inherit what it loads
            run = RunDirectory(place / f"whole-{len(self.expected)}")
            start = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):
                training.train(config, run)
            self.seconds = time.monotonic() - start  # of one run
            self.expected[name] = learned(run)

    def finish(self, folder: Path, name: str) -> str:
        """Train to the end. Return the hash of what was learned."""
        while (code := self.start(folder, name)) != 0:
            if code != 1:
                raise RuntimeError(f"exit code {code}")
        if left := list(folder.rglob("*.partial")):
            raise RuntimeError(f"left over: {left}")
        return learned(RunDirectory(folder))

    def start(self, folder: Path, name: str, prepare: Callable[[], None] = lambda: None) -> int:
        """Train in a child until it ends, follow the advice of its error message, and return its exit code."""
        child = Child(folder, self.configs[name], prepare)
        code = child.wait()
        self.check_exit(folder, child, code)
        return code

    def check_exit(self, folder: Path, child: Child, code: int) -> None:
        if code == 70:
            raise RuntimeError(child.said)
        if code == 1:
            line = child.line()
            kind = "cannot be written: " + os.strerror(errno.EFBIG)
            if "delete " in line:
                kind = "the weights of the best epoch are lost"
            if kind.split(":")[0] not in re.sub(r"epoch, \d+, are", "epoch are", line):
                raise RuntimeError(line)
            self.lines[kind] += 1
            if "delete " in line:
                shutil.rmtree(folder / "checkpoints")

    def one(self) -> None:
        """Run one try: train through some faults, then to the end."""
        self.tries += 1
        name, folder = self.random.choice(list(RECIPES)), self.place / f"try-{self.tries}"
        kinds = [
            self.kill_in_write,
            self.kill_at_a_time,
            self.stop,
            self.fill_disk,
            self.cut,
            self.delete_newest,
            self.delete_best,
        ]
        for kind in self.random.choices(kinds, weights=[6, 6, 3, 2, 1, 1, 1], k=self.random.randint(1, 6)):
            kind(folder, name)
        self.hashes[name][self.finish(folder, name)] += 1
        shutil.rmtree(folder)

    def kill_in_write(self, folder: Path, name: str) -> None:
        note = folder.with_suffix(".note")
        number, fraction = self.random.randint(1, 45), self.random.random()
        if self.start(folder, name, lambda: die_in_write(number, fraction, note)) == -signal.SIGKILL:
            self.faults["SIGKILL in a write"] += 1
            file = note.read_text()
            self.kills_in_writes["step-….safetensors" if file.startswith("step-") else file] += 1

    def kill_at_a_time(self, folder: Path, name: str) -> None:
        child, delay = Child(folder, self.configs[name]), self.random.uniform(0, 1.2 * self.seconds)
        time.sleep(delay)
        os.kill(child.pid, signal.SIGKILL)
        code = child.wait()
        if code == -signal.SIGKILL:
            self.faults["SIGKILL at a time"] += 1
            self.kills_at_times.append(round(delay, 3))
            self.kills_with_half_a_file += bool(folder.exists() and list(folder.rglob("*.partial")))
        self.check_exit(folder, child, code)

    def stop(self, folder: Path, name: str) -> None:
        number = self.random.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        child = Child(folder, self.configs[name])
        while not self.has_started(folder, child) and os.waitid(os.P_PID, child.pid, ENDED) is None:
            time.sleep(0.005)  # earlier, the signal would end it by default
        time.sleep(self.random.uniform(0, self.seconds))
        os.kill(child.pid, number)  # if the child has ended, it is a zombie, and this has no effect
        code = child.wait()
        self.faults[number.name] += code in (128 + number, -number)
        self.check_exit(folder, child, code)

    def has_started(self, folder: Path, child: Child) -> bool:
        """Return whether the process has started its training."""
        status = folder / "status.json"
        return status.exists() and f'"pid": {child.pid}' in status.read_text()

    def fill_disk(self, folder: Path, name: str) -> None:
        size = self.random.randint(500, 60_000)
        code = self.start(folder, name, lambda: small_disk(size))
        self.faults["no space for a file"] += code == 1

    def cut(self, folder: Path, name: str) -> None:
        for path in step_files(folder / "checkpoints")[-1:]:
            os.truncate(path, self.random.randrange(path.stat().st_size))
            self.faults["newest checkpoint cut"] += 1

    def delete_newest(self, folder: Path, name: str) -> None:
        for path in step_files(folder / "checkpoints")[-1:]:
            path.unlink()
            self.faults["newest checkpoint lost"] += 1

    def delete_best(self, folder: Path, name: str) -> None:
        if (folder / "checkpoints" / BEST_FILE).exists():
            (folder / "checkpoints" / BEST_FILE).unlink()
            self.faults["best weights lost"] += 1

    def race(self) -> None:
        """Start two processes in one directory at once. Their configs differ in a key that does not affect results."""
        name, folder = self.random.choice(list(RECIPES)), self.place / f"race-{self.tries}"
        configs = [compose([*SMALL, *RECIPES[name], f"trainer.log_every={n}"]) for n in (11, 12)]
        gate, opener = os.pipe()

        def wait() -> None:
            os.close(opener)
            os.read(gate, 1)

        children = [Child(folder, config, wait) for config in configs]
        os.close(gate)
        os.close(opener)  # both children wait for this
        codes = [child.wait() for child in children]
        if sorted(codes) != [0, 1]:
            raise RuntimeError(f"{codes}: {[child.said for child in children]}")
        line, winner = children[codes.index(1)].line(), configs[codes.index(0)]
        right = RunDirectory(folder).read_config().trainer.log_every == winner.trainer.log_every
        self.races["the winner's record" if right else "the loser's record"] += 1
        if "is in use by another process" not in line or learned(RunDirectory(folder)) != self.expected[name]:
            raise RuntimeError(line)
        shutil.rmtree(folder)

    def result(self, seed: int, seconds: float) -> dict[str, Any]:
        """Return the content of the JSON file."""
        identical = sum(self.hashes[name][expected] for name, expected in self.expected.items())
        environment = describe_environment(torch.device("cpu"), "exact", [])
        return {
            "command": f"python benchmarks/exactness.py --seconds {seconds:g} --seed {seed}",
            "tries": self.tries,
            "identical": identical,
            "different": sum(sum(counts.values()) for counts in self.hashes.values()) - identical,
            "faults": dict(sorted(self.faults.items())),
            "kill_points": {
                "in the write of": dict(self.kills_in_writes.most_common()),
                "seconds after the start": sorted(self.kills_at_times),
                "of these, with a file half written": self.kills_with_half_a_file,
            },
            "ended_with_one_line": dict(self.lines),
            "two_starts_of_one_directory": dict(self.races),
            "not_tried": "another number of processes: sums are then added in another order, and bits are not promised",
            "hashes": {
                name: {"undisturbed": self.expected[name], "tries": dict(self.hashes[name])} for name in RECIPES
            },
            "machine": {
                key: environment[key] for key in ("cpu", "packages", "python", "platform") if key in environment
            },
        }


def learned(run: RunDirectory) -> str:
    """Return a hash of the weights file and of the history without timings."""
    times = ("seconds", "images_per_second")
    history = [{k: v for k, v in row.items() if k not in times} for row in run.read_history()]
    return hashlib.sha256(run.weights.read_bytes() + json.dumps(history).encode()).hexdigest()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="start no new try after this time; default: 300")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults; default: 0")
    parser.add_argument("--out", type=Path, default=Path("exactness.json"), help="default: exactness.json")
    options = parser.parse_args(words)
    register_resolvers()
    torch.set_num_threads(1)  # threads do not survive a fork, and neither do CUDA's
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    sources.draw_shapes = functools.cache(sources.draw_shapes)  # depends only on three numbers
    training.save_figure = training.draw_results = training.draw_curves = lambda *_: None  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(prefix="zfnet-exactness-") as place:
        end = time.monotonic() + options.seconds
        tries = Tries(options.seed, Path(place))
        while time.monotonic() < end or not tries.tries:
            tries.one()
            if tries.tries % RACE_EVERY == 1:
                tries.race()
        result = tries.result(options.seed, options.seconds)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"{result['identical']} of {result['tries']} tries identical; {result['faults']}; written to {options.out}")
    return int(result["different"] > 0 or "the loser's record" in tries.races)


if __name__ == "__main__":
    sys.exit(main())
