"""A config can construct the classes of its slots, such as optimizers and schedules, and nothing that runs code."""

from __future__ import annotations

import importlib
import logging
import pathlib
import re
import shutil
import subprocess
import sys
import urllib.request
from typing import Optional

import pytest
import torch
import yaml
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from tests.helpers import compose_checked
from zfnet.config.errors import UserError
from zfnet.config.instantiate import arguments, instantiate, resolve
from zfnet.config.reading import read_config
from zfnet.config.schema import Job
from zfnet.training.build import build_optimizer, build_scheduler, check_recipe
from zfnet.training.callbacks import Callback
from zfnet.training.loggers import Logger

SLOTS: dict[str, type] = {
    "model": nn.Module,
    "data.train": Dataset,
    "augment.transforms.0": nn.Module,
    "loss": nn.Module,
    "optimizer": Optimizer,
    "scheduler": LRScheduler,
    "logger.mine": Logger,
    "callbacks.mine": Callback,
    "job": Job,
}

# Targets in a YAML file that Hydra's own `instantiate` runs, or could run, in some version.
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
def recorded_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the functions that a hostile config would call; return the list in which their calls are recorded."""
    calls: list[str] = []
    for owner, name in (
        (logging.os, "system"),
        (subprocess, "run"),
        (pathlib.Path, "unlink"),
        (pathlib.Path, "write_text"),
        (shutil, "copy"),
        (shutil, "rmtree"),
        (urllib.request, "urlopen"),
        (torch, "load"),
        (torch.hub, "load"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, _name=name, **__: calls.append(_name))
    real = importlib.import_module

    def import_module(name: str) -> object:
        """Record imports, except those of this program and of packages that a test trusts."""
        module = real(name)
        if name.split(".")[0] not in ("zfnet", "my_lab"):
            calls.append(f"import {name}")
        return module

    monkeypatch.setattr(importlib, "import_module", import_module)
    # an alias as in Hydra's advisory GHSA-37p2-j732-x8pj: a module that is an attribute of another module
    monkeypatch.setattr(sys.modules["torch.optim.sgd"], "shutil", shutil, raising=False)
    return calls


@pytest.mark.parametrize("slot", list(SLOTS))
@pytest.mark.parametrize("target", HOSTILE)
def test_resolve_refuses_hostile_targets(slot: str, target: str, recorded_calls: list[str]) -> None:
    with pytest.raises(UserError, match=r"must name a subclass of|not one that this command imports") as caught:
        resolve(slot, target, SLOTS[slot])
    assert str(caught.value).startswith(f"{slot}._target_={target}")
    settings = {"_target_": target, "lr": 0.1, "command": "touch witness"}
    with pytest.raises(UserError):
        instantiate(slot, settings, SLOTS[slot])
    assert recorded_calls == []
    assert not Trap.sprung


@pytest.mark.parametrize("target", HOSTILE)
def test_resolve_refuses_aliases_in_a_trusted_package(target: str, recorded_calls: list[str], monkeypatch) -> None:
    """A trusted package's imports are not trusted: `my_lab.os.system`."""
    package = type(sys)("my_lab")
    package.__path__ = []
    for name in ("os", "torch", "shutil", "subprocess", "pathlib", "builtins", "logging", "pickle", "functools"):
        setattr(package, name, sys.modules[name])
    monkeypatch.setitem(sys.modules, "my_lab", package)
    for slot, base in SLOTS.items():
        with pytest.raises(UserError):
            resolve(slot, f"my_lab.{target}", base, ["my_lab"])
    assert recorded_calls == []


@pytest.mark.parametrize("target", [None, 3, True, ["torch.optim.SGD"], {"_target_": "os.system"}, b"x"])
def test_resolve_takes_names_only(target: object) -> None:
    with pytest.raises(UserError, match="must name a subclass of"):
        resolve("optimizer", target, Optimizer)


@pytest.mark.parametrize(
    ("slot", "target"),
    [
        ("optimizer", "torch.optim.SGD"),
        ("scheduler", "torch.optim.lr_scheduler.StepLR"),
        ("loss", "torch.nn.MSELoss"),
        ("augment.transforms.0", "torchvision.transforms.v2.ColorJitter"),
        ("model", "torchvision.models.AlexNet"),
        ("logger.mine", "zfnet.training.loggers.CSVLogger"),
        ("callbacks.mine", "zfnet.training.callbacks.EarlyStopping"),
        ("job", "zfnet.jobs.train.TrainJob"),
    ],
)
def test_resolve_gives_each_slot_its_own_kind_only(slot: str, target: str) -> None:
    assert resolve(slot, target, SLOTS[slot]).__name__ == target.rpartition(".")[2]
    for other, base in SLOTS.items():
        if other != slot:
            with pytest.raises(UserError):
                resolve(other, target, base)


def test_resolve_names_the_module_of_pytorchs_own_classes() -> None:
    with pytest.raises(UserError, match=r"^optimizer\._target_=NAdam: did you mean 'torch\.optim\.NAdam'\?$"):
        resolve("optimizer", "NAdam", torch.optim.Optimizer)


def test_resolve_imports_nothing_without_trust(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    (tmp_path / "trap_module.py").write_text("open('witness', 'w').close()\nclass SGD: pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"add imports=\[trap_module\]"):
        resolve("optimizer", "trap_module.SGD", Optimizer)
    assert not (tmp_path / "witness").exists()
    assert "trap_module" not in sys.modules


def test_resolve_names_a_package_that_is_missing_or_broken(monkeypatch, tmp_path: pathlib.Path) -> None:
    (tmp_path / "broken_module.py").write_text("import no_such_package_at_all\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"install it, put it next to run\.py, or add its folder to PYTHONPATH"):
        resolve("optimizer", "no_such_package.Lion", Optimizer, ["no_such_package"])
    with pytest.raises(UserError, match="No module named 'no_such_package_at_all'"):
        resolve("optimizer", "broken_module.Lion", Optimizer, ["broken_module"])


def test_a_modules_getattr_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module = type(sys)("lazy")
    module.__getattr__ = lambda name: pytest.fail(f"the attribute {name} was read")
    monkeypatch.setitem(sys.modules, "lazy", module)
    with pytest.raises(UserError):
        resolve("optimizer", "lazy.SGD", Optimizer)


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
def test_arguments_are_plain_values(key: str, value: object, recorded_calls: list[str]) -> None:
    with pytest.raises(UserError, match=rf"optimizer\.{key}"):
        arguments("optimizer", {"_target_": "torch.optim.SGD", key: value}, Optimizer)
    assert recorded_calls == []


def test_check_recipe_refuses_a_hostile_record(request: pytest.FixtureRequest) -> None:
    plain = compose_checked().to_dict()
    recorded_calls: list[str] = request.getfixturevalue("recorded_calls")  # only now: Hydra imports modules too
    for hostile in ({"_target_": "os.system", "command": "touch witness"}, {"_target_": "builtins.open"}):
        for slot in ("model", "loss", "optimizer", "scheduler", "logger", "callbacks"):
            named = {"mine": hostile} if slot in ("logger", "callbacks") else hostile
            with pytest.raises(UserError, match=r"_target_="):
                check_recipe(read_config(plain | {slot: named}))
        augment = plain["augment"] | {"transforms": [hostile]}
        with pytest.raises(UserError, match=r"augment.transforms.0._target_="):
            check_recipe(read_config(plain | {"augment": augment}))
    assert recorded_calls == []
    with pytest.raises(yaml.YAMLError):  # YAML has its own syntax for Python objects
        yaml.safe_load("optimizer: !!python/object/apply:os.system ['touch witness']")


def test_a_records_own_imports_have_no_effect() -> None:
    plain = compose_checked().to_dict() | {"imports": ["os", "my_lab"]}
    assert read_config(plain).imports == []
    assert read_config(plain, ["lion_pytorch"]).imports == ["lion_pytorch"]


def test_lists_become_tuples_where_the_class_has_one() -> None:
    cls, keywords = arguments("optimizer", {"_target_": "torch.optim.AdamW", "betas": [0.8, 0.9]}, Optimizer)
    assert cls is torch.optim.AdamW
    assert keywords["betas"] == (0.8, 0.9)


class Sizes(nn.Module):
    """A user's class with arguments of many types."""

    def __init__(
        self,
        widths: tuple[int, ...] = (8, 16),
        names: tuple[str, ...] = ("a",),
        steps: list = [1, 2],  # noqa: B006
        mixed: tuple = ("a", 1),
        k: int = 3,
        count: int | None = None,
        rate: float | None = 0.5,
        flag: Optional[bool] = True,
        kind: str = "a",
        path: str = None,  # noqa: RUF013  # as users often write it
        other: str | None = "b",
    ) -> None:
        super().__init__()


OWN_SIZES = {"_target_": f"{__name__}.Sizes"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("widths", [8, 16, 32]), ("widths", []), ("names", ["b", "c"]), ("steps", [3]), ("mixed", [1, "b", 2])),
        *(("rate", None), ("flag", None), ("path", None), ("other", None), ("path", "a")),
    ],
)
def test_a_list_of_ones_own_may_have_another_length_and_null_is_what_the_class_takes(key: str, value: object) -> None:
    _, keywords = arguments("model", {**OWN_SIZES, key: value}, nn.Module, ["tests"])
    assert keywords[key] == (tuple(value) if key in ("widths", "names", "mixed") else value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({**OWN_SIZES, "widths": 8}, "model.widths=8: must be a list of numbers"),
        ({**OWN_SIZES, "widths": ["a", 8]}, "model.widths=['a', 8]: must be a list of numbers"),
        ({**OWN_SIZES, "widths": None}, "model.widths=None: must be a list of numbers"),
        ({**OWN_SIZES, "names": [1]}, "model.names=[1]: must be a list of text"),
        ({**OWN_SIZES, "names": "abc"}, "model.names=abc: must be a list of text"),
        ({**OWN_SIZES, "steps": ["a"]}, "model.steps=['a']: must be a list of numbers"),
        ({**OWN_SIZES, "mixed": 1}, "model.mixed=1: must be a list of values"),
        ({**OWN_SIZES, "k": "wide"}, "model.k=wide: must be a number"),
        ({**OWN_SIZES, "k": None}, "model.k=None: must be a number"),
        ({**OWN_SIZES, "k": 1.5}, "model.k=1.5: must be a whole number"),
        ({**OWN_SIZES, "count": 1.5}, "model.count=1.5: must be a whole number"),
        ({**OWN_SIZES, "count": "many"}, "model.count=many: must be a whole number"),
        ({**OWN_SIZES, "count": True}, "model.count=True: must be a whole number"),
        ({**OWN_SIZES, "count": [1]}, "model.count=[1]: must be a whole number"),
        ({**OWN_SIZES, "rate": "fast"}, "model.rate=fast: must be a number"),
        ({**OWN_SIZES, "flag": 1}, "model.flag=1: must be true or false"),
        ({**OWN_SIZES, "kind": 255}, "model.kind=255: must be text"),
        ({**OWN_SIZES, "kind": None}, "model.kind=None: must be text"),
        ({**OWN_SIZES, "other": 3}, "model.other=3: must be text"),
    ],
)
def test_an_argument_of_another_type_than_the_default_is_named(settings: dict, expected: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
        arguments("model", settings, nn.Module, ["tests"])


def test_auto_is_the_length_of_the_run() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    cosine = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": "auto"}
    assert build_scheduler(cosine, optimizer, 37).T_max == 37


def test_a_class_of_ones_own_is_resolved_with_trust() -> None:
    assert resolve("optimizer", f"{__name__}.Descent", Optimizer, ["tests"]) is Descent
    with pytest.raises(UserError, match=r"add imports=\[tests\]"):
        resolve("optimizer", f"{__name__}.Descent", Optimizer)


class Descent(torch.optim.SGD):
    pass


def test_a_missing_argument_is_named() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(UserError, match=r"scheduler\.step_size is missing: StepLR needs it"):
        build_scheduler({"_target_": "torch.optim.lr_scheduler.StepLR"}, optimizer, 10)


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
        ("OneCycleLR", "div_factor", -1, "a number greater than 0"),
        ("CosineAnnealingLR", "eta_min", -1, "at least 0"),
        ("ReduceLROnPlateau", "min_lr", -1, "at least 0"),
    ],
)
def test_a_schedule_that_means_nothing_is_named(name: str, key: str, value: object, expected: str) -> None:
    settings = {"_target_": f"torch.optim.lr_scheduler.{name}", key: value}
    with pytest.raises(UserError) as caught:
        arguments("scheduler", settings, LRScheduler, num_args=1)
    assert str(caught.value).startswith(f"scheduler.{key}={value}: must be {expected}")


@pytest.mark.parametrize(
    ("name", "key"), [("StepLR", "step_size"), ("CosineAnnealingLR", "T_max"), ("MultiStepLR", "milestones")]
)
def test_a_schedule_without_a_needed_value_is_named(name: str, key: str) -> None:
    settings = {"_target_": f"torch.optim.lr_scheduler.{name}", key: None}
    with pytest.raises(UserError, match=rf"^scheduler\.{key}=null: needs a value$"):
        arguments("scheduler", settings, LRScheduler, num_args=1)


class Late(torch.optim.SGD):
    """Has no fused kernel but raises only in `step`, as Adagrad does on a GPU in PyTorch 2.10."""

    def step(self, closure=None):
        if self.defaults["fused"]:
            raise RuntimeError("`fused=True` requires all the params to be of supported devices")
        return super().step(closure)


def _optimizer(target: str) -> Optimizer:
    config = compose_checked("optimizer=sgd")
    config.optimizer, config.imports = {"_target_": target, "lr": 0.1}, ["tests"]
    return build_optimizer(config, nn.Linear(2, 2), fused=True)


def test_build_optimizer_asks_for_fused_only_where_a_step_of_it_works() -> None:
    late = _optimizer(f"{__name__}.Late")
    assert isinstance(late, Late)
    assert not late.defaults["fused"]
    assert _optimizer("torch.optim.AdamW").defaults["fused"] is True
    assert isinstance(_optimizer("torch.optim.RMSprop"), torch.optim.RMSprop)


@pytest.mark.parametrize(
    "target",
    [
        "zfnet.training.loggers._import",
        "zfnet.data.files.fetch",
        "zfnet.data.sources.load_cifar",
        "zfnet.config.instantiate._look_up",
        "zfnet.runs.command.compose_raw",
        "torchvision.models.get_model",
        "torchvision.models.segmentation.fcn_resnet50",
        "torchvision.models.detection.fasterrcnn_resnet50_fpn",
    ],
)
def test_a_models_function_is_torchvisions_for_classification(target: str) -> None:
    with pytest.raises(UserError, match=r"must name a subclass of|no such name"):
        resolve("model", target, nn.Module)
    assert resolve("model", "torchvision.models.vgg11", nn.Module).__name__ == "vgg11"


@pytest.mark.parametrize("key", ["weights", "pretrained", "weights_backbone"])
def test_a_models_function_downloads_no_weights(key: str) -> None:
    with pytest.raises(UserError, match=rf"model\.{key}=DEFAULT: start from weights with trainer.init_from"):
        arguments("model", {"_target_": "torchvision.models.alexnet", key: "DEFAULT"}, nn.Module)
