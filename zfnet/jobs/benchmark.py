"""job=benchmark: how fast this machine does what the composed config asks, beside others and other ways."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from zfnet.benchmark import choices, folder, projections, records, start, training
from zfnet.config.ranges import limits, one_of
from zfnet.config.schema import Config, Job
from zfnet.plots.benchmark import draw_benchmark
from zfnet.plots.figures import save_figure
from zfnet.runs.directory import write_atomically
from zfnet.runs.provenance import describe_environment
from zfnet.training.device import resolve_runtime

SUBJECTS = {
    "training": training,
    "choices": choices,
    "records": records,
    "folder": folder,
    "start": start,
    "deconvnet": projections,
}


@dataclass(kw_only=True)
class BenchmarkJob(Job):
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

    def main(self, config: Config, output: Path) -> None:
        """Time the subject, print a table, and write benchmark.json and, where there are loops to compare, a figure."""
        runtime, subject = resolve_runtime(config.trainer), SUBJECTS[config.job.subject]
        print(
            f"{config.model.name}, {config.data.image_size} px, batch {config.data.batch_size}, {runtime.describe()}"
        )
        result = subject.measure(config, runtime)
        result |= {
            "config": config.to_dict(),
            "environment": describe_environment(runtime.device, "", config.trainer.name),
        }
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / "benchmark.json", json.dumps(result, indent=2) + "\n")
        if "contenders" in result:
            save_figure(draw_benchmark(result), output / "figures" / "benchmark.png")
        subject.say(result)
        print(f"written to {output}")
