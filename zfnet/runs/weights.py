"""Weights with the metadata to use them (model.safetensors), and `load_run` for notebooks and jobs.

Weights are safetensors with a JSON header. No pickle is read, so a file from elsewhere cannot run code.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from zfnet.config.errors import UserError, one_line, with_file_name
from zfnet.config.reading import parse_json, read_data, refuse_interpolation, upgrade_data
from zfnet.config.schema import LARGEST_SIDE, Config, DataConfig, ModelConfig, check, model_name
from zfnet.config.trust import CONF, imported_packages
from zfnet.data import preprocess
from zfnet.data.decode import UnreadableImage, fit_square
from zfnet.data.files import find_images, read_named
from zfnet.data.sources import to_image
from zfnet.model.build import build_model, check_logits, read_tensors, refuse_not_finite
from zfnet.model.zfnet import ZFNet
from zfnet.runs.command import compose_raw
from zfnet.runs.directory import RunDirectory, find_run, write_tensors

WEIGHTS_FORMAT = "zfnet-1"


@dataclass(frozen=True)
class ModelMetadata:
    """The metadata of a file of weights: the network's settings, its classes and its preprocessing."""

    model: ModelConfig | dict[str, Any]
    classes: tuple[str, ...]
    data: DataConfig
    stored_size: int
    format: str = WEIGHTS_FORMAT


def load_model(path: Path, imports: Sequence[str] = ()) -> tuple[Any, ModelMetadata]:
    """Rebuild a network from model.safetensors, in evaluation mode; raise UserError if this fails.

    The sizes that the file's header claims are compared with its tensors before memory is allocated. In a run's
    directory, the hash of the weights must be the one in results.json.

    imports: packages, besides PyTorch, torchvision and zfnet, in which the network's class can be
    """
    try:
        header, state = read_tensors(path)
        metadata = _metadata(path, parse_json(header["zfnet"]))
    except FileNotFoundError:
        raise UserError(f"{path}: there are no weights; did the run finish?") from None
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a file of ZFNet weights, or is damaged ({error})") from error
    except UserError as error:
        raise with_file_name(path, error) from error
    model = network_with(path, metadata, state, imports)
    if path.name == "model.safetensors":
        _compare_with_record(path, model)
    return model.eval(), metadata


def network_with(path: Path, metadata: ModelMetadata, state: dict[str, Tensor], imports: Sequence[str] = ()) -> Any:
    """Return the network that `metadata` describes with the weights of the file `path`; raise UserError.

    The sizes that the metadata claims are compared with the tensors before memory is allocated.
    """
    refuse_not_finite(path, state)
    try:
        model = _build(path, metadata, state, imports)
        _load(path, model, state)
    except UserError as error:
        raise with_file_name(path, error) from error
    return model


def _metadata(path: Path, header: dict[str, Any]) -> ModelMetadata:
    if header.pop("format") != WEIGHTS_FORMAT:
        raise UserError(f"{path} was written by another version of this program")
    refuse_interpolation(header)
    network, classes, stored_size = header["model"], header["classes"], header["stored_size"]
    if not isinstance(classes, list) or not classes:
        raise ValueError("its classes are not a list")
    if type(stored_size) is not int or not 1 <= stored_size <= LARGEST_SIDE:
        raise ValueError(f"stored_size={stored_size}: must be from 1 to {LARGEST_SIDE}")
    if len({str(c) for c in classes}) < len(classes):
        raise ValueError("it names a class twice")
    data = read_data(upgrade_data(header["data"]))
    if (data.crop_size or 0) > stored_size:
        raise ValueError(f"crop_size={data.crop_size}: is more than stored_size={stored_size}")
    is_own = isinstance(network, dict) and "_target_" in network
    return ModelMetadata(
        model=network if is_own else check(ModelConfig, network, "model"),
        data=data,
        classes=tuple(str(c) for c in classes),
        stored_size=stored_size,
    )


def _build(path: Path, metadata: ModelMetadata, state: Mapping[str, Tensor], imports: Sequence[str]) -> Any:
    """Return the network of a file, with its initial weights; raise UserError if the weights do not fit it."""
    settings, sizes = metadata.model, (len(metadata.classes), metadata.data.image_size, imports)
    trusted = isinstance(settings, dict) and str(settings["_target_"]).partition(".")[0] in imports
    weights = sum(value.numel() for value in state.values())
    if isinstance(settings, dict) and not trusted:  # a claim of many layers costs time rather than memory
        for key, value in settings.items():
            if _largest(value) > weights:
                raise UserError(f"{path}: model.{key}={value!s:.80}: is too large for a file with {weights:,} weights")
    try:
        try:
            with torch.device("meta"):  # shapes without memory
                empty = build_model(settings, *sizes, probe=False)
        except UserError as error:
            if trusted or not isinstance(error.__cause__, NotImplementedError):
                raise
            with _EmptyOnMeta():  # RegNet computes its widths with tensors, which need values
                empty = build_model(settings, *sizes, probe=False).to("meta")
        # load the tensors before the trial pass, which would be slow if the header claims many layers
        _load(path, empty, {name: value.to("meta") for name, value in state.items()})
        if not isinstance(empty, ZFNet):
            with torch.device("meta"):
                check_logits(empty, *sizes[:2])
    except (UserError, RuntimeError, OverflowError, TypeError) as error:
        if trusted:  # some classes fail on "meta"
            return build_model(settings, *sizes)
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: no such network ({one_line(error)})") from error
    return build_model(settings, *sizes, probe=False)


class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty`, which allocates every layer's weights, take no memory; other tensors keep their values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def _largest(value: Any) -> int:
    """Return the largest whole number in nested values, or 0."""
    if isinstance(value, (list, dict)):
        return max((_largest(v) for v in (value.values() if isinstance(value, dict) else value)), default=0)
    return value if isinstance(value, int) else 0


def _load(path: Path, model: Any, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    for name, value in (model.translate_names(state) if isinstance(model, ZFNet) else state).items():
        if name in own and value.dtype != own[name].dtype:
            raise UserError(f"{path}: its {name} is {value.dtype}, its network's is {own[name].dtype}")
    # batch norm's counters can be absent: old files do not have them, and PyTorch creates them
    absent = [name for name in own if name not in state and not name.endswith(".num_batches_tracked")]
    if absent and not isinstance(model, ZFNet):
        raise UserError(f"{path}: does not fit its network ({absent[0]} is missing)")
    try:
        getattr(model, "load_weights", model.load_state_dict)(state)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit its network ({one_line(error, -1)})") from error


def _compare_with_record(path: Path, model: nn.Module) -> None:
    """Raise UserError if results.json in the same folder was measured with other weights."""
    try:
        recorded = RunDirectory(path.parent).read_json("results.json")["weights_sha256"]
    except (UserError, KeyError, TypeError):
        return
    if recorded != weights_hash(model.state_dict()):
        raise UserError(
            f"{path} does not contain the weights that results.json was measured with: it was replaced or is damaged"
        )


def save_model(path: Path, model: nn.Module, metadata: ModelMetadata) -> str:
    """Write the weights with the metadata to rebuild the network; return the weights' hash."""
    # copy, because safetensors refuses tensors that share memory, such as layers with shared weights
    state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}
    write_tensors(path, state, {"zfnet": json.dumps(asdict(metadata))})
    return weights_hash(state)


@dataclass(frozen=True)
class TrainedRun:
    """A finished run, ready to use: `model` is in evaluation mode on the CPU."""

    run: RunDirectory
    config: Config
    model: Any  # a ZFNet, or a network of your own
    metadata: ModelMetadata

    @property
    def classes(self) -> tuple[str, ...]:
        return self.metadata.classes

    @property
    def results(self) -> dict[str, Any]:
        """The content of results.json."""
        return dict(self.run.read_json("results.json"))

    def inputs(self, *images: Any) -> Tensor:
        """Return images as input of the network: [N, 3, S, S], on its device.

        images: paths, web addresses, or PIL images, arrays and tensors in the formats of `data=dataset`
        Raises UserError for an image that cannot be read.
        """
        size, data = self.metadata.stored_size, self.metadata.data
        squares = [fit_square(self._read(image), size, data.fit).copy() for image in images]
        device = next(iter(self.model.parameters())).device
        return preprocess(torch.from_numpy(np.stack(squares)).to(device), data, channels_last=False)

    def _read(self, image: Any) -> Image.Image:
        try:
            if not isinstance(image, (str, Path)):
                return to_image(image)
            files, problems = find_images([str(image)])
            if len(files) != 1:
                raise UnreadableImage(problems.get(str(image), f"names {len(files)} images; give one"))
            data = self.metadata.data
            return read_named(files[0], data.max_pixels, self.metadata.stored_size * data.draft)
        except (UnreadableImage, OSError) as error:
            raise UserError(f"{image}: cannot be read as an image ({error})") from error
        except Exception as error:  # an object of an unknown type can raise any error
            raise UserError(
                f"a {type(image).__name__} cannot be read as an image ({one_line(error)}): give a path or address, a "
                "PIL image, a uint8 array [h, w, 3] or a tensor [3, h, w]"
            ) from error

    def predict(self, image: Any) -> dict[str, float]:
        """Return the probability of each class, the most probable one first; `inputs` describes the types of `image`.

            load_run("last").predict("cat.jpg")

        Raises UserError for an image that cannot be read.
        """
        with torch.no_grad():
            probabilities = self.model.eval()(self.inputs(image)).float().softmax(1)[0]
        values, order = probabilities.sort(descending=True, stable=True)
        return {self.classes[k]: value for k, value in zip(order.tolist(), values.tolist(), strict=True)}

    def __repr__(self) -> str:
        name, accuracy = model_name(self.metadata.model), recorded_accuracy(self.run)
        measured = "" if accuracy is None else f", {accuracy[0]} {accuracy[1]:.2%}"
        return f"<{self.run.folder}: {name} on {self.metadata.data.title}, {len(self.classes)} classes{measured}>"


def recorded_accuracy(run: RunDirectory) -> tuple[str, float] | None:
    """Return a split and its accuracy from results.json: validation, which compares runs, or else another split."""
    with contextlib.suppress(UserError):
        results: Any = run.read_json("results.json")
        for split in ("validation", "test", "train", "all"):
            metrics = results.get(split) if isinstance(results, dict) else None
            value = metrics.get("accuracy") if isinstance(metrics, dict) else None
            if isinstance(value, (int, float)) and math.isfinite(value):
                return split, float(value)
    return None


def load_run(folder: str | Path, imports: Sequence[str] | None = None) -> TrainedRun:
    """Load a run directory, or the newest finished run (`last`): its network with saved weights, classes and config.

        model = load_run("outputs/train/2026-01-31_12-00-00-000000").model

    imports: packages that the run's own network and classes may come from; None: those that `conf/` trusts

    Raises UserError if there is no finished run.
    """
    if isinstance(imports, str):
        raise UserError(f"imports={imports!r}: must be a list, as in [{imports!r}]")
    run = find_run(str(folder))
    if imports is None:
        imports = imported_packages(compose_raw([])) if CONF.is_dir() else ()
    model, metadata = load_model(run.weights, imports)
    return TrainedRun(run, run.read_config(imports), model, metadata)


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
