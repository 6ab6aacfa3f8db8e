"""Training steps: this program's loop beside the blog's and other people's, and one step taken apart."""

from __future__ import annotations

from typing import Any

from zfnet.benchmark.blog import BlogLoop
from zfnet.benchmark.others import other_loops
from zfnet.benchmark.ours import OurLoop, peak_memory
from zfnet.benchmark.peaks import measure_peaks, roofline_seconds, training_flops
from zfnet.benchmark.turns import Contender, compare, enough_images, print_table, take_turns
from zfnet.config.schema import Config
from zfnet.training.device import Runtime, keep_memory


def measure(config: Config, runtime: Runtime) -> dict[str, Any]:
    """Time the loops in turns, then the parts of one step; return what benchmark.json holds."""
    job, images = config.job, enough_images(config)
    ours = OurLoop("zfnet", config, runtime, images)
    ours.turn(steps=1, warmup=1)
    memory = peak_memory(runtime.device)  # before anybody else has taken any
    ours.waited, ours.taken = 0.0, 0
    peaks = measure_peaks(runtime)
    contenders: list[Contender] = [ours]
    if config.data.image_size == 224:
        contenders.append(BlogLoop(images, config.data.batch_size, runtime.device, job.workers))
    else:
        print("the blog's network takes 224 px only, so its loop is left out")
    contenders += other_loops(config, runtime, images, job.workers)
    timings = take_turns(contenders, rounds=job.rounds, steps=job.steps, warmup=job.warmup)
    waited = ours.waited / ours.taken
    keep_memory(runtime.device.type == "cpu")
    parts = ours.breakdown(max(2, min(job.steps, 10)))
    flops, speed = training_flops(ours.state.model), timings[0].median()
    return {
        "contenders": compare(timings),
        "breakdown_seconds": parts,
        "data_share": parts["data"] / sum(parts.values()),
        "waiting_share": waited * speed / config.data.batch_size,
        "training_gflop_per_image": flops / 1e9,
        "tflop_per_second": speed * flops / 1e12,
        "matmul_peak_tflop_per_second": peaks.matmul_tflops,
        "share_of_matmul_peak": speed * flops / 1e12 / peaks.matmul_tflops,
        "share_of_roofline": roofline_seconds(ours.state.model, ours.batch_size, runtime, peaks)
        / (ours.batch_size / speed),
        "copy_gb_per_second": peaks.copy_gb_per_second,
        "peak_memory_gib": memory,
    }


def say(result: dict[str, Any]) -> None:
    """Print the table, the parts of a step, and what the hardware could do."""
    print_table(result["contenders"], "loop", "zfnet is faster by")
    print("\none step of zfnet, each part waited for")
    total = sum(result["breakdown_seconds"].values())
    for part, seconds in result["breakdown_seconds"].items():
        print(f"  {part:<12}{1000 * seconds:>10.2f} ms{seconds / total:>8.1%}")
    print(
        f"\n{result['tflop_per_second']:.3f} TFLOP/s, {result['share_of_matmul_peak']:.0%} of the measured matmul peak "
        f"({result['matmul_peak_tflop_per_second']:.3f}), {result['share_of_roofline']:.0%} of the roofline,\n"
        f"waiting for data {result['waiting_share']:.2%} of the time, "
        f"peak memory {result['peak_memory_gib']:.2f} GiB"
    )
