"""job=import: write a run directory for a network trained elsewhere, for all jobs except trainings and evolution.

It reads safetensors, state dicts that `torch.load(weights_only=True)` accepts, and ONNX graphs. None of these can run
code. Names and sizes are compared with the network before memory is allocated.
"""

import hashlib
import os
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Optional

import torch
from safetensors import SafetensorError
from torch import Tensor

from zfnet.config.errors import UserError, did_you_mean, log, one_line
from zfnet.config.schema import Config, FolderData, Job, model_name
from zfnet.data import preprocess
from zfnet.data.images import class_name
from zfnet.jobs.export import TOLERANCE
from zfnet.model.build import build_model, read_tensors
from zfnet.model.onnx_graph import read_onnx
from zfnet.model.zfnet import ZFNet
from zfnet.runs.provenance import describe_environment
from zfnet.runs.session import own_directory
from zfnet.runs.weights import ModelMetadata, load_model, network_with, save_model
from zfnet.training.loaded import PREPROCESSING

PUBLISHED = ("alexnet", "vgg11")  # torchvision's, with weights that were trained on ImageNet
_BATCH_SIZE = 64  # for jobs on the imported run
_IMAGENET = 1000
_COMPARED_IMAGES = 3  # random images for the comparison with onnxruntime


# a network's settings, its weights (those of the last layer at the end) and the side of its images in pixels
_Found = tuple[Any, dict[str, Tensor], int]


@dataclass(kw_only=True)
class ImportJob(Job):
    """Import a network; conf/job/import.yaml describes the settings."""

    classes: Optional[str]
    channels: Literal["rgb", "bgr"]

    def main(self, config: Config, output: Path) -> None:
        """Write a run directory with the network that `source=…` names. Raises UserError."""
        if config.source is None:
            raise UserError(f"job=import needs source=…: {', '.join(PUBLISHED)} or a file, as in source=zfnet512.onnx")
        path = _published(config.source) if config.source in PUBLISHED else Path(os.path.expanduser(config.source))
        if not path.is_file():
            raise UserError(f"source={config.source}: there is no such file{did_you_mean(config.source, PUBLISHED)}")
        kind = path.suffix.lower()
        if kind == ".safetensors" and "zfnet" in _read(path)[0]:  # this program wrote it, with all metadata
            for key, override in config.overridden.items():
                if key.partition(".")[0] in ("experiment", "model", "data") or key in ("job.classes", "job.channels"):
                    raise UserError(f"{override}: {path.name} records its network, classes and data; leave it out")
            model, metadata = load_model(path, config.imports)
            compared = None
        else:
            settings, state, size = _onnx(path, config) if kind == ".onnx" else _state_dict(path, config)
            last = next(reversed(state.values()), torch.tensor(0))
            if not last.ndim:
                raise UserError(f"{path}: its weights do not show the number of classes")
            data, names = _data_config(config, size), _class_names(self.classes, len(last))
            metadata = ModelMetadata(settings, names, data, data.store_size or data.image_size)
            model = network_with(path, metadata, state, config.imports).eval()
            compared = _compare(path, model, data) if kind == ".onnx" else None
            if self.channels == "bgr":
                first = next((p for p in model.parameters() if p.ndim == 4), torch.empty(0, 0))
                if first.shape[1] != 3:
                    raise UserError("job.channels=bgr: the network has no first convolution of three channels to flip")
                first.data = first.data.flip(1).contiguous()
        config = replace(config, model=metadata.model, data=metadata.data)
        with own_directory(config, output) as run:
            if compared is not None:
                log.info(compared)
            digest = save_model(run.weights, model, metadata)
            origin = {"source": config.source, "file": path.name, "file_sha256": _sha256(path)}
            environment = describe_environment(torch.device("cpu"), config.trainer.name, config.imports)
            run.write_json("environment.json", {**environment, "imported": origin})
            run.write_json("results.json", {"validation": None, "test": None, "weights_sha256": digest, **origin})
            count = sum(p.numel() for p in model.parameters())
            log.info("%s, %s parameters, %s classes", model_name(metadata.model), f"{count:,}", len(metadata.classes))
            log.info("use it as run=%s", run.folder)


def _data_config(config: Config, image_size: int) -> FolderData:
    """Return the data config: the preprocessing of torchvision's evaluation, except for keys that the command sets."""
    base: dict[str, Any] = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_size": image_size,
        "store_size": round(image_size * 256 / 224),
        "batch_size": _BATCH_SIZE,
        "validation": 0.1,
    }
    keys, given = (*PREPROCESSING, "batch_size", "validation", "root"), config.overridden
    base |= {key: getattr(config.data, key) for key in keys if "data" in given or f"data.{key}" in given}
    base["image_size"] = image_size
    return FolderData(name="folder", split_seed=config.data.split_seed, **base)


def _class_names(file: str | None, count: int) -> tuple[str, ...]:
    """Return the class names: from a text file, one per line, if given; else ImageNet's for 1,000; else numbers."""
    if file is None:
        imagenet = _weights("alexnet").meta["categories"] if count == _IMAGENET else range(count)
        return tuple(class_name(str(name)) for name in imagenet)
    try:
        names = Path(os.path.expanduser(file)).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"job.classes={file}: cannot be read as text ({error})") from error
    names = [class_name(name.strip()) for name in names if name.strip()]
    if len(names) != count or len(set(names)) != count:
        raise UserError(f"job.classes={file}: has {len(set(names))} different names; the network has {count} outputs")
    return tuple(names)


# ---- files of weights


def _weights(name: str) -> Any:
    from torchvision.models import get_model_weights  # takes half a second

    return get_model_weights(name).DEFAULT


def _published(name: str) -> Path:
    """Return the file of torchvision's weights, downloaded if it is not cached, after checking its hash."""
    url = str(_weights(name).url)
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    prefix = path.stem.rpartition("-")[2]  # the first digits of its SHA-256
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), prefix)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"source={name}: {url} could not be downloaded ({one_line(error)}): fetch it elsewhere and "
                f"put it at {path}"
            ) from error
    if not _sha256(path).startswith(prefix):
        raise UserError(f"{path} is damaged or another file: its SHA-256 must begin with {prefix}; delete it")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata, which only safetensors have, and the tensors of a weights file."""
    if path.suffix.lower() == ".safetensors":
        try:
            return read_tensors(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{path} is not a file of weights, or is damaged ({error})") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # PyTorch raises many errors for a damaged file, and advises unsafe loading
        raise UserError(
            f"{path} is damaged, or contains more than torch.save(model.state_dict()) writes: tensors by name"
        ) from error
    for key in ("state_dict", "model"):  # a checkpoint has its state dict here
        content = content[key] if isinstance(content, dict) and isinstance(content.get(key), dict) else content
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path} is not a state dict (tensors by name)")
    return {}, {str(key): value for key, value in content.items()}


def _state_dict(path: Path, config: Config) -> _Found:
    """Return a file's weights and their network: a torchvision network if the weights fit it, else the config's."""
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in _read(path)[1].items()}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    chosen = any(key.split(".")[0] == "model" for key in config.overridden)
    for name in () if chosen else PUBLISHED:
        settings = {"_target_": f"torchvision.models.{name}"}
        own = _empty_state(settings, 224)
        body = list(own)[:-2]  # without the last layer's weight and bias
        if own.keys() == state.keys() and all(state[key].shape == own[key].shape for key in body):
            return settings, {key: state[key] for key in own}, 224
    if not isinstance(config.model, dict):
        state = ZFNet.translate_names(state)
    order = _empty_state(config.model, config.data.image_size, config.imports)
    for key in order:
        if key not in state:
            names, model = ", ".join([*state][:4]), model_name(config.model)
            raise UserError(f"{path}: has no {key}, which model={model} needs; it has {names}…")
    others = {key: value for key, value in state.items() if key not in order}  # refused later, by name
    # find the last layer by its shapes, which depend on the number of classes; it can be anywhere in the file
    more = _empty_state(config.model, config.data.image_size, config.imports, classes=11)
    head = [key for key in order if key in more and order[key].shape != more[key].shape]
    head = head or [key for key in order if order[key].ndim]
    ordered = {key: state[key] for key in sorted(order, key=head.__contains__)}
    return config.model, others | ordered, config.data.image_size


def _empty_state(model: Any, image_size: int, imports: Sequence[str] = (), classes: int = 10) -> Mapping[str, Tensor]:
    """Return a network's state dict on `meta`: names and shapes without memory."""
    with torch.device("meta"):
        state: Mapping[str, Tensor] = build_model(model, classes, image_size, imports, probe=False).state_dict()
    return state


# ---- ONNX


def _onnx(path: Path, config: Config) -> _Found:
    layers, state, image_size = read_onnx(path, config.data.image_size)
    for name, value in state.items():
        if value.numel() > 1 and name.endswith(".weight") and value.min() == value.max():
            log.warning("%s: all values of %s are equal: the file contains no trained weights", path, name)
            break
    return {"_target_": "zfnet.model.onnx_graph.Sequence", "layers": layers}, state, image_size


@torch.no_grad()
def _compare(path: Path, model: torch.nn.Module, data: FolderData) -> str:
    """Compare probabilities or logits with onnxruntime's on random images; return a message.

    Raises UserError if they differ by more than TOLERANCE, relative to the largest output if that is above 1.
    """
    try:
        import onnxruntime
    except ImportError:
        return "onnxruntime is not installed, so the outputs are not compared with the file's"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        largest, generator = 0.0, torch.Generator().manual_seed(0)
        for _ in range(_COMPARED_IMAGES):
            pixels = torch.randint(0, 256, (1, data.image_size, data.image_size, 3), generator=generator)
            images = preprocess(pixels.to(torch.uint8), replace(data, crop_size=None), channels_last=False)
            theirs = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
            logits = model(images)
            ours = min((logits, logits.softmax(1)), key=lambda values: float((values - theirs).abs().max()))
            largest = max(largest, float((ours - theirs).abs().max()) / max(1.0, float(theirs.abs().max())))
    except Exception as error:  # onnxruntime can raise anything
        raise UserError(f"{path}: onnxruntime cannot run it ({one_line(error)})") from error
    if not largest <= TOLERANCE:
        raise UserError(f"{path}: this network's outputs differ from onnxruntime's by {largest:.3g}")
    return f"outputs within {largest:.1e} of onnxruntime's"
