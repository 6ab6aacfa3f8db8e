"""job=import: networks of other programs become runs; files that are damaged or do not fit are refused."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from tests import own
from tests.helpers import TINY_EXACT, Trap, compose, load_for_job, random_images, write_images
from tests.model.graphs import NODES, WEIGHTS, write_onnx
from zfnet import ZFNet, load_run
from zfnet.analyses.attribution import attribute
from zfnet.config.errors import UserError
from zfnet.jobs import imported
from zfnet.model.build import build_model
from zfnet.model.chain import Chain
from zfnet.runs.directory import RunDirectory

OWN = tuple(word for word in TINY_EXACT if word.startswith("model."))


def import_(output: Path, source: object, *words: str) -> RunDirectory:
    config = compose("job=import", f"source={source}", *words)
    config.job.main(config, output)
    return RunDirectory(output)


def own_network(path: Path, classes: int = 4) -> ZFNet:
    """Save the weights of a small ZFNet for images of 64 px; return the network."""
    model = ZFNet(classes, 64, compose("experiment=quickstart", *OWN).model).eval()
    (torch.save if path.suffix == ".pth" else save_file)(model.state_dict(), path)
    return model


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_state_dict_becomes_a_run_on_which_jobs_work(tmp_path: Path, name: str) -> None:
    model = own_network(tmp_path / name)
    (tmp_path / "names.txt").write_text("sea lion\ncat\nDog\nemu\n")
    words = (*OWN, "data.image_size=64", "data.store_size=64", f"job.classes={tmp_path / 'names.txt'}")
    run = import_(tmp_path / "run", tmp_path / name, "experiment=quickstart", *words)
    images = torch.randn(2, 3, 64, 64)
    loaded = load_run(run.folder)
    assert torch.equal(loaded.model(images), model(images))
    results, environment = run.read_json("results.json"), run.read_json("environment.json")
    assert environment["imported"]["file_sha256"] == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert run.state == "done"
    assert run.job == "import"
    assert len(results["weights_sha256"]) == 64
    with pytest.raises(UserError, match=r"data\.root is not set: name the folder"):
        load_for_job(run).split("all")
    root = write_images(tmp_path / "photos", {"Sea_Lion": 5, "dog": 5})  # typical folder names for these classes
    assert load_for_job(run, f"data.root={root}").split("all").labels.unique().tolist() == [0, 2]
    own = import_(tmp_path / "again", run.weights)  # its header contains all settings
    assert own.read_json("results.json")["weights_sha256"] == results["weights_sha256"]
    assert load_run(own.folder).classes == ("sea lion", "cat", "Dog", "emu")


LATE = ("experiment=quickstart", "~model", "+model._target_=tests.own.LateNorm", "imports=[tests]")


def test_the_last_layer_need_not_be_the_last_in_a_file(tmp_path: Path) -> None:
    model = own.LateNorm(4).eval()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    run = load_run(import_(tmp_path / "run", tmp_path / "x.pth", *LATE).folder, ["tests"])
    assert run.classes == tuple("0123")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(run.model(images), model(images))
    with pytest.raises(UserError, match=r"job\.channels=bgr: the network has no first convolution"):
        import_(tmp_path / "other", tmp_path / "x.pth", *LATE, "job.channels=bgr")
    torch.save(model.state_dict() | {"head.bias": torch.tensor(1.0)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="do not show the number of classes"):
        import_(tmp_path / "other", tmp_path / "x.pth", *LATE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc8.bias"), r"has no fc8\.bias, which model=small needs"),
        (lambda s: s.update({"fc9.bias": torch.ones(1)}), r"fc9\.bias, which this network does not have"),
        (lambda s: s.update({"conv2.bias": torch.ones(9)}), r"conv2\.bias is \[9\], this network's is \[4\]"),
        (lambda s: s["conv1.bias"].fill_(torch.nan), r"conv1\.bias contains NaN"),
        (lambda s: s.clear(), r"has no conv1\.weight"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    state = own_network(tmp_path / "x.pth").state_dict()
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message):
        import_(tmp_path / "run", tmp_path / "x.pth", "experiment=quickstart", *OWN, "data.image_size=64")
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Trap()}, "evil.pth")
    torch.save([1, 2], "list.pth")
    for name in ("torn.pth", "torn.safetensors", "torn.onnx"):
        Path(name).write_bytes(b"\x08garbage")
    pytest.importorskip("onnx")
    for name in ("evil.pth", "list.pth", "torn.pth", "torn.safetensors", "torn.onnx"):
        with pytest.raises(UserError, match=rf"^{name}\b.*(is no|contains no|is not|is damaged|has 0 inputs)"):
            import_(tmp_path / "run", name)
    assert not Path("witness").exists()
    with pytest.raises(UserError, match="source=alexnett: there is no such file; did you mean 'alexnet'"):
        import_(tmp_path / "run", "alexnett")
    with pytest.raises(UserError, match=r"job=import needs source=…: alexnet, vgg11 or a file"):
        compose("job=import").job.main(compose("job=import"), tmp_path / "run")


def test_torchvisions_weights_come_from_the_cache_if_their_hash_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has the published one's names and shapes; each large tensor stores one number, to keep it small.

    An analysis takes the network.
    """
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in torchvision.models.alexnet().state_dict().items()}
    small = {k: torch.randn(1).expand(s) if len(s) == 2 else torch.randn(s) / 50 for k, s in shapes.items()}
    torch.save(small, tmp_path / "x.pth")
    digest = hashlib.sha256((tmp_path / "x.pth").read_bytes()).hexdigest()
    for name in ("kaiming_uniform_", "uniform_"):  # 61 million initial weights, which the file's replace
        monkeypatch.setattr(torch.nn.init, name, lambda value, *_, **__: value)
    real = torchvision.models.AlexNet_Weights.DEFAULT
    url = f"https://localhost:1/alexnet-{digest[:8]}.pth"
    monkeypatch.setattr(imported, "_weights", lambda name: SimpleNamespace(url=url, meta=real.meta))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    cached = tmp_path / "hub/checkpoints" / f"alexnet-{digest[:8]}.pth"
    with pytest.raises(UserError, match=rf"source=alexnet: {url} could not be .* put it at {cached}"):
        import_(tmp_path / "run", "alexnet")
    cached.write_bytes(b"another file")
    with pytest.raises(UserError, match=f"must begin with {digest[:8]}"):
        import_(tmp_path / "run", "alexnet")
    (tmp_path / "x.pth").rename(cached)
    run = import_(tmp_path / "run", "alexnet")
    loaded = load_run(run.folder)
    assert loaded.classes[:2] == ("tench", "goldfish")
    assert len(loaded.classes) == 1000
    # the preprocessing equals torchvision's
    pixels = random_images(1, 300, seed=3)[0]
    Image.fromarray(pixels.numpy()).save(tmp_path / "x.png")
    theirs = real.transforms()(Image.fromarray(pixels.numpy()))
    assert (loaded.inputs(tmp_path / "x.png")[0] - theirs).abs().max() < 0.02  # one step of a byte
    assert torch.equal(loaded.model.features[0].weight, small["features.0.weight"])
    inputs, label = loaded.inputs(tmp_path / "x.png"), torch.tensor([0])
    found = attribute(Chain(loaded.model, 224), inputs, label, "features.10", steps=2, batch_size=2)
    assert len(found.maps) == 5
    assert all(maps.isfinite().all() and maps.shape[2:] == (224, 224) for maps in found.maps.values())


@pytest.mark.parametrize("name", imported.PUBLISHED)
def test_state_dicts_of_torchvisions_networks_are_known_by_their_shapes(tmp_path: Path, name: str) -> None:
    """The networks have another number of classes; each tensor in the file stores one number, to keep it small."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(num_classes=7)
    state = {f"module.{key}": torch.randn(1).expand(value.shape) for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "x.pth")
    settings, found, size = imported._state_dict(tmp_path / "x.pth", compose("job=import"))
    assert (settings, size) == ({"_target_": f"torchvision.models.{name}"}, 224)
    assert [*found] == [*model.state_dict()]
    assert all(torch.equal(value, state[f"module.{key}"]) for key, value in found.items())


# ---- ONNX


PHOTOS = ("data.root=photos", "job.split=train")
PAIRS = ("job.maps=2", "job.references=1", "job.trials=1", "job.extreme=0.5", "job.quiz=1")


@pytest.fixture(scope="module")
def imported_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """Import a small ONNX graph; photos/ beside the run has images of two of its classes."""
    folder = tmp_path_factory.mktemp("imported")
    write_images(folder / "photos", {"0": 4, "3": 4}, size=24)
    import_(folder / "other", write_onnx(folder / "y.onnx", *NODES, weights=WEIGHTS | {"w": -WEIGHTS["w"]}))
    return import_(folder / "run", write_onnx(folder / "x.onnx", *NODES, weights=WEIGHTS))


def test_an_onnx_graph_becomes_a_chain_with_the_same_outputs(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = write_onnx(tmp_path / "x.onnx", *NODES, weights=WEIGHTS)
    run = import_(tmp_path / "run", path, "job.channels=bgr")
    loaded = load_run(run.folder)
    images = torch.randn(1, 3, 19, 19)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"x": images.numpy()})[0]
    found = loaded.model(images.flip(1)).softmax(1).detach()  # the run expects RGB
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    chain = Chain(loaded.model, 19)
    assert chain.layers == ["conv1", "conv2", "fc3"]
    assert [step.module.__class__.__name__ for step in chain.steps[:5]] == [
        *("Conv2d", "ReLU", "LocalResponseNorm", "MaxPool2d", "Conv2d")
    ]
    assert "outputs within" in (run.folder / "import.log").read_text()
    assert loaded.classes == tuple("01234")
    for word in ("job.channels=bgr", "job.classes=x.txt", "model=small", "model.dropout=0.1", "data.image_size=32"):
        with pytest.raises(UserError, match=rf"^{re.escape(word)}: model\.safetensors records its network"):
            import_(tmp_path / "again", run.weights, word)
    # the recorded settings are checked, too
    recorded = run.recorded_config()
    recorded["model"]["layers"][0]["type"] = "Bilinear"
    with pytest.raises(UserError, match=r"model\.layers\[0\]\.type=Bilinear: no such type"):
        build_model(recorded["model"], 5, 19)
    recorded["model"]["layers"][0].update(type="Conv2d", padding_mode="circular")
    with pytest.raises(UserError, match=r"padding_mode=circular: must be numbers"):
        build_model(recorded["model"], 5, 19)


@pytest.mark.parametrize(
    "words",
    [
        ("export", "job.format=pt2"),
        ("predict", "images=[photos]"),
        ("evaluate", "job.split=train", "data.root=photos", "data.validation=0"),
        ("deconvnet", "images=[photos]", "job.maps=2"),
        ("deconvnet", *PHOTOS, "job.maps=2", "job.top=1", "job.sample=2", "job.ablation=1"),
        ("verdict", *PHOTOS, "job.images=4", "job.units=2", "job.layers=[conv1]", "job.metrics=[ablation,stability]"),
        ("forced_choice", *PHOTOS, "job.other=other", *PAIRS),
        ("filters", *PHOTOS, "job.other=other"),
        ("occlusion", *PHOTOS, "job.count=1", "job.patch=10", "job.stride=10"),
        ("attribution", "images=[photos]", "job.steps=2"),
        ("summary",),
        ("invariance", *PHOTOS, "job.count=1", "job.mean_images=2", "job.steps=3"),
    ],
    ids=lambda words: words[0],
)
@pytest.mark.usefixtures("laid_out")
def test_jobs_work_on_a_network_that_is_no_zfnet(
    imported_run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(imported_run.folder.parent)
    config = load_for_job(imported_run, f"job={words[0]}", *words[1:]).config
    config.job.main(config, tmp_path / "out")


@pytest.mark.parametrize("job", ["resume", "reproduce", "extend", "fork"])
def test_jobs_that_train_refuse_an_imported_run(imported_run: RunDirectory, job: str) -> None:
    with pytest.raises(UserError, match=f"was made by job=import: job={job} needs a run that this program trained"):
        load_for_job(imported_run, f"job={job}")
