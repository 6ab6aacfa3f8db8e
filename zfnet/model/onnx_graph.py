"""Read an ONNX graph, written by another program, as a chain of PyTorch modules with weights.

Only the package `onnx` parses the file, and nothing in it is executed. The reader accepts only the operations in
`_READERS`, limits the sizes before it allocates memory, and reads external weights only from the file's own folder.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zfnet.config.errors import UserError, did_you_mean, one_line, printable
from zfnet.config.schema import LARGEST_SIDE
from zfnet.model.layers import LocalResponseNorm

MOST_WEIGHTS = 2**29  # 2 GiB in fp32, the limit of one ONNX file
_MODULES: dict[str, type[nn.Module]] = {
    m.__name__: m for m in (nn.Conv2d, nn.Linear, nn.ReLU, nn.MaxPool2d, LocalResponseNorm, nn.Dropout, nn.Flatten)
}
_SIZE_ARGUMENTS = ("kernel_size", "stride", "padding", "dilation")
_MAX_OUTPUT_VALUES = 2**28  # in a layer's output: 1 GiB in fp32


class Sequence(nn.Sequential):
    """A chain of modules built from plain settings, as an imported run records them.

    layers: for each module its name, its type (see `_MODULES`) and the numeric arguments of that type, as in
        `{name: conv1, type: Conv2d, in_channels: 3, out_channels: 96, kernel_size: [7, 7]}`

    Raises UserError for an unknown type, and for arguments that are not numbers or are too large.
    """

    def __init__(self, layers: list[dict[str, Any]]) -> None:
        super().__init__()
        for number, settings in enumerate(layers):
            settings = dict(settings)
            name, kind = str(settings.pop("name", "")), settings.pop("type", None)
            if kind not in _MODULES:
                raise UserError(f"model.layers[{number}].type={kind}: no such type{did_you_mean(str(kind), _MODULES)}")
            for key, value in settings.items():
                for v in value if isinstance(value, list) else [value]:
                    if not isinstance(v, (int, float)) or (key in _SIZE_ARGUMENTS and v > LARGEST_SIDE):
                        raise UserError(f"model.layers[{number}].{key}={value!s:.40}: must be numbers within bounds")
            arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
            self.add_module(name, _MODULES[kind](**arguments))


class _Reader:
    """Follows a graph from its input to its output, and adds each node to `layers` and `state`."""

    def __init__(self, path: Path, model: Any, image_size: int) -> None:
        import onnx

        self.path, self.onnx, self.graph = path, onnx, model.graph
        self.tensors = {t.name: t for t in self.graph.initializer}
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.layers: list[dict[str, Any]] = []
        self.state: dict[str, Tensor] = {}
        inputs = [i for i in self.graph.input if i.name not in self.tensors]
        if len(inputs) != 1 or len(self.graph.output) != 1:
            raise self.error(f"has {len(inputs)} inputs and {len(self.graph.output)} outputs; must have one of each")
        sides = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim]
        if len(sides) != 4 or sides[1] not in (0, 3) or sides[2] != sides[3]:
            raise self.error(
                f"its input {printable(inputs[0].name)} is {sides}; must be square RGB images [N, 3, S, S]"
            )
        self.image_size, self.at = sides[2] or image_size, inputs[0].name
        self.x = torch.empty((1, 3, self.image_size, self.image_size), device="meta")
        self.weights = 0

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.path}: {problem}")

    def follow(self) -> None:
        users: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                users.setdefault(name, []).append(node)
        end = self.graph.output[0].name
        for _ in self.graph.node:  # a chain has at most this many steps; a cyclic graph would loop forever
            if self.at == end:
                break
            if len(following := users.get(self.at, [])) != 1:
                raise self.error(f"{len(following)} operations read {printable(self.at)}; a chain has no branches")
            node = following[0]
            if node.domain not in ("", "ai.onnx") or node.op_type not in _READERS:
                raise self.error(
                    f"has the operation {printable(node.op_type)} ({printable(node.name or node.output[0])}); known: "
                    f"{', '.join(_READERS)}"
                )
            self.at = node.output[0]
            values = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
            try:
                _READERS[node.op_type](self, node, values)
            except (ArithmeticError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise self.error(f"{node.op_type} ({printable(self.at)}) cannot be read: {one_line(error)}") from error

    def add(self, name: str, kind: str, weights: Mapping[str, Tensor], **settings: Any) -> None:
        """Add a module, compute the shape of its output for one image, and record its weights."""
        plain = {k: list(v) if isinstance(v, (list, tuple)) else v for k, v in settings.items()}
        with torch.device("meta"):
            module = Sequence([{"name": "m", "type": kind, **plain}])[0].eval()
        own = {k: v.shape for k, v in module.state_dict().items()}
        if own != {k: v.shape for k, v in weights.items()}:
            raise ValueError(f"its weights are {_shapes(weights)}, must be {_shapes(module.state_dict())}")
        self.x = module(self.x)
        if self.x.numel() > _MAX_OUTPUT_VALUES:
            raise ValueError(f"outputs {list(self.x.shape)} for an image: too large")
        taken = {layer["name"] for layer in self.layers}
        number = next(n for n in range(1, len(taken) + 2) if f"{name}{n}" not in taken)
        if name in ("conv", "fc"):
            number = 1 + sum(layer["type"] in ("Conv2d", "Linear") for layer in self.layers)
        self.layers.append({"name": f"{name}{number}", "type": kind, **plain})
        self.state |= {f"{name}{number}.{key}": value for key, value in weights.items()}

    def constant(self, name: str) -> Tensor:
        """Return a constant of the graph; floating-point values as fp32."""
        maker = self.makers.get(name)
        if maker is None and name not in self.tensors:
            raise ValueError(f"{printable(name)} is not a constant")
        if maker is not None and maker.op_type == "ConstantOfShape":
            shape = [int(n) for n in self.constant(maker.input[0]).tolist()]
            self.count(shape)
            value = self.value(maker.attribute[0].t) if maker.attribute else torch.zeros(1)
            return value.float().reshape(()).expand(shape)
        if maker is not None and maker.op_type != "Constant":
            raise ValueError(f"{printable(name)} is computed by {printable(maker.op_type)}; must be a constant")
        return self.value(self.tensors[name] if maker is None else maker.attribute[0].t)

    def value(self, tensor: Any) -> Tensor:
        """Return a tensor from the file, or from an external file in the same folder."""
        self.count(tensor.dims)
        folder = os.path.realpath(self.path.parent)
        if tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            places = [entry.value for entry in tensor.external_data if entry.key == "location"]
            beside = os.path.realpath(os.path.join(folder, *places[:1]))
            if len(places) != 1 or os.path.dirname(beside) != folder or not os.path.isfile(beside):
                raise ValueError(f"its weights are in {printable(places)}, not in a file next to {self.path.name}")
        try:
            value = torch.from_numpy(self.onnx.numpy_helper.to_array(tensor, folder).copy())
        except Exception as error:  # onnx raises many kinds of errors for a damaged tensor
            raise ValueError(f"{printable(tensor.name)}: {error}") from error
        return value.float() if value.is_floating_point() else value

    def count(self, dims: Any) -> None:
        """Count the weights of a tensor before it is read; raise ValueError above MOST_WEIGHTS in total."""
        if any(d < 0 for d in dims) or (count := math.prod(dims)) + self.weights > MOST_WEIGHTS:
            raise ValueError(f"a weight is {list(dims)}: more than {MOST_WEIGHTS:,} weights are not read")
        self.weights += count


def _shapes(weights: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{k} {list(v.shape)}" for k, v in weights.items()) or "none"


def read_onnx(path: Path, image_size: int) -> tuple[list[dict[str, Any]], dict[str, Tensor], int]:
    """Return a graph as the settings of a `Sequence`, its weights, and the side of its images in pixels.

    A final softmax is dropped, so that the outputs are logits. Convolutions and linear layers are numbered as in the
    paper: conv1 … fc8. image_size: used if the file does not set it. Raises UserError, also if `onnx` is not installed.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise UserError(f"{path}: reading ONNX needs: pip install -e '.[export]'") from error
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (OSError, DecodeError, ValueError) as error:
        raise UserError(f"{path} is not an ONNX file, or is damaged ({one_line(error)})") from error
    reader = _Reader(path, model, image_size)
    reader.follow()
    if reader.at != model.graph.output[0].name or not any(
        layer["type"] in ("Conv2d", "Linear") for layer in reader.layers
    ):
        raise UserError(f"{path}: is not a chain from its input to its output with a convolution or a linear layer")
    if reader.x.ndim != 2:
        raise UserError(f"{path}: outputs {list(reader.x.shape)} for an image; must output one number for each class")
    return reader.layers, reader.state, reader.image_size


# ---- the operations


def _pads(reader: _Reader, values: Mapping[str, Any], is_pooling: bool = False) -> dict[str, Any]:
    """Return the settings of a window for PyTorch; raise ValueError if PyTorch has no equivalent."""
    if values.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise ValueError(f"auto_pad={values['auto_pad'].decode(errors='replace')}; must be NOTSET or VALID")
    kernel, strides = list(values["kernel_shape"]), list(values.get("strides", [1, 1]))
    dilations, pads = list(values.get("dilations", [1, 1])), list(values.get("pads", [0] * 4))
    first, last = pads[:2], pads[2:]
    settings: dict[str, Any] = {"kernel_size": kernel, "stride": strides, "padding": first}
    if dilations != [1, 1]:
        settings["dilation"] = dilations
    ceil = bool(values.get("ceil_mode", 0))
    if first != last and is_pooling and not ceil:  # some converters write Caffe's ceil mode as padding
        with_ceil = nn.MaxPool2d(tuple(kernel), tuple(strides), tuple(first), tuple(dilations), ceil_mode=True)
        wanted = [
            (n + a + b - d * (k - 1) - 1) // s + 1
            for n, a, b, k, s, d in zip(reader.x.shape[2:], first, last, kernel, strides, dilations, strict=True)
        ]
        ceil = list(with_ceil(reader.x).shape[2:]) == wanted
        first = last if ceil else first
    if first != last:
        raise ValueError(f"pads={pads}: differ between the sides")
    return settings | ({"ceil_mode": True} if ceil else {})


def _conv(reader: _Reader, node: Any, values: Mapping[str, Any]) -> None:
    weights = dict(zip(("weight", "bias"), map(reader.constant, node.input[1:]), strict=False))
    shape, groups = weights["weight"].shape, values.get("group", 1)
    settings = _pads(reader, {"kernel_shape": shape[2:], **values})
    more = ({"groups": groups} if groups != 1 else {}) | ({} if "bias" in weights else {"bias": False})
    reader.add("conv", "Conv2d", weights, in_channels=shape[1] * groups, out_channels=shape[0], **settings, **more)


def _gemm(reader: _Reader, node: Any, values: Mapping[str, Any]) -> None:
    if values.get("alpha", 1) != 1 or values.get("beta", 1) != 1 or values.get("transA", 0):
        raise ValueError("alpha, beta and transA must be 1, 1 and 0")
    weights = dict(zip(("weight", "bias"), map(reader.constant, node.input[1:]), strict=False))
    if not values.get("transB", 0):
        weights["weight"] = weights["weight"].T
    outputs, inputs = weights["weight"].shape
    bias = {} if "bias" in weights else {"bias": False}
    reader.add("fc", "Linear", weights, in_features=inputs, out_features=outputs, **bias)


def _lrn(reader: _Reader, node: Any, values: Mapping[str, Any]) -> None:
    size = values["size"]  # ONNX's α multiplies the mean over `size`, LocalResponseNorm's the sum
    settings = {"alpha": values.get("alpha", 1e-4) / size, "beta": values.get("beta", 0.75), "k": values.get("bias", 1)}
    reader.add("norm", "LocalResponseNorm", {}, size=size, **settings)


def _flatten(reader: _Reader, node: Any, values: Mapping[str, Any]) -> None:
    features = math.prod(reader.x.shape[1:])
    if node.op_type == "Reshape":
        shape = reader.constant(node.input[1]).tolist()
        if len(shape) != 2 or shape[0] not in (0, 1, -1) or shape[1] not in (features, -1):
            raise ValueError(f"shape={shape}: must flatten an image's {features} features")
    elif values.get("axis", 1) != 1:
        raise ValueError(f"axis={values['axis']}: must be 1")
    reader.add("flatten", "Flatten", {})


def _softmax(reader: _Reader, node: Any, values: Mapping[str, Any]) -> None:
    if reader.at != reader.graph.output[0].name:
        raise ValueError("must be the last operation")


_READERS: dict[str, Callable[[_Reader, Any, Mapping[str, Any]], None]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "LRN": _lrn,
    "Relu": lambda reader, *_: reader.add("relu", "ReLU", {}),
    "MaxPool": lambda reader, _, values: reader.add("pool", "MaxPool2d", {}, **_pads(reader, values, is_pooling=True)),
    "Flatten": _flatten,
    "Reshape": _flatten,
    "Dropout": lambda reader, *_: reader.add("dropout", "Dropout", {}),
    "Softmax": _softmax,
}
