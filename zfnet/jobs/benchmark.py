"""job=benchmark: time a training step and its phases, and compare each choice of trainer=auto with its alternative.

`benchmarks/` compares the same steps with other training loops, with the functions of this file.
"""

import contextlib
import itertools
import resource
import statistics
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from zfnet.config.errors import UserError
from zfnet.config.schema import Config, Job
from zfnet.data import Batch, ImageSet, load_splits
from zfnet.model.layers import set_dropout_step
from zfnet.plots.figures import BLUE, INK, LIGHT_BLUE, ORANGE, PALE, PURPLE, Figure, new_figure, save_figure, styled
from zfnet.runs.directory import RunDirectory
from zfnet.runs.provenance import describe_environment
from zfnet.runs.session import own_directory
from zfnet.runs.tables import format_table
from zfnet.training.build import build_state, training_batches
from zfnet.training.callbacks import weight_callbacks
from zfnet.training.device import Runtime, keep_memory, resolve_runtime, set_switches, synchronize, time_call
from zfnet.training.loop import train_step

PHASES = {"data": ORANGE, "forward": BLUE, "backward": LIGHT_BLUE, "optimizer": PURPLE}
Result = dict[str, Any]  # the content of benchmark.json


@dataclass(kw_only=True)
class BenchmarkJob(Job):
    """Time `rounds` turns, each of `steps` timed steps after `warmup` untimed steps."""

    subject: Literal["step", "choices"]
    rounds: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1)]
    warmup: Annotated[int, Field(ge=0)]

    def main(self, config: Config, output: Path) -> None:
        """Time the steps, print a table, and write benchmark.json and a figure."""
        runtime = resolve_runtime(config.trainer, own_network=isinstance(config.model, dict))
        images = load_splits(config.data, config.imports).train
        steps = TrainingSteps("as chosen", config, runtime, images)
        others = alternatives(config, runtime, images) if self.subject == "choices" else ()
        with own_directory(config, output):
            result = measure(steps, others, self.rounds, self.steps, self.warmup)
            print_result(result)
            write_result(result, config, runtime, output)


class Contender(Protocol):
    """A training loop that can run for a number of steps, including data loading."""

    name: str
    batch_size: int

    def time_turn(self, steps: int, warmup: int) -> float:
        """Train for `warmup` and then `steps` steps; return the seconds of the latter, including work on the device."""


class TrainingSteps:
    """The steps of job=train with a given `runtime`, including its batches and its readings of the metrics.

    data_wait: seconds that the host waited for the batches of `steps_taken` steps

    Raises UserError if the images do not fill a batch.
    """

    def __init__(self, name: str, config: Config, runtime: Runtime, images: ImageSet) -> None:
        self.name, self.config, self.runtime, self.batch_size = name, config, runtime, config.data.batch_size
        if len(images) < self.batch_size:
            raise UserError(f"data.batch_size={self.batch_size}: there are only {len(images)} training images")
        self.batches = training_batches(config, runtime, images)
        callbacks = weight_callbacks(config)
        self.state = build_state(config, runtime, len(images.classes), len(self.batches), callbacks=callbacks)
        self.data_wait, self.steps_taken = 0.0, 0

    def time_turn(self, steps: int, warmup: int) -> float:
        loop, before = self._loop(), (self.data_wait, self.steps_taken)
        for _ in range(warmup):
            next(loop)
        self.data_wait, self.steps_taken = before  # do not count a new loop's wait for its first batch
        return time_steps(loop, steps, 0, self.runtime.device)

    def _loop(self) -> Generator[None, None, None]:
        for batch in self._full_batches():
            train_step(self.state, batch)
            if self.state.step % self.config.trainer.log_every == 0:
                self.state.read_metrics()
            yield

    def _full_batches(self) -> Iterator[Batch]:
        """Yield the full batches of epoch after epoch; short last batches are left out, so that all steps are equal."""
        set_switches(self.runtime.deterministic)
        keep_memory(self.runtime.device.type == "cpu")
        self.state.train()
        for epoch in itertools.count():
            batches = self.batches.epoch(epoch)
            for _ in range(len(self.batches.set) // self.batch_size):
                start = time.perf_counter()
                batch = next(batches)
                self.data_wait += time.perf_counter() - start
                self.steps_taken += 1
                yield batch

    def phase_seconds(self, steps: int) -> dict[str, float]:
        """Return the mean seconds of each phase of a step, with a synchronisation after each phase."""
        state, batches, seconds = self.state, self._full_batches(), dict.fromkeys(PHASES, 0.0)

        @contextlib.contextmanager
        def clock(phase: str) -> Iterator[None]:
            synchronize(self.runtime.device)
            start = time.perf_counter()
            yield
            synchronize(self.runtime.device)
            seconds[phase] += (time.perf_counter() - start) / steps

        for _ in range(steps):
            with clock("data"):
                batch = next(batches)
            with clock("forward"), self.runtime.autocast():
                set_dropout_step(state.model, self.config.seed, state.step)
                loss = state.criterion(state.forward(batch.images), batch.labels) / batch.total
            with clock("backward"):
                loss.backward()
            with clock("optimizer"):
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)
                state.call("on_optimizer_step")
        return seconds


def alternatives(config: Config, runtime: Runtime, images: ImageSet) -> Iterator[TrainingSteps]:
    """Yield training steps in which one choice of trainer=auto is replaced by its alternative.

    bf16 is left out if the CPU has only AVX2, because oneDNN has no bf16 kernels for AVX2 and bf16 is far slower.
    """
    precision, nhwc = "fp32" if runtime.precision == "bf16" else "bf16", runtime.channels_last
    runtimes = {
        "trainer=exact": replace(runtime, precision="fp32", compile=False, deterministic=True),
        "exact in bf16": replace(runtime, precision="bf16", compile=False, deterministic=True),
        "NCHW" if nhwc else "NHWC": replace(runtime, channels_last=not nhwc),
        precision: replace(runtime, precision=precision),
        "not compiled" if runtime.compile else "compiled": replace(runtime, compile=not runtime.compile),
    }
    avx2 = runtime.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    slow_bf16 = avx2 and runtime.precision == "fp32"
    if slow_bf16:
        print("bf16 is not timed: this CPU (AVX2) has no fast kernels for it\n")
    for name, other in runtimes.items():
        if other != runtime and not (slow_bf16 and other.precision == "bf16"):
            yield TrainingSteps(name, config, other, images)


def measure(ours: TrainingSteps, others: Iterable[Contender], rounds: int, steps: int, warmup: int) -> Result:
    """Time `ours` and `others` in turns, then the phases of a step of `ours`.

    All contenders take a turn in each round, so that changes of the machine's speed affect all of them.
    `first_is_faster_by` is the median over the rounds of the first contender's speed divided by this contender's.
    """
    runtime = ours.runtime
    print(f"{runtime.describe()}, batches of {ours.batch_size}, data included\n")
    first_steps = [ours.time_turn(1, 0)]
    memory = peak_memory(runtime.device)  # before the others allocate memory
    ours.data_wait, ours.steps_taken = 0.0, 0
    contenders: list[Contender] = [ours, *others]
    first_steps += [other.time_turn(1, 0) for other in contenders[1:]]  # the first step compiles and autotunes
    speeds: list[list[float]] = [[] for _ in contenders]
    for _ in tqdm(range(rounds), unit="round", disable=None, leave=False, dynamic_ncols=True):
        for contender, row in zip(contenders, speeds, strict=True):
            row.append(steps * contender.batch_size / contender.time_turn(steps, warmup))
    rows: list[Result] = [
        {
            "name": contender.name,
            "images_per_second": row,
            "median": statistics.median(row),
            "first_is_faster_by": statistics.median(a / b for a, b in zip(speeds[0], row, strict=True)),
            "first_step_seconds": seconds,
        }
        for contender, row, seconds in zip(contenders, speeds, first_steps, strict=True)
    ]
    speed = rows[0]["median"]
    images = next(ours.batches.epoch(0)).images[:2]  # batch normalisation needs two
    flops, peak = flops_per_image(ours.state.model, images), matmul_peak(runtime)
    return {
        "batch_size": ours.batch_size,
        "runtime": runtime.describe(),
        "steps": steps,
        "contenders": rows,
        "waiting_share": ours.data_wait / ours.steps_taken * speed / ours.batch_size,
        "breakdown_seconds": ours.phase_seconds(max(2, min(steps, 10))),  # after waiting_share: it adds to data_wait
        "training_gflop_per_image": flops / 1e9,
        "tflop_per_second": speed * flops / 1e12,
        "matmul_peak_tflop_per_second": peak / 1e12,
        "share_of_matmul_peak": speed * flops / peak,
        "peak_memory_gib": memory,
    }


def time_steps(loop: Generator[None, None, None], steps: int, warmup: int, device: torch.device) -> float:
    """Return the seconds of `steps` steps of a loop that trains on one batch at each `next()`, and close the loop."""
    for _ in range(warmup):
        next(loop)
    seconds = time_call(lambda: [next(loop) for _ in range(steps)], device)
    loop.close()  # stops the workers of a data loader
    return seconds


def flops_per_image(model: nn.Module, images: Tensor) -> float:
    """Return the floating-point operations of one image's forward and backward pass, counted by PyTorch.

    images: [N, 3, S, S]. The gradient with respect to the images is not computed and not counted.
    """
    with FlopCounterMode(display=False) as counter:
        model(images).sum().backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(images)


def matmul_peak(runtime: Runtime) -> float:
    """Return the FLOP/s of a large matrix product in the runtime's precision, the best of ten trials."""
    dtype = torch.bfloat16 if runtime.precision == "bf16" else torch.float32
    n = 2048 if runtime.device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=runtime.device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(time_call(lambda: a @ b, runtime.device) for _ in range(10))


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated on the GPU or, on a CPU, resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def print_result(result: Result) -> None:
    """Print the contenders, the phases of a step and the use of the hardware, 80 columns wide."""
    rows = [("", "median images/s", "min", "max", "first is faster by", "first step")]
    for row in result["contenders"]:
        speeds = row["images_per_second"]
        numbers = (f"{speed:.1f}" for speed in (row["median"], min(speeds), max(speeds)))
        ratio, seconds = row["first_is_faster_by"], row["first_step_seconds"]
        rows.append((row["name"], *numbers, f"{ratio:.2f}×", f"{seconds:.2f} s"))
    shown = [0, 1, 2, 3, 5] if len(rows) == 2 else range(6)  # no ratio for a single contender
    table = [[row[k] for k in shown] for row in rows]
    print("\n".join(format_table(table, "<>>>>>"[: len(shown)], 80, shrink=[0])))
    phases, total = result["breakdown_seconds"], sum(result["breakdown_seconds"].values())
    print(f"\none step ({result['contenders'][0]['name']}), with a synchronisation after each phase")
    lines = [(f"  {phase}", f"{1000 * s:.2f} ms", f"{s / total:.1%}") for phase, s in phases.items()]
    print("\n".join(format_table(lines, "<>>")))
    print(
        f"\n{result['tflop_per_second']:.3f} TFLOP/s, {result['share_of_matmul_peak']:.0%} of the rate of a large "
        f"matrix product ({result['matmul_peak_tflop_per_second']:.3f});\nwaiting for data "
        f"{result['waiting_share']:.2%} of the time; peak memory {result['peak_memory_gib']:.2f} GiB"
    )


def write_result(result: Result, config: Config, runtime: Runtime, output: Path) -> None:
    """Write benchmark.json and figures/benchmark.png."""
    run = RunDirectory(output)
    save_figure(draw_benchmark(result), run.figures / "benchmark.png")
    environment = describe_environment(runtime.device, config.trainer.name, config.imports)
    run.write_json("benchmark.json", {**result, "config": config.to_dict(), "environment": environment})


@styled()
def draw_benchmark(result: Result) -> Figure:
    """Draw bars of median images per second, with a dot for each turn; below them, the phases of one step."""
    rows, phases = result["contenders"], result["breakdown_seconds"]
    figure = new_figure(figsize=(8, 2.2 + 0.5 * len(rows)))
    upper, lower = figure.subplots(2, 1, height_ratios=[len(rows) + 0.5, 1])
    for y, row in enumerate(rows):
        speeds = row["images_per_second"]
        upper.barh(y, row["median"], color=PALE if y else LIGHT_BLUE, height=0.6)
        upper.plot(speeds, [y] * len(speeds), ".", color=INK, alpha=0.6)
        ratio = f"  ({rows[0]['name']}: {row['first_is_faster_by']:.2f}× as fast)" if y else ""
        upper.text(max(speeds), y, f" median {row['median']:.1f}{ratio}", va="center")
    upper.set_yticks(range(len(rows)), [row["name"] for row in rows])
    upper.set(title="Training, including data loading (bars: medians, dots: rounds)", xlabel="images per second")
    upper.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.45 * max(max(r["images_per_second"]) for r in rows)))
    upper.grid(axis="y", visible=False)
    total, left = sum(phases.values()), 0.0
    for phase, seconds in phases.items():
        share = seconds / total
        lower.barh(0, share, left=left, color=PHASES[phase], label=f"{phase} {share:.1%}")
        left += share
    title = f"One step ({rows[0]['name']}): {1000 * total:.1f} ms for {result['batch_size']} images"
    lower.set(title=title, xlim=(0, 1), xlabel="fraction of the step", yticks=[])
    figure.legend(ncols=len(PHASES), loc="outside lower center")
    return figure
