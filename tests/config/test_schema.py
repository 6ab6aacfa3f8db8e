"""Every file of conf/ composes and passes all checks; errors name wrong values before any data is read."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers import TINY_EXACT, compose, compose_checked, data_config
from zfnet.config.errors import UserError
from zfnet.config.instantiate import resolve
from zfnet.config.reading import read_config, read_data
from zfnet.config.schema import NOT_IDENTITY, AugmentConfig, Job, Parent, check, flatten, result_keys
from zfnet.config.trust import CONF

FILES = [
    (p.relative_to(CONF).parts[0], p.relative_to(CONF / p.relative_to(CONF).parts[0]).with_suffix("").as_posix())
    for p in sorted(CONF.glob("*/**/*.yaml"))
    if "hydra" not in p.relative_to(CONF).parts
]
RECIPES = [(group, name) for group, name in FILES if group != "job"]


NEEDED = {
    "folder": ["data.root=photos"],
    "paper_imagenet": ["data.root=photos"],
    "dataset": ["data.train={_target_: torchvision.datasets.FakeData}", "imports=[torchvision]"],
}


@pytest.mark.parametrize(("group", "name"), RECIPES, ids=lambda v: v)
def test_every_choice_composes_and_passes_the_checks(group: str, name: str) -> None:
    if (group, name) == ("data", "base"):
        pytest.skip("contains only the keys that the other data sets share")
    if group == "logger" and name in ("wandb", "mlflow", "trackio"):
        pytest.importorskip(name)  # these packages are optional
    config = compose_checked(f"{group}={name}", *NEEDED.get(name, []))
    # only one file evaluates the test set after each epoch
    assert config.trainer.test_each_epoch is ((group, name) == ("experiment", "blog"))
    if group in ("model", "data", "augment", "trainer"):
        assert getattr(config, group).name == name.split("/")[-1]
    if group == "experiment":
        for debug in ("batch", "profile"):
            assert compose_checked(f"experiment={name}", *NEEDED.get(name, []), f"debug={debug}").trainer.epochs == 1


def test_a_layer_to_freeze_can_have_a_number_as_its_name() -> None:
    assert compose("trainer.freeze=[0,1,head]").trainer.freeze == ["0", "1", "head"]


@pytest.mark.parametrize("name", [name for group, name in FILES if group == "job"])
def test_every_job_file_names_its_class(name: str) -> None:
    job = yaml.safe_load((CONF / "job" / f"{name}.yaml").read_text(encoding="utf-8"))["job"]
    assert job["name"] == name
    cls = resolve("job", job["_target_"], Job)
    assert {f.name for f in dataclasses.fields(cls)} == job.keys() - {"_target_"}


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).with_suffix("").as_posix()
)
def test_every_file_opens_with_its_source_a_command_and_what_to_expect(path: Path) -> None:
    if path == CONF / "local.yaml":
        pytest.skip("the user's own file")
    lines = path.read_text(encoding="utf-8").removeprefix("# @package _global_\n").splitlines()
    opening = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    starts = ("# Source: ", "#   python run.py ", "# Expected: ")
    assert not opening[0].startswith(starts)  # the first line says what the file is for
    assert [start for start in starts if not any(f"{line} ".startswith(start) for line in opening)] == []
    assert [line for line in opening if re.match(r"# (Sources|Expect|Result|Results):", line)] == []


def test_the_default_is_the_blogs_recipe() -> None:
    config = compose_checked()
    assert (config.model.name, config.data.name, config.data.image_size) == ("zfnet", "cifar10", 224)
    assert config.data.batch_size == 256
    assert config.optimizer["_target_"] == "torch.optim.AdamW"
    assert config.optimizer["lr"] == 1e-3
    assert config.scheduler["factor"] == 0.94
    assert config.trainer.test_each_epoch is False


def test_the_command_line_wins_over_an_experiment() -> None:
    config = compose_checked(
        "experiment=quickstart",
        "trainer=exact",
        "optimizer=sgd",
        "scheduler=step",
        "trainer.epochs=3",
        "model=zfnet_bn",
    )
    assert config.trainer.name == "exact"
    assert config.trainer.epochs == 3
    assert config.optimizer["_target_"] == "torch.optim.SGD"
    assert config.scheduler["_target_"].endswith("StepLR")
    assert config.model.name == "zfnet_bn"
    assert config.data.name == "shapes"  # groups without an override keep the experiment's choice


def test_seed_0_is_a_seed_and_seeds_differ() -> None:
    assert compose_checked("seed=0").seed == 0
    assert compose_checked("seed=0").identity() != compose_checked("seed=1").identity()


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("model.conv1.kernel_size=0", "model.conv1.kernel_size=0: must be at least 1"),
        ("data.validation=1.5", "data.validation=1.5: must be a fraction below 1, or a whole number of images"),
        ("model.conv1.kernel_size=7.5", "model.conv1.kernel_size"),
        ("model.conv1.padding=-1", "model.conv1.padding=-1: must be at least 0"),
        ("model.conv1.kernel_size=300", "conv1 receives 224×224 pixels, too few for its 300×300 kernel"),
        ("model.conv2.stride=50", "the pooling after conv5 receives 1×1 pixels"),
        ("model.conv1=null", "model.conv1"),
        ("model.norm=layer", "model.norm=layer: must be one of none, lrn or batch"),
        ("model.rms_limit=0", "model.rms_limit=0: must be greater than 0"),
        ("model.dropout=-0.1", "model.dropout=-0.1: must be at least 0"),
        ("model.dropout=nan", "model.dropout=nan: must be a finite number"),
        ("model.fc6.features=0", "model.fc6.features=0: must be at least 1"),
        ("data.batch_size=2.5", "data.batch_size"),
        ("data.image_size=99999", "data.image_size=99999: must be at most 4096"),
        ("data.validation=0", "data.validation=0 leaves no images for trainer.monitor=validation_loss"),
        ("data.std=[0.5,0.0,0.5]", "must be at least 1e-06"),
        ("data.mean=[a,b,c]", "data.mean"),
        ("data.mean=[nan,0.5,0.5]", "data.mean"),
        ("+data.fit=pad", "data.fit=pad: must be one of crop or stretch"),
        ("data.name=photographs", "data.name=photographs: no such data set; known: cifar10"),
        ("augment.flip=2", "augment.flip=2: must be at most 1"),
        ("trainer.precision=fp16", "trainer.precision=fp16: must be one of auto, fp32 or bf16"),
        ("trainer.channels_last=maybe", "trainer.channels_last=maybe: must be true or false, or must be one of auto"),
        ("trainer.accumulate=3", "trainer.accumulate=3: must divide data.batch_size=256"),
        ("loss.label_smoothing=-0.1", "loss.label_smoothing=-0.1: must be at least 0"),
        ("trainer.ema=1", "trainer.ema=1: must be less than 1"),
        ("trainer.clip_norm=inf", "trainer.clip_norm=inf: must be a finite number"),
        ("trainer.deterministic=perhaps", "trainer.deterministic"),
        ("trainer.monitor=test_loss", "trainer.monitor=test_loss: must be one of"),
        ("trainer.log_every=0", "trainer.log_every=0: must be at least 1"),
        ("seed=1.5", "seed"),
        ("seed=null", "seed"),
        ("optimizer.lr=auto", "optimizer.lr=auto: must be a number"),
        ("optimizer.lr=true", "optimizer.lr=True: must be a number"),
        ("optimizer.lr=null", "optimizer.lr=None: must be a number"),
        ("optimizer.weight_decay=null", "optimizer.weight_decay=None: must be a number"),
        ("loss.label_smoothing=null", "loss.label_smoothing=None: must be a number"),
        ("optimizer.betas=[0.9,a]", "optimizer.betas=[0.9, 'a']: must be a list of 2 numbers"),
        ("optimizer.betas=[0.9]", "optimizer.betas=[0.9]: must be a list of 2 numbers"),
        ("optimizer.betas=[0.9,0.9,0.9]", "must be a list of 2 numbers"),
        ("optimizer.betas=[2.0,0.9]", "optimizer (AdamW): Invalid beta parameter at index 0: 2.0"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9: must be a list of 2 numbers"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1: must be at least 0"),
        ("+optimizer.amsgrad=1", "optimizer.amsgrad=1: must be true or false"),
        ("scheduler.warmup_epochs=-1", "scheduler.warmup_epochs=-1: must be a number of epochs, at least 0"),
        ("scheduler.warmup_epochs=10", "scheduler.warmup_epochs=10: must be less than the 10 epochs of the schedule"),
        ("trainer.snapshots=[1,11]", "trainer.snapshots=[1, 11]: epochs are counted from 1 to trainer.epochs=10"),
        ("optimizer.lr=1e38", "optimizer.lr=1e+38: must be a finite number, at most 1e+30"),
        ("scheduler.interval=step", "a plateau schedule steps once an epoch"),
        ("scheduler.factor=2", "scheduler (ReduceLROnPlateau): Factor should be < 1.0"),
        ("~optimizer._target_", "optimizer._target_ is missing"),
    ],
)
def test_a_wrong_value_is_named(word: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_checked(word)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_crop_larger_than_the_stored_images_is_named_before_they_are_read() -> None:
    with pytest.raises(UserError, match=r"^data\.crop_size=300: must be at most data\.store_size=256$"):
        compose("data=folder", "data.root=nowhere", "data.store_size=256", "data.crop_size=300")


def test_a_config_is_checked_before_data_is_read(run_py, monkeypatch) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("data was read")

    monkeypatch.setattr("zfnet.jobs.train.load_splits", touched)
    for word in ("optimizer.lr=x", "model.conv1.kernel_size=99", "scheduler.factor=2"):
        answer = run_py(*TINY_EXACT, word)
        assert answer.code == 1
        assert "AssertionError" not in answer.err
    assert "AssertionError: data was read" in run_py(*TINY_EXACT).err


def test_a_record_reads_back_as_the_same_config() -> None:
    config = compose_checked("model.conv3=null", "optimizer=sgd", "scheduler=multistep", "data=shapes")
    text = yaml.safe_dump(config.to_dict())
    again = read_config(yaml.safe_load(text))
    assert again.to_dict() == config.to_dict()
    assert again.identity() == config.identity()


def test_read_data_names_a_folder_whose_name_is_no_text() -> None:
    plain = dataclasses.asdict(data_config("folder"))
    with pytest.raises(UserError, match=r"^data\.root: contains bytes that are not valid UTF-8"):
        read_data({**plain, "root": b"photos\xff".decode(errors="surrogateescape")})


def test_overridden_names_the_keys_of_a_command() -> None:
    overrides = ["optimizer=sgd", "+loss.ignore_index=3", "++data.root=a=b", "~loss.weight", "trainer.epochs=2"]
    config = dataclasses.replace(compose_checked(), overrides=overrides)
    assert list(config.overridden) == ["optimizer", "loss.ignore_index", "data.root", "loss.weight", "trainer.epochs"]
    assert config.overridden["data.root"] == "data.root=a=b"


def test_check_names_what_is_no_json() -> None:
    deep: list = []
    for _ in range(300):
        deep = [deep]
    odd = {"a\udcff": 1}
    for keys, problem in (
        ({"transforms": [{"a": deep}]}, "augment: Invalid JSON: .*recursion"),
        ({"transforms": [odd]}, r"augment\.transforms: contains bytes that are not valid UTF-8"),
        ({"transforms": ["a\udcff"]}, r"augment\.transforms: contains bytes that are not valid UTF-8"),
        (odd, r"augment\.a\\udcff: contains bytes that are not valid UTF-8"),
    ):
        with pytest.raises(UserError, match=f"^{problem}"):
            check(AugmentConfig, {"name": "x", **keys}, "augment")


def test_identity_counts_all_that_matters_and_nothing_else() -> None:
    base, link = (
        compose_checked(),
        {"epoch": 1, "step": 9, "weights_sha256": "a", "identity": "b", "schedule": "stretch"},
    )
    assert "parent" not in base.to_dict()
    plain = base.identity()
    base.parent = Parent(run="outputs/train/one", config={}, **link)  # type: ignore[arg-type]
    assert base.identity() != plain
    for group, keys in NOT_IDENTITY.items():
        for key in keys:
            other = copy.deepcopy(base)
            setattr(getattr(other, group), key, "else")
            assert other.identity() == base.identity()
    for group, key in (
        ("model", "dropout"),
        ("data", "subset"),
        ("augment", "flip"),
        ("trainer", "ema"),
        ("parent", "step"),
    ):
        other = copy.deepcopy(base)
        setattr(getattr(other, group), key, 0.125)
        assert other.identity() != base.identity()
    other = copy.deepcopy(base)
    other.optimizer["lr"] = 0.125
    assert other.identity() != base.identity()


@pytest.mark.parametrize(
    ("group", "key", "now"),
    [
        ("data", "sampler", "balanced"),
        ("data", "draft", True),
        ("data", "eval_subset", 20),
        ("augment", "flips", "alternating"),
        ("augment", "padding_mode", "reflect"),
    ],
)
def test_a_record_without_a_later_key_means_what_there_was_before(group: str, key: str, now: Any) -> None:
    new = compose_checked("data=folder", "data.root=photos", f"{group}.{key}={now}").to_dict()
    old = copy.deepcopy(new)
    del old[group][key]
    before = read_config(old)
    assert getattr(getattr(before, group), key) != now
    assert before.identity() != read_config(new).identity()
    assert key not in result_keys(before.to_dict())[group]  # so the identity of the old record has not changed


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["model"].update(kernel=3), "model.kernel: no such key"),
        (lambda c: c["data"].pop("batch_size"), "data.batch_size is missing from the config"),
        (lambda c: c["optimizer"].update(lr="${oc.env:HOME}"), "may not contain an interpolation"),
        (lambda c: c["data"].update(root="${oc.env:HOME}"), "data.root=${oc.env:HOME}: a recorded config"),
        (
            lambda c: c["data"].update(mean=["${oc.env:HOME}", 1, 1]),
            "a recorded config may not contain an interpolation",
        ),
        (lambda c: c.update(model="zfnet"), "model"),
        (lambda c: c.update(optimizer=None), "optimizer"),
        (lambda c: c.update(optimizer=["a"]), "optimizer=['a']: must be a mapping of keys to values"),
        (
            lambda c: c.update(callbacks={"_target_": "a.B"}),
            "callbacks._target_: must be under a name of its own, as in callbacks",
        ),
        (
            lambda c: c.update(logger={"_target_": "a.B", "x": 1}),
            "logger._target_: must be under a name of its own, as in logger",
        ),
        (lambda c: c["data"].update(name="digits", train={}), "data.name=digits: no such data set; known: cifar10, ci"),
        (lambda c: c.update(seed="x"), "seed"),
        (lambda c: c.update(extra=1), "extra: no such key"),
    ],
)
def test_a_damaged_record_is_named(change, expected: str) -> None:
    plain = compose_checked().to_dict()
    change(plain)
    with pytest.raises(UserError) as caught:
        read_config(plain)
    assert expected in str(caught.value)


def test_a_data_set_without_files_has_no_root() -> None:
    with pytest.raises(UserError, match=r"data.root=x: data=shapes draws its images and reads no files"):
        compose("data=shapes", "+data.root=x")


def test_an_environment_variable_that_is_not_set_is_named(monkeypatch) -> None:
    monkeypatch.delenv("ZFNET_NONE", raising=False)
    with pytest.raises(UserError, match=r"^seed: .*Environment variable 'ZFNET_NONE' not found"):
        compose("seed=${oc.env:ZFNET_NONE}")


def test_flatten() -> None:
    nested = {"a": {"b": 1, "c": {"d": None}}, "e": [1, 2], "f": "x", "g": True}
    assert flatten(nested) == {"a.b": 1, "a.c.d": None, "e": [1, 2], "f": "x", "g": True}
