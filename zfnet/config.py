"""What a config may say: the schema behind the YAML files, its ranges, and its checked form.

The values live in `conf/`; here are their types, their ranges and their meaning. `read_config` turns what
Hydra composed into these classes, or raises a UserError that names the key. Nothing below this file sees
an unchecked value.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Optional, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from zfnet.errors import UserError, did_you_mean
from zfnet.geometry import feature_sizes
from zfnet.job_settings import JOBS, job_class


def _limits(
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    return field(metadata={"low": low, "high": high, "above": above, "below": below})


def _one_of(*choices: Any) -> Any:
    return field(metadata={"choices": choices})


@dataclass
class Conv:
    """One convolution layer: `channels` maps of kernel_size × kernel_size filters, ReLU, perhaps 3×3/2 pooling."""

    channels: int = _limits(low=1)
    kernel_size: int = _limits(low=1)
    stride: int = _limits(low=1)
    padding: int = _limits(low=0)
    pool: bool = False


@dataclass
class Linear:
    """One fully connected layer with ReLU and dropout."""

    features: int = _limits(low=1)


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

    name: str = _one_of("cifar10", "cifar100", "folder", "shapes")
    root: Optional[str]
    image_size: int = _limits(low=1, high=4096)
    batch_size: int = _limits(low=1)
    validation: float = _limits(low=0)
    split_seed: int = _limits(low=0)
    subset: Optional[int] = _limits(low=1)
    mean: list[float]
    std: list[float]
    crop_size: Optional[int] = _limits(low=1)
    store_size: Optional[int] = _limits(low=1, high=4096)
    fit: str = _one_of("crop", "stretch")
    on_error: str = _one_of("stop", "skip")
    cache_dir: Optional[str]
    device_memory: float = _limits(low=0, high=1)
    train_images: Optional[int] = _limits(low=10)
    test_images: Optional[int] = _limits(low=10)


@dataclass(kw_only=True)
class AugmentConfig:
    """Random changes of training images, in stored pixels. `flip` is a probability."""

    name: str
    crop_padding: int = _limits(low=0)
    flip: float = _limits(low=0, high=1)
    cutout: int = _limits(low=0)


@dataclass(kw_only=True)
class TrainerConfig:
    """How the loop runs. `auto` values are decided by the hardware (`zfnet/training/device.py`)."""

    name: str
    epochs: int = _limits(low=1)
    device: str
    precision: str = _one_of("auto", "fp32", "bf16")
    channels_last: bool | str = _one_of(True, False, "auto")
    compile: bool | str = _one_of(True, False, "auto")
    deterministic: bool
    threads: Optional[int] = _limits(low=1)
    accumulate: int = _limits(low=1)
    clip_norm: Optional[float] = _limits(above=0)
    label_smoothing: float = _limits(low=0, below=1)
    ema: Optional[float] = _limits(above=0, below=1)
    monitor: str = _one_of("validation_loss", "train_loss")
    test_each_epoch: bool
    log_every: int = _limits(low=1)
    checkpoint_minutes: float = _limits(above=0)
    tensorboard: bool


@dataclass(kw_only=True)
class Config:
    """A whole run. Two runs with equal identity compute the same thing."""

    job: Any  # one of the classes in `zfnet/job_settings.py`
    model: ModelConfig
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    data: DataConfig
    augment: AugmentConfig
    trainer: TrainerConfig
    seed: int = _limits(low=0, high=2**63 - 1)
    run: Optional[str] = None
    images: Any = None  # None or a list of files, folders, patterns and addresses

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain dicts, lists and numbers."""
        return dataclasses.asdict(self)

    def identity(self) -> str:
        """Return a hash of everything that the result depends on (not where data lies or what is logged)."""
        facts = self.to_dict()
        del facts["job"], facts["run"], facts["images"]
        for group, keys in NOT_IDENTITY.items():
            for key in keys:
                del facts[group][key]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# Keys that change neither the weights nor the figures of a run.
NOT_IDENTITY = {
    "data": ("root", "cache_dir", "device_memory"),
    "trainer": ("name", "log_every", "checkpoint_minutes", "tensorboard"),
}


T = TypeVar("T")


def read_config(raw: DictConfig | dict[str, Any]) -> Config:
    """Return the typed and checked form of a composed config; raise UserError naming the first bad key."""
    config = read_part(Config, raw)
    kind = job_class(config.job)
    if kind is None:
        raise UserError(f"job={config.job}: no such job; known: {', '.join(JOBS)}")
    config.job = read_part(kind, config.job, "job")
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
    _check_ranges(part, dot)
    return part


def _refuse_interpolation(node: Any, key: str) -> None:
    """`${…}` can read environment variables; a recorded config holds values only."""
    if isinstance(node, str) and "${" in node:
        raise UserError(f"{key}={node}: a recorded config may not contain an interpolation")
    if isinstance(node, (dict, list)):
        for name, value in node.items() if isinstance(node, dict) else enumerate(node):
            _refuse_interpolation(value, f"{key}.{name}" if key else str(name))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _unknown_key(error: OmegaConfBaseException) -> str:
    full_key = str(error.full_key or error.key)
    known: list[str] = []
    if dataclasses.is_dataclass(error.object_type):
        known = [f.name for f in dataclasses.fields(error.object_type)]
    return f"{full_key}: no such key{did_you_mean(str(error.key), known)}"


def _check_ranges(node: Any, prefix: str) -> None:
    """Walk the dataclasses and compare each value with the limits beside its field."""
    for f in dataclasses.fields(node):
        value, key, rule = getattr(node, f.name), prefix + f.name, f.metadata
        if dataclasses.is_dataclass(value):
            _check_ranges(value, key + ".")
        if value is None or not rule:
            continue
        if "choices" in rule:
            if not any(value is c or (isinstance(value, str) and value == c) for c in rule["choices"]):
                options = ", ".join(
                    str(c).lower() if isinstance(c, bool) else str(c) for c in rule["choices"]
                )
                raise UserError(f"{key}={value}: must be one of {options}")
            continue
        if not _finite(value):
            raise UserError(f"{key}={value}: must be a finite number")
        for bound, wrong, words in (
            ("low", lambda v, b: v < b, "at least"),
            ("high", lambda v, b: v > b, "at most"),
            ("above", lambda v, b: v <= b, "greater than"),
            ("below", lambda v, b: v >= b, "less than"),
        ):
            if rule.get(bound) is not None and wrong(value, rule[bound]):
                raise UserError(f"{key}={value}: must be {words} {rule[bound]:g}")


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < float("inf")


def _check_together(config: Config) -> None:
    """Checks that concern more than one key."""
    data, trainer = config.data, config.trainer
    feature_sizes(config.model, data.image_size)
    for key in ("mean", "std"):
        values = getattr(data, key)
        if len(values) != 3 or not all(_finite(v) for v in values):
            raise UserError(
                f"data.{key}={values}: must be three numbers, one for each of red, green and blue"
            )
    if min(data.std) <= 0:
        raise UserError(f"data.std={data.std}: must be greater than 0")
    if data.name == "folder" and not data.root:
        raise UserError(
            "data.root is not set: name the folder that holds train/ and test/, as in data.root=photos"
        )
    if data.batch_size % trainer.accumulate:
        raise UserError(
            f"trainer.accumulate={trainer.accumulate}: must divide data.batch_size={data.batch_size} without remainder"
        )
    if config.data.validation == 0 and trainer.monitor == "validation_loss":
        raise UserError(
            "data.validation=0 leaves no images for trainer.monitor=validation_loss: "
            "hold some out, or set trainer.monitor=train_loss"
        )
    name = trainer.device.split(":")[0]
    if name not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"trainer.device={trainer.device}: must be one of auto, cpu, cuda, cuda:N, mps")
