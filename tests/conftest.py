"""Fixtures that every test uses: no display, no user cache, and the command line as a function.

pytest-xdist's controller imports this file too, while its workers wait. To keep that short, functions import PyTorch
and the package where they need them.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.explain.trained import Trained
    from zfnet.runs.directory import RunDirectory

ROOT = Path(__file__).resolve().parent.parent
os.environ["MPLBACKEND"] = "Agg"
# PyTorch reads this once, at the process's first matrix product on a GPU; tests of `trainer=exact` need it set by then
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# use the same examples in every run, and do not fail on a busy machine
hypothesis.settings.register_profile("zfnet", deadline=None, derandomize=True)
hypothesis.settings.load_profile("zfnet")


def pytest_configure() -> None:
    gc.disable()  # imports create no garbage, so collecting meanwhile only costs time


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection: scanning them takes a quarter of a second each time."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:  # item.keywords would match the folder's name too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _cached_compositions() -> Iterator[None]:
    """Cache Hydra's compositions."""
    from tests.composing import cache_compositions

    with pytest.MonkeyPatch.context() as patch:
        cache_compositions(patch)
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests' decoded images out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync: tests kill processes but not the machine, so files survive without it.

    Session fixtures, which run before this one, and subprocesses still call fsync.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def _reset_switches():
    """Reset the process-wide switches that `trainer=exact` and `trainer.threads` set, before and after each test."""
    import torch

    from zfnet.training.device import DEFAULT_THREADS

    def put_back() -> None:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(DEFAULT_THREADS)

    put_back()  # module and session fixtures may have trained before this test
    yield
    put_back()


@pytest.fixture(autouse=True)
def _without_figures(request: pytest.FixtureRequest) -> Iterator[None]:
    """Skip the figures of trainings, evaluations and sweeps, and the rendering of others, except in `drawn` tests."""
    from matplotlib.figure import Figure

    from tests.helpers import no_figures

    assert Figure.savefig.__module__ == "matplotlib.figure", "an earlier test's patch was not undone"
    with contextlib.nullcontext() if request.node.get_closest_marker("drawn") else no_figures():
        yield


@pytest.fixture
def monkeypatch(_without_figures: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Start after `_without_figures` and so end before it, because tests also patch what it has replaced."""
    return monkeypatch


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay figures out before they are saved as one pixel, so that what cannot be drawn is an error."""
    from matplotlib.figure import Figure

    save = Figure.savefig

    def lay_out_and_save(figure: Figure, *args: Any, **settings: Any) -> None:
        figure.draw_without_rendering()
        save(figure, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", lay_out_and_save)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run of the small network on 200 built-in images. Tests read it and never write to it."""
    from tests.helpers import train_tiny

    return train_tiny(tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="session")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[dict[str, Any]]]:
    """The weights and the history of an uninterrupted run of TINY_EXACT, with checkpoints only at its end."""
    from tests.helpers import train_tiny_exact, weights_and_history

    return weights_and_history(train_tiny_exact(tmp_path_factory.mktemp("reference") / "run"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A network that classifies most built-in images correctly. Tests read its run and never write to it."""
    from tests.explain.trained import train_network

    return train_network(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def fake_validation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that fakes validation results: `fake_validation(loss=[…])` sets those of epochs 1, 2, …"""
    from zfnet.training import loop

    real = loop.evaluate

    def set_results(**made_up: Sequence[float]) -> None:
        def fake_evaluate(model, batches, runtime, what, *more):
            evaluation = real(model, batches, runtime, what, *more)
            if what.startswith("validation "):
                for metric, values in made_up.items():
                    object.__setattr__(evaluation, metric, values[int(what.split()[1]) - 1])
            return evaluation

        monkeypatch.setattr(loop, "evaluate", fake_evaluate)

    return set_results


def skip_mode_lookup(*_: Any, **__: Any) -> None:
    """Replace Hydra's lookup of hydra.mode, which composes the config a second time. conf/ never sets it."""


class Answer(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The single line that a failed command printed to stderr, without `error: ` and the newline."""
        assert self.code == 1, self.err
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n"), self.err
        return self.err[len("error: ") : -1]


@pytest.fixture
def run_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Return a function that runs `python run.py …` in this process and in an empty folder."""
    from hydra._internal.hydra import Hydra
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *map(str, words)])
        capfd.readouterr()
        code = 0
        with monkeypatch.context() as patch:
            patch.setattr(HydraConfig.instance(), "cfg", None)  # so that later trainings do not record it
            if not any(re.match(r"-+c|hydra\.(mode|searchpath)", str(word)) for word in words):
                patch.setattr(Hydra, "get_mode", skip_mode_lookup)
            try:
                runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return call
