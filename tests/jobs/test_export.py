"""job=export: the files give the network's logits, at any batch size."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import TINY, compose, load_for_job, train_tiny_exact, train_without_figures
from zfnet import ZFNet
from zfnet.config.errors import UserError
from zfnet.jobs import export
from zfnet.runs.directory import RunDirectory


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A run whose network has the modules that a format could lack: contrast normalisation, pooling in ceil mode."""
    words = ("model.norm=lrn", "model.pooling=ceil")
    return train_tiny_exact(tmp_path_factory.mktemp("exported") / "run", *words)


def test_pt2_gives_the_networks_logits(run_py, exported: RunDirectory) -> None:
    answer = run_py("job=export", f"run={exported.folder}", "job.format=pt2", "trainer=exact", "hydra.run.dir=x")
    assert answer.code == 0, answer.err
    extra = {"zfnet.json": ""}
    program = torch.export.load("x/model.pt2", extra_files=extra)
    run = load_for_job(exported)
    assert json.loads(extra["zfnet.json"])["classes"] == list(run.classes)
    metadata = RunDirectory("x").read_json("model.json")
    assert metadata["weights_sha256"] == exported.read_json("results.json")["weights_sha256"]
    test = run.split("test")
    pixels = test.pixels(range(7)).numpy() / 255
    preprocessing = metadata["preprocessing"]
    images = torch.from_numpy(((pixels - preprocessing["mean"]) / preprocessing["std"]).astype(np.float32)).permute(
        0, 3, 1, 2
    )
    with torch.no_grad():
        expected = run.model(next(iter(run.batches(test).in_order())).images[:7])
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-5)


def test_onnx_gives_the_networks_logits(run_py, exported: RunDirectory) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    answer = run_py("job=export", f"run={exported.folder}", "job.format=onnx", "hydra.run.dir=x")
    assert answer.code == 0, answer.err
    assert "Warning" not in answer.err
    session = onnxruntime.InferenceSession("x/model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 64, 64]
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["zfnet"])
    run = load_for_job(exported)
    assert metadata["classes"] == list(run.classes)
    assert metadata["preprocessing"]["mean"] == [0.5, 0.5, 0.5]
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = run.model(images)
    logits = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_check_refuses_other_logits() -> None:
    model = ZFNet(10, 64, compose(*TINY).model).eval()
    with torch.no_grad():
        assert export.check(model, model, 64) == 0
        for wrong in (lambda x: model(x) + 1e-2, lambda x: model(x) * float("nan")):
            with pytest.raises(UserError, match="differ from the network's by"):
                export.check(model, wrong, 64)


class FixedBatch(nn.Sequential):
    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * 64 * 64, num_classes))
        self.token = nn.Parameter(torch.zeros(1, num_classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images) + self.token.expand(len(images), -1)


def test_export_says_how_a_network_takes_batches_of_any_size(run_py, tmp_path) -> None:
    model = {"_target_": f"{__name__}.FixedBatch"}
    run = train_without_figures(
        tmp_path / "r", replace(compose(*TINY, "trainer.epochs=1"), model=model, imports=["tests"])
    )
    answer = run_py("job=export", f"run={run.folder}", "job.format=pt2", "imports=[tests]", "hydra.run.dir=e")
    assert "torch.export cannot export FixedBatch for batches of any size: " in answer.error
    assert answer.error.endswith("; if forward uses len(images), use images.shape[0]")


def test_export_names_the_missing_extra(run_py, exported, tmp_path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    answer = run_py("job=export", f"run={exported.folder}")
    assert answer.code == 1
    assert answer.err == (
        "error: job.format=all needs onnxruntime: pip install -e '.[export]', or choose job.format=pt2\n"
    )
    assert not list(tmp_path.glob("outputs/*/*"))
