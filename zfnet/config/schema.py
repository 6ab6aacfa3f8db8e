"""Classes of the config: the type and range of every key in the YAML files, checked by pydantic.

The values are in `conf/`, their types and meanings are here. A config that Hydra composed or a run recorded is checked
once, when it becomes an object of these classes, so no other code sees an unchecked value.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Optional, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from zfnet.config.errors import UserError, one_line, printable, schema_problem

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
LARGEST_SIDE = 4096
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]  # side of an image, in pixels
NO_ROOT = "data.root is not set: name the folder that contains train/ and test/, as in data.root=photos"
MAX_PIXELS = 89_478_485  # per image file: Pillow warns above this number; 256 MiB of RGB
Fraction = Annotated[float, Field(ge=0, le=1)]


def _check_amount(value: float) -> float:
    if value > 1 and value != int(value):
        raise ValueError("must be a fraction below 1, or a whole number of images")
    return value


Amount = Annotated[float, Field(ge=0), AfterValidator(_check_amount)]
Name = Annotated[str, Field(strict=False, coerce_numbers_to_str=True)]  # a folder or a layer can be named 2024
# red, green and blue as fractions of full scale; the range also allows other scales, such as 0 to 255
Colour = Annotated[list[Annotated[float, Field(ge=-1000, le=1000)]], Field(min_length=3, max_length=3)]


def _check_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[1-9]?\d)?", name):
        raise ValueError("must be one of auto, cpu, cuda, cuda:N, mps")
    return name


class Checked:
    """Base of dataclasses that pydantic checks strictly: no conversion of text to numbers, no unknown keys."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


@dataclass
class Conv(Checked):
    """A convolution layer with `channels` filters, ReLU and, if `pool`, 3×3 max pooling with stride 2."""

    channels: Positive
    kernel_size: Positive
    stride: Positive
    padding: NotNegative
    pool: bool = False


@dataclass
class Linear(Checked):
    """A fully connected layer with ReLU and dropout."""

    features: Positive


@dataclass
class ModelConfig(Checked):
    """ZFNet (paper, Fig. 3). The defaults are the blog's; a null layer is left out (paper, Table 3).

    width: factor on every layer's channels and features, except the number of classes
    """

    name: str = "zfnet"
    conv1: Conv = field(default_factory=lambda: Conv(96, 7, 2, 1, True))
    conv2: Conv = field(default_factory=lambda: Conv(256, 5, 2, 0, True))
    conv3: Optional[Conv] = field(default_factory=lambda: Conv(384, 3, 1, 1))
    conv4: Optional[Conv] = field(default_factory=lambda: Conv(384, 3, 1, 1))
    conv5: Conv = field(default_factory=lambda: Conv(256, 3, 1, 1, True))
    fc6: Optional[Linear] = field(default_factory=lambda: Linear(4096))
    fc7: Optional[Linear] = field(default_factory=lambda: Linear(4096))
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    norm: Literal["none", "lrn", "batch"] = "none"
    pooling: Literal["pad", "ceil"] = "pad"
    init: Literal["default", "normal", "he"] = "default"
    rms_limit: Optional[Annotated[float, Field(gt=0)]] = None
    width: Annotated[float, Field(gt=0, le=100)] = 1.0


@dataclass(kw_only=True)
class DataConfig(Checked):
    """Keys that all data sets share: how images become batches. `crop_size` is in stored pixels.

    sampler: `shuffle` takes each training image once an epoch; `balanced` takes each class equally often
    subset, eval_subset: largest number of training images, and of validation and test images each
    """

    name: str
    root: Optional[Name] = None
    image_size: Side
    batch_size: Annotated[int, Field(ge=1, le=10_000_000)]
    validation: Amount
    split_seed: NotNegative
    subset: Optional[Positive] = None
    eval_subset: Optional[Positive] = None
    mean: Colour
    std: Annotated[list[Annotated[float, Field(ge=1e-6, le=1e6)]], Field(min_length=3, max_length=3)]
    crop_size: Optional[Positive] = None
    device_memory: Fraction = 0.5
    store_size: Optional[Side] = None
    fit: Literal["crop", "stretch"] = "crop"
    max_pixels: Annotated[int, Field(ge=1, le=2**30)] = MAX_PIXELS
    draft: bool = False  # for earlier records, which do not have this key
    sampler: Literal["shuffle", "balanced"] = "shuffle"

    @property
    def title(self) -> str:
        """Name of the data set in messages."""
        return self.name


@dataclass(kw_only=True)
class CifarData(DataConfig):
    """CIFAR-10 or CIFAR-100; the files are downloaded if they are not in the folder `root`."""

    name: Literal["cifar10", "cifar100"]


@dataclass(kw_only=True)
class FolderData(DataConfig):
    """Images below the folder `root`, with one folder per class; Imagenette is downloaded there."""

    name: Literal["folder", "imagenette"]
    on_error: Literal["stop", "skip"] = "stop"
    cache_dir: Optional[Name] = None


@dataclass(kw_only=True)
class ShapesData(DataConfig):
    """The built-in images."""

    name: Literal["shapes"]
    train_images: Annotated[int, Field(ge=10)] = 6000
    test_images: Annotated[int, Field(ge=10)] = 2000


@dataclass(kw_only=True)
class DatasetData(DataConfig):
    """Your own `torch.utils.data.Dataset`s of (image, label); each part is a `_target_` with its arguments."""

    name: Literal["dataset"]
    train: dict[str, Any]
    val: Optional[dict[str, Any]] = None
    test: Optional[dict[str, Any]] = None
    classes: Optional[list[str]] = None

    @property
    def title(self) -> str:
        return printable(self.train.get("_target_")).rpartition(".")[2]  # a record can contain any text

    @property
    def parts(self) -> dict[str, dict[str, Any]]:
        """Settings of train, val and test by name, without those that are null."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: settings for name, settings in named.items() if settings is not None}


DATA: dict[str, type[DataConfig]] = {
    "cifar10": CifarData,
    "cifar100": CifarData,
    "folder": FolderData,
    "imagenette": FolderData,
    "shapes": ShapesData,
    "dataset": DatasetData,
}


@dataclass(kw_only=True)
class AugmentConfig(Checked):
    """Random changes of training images. Lengths are in stored pixels; `flip` is a probability.

    padding_mode: as in torchvision's `RandomCrop`: pad with the mean colour (`constant`) or mirrored pixels (`reflect`)
    flips: `random` draws again in each epoch; `alternating` draws once and inverts the draw in every second epoch
    transforms: further operations, in order, each a `_target_` with its arguments
    """

    name: str
    crop_padding: NotNegative = 0
    padding_mode: Literal["constant", "reflect"] = "constant"
    flip: Fraction = 0.0
    flips: Literal["random", "alternating"] = "random"
    cutout: NotNegative = 0
    transforms: list[dict[str, Any]] = field(default_factory=list)


@dataclass(kw_only=True)
class TrainerConfig(Checked):
    """Settings of the training loop. The hardware decides `auto` values.

    version: version of the loop's rules. In 2, the decay of `ema` grows, the lower loss decides between epochs of equal
        accuracy, and history.csv has the learning rate of the epoch's last step. In 1, the decay is constant, the
        earlier of these epochs wins, and history.csv has the learning rate of the next step.
    """

    name: str
    epochs: Annotated[int, Field(ge=1, le=1_000_000)]
    device: Annotated[str, AfterValidator(_check_device)]
    devices: Annotated[int, Field(ge=1, le=1024)] = 1
    gradients: Literal["fp32", "bf16"] = "fp32"
    precision: Literal["auto", "fp32", "bf16"]
    channels_last: bool | Literal["auto"]
    compile: bool | Literal["auto"]
    deterministic: bool
    threads: Optional[Annotated[int, Field(ge=1, le=512)]]
    accumulate: Positive
    clip_norm: Optional[Annotated[float, Field(gt=0)]]
    ema: Optional[Annotated[float, Field(gt=0, lt=1)]]
    monitor: Literal["validation_loss", "train_loss"]
    test_each_epoch: bool
    log_every: Positive
    checkpoint_minutes: Annotated[float, Field(gt=0)]
    version: Literal[1, 2] = 1  # 1 for the earliest records, which do not have this key
    profile: bool = False  # the oldest records do not have this key and those below
    snapshots: list[Positive] = field(default_factory=list)
    checkpoint_epochs: list[Positive] = field(default_factory=list)
    init_from: Optional[str] = None
    freeze: list[Name] = field(default_factory=list)
    compile_seconds: Annotated[float, Field(ge=0)] = 30
    compile_gain: Annotated[float, Field(gt=0, lt=1)] = 0.2


@dataclass(kw_only=True)
class Job(Checked):
    """Base of jobs, which commands run: the fields of a subclass are the job's settings, and `main` runs it.

    reads_run: whether the job reads a run directory (`run=<dir>`): needed, optional or refused
    reads_images: whether the job reads image files (`images=[…]`)
    trains: whether the job trains, so that all parts of the config must be valid; other jobs build only what they use
    """

    reads_run: ClassVar[str] = "refused"
    reads_images: ClassVar[bool] = False
    trains: ClassVar[bool] = False

    name: str

    def main(self, config: "Config", output: Path) -> float | None:
        """Run the job; `output` is the directory that Hydra made for it. Return the value that a sweep can optimise."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Parent(Checked):
    """Start of a branched run: the state of another run after epoch `epoch`, at its optimizer step `step`.

    run: the other run's directory at that time; config: its whole config, including its own parent
    identity, weights_sha256: hashes of that config and of the weights at that step
    schedule: how the learning rate continues
    threads, compiled: what the other run chose where its config left the choice open
    data_hash: hash of its images; None in earlier records
    """

    run: str
    epoch: Positive
    step: Positive
    weights_sha256: str
    identity: str
    schedule: Literal["stretch", "continue", "restart"]
    config: dict[str, Any]
    threads: Optional[Positive] = None
    compiled: Optional[bool] = None
    data_hash: Optional[str] = None


@dataclass(kw_only=True)
class Config(Checked):
    """Config of a whole run. Two runs with equal identity compute the same results.

    model: a ModelConfig, or the settings of another network: a `_target_` and its arguments
    loss, optimizer, scheduler: a `_target_` and its arguments
    logger, callbacks: each entry a `_target_` and its arguments
    parent: start of a run that job=extend or job=fork made; other runs do not record this key
    imports: packages, besides PyTorch, torchvision and zfnet, in which a `_target_` of this command can be
    overrides, composed: the current command's overrides and the config that Hydra composed from them; not recorded
    """

    job: Any
    model: Any
    data: Any
    augment: AugmentConfig
    loss: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    trainer: TrainerConfig
    logger: dict[str, dict[str, Any]] = field(default_factory=dict)
    callbacks: dict[str, dict[str, Any]] = field(default_factory=dict)
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    run: Optional[str] = None
    images: Optional[list[str]] = None
    runs: Optional[list[str]] = None
    source: Optional[str] = None
    parent: Optional[Parent] = None
    imports: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    composed: Any = field(default=None, repr=False)

    @property
    def overridden(self) -> dict[str, str]:
        """Keys and groups that the current command sets or removes, in that order, mapped to their overrides."""
        return {each.split("=", 1)[0].lstrip("+~"): each.lstrip("+") for each in self.overrides}

    @property
    def monitored(self) -> str | None:
        """The metric that a plateau schedule needs after each epoch; None for other schedules."""
        plateau = str(self.scheduler.get("_target_")).endswith("ReduceLROnPlateau")
        return self.trainer.monitor if plateau else None

    def to_dict(self) -> dict[str, Any]:
        """Return the config to record, as plain dicts, lists and numbers."""
        plain = dataclasses.asdict(dataclasses.replace(self, composed=None))  # asdict would copy it, which is slow
        # only job=compare records `runs`, only job=import `source`, and only a branched run `parent`
        omitted = ("overrides", "composed", *(key for key in ("runs", "source", "parent") if plain[key] is None))
        return {key: value for key, value in plain.items() if key not in omitted}

    def identity(self) -> str:
        """Return a hash of all keys that affect the results (so not of paths to data or of loggers).

        The hash does not cover the images: `Splits.difference` compares them with those that the run recorded.
        """
        return hashlib.sha256(json.dumps(result_keys(self.to_dict()), sort_keys=True).encode()).hexdigest()


# Keys that change neither the weights nor the metrics of a run.
NOT_IDENTITY: dict[str, tuple[str, ...]] = {
    "data": ("root", "cache_dir", "device_memory", "max_pixels"),
    # compile_seconds and compile_gain decide whether to compile; that decision is recorded instead
    "trainer": (
        *("name", "devices", "log_every", "checkpoint_minutes", "profile", "snapshots", "checkpoint_epochs"),
        *("compile_seconds", "compile_gain"),
    ),
    # the parent's identity represents its config
    "parent": ("run", "config", "threads", "compiled", "data_hash"),
}
_NOT_RESULT = ("job", "run", "images", "runs", "source", "imports", "logger")
# Keys that earlier versions did not record, each with the value that describes what those versions did.
_DEFAULTS_OF_OLD_RECORDS: dict[str, dict[str, Any]] = {
    "augment": {"flips": "random", "padding_mode": "constant"},
    "data": {"sampler": "shuffle", "draft": False, "eval_subset": None},
    "loss": {"weight": None},
    "model": {"width": 1.0},
    "trainer": {"version": 1},
}


def result_keys(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config (as plain dicts) that the result depends on."""
    data = plain.get("data")
    if isinstance(data, Mapping) and "on_error" in data:  # skipped files change the images' fingerprint
        plain = {**plain, "data": {**data, "on_error": "stop"}}
    return {
        group: {
            k: v
            for k, v in value.items()
            if k not in NOT_IDENTITY.get(group, ()) and (k, v) not in _DEFAULTS_OF_OLD_RECORDS.get(group, {}).items()
        }
        if isinstance(value, Mapping)
        else value
        for group, value in plain.items()
        if group not in _NOT_RESULT
    }


def model_name(model: ModelConfig | Mapping[str, Any]) -> str:
    """Return a network's name for tables and messages."""
    return model.name if isinstance(model, ModelConfig) else str(model["_target_"]).rpartition(".")[2]


def leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys and values of a nested config. Lists, empty mappings and nulls are values."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def flatten(node: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested config as dotted keys and values."""
    return dict(leaves(node))


def names_a_value(text: Any, config: Mapping[str, Any]) -> bool:
    """Return whether `text` is a single `${a.b}`, and `a.b` is a number, a short text or null, without interpolation.

    A reference to a mapping or a list could expand without bound.
    """
    if not isinstance(text, str) or not text.startswith("${") or not text.endswith("}"):
        return False
    value: Any = config
    for key in text[2:-1].split("."):  # not `flatten`, which would keep only one of two equal dotted keys
        value = value.get(key, "${") if isinstance(value, Mapping) else "${"
    return not isinstance(value, (list, dict)) and "${" not in str(value) and len(str(value)) <= 1000


T = TypeVar("T")
_adapter = functools.cache(TypeAdapter)  # making an adapter takes ten times as long as using it


def check(schema: type[T], plain: Any, prefix: str) -> T:
    """Return `plain` as an object of this class; raise UserError that names the first bad key and its value."""
    if not isinstance(plain, dict):
        raise UserError(f"{prefix}={plain!r:.40}: must be a mapping of keys to values")
    try:
        # validate JSON: pydantic is then strict about numbers and text, but still converts mappings to dataclasses
        return _adapter(schema).validate_json(json.dumps(plain, default=str))  # type: ignore[arg-type]
    except ValidationError as error:
        if not error.errors()[0]["loc"]:  # not valid JSON: a file name can contain bytes that are not text
            texts = {k: json.dumps([k, v], default=str, ensure_ascii=False) for k, v in flatten(plain).items()}
            odd = (k for k, text in texts.items() if text != text.encode(errors="replace").decode())
            if (key := next(odd, None)) is None:  # nested too deeply
                raise UserError(f"{prefix or 'config'}: {one_line(error.errors()[0]['msg'])}") from error
            key, advice = printable(f"{prefix}.{key}".lstrip(".")), "use a link to it with an ASCII name"
            raise UserError(f"{key}: contains bytes that are not valid UTF-8; {advice}") from error
        raise UserError(schema_problem(error, schema, plain, prefix)) from error
