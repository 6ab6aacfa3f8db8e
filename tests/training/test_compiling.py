"""trainer.compile=auto: a trial does not change the state, the faster way is used, and a run keeps that choice."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.helpers import TINY_EXACT, claim, compose, train_tiny_exact, training_state, weights_and_history
from zfnet.data import Batches, load_splits
from zfnet.jobs import reproduce, train
from zfnet.model.layers import set_dropout_step
from zfnet.training import compiling
from zfnet.training import state as state_module
from zfnet.training.compiling import compile_if_faster, describe
from zfnet.training.state import TrainingState

AUTO = ("trainer.compile=auto", "trainer.compile_seconds=0")  # makes a trial even in a short run


@pytest.fixture
def trials(monkeypatch) -> list[tuple[float, ...]]:
    """Make `auto` run trials on the CPU, with the compiler's front end only; collect the seconds of each trial."""
    measurements = []

    def noted(*measured: float) -> str:
        measurements.append(measured)
        return describe(*measured)

    monkeypatch.setattr(compiling, "WHERE", ("cpu",))
    monkeypatch.setattr(compiling, "STEPS", 2)
    monkeypatch.setattr(compiling, "describe", noted)
    monkeypatch.setattr(state_module.torch, "compile", partial(torch.compile, backend="eager"))
    return measurements


def state_and_batches(*words: str) -> tuple[TrainingState, Batches]:
    config = compose(*TINY_EXACT, *AUTO, *words)
    images = load_splits(config.data).train
    batches = Batches(images, config.data, torch.device("cpu"), augment=config.augment)
    return training_state(config, len(batches)), batches


def test_break_even() -> None:
    words = describe(eager=0.005, compiled=0.004, cost=30.0, steps=2000, steps_per_epoch=100)
    assert "saves time after 300.0 of 20 epochs" in words
    assert max(map(len, words.splitlines())) <= 80
    assert "never saves time; off" in describe(0.004, 0.004, 30.0, 2000, 100)


@pytest.mark.parametrize("words", [("optimizer=sgd", "scheduler=onecycle", "trainer.ema=0.9"), ("model.norm=batch",)])
def test_a_trial_leaves_the_state_unchanged(trials, words: tuple[str, ...]) -> None:
    state, batches = state_and_batches(*words)
    before = state.checkpoint()
    tensors = {name: tensor.clone() for name, tensor in before.tensors.items()}
    compile_if_faster(state, batches)
    after = state.checkpoint()
    assert len(trials) == 1
    assert after.tensors.keys() == tensors.keys()
    assert all(torch.equal(after.tensors[name], tensors[name]) for name in tensors)
    aside = ("seconds", "compiled")
    assert {k: v for k, v in after.metadata.items() if k not in aside} == {
        k: v for k, v in before.metadata.items() if k not in aside
    }


@pytest.mark.parametrize("norm", ["lrn", "batch"])
def test_the_network_is_one_graph(norm: str) -> None:
    """Graph breaks would cost the time that compiling saves."""
    state, batches = state_and_batches(f"model.norm={norm}", "model.dropout=0.5")
    state.model.train()
    set_dropout_step(state.model, 0, 0)
    images = next(batches.in_order()).images
    compiled = torch.compile(state.model, backend="eager", fullgraph=True)
    logits = compiled(images)
    set_dropout_step(state.model, 0, 0)
    assert torch.equal(logits, state.model(images))


@pytest.mark.parametrize("word", ["trainer.compile_seconds=1e9", "trainer.compile_gain=1e-9"])
def test_a_short_run_is_not_tried(trials, word: str) -> None:
    state, batches = state_and_batches("trainer.compile_seconds=1", word)
    assert "too few for it to save time" in compile_if_faster(state, batches)
    assert not trials
    assert not state.compiled


def test_the_faster_way_is_taken(trials, monkeypatch) -> None:
    state, batches = state_and_batches()
    for seconds, faster in (((2.0, 1.0), True), ((1.0, 2.0), False)):
        answers = iter(seconds)
        monkeypatch.setattr(compiling, "_step_seconds", lambda *_, answers=answers: next(answers))
        compile_if_faster(state, batches)
        assert state.compiled is faster
        assert (state.forward is state.model) is not faster


def test_a_compiler_that_fails_is_left_alone(trials, monkeypatch) -> None:
    def compile_nothing(module, **_):
        def call(*_):
            raise RuntimeError("Failed to find C compiler\nand more")

        return call

    monkeypatch.setattr(state_module.torch, "compile", compile_nothing)
    state, batches = state_and_batches()
    before = {name: tensor.clone() for name, tensor in state.checkpoint().tensors.items()}
    assert "off, it fails here (Failed to find C compiler)" in compile_if_faster(state, batches)
    assert state.forward is state.model
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.checkpoint().tensors.items())


@pytest.mark.parametrize("faster", [True, False])
def test_a_run_is_the_same_after_a_trial_and_keeps_to_it(trials, tmp_path: Path, monkeypatch, faster: bool) -> None:
    whole = train_tiny_exact(tmp_path / "plain")
    step_seconds = itertools.cycle([2.0, 1.0] if faster else [1.0, 2.0])
    monkeypatch.setattr(compiling, "_step_seconds", lambda *_: next(step_seconds))
    run = train_tiny_exact(tmp_path / "tried", *AUTO)
    assert len(trials) == 1
    assert run.read_json("environment.json")["compiled"] is faster
    assert "torch.compile: took" in (run.folder / "train.log").read_text()
    if not faster:
        assert weights_and_history(run) == weights_and_history(whole)

    # neither a resume (the checkpoint contains the outcome) nor a reproduction makes another trial
    next(step_seconds)  # another trial would have the opposite outcome
    settled = []
    real = train.resolve_compile
    monkeypatch.setattr(
        train, "resolve_compile", lambda state, *rest: (real(state, *rest), settled.append(state.compiled))[0]
    )
    config = run.read_config()
    (run.folder / "results.json").unlink()
    run.set_status("stopped")
    train.train(config, run)
    config.run = str(run.folder)
    again = type(run)(tmp_path / "again")
    claim(again, config)
    reproduce.reproduce(config, again)
    assert settled == [faster, faster]
    assert len(trials) == 1
    assert again.read_json("reproduction.json")["identical"]
