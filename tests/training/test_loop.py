"""The loop: it lowers the loss, each setting has its effect, and a diverged run stops with advice."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import STEPS, TINY_EXACT, compose, random_images, train_tiny_exact, training_state
from zfnet.config.errors import UserError
from zfnet.data import Batch, Batches
from zfnet.data.images import image_set
from zfnet.runs.directory import HISTORY_COLUMNS, RunDirectory
from zfnet.training import loop
from zfnet.training.callbacks import BestWeights
from zfnet.training.checkpoint import BEST_FILE
from zfnet.training.loop import evaluate, train_step
from zfnet.training.schedule import Schedule
from zfnet.training.state import TrainingState

CPU = torch.device("cpu")
GOLDEN = Path(__file__).with_name("golden.json")
# a network that is large enough to memorise the 72 images of TINY_EXACT
LARGER_MODEL = (
    "model.conv1.channels=16",
    "model.conv2.channels=24",
    "model.conv5.channels=48",
    "model.fc6.features=64",
    "optimizer.lr=4e-3",
    "data.batch_size=18",
)
OPTIMIZERS = ("sgd", "adamw", "adam", "rmsprop", "adagrad", "nadam")
SCHEDULERS = ("constant", "step", "multistep", "cosine", "onecycle", "plateau")


def make_state(*words: str) -> TrainingState:
    config = compose(*TINY_EXACT, "optimizer=sgd", "scheduler=constant", "data.batch_size=12", *words)
    return training_state(config)


def batch(count: int = 12, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 64, 64, generator=generator).contiguous(memory_format=torch.channels_last)
    return Batch(images, torch.arange(count) % 10, torch.arange(count), first=0, total=count)


def weights(state: TrainingState) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in state.model.parameters()])


def state_after_steps(*words: str, steps: int = 1) -> TrainingState:
    state = make_state(*words)
    state.model.train()
    for k in range(steps):
        train_step(state, batch(seed=k))
    return state


# -- learning


def test_training_lowers_the_loss_and_raises_the_accuracy(tmp_path: Path) -> None:
    """Train from chance level to almost all training images correct."""
    history = train_tiny_exact(tmp_path / "run", *LARGER_MODEL, "trainer.epochs=20").read_history()
    losses = [row["train_loss"] for row in history]
    assert losses[0] > 2.2  # ln 10 = 2.30 is the loss at chance level
    assert losses[-1] < 0.5
    assert history[-1]["train_accuracy"] > 0.9


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name: str) -> None:
    """Train repeatedly on one batch, with warm-up, at a learning rate for a small network."""
    rate = {"sgd": 0.05, "rmsprop": 0.002, "adagrad": 0.02}.get(name, 0.005)
    words = (f"optimizer={name}", f"optimizer.lr={rate}", "scheduler=cosine", "scheduler.warmup_epochs=0.5")
    state = make_state(*words, "trainer.epochs=5")
    state.model.train()
    losses = []
    for _ in range(30):
        train_step(state, batch())
        losses.append(state.read_metrics()[0])
        state.metrics.reset()
    assert losses[-1] < losses[0] - 0.15


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_trains(name: str, tmp_path: Path) -> None:
    run = train_tiny_exact(tmp_path / "run", f"scheduler={name}", "scheduler.warmup_epochs=0.5", "data.subset=18")
    history = run.read_history()
    assert [row["epoch"] for row in history] == [1, 2]
    assert all(math.isfinite(row["train_loss"]) and row["lr"] > 0 for row in history)


def test_golden_losses(tmp_path: Path) -> None:
    """Compare with recorded losses, with a tolerance because processors round differently.

    To record an intended change of results, delete golden.json and run this test twice.
    """
    words = (*LARGER_MODEL, "augment=crop_flip", "model.dropout=0.1", "trainer.epochs=6")
    history = train_tiny_exact(tmp_path / "run", *words).read_history()
    figures = {k: [row[k] for row in history] for k in ("step", "lr", "train_loss", "validation_loss")}
    if not GOLDEN.exists():
        GOLDEN.write_text(json.dumps(figures, indent=2) + "\n")
        pytest.fail(f"{GOLDEN} was missing and has been written: check it, then commit it")
    for key, expected in json.loads(GOLDEN.read_text()).items():
        assert figures[key] == pytest.approx(expected, rel=1e-3), key


# -- one step


def test_a_step_is_gradient_descent() -> None:
    """Compare with the update computed by hand, without the loop."""
    state = make_state("optimizer.lr=0.1", "optimizer.momentum=0", "optimizer.weight_decay=0")
    twin = make_state().model.train()
    data = batch()
    train_step(state, data)
    F.cross_entropy(twin(data.images), data.labels).backward()
    for a, b in zip(state.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b - 0.1 * b.grad)
    assert state.step == 1
    assert all(p.grad is None for p in state.model.parameters())


@pytest.mark.parametrize("parts", [2, 3, 12])
@pytest.mark.parametrize("count", [12, 7])
def test_accumulation_is_the_whole_batch(parts: int, count: int) -> None:
    """Also for a smaller last batch, and with dropout, because masks do not depend on the division."""
    words = ("model.dropout=0.4", "optimizer.lr=0.1", "loss.label_smoothing=0.1")
    whole, divided = make_state(*words), make_state(*words, f"trainer.accumulate={parts}")
    for state in (whole, divided):
        state.model.train()
        for k in range(3):
            train_step(state, batch(count, seed=k))
    torch.testing.assert_close(weights(whole), weights(divided), rtol=1e-4, atol=1e-6)
    assert whole.metrics.read()[0] == pytest.approx(divided.metrics.read()[0], rel=1e-5)


def test_clipping_bounds_the_step() -> None:
    words = ("optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.lr=1")
    start = weights(make_state())
    free = weights(state_after_steps(*words)) - start
    clipped = weights(state_after_steps(*words, "trainer.clip_norm=0.01")) - start
    assert free.norm() > 0.02
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert F.cosine_similarity(free, clipped, dim=0).item() == pytest.approx(1, abs=1e-5)


def test_label_smoothing() -> None:
    state, twin = state_after_steps("loss.label_smoothing=0.2"), make_state().model.train()
    logits = twin(batch().images).log_softmax(1)
    labels = batch().labels
    expected = -0.8 * logits[torch.arange(12), labels].mean() - 0.2 * logits.mean()
    assert state.metrics.read()[0] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("version", "decays"), [(1, [0.3, 0.3, 0.3, 0.3]), (2, [2 / 11, 3 / 12, 0.3, 0.3])])
def test_the_moving_average_is_its_closed_form(version: int, decays: list[float]) -> None:
    """The decay grows, so that a short run soon forgets its first weights; in version 1 it is constant."""
    state = make_state("trainer.ema=0.3", "optimizer.lr=0.5", "model.norm=batch", f"trainer.version={version}")
    state.model.train()
    seen: list[torch.Tensor] = []
    for k in range(5):
        train_step(state, batch(seed=k))
        seen.append(weights(state))
    expected = seen[0]  # the first average is the first weights
    for decay, values in zip(decays, seen[1:], strict=True):
        expected = decay * expected + (1 - decay) * values
    averaged = torch.cat([p.detach().flatten() for p in state.eval_model.parameters()])
    torch.testing.assert_close(averaged, expected)
    assert not torch.allclose(averaged, seen[-1])


def test_filters_stay_within_the_rms_limit() -> None:
    state = state_after_steps("model.rms_limit=0.05", "optimizer.lr=1", steps=3)
    for layer in ("conv1", "conv2", "conv5"):
        rms = getattr(state.model, layer).weight.square().mean((1, 2, 3)).sqrt()
        assert rms.max().item() <= 0.05 * (1 + 1e-6)


def test_warm_up_scales_the_first_step() -> None:
    words = ("optimizer.momentum=0", "optimizer.weight_decay=0", "optimizer.lr=0.8")
    start = weights(make_state())
    free = weights(state_after_steps(*words)) - start
    warmed = weights(state_after_steps(*words, "scheduler.warmup_epochs=0.5")) - start  # 4 steps
    torch.testing.assert_close(warmed, free / 4, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("version", [1, 2])
def test_the_recorded_rate_is_that_of_the_epochs_last_step(version: int, tmp_path: Path, monkeypatch) -> None:
    """Version 1 recorded the next step's rate, and reproductions of its runs must do the same."""
    used, real = [], Schedule.set_lr

    def noted(self: Schedule, step: int) -> None:
        real(self, step)
        used.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(Schedule, "set_lr", noted)
    words = ("scheduler=onecycle", "scheduler.warmup_epochs=0.5", f"trainer.version={version}")
    recorded = [row["lr"] for row in train_tiny_exact(tmp_path / "run", *words).read_history()]
    assert (recorded == [used[STEPS - 1], used[2 * STEPS - 1]]) is (version == 2)
    assert (recorded[0] == used[STEPS]) is (version == 1)


def test_an_epochs_seconds_are_those_of_the_device(monkeypatch) -> None:
    """A GPU still works when the host has queued the last step, so the host waits for it once per epoch."""
    waits = []

    def synchronize(device: torch.device) -> None:
        waits.append(state.step)
        time.sleep(0.3)

    monkeypatch.setattr(loop, "synchronize", synchronize)
    state = make_state()
    sets = Batches(
        image_set(random_images(80, 64).numpy(), torch.arange(80) % 10, "abcdefghij"), state.config.data, CPU
    )
    state.steps_per_epoch = len(sets)
    loop.train_epoch(state, sets)
    assert waits == [len(sets)]
    assert state.epoch_seconds >= 0.3


def test_short_batches_choose_no_kernels_anew() -> None:
    """Otherwise cuDNN would benchmark its kernels for each of their shapes."""
    state = make_state("trainer.deterministic=false")
    tuned = []
    state.model.conv1.register_forward_pre_hook(lambda *_: tuned.append(torch.backends.cudnn.benchmark))
    state.model.train()
    for count in (12, 7, 12):
        train_step(state, batch(count))
    assert tuned == [True, False, True]
    tuned.clear()
    images = image_set(random_images(30, 64).numpy(), torch.arange(30) % 10, "abcdefghij")
    evaluate(state.model, Batches(images, state.config.data, CPU), state.runtime, "test")
    assert tuned == [True, True, False]
    exact = make_state()
    exact.runtime.choose_kernels(full=True)
    assert not torch.backends.cudnn.benchmark


def test_backward_is_outside_autocast() -> None:
    state = make_state("trainer.precision=bf16")
    seen = []
    for module in (state.model.conv2, state.model.fc6):
        module.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
        module.weight.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
    train_step(state, batch())
    assert seen == [True, True, False, False]


# -- divergence


@pytest.mark.parametrize(
    "words", [("optimizer=sgd", "optimizer.lr=1e6"), ("optimizer=sgd", "optimizer.lr=1e30", "trainer.log_every=1")]
)
def test_divergence_stops_with_step_rate_and_advice(words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train_tiny_exact(tmp_path / "run", *words, "scheduler=constant")
    text = str(caught.value)
    assert text.startswith("training diverged: the loss at step ")
    assert f"learning rate {float(words[1].split('=')[1]):g}" in text
    assert "lower optimizer.lr, or try scheduler.warmup_epochs=1 or trainer.clip_norm=1" in text
    run = RunDirectory(tmp_path / "run")
    status = run.read_json("status.json")
    assert (status["state"], status["error"]) == ("failed", text)
    assert not run.weights.exists()
    assert not list(run.checkpoints.glob("step-*"))  # no checkpoint of a diverged run


@pytest.mark.parametrize(("validation", "name"), [(8, "validation"), (0, "test")])
def test_divergence_in_the_last_step_is_an_error(validation: int, name: str, tmp_path: Path) -> None:
    words = ("optimizer=sgd", "optimizer.lr=1e30", "scheduler=constant", "data.batch_size=200", "trainer.epochs=1")
    with pytest.raises(UserError, match=rf"^training diverged in its last steps: the loss of the {name} images is NaN"):
        train_tiny_exact(tmp_path / "run", *words, f"data.validation={validation}")
    run = RunDirectory(tmp_path / "run")
    assert run.state == "failed"
    assert not run.weights.exists()


def test_not_a_number_in_the_data_is_found_at_its_step(tmp_path: Path, monkeypatch) -> None:
    real = loop.train_step

    def poisoned(state, data) -> None:
        real(state, replace(data, images=data.images * float("nan")) if state.step == 5 else data)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(UserError, match=r"the loss at step 5 \(epoch 1, learning rate"):
        train_tiny_exact(tmp_path / "run", "trainer.checkpoint_minutes=1e-9")
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-000000005.safetensors"  # before the loss became NaN


# -- the best epoch and evaluation


def end_epoch(state: TrainingState, accuracy: float | None, writer: NameWriter, test: float, loss: float = 1.0) -> None:
    state.step += STEPS
    state.epoch_seconds = 1.0
    measured = {"test_accuracy": test, "test_loss": 1.0}
    if accuracy is not None:
        measured |= {"validation_accuracy": accuracy, "validation_loss": loss}
    BestWeights(writer).on_epoch_end(state, state.end_epoch(measured, 10))


class NameWriter:
    """A checkpoint writer that only records names."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def write(self, name: str, *_: object, **__: object) -> None:
        self.written.append(name)


def test_validation_chooses_and_test_does_not() -> None:
    state, writer = make_state(), NameWriter()
    state.optimizer.step()  # PyTorch warns if a schedule steps before its optimizer
    for accuracy, test in ((0.3, 0.1), (0.5, 0.2), (0.5, 0.9), (0.4, 1.0)):
        end_epoch(state, accuracy, writer, test)
    assert state.best is not None
    assert state.best["epoch"] == 2  # the first of equal ones, independent of the test set
    assert writer.written == [BEST_FILE] * 2
    state = make_state()
    state.optimizer.step()
    end_epoch(state, None, writer, 0.9)
    assert state.best is None


@pytest.mark.parametrize(("version", "best"), [(1, 1), (2, 3)])
def test_of_equal_accuracies_the_lower_loss_is_the_best(version: int, best: int) -> None:
    """In version 1 the first is the best, and runs of version 1 must reproduce."""
    state, writer = make_state(f"trainer.version={version}"), NameWriter()
    state.optimizer.step()
    for loss in (102.9, 2.5, 2.3, 2.4):
        end_epoch(state, 0.25, writer, 0.1, loss)
    assert state.best == {"epoch": best, "validation_accuracy": 0.25, "validation_loss": 102.9 if best == 1 else 2.3}
    end_epoch(state, 0.26, writer, 0.1, 300.0)
    assert state.best["epoch"] == 5


@pytest.mark.parametrize(("monitor", "column"), [("validation_loss", 5), ("train_loss", 3)])
def test_plateau_schedule_gets_the_monitored_metric(monitor: str, column: int, tmp_path: Path, monkeypatch) -> None:
    watched: list[float] = []
    monkeypatch.setattr(Schedule, "epoch", lambda self, value: watched.append(value))
    run = train_tiny_exact(tmp_path / "run", "scheduler=plateau", f"trainer.monitor={monitor}")
    name = HISTORY_COLUMNS[column]
    assert name == monitor
    assert watched == [row[name] for row in run.read_history()]


def test_evaluation_is_exact_over_ragged_batches_and_puts_the_mode_back() -> None:
    state = make_state("model.norm=batch", "model.dropout=0.5")
    images = image_set(random_images(31, 64).numpy(), torch.arange(31) % 10, [str(k) for k in range(10)])
    batches = Batches(images, state.config.data, torch.device("cpu"))
    state.model.train()
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    evaluation = evaluate(state.model, batches, state.runtime, "x")
    assert state.model.training
    assert all(torch.equal(before[k], v) for k, v in state.model.state_dict().items())
    model = state.model.eval()
    with torch.no_grad():
        logits = torch.cat([model(b.images) for b in batches.in_order()])
    assert evaluation.loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    assert evaluation.accuracy == (logits.argmax(1) == images.labels).double().mean().item()
