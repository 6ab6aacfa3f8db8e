"""What a config may construct: optimizers and schedules, and nothing that runs code."""

from __future__ import annotations

import importlib
import logging
import pathlib
import shutil
import subprocess
import sys
import urllib.request

import pytest
import torch
import yaml

from tests.helpers import compose
from zfnet.config.errors import UserError
from zfnet.config.instantiate import (
    SLOTS,
    arguments,
    build_optimizer,
    build_scheduler,
    check_construction,
    resolve,
)
from zfnet.config.schema import read_config
from zfnet.training.schedule import EXTRA

# What ran, or may run, from a YAML file under Hydra's own `instantiate` at one version or another.
HOSTILE = [
    "os.system",
    "logging.os.system",
    "posix.system",
    "eval",
    "builtins.eval",
    "builtins.exec",
    "builtins.open",
    "builtins.__import__",
    "subprocess.run",
    "subprocess.Popen",
    "importlib.import_module",
    "pathlib.Path.unlink",
    "pathlib.Path.write_text",
    "shutil.copy",
    "shutil.rmtree",
    "urllib.request.urlopen",
    "torch.load",
    "torch.hub.load",
    "torch.optim.sgd.torch.hub.load",
    "torch.optim.sgd.torch.load",
    "torch.optim.sgd.shutil.copy",
    "torch.optim.lr_scheduler.types.FunctionType",
    "torch.optim.Optimizer",
    "torch.optim.Optimizer.__subclasses__",
    "torch.optim.lr_scheduler.LRScheduler",
    "torch.optim.SGD.step",
    "torch.optim.SGD.__init__",
    "torch.nn.Linear",
    "torch.optim",
    "torch",
    "pickle.loads",
    "functools.partial",
    "hydra.utils.instantiate",
    "zfnet.config.instantiate.build_optimizer",
    "tests.test_construct.Trap",
    "no.such.module",
    "",
    ".",
    "..",
    "torch..optim.SGD",
    "torch.optim.SGD.",
    "torch.optim.NoSuch",
]


class Trap:
    """Records that it was constructed or called; no slot may accept it."""

    sprung = False

    def __init__(self, *_: object, **__: object) -> None:
        Trap.sprung = True


@pytest.fixture
def armed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace what a hostile config would call by witnesses, and return the list that they write to."""
    calls: list[str] = []
    for owner, name in (
        (logging.os, "system"),
        (subprocess, "run"),
        (importlib, "import_module"),
        (pathlib.Path, "unlink"),
        (pathlib.Path, "write_text"),
        (shutil, "copy"),
        (shutil, "rmtree"),
        (urllib.request, "urlopen"),
        (torch, "load"),
        (torch.hub, "load"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, _name=name, **__: calls.append(_name))
    # an alias such as Hydra's advisory GHSA-37p2-j732-x8pj describes: a module seen through another
    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "shutil", shutil, raising=False)
    return calls


@pytest.mark.parametrize("slot", list(SLOTS))
@pytest.mark.parametrize("target", HOSTILE)
def test_hostile_targets_are_refused(slot: str, target: str, armed: list[str]) -> None:
    with pytest.raises(UserError, match="must name a subclass of") as caught:
        resolve(slot, target)
    assert str(caught.value).startswith(f"{slot}._target_={target}")
    settings = {"_target_": target, "lr": 0.1, "command": "touch witness", "optimizer": "x", "params": []}
    good = {"_target_": "torch.optim.SGD"}, {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 1}
    with pytest.raises(UserError):
        check_construction(*((settings, good[1]) if slot == "optimizer" else (good[0], settings)), ())
    assert armed == []
    assert not Trap.sprung


@pytest.mark.parametrize("target", [None, 3, True, ["torch.optim.SGD"], {"_target_": "os.system"}, b"x"])
def test_a_target_is_a_name(target: object) -> None:
    with pytest.raises(UserError, match="must name a subclass of"):
        resolve("optimizer", target)


def test_each_slot_takes_its_own_kind_only() -> None:
    assert resolve("optimizer", "torch.optim.SGD") is torch.optim.SGD
    assert resolve("scheduler", "torch.optim.lr_scheduler.StepLR") is torch.optim.lr_scheduler.StepLR
    with pytest.raises(UserError):
        resolve("scheduler", "torch.optim.SGD")
    with pytest.raises(UserError):
        resolve("optimizer", "torch.optim.lr_scheduler.StepLR")


def test_nothing_is_imported_for_a_config(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    (tmp_path / "trap_module.py").write_text("open('witness', 'w').close()\nclass SGD: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no imported module holds that name"):
        resolve("optimizer", "trap_module.SGD")
    assert not (tmp_path / "witness").exists()
    assert "trap_module" not in sys.modules


def test_a_modules_getattr_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("lazy")
    module.__getattr__ = lambda name: pytest.fail(f"asked for {name}")
    monkeypatch.setitem(sys.modules, "lazy", module)
    with pytest.raises(UserError):
        resolve("optimizer", "lazy.SGD")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_partial_", True),
        ("_args_", [1]),
        ("_recursive_", True),
        ("_convert_", "all"),
        ("params", [1]),
        ("self", 1),
        ("lr", {"_target_": "os.system", "command": "touch witness"}),
        ("weight_decay", {"_target_": "os.system"}),
        ("foreach", {"_target_": "builtins.eval"}),
        ("momentum", [{"_target_": "os.system"}]),
        ("momentum", "os.system"),
    ],
)
def test_arguments_are_plain_values(key: str, value: object, armed: list[str]) -> None:
    with pytest.raises(UserError, match=rf"optimizer\.{key}"):
        arguments("optimizer", {"_target_": "torch.optim.SGD", key: value})
    assert armed == []


def test_a_hostile_record_is_refused_whole(request: pytest.FixtureRequest) -> None:
    plain = compose().to_dict()
    armed: list[str] = request.getfixturevalue("armed")  # Hydra itself imports, so not before this line
    for slot in SLOTS:
        for hostile in ({"_target_": "os.system", "command": "touch witness"}, {"_target_": "builtins.open"}):
            config = read_config(plain | {slot: hostile})
            with pytest.raises(UserError, match=rf"{slot}._target_="):
                check_construction(config.optimizer, config.scheduler, ())
    assert armed == []
    with pytest.raises(yaml.YAMLError):  # YAML itself has a way to name Python objects
        yaml.safe_load("optimizer: !!python/object/apply:os.system ['touch witness']")


def test_tuples_and_auto() -> None:
    cls, keywords = arguments("optimizer", {"_target_": "torch.optim.AdamW", "betas": [0.8, 0.9]})
    assert cls is torch.optim.AdamW
    assert keywords["betas"] == (0.8, 0.9)
    optimizer = build_optimizer(
        {"_target_": "torch.optim.SGD", "lr": 1.0}, [torch.nn.Parameter(torch.ones(1))]
    )
    cosine = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "auto"}
    assert build_scheduler(cosine, optimizer, 37, ()).T_max == 37


def test_a_class_of_ones_own_is_accepted() -> None:
    """The rule is the kind, not the package: an optimizer of a program that imports zfnet may be named."""
    assert resolve("optimizer", f"{__name__}.Descent") is Descent
    assert issubclass(Descent, torch.optim.Optimizer)


class Descent(torch.optim.SGD):
    pass


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(UserError, match=r"scheduler\.step_size is missing: StepLR needs it"):
        arguments("scheduler", {"_target_": "torch.optim.lr_scheduler.StepLR"})


@pytest.mark.parametrize(
    ("name", "key", "value", "expected"),
    [
        ("StepLR", "step_size", 0, "a whole number, at least 1"),
        ("StepLR", "step_size", 1.5, "a whole number, at least 1"),
        ("StepLR", "gamma", -1, "a number greater than 0"),
        ("MultiStepLR", "milestones", "abc", "a list of whole numbers, each at least 1, as in [6,8]"),
        ("MultiStepLR", "milestones", [-1], "a list of whole numbers, each at least 1"),
        ("MultiStepLR", "milestones", [1.5], "a list of whole numbers, each at least 1"),
        ("ReduceLROnPlateau", "patience", -1, "a whole number, at least 0"),
        ("ReduceLROnPlateau", "factor", 0, "a number greater than 0"),
        ("CosineAnnealingLR", "T_max", 0, "a whole number, at least 1"),
        ("OneCycleLR", "max_lr", "abc", "a number greater than 0"),
    ],
)
def test_a_schedule_that_means_nothing_is_named(name: str, key: str, value: object, expected: str) -> None:
    settings = {"_target_": f"torch.optim.lr_scheduler.{name}", key: value}
    with pytest.raises(UserError) as caught:
        arguments("scheduler", settings)
    assert str(caught.value).startswith(f"scheduler.{key}={value}: must be {expected}")


class Late(torch.optim.SGD):
    """Has no fused kernel and says so when it steps, as Adagrad does with a GPU in PyTorch 2.10."""

    def step(self, closure=None):
        if self.defaults["fused"]:
            raise RuntimeError("`fused=True` requires all the params to be of supported devices")
        return super().step(closure)


def test_fused_is_not_asked_for_where_only_a_step_refuses_it() -> None:
    optimizer = build_optimizer({"_target_": f"{__name__}.Late", "lr": 0.1}, [torch.ones(2)], fused=True)
    assert isinstance(optimizer, Late)
    assert not optimizer.defaults["fused"]


def test_fused_where_there_is_one() -> None:
    weight = [torch.nn.Parameter(torch.ones(1))]
    adam = build_optimizer({"_target_": "torch.optim.AdamW"}, weight, fused=True)
    assert adam.defaults["fused"] is True
    rms = build_optimizer({"_target_": "torch.optim.RMSprop"}, weight, fused=True)
    assert isinstance(rms, torch.optim.RMSprop)


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_an_optimizer_that_takes_no_plain_step_is_named(name: str) -> None:
    with pytest.raises(UserError, match=rf"optimizer._target_=torch.optim.{name}: cannot take a plain step"):
        check_construction({"_target_": f"torch.optim.{name}", "lr": 0.1}, compose().scheduler, EXTRA)
