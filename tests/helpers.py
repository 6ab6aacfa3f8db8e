"""Helpers that several test files share."""

from __future__ import annotations

import csv
import dataclasses
import errno
import functools
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.composing import cache_compositions
from tests.conftest import ROOT
from zfnet.config.schema import DATA, AugmentConfig, Config, Conv, DataConfig, Linear, ModelConfig
from zfnet.data.shapes import draw_shapes
from zfnet.jobs.train import train
from zfnet.runs.command import compose_raw, prepare_overrides, read_command
from zfnet.runs.directory import RunDirectory
from zfnet.training import loop
from zfnet.training.build import build_state, check_recipe
from zfnet.training.callbacks import EMA, Callback, FilterRenormalization
from zfnet.training.device import resolve_runtime, set_switches
from zfnet.training.loaded import LoadedRun
from zfnet.training.state import TrainingState

# A training on built-in images that takes a second or two, on the CPU even where there is a GPU.
TINY = (
    "experiment=quickstart",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.epochs=2",
    "logger=none",
    "data.train_images=200",
    "data.test_images=50",
    "data.batch_size=20",
)

# A bit-exact training on the CPU with a network of two thousand weights: 8 steps an epoch, milliseconds a step.
TINY_EXACT = (
    *TINY,
    "trainer=exact",
    "trainer.threads=1",
    "data.train_images=80",
    "data.test_images=20",
    "data.batch_size=9",
    "model.conv1.channels=4",
    "model.conv2.channels=4",
    "model.conv3=null",
    "model.conv4=null",
    "model.conv5.channels=8",
    "model.fc6.features=16",
    "model.fc7=null",
)
STEPS = 8  # in one epoch of TINY_EXACT: 72 training images in batches of 9
EVERY_STEP = "trainer.checkpoint_minutes=1e-9"  # a checkpoint after every step; not part of a run's identity


def compose(*words: str) -> Config:
    """Return the config that run.py reads from these words."""
    return pickle.loads(_pickled_config(words))


@functools.cache
def _pickled_config(words: tuple[str, ...]) -> bytes:
    marked = prepare_overrides(words)
    return pickle.dumps(read_command(compose_raw(marked), marked, sources=()))  # five times as fast as copy.deepcopy


def compose_checked(*words: str) -> Config:
    """Return the config of these words after all checks that run.py makes before it reads data."""
    config = compose(*words)
    check_recipe(config)
    return config


def claim(run: RunDirectory, config: Config) -> bool:
    """Claim the directory for `config`'s run, and return whether there is a run to resume."""
    with run.claim(config) as resumed:
        return resumed


def train_tiny(folder: Path, *words: str) -> RunDirectory:
    """Train TINY with these overrides in `folder`."""
    run = RunDirectory(folder)
    train(compose(*TINY, *words), run)
    return run


def train_tiny_exact(folder: Path, *words: str) -> RunDirectory:
    """Train or resume TINY_EXACT in `folder`, without figures, which take most of the time."""
    return train_without_figures(folder, compose(*TINY_EXACT, *words))


def train_without_figures(folder: Path, config: Config) -> RunDirectory:
    """Train or resume a config in `folder`, without figures."""
    run = RunDirectory(folder)
    with no_figures("train"):
        train(config, run)
    return run


def training_state(config: Config, steps: int = STEPS, callbacks: Sequence[Callback] = ()) -> TrainingState:
    """Return the training state for ten classes, including the callbacks of model.rms_limit and trainer.ema."""
    arithmetic: list[Callback] = []
    if config.model.rms_limit is not None:
        arithmetic.append(FilterRenormalization(config.model.rms_limit))
    if config.trainer.ema is not None:
        arithmetic.append(EMA(config.trainer.ema, warmup=config.trainer.version > 1))
    runtime = resolve_runtime(config.trainer)
    return build_state(config, runtime, 10, steps, callbacks=[*arithmetic, *callbacks])


class Trap:
    """Writes a file `witness` to the current folder when its pickle is loaded."""

    def __reduce__(self):
        return Path.write_text, (Path("witness"), "opened")


def raise_disk_full(*_: object) -> None:
    """Replace a function that writes a file, and fail as on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Killed(BaseException):
    """Simulates SIGKILL in this process. A BaseException, because no error handler may catch it."""


@contextmanager
def killed_before(step: int) -> Iterator[None]:
    """Within this block, training raises Killed just before the given global step and saves nothing more."""
    real = loop.train_step

    def dying(state, batch) -> None:
        if state.step == step:
            if not state.world.is_main:  # process 0 is killed too, and then ends this one
                time.sleep(60)
            raise Killed
        real(state, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", dying)
        yield


def train_until_killed(folder: Path, step: int, *words: str) -> None:
    """Train TINY_EXACT in `folder` with a checkpoint after every step, until it is killed before step `step`."""
    with killed_before(step), pytest.raises(Killed):
        train_tiny_exact(folder, EVERY_STEP, *words)


def assert_resumes_exactly(folder: Path, steps: Sequence[int], *words: str) -> RunDirectory:
    """Assert that TINY_EXACT, killed before each of these steps and resumed, equals an uninterrupted run.

    Return the resumed run. The uninterrupted run is in `folder`/whole.
    """
    expected = weights_and_history(train_tiny_exact(folder / "whole", *words))
    for step in steps:
        train_until_killed(folder / "run", step, *words)
    run = train_tiny_exact(folder / "run", EVERY_STEP, *words)
    assert weights_and_history(run) == expected
    return run


_DRAWING = {
    "train": ("draw_curves", "draw_results", "save_figure"),
    "evaluate": ("draw_results", "draw_samples", "save_figure"),
}


@contextmanager
def no_figures(*jobs: str) -> Iterator[None]:
    """Skip the figures of these jobs (default: train and evaluate) and of sweeps, and save others as one pixel.

    It also caches the built-in images.
    """
    with pytest.MonkeyPatch.context() as patch:
        for job in jobs or _DRAWING:
            for name in _DRAWING[job]:
                patch.setattr(f"zfnet.jobs.{job}.{name}", lambda *_: None)
        patch.setattr("zfnet.sweeps.figures.draw_sweep", lambda *_: {})
        pixel = Image.new("RGB", (1, 1))
        patch.setattr("matplotlib.figure.Figure.savefig", lambda _, file, **__: pixel.save(file, "png"))
        patch.setattr("zfnet.data.sources.draw_shapes", _cached_shapes)
        yield


def fork_server() -> BaseContext:
    """Return a context whose processes are forked from a server that has imported the package and run nothing.

    A new interpreter needs three seconds of CPU time to import PyTorch and the package.
    """
    from multiprocessing.forkserver import ensure_running  # not on Windows

    context = multiprocessing.get_context("forkserver")
    # the first optimizer of a process imports torch._dynamo, which takes two seconds
    context.set_forkserver_preload(["tests.helpers", "matplotlib.figure", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # so that the server finds the package wherever the test runs
        ensure_running()
    return context


@contextmanager
def other_process(work: Callable[..., None], *values: Any) -> Iterator[BaseProcess]:
    """Call `work(*values)` in another process; after this block, kill that process and print its output."""
    with tempfile.NamedTemporaryFile() as output:
        process = fork_server().Process(target=_work_in, args=(dict(os.environ), output.name, work, *values))
        process.start()
        try:
            yield process
        finally:
            process.kill()
            process.join()
            print(Path(output.name).read_text(errors="replace"))  # pytest shows it if the test fails


def _work_in(environment: dict[str, str], output: str, work: Callable[..., None], *values: Any) -> None:
    os.environ.clear()  # of the test that started the server
    os.environ.update(environment, PYTHONPATH=str(ROOT))
    redirect(output)
    work(*values)


def redirect(output: str, errors: str | None = None) -> None:
    """Write this process's output, and the output of its children, to these files."""
    for number, name in ((1, output), (2, errors or output)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)


def run_py_in(folder: Path, *words: str) -> None:
    """Run run.py with these words in `folder`, without a training's figures, with its output in out.txt and err.txt."""
    os.chdir(folder)
    redirect("out.txt", "err.txt")
    sys.argv[:] = [str(ROOT / "run.py"), *words]
    # only "train": importing job=evaluate takes seconds
    with no_figures("train"), pytest.MonkeyPatch.context() as patch:
        cache_compositions(patch)
        runpy.run_path(sys.argv[0], run_name="__main__")


@functools.cache
def _cached_shapes(count: int, size: int, part: int):
    return draw_shapes(count, size, part)


def weights_and_history(run: RunDirectory) -> tuple[bytes, list[dict[str, Any]]]:
    """Return what is bit-identical in two equal runs: the weights file, and the history without timings."""
    timings = ("seconds", "images_per_second")
    history = [{k: v for k, v in row.items() if k not in timings} for row in run.read_history()]
    return run.weights.read_bytes(), history


REQUIRED = {"folder": ["data.root=nowhere"], "dataset": ["+data.train._target_=nowhere"]}


def data_config(name: str = "shapes", **changes: Any) -> DataConfig:
    """Return the default data settings of a data set, with images of 64 px, batches of 4 and `changes`."""
    words = [f"data={name}", *REQUIRED.get(name, [])]
    values = dataclasses.asdict(compose(*words).data)
    sizes = {"image_size": 64, "batch_size": 4, "validation": 0.1, "store_size": None}
    return DATA[name](**(values | sizes | changes))


def augment_config(**changes: Any) -> AugmentConfig:
    """Return augmentation settings that leave images unchanged, with `changes`."""
    return AugmentConfig(name="test", **changes)


def tiny_model_config(**changes: Any) -> ModelConfig:
    """Return the config of a network with ZFNet's layers but few maps, for images of at least 64 px."""
    layers: dict[str, Any] = {
        "conv1": Conv(4, 7, 2, 1, True),
        "conv2": Conv(6, 5, 2, 0, True),
        "conv3": Conv(5, 3, 1, 1, False),
        "conv4": Conv(5, 3, 1, 1, False),
        "conv5": Conv(6, 3, 1, 1, True),
        "fc6": Linear(12),
        "fc7": Linear(11),
    }
    return ModelConfig(**(layers | changes))


def random_images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Return uint8 noise [count, size, size, 3]."""
    return torch.randint(
        0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


@contextmanager
def assert_full_precision() -> Iterator[None]:
    """Turn on autocast, TF32 and autotuning, as a training leaves them, and assert that no convolution uses them.

    Explanations must turn them off while they run. Afterwards the switches must be as before.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    plain = torch.nn.Conv2d.forward

    def switches() -> tuple[Any, ...]:
        tf32 = (cudnn.allow_tf32, matmul.allow_tf32, cudnn.conv.fp32_precision, matmul.fp32_precision)
        return *tf32, cudnn.benchmark, cudnn.deterministic, torch.is_autocast_enabled("cpu")

    def checked(self, x):
        assert switches() == (False, False, "ieee", "ieee", False, True, False)
        return plain(self, x)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        set_switches(False)
        before = switches()
        patch.setattr(torch.nn.Conv2d, "forward", checked)
        yield
        assert switches() == before == (True, True, "tf32", "tf32", True, False, True)


def write_images(folder: Path, counts: dict[str, int], size: int = 8, suffix: str = "png") -> Path:
    """Write `counts[class]` images of noise to folder/class/, each different; return `folder`."""
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            number += 1
            pixels = random_images(1, size, seed=number)[0].numpy()
            Image.fromarray(pixels).save(folder / name / f"{k:03d}.{suffix}")
    return folder


def read_csv(path: Path | str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def load_for_job(run: RunDirectory, *words: str) -> LoadedRun:
    """Load a run as a job with `run=<dir>` and these overrides loads it."""
    words = ("job=evaluate", f"run={run.folder}", *words)
    return LoadedRun(read_command(compose_raw(prepare_overrides(words)), words, sources=()))
