"""The analyses of networks other than ZFNet: a custom network, and networks without a chain or without rules."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.helpers import TINY, compose, read_csv, train_without_figures
from zfnet import load_run
from zfnet.analyses.attribution import GRAD_CAM, INTEGRATED
from zfnet.analyses.notebook import occlusion
from zfnet.explain.deconvnet import RULES
from zfnet.runs.directory import RunDirectory


class Nested(nn.Module):
    """Nested blocks, one ReLU for all layers, and logits that are averages over positions, not a layer's output."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        stem = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.BatchNorm2d(8), relu, nn.MaxPool2d(3, 2))
        body = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), relu, nn.Dropout(0.2), nn.AvgPool2d(2))
        self.blocks = nn.Sequential(stem, body)
        self.head = nn.Sequential(nn.Conv2d(12, num_classes, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class Smooth(nn.Sequential):
    """A chain, but the deconvnet has no rule for its activation function."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Conv2d(3, 4, 5, 4), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 15 * 15, num_classes))


class Flat(nn.Sequential):
    """A chain without feature maps."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * 64 * 64, 8), nn.ReLU(), nn.Linear(8, num_classes))


class Own(nn.Module):
    """A convolution of one's own, which is no `nn.Conv2d`."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight, self.relu = nn.Parameter(torch.randn(num_classes, 3, 5, 5)), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(F.conv2d(x, self.weight, stride=4)).mean((2, 3))


class Normed(nn.Sequential):
    def __init__(self, num_classes: int, norm: Callable[[nn.Module], nn.Module] = parametrizations.weight_norm) -> None:
        super().__init__(norm(nn.Conv2d(3, 4, 5, 4)), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 15 * 15, num_classes))


class Hooked(Normed):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, nn.utils.weight_norm)


class Gated(nn.Module):
    """A submodule computes one number for each image, which multiplies the input of another module."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.ReLU())
        self.score = Score()
        self.head = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        return self.head(x.mean((2, 3)) * self.score(x)[:, None])


class Score(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2, 3)).sigmoid()


class Residual(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 5, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.conv(x))


def train_other(folder: Path, network: type[nn.Module], *words: str) -> RunDirectory:
    target = f"{network.__module__}.{network.__name__}"
    config = dataclasses.replace(compose(*TINY, *words), model={"_target_": target}, imports=["tests"])
    return train_without_figures(folder, config)


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return train_other(tmp_path_factory.mktemp("nested") / "run", Nested, "trainer.snapshots=[1,2]")


FIRST, SECOND, LAST = "blocks.0.0", "blocks.1.0", "head.0"


@pytest.mark.parametrize(
    ("words", "table", "layers"),
    [
        ("job=deconvnet job.top=2 job.maps=4 job.ablation=2", "top_activations.csv", {FIRST, SECOND, LAST}),
        ("job=evolution job.maps=2 job.probe_images=9", "strongest.csv", {FIRST, SECOND, LAST}),
        ("job=correspondence job.count=12 job.places=99", "correspondence.csv", {SECOND, LAST}),
        ("job=occlusion job.count=2 job.stride=12 job.boxed_images=3", "maps.csv", None),
        ("job=attribution job.count=2 job.steps=4 job.boxed_images=3", "attribution.csv", None),
        ("job=filters", "filters.csv", None),
    ],
)
@pytest.mark.usefixtures("laid_out")
def test_analysis_of_a_users_network(
    run_py, nested: RunDirectory, words: str, table: str, layers: set[str] | None
) -> None:
    answer = run_py(*words.split(), f"run={nested.folder}", "job.split=test", "imports=[tests]", "hydra.run.dir=out")
    assert answer.code == 0, answer.err
    rows = read_csv(Path("out") / table)
    assert rows
    if layers is not None:
        assert {row["layer"] for row in rows} == layers
    assert list(Path("out/figures").glob("*.png"))


def test_forced_choice_of_a_users_network_by_ours(run_py, nested: RunDirectory, tiny_run: RunDirectory) -> None:
    few = ("job.split=train", "job.maps=2", "job.references=2", "job.trials=2", "job.quiz=1", "imports=[tests]")
    answer = run_py("job=forced_choice", f"run={nested.folder}", f"job.other={tiny_run.folder}", *few)
    assert answer.code == 0, answer.err
    assert f"{FIRST}: " not in answer.out  # such a line would say that the layer is left out


def test_analysis_without_the_import_asks_for_it(run_py, nested: RunDirectory) -> None:
    answer = run_py("job=filters", f"run={nested.folder}", "hydra.run.dir=out")
    assert answer.code == 1
    assert "add imports=[tests]" in answer.err


@pytest.mark.usefixtures("laid_out")
def test_defaults_of_a_users_network(run_py, nested: RunDirectory) -> None:
    words = (f"run={nested.folder}", "job.split=test", "imports=[tests]")
    counts = ("job.count=1", "job.mean_images=2", "job.steps=3")
    answer = run_py("job=invariance", *words, *counts, "hydra.run.dir=a")
    assert answer.code == 0, answer.err
    assert json.loads(Path("a/invariance.json").read_text())["layers"] == [FIRST, SECOND]
    assert read_csv(Path("a/curves.csv"))
    assert list(Path("a/figures").glob("*.png"))
    answer = run_py("job=occlusion", *words, "job.layer=conv5", "hydra.run.dir=b")
    assert "job.layer=conv5: the network has no such convolution; known: blocks.0.0" in answer.err


def test_a_module_without_a_rule_is_refused_before_the_work(run_py, tmp_path: Path) -> None:
    run = train_other(tmp_path / "run", Smooth, "trainer.epochs=1")
    for job in ("deconvnet", "evolution", "verdict"):
        answer = run_py(f"job={job}", f"run={run.folder}", "imports=[tests]", "hydra.run.dir=out")
        assert "1 (SiLU): the deconvnet has no rule for it" in answer.error
        assert not Path("out").exists()
    assert run_py("job=filters", f"run={run.folder}", "imports=[tests]", "hydra.run.dir=out").code == 0
    words = ("job=attribution", "job.count=1", "job.steps=2", "job.boxed_images=2")
    answer = run_py(*words, f"run={run.folder}", "imports=[tests]", "hydra.run.dir=methods")
    assert "without the deconvnet and guided backpropagation: 1 (SiLU): the deconvnet has no rule for it" in answer.out
    assert {row["method"] for row in read_csv(Path("methods/attribution.csv"))} == {"gradient", INTEGRATED, GRAD_CAM}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("laid_out")
def test_analyses_of_networks_with_weight_norm_and_without_maps(run_py, tmp_path: Path) -> None:
    words = ("imports=[tests]", "job.split=test")
    few = ("job.top=2", "job.maps=3", "job.ablation=2", "job.atlas=false")
    run = train_other(tmp_path / "runs/normed", Normed, "trainer.epochs=1")
    answer = run_py("job=deconvnet", f"run={run.folder}", *words, *few, "hydra.run.dir=normed")
    assert answer.code == 0, answer.err
    assert set(json.loads(Path("normed/controls.json").read_text())) == {"0"}
    run = train_other(tmp_path / "runs/hooked", Hooked, "trainer.epochs=1")
    answer = run_py("job=deconvnet", f"run={run.folder}", *words, *few, "hydra.run.dir=hooked")
    assert "0: a hook computes its weights; use a norm of torch.nn.utils.parametrizations" in answer.error
    assert not Path("hooked").exists()
    run = train_other(tmp_path / "runs/flat", Flat, "trainer.epochs=1")
    few = ("job.count=1", "job.steps=2", "job.boxed_images=2")
    answer = run_py("job=attribution", f"run={run.folder}", *words, *few, "hydra.run.dir=flat")
    assert answer.code == 0, answer.err
    assert "without Grad-CAM: the network has no feature maps" in answer.out
    assert {row["method"] for row in read_csv(Path("flat/attribution.csv"))} == {*RULES, INTEGRATED}
    assert list(Path("flat/figures").glob("*.png"))


def test_a_residual_network_is_refused_by_name(run_py, tiny_run: RunDirectory, tmp_path: Path) -> None:
    run = train_other(tmp_path / "run", Residual, "trainer.epochs=1")
    for job in ("deconvnet", "evolution", "verdict"):
        answer = run_py(f"job={job}", f"run={run.folder}", "imports=[tests]", "hydra.run.dir=out")
        assert f"job={job}: Residual is not a chain of layers: the input of head.0" in answer.error
        assert not Path("out").exists()
    words = (f"run={tiny_run.folder}", f"job.other={run.folder}", "imports=[tests]")
    assert f"job.other={run.folder}: is not a chain of layers: the input" in run_py("job=forced_choice", *words).err
    assert run_py("job=evaluate", f"run={run.folder}", "imports=[tests]", "hydra.run.dir=out").code == 0


@pytest.mark.usefixtures("laid_out")
def test_analyses_of_a_residual_network(run_py, tmp_path: Path) -> None:
    """Jobs that only read the outputs of layers need no chain."""
    run = train_other(tmp_path / "run", Residual, "trainer.epochs=1")
    words = (f"run={run.folder}", "imports=[tests]", "job.split=test")

    def check(job: str, *more: str) -> str:
        answer = run_py(f"job={job}", *words, *more, f"hydra.run.dir={job}")
        assert answer.code == 0, answer.err
        assert list(Path(job, "figures").glob("*.png"))
        return answer.out

    out = check("attribution", "job.count=1", "job.steps=2", "job.boxed_images=2")
    assert "without the deconvnet and guided backpropagation: Residual is not a chain of layers: the input of" in out
    assert {row["method"] for row in read_csv(Path("attribution/attribution.csv"))} == {
        "gradient", INTEGRATED, GRAD_CAM
    }  # fmt: skip
    check("invariance", "job.count=1", "job.mean_images=2", "job.steps=3")
    assert json.loads(Path("invariance/invariance.json").read_text())["layers"] == ["stem", "head.1"]
    check("correspondence", "job.count=12", "job.places=99")
    assert {row["layer"] for row in read_csv(Path("correspondence/correspondence.csv"))} == {"conv", "head.1"}
    assert "stem: no activation function follows it directly as a module" in check("filters")
    assert len(read_csv(Path("filters/filters.csv"))) == 4
    Image.new("RGB", (64, 64), "red").save("red.png")
    assert occlusion(load_run(run.folder, imports=["tests"]), "red.png", layer="stem").activation.ndim == 2
    answer = run_py("job=attribution", *words, "job.layer=stern", "hydra.run.dir=other")
    assert "job.layer=stern: the network has no such layer of feature maps; did you mean 'stem'?" in answer.err
    answer = run_py("job=attribution", *words, "job.layer=head.0", "hydra.run.dir=other")
    assert "job.layer=head.0: is not a layer of feature maps: it returns [N, 4, 1, 1]" in answer.err


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (
            Own,
            "without panel c, the projections: Own is not a chain of layers: the network has no convolution or linear",
        ),
        (Residual, "without panel c, the projections: Residual is not a chain of layers: the input of head.0"),
        (Gated, "without panel c, the projections: Gated is not a chain of layers: the input of head"),
        (Smooth, "without panel c, the projections: 1 (SiLU): the deconvnet has no rule for it"),
        (Flat, "without panels b and c: the network has no feature maps"),
    ],
)
def test_occlusion_takes_any_network(network: type[nn.Module], problem: str, run_py, tmp_path: Path) -> None:
    run = train_other(tmp_path / "run", network, "trainer.epochs=1")
    words = ("job=occlusion", f"run={run.folder}", "imports=[tests]", "job.split=test", "job.stride=12")
    answer = run_py(*words, "job.count=2", "job.boxed_images=3", "hydra.run.dir=out")
    assert answer.code == 0, answer.err
    assert problem in answer.out
    summary = json.loads(Path("out/occlusion.json").read_text())
    assert len(summary["images"]) == 2
    assert summary["control"]["difference"]["n"] == 2
    assert "a square of another colour lowers P by" in answer.out
    assert ("map" in summary["images"][0]) == (network is not Flat)
    columns = {"image", "top", "left", "probability", "predicted", "confidence"}
    columns |= set() if network is Flat else {"activation"}
    assert set(read_csv(Path("out/maps.csv"))[0]) == columns
    assert Path("out/figures/occlusion.png").stat().st_size > 20_000
    refused = run_py(*words, "job.layer=none", "hydra.run.dir=other").error
    what = {Smooth: "no such convolution; known: 0", Flat: "no convolution"}.get(
        network, "no such layer of feature maps"
    )
    assert f"job.layer{'' if network is Flat else '=none'}: the network has {what}" in refused
