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
    """`rounds` turns of `steps` timed steps each, after `warmup` untimed ones; `workers` serve the other loops.

    Of `subject` deconvnet, each round projects the strongest place of `maps` maps a layer in `count` images; of
    folder, it reads `pictures` photographs.
    """

    subject: str = one_of("training", "choices", "records", "folder", "start", "deconvnet")
    pictures: int = limits(low=2)
    maps: Optional[int] = limits(low=1)
    count: int = limits(low=1)
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


@dataclass(kw_only=True)
class Look(Job):
    """A job that looks inside a trained network: `split` is the part of the run's data that it shows to it.

    `auto` is validation or, where the run has none, test.
    """

    run: ClassVar[str] = "needed"

    split: str = one_of("auto", "train", "validation", "test")


@dataclass(kw_only=True)
class Occlusion(Look):
    """Squares of side `patch`, `stride` apart, in input pixels; `fill` is a pixel value, 0 … 255."""

    images: ClassVar[bool] = True

    count: int = limits(low=1)
    layer: str
    patch: Optional[int] = limits(low=1)
    stride: Optional[int] = limits(low=1)
    fill: Optional[float] = limits(low=0, high=255)


@dataclass(kw_only=True)
class Invariance(Look):
    """Ranges of the transforms: `translation` is a share of the side, `rotation` in degrees; `steps` amounts each."""

    images: ClassVar[bool] = True

    count: int = limits(low=1)
    mean_images: int = limits(low=2)
    layers: Optional[list[str]]
    translation: float = limits(above=0, below=1)
    scale: float = limits(above=1, high=10)
    rotation: float = limits(above=0, below=360)
    steps: int = limits(low=2, high=1000)


@dataclass(kw_only=True)
class Evolution(Look):
    """`maps` of each layer are drawn; on `probe_images` maps are compared across epochs."""

    max_images: Optional[int] = limits(low=1)
    layers: Optional[list[str]]
    maps: int = limits(low=1, high=50)
    probe_images: int = limits(low=3)


@dataclass(kw_only=True)
class Filters(Look):
    """`other` is a second run's directory; `limit` the RMS that the paper allows a filter."""

    other: Optional[str]
    limit: float = limits(above=0)


@dataclass(kw_only=True)
class Correspondence(Look):
    """Masks of side `patch` on parts of images: of the split, or those that the table `points` names."""

    points: Optional[str]
    count: int = limits(low=2)
    layers: Optional[list[str]]
    patch: Optional[int] = limits(low=1)
    fill: Optional[float] = limits(low=0, high=255)
    permutations: int = limits(low=1, high=1_000_000)


@dataclass(kw_only=True)
class Attribution(Look):
    """`layer` is Grad-CAM's; integrated gradients take `steps` points."""

    images: ClassVar[bool] = True

    count: int = limits(low=1)
    layer: str
    steps: int = limits(low=2, high=10_000)


@dataclass(kw_only=True)
class Compare(Job):
    sweep: str  # the directory of a sweep


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
    "occlusion": Occlusion,
    "invariance": Invariance,
    "evolution": Evolution,
    "filters": Filters,
    "correspondence": Correspondence,
    "attribution": Attribution,
    "compare": Compare,
}


def job_class(settings: Any) -> type[Job] | None:
    """Return the class for a `job` group that has not been checked yet; None for an unknown job."""
    name = settings.get("name") if hasattr(settings, "get") else None
    return JOBS.get(name) if isinstance(name, str) else None
