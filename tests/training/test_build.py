"""Objects built from a config: losses, networks, parameter groups, optimizers, initial weights and frozen layers."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tests import own as own_classes
from tests.helpers import (
    STEPS,
    TINY,
    TINY_EXACT,
    Trap,
    assert_resumes_exactly,
    compose,
    compose_checked,
    train_tiny_exact,
    train_without_figures,
)
from tests.helpers import training_state as make_state
from zfnet.config.errors import UserError
from zfnet.data import load_splits
from zfnet.jobs.train import train
from zfnet.model.build import has_batch_norm
from zfnet.runs.directory import RunDirectory
from zfnet.training.build import balanced_weights, build_optimizer, initial_model, parameter_groups, training_batches
from zfnet.training.loop import train_step

OWN = "imports=[tests]"
OWN_LOSS = (OWN, "~loss.label_smoothing")


def first_steps(*words: str, steps: int = 3):
    """Return a state after some steps of TINY_EXACT."""
    config = compose(*TINY_EXACT, *words)
    state = make_state(config)
    state.train()
    batches = training_batches(config, state.runtime, load_splits(config.data, config.imports).train)
    for _, batch in zip(range(steps), batches.epoch(0), strict=False):
        train_step(state, batch)
    return state


# -- loss


@pytest.mark.parametrize("more", [(), ("trainer.accumulate=3",)])
def test_loss_without_reduction_is_taken_as_the_mean(tmp_path: Path, more: tuple[str, ...]) -> None:
    more = (*more, "trainer.epochs=1", "data.subset=36")
    own = train_tiny_exact(tmp_path / "own", *OWN_LOSS, "loss._target_=tests.own.MeanCrossEntropy", *more)
    usual = train_tiny_exact(tmp_path / "usual", *more)
    for row, other in zip(own.read_history(), usual.read_history(), strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)
        assert row["validation_loss"] == pytest.approx(other["validation_loss"], rel=1e-6)


def test_class_weights() -> None:
    weights = [0.5, 2.0, *[1.0] * 7, 0.0]
    state = make_state(compose_checked(*TINY_EXACT, f"loss.weight={weights}"))
    twin = make_state(compose(*TINY_EXACT)).model
    batches = training_batches(state.config, state.runtime, load_splits(state.config.data).train)
    batch = next(batches.epoch(0))
    state.train()
    train_step(state, batch)
    losses = F.cross_entropy(twin.train()(batch.images), batch.labels, torch.tensor(weights), reduction="sum")
    assert state.metrics.read()[0] == pytest.approx(losses.item() / len(batch.labels), rel=1e-5)


def test_balanced_class_weights_are_inverse_to_the_counts(tmp_path: Path, monkeypatch) -> None:
    assert balanced_weights([6, 2, 0, 4]) == [12 / 18, 12 / 6, 0, 12 / 12]  # the mean over the images is 1
    given: list[list[int]] = []
    monkeypatch.setattr("zfnet.training.build.balanced_weights", lambda c: given.append(c) or balanced_weights(c))
    run = train_tiny_exact(tmp_path / "run", "loss.weight=balanced", "trainer.epochs=1", "data.subset=30")
    assert sum(given[-1]) == 30
    assert run.read_config().loss["weight"] == "balanced"
    for weight in ("even", "{a:1}", f"[{','.join('abcdefghij')}]"):
        with pytest.raises(
            UserError, match=r"loss.weight=.*: must be a number for each class, as in \[1,2,1\], balanced"
        ):
            compose_checked(*TINY_EXACT, f"loss.weight={weight}")
    for weights in ([0] * 10, [-1] + [1] * 9, "[1,nan,1,1,1,1,1,1,1,1]", "[1,inf,1,1,1,1,1,1,1,1]"):
        with pytest.raises(UserError, match=r"loss\.weight=\[.*\]: must be 0 or more for each class, above 0 for one"):
            compose_checked(*TINY_EXACT, f"loss.weight={weights}")
    with pytest.raises(UserError, match="both balance uneven classes; choose one"):
        compose_checked(*TINY_EXACT, "loss.weight=balanced", "data.sampler=balanced")


def test_class_weights_of_another_number_of_classes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss\.weight=\[1, 2\]: must have 10 numbers, one for each class"):
        train_tiny_exact(tmp_path / "run", "loss.weight=[1,2]")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NoGradient", "loss (NoGradient): must return one number with a gradient, not []"),
        ("UnreducedLoss", "loss (UnreducedLoss): must return one number with a gradient, not [3]"),
        ("LossWithParameter", "loss (LossWithParameter): has parameters of its own"),
        ("Squash", "loss (Squash): fails on logits [3, 10] and labels [3]: "),
        ("SoftTargets", "loss (SoftTargets): fails on logits [3, 10] and labels [3]: "),
        ("ErrorWithoutMessage", "loss (ErrorWithoutMessage): fails on logits [3, 10] and labels [3]: RuntimeError"),
        ("StepCounter", "loss._target_=tests.own.StepCounter: must name a subclass of torch.nn.modules.module.Module"),
    ],
)
def test_loss_that_cannot_be_trained_is_refused(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        compose_checked(*TINY_EXACT, *OWN_LOSS, f"loss._target_=tests.own.{name}")


def test_the_line_of_ones_own_code_that_fails_is_named() -> None:
    source = Path(own_classes.__file__).read_text().splitlines()
    line = 1 + source.index("        return -(labels * logits.log_softmax(1)).sum(1).mean()")
    with pytest.raises(UserError, match=rf"^loss \(SoftTargets\): fails on .* \(own\.py, line {line}\)$"):
        compose_checked(*TINY_EXACT, *OWN_LOSS, "loss._target_=tests.own.SoftTargets")


@pytest.mark.parametrize("disabled", [torch.no_grad, torch.inference_mode])
def test_a_config_is_checked_with_gradients(disabled: Any) -> None:
    with disabled():
        compose_checked(*TINY_EXACT)


def test_model_without_parameters_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model \(Flatten\): has no parameters to train$"):
        list(parameter_groups(compose(*TINY), nn.Flatten(), 1.0))


@pytest.mark.parametrize(
    ("transform", "clipped"),
    [
        ("torchvision.transforms.v2.Normalize,mean:[0.5,0.5,0.5],std:[0.25,0.25,0.25]", "from -2.00 to 2.00"),
        ("tests.own.Floats", "from 0.00 to 255.00"),
        ("torchvision.transforms.v2.Identity", None),
    ],
)
def test_transforms_whose_values_are_clipped_are_reported(transform: str, clipped: str | None, caplog) -> None:
    before = "{_target_:tests.own.Floats,divisor:255}," if "Normalize" in transform else ""
    compose_checked(*TINY_EXACT, OWN, f"augment.transforms=[{before}{{_target_:{transform}}}]")
    reported = [text for text in caplog.messages if text.startswith("augment.transforms: return floats")]
    assert len(reported) == (clipped is not None)
    assert clipped is None or clipped in reported[0]


# three classes, but the program learns their number only when it reads the images
OWN_DATA = (OWN, "data=dataset", "+data.train._target_=tests.own.Items", "+data.train.count=30", "data.validation=6")
UNKNOWN = (*(word for word in TINY_EXACT if "_images=" not in word), *OWN_DATA)


def test_loss_for_a_number_of_classes_is_tried_with_that_number(tmp_path: Path) -> None:
    words = (*OWN_LOSS, "loss._target_=tests.own.TenClasses")
    compose_checked(*TINY_EXACT, *words)
    config = compose_checked(*UNKNOWN, *words)
    with pytest.raises(UserError, match=r"loss \(TenClasses\): fails on logits \[4, 3\] and labels \[4\]: "):
        train(config, RunDirectory(tmp_path / "run"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("+data.train.cuont=1",), "data.train.cuont: Items has no such setting; did you mean 'count'?"),
        (("~data.train.count",), "data.train.count is missing: Items needs it"),
        (("data.test={_target_: tests.own.Itmes}",), "data.test._target_=tests.own.Itmes: must name a subclass of"),
    ],
)
def test_data_sets_of_ones_own_are_checked_before_they_are_read(words: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        compose_checked(*UNKNOWN, *words)


# -- network


def own_network(*words: str) -> list[str]:
    plain = (word for word in words if not word.startswith("model."))
    return [*plain, OWN, "~model", "+model._target_=tests.own.Fixed"]


def test_network_with_a_fixed_number_of_outputs_may_fit(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    compose_checked(*own_network(*TINY_EXACT))
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(UserError, match=r"model \(Fixed\): returns \[2, 7\] for 2 images; must be \[2, 10\]"):
        compose_checked(*own_network(*TINY_EXACT), "+model.outputs=7")
    train_without_figures(
        tmp_path / "run", compose_checked(*own_network(*UNKNOWN), "+model.outputs=3", "trainer.epochs=1")
    )
    config = compose_checked(*own_network(*UNKNOWN))
    with pytest.raises(UserError, match=r"model \(Fixed\): returns \[2, 10\] for 2 images; must be \[2, 3\]"):
        train(config, RunDirectory(tmp_path / "other"))


@pytest.mark.parametrize("words", [TINY_EXACT, UNKNOWN])
def test_network_that_gives_more_in_training_mode_is_named(words: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"model \(Fixed\): returns tuple for 2 images in training mode; must be \[2, "):
        compose_checked(*own_network(*words), "+model.second=true")


# -- parameter groups

GROUPS = '+optimizer.param_groups=[{ndim:1,weight_decay:0},{match:"^fc8",lr_scale:10},{match:conv,ndim:4,lr:0.5}]'


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Detached", "returns logits without a gradient; remove detach() or no_grad()"),
        ("ExtraState", "_extra_state in its state_dict is no tensor; only tensors can be saved"),
    ],
)
def test_network_that_cannot_be_trained_or_saved_is_named(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"model ({name}): {expected}")):
        compose_checked(*(word.replace("Fixed", name) for word in own_network(*TINY_EXACT)))


@pytest.mark.parametrize("state", [None, {"state": {0: {"mask": {1}}}, "param_groups": []}])
def test_optimizer_that_cannot_be_saved_is_named_before_the_first_step(monkeypatch, state: Any) -> None:
    monkeypatch.setattr(torch.optim.SGD, "state_dict", lambda self: state)
    with pytest.raises(UserError, match=r"^optimizer.*cannot (be saved|store a set)"):
        compose_checked(*TINY_EXACT, "optimizer=sgd")


def test_has_batch_norm_knows_the_layers_of_several_gpus() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4))
    assert not has_batch_norm(model)
    model.append(nn.BatchNorm2d(4))
    assert has_batch_norm(model)
    assert has_batch_norm(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def test_parameter_groups_take_match_ndim_and_lr_scale() -> None:
    config = compose_checked(*TINY_EXACT, "optimizer=sgd", GROUPS)
    model = make_state(config).model
    groups = build_optimizer(config, model).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    chosen = [[names[id(p)] for p in group["params"]] for group in groups]
    assert chosen == [
        [f"{layer}.bias" for layer in ("conv1", "conv2", "conv5", "fc6", "fc8")],
        ["fc8.weight"],
        ["conv1.weight", "conv2.weight", "conv5.weight"],
        ["fc6.weight"],
    ]
    assert [group["weight_decay"] for group in groups] == [0, 5e-4, 5e-4, 5e-4]
    assert [group["lr"] for group in groups] == pytest.approx([0.01, 0.1, 0.5, 0.01])
    config = compose_checked(
        *TINY_EXACT, "optimizer=sgd", "+optimizer.param_groups=[{match:'',lr_scale:10,weight_decay:0}]"
    )
    (group,) = build_optimizer(config, model).param_groups  # a single group keeps its settings
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(0.1), 0)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("[{match:conv9,lr_scale:2}]", "param_groups.0={'match': 'conv9', 'lr_scale': 2}: no parameter matches"),
        ("[{match:fc},{match:fc8}]", "param_groups.1={'match': 'fc8'}: no parameter matches"),
        ("[{weight_decay:0}]", "param_groups.0={'weight_decay': 0}: selects no parameters; set match or ndim"),
        ("['{match:\"(\"}']", "param_groups=['{match:\"(\"}']: must be a list such as"),
        ("[{match:'('}]", "param_groups.0.match=(: "),
        ("3", "param_groups=3: must be a list such as"),
    ],
)
def test_parameter_groups_that_fit_nothing_are_refused(rules: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        compose_checked(*TINY_EXACT, "optimizer=sgd", f"+optimizer.param_groups={rules}")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_parameter_groups_resume_exactly(tmp_path: Path, optimizer: str) -> None:
    words = (f"optimizer={optimizer}", GROUPS, "scheduler=cosine", "scheduler.warmup_epochs=0.5")
    assert_resumes_exactly(tmp_path, [11], *words)


# -- a user's optimizer


@pytest.mark.parametrize(
    ("name", "more"),
    [("NestedState", ()), ("TwoModes", ("optimizer.lr=0.05", "trainer.channels_last=false", "model.norm=batch"))],
)
def test_optimizer_of_ones_own_resumes_exactly(tmp_path: Path, name: str, more: tuple[str, ...]) -> None:
    """The state contains lists and dicts of tensors, or the optimizer has modes; the kill is in or after an epoch."""
    rest = [f"~optimizer.{key}" for key in ("momentum", "weight_decay", "nesterov")]
    words = (OWN, "optimizer=sgd", *rest, f"optimizer._target_=tests.own.{name}", *more)
    assert_resumes_exactly(tmp_path, (3, STEPS), *words)


def test_optimizer_with_modes_is_measured_and_kept_in_evaluation_mode(tmp_path: Path) -> None:
    rest = [f"~optimizer.{key}" for key in ("momentum", "weight_decay", "nesterov")]
    words = (OWN, "optimizer=sgd", *rest, "optimizer._target_=tests.own.TwoModes", "trainer.epochs=1")
    run = train_tiny_exact(tmp_path / "run", *words)
    state = first_steps(*words, steps=STEPS)
    trained = {name: p.clone() for name, p in state.model.named_parameters()}
    state.optimizer.eval()
    kept = load_file(run.weights)
    for name, p in state.model.named_parameters():
        assert torch.equal(kept[name], p)
        assert not torch.equal(kept[name], trained[name])


# -- initial weights


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory):
    return train_tiny_exact(tmp_path_factory.mktemp("started") / "run", "trainer.epochs=1")


def test_init_from_takes_a_runs_weights(started) -> None:
    for source in (started.folder, started.weights):
        model, fresh = initial_model(compose(*TINY_EXACT, f"trainer.init_from={source}"), 10)
        assert fresh == []
        assert all(torch.equal(model.state_dict()[k], v) for k, v in load_file(started.weights).items())


def test_init_from_another_number_of_classes_makes_a_new_head_and_says_so(started) -> None:
    config = compose(*TINY_EXACT, f"trainer.init_from={started.folder}")
    model, fresh = initial_model(config, 3)
    assert fresh == ["fc8.weight", "fc8.bias"]
    own, _ = initial_model(compose(*TINY_EXACT), 3)
    assert torch.equal(model.fc8.weight, own.fc8.weight)
    assert torch.equal(model.conv1.weight, load_file(started.weights)["conv1.weight"])


def test_init_from_resumes_exactly_and_records_the_weights(started, tmp_path: Path) -> None:
    run = assert_resumes_exactly(tmp_path, [5], f"trainer.init_from={started.folder}")
    recorded = run.read_json("environment.json")["initial_weights_sha256"]
    assert recorded == started.read_json("results.json")["weights_sha256"]


def test_init_from_refuses_what_does_not_fit(started, tmp_path: Path) -> None:
    weights = load_file(started.weights)
    cases = {
        "shape": ({**weights, "conv1.weight": torch.zeros(4, 3, 5, 5)}, "its conv1.weight is [4, 3, 5, 5]"),
        "lacks": ({k: v for k, v in weights.items() if k != "conv2.bias"}, "has no conv2.bias"),
        "more": ({**weights, "conv7.bias": torch.zeros(1)}, "contains conv7.bias, but the network has no such"),
        "head": ({**weights, "fc8.weight": torch.zeros(10, 3)}, "its fc8.weight is [10, 3]"),
    }
    for name, (state, expected) in cases.items():
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match=re.escape(expected)):
            initial_model(compose(*TINY_EXACT, f"trainer.init_from={tmp_path / name}.safetensors"), 10)
    with pytest.raises(UserError, match="there is no such file of weights"):
        initial_model(compose(*TINY_EXACT, f"trainer.init_from={tmp_path}"), 10)


def test_init_from_opens_no_pickle(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Trap()))
    torch.save({"a": Trap()}, tmp_path / "y.safetensors")
    cases = {
        "x.pth": "convert the file first, by job=import source=.*x.pth",
        "y.safetensors": "is not a safetensors file",
    }
    for name, expected in cases.items():
        with pytest.raises(UserError, match=expected):
            initial_model(compose(*TINY_EXACT, f"trainer.init_from={tmp_path / name}"), 10)
    assert not (tmp_path / "witness").exists()


# -- frozen layers


def test_freeze_keeps_bits_and_running_statistics() -> None:
    words = ("model.norm=batch", "model.rms_limit=0.01", "trainer.freeze=[conv1,norm1,fc6]", "optimizer.lr=0.1")
    state = first_steps(*words)
    before = initial_model(state.config, 10)[0].state_dict()
    for name, value in state.model.state_dict().items():
        same = torch.equal(value, before[name])
        assert same == name.startswith(("conv1.", "norm1.", "fc6.")), name
    assert not state.model.norm1.training
    assert state.model.norm2.training


def test_freeze_resumes_exactly(tmp_path: Path) -> None:
    words = ("model.norm=batch", "trainer.freeze=[conv1,norm1]", "trainer.ema=0.9", "trainer.clip_norm=1")
    assert_resumes_exactly(tmp_path, [11], *words)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("[conv11]", "trainer.freeze: the network has no layer conv11; did you mean 'conv1'?"),
        ("[pool1]", "trainer.freeze: the network has no layer pool1"),
        ("[conv1,conv2,conv5,fc6,fc8]", "leaves no parameters to train"),
    ],
)
def test_freeze_of_nothing_or_all_is_refused(names: str, expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        compose_checked(*TINY_EXACT, f"trainer.freeze={names}")


def test_init_from_and_freeze_are_fine_tuning(started, tmp_path: Path) -> None:
    """Another data set has three classes: the head is new, and the frozen layers keep the other run's weights."""
    run = RunDirectory(tmp_path / "run")
    train(compose(*UNKNOWN, f"trainer.init_from={started.folder}", "trainer.freeze=[conv1,conv2]"), run)
    log = (run.folder / "train.log").read_text()
    assert "trainer.init_from: fc8.weight is new, since the number of classes differs" in log
    kept, old = load_file(run.weights), load_file(started.weights)
    assert torch.equal(kept["conv2.weight"], old["conv2.weight"])
    assert not torch.equal(kept["conv5.weight"], old["conv5.weight"])
    assert kept["fc8.bias"].shape == (3,)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{ndim: 1, weight_decai: 0}", "optimizer.param_groups.0.weight_decai: SGD has no such setting"),
        ("{ndim: 1, weight_decay: none}", "optimizer.param_groups.0.weight_decay=none: must be a number"),
        ("{ndim: 1, params: 3}", "optimizer.param_groups.0.params: SGD has no such setting"),
        ("{ndim: 1, lr_scale: big}", "optimizer.param_groups.0.lr_scale=big: must be a number above 0"),
        ("{ndim: 1, lr_scale: -1}", "optimizer.param_groups.0.lr_scale=-1: must be a number above 0"),
        ("{ndim: 1, weight_decay: -1}", "optimizer.param_groups.0.weight_decay=-1: must be at least 0"),
        ("{ndim: 1, momentum: 0, nesterov: true}", "optimizer.param_groups.0 (SGD): Nesterov momentum requires"),
    ],
)
def test_parameter_groups_name_a_wrong_setting(rule: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_checked("optimizer=sgd", f"+optimizer.param_groups=[{rule}]")
    assert str(caught.value).startswith(expected)
