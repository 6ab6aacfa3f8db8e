"""What a config may say: the schema behind the YAML files, its ranges, and its checked form.

The values live in `conf/`; here are their types, their ranges and their meaning. `read_config` turns what
Hydra composed into these classes, or raises a UserError that names the key. Nothing below this file sees
an unchecked value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Optional, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from zfnet.config.errors import UserError, did_you_mean
from zfnet.config.ranges import check_ranges, check_types, is_finite, limits, one_of


@dataclass
class Conv:
    """One convolution layer: `channels` maps of kernel_size × kernel_size filters, ReLU, perhaps 3×3/2 pooling."""

    channels: int = limits(low=1)
    kernel_size: int = limits(low=1)
    stride: int = limits(low=1)
    padding: int = limits(low=0)
    pool: bool = False


@dataclass
class Linear:
    """One fully connected layer with ReLU and dropout."""

    features: int = limits(low=1)


def _conv(*values: Any) -> Any:
    return field(default_factory=lambda: Conv(*values))


def _linear(features: int) -> Any:
    return field(default_factory=lambda: Linear(features))


@dataclass
class ModelConfig:
    """The network (paper, Fig. 3). The defaults are the blog's; a null layer is left out (paper, Table 3)."""

    name: str = "zfnet"
    conv1: Conv = _conv(96, 7, 2, 1, True)
    conv2: Conv = _conv(256, 5, 2, 0, True)
    conv3: Optional[Conv] = _conv(384, 3, 1, 1, False)
    conv4: Optional[Conv] = _conv(384, 3, 1, 1, False)
    conv5: Conv = _conv(256, 3, 1, 1, True)
    fc6: Optional[Linear] = _linear(4096)
    fc7: Optional[Linear] = _linear(4096)
    dropout: float = field(default=0.5, metadata={"low": 0.0, "below": 1.0})
    norm: str = field(default="none", metadata={"choices": ("none", "lrn", "batch")})
    pooling: str = field(default="pad", metadata={"choices": ("pad", "ceil")})
    init: str = field(default="default", metadata={"choices": ("default", "normal", "he")})
    rms_limit: Optional[float] = field(default=None, metadata={"above": 0.0})


@dataclass(kw_only=True)
class DataConfig:
    """Where images come from and how they become batches. `crop_size` is counted in stored pixels."""

    name: str = one_of("cifar10", "cifar100", "folder", "shapes")
    root: Optional[str]
    image_size: int = limits(low=1, high=4096)
    batch_size: int = limits(low=1, high=10_000_000)
    validation: float = limits(low=0)
    split_seed: int = limits(low=0)
    subset: Optional[int] = limits(low=1)
    mean: list[float]
    std: list[float]
    crop_size: Optional[int] = limits(low=1)
    store_size: Optional[int] = limits(low=1, high=4096)
    fit: str = one_of("crop", "stretch")
    on_error: str = one_of("stop", "skip")
    cache_dir: Optional[str]
    device_memory: float = limits(low=0, high=1)
    train_images: Optional[int] = limits(low=10)
    test_images: Optional[int] = limits(low=10)


@dataclass(kw_only=True)
class AugmentConfig:
    """Random changes of training images, in stored pixels. `flip` is a probability."""

    name: str
    crop_padding: int = limits(low=0)
    flip: float = limits(low=0, high=1)
    cutout: int = limits(low=0)


@dataclass(kw_only=True)
class TrainerConfig:
    """How the loop runs. `auto` values are decided by the hardware (`zfnet/training/device.py`)."""

    name: str
    epochs: int = limits(low=1, high=1_000_000)
    device: str
    devices: int = field(default=1, metadata={"low": 1, "high": 1024})
    gradients: str = field(default="fp32", metadata={"choices": ("fp32", "bf16")})
    precision: str = one_of("auto", "fp32", "bf16")
    channels_last: bool | str = one_of(True, False, "auto")
    compile: bool | str = one_of(True, False, "auto")
    deterministic: bool
    threads: Optional[int] = limits(low=1, high=512)
    accumulate: int = limits(low=1)
    clip_norm: Optional[float] = limits(above=0)
    label_smoothing: float = limits(low=0, below=1)
    ema: Optional[float] = limits(above=0, below=1)
    monitor: str = one_of("validation_loss", "train_loss")
    test_each_epoch: bool
    log_every: int = limits(low=1)
    checkpoint_minutes: float = limits(above=0)
    tensorboard: bool
    profile: bool = False  # devices, gradients, profile and snapshots are missing from the oldest records
    snapshots: list[int] = field(default_factory=list)


@dataclass(kw_only=True)
class Job:
    """What a command does: its settings are the fields of a subclass, and `main` does it.

    reads_run: whether it reads a run directory (`run=<dir>`): needed, optional or refused
    reads_images: whether it reads image files (`images=[…]`)
    """

    reads_run: ClassVar[str] = "refused"
    reads_images: ClassVar[bool] = False

    name: str

    def main(self, config: Config, output: Path) -> float | None:
        """Do the job; `output` is the directory that Hydra made for it. Returns what a sweep may optimise."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Config:
    """A whole run. Two runs with equal identity compute the same thing."""

    job: Any  # a Job
    model: ModelConfig
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    data: DataConfig
    augment: AugmentConfig
    trainer: TrainerConfig
    seed: int = limits(low=0, high=2**63 - 1)
    run: Optional[str] = None
    images: Any = None  # None or a list of files, folders, patterns and addresses
    overrides: list[str] = field(
        default_factory=list
    )  # the command line's, of the command at work; not recorded

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain dicts, lists and numbers."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "overrides"}

    def identity(self) -> str:
        """Return a hash of everything that the result depends on (not where data lies or what is logged)."""
        return hashlib.sha256(json.dumps(metadata(self.to_dict()), sort_keys=True).encode()).hexdigest()


# Keys that change neither the weights nor the figures of a run.
NOT_IDENTITY = {
    "data": ("root", "cache_dir", "device_memory"),
    "trainer": ("name", "devices", "log_every", "checkpoint_minutes", "tensorboard", "profile", "snapshots"),
}


def metadata(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config (as plain dicts) that the result depends on."""
    return {
        group: {k: v for k, v in value.items() if k not in NOT_IDENTITY.get(group, ())}
        if isinstance(value, Mapping)
        else value
        for group, value in plain.items()
        if group not in ("job", "run", "images")
    }


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as dotted keys and values; an empty or null part is a value."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


T = TypeVar("T")


def read_config(raw: DictConfig | dict[str, Any]) -> Config:
    """Return the typed and checked form of a composed config; raise UserError naming the first bad key."""
    config = read_part(Config, raw)
    settings = dict(config.job) if isinstance(config.job, dict) else {}
    target = settings.pop("_target_", None)
    if target is None:  # a record
        config.job = Job(name=str(settings.get("name")))
    else:
        config.job = read_part(job_class(target), settings, "job")
    if isinstance(config.images, str):
        config.images = [config.images]
    if config.images is not None and not (
        isinstance(config.images, list) and all(isinstance(i, str) for i in config.images)
    ):
        raise UserError(f"images={config.images}: must be a list of files, as in 'images=[cat.jpg,photos/]'")
    _check_together(config)
    return config


def read_part(schema: type[T], raw: Any, prefix: str = "") -> T:
    """Return one group of a config (or all of it) as its class, with types and ranges checked."""
    dot = f"{prefix}." if prefix else ""
    try:
        if isinstance(raw, DictConfig):
            plain = OmegaConf.to_container(raw, resolve=True)
        else:  # from a file, perhaps a stranger's
            plain = raw
            if not isinstance(plain, dict):
                raise UserError(f"{prefix or 'config'}: must hold keys and values, not {plain!r:.40}")
            _refuse_interpolation(plain, prefix)
        check_types(schema, plain, dot)  # type: ignore[arg-type]
        typed = OmegaConf.merge(OmegaConf.structured(schema), plain)
        missing = sorted(OmegaConf.missing_keys(typed))
        if missing:
            raise UserError(
                f"{dot}{missing[0]} is missing from the config: give it a value, as in {dot}{missing[0]}=…"
            )
        part = OmegaConf.to_object(typed)
    except ConfigKeyError as error:
        raise UserError(f"{dot}{_unknown_key(error)}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{dot}{error.full_key or 'config'}: {_first_line(error)}") from error
    assert isinstance(part, schema)
    check_ranges(part, dot)
    return part


def job_class(target: Any) -> type[Job]:
    """Return the class of a job; raise UserError where there is none."""
    module, _, name = str(target).rpartition(".")
    if not module.startswith("zfnet."):
        raise UserError(f"job._target_={target}: must name a job")
    found: type[Job] = getattr(importlib.import_module(module), name)
    return found


def _refuse_interpolation(node: Any, key: str) -> None:
    """`${…}` can read environment variables; a recorded config holds values only."""
    if isinstance(node, str) and "${" in node:
        raise UserError(f"{key}={node}: a recorded config may not contain an interpolation")
    if isinstance(node, (dict, list)):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            _refuse_interpolation(value, f"{key}.{name}" if key else str(name))


def _first_line(error: Exception) -> str:
    line = str(error).strip().splitlines()[0]
    return re.sub(r"^\w+ raised while resolving interpolation: \"?(.*?)\"?$", r"\1", line)


def _unknown_key(error: OmegaConfBaseException) -> str:
    full_key = str(error.full_key or error.key)
    known: list[str] = []
    if dataclasses.is_dataclass(error.object_type):
        known = [f.name for f in dataclasses.fields(error.object_type)]
    return f"{full_key}: no such key{did_you_mean(str(error.key), known)}"


def _check_together(config: Config) -> None:
    """Checks that concern more than one key."""
    data, trainer = config.data, config.trainer
    for key in ("mean", "std"):
        values = getattr(data, key)
        if len(values) != 3 or not all(is_finite(v) for v in values):
            raise UserError(
                f"data.{key}={values}: must be three numbers, one for each of red, green and blue"
            )
    if min(data.std) <= 0:
        raise UserError(f"data.std={data.std}: must be greater than 0")
    if data.name == "folder" and not data.root:
        raise UserError(
            "data.root is not set: name the folder that holds train/ and test/, as in data.root=photos"
        )
    if data.name == "shapes" and data.root:
        raise UserError(
            f"data.root={data.root}: data=shapes draws its images and reads no files; choose data=folder for your own"
        )
    if data.batch_size % trainer.accumulate:
        raise UserError(
            f"trainer.accumulate={trainer.accumulate}: must divide data.batch_size={data.batch_size} without remainder"
        )
    if data.validation == 0 and data.name != "folder" and trainer.monitor == "validation_loss":
        raise UserError(
            "data.validation=0 leaves no images for trainer.monitor=validation_loss: "
            "hold some out, or set trainer.monitor=train_loss"
        )
    if trainer.devices > 1 and config.model.norm == "batch" and trainer.device == "cpu":
        raise UserError(
            "trainer.devices: batch normalisation over several processes needs GPUs; use trainer.devices=1 on a CPU"
        )
    if not all(1 <= epoch <= trainer.epochs for epoch in trainer.snapshots):
        raise UserError(
            f"trainer.snapshots={trainer.snapshots}: epochs are counted from 1 to trainer.epochs={trainer.epochs}"
        )
    name = trainer.device.split(":")[0]
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"trainer.device={trainer.device}: must be one of auto, cpu, cuda, cuda:N, mps")
