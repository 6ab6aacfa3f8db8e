"""job=benchmark: how fast this machine trains the composed config, beside the blog's loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from zfnet.benchmark.blog import BlogLoop
from zfnet.benchmark.others import other_loops
from zfnet.benchmark.ours import OurLoop, peak_memory
from zfnet.benchmark.peaks import measure_peaks, roofline_seconds, training_flops
from zfnet.benchmark.projections import APART, all_maps, time_projections
from zfnet.benchmark.turns import Contender, Timing, take_turns
from zfnet.config import Config
from zfnet.data import ImageSet, load_splits, preprocess
from zfnet.environment import describe_environment
from zfnet.errors import UserError
from zfnet.report.benchmark import draw_benchmark
from zfnet.report.figures import save_figure
from zfnet.run import write_atomically
from zfnet.training.device import Plan, choose, keep_memory
from zfnet.training.state import make_model


def main(config: Config, output: Path, overrides: list[str]) -> None:
    """Time, print a table, and write benchmark.json and figures/benchmark.png."""
    plan, job = choose(config.trainer), config.job
    images = load_splits(config.data).train
    if job.subject == "deconvnet":
        _projections(config, plan, images, output)
        return
    if len(images) < config.data.batch_size:
        raise UserError(
            f"data.batch_size={config.data.batch_size}: there are only {len(images)} training images to take it from"
        )
    print(
        f"{config.model.name}, {config.data.image_size} px, batch {config.data.batch_size}, {plan.describe()}"
    )
    peaks = measure_peaks(plan)
    ours = OurLoop(config, plan, images)
    contenders: list[Contender] = [ours]
    if config.data.image_size == 224:
        contenders.append(BlogLoop(images, config.data.batch_size, plan.device, job.workers))
    else:
        print("the blog's network takes 224 px only, so its loop is left out")
    contenders += other_loops(config, plan, images, job.workers)
    if plan.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(plan.device)
    timings = take_turns(contenders, rounds=job.rounds, steps=job.steps, warmup=job.warmup)
    waited = ours.waited / ours.taken
    memory = peak_memory(plan.device)
    keep_memory(plan.device.type == "cpu")
    parts = ours.breakdown(max(2, min(job.steps, 10)))

    flops = training_flops(ours.state.model)
    speed = timings[0].median()
    result: dict[str, Any] = {
        "contenders": [_facts(t, timings) for t in timings],
        "breakdown_seconds": parts,
        "data_share": parts["data"] / sum(parts.values()),
        "waiting_share": waited * speed / config.data.batch_size,
        "training_gflop_per_image": flops / 1e9,
        "tflop_per_second": speed * flops / 1e12,
        "matmul_peak_tflop_per_second": peaks.matmul_tflops,
        "share_of_matmul_peak": speed * flops / 1e12 / peaks.matmul_tflops,
        "share_of_roofline": roofline_seconds(ours.state.model, ours.batch_size, plan, peaks)
        / (ours.batch_size / speed),
        "copy_gb_per_second": peaks.copy_gb_per_second,
        "peak_memory_gib": memory,
        "config": config.to_dict(),
        "environment": describe_environment(plan.device, "", config.trainer.name),
    }
    (output / "figures").mkdir(parents=True, exist_ok=True)
    write_atomically(output / "benchmark.json", json.dumps(result, indent=2) + "\n")
    save_figure(draw_benchmark(result), output / "figures" / "benchmark.png")
    _say(result, output)


def _projections(config: Config, plan: Plan, images: ImageSet, output: Path) -> None:
    """Time projections of a freshly initialised network; write benchmark.json."""
    model = make_model(config, len(images.classes)).to(plan.device).eval()
    pixels = images.pixels(range(min(config.job.count, len(images))))
    inputs = preprocess(pixels.to(plan.device), config.data, channels_last=False)
    print(f"{config.model.name}, {config.data.image_size} px, {len(inputs)} images, {plan.describe()}")
    rows = time_projections(model, inputs, config.job.maps, config.job.rounds)
    total = all_maps(rows)
    result = {
        "layers": rows,
        "all_maps_top_9": total,
        "config": config.to_dict(),
        "environment": describe_environment(plan.device, "", config.trainer.name),
    }
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "benchmark.json", json.dumps(result, indent=2) + "\n")
    print(
        f"\n{'layer':<8}{'units':>7}{'zfnet, ms each':>16}{'captum, ms each':>17}{'ratio':>9}"
        f"{'difference':>12}{'apart':>7}"
    )
    for row in rows:
        ours, theirs = 1000 * row["zfnet_seconds"], 1000 * row["captum_seconds"]
        print(
            f"{row['layer']:<8}{row['units']:>7}{ours:>16.2f}{theirs:>17.2f}{row['ratio']:>8.1f}×"
            f"{row['difference']:>12.1e}{row['units_apart']:>7}"
        )
    print(
        f"\ndifference: the largest, of the largest pixel; apart: units beyond {APART:.0e}\n"
        f"all {total['projections']:,} projections (9 of each map), from the times above: "
        f"{total['zfnet_seconds']:.0f} s,\nunit by unit with captum {total['captum_seconds']:.0f} s: "
        f"{total['ratio']:.1f} times as long\nwritten to {output}"
    )


def _facts(timing: Timing, all_timings: list[Timing]) -> dict[str, Any]:
    """One contender's speeds; `ratio` is the median over rounds of ours against it, in the same round."""
    ratios = sorted(
        a / b for a, b in zip(all_timings[0].images_per_second, timing.images_per_second, strict=True)
    )
    return {
        "name": timing.name,
        "images_per_second": timing.images_per_second,
        "median": timing.median(),
        "zfnet_is_faster_by": ratios[len(ratios) // 2],
        "steps": timing.steps,
        "batch_size": timing.batch_size,
    }


def _say(result: dict[str, Any], output: Path) -> None:
    print(f"\n{'loop':<24}{'images/s':>10}{'min':>9}{'max':>9}{'zfnet is faster by':>22}")
    for row in result["contenders"]:
        speeds = row["images_per_second"]
        print(
            f"{row['name']:<24}{row['median']:>10.1f}{min(speeds):>9.1f}{max(speeds):>9.1f}"
            f"{row['zfnet_is_faster_by']:>21.2f}×"
        )
    print("\none step of zfnet, each part waited for")
    total = sum(result["breakdown_seconds"].values())
    for part, seconds in result["breakdown_seconds"].items():
        print(f"  {part:<12}{1000 * seconds:>10.2f} ms{seconds / total:>8.1%}")
    print(
        f"\n{result['tflop_per_second']:.3f} TFLOP/s, {result['share_of_matmul_peak']:.0%} of the measured matmul peak "
        f"({result['matmul_peak_tflop_per_second']:.3f}),\n{result['share_of_roofline']:.0%} of the layers' roofline; "
        f"waiting for data {result['waiting_share']:.2%} of the time"
        + (f"; peak memory {result['peak_memory_gib']:.2f} GiB" if result["peak_memory_gib"] else "")
    )
    print(f"written to {output}")
