"""Compare attributions with autograd and captum, their axioms, and the known boxes of the objects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import resnet18

from tests.explain.networks import network, random_inputs
from tests.explain.trained import Trained
from tests.helpers import assert_full_precision, read_csv
from zfnet.analyses.attribution import GRAD_CAM, INTEGRATED, attribute, box_evidence
from zfnet.explain.boxes import in_boxes, share_in_boxes
from zfnet.explain.deconvnet import RULES
from zfnet.model import Network
from zfnet.runs.directory import RunDirectory

captum = pytest.importorskip("captum.attr")


def test_attribute_equals_a_plain_computation() -> None:
    model = network("no_pool").float()
    images, labels = random_inputs(model, 3).float(), torch.tensor([2, 0, 3])
    with assert_full_precision():
        result = attribute(model.chain, images, labels, "conv5", steps=60, batch_size=2)
    assert tuple(result.maps) == (*RULES, INTEGRATED, GRAD_CAM)
    assert result.maps["gradient"].shape == (3, 3, 32, 32)

    inputs = images.clone().requires_grad_()
    outputs = model.activations(inputs, ["conv5", "fc8"])
    chosen = outputs["fc8"][torch.arange(3), labels]
    gradient, towards_maps = torch.autograd.grad(chosen.sum(), [inputs, outputs["conv5"]])
    torch.testing.assert_close(result.maps["gradient"], gradient, rtol=1e-4, atol=1e-6)
    cam = (towards_maps.mean((2, 3), keepdim=True) * outputs["conv5"]).sum(1, keepdim=True).relu()
    captums = captum.LayerGradCam(model, model.relu5).attribute(images, labels, relu_attributions=True)
    torch.testing.assert_close(captums, cam, rtol=1e-4, atol=1e-6)
    expected = F.interpolate(cam, size=(32, 32), mode="bilinear").detach()
    torch.testing.assert_close(result.maps[GRAD_CAM], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(result.output, chosen.detach())
    points = {"n_steps": 60, "method": "riemann_middle"}
    captums = captum.IntegratedGradients(model).attribute(images, torch.zeros_like(images), labels, **points)
    torch.testing.assert_close(captums, result.maps[INTEGRATED], rtol=1e-4, atol=1e-6)
    # completeness (Sundararajan et al. 2017)
    total = result.maps[INTEGRATED].sum((1, 2, 3))
    torch.testing.assert_close(total, result.output - result.baseline_output, rtol=0.02, atol=0.02)


def test_attribute_of_a_residual_network_equals_captum() -> None:
    torch.manual_seed(0)
    model = resnet18(num_classes=4).eval()
    images, labels = torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 3])
    result = attribute(Network(model, 32), images, labels, "layer2", steps=6, batch_size=2, deconvnet=False)
    assert tuple(result.maps) == ("gradient", INTEGRATED, GRAD_CAM)
    gradient = captum.Saliency(model).attribute(images, labels, abs=False)
    torch.testing.assert_close(result.maps["gradient"], gradient, rtol=1e-4, atol=1e-5)
    points = {"n_steps": 6, "method": "riemann_middle"}
    captums = captum.IntegratedGradients(model).attribute(images, torch.zeros_like(images), labels, **points)
    torch.testing.assert_close(result.maps[INTEGRATED], captums.float(), rtol=1e-3, atol=1e-4)
    cam = captum.LayerGradCam(model, model.layer2).attribute(images, labels, relu_attributions=True)
    expected = F.interpolate(cam, size=(32, 32), mode="bilinear").detach()
    torch.testing.assert_close(result.maps[GRAD_CAM], expected, rtol=1e-4, atol=1e-5)


def test_share_in_boxes() -> None:
    maps = torch.zeros(2, 3, 8, 8)
    maps[0, 0, 1, 1], maps[0, 2, 6, 6] = -3, 1
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 8.0, 4.0]])
    shares = share_in_boxes(maps, boxes)
    assert shares[0].tolist() == [0.75, 0.75]
    assert shares[1].isnan().all()
    assert in_boxes(torch.arange(8) + 0.5, boxes).float().mean((1, 2)).tolist() == [0.25, 0.5]


def test_attribute_points_at_the_object(trained: Trained) -> None:
    images, labels, boxes = trained.correctly_classified(24)
    result = attribute(trained.model.chain, images, labels, "conv5", steps=16, batch_size=256)
    other = attribute(trained.model.chain, images[:2], (labels[:2] + 1) % 10, "conv5", steps=1, batch_size=2)
    assert (result.correct.tolist(), other.correct.tolist()) == ([True] * 24, [False] * 2)
    evidence = box_evidence(result.maps, boxes)
    for method in ("gradient", "guided", INTEGRATED):  # Grad-CAM's maps have only 3×3 cells here, which is too coarse
        assert evidence[method]["difference"]["low"] > 0, method
    centre = 1 - torch.linspace(-1, 1, 64).square()
    prior = box_evidence({"centre": (centre[:, None] * centre).expand(24, 1, -1, -1)}, boxes)["centre"]
    area = in_boxes(torch.arange(64) + 0.5, boxes).float().mean()
    assert prior["own"]["mean"] > area  # area is no baseline: this map ignores the image
    assert abs(prior["difference"]["mean"]) < 0.01


@pytest.mark.drawn
def test_attribution_writes_its_maps(run_py, tiny_run: RunDirectory) -> None:
    answer = run_py(
        "job=attribution", f"run={tiny_run.folder}", "job.count=2", "job.boxed_images=5", "job.steps=8",
        "job.split=test", "hydra.run.dir=out", "trainer.threads=1",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    rows = read_csv(Path("out/attribution.csv"))
    assert [r["method"] for r in rows[::2]] == [*RULES, INTEGRATED, GRAD_CAM]
    evidence = json.loads(Path("out/boxes.json").read_text())
    assert list(evidence) == [*RULES, INTEGRATED, GRAD_CAM]
    assert all(row["difference"]["n"] == 5 for row in evidence.values())
    maps = load_file("out/maps.safetensors")
    for row in rows:
        assert 0 < float(row["box_area"]) < 1
    assert float(rows[0]["sum"]) == pytest.approx(float(maps["deconvnet"][0].sum()), rel=1e-4)
    assert Image.open("out/figures/attribution.png").width > 1000
