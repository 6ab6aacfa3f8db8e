"""job=benchmark: how fast this machine does what the composed config asks, beside others and other ways."""

from __future__ import annotations

import json
from pathlib import Path

from zfnet.benchmark import choices, folder, projections, records, start, training
from zfnet.config import Config
from zfnet.environment import describe_environment
from zfnet.report.benchmark import draw_benchmark
from zfnet.report.figures import save_figure
from zfnet.run import write_atomically
from zfnet.training.device import choose

SUBJECTS = {
    "training": training,
    "choices": choices,
    "records": records,
    "folder": folder,
    "start": start,
    "deconvnet": projections,
}


def main(config: Config, output: Path, overrides: list[str]) -> None:
    """Time the subject, print a table, and write benchmark.json and, where there are loops to compare, a figure."""
    plan, subject = choose(config.trainer), SUBJECTS[config.job.subject]
    print(
        f"{config.model.name}, {config.data.image_size} px, batch {config.data.batch_size}, {plan.describe()}"
    )
    result = subject.measure(config, plan)
    result |= {
        "config": config.to_dict(),
        "environment": describe_environment(plan.device, "", config.trainer.name),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "benchmark.json", json.dumps(result, indent=2) + "\n")
    if "contenders" in result:
        save_figure(draw_benchmark(result), output / "figures" / "benchmark.png")
    subject.say(result)
    print(f"written to {output}")
