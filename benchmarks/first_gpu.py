"""Measure this program on a machine with a GPU: one command runs all stages and writes small JSON files.

    python benchmarks/first_gpu.py results/                      # at most half an hour; needs no network or data set
    python benchmarks/first_gpu.py results/ --cifar10 cifar10/   # also trains on CIFAR-10: at most 7 minutes more
    python benchmarks/first_gpu.py results/ --stages tests kernels
    python benchmarks/first_gpu.py rehearsal/ --rehearse         # tests the script on the CPU, at tiny sizes

Each stage runs in its own process with a time limit and writes `<stage>.json` while it runs, so a crash or a lost
machine costs only one stage. The most important stages come first: the tests; the time of each part of a step; the
speedup of each choice of trainer=auto; other candidates; the time of an epoch; exactness; the time of the atlas;
the accuracy of recipes that take hours on a CPU.
`summary.json` describes the machine and, for each target, the prediction without a GPU, the measurement and a verdict.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zfnet import compose
from zfnet.config.randomness import make_key, random_bits
from zfnet.config.schema import Config
from zfnet.data import Batches, load_splits
from zfnet.data.batches import draw, resize
from zfnet.explain import Deconvnet
from zfnet.explain.crops import view_maps
from zfnet.explain.top_activations import TopActivations, collect
from zfnet.jobs.benchmark import Contender, TrainingSteps, alternatives, measure
from zfnet.jobs.train import train
from zfnet.model.layers import Dropout, LocalResponseNorm
from zfnet.runs.directory import RunDirectory, write_atomically
from zfnet.runs.hydra_record import register_resolvers
from zfnet.runs.provenance import describe_environment
from zfnet.training import loop
from zfnet.training.build import initial_model
from zfnet.training.device import resolve_runtime, time_call
from zfnet.training.state import TrainingState

ROOT = Path(__file__).resolve().parent.parent
SHAPES = ("data=shapes", "data.store_size=32", "data.test_images=10")
NETWORKS = {
    "blog": (),
    "zfnet_bn": ("experiment=cifar10_best", "data.image_size=224"),
    "zfnet_paper": ("model=zfnet_paper",),
    "small": ("model=small", "data.image_size=64"),
}
TINY = (
    *("trainer.device=cpu", "trainer.precision=bf16", "model=small", "data.image_size=64", "trainer.epochs=1"),
    *("data.train_images=60", "data.test_images=10", "data.batch_size=8", "model.conv3=null", "model.conv4=null"),
    *("model.conv5.channels=16", "model.fc6.features=16", "model.fc7=null"),
)


@dataclass(frozen=True)
class Setting:
    """The folder for the results, whether this is a rehearsal at tiny sizes, and a folder of CIFAR-10's images."""

    output: Path
    rehearse: bool
    cifar10: Path | None = None

    def config(self, *words: str, data: Sequence[str] = SHAPES) -> Config:
        """Return the config of these words on built-in images, at a tiny size in a rehearsal."""
        return compose([*data, "logger=none", *words, *(TINY if self.rehearse else ())])

    def cifar10_words(self, train_images: int = 50_000) -> tuple[str, ...]:
        """Return the data of an epoch of CIFAR-10's size: its own images, or built-in ones, which take long to draw.

        train_images: number of built-in images to train on
        """
        if self.cifar10 is None or self.rehearse:
            return (*SHAPES[:2], f"data.train_images={train_images}", "data.test_images=10000")
        return "data=folder", f"data.root={self.cifar10}", "data.store_size=32"

    def size(self, real: int, tiny: int) -> int:
        return tiny if self.rehearse else real

    def write(self, stage: str, result: dict[str, Any]) -> None:
        write_atomically(self.output / f"{stage}.json", json.dumps(result, indent=1, default=str) + "\n")

    def read(self, stage: str) -> dict[str, Any]:
        path = self.output / f"{stage}.json"
        results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return results


# -- the stages: each yields its results so far, several times


def run_tests(setting: Setting) -> Iterator[dict[str, Any]]:
    """Run the tests in tests/gpu. A rehearsal only collects them."""
    report = setting.output / "tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-n", "0", "-p", "no:cacheprovider", f"--junitxml={report}"]
    seconds = time.perf_counter()
    code = subprocess.run(command + ["--collect-only"] * setting.rehearse, cwd=ROOT, capture_output=True).returncode
    yield {"exit_code": code, "seconds": time.perf_counter() - seconds, **read_report(report)}
    report.unlink(missing_ok=True)


def read_report(path: Path) -> dict[str, Any]:
    """Return the counts of a JUnit file, and its failures with the start of each message."""
    if not path.is_file():
        return {"tests": 0, "failed": {"pytest": "wrote no report"}, "skipped": 0}
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (problem.get("message") or "")[:500]
        for case in cases
        for problem in case
        if problem.tag in ("failure", "error")
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"tests": len(cases), "failed": failed, "skipped": skipped}


def kernels(setting: Setting) -> Iterator[dict[str, Any]]:
    """Profile each network, eager and compiled: kernels and microseconds per step, lines that make the host wait."""
    images = load_splits(setting.config("data.train_images=2600").data).train
    result: dict[str, Any] = {}
    for name, words in list(NETWORKS.items())[: setting.size(len(NETWORKS), 1)]:
        for compiled in (False, True)[: setting.size(2, 1)]:
            config = setting.config(*words, "trainer.log_every=1000000")
            runtime = replace(resolve_runtime(config.trainer), compile=compiled)
            steps = TrainingSteps(name, config, runtime, images)
            count = setting.size(10, 2)
            first, cuda = steps.time_turn(1, 0), runtime.device.type == "cuda"
            milliseconds = 1000 * steps.time_turn(count, setting.size(5, 1)) / count
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if cuda:
                    torch.cuda.set_sync_debug_mode("warn")
                steps.time_turn(count, 0)
                if cuda:
                    torch.cuda.set_sync_debug_mode("default")
            waits = sorted({f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)})
            with torch.profiler.profile() as profile:
                steps.time_turn(count, 0)
            time_of = "self_device_time_total" if cuda else "self_cpu_time_total"
            rows = [
                {"kernel": row.key[:90], "calls": row.count / count, "us": getattr(row, time_of) / count}
                for row in profile.key_averages()
                if not (cuda and str(row.device_type).endswith("CPU"))
            ]
            rows.sort(key=lambda row: -row["us"])
            result[f"{name}, {'compiled' if compiled else 'eager'}"] = {
                "runtime": runtime.describe(),
                "first_step_seconds": first,
                "step_ms": milliseconds,
                "waits": waits,
                "kernels_per_step": sum(row["calls"] for row in rows),
                "us_per_step": sum(row["us"] for row in rows),
                "kernels": rows[:25],
            }
            yield result


def choices(setting: Setting) -> Iterator[dict[str, Any]]:
    """Compare each choice of trainer=auto with its alternative and other loops. Time the compiler, cold and warm."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        config = setting.config("data.train_images=6000")
        runtime, images = resolve_runtime(config.trainer), load_splits(config.data).train
        steps = partial(TrainingSteps, config=config, runtime=runtime, images=images)
        others: list[Contender] = [
            other for other in alternatives(config, runtime, images) if not (setting.rehearse and other.runtime.compile)
        ]
        sizes = (setting.size(3, 1), setting.size(20, 1), setting.size(3, 0))
        result = measure(steps("as chosen"), others, *sizes)
        by_name = {row["name"]: row for row in result["contenders"]}
        if (compiled := by_name.get("compiled")) is not None:
            torch.compiler.reset()
            warm = TrainingSteps("warm", config, replace(runtime, compile=True), images).time_turn(1, 0)
            result["compile"] = {
                "cold_seconds": compiled["first_step_seconds"],
                "warm_seconds": warm,
                "gain": 1 - by_name["as chosen"]["median"] / compiled["median"],
                "use": "as trainer.compile_seconds and trainer.compile_gain",
            }
        yield result
    if not setting.rehearse:
        from training import other_loops  # benchmarks/training.py, which needs more packages

        torch.compiler.reset()
        loops = other_loops(config, runtime, images, os.cpu_count() or 1)
        yield result | {"beside_other_loops": measure(steps("zfnet"), loops, *sizes)["contenders"]}


def candidates(setting: Setting) -> Iterator[dict[str, Any]]:
    """Time small parts of a step and their possible replacements, in microseconds: the median of 5 turns."""
    device = resolve_runtime(setting.config().trainer).device
    batch, side = setting.size(256, 2), setting.size(224, 32)
    result: dict[str, Any] = {}
    for name, call in pieces(setting, device, batch, side):
        repeats = setting.size(20, 1)

        def turn(call: Callable[[], object] = call, repeats: int = repeats) -> None:
            for _ in range(repeats):
                call()

        try:
            turn()
            result[name] = 1e6 / repeats * statistics.median(time_call(turn, device) for _ in range(setting.size(5, 1)))
        except RuntimeError as error:
            result[name] = str(error).splitlines()[0]
    yield result


def pieces(setting: Setting, device: torch.device, batch: int, side: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield (name, function to time)."""

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def forward_and_backward(module: nn.Module, x: Tensor) -> Callable[[], object]:
        leaf = x.detach().requires_grad_()
        return lambda: module(leaf).sum().backward()

    for channels in (3, 4, 8):
        conv = nn.Conv2d(channels, 96, 7, 2, 1).to(device, torch.bfloat16).to(memory_format=torch.channels_last)
        x = randn(batch, channels, side, side, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        yield f"conv1 of {channels} channels", forward_and_backward(conv, x)
    pixels = randn(batch, 3, 32, 32)
    nhwc = pixels.contiguous(memory_format=torch.channels_last)
    yield "resize, NCHW", lambda: resize(pixels, side + 1)
    yield "resize, NHWC", lambda: resize(nhwc, side + 1)
    yield "resize, NHWC, bf16", lambda: resize(nhwc.bfloat16(), side + 1)
    features, keyed = randn(batch, setting.size(4096, 16), dtype=torch.bfloat16), Dropout(0.5).train().to(device)
    keyed.set_key(1, 0)
    yield "dropout, ours", lambda: keyed(features)
    yield "dropout, PyTorch's", lambda: F.dropout(features)
    index = torch.arange(features.numel(), device=device)
    yield "random bits", lambda: random_bits(make_key(1), index)
    config = setting.config("augment=crop_flip_cutout")
    for name, count in (("of a batch", batch), ("of an epoch", setting.size(50_000, 10))):
        part = torch.arange(count, device=device)
        yield f"augmentation's numbers {name}", partial(draw, part, 32, config.augment, config.data, 0, 0)
    maps = randn(batch, setting.size(96, 8), side // 2, side // 2, dtype=torch.bfloat16)
    maps = maps.contiguous(memory_format=torch.channels_last)
    yield "ReLU, then pooling", forward_and_backward(nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1)), maps)
    yield "pooling, then ReLU", forward_and_backward(nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.ReLU()), maps)
    maps = randn(batch, setting.size(96, 8), side // 4, side // 4, dtype=torch.bfloat16)
    for name, norm in (("ours", LocalResponseNorm()), ("PyTorch's", nn.LocalResponseNorm(5))):
        yield f"LRN, {name}", forward_and_backward(norm, maps)
    for fused in (True, False):
        layer = nn.Linear(setting.size(8192, 8), setting.size(8192, 8), device=device)
        layer.weight.grad = torch.ones_like(layer.weight)
        yield (
            f"AdamW, {'fused' if fused else 'foreach'}",
            torch.optim.AdamW(layer.parameters(), fused=fused, foreach=not fused).step,
        )
    host = torch.zeros(batch, side, side, 3, dtype=torch.uint8)
    yield "a batch to the device", lambda: host.to(device)
    if device.type == "cuda":
        pinned = host.pin_memory()
        yield "a batch to the device, pinned", lambda: pinned.to(device, non_blocking=True)


def epochs(setting: Setting) -> Iterator[dict[str, Any]]:
    """Train epochs of CIFAR-10's size. Return their recorded and measured seconds, and the seconds of evaluations."""
    result: dict[str, Any] = {}
    measured: list[float] = []
    plain = loop.train_epoch

    def train_epoch(state: TrainingState, train: Batches) -> None:
        measured.append(time_call(lambda: plain(state, train), state.runtime.device))

    words, data = ("experiment=blog", "trainer.epochs=3", "trainer.checkpoint_minutes=1e9"), setting.cifar10_words()
    for compiled in (False, True)[: setting.size(2, 1)]:
        config = setting.config(*words, f"trainer.compile={str(compiled).lower()}", data=data)
        measured.clear()
        loop.train_epoch = train_epoch
        try:
            run, seconds = train_in_scratch(config)
        finally:
            loop.train_epoch = plain
        result["compiled" if compiled else "eager"] = {
            "recorded_seconds": [row["seconds"] for row in run["history"]],
            "measured_seconds": list(measured),
            "images_per_second": [row["images_per_second"] for row in run["history"]],
            "whole_run_seconds": seconds,
        }
        yield result
    config = setting.config(data=setting.cifar10_words(train_images=20))
    runtime, test = resolve_runtime(config.trainer), load_splits(config.data).test
    assert test is not None
    model = initial_model(config, 10)[0].to(runtime.device).to(memory_format=runtime.memory_format)
    batches = Batches(test, config.data, runtime.device, channels_last=runtime.channels_last)
    evaluation = [time_call(lambda: loop.evaluate(model, batches, runtime, "test"), runtime.device) for _ in range(4)]
    yield result | {"evaluation_seconds": evaluation, "evaluated_images": len(test)}


def train_in_scratch(config: Config) -> tuple[dict[str, Any], float]:
    """Train in a temporary directory. Return ({history, sha256 of the weights}, seconds)."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(Path(folder) / "run")
        start = time.perf_counter()
        train(config, run)
        seconds = time.perf_counter() - start
        return {"history": run.read_history(), "sha256": run.read_json("results.json")["weights_sha256"]}, seconds


def exactness(setting: Setting) -> Iterator[dict[str, Any]]:
    """Check that trainer=exact is bit-identical in fp32 and in bf16: run twice, and with images copied per batch."""
    words = ("data.train_images=800", "data.test_images=100", "data.batch_size=64", "trainer.epochs=1", "trainer=exact")
    result: dict[str, Any] = {}
    for precision in ("fp32", "bf16"):
        hashes = {}
        for name, memory in (("once", 0.5), ("twice", 0.5), ("images copied", 0.0)):
            config = setting.config(*words, "augment=crop_flip", "model.dropout=0.5", f"data.device_memory={memory}")
            config.trainer.precision = precision
            hashes[name] = train_in_scratch(config)[0]["sha256"]
        result[precision] = {"equal": len(set(hashes.values())) == 1, "sha256": hashes}
        yield result
    losses = {}
    for device in dict.fromkeys(("cpu", str(resolve_runtime(setting.config().trainer).device))):
        config = setting.config("trainer=exact", "data.train_images=360", "data.batch_size=16", "trainer.epochs=1")
        config.trainer.device, config.trainer.precision = device, "fp32"
        losses[device] = train_in_scratch(config)[0]["history"][0]["train_loss"]
    yield result | {"loss_of_20_steps": losses}


def atlas(setting: Setting) -> Iterator[dict[str, Any]]:
    """Time the search and the projections of all maps, nine each. Compare the results of two searches."""
    config = setting.config("data.train_images=6000")
    runtime, images = resolve_runtime(config.trainer), load_splits(config.data).train
    model = initial_model(config, len(images.classes))[0].to(runtime.device).eval()
    deconvnet = Deconvnet(model, image_size=config.data.image_size)
    chain, searches = deconvnet.chain, []

    def search() -> None:
        batches = partial(Batches, data=config.data, device=runtime.device)
        searches.append(collect(chain, images, batches, chain.conv_layers, TopActivations(9, len(images.classes))))

    seconds = [time_call(search, runtime.device) for _ in range(2)]
    result: dict[str, Any] = {"images": len(images), "search_seconds": seconds}
    first, second = (s.state()[0] for s in searches)
    result["searches_equal"] = all(torch.equal(first[name], second[name]) for name in first)
    result["maps"], result["projection_seconds"] = 0, {}
    for layer in chain.conv_layers:
        record = searches[0].layers[layer]
        maps = record.filled.any(1).nonzero().flatten().cpu()[: setting.size(10_000, 2)]
        if len(maps):
            project = partial(view_maps, deconvnet, images, config.data, layer, record, maps)
            result["projection_seconds"][layer] = time_call(project, runtime.device)
            result["maps"] += len(maps)
        yield result


def accuracy(setting: Setting) -> Iterator[dict[str, Any]]:
    """Train each of RECIPES with seeds 0, 1, 2 on CIFAR-10; return its metrics, without and with views."""
    if setting.cifar10 is None and not setting.rehearse:
        yield {"note": "needs --cifar10 FOLDER"}
        return
    runs: list[dict[str, Any]] = []
    for name, seed in RUNS[: setting.size(len(RUNS), 2)]:
        words = (*RECIPES[name], f"seed={seed}")
        with tempfile.TemporaryDirectory() as folder:
            run = RunDirectory(Path(folder) / "run")
            train(setting.config(*words, data=setting.cifar10_words()), run)
            results, views = run.read_json("results.json"), {}
            for split in ("validation", "test"):
                if results[split] is not None:
                    output = Path(folder) / split
                    job = compose(["job=evaluate", f"run={run.folder}", f"job.split={split}", "job.tta=flip_shift"])
                    job.job.main(job, output)
                    views[split] = RunDirectory(output).read_json("results.json")[split]["accuracy"]
            runs.append({"recipe": name, "words": words, **results, "flip_shift": views, "history": run.read_history()})
        yield {"runs": runs}


# recipe: its overrides
RECIPES = {
    "cifar10_no_bn": ("experiment=cifar10_no_bn", "trainer.epochs=20"),
    "blog": ("experiment=blog",),
    "cifar10_best": ("experiment=cifar10_best", "data.image_size=224", "trainer.epochs=40"),
}
RUNS = [(name, seed) for names in (("cifar10_no_bn", "blog"), ("cifar10_best",)) for seed in range(3) for name in names]

# name: (function, time limit in seconds)
STAGES: dict[str, tuple[Callable[[Setting], Iterator[dict[str, Any]]], int]] = {
    "tests": (run_tests, 400),
    "kernels": (kernels, 300),
    "choices": (choices, 400),
    "candidates": (candidates, 120),
    "epochs": (epochs, 240),
    "exactness": (exactness, 170),
    "atlas": (atlas, 170),
    "accuracy": (accuracy, 420),
}


def run_stage(setting: Setting, name: str) -> None:
    """Run one stage in this process. If it fails, keep its results so far."""
    result: dict[str, Any] = {}
    try:
        for result in STAGES[name][0](setting):
            setting.write(name, {**result, "state": "unfinished"})
        setting.write(name, {**result, "state": "done"})
    except Exception as error:
        setting.write(name, {**result, "state": f"failed: {type(error).__name__}: {error}"})


def start_stage(setting: Setting, name: str, limit: float) -> None:
    """Run one stage as a subprocess. After `limit` seconds, kill its process group and record this in its file."""
    command = [sys.executable, str(Path(__file__)), str(setting.output), "--stage", name]
    command += ["--cifar10", str(setting.cifar10)] if setting.cifar10 else []
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
        problem = f"ended with code {code}" if code else None
    except subprocess.TimeoutExpired:
        problem = f"ended after {limit:g} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if problem is not None:
        setting.write(name, {**setting.read(name), "state": problem})


# -- the summary


def verdicts(setting: Setting) -> list[dict[str, Any]]:
    """Return each target with the prediction made without a GPU, the measurement, and met, missed or open."""
    results = {name: setting.read(name) for name in STAGES}
    ours, others = (results["choices"].get(key, []) for key in ("contenders", "beside_other_loops"))
    rows = {row["name"]: row for row in [*ours, *others]}
    times = {name: results["epochs"][name] for name in ("eager", "compiled") if name in results["epochs"]}
    last = {name: row["measured_seconds"][-1] for name, row in times.items()}
    off = [
        abs(recorded / measured - 1)
        for row in times.values()
        for recorded, measured in zip(row["recorded_seconds"], row["measured_seconds"], strict=True)
    ]
    step = [row for name, row in results["kernels"].items() if isinstance(row, dict)]
    searched, projected = results["atlas"].get("search_seconds"), results["atlas"].get("projection_seconds")
    tests = results["tests"]
    failed = len(tests["failed"]) if tests.get("tests", 0) > tests.get("skipped", 0) else None
    no_bn = [
        row["flip_shift"]["test"] for row in results["accuracy"].get("runs", []) if row["recipe"] == "cifar10_no_bn"
    ]
    bits = [row["equal"] for row in results["exactness"].values() if isinstance(row, dict) and "equal" in row]

    losses = list(results["exactness"].get("loss_of_20_steps", {}).values())

    def faster(name: str) -> float | None:
        return rows[name]["first_is_faster_by"] if name in rows else None

    return [
        judge("all tests of tests/gpu pass", "65 %", failed, lambda n: n == 0),
        judge("no step waits for the GPU", "none", sorted({w for row in step for w in row["waits"]}) if step else None,
              lambda waits: not waits),
        judge("an epoch of CIFAR-10 ≤ 1.0 s (s)", "H100 1.75 to 1.95, compiled 1.3 to 1.45",
              min(last.values()) if last else None, lambda s: s <= 1.0),
        judge("recorded seconds within 3 % of the measured (off by)", "0", max(off, default=None), lambda x: x <= 0.03),
        judge("trainer=exact ≤ 1.6× slower than auto (×)", "4.5 to 5.5", faster("trainer=exact"), lambda x: x <= 1.6),
        judge("… with trainer.precision=bf16 (×)", "1.05 to 1.3", faster("exact in bf16"), lambda x: x <= 1.6),
        judge("equal bits where they are promised", "yes", all(bits) if bits else None, lambda equal: equal),
        judge("20 steps: the CPU's loss (relative difference)", "", abs(losses[-1] / losses[0] - 1) if losses else None,
              lambda x: x <= 1e-3),
        *(judge(f"≥ 3× {name} (×)", "", faster(name), lambda x: x >= 3) for name in ("timm", "Lightning")),
        judge("waiting for data < 2 %", "< 1 %", results["choices"].get("waiting_share"), lambda x: x < 0.02),
        judge("10,000 images evaluated in ≤ 0.15 s, warm (s)", "0.145",
              min(results["epochs"].get("evaluation_seconds", []), default=None), lambda s: s <= 0.15),
        judge("all maps × top 9 in ≤ 60 s, search of 6,000 images included (s)", "",
              min(searched) + sum(projected.values()) if searched and projected else None, lambda s: s <= 60),
        judge("test accuracy without batch normalisation, 20 epochs, views, ≥ 88 %", "10 epochs on a CPU: 85.7 %",
              statistics.mean(no_bn) if no_bn else None, lambda x: x >= 0.88),
    ]  # fmt: skip


def judge(target: str, predicted: str, measured: Any, met: Callable[[Any], bool]) -> dict[str, Any]:
    """Return one row of the summary; without a measurement the target stays open."""
    verdict = "open" if measured is None else "met" if met(measured) else "missed"
    return {"target": target, "predicted": predicted, "measured": measured, "verdict": verdict}


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the JSON files")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="run only these stages")
    parser.add_argument("--cifar10", type=Path, metavar="FOLDER", help="train epochs on its images: train/, test/")
    parser.add_argument("--rehearse", action="store_true", help="test the script on the CPU, at tiny sizes")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    setting = Setting(options.output.resolve(), options.rehearse, options.cifar10 and options.cifar10.resolve())
    register_resolvers()
    if options.stage:
        run_stage(setting, options.stage)
        return
    if not (options.rehearse or torch.cuda.is_available()):
        sys.exit("error: PyTorch sees no GPU; --rehearse tests the script on the CPU")
    setting.output.mkdir(parents=True, exist_ok=True)
    for name in options.stages:
        print(f"{name} …", flush=True)
        if options.rehearse:
            run_stage(setting, name)
        else:
            start_stage(setting, name, STAGES[name][1])
        print(f"{name}: {setting.read(name)['state']}", flush=True)
    device = torch.device("cpu" if options.rehearse else "cuda")
    targets = verdicts(setting)
    setting.write(
        "summary",
        {"rehearsal": options.rehearse, "targets": targets, "environment": describe_environment(device, "auto", [])},
    )
    for row in targets:
        print(f"{row['verdict']:<7}{row['target']}: {row['measured']}")
    print(f"written to {setting.output}")


if __name__ == "__main__":
    main()
