"""What every test starts from: no display, no user cache, and the command line as a function.

The process that hands the tests out to the others imports this file as well, while they wait: PyTorch and the package
are imported where they are used.
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
# PyTorch looks at it once, at the first product on a GPU: of whatever test, and `trainer=exact` needs it there
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# the same examples every time, and no complaint about a busy machine
hypothesis.settings.register_profile("zfnet", deadline=None, derandomize=True)
hypothesis.settings.load_profile("zfnet")


def pytest_configure() -> None:
    gc.disable()  # while all is imported, of which nothing is garbage


def pytest_collection_finish() -> None:
    """Collect the garbage of the tests alone: each look through all that is imported takes a quarter of a second."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:  # not the keywords, which hold the folder's name
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _composed_once() -> Iterator[None]:
    """Let Hydra remember what it composes."""
    from tests.composing import remember

    with pytest.MonkeyPatch.context() as patch:
        remember(patch)
        yield


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoded images of tests do not go to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _no_wait_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write as the package does, but wait for no disk: what dies here is a process, after which the files remain.

    Shared runs are trained before this, and other processes, too: they do wait.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(autouse=True)
def _switches_put_back():
    """`trainer=exact` and `trainer.threads` set process-wide switches; one test's must not reach the next."""
    import torch

    from zfnet.training.device import THREADS

    def put_back() -> None:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(THREADS)

    put_back()  # fixtures of a module or a session train before any test does
    yield
    put_back()


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """Trainings, evaluations and sweeps draw nothing, which takes most of a small one's time; `drawn` marks others."""
    from tests.helpers import no_figures

    with contextlib.nullcontext() if request.node.get_closest_marker("drawn") else no_figures():
        yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A finished run of the small network on 200 built-in images. Tests read it and never write to it."""
    from tests.helpers import train_tiny

    return train_tiny(tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[dict[str, Any]]]:
    """What the run of MINUTE learns without any interruption, with checkpoints only at its end."""
    from tests.helpers import learned, train_minute

    return learned(train_minute(tmp_path_factory.mktemp("whole") / "run"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A network that classifies most built-in images correctly. Tests read its run and never write to it."""
    from tests.explain.trained import train_some

    return train_some(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes up the validations: `judge(loss=[…])` gives their loss after epochs 1, 2, …"""
    from zfnet.training import loop

    real = loop.evaluate

    def prefer(**made_up: Sequence[float]) -> None:
        def judged(model, batches, runtime, what, stop=None):
            evaluation = real(model, batches, runtime, what, stop)
            if what.startswith("validation "):
                for metric, values in made_up.items():
                    object.__setattr__(evaluation, metric, values[int(what.split()[1]) - 1])
            return evaluation

        monkeypatch.setattr(loop, "evaluate", judged)

    return prefer


def no_mode(*_: Any, **__: Any) -> None:
    """Stand for Hydra's look for hydra.mode, which composes the config once more: nothing in conf/ sets it."""


class Answer(NamedTuple):
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line with which a command failed, without `error: ` and the line's end."""
        assert self.code == 1, self.err
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.endswith("\n"), self.err
        return self.err[len("error: ") : -1]


@pytest.fixture
def run_py(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """Return a function that does what `python run.py …` does, in this process and in an empty folder."""
    from hydra._internal.hydra import Hydra
    from hydra.core.hydra_config import HydraConfig

    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "run.py"), *map(str, words)])
        capfd.readouterr()
        code = 0
        with monkeypatch.context() as patch:
            patch.setattr(HydraConfig.instance(), "cfg", None)  # or a later training would record this command
            if not any(re.match(r"-+c|hydra\.(mode|searchpath)", str(word)) for word in words):
                patch.setattr(Hydra, "get_mode", no_mode)
            try:
                runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        return Answer(code, out, err)

    return call
