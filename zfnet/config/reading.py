"""Read a composed config or a record as a checked `Config`, and files of unknown origin as plain values.

YAML and JSON are read with limits on size, depth and digits: a kilobyte of YAML can expand to gigabytes (aliases of
aliases), and a number of a million digits takes minutes to parse. Files within the limits are read quickly; other files
raise ValueError.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zfnet.config.errors import UserError, did_you_mean, one_line
from zfnet.config.instantiate import resolve
from zfnet.config.schema import DATA, NO_ROOT, Config, DataConfig, Job, ModelConfig, check, flatten

MOST_BYTES = 64 * 2**20
_MAX_YAML_BYTES = 2**20
_MAX_VALUES = 100_000  # in a YAML file with its aliases expanded
_MAX_DEPTH = 50
_MAX_DIGITS = 100
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the C loader is ten times as fast
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def refuse_pipe(path: Path) -> None:
    """Raise ValueError for a path that exists and is not a file, because opening a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """Return a file's content; raise ValueError if it is larger than `most` bytes, OSError if it cannot be read."""
    refuse_pipe(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return content


def read_yaml(path: Path) -> Any:
    """Load a YAML file and refuse Python's own tags; raise OSError, ValueError or yaml.YAMLError."""
    loader, node = parse_yaml(path)
    try:
        return None if node is None else loader.construct_document(node)
    except (LookupError, AttributeError, TypeError) as error:  # PyYAML raises these for `!!int ""`
        raise ValueError(f"it contains a value that does not match its tag ({type(error).__name__})") from error


def parse_yaml(path: Path) -> tuple[Any, yaml.Node | None]:
    """Return a file's loader and root node; raise OSError, yaml.YAMLError, or ValueError if it exceeds a limit."""
    loader = _LOADER(read_bytes(path, _MAX_YAML_BYTES))
    try:
        node = loader.get_single_node()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if node is not None:
        _check_nodes(node)
    return loader, node


def read_json(path: Path) -> Any:
    """Load a JSON file; raise OSError or ValueError."""
    return parse_json(read_bytes(path))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise ValueError if it is invalid, exceeds a limit or has the same key twice in an object."""
    try:
        value = json.loads(text, object_pairs_hook=_object_with_unique_keys, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [value]
    for _ in range(_MAX_DEPTH):
        nested = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, (dict, list))]
        level = [child for children in nested for child in children]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _check_nodes(root: yaml.Node) -> None:
    """Raise ValueError if a document is too large, before its construction expands aliases and merges."""
    count, waiting = 0, [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > _MAX_VALUES:
            raise ValueError(f"it contains more than {_MAX_VALUES:,} values")
        if depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(node, yaml.ScalarNode):
            if node.tag in _NUMBERS and len(node.value) > _MAX_DIGITS:
                raise ValueError(f"a number has more than {_MAX_DIGITS} digits")
        elif isinstance(node, yaml.MappingNode):
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(names) > len(set(names)):
                raise ValueError(f"it contains {Counter(names).most_common(1)[0][0]!r:.80} twice")
            waiting += [(child, depth + 1) for pair in node.value for child in pair]
        else:
            waiting += [(child, depth + 1) for child in node.value]


def _object_with_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"it contains {name!r:.80} twice")
        made[name] = value
    return made


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has more than {_MAX_DIGITS} digits")
    return int(digits)


# -- configs


def read_config(raw: DictConfig | dict[str, Any], imports: Sequence[str] = ()) -> Config:
    """Return a composed config or a record as a checked `Config`; raise UserError that names the bad key.

    imports: the packages that this command trusts; the `imports` in `raw` have no effect
    """
    plain = _plain(raw)
    for key in ("images", "runs"):
        if isinstance(plain.get(key), str):
            plain[key] = [plain[key]]
    for key in ("callbacks", "logger"):
        if isinstance(plain.get(key), dict) and "_target_" in plain[key]:
            raise UserError(f"{key}._target_: must be under a name of its own, as in {key}: {{mine: {{_target_: …}}}}")
    config = check(Config, upgrade(plain) | {"imports": list(imports)}, "")
    settings = config.job if isinstance(config.job, dict) else {"name": str(config.job)}
    if "_target_" in settings:
        job_class = resolve("job", settings["_target_"], Job, imports)
        config.job = check(job_class, {k: v for k, v in settings.items() if k != "_target_"}, "job")
    else:  # in a record, only the job's name is used
        config.job = Job(name=str(settings.get("name")))
    if not isinstance(config.model, dict):
        raise UserError(f"model={config.model}: must be a mapping of keys to values")
    if "_target_" not in config.model:
        config.model = check(ModelConfig, config.model, "model")
    config.data = read_data(config.data)
    _check_combinations(config)
    return config


def read_data(plain: Any) -> DataConfig:
    """Return the checked settings of a data set; raise UserError."""
    name = plain.get("name") if isinstance(plain, dict) else plain
    if name not in DATA:
        problem = f"data.name={name}: no such data set{did_you_mean(str(name), DATA)}"
        if isinstance(plain, dict) and "train" in plain:
            problem += "; a data set of your own must keep name: dataset"
        raise UserError(problem)
    return check(DATA[name], plain, "data")


def _plain(raw: DictConfig | dict[str, Any]) -> dict[str, Any]:
    if isinstance(raw, DictConfig):
        try:
            composed: Any = OmegaConf.to_container(raw, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            reason = one_line(error).rpartition("resolving interpolation: ")[2].strip('"')
            raise UserError(f"{error.full_key or 'config'}: {reason}") from error
        return dict(composed)
    refuse_interpolation(raw)
    return dict(raw)


def refuse_interpolation(plain: Mapping[str, Any]) -> None:
    """Raise UserError if a record contains `${…}`: a record of unknown origin could read environment variables."""
    for key, value in flatten(plain).items():
        if "${" in str(value):
            raise UserError(f"{key}={value}: a recorded config may not contain an interpolation")


# Earlier versions had a single class for all data sets and recorded these keys for every data set.
_OLD_DATA_KEYS = ("root", "store_size", "fit", "on_error", "cache_dir", "train_images", "test_images")


def upgrade(plain: dict[str, Any]) -> dict[str, Any]:
    """Convert a record of an earlier version to the format of this version; return other records unchanged."""
    trainer, data = plain.get("trainer"), plain.get("data")
    if not isinstance(trainer, dict) or not isinstance(data, dict) or "loss" in plain:
        return plain
    trainer = dict(trainer)
    loss = {"_target_": "torch.nn.CrossEntropyLoss", "label_smoothing": trainer.pop("label_smoothing", 0.0)}
    tensorboard = {"tensorboard": {"_target_": "zfnet.training.loggers.TensorBoardLogger"}}
    logger = tensorboard if trainer.pop("tensorboard", False) else {}
    return {**plain, "trainer": trainer, "loss": loss, "logger": logger, "data": upgrade_data(data)}


def upgrade_data(data: dict[str, Any]) -> dict[str, Any]:
    """Return a data set's settings without the keys of other data sets, which earlier versions recorded too."""
    if data.get("name") not in DATA:
        return data
    known = {f.name for f in dataclasses.fields(DATA[data["name"]])}
    old = [k for k in _OLD_DATA_KEYS if k not in known or (data.get(k) is None and k.endswith("_images"))]
    return {k: v for k, v in data.items() if k not in old}


def _check_combinations(config: Config) -> None:
    """Check keys against each other; raise UserError."""
    data, trainer = config.data, config.trainer
    if data.name == "folder" and not data.root and config.job.trains:  # other jobs can run without images
        raise UserError(NO_ROOT)
    if data.sampler == "balanced" and config.loss.get("weight") == "balanced":
        raise UserError("data.sampler=balanced and loss.weight=balanced: both balance uneven classes; choose one")
    if data.name == "shapes" and data.root:
        raise UserError(
            f"data.root={data.root}: data=shapes draws its images and reads no files; choose data=folder for your own"
        )
    if data.crop_size and data.store_size and data.crop_size > data.store_size:
        raise UserError(f"data.crop_size={data.crop_size}: must be at most data.store_size={data.store_size}")
    if data.batch_size % trainer.accumulate:
        raise UserError(
            f"trainer.accumulate={trainer.accumulate}: must divide data.batch_size={data.batch_size} without remainder"
        )
    if data.validation == 0 and data.name not in ("folder", "dataset") and config.monitored == "validation_loss":
        raise UserError(
            "data.validation=0 leaves no images for trainer.monitor=validation_loss: "
            "hold some out, or set trainer.monitor=train_loss"
        )
    for key in ("snapshots", "checkpoint_epochs"):
        epochs = getattr(trainer, key)
        if not all(epoch <= trainer.epochs for epoch in epochs):
            raise UserError(f"trainer.{key}={epochs}: epochs are counted from 1 to trainer.epochs={trainer.epochs}")
    if config.parent is not None:
        if config.parent.epoch >= trainer.epochs:
            begins = f"{config.parent.epoch}, the epoch after which the run begins"
            raise UserError(f"trainer.epochs={trainer.epochs}: must be more than {begins}")
        try:
            read_config(config.parent.config)
        except UserError as error:
            raise UserError(f"parent.config: {error}") from error
