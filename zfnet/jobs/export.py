"""job=export: write a run's network as ONNX and torch.export files, and compare each with the network."""

import importlib.util
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from zfnet.config.errors import UserError, log, one_line, place_of
from zfnet.config.schema import Config, Job, model_name
from zfnet.runs.directory import write_atomically
from zfnet.runs.session import own_directory
from zfnet.runs.weights import weights_hash
from zfnet.training.loaded import LoadedRun

FORMATS = ("onnx", "pt2")
TOLERANCE = 1e-4  # relative to the largest logit; other kernels sum in another order
_BATCH_SIZES = (1, 2, 5)  # the network is traced with 2


@dataclass(kw_only=True)
class ExportJob(Job):
    reads_run: ClassVar[str] = "needed"

    format: Literal["onnx", "pt2", "all"]

    def main(self, config: Config, output: Path) -> None:
        """Write model.onnx, model.pt2 and model.json; raise UserError if a file's logits differ."""
        formats = FORMATS if self.format == "all" else (self.format,)
        missing = [m for m in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(m) is None]
        if "onnx" in formats and missing:
            raise UserError(
                f"job.format={self.format} needs {', '.join(missing)}: "
                "pip install -e '.[export]', or choose job.format=pt2"
            )
        loaded = LoadedRun(config)
        model = loaded.model.to(device="cpu", memory_format=torch.contiguous_format)
        metadata, size = describe(loaded), loaded.data.image_size
        embedded = json.dumps(metadata)
        with own_directory(config, output) as run, torch.no_grad():
            example = (torch.zeros(2, 3, size, size),)
            try:
                program = torch.export.export(model, example, dynamic_shapes=({0: Dim("batch", min=1)},))
            except Exception as error:  # PyTorch has no common class for them
                raise UserError(
                    f"torch.export cannot export {model_name(loaded.metadata.model)} for batches of any size: "
                    f"{one_line(error)}{place_of(error)}; if forward uses len(images), use images.shape[0]"
                ) from error
            for name in formats:
                path = run.folder / f"model.{name}"
                write_atomically(path, _WRITE[name](program, embedded))
                difference = metadata[f"largest_difference_{name}"] = check(model, _READ[name](path), size)
                megabytes = path.stat().st_size / 1e6
                log.info("%s: %.1f MB, within %.1e of the network's logits", path.name, megabytes, difference)
            run.write_json("model.json", metadata)
            log.info("model.json: classes and preprocessing")


def describe(loaded: LoadedRun) -> dict[str, Any]:
    """Return classes, input, output and preprocessing, for model.json and for the metadata of the files."""
    data, size = loaded.data, loaded.data.image_size
    return {
        "classes": list(loaded.classes),
        "input": {"name": "images", "shape": ["batch", 3, size, size], "type": "float32"},
        "output": {"name": "logits", "shape": ["batch", len(loaded.classes)], "type": "float32"},
        "preprocessing": {
            "channels": "RGB",
            "fit": data.fit,
            "stored_size": loaded.metadata.stored_size,
            "crop_size": data.crop_size or loaded.metadata.stored_size,
            "image_size": size,
            "mean": data.mean,
            "std": data.std,
            "steps": [
                "resize the image to a square of stored_size pixels, bilinear: `crop` keeps proportions and takes "
                "the centre, `stretch` does not",
                "take the central square of crop_size pixels and resize it to image_size, bilinear",
                "(pixel / 255 - mean) / std, for each channel",
            ],
        },
        "run": str(loaded.source.folder),
        "weights_sha256": weights_hash(loaded.model.state_dict()),
        "torch": torch.__version__,
    }


def check(model: nn.Module, exported: Callable[[Tensor], Tensor], side: int) -> float:
    """Return the largest difference between the logits of the two on random images, in batches of several sizes.

    Raises UserError if it is more than TOLERANCE of the largest logit.
    """
    generator, largest = torch.Generator().manual_seed(0), 0.0
    for count in _BATCH_SIZES:
        images = torch.randn(count, 3, side, side, generator=generator)
        expected, logits = model(images), exported(images)
        difference = (logits - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise UserError(f"the exported network's logits differ from the network's by {difference:.3g}")
        largest = max(largest, difference)
    return largest


def _onnx(program: ExportedProgram, metadata: str) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warnings are about the exporter's internals
        exported = torch.onnx.export(
            program,
            (),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: "batch"},),
            verbose=False,
        )
    assert exported is not None
    exported.model.metadata_props["zfnet"] = metadata
    return exported.model_proto.SerializeToString()


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnx
    import onnxruntime

    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _pt2(program: ExportedProgram, metadata: str) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={"zfnet.json": metadata})
    return content.getvalue()


_WRITE: dict[str, Callable[[ExportedProgram, str], bytes]] = {"onnx": _onnx, "pt2": _pt2}
_READ: dict[str, Callable[[Path], Callable[[Tensor], Tensor]]] = {
    "onnx": _read_onnx,
    "pt2": lambda path: torch.export.load(path).module(),
}
