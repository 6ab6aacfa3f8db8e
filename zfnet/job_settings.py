"""The settings of each job: what may stand under `job` in a config. One class a job, named in JOBS.

`run` says whether a job reads a run directory: `needed`, `refused`, or `optional`. `images` says whether it
reads image files (`images=[…]`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from zfnet.ranges import limits, one_of


@dataclass(kw_only=True)
class Job:
    """A job without settings of its own."""

    run: ClassVar[str] = "refused"
    images: ClassVar[bool] = False

    name: str


@dataclass(kw_only=True)
class Resume(Job):
    run: ClassVar[str] = "needed"


@dataclass(kw_only=True)
class Summary(Job):
    run: ClassVar[str] = "optional"


@dataclass(kw_only=True)
class Benchmark(Job):
    """`rounds` turns of `steps` timed steps each, after `warmup` untimed ones; `workers` serve the other loops."""

    rounds: int = limits(low=1)
    steps: int = limits(low=1)
    warmup: int = limits(low=0)
    workers: int = limits(low=0)


@dataclass(kw_only=True)
class Reproduce(Job):
    run: ClassVar[str] = "needed"


@dataclass(kw_only=True)
class Evaluate(Job):
    run: ClassVar[str] = "needed"

    split: str = one_of("test", "validation", "train", "all")
    tta: str = one_of("none", "flip", "tencrop")
    crop_ratio: float = limits(above=0, high=1)


@dataclass(kw_only=True)
class Predict(Job):
    run: ClassVar[str] = "needed"
    images: ClassVar[bool] = True

    top: int = limits(low=1)


@dataclass(kw_only=True)
class Export(Job):
    run: ClassVar[str] = "needed"

    format: str = one_of("onnx", "pt2", "all")


@dataclass(kw_only=True)
class Runs(Job):
    root: str


@dataclass(kw_only=True)
class Deconvnet(Job):
    """See conf/job/deconvnet.yaml."""

    run: ClassVar[str] = "needed"

    layers: Optional[list[str]]
    top: int = limits(low=1, high=100)
    maps: int = limits(low=1, high=100)
    split: str = one_of("auto", "train", "validation", "test")
    max_images: Optional[int] = limits(low=1)
    rule: str = one_of("deconvnet", "guided", "gradient")
    dead_windows: str = one_of("first", "mask", "all")
    lrn: str = one_of("identity", "gradient")
    controls: bool
    atlas: bool


JOBS: dict[str, type[Job]] = {
    "train": Job,
    "resume": Resume,
    "summary": Summary,
    "benchmark": Benchmark,
    "reproduce": Reproduce,
    "evaluate": Evaluate,
    "predict": Predict,
    "export": Export,
    "runs": Runs,
    "deconvnet": Deconvnet,
}


def job_class(settings: Any) -> type[Job] | None:
    """Return the class for a `job` group that has not been checked yet; None for an unknown job."""
    name = settings.get("name") if hasattr(settings, "get") else None
    return JOBS.get(name) if isinstance(name, str) else None
