"""The settings of each job: what may stand under `job` in a config. One class a job, named in JOBS.

`run` says whether a job reads a run directory: `needed`, `refused`, or `optional`. `images` says whether it
reads image files (`images=[…]`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


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
class Compare(Job):
    sweep: str  # the directory of a sweep


JOBS: dict[str, type[Job]] = {"train": Job, "resume": Resume, "summary": Summary, "compare": Compare}


def job_class(settings: Any) -> type[Job] | None:
    """Return the class for a `job` group that has not been checked yet; None for an unknown job."""
    name = settings.get("name") if hasattr(settings, "get") else None
    return JOBS.get(name) if isinstance(name, str) else None
