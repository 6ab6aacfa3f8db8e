"""Learning rates compared with closed forms, warm-up, and a state of plain numbers that resumes at any step."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import assert_resumes_exactly, compose_checked
from zfnet.config.errors import UserError
from zfnet.training.build import build_optimizer, build_scheduler
from zfnet.training.schedule import Schedule, steps_by_batch

EPOCHS, STEPS = 10, 7
ALL = ("constant", "step", "multistep", "cosine", "onecycle", "plateau")


def schedule(*words: str, epochs: int = EPOCHS) -> Schedule:
    config = compose_checked("optimizer=sgd", "optimizer.lr=0.5", *words)
    optimizer = build_optimizer(config, torch.nn.Linear(1, 1))
    length = epochs * STEPS if steps_by_batch(config.scheduler) else epochs
    scheduler = build_scheduler(config.scheduler, optimizer, length)
    return Schedule(config.scheduler, scheduler, optimizer, length, STEPS)


def advance(one: Schedule, steps: range, losses: list[float]) -> list[float]:
    """Return the rate that the optimizer used at each step."""
    seen = []
    for step in steps:
        expected = one.lr(step)
        one.set_lr(step)
        seen.append(one.optimizer.param_groups[0]["lr"])
        one.optimizer.step()
        assert expected == pytest.approx(seen[-1], rel=1e-12)
        one.step()
        if (step + 1) % STEPS == 0:
            one.epoch(losses[step // STEPS])
    return seen


def rates(*words: str, losses: list[float] | None = None) -> list[float]:
    one = schedule(*words)
    return advance(one, range(EPOCHS * STEPS), losses or [1.0 / (e + 1) for e in range(EPOCHS)])


def by_epoch(values: list[float]) -> list[float]:
    assert all(len(set(values[e * STEPS : (e + 1) * STEPS])) == 1 for e in range(EPOCHS))
    return values[::STEPS]


def test_constant() -> None:
    assert rates("scheduler=constant") == [0.5] * 70


def test_step() -> None:
    seen = by_epoch(rates("scheduler=step", "scheduler.step_size=3"))
    assert seen == pytest.approx([0.5 * 0.5 ** (e // 3) for e in range(10)])


def test_multistep() -> None:
    seen = by_epoch(rates("scheduler=multistep", "scheduler.milestones=[2,7]", "scheduler.gamma=0.1"))
    assert seen == pytest.approx([0.5] * 2 + [0.05] * 5 + [0.005] * 3)


def test_cosine() -> None:
    seen = rates("scheduler=cosine", "scheduler.eta_min=0.01")
    expected = [0.01 + 0.49 * (1 + math.cos(math.pi * s / 70)) / 2 for s in range(70)]
    assert seen == pytest.approx(expected, rel=1e-9)


CYCLIC = ("_target_=torch.optim.lr_scheduler.CyclicLR", "+base_lr=0.1", "+max_lr=0.5", "+cycle_momentum=false")


@pytest.mark.parametrize("words", [("scheduler=onecycle",), ("scheduler=constant", "~scheduler.factor", *CYCLIC)])
def test_schedules_that_name_rates_keep_the_proportions_of_groups(words: tuple[str, ...]) -> None:
    words = tuple(w.replace("+", "+scheduler.").replace("_target_", "scheduler._target_") for w in words)
    plain = schedule(*words)
    scaled = schedule(*words, "+optimizer.param_groups=[{match: bias, lr_scale: 64}]")
    for step in range(60):
        for one in (plain, scaled):
            one.optimizer.step()
            one.step()
        rate = plain.lr_now(step)
        assert [group["lr"] for group in scaled.optimizer.param_groups] == pytest.approx([64 * rate, rate])


def test_onecycle() -> None:
    seen = rates("scheduler=onecycle", "scheduler.pct_start=0.3")
    assert max(seen) == pytest.approx(0.5)
    assert seen.index(max(seen)) == 20  # 0.3 · 70 − 1
    assert seen[0] == pytest.approx(0.5 / 25)
    assert seen[-1] == pytest.approx(0.5 / 25 / 1e4)


def test_plateau_watches_what_it_is_given() -> None:
    losses = [1.0, 0.9, 0.95, 0.96, 0.97, 0.5, 0.6, 0.6, 0.6, 0.6]
    words = ("scheduler=plateau", "scheduler.factor=0.1", "scheduler.patience=1")
    seen = by_epoch(rates(*words, losses=losses))
    # epochs 3 and 4 bring no improvement: patience=1 allows one; after the second, the rate falls from index 4 on
    assert seen == pytest.approx([0.5] * 4 + [0.05] * 4 + [0.005] * 2)


@pytest.mark.parametrize("name", ALL)
def test_warm_up_multiplies_by_a_line(name: str) -> None:
    """Warm-up covers the first two and a half epochs and does not change the schedule's own rates."""
    plain, warm = rates(f"scheduler={name}"), rates(f"scheduler={name}", "scheduler.warmup_epochs=2.5")
    length = round(2.5 * STEPS)
    assert warm == pytest.approx([r * min(1, (s + 1) / length) for s, r in enumerate(plain)])


@pytest.mark.parametrize("name", ALL)
def test_a_run_of_one_epoch(name: str) -> None:
    one = schedule(f"scheduler={name}", epochs=1)
    assert len(advance(one, range(STEPS), [1.0])) == STEPS


def test_a_schedule_that_ends_before_the_run_is_named() -> None:
    with pytest.raises(UserError, match=r"scheduler.total_steps=69: the schedule ends before the run \(70 steps\)"):
        schedule("scheduler=onecycle", "scheduler.total_steps=69")
    schedule("scheduler=onecycle", "scheduler.total_steps=70")


def test_cycling_momentum() -> None:
    words = ("scheduler=onecycle", "scheduler.cycle_momentum=true")
    one = schedule(*words)
    advance(one, range(20), [1.0] * 10)
    assert one.optimizer.param_groups[0]["momentum"] == pytest.approx(0.85, abs=0.01)


# -- schedules that chain others

LR = torch.optim.lr_scheduler
LINEAR = {"_target_": "torch.optim.lr_scheduler.LinearLR", "start_factor": 0.1, "total_iters": 20}
COSINE = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 50}
DECAY = {"_target_": "torch.optim.lr_scheduler.ExponentialLR", "gamma": 0.97}
CHAINS: dict[str, tuple[dict[str, Any], Callable[[torch.optim.Optimizer], Any]]] = {
    "SequentialLR": (
        {"schedulers": [LINEAR, COSINE], "milestones": [20]},
        lambda o: LR.SequentialLR(o, [LR.LinearLR(o, 0.1, total_iters=20), LR.CosineAnnealingLR(o, 50)], [20]),
    ),
    "ChainedScheduler": (
        {"schedulers": [LINEAR, DECAY]},
        lambda o: LR.ChainedScheduler([LR.LinearLR(o, 0.1, total_iters=20), LR.ExponentialLR(o, 0.97)], o),
    ),
}


def chained(name: str) -> Schedule:
    settings = {"_target_": f"torch.optim.lr_scheduler.{name}", "interval": "step", **CHAINS[name][0]}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = build_scheduler(settings, optimizer, EPOCHS * STEPS)
    return Schedule(settings, scheduler, optimizer, EPOCHS * STEPS, STEPS)


@pytest.mark.parametrize("name", CHAINS)
def test_chained_schedule_is_pytorchs(name: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler, expected = CHAINS[name][1](optimizer), []
    for _ in range(EPOCHS * STEPS):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert len(set(expected)) > 60
    assert advance(chained(name), range(70), [1.0] * 10) == expected


@pytest.mark.parametrize(
    ("name", "stop"), [*itertools.product(ALL, (1, 7, 16, 34, 69)), *itertools.product(CHAINS, (1, 19, 20, 21, 69))]
)
def test_a_schedule_goes_on_from_plain_numbers(name: str, stop: int) -> None:
    words = (f"scheduler={name}", "scheduler.warmup_epochs=1.5")
    whole, first, second = (chained(name) if name in CHAINS else schedule(*words) for _ in range(3))
    losses = [1, 1, 1, 1, 0.5, 0.6, 0.6, 0.6, 0.2, 0.1]
    expected = advance(whole, range(70), losses)
    advance(first, range(stop), losses)
    saved = json.loads(json.dumps([first.state_dict(), first.optimizer.state_dict()["param_groups"]]))
    second.load_state_dict(saved[0])
    second.optimizer.load_state_dict({"state": {}, "param_groups": saved[1]})
    assert advance(second, range(stop, 70), losses) == expected[stop:]


def test_chained_schedule_by_target_resumes_exactly(tmp_path: Path) -> None:
    chain = "[{_target_:torch.optim.lr_scheduler.LinearLR,start_factor:0.1,total_iters:4},"
    chain += "{_target_:torch.optim.lr_scheduler.CosineAnnealingLR,T_max:auto}]"
    words = ("scheduler=constant", "~scheduler.factor", "scheduler.interval=step", "+scheduler.milestones=[4]")
    words += ("scheduler._target_=torch.optim.lr_scheduler.SequentialLR", f"+scheduler.schedulers={chain}")
    run = assert_resumes_exactly(tmp_path, (3, 4, 11), *words)
    assert len({row["lr"] for row in run.read_history()}) == 2


def test_chained_schedule_names_the_inner_key_that_is_wrong() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    settings = {"_target_": "torch.optim.lr_scheduler.ChainedScheduler"}
    for inner, expected in (
        ({**DECAY, "gama": 1}, "scheduler.schedulers.1.gama: ExponentialLR has no such setting"),
        ({"_target_": "os.system"}, "scheduler.schedulers.1._target_=os.system: the package os is not one"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            build_scheduler({**settings, "schedulers": [LINEAR, inner]}, optimizer, 70)
