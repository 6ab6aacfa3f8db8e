"""Reading ONNX files: the layers of a chain, and graphs and files that raise UserError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import compose
from tests.model.graphs import CONV, WEIGHTS, write_onnx
from zfnet.config.errors import UserError
from zfnet.model.build import build_model
from zfnet.model.chain import Chain
from zfnet.model.onnx_graph import MOST_WEIGHTS, read_onnx

SEQUENCE = "zfnet.model.onnx_graph.Sequence"


def test_the_structure_of_the_zoos_zfnet512() -> None:
    """`onnx` contains its graph with constants in place of weights, which need no memory."""
    onnx = pytest.importorskip("onnx")
    path = Path(onnx.__file__).parent / "backend/test/data/light/light_zfnet512.onnx"
    layers, state, size = read_onnx(path, 64)
    assert size == 224
    assert sum(value.numel() for value in state.values()) == 87_250_536
    with torch.device("meta"):
        chain = Chain(build_model({"_target_": SEQUENCE, "layers": layers}, 1000, 224), 224)
    assert chain.layers == ["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8"]
    shapes = {step.name: list(step.output_shape) for step in chain.steps}
    assert [shapes[f"pool{n}"] for n in (1, 2, 3)] == [[96, 54, 54], [256, 12, 12], [512, 6, 6]]
    assert next(layer for layer in layers if layer["name"] == "norm1")["alpha"] == pytest.approx(1e-4)  # α of the sum


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([CONV, ("Elu", [], {})], r"has the operation Elu .*; known: Conv, Gemm"),
        ([CONV, ("LRN", [], {"size": 4})], "LRN .*: size=4: must be odd"),
        ([CONV, ("Relu", [], {})], r"outputs \[1, 6, 10, 10\] for an image"),
        ([("Conv", ["w"], {"pads": [9000] * 4})], r"padding=\[9000, 9000\]: must be numbers within bounds"),
        ([("Conv", ["w"], {"pads": [4000] * 4})], r"outputs \[1, 6, 8017, 8017\] for an image: too large"),
        ([("Conv", ["w"], {"auto_pad": "SAME_UPPER"})], "Conv .*auto_pad=SAME_UPPER"),
        ([("Conv", ["w"], {"pads": [0, 0, 1, 1]})], r"Conv .*pads=\[0, 0, 1, 1\]: differ"),
        ([("Conv", ["v"], {})], r"Conv \(y0\) cannot be read: .*channel"),
        ([("Conv", ["nothing"], {})], "Conv .*nothing is not a constant"),
        ([CONV, ("LRN", [], {"size": 0})], "LRN .* cannot be read"),
        ([("MaxPool", [], {"kernel_shape": [30, 30]})], "MaxPool .* cannot be read"),
        ([("Relu", [], {}), ("Softmax", [], {}), ("Relu", [], {})], "Softmax .*must be the last"),
        ([("Reshape", ["s2"], {})], r"Reshape .*shape=\[3, -1\]: must flatten"),
        ([("Flatten", [], {})], "is not a chain from its input to its output"),
    ],
)
def test_onnx_graphs_of_other_kinds_are_refused(tmp_path: Path, nodes: list[Any], message: str) -> None:
    path = write_onnx(tmp_path / "x.onnx", *nodes, weights=WEIGHTS | {"s2": np.array([3, -1])})
    config = compose("job=import", f"source={path}")
    with pytest.raises(UserError, match=message):
        config.job.main(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_onnx_files_cannot_claim_memory_or_other_peoples_files(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    (tmp_path / "a").mkdir()
    path = write_onnx(tmp_path / "a/x.onnx", CONV, weights=WEIGHTS)
    model = onnx.load(path)
    secret = tmp_path / "secret"
    secret.write_bytes(WEIGHTS["w"].tobytes())
    (tmp_path / "a/link").symlink_to(secret)
    for place in ("../secret", str(secret), "link", "nowhere"):
        tensor = model.graph.initializer[0]
        tensor.raw_data = b""
        onnx.external_data_helper.set_external_data(tensor, place)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(UserError, match=r"not in a file next to x\.onnx"):
            read_onnx(path, 19)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.array([MOST_WEIGHTS, 3, 1, 1]), "shape"))
    model.graph.node.insert(0, onnx.helper.make_node("ConstantOfShape", ["shape"], ["w"]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="more than 536,870,912 weights are not read"):
        read_onnx(path, 19)
