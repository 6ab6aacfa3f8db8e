"""Write small ONNX files for tests: chains of layers with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest


def write_onnx(path: Path, *nodes: Any, weights: dict[str, np.ndarray] | None = None, **values: Any) -> Path:
    """Write an ONNX file; a node is (operation, names of further inputs after the first, attributes)."""
    onnx = pytest.importorskip("onnx")
    made, at = [], "x"
    for number, (kind, inputs, attributes) in enumerate(nodes):
        output = f"y{number}"
        made.append(onnx.helper.make_node(kind, [at, *inputs], [output], **attributes))
        at = output
    size = values.get("size", 19)
    ends = [
        onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in (("x", [1, 3, size, size]), (at, None))
    ]
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    content = onnx.helper.make_graph(made, "g", ends[:1], ends[1:], tensors)
    onnx.save(onnx.helper.make_model(content, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def random_weights(*shape: int) -> np.ndarray:
    return (np.random.default_rng(len(shape)).standard_normal(shape) / 4).astype(np.float32)


CONV = ("Conv", ["w", "b"], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]})
WEIGHTS = {
    "w": random_weights(6, 3, 3, 3),
    "b": random_weights(6),
    "v": random_weights(9, 2, 3, 3),
    "m": random_weights(81, 5),
}
WEIGHTS |= {"c": random_weights(5), "s": np.array([0, -1])}
NODES = (
    CONV,
    ("Relu", [], {}),
    ("LRN", [], {"size": 3, "alpha": 0.5, "beta": 0.6, "bias": 1.5}),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("Conv", ["v"], {"group": 3}),
    ("Dropout", [], {}),
    ("Reshape", ["s"], {}),
    ("Gemm", ["m", "c"], {}),
    ("Softmax", [], {}),
)
