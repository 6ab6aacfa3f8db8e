"""Training state: the seed alone determines the initial weights, and a checkpoint restores the whole state."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import TINY_EXACT, compose, training_state
from zfnet.config.errors import UserError
from zfnet.training.build import initial_model
from zfnet.training.state import TrainingState


def state(*words: str) -> TrainingState:
    return training_state(compose(*TINY_EXACT, *words))


def test_the_seed_gives_the_weights_and_leaves_the_global_generator_alone() -> None:
    config = compose(*TINY_EXACT)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = initial_model(config, 10)[0].state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    b = initial_model(config, 10)[0].state_dict()
    c = initial_model(compose(*TINY_EXACT, "seed=1"), 10)[0].state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["conv1.weight"], c["conv1.weight"])


def test_what_is_evaluated() -> None:
    plain, averaged = state(), state("trainer.ema=0.9")
    assert plain.eval_model is plain.model
    assert averaged.eval_model is not averaged.model
    assert torch.equal(averaged.eval_model.conv1.weight, averaged.model.conv1.weight)


def test_restore_is_the_inverse_of_checkpoint() -> None:
    words = ("trainer.ema=0.9", "model.norm=batch")
    a, b = state(*words), state(*words, "seed=5")
    a.epoch, a.step, a.history = 3, 29, [{"epoch": n} for n in (1, 2, 3)]
    a.best = {"epoch": 2, "validation_accuracy": 0.5, "validation_loss": 1.0}
    a.metrics.sums += 7
    a.callbacks[0].average.n_averaged.fill_(29)
    a.epoch_seconds, a.should_stop = 1.5, True
    saved = a.checkpoint()
    b.restore(saved)
    again = b.checkpoint()
    assert saved.tensors.keys() == again.tensors.keys()
    assert all(torch.equal(saved.tensors[k], again.tensors[k]) for k in saved.tensors)
    aside = ("seconds", "identity")
    timeless = [{k: v for k, v in c.metadata.items() if k not in aside} for c in (saved, again)]
    assert timeless[0] == timeless[1]
    assert b.should_stop
    assert b.step_in_epoch == 29 - 3 * 8
    assert b.elapsed() >= a.seconds


@pytest.mark.parametrize("name", ["step", "epoch", "best", "history", "optimizer", "callbacks", "schedule"])
def test_a_checkpoint_that_lacks_something_is_one_line(name: str) -> None:
    """A valid checksum does not say which run wrote the checkpoint."""
    saved = state().checkpoint()
    del saved.metadata[name]
    with pytest.raises(UserError, match=r"the checkpoint does not fit this run .*: delete it to use the one before"):
        state().restore(saved)


@pytest.mark.parametrize(
    "content",
    [
        *({"epoch": value} for value in ("x", None, -7, 1)),
        *({"step": value} for value in ("x", None, -7, 10**12)),
        *({"best": value} for value in ("x", 1, [1], {})),
        *({"history": value} for value in ("x", None, [1], [{"epoch": 1}])),
        {"seconds": None},
        {"epoch_seconds": "x"},
    ],
)
def test_a_checkpoint_with_other_values_is_one_line(content: dict[str, object]) -> None:
    saved = state().checkpoint()
    saved.metadata |= content
    with pytest.raises(UserError, match="the checkpoint does not fit this run"):
        state().restore(saved)


@pytest.mark.parametrize("name", ["metrics", "model.conv1.weight", "model.fc8.bias"])
def test_a_checkpoint_with_other_tensors_is_one_line(name: str) -> None:
    for others in ({}, {name: torch.ones(2, 3)}):
        saved = state().checkpoint()
        del saved.tensors[name]
        saved.tensors |= others
        with pytest.raises(UserError, match="the checkpoint does not fit this run") as caught:
            state().restore(saved)
        assert "\n" not in str(caught.value)
