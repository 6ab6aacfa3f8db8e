"""job=evaluate: what a run's network scores on a split, or on other images."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from zfnet.config.ranges import limits, one_of
from zfnet.config.schema import Config, Job
from zfnet.plots.results import draw_results, results_of, say_per_class, say_result
from zfnet.runs.provenance import describe_environment
from zfnet.runs.session import own_directory
from zfnet.training.loaded import LoadedRun
from zfnet.training.loop import evaluate
from zfnet.training.tta import MeanOfViews, data_for_views

log = logging.getLogger("zfnet")


@dataclass(kw_only=True)
class EvaluateJob(Job):
    reads_run: ClassVar[str] = "needed"

    split: str = one_of("test", "validation", "train", "all")
    tta: str = one_of("none", "flip", "tencrop")
    crop_ratio: float = limits(above=0, high=1)

    def main(self, config: Config, output: Path) -> None:
        """Measure one split and write results.json and figures; raises UserError where classes do not match."""
        used, settings = LoadedRun(config), config.job
        splits = used.splits()
        part = used.split(settings.split, splits)
        stored = part.images.shape[1]
        data = data_for_views(used.data, settings.tta, stored, settings.crop_ratio)
        model = used.model if settings.tta == "none" else MeanOfViews(used.model, settings.tta).eval()
        with own_directory(config, output) as run:
            log.info("%s on %s, %s images", used.source.folder, data.name, f"{len(part):,}")
            log.info(used.runtime.describe())
            surroundings = describe_environment(used.runtime.device, splits.fingerprint, config.trainer.name)
            run.write_json("environment.json", {**surroundings, "plan": used.runtime.describe()})
            found = evaluate(model, used.batches(part, data), used.runtime, settings.split)
            result = results_of(found, part.classes)
            run.write_json(
                "results.json",
                {
                    settings.split: result,
                    "run": str(used.source.folder),
                    "data": {"name": data.name, "root": data.root},
                    "tta": settings.tta,
                },
            )
            say_result(settings.split, result)
            say_per_class(result)
            draw_results(run, found, part)
            log.info("written to %s", run.folder)
