"""model.safetensors and load_run: trained weights load unchanged, and invalid files give one-line errors."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import resource
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save

from tests.helpers import Trap, data_config, random_images, tiny_model_config
from zfnet import ZFNet, load_run
from zfnet.config.errors import UserError
from zfnet.data import Batches, load_splits, preprocess
from zfnet.model.build import build_model, load_initial_weights, read_tensors, refuse_not_finite
from zfnet.runs import weights
from zfnet.runs.weights import ModelMetadata, load_model, save_model, weights_hash
from zfnet.training.device import resolve_runtime
from zfnet.training.loop import evaluate


@pytest.fixture
def saved(tmp_path: Path):
    """Return a network with non-default settings, its metadata, its file, and the hash from `save_model`."""
    torch.manual_seed(0)
    config = tiny_model_config(norm="batch", conv3=None, fc7=None)
    model = ZFNet(3, 70, config)
    metadata = ModelMetadata(config, ("a", "b", "ç"), data_config(image_size=70), stored_size=32)
    path = tmp_path / "model.safetensors"
    return model, metadata, path, save_model(path, model, metadata)


def test_round_trip(saved) -> None:
    model, metadata, path, digest = saved
    again, loaded_metadata = load_model(path)
    assert loaded_metadata == metadata
    assert not again.training
    images = torch.randn(2, 3, 70, 70)
    assert torch.equal(again(images), model.eval()(images))
    assert weights_hash(again.state_dict()) == digest


def test_the_hash_sees_names_and_bytes(saved) -> None:
    model, _, _, digest = saved
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert weights_hash(dict(reversed(state.items()))) == digest
    state["fc8.bias"][0] += 1e-7
    assert weights_hash(state) != digest


def test_equal_weights_are_equal_files(saved, tmp_path: Path) -> None:
    model, metadata, path, _ = saved
    save_model(tmp_path / "again.safetensors", model, metadata)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def header(path: Path) -> tuple[dict, dict]:
    metadata, tensors = read_tensors(path)
    return json.loads(metadata["zfnet"]), tensors


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda h: h.update(format="zfnet-9"), "another version of this program"),
        (lambda h: h.pop("format"), "not a file of ZFNet weights"),
        (lambda h: h.pop("classes"), "not a file of ZFNet weights"),
        (lambda h: h.update(model=None), "model=None: must be a mapping of keys to values"),
        (lambda h: h["model"].update(norm="os.system"), "model.norm=os.system: must be one of"),
        (lambda h: h["model"].update(extra=1), "model.extra: no such key"),
        (lambda h: h["data"].update(root="${oc.env:HOME}"), "may not contain an interpolation"),
        (lambda h: h["data"].update(image_size=10), "too few for its"),
        (lambda h: h.update(classes=[]), "its classes are not a list"),
        (lambda h: h.update(classes="abc"), "its classes are not a list"),
        (lambda h: h.update(classes=["a", "b", "a"]), "it names a class twice"),
        (lambda h: h["data"].update(crop_size=33), "crop_size=33: is more than stored_size=32"),
        (lambda h: h.update(stored_size=10**12), "stored_size=1000000000000: must be from 1 to 4096"),
        (lambda h: h.update(stored_size="32"), "stored_size=32: must be from"),
        (lambda h: h.update(stored_size=True), "stored_size=True: must be from"),
        (lambda h: h["data"].update(mean=[1e300] * 3), "data.mean.0=1e+300: must be at most 1000"),
        (lambda h: h["data"].update(std=[1e-300] * 3), "data.std.0=1e-300: must be at least 1e-06"),
        (lambda h: h["data"].update(std=[float("nan")] * 3), "data.std.0=nan: must be a finite number"),
        (lambda h: h.update(classes=["a"]), "fc8"),
        (lambda h: h["model"].update(fc6={"features": 13}), "the weights' fc6"),
    ],
)
def test_a_changed_header_is_one_line(saved, change, expected: str) -> None:
    _, _, path, _ = saved
    metadata, state = header(path)
    change(metadata)
    path.write_bytes(save(state, {"zfnet": json.dumps(metadata)}))
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def _model(name: str, **settings: object):
    return lambda h: h.update(model={"_target_": f"torchvision.models.{name}", **settings})


TOO_LARGE = [
    *(
        lambda h, n=n, layer=layer: h["model"][layer[0]].update({layer[1]: n})
        for n in (10**9, 10**12, 10**18, 10**30)
        for layer in (("conv1", "channels"), ("fc6", "features"), ("conv1", "kernel_size"), ("conv1", "padding"))
    ),
    lambda h: (h["model"]["conv1"].update(padding=20_000), h["model"]["conv2"].update(stride=20_000)),
    lambda h: h.update(classes=["a"] * 100_000),
    lambda h: h["data"].update(image_size=4096),
    _model("densenet.DenseNet", block_config=[10**9]),
    _model("densenet.DenseNet", block_config=[9] * 4),  # many layers: a forward pass would be slow
    _model("mobilenetv2.MobileNetV2", inverted_residual_setting=[[1, 16, 10**9, 1]]),
    _model("mobilenetv2.MobileNetV2", width_mult=1e12),
    _model("vgg11"),
]


@pytest.mark.parametrize("number", range(len(TOO_LARGE)))
def test_what_a_header_claims_takes_no_memory(saved, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest claim is 10³⁰ channels; each claim is refused at once, without a forward pass of its network."""
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *_: pytest.fail("a forward pass could take minutes"))
    path = saved[2]
    metadata, state = header(path)
    TOO_LARGE[number](metadata)
    path.write_bytes(save(state, {"zfnet": json.dumps(metadata)}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def _changed(state: dict, name: str, value: torch.Tensor) -> dict:
    return {**state, name: value}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: _changed(s, "fc8.bias", torch.full((3,), torch.nan)), "its fc8.bias contains NaN or infinity"),
        (lambda s: _changed(s, "conv1.weight", s["conv1.weight"] / 0), "its conv1.weight contains NaN or infinity"),
        (lambda s: _changed(s, "fc8.bias", s["fc8.bias"].double()), "its fc8.bias is torch.float64, its network's is"),
        (lambda s: _changed(s, "fc8.bias", s["fc8.bias"].half()), "its fc8.bias is torch.float16, its network's is"),
        (lambda s: _changed(s, "fc8.bias", s["fc8.bias"].int()), "its fc8.bias is torch.int32, its network's is"),
        (lambda s: _changed(s, "more", torch.ones(1)), "the weights contain"),
        (lambda s: {k: v for k, v in s.items() if k != "fc8.bias"}, "fc8.bias is missing from the weights"),
    ],
)
def test_weights_that_are_no_networks_are_one_line(saved, change, expected: str) -> None:
    path = saved[2]
    metadata, state = header(path)
    path.write_bytes(save(change(state), {"zfnet": json.dumps(metadata)}))
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_of_eight_bits_are_checked_too() -> None:
    weights = {"a": torch.ones(2).to(torch.float8_e4m3fn)}
    refuse_not_finite(Path("x"), weights)
    with pytest.raises(UserError, match="x: its a contains NaN"):
        refuse_not_finite(Path("x"), {"a": torch.tensor([torch.nan]).to(torch.float8_e4m3fn)})


def test_a_name_that_is_there_twice_is_refused(saved) -> None:
    path = saved[2]
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].decode()
    entry = json.dumps(json.loads(text)["fc8.bias"])
    twice = (text.rstrip()[:-1] + f', "fc8.bias": {entry}}}').encode()
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + content[8 + length :])
    with pytest.raises(UserError, match=r"it contains 'fc8.bias' twice"):
        load_model(path)


def test_other_weights_than_the_recorded_are_refused(tiny_run, tmp_path: Path) -> None:
    for name in ("config.yaml", "results.json", "model.safetensors"):
        shutil.copy(tiny_run.folder / name, tmp_path)
    load_run(tmp_path)
    metadata, state = header(tmp_path / "model.safetensors")
    state["fc8.bias"][0] += 1e-6
    (tmp_path / "model.safetensors").write_bytes(save(state, {"zfnet": json.dumps(metadata)}))
    with pytest.raises(UserError, match=r"model\.safetensors does not contain the weights that results\.json was"):
        load_run(tmp_path)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")  # PyTorch adds the missing counters
def test_what_a_header_claims_of_a_network_that_pools_takes_no_pass(tmp_path: Path, monkeypatch) -> None:
    """Its weights fit images of any size, so the size is checked by a pass on the meta device."""
    settings = {"_target_": "torchvision.models.resnet18"}
    metadata = ModelMetadata(settings, ("a", "b", "c"), data_config(image_size=32), stored_size=32)
    save_model(tmp_path / "model.safetensors", build_model(settings, 3, 32), metadata)
    plain, state = header(tmp_path / "model.safetensors")
    plain["data"]["image_size"] = 4096
    old = {k: v for k, v in state.items() if not k.endswith(".num_batches_tracked")}  # like PyTorch before 0.4.1
    (tmp_path / "model.safetensors").write_bytes(save(old, {"zfnet": json.dumps(plain)}))
    seen, real = set(), torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: seen.add(x.device.type) or real(self, x))
    assert load_model(tmp_path / "model.safetensors")[1].data.image_size == 4096
    assert seen == {"meta"}


def test_a_network_that_cannot_be_built_on_meta_loads_and_takes_no_memory(tmp_path: Path, monkeypatch) -> None:
    settings = {"_target_": "torchvision.models.regnet_y_400mf"}
    model = build_model(settings, 3, 32)
    metadata = ModelMetadata(settings, ("a", "b", "c"), data_config(image_size=32), stored_size=32)
    digest = save_model(tmp_path / "model.safetensors", model, metadata)
    assert weights_hash(load_model(tmp_path / "model.safetensors")[0].state_dict()) == digest
    plain, _ = header(tmp_path / "model.safetensors")
    plain["classes"] = [str(n) for n in range(300_000)]
    (tmp_path / "model.safetensors").write_bytes(save({"a": torch.ones(1)}, {"zfnet": json.dumps(plain)}))
    built = []
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: built.append(self.weight.device.type))
    with pytest.raises(UserError, match="does not fit its network"):
        load_model(tmp_path / "model.safetensors")
    assert set(built) == {"meta"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage" * 99,
        pickle.dumps({"state_dict": 1}),
        save({"a": torch.ones(1)}),
        *(save({"a": torch.ones(1)}, {"zfnet": text}) for text in ("", "null", "[]", '"x"', "{}", "3")),
    ],
)
def test_garbage_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not a file of ZFNet weights, or is damaged"):
        load_model(path)


def test_a_truncated_file_is_one_line(saved) -> None:
    path = saved[2]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not a file of ZFNet weights, or is damaged"):
        load_model(path)


@pytest.mark.parametrize("more", [1, 2**31, 2**62, 2**64 - 1])
def test_a_header_longer_than_its_file_is_one_line(saved, more: int) -> None:
    path = saved[2]
    content = path.read_bytes()
    claimed = min(len(content) - 8 + more, 2**64 - 1)
    path.write_bytes(claimed.to_bytes(8, "little") + content[8:])
    expected = rf"or is damaged \(its header claims {claimed:,} bytes, the file has {len(content):,}\)$"
    with pytest.raises(UserError, match=expected):
        load_model(path)
    with pytest.raises(UserError, match=expected):
        load_initial_weights(saved[0], path)


def test_a_pipe_in_place_of_weights_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="it is not a file"):
        load_model(tmp_path / "model.safetensors")


def test_load_run(tiny_run) -> None:
    loaded = load_run(tiny_run.folder)
    assert loaded.config == tiny_run.read_config()
    assert loaded.classes[0] == "disc"
    assert len(loaded.classes) == 10
    assert weights_hash(loaded.model.state_dict()) == tiny_run.read_json("results.json")["weights_sha256"]
    images = preprocess(random_images(2, loaded.metadata.stored_size), loaded.metadata.data)
    assert loaded.model(images).shape == (2, 10)


def test_load_run_takes_a_list_of_imports(tiny_run) -> None:
    with pytest.raises(UserError, match=r"^imports='tests': must be a list, as in \['tests'\]$"):
        load_run(tiny_run.folder, imports="tests")


def test_inputs_keep_to_the_runs_limit_of_pixels(tiny_run, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    run = load_run(tiny_run.folder)
    assert len(run.inputs(tmp_path / "a.png")) == 1
    metadata = dataclasses.replace(run.metadata, data=dataclasses.replace(run.metadata.data, max_pixels=63))
    with pytest.raises(UserError, match="64 pixels"):
        dataclasses.replace(run, metadata=metadata).inputs(tmp_path / "a.png")


def test_load_run_reproduces_the_reported_figures(tiny_run) -> None:
    """The saved weights are those with which results.json was measured."""
    loaded = load_run(tiny_run.folder)
    splits = load_splits(loaded.config.data)
    runtime = dataclasses.replace(resolve_runtime(loaded.config.trainer), device=torch.device("cpu"), precision="fp32")
    results = tiny_run.read_json("results.json")
    for name, part in (("validation", splits.validation), ("test", splits.test)):
        evaluation = evaluate(loaded.model, Batches(part, loaded.config.data, runtime.device), runtime, name)
        assert evaluation.accuracy == pytest.approx(results[name]["accuracy"], abs=0.02)
        assert evaluation.loss == pytest.approx(results[name]["loss"], rel=1e-2)


def test_a_run_without_weights_is_named(tiny_run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        load_run(tmp_path)
    shutil.copy(tiny_run.folder / "config.yaml", tmp_path)
    with pytest.raises(UserError, match="there are no weights; did the run finish"):
        load_run(tmp_path)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_another_kind_of_file_is_refused_and_never_run(tmp_path: Path, kind: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Trap()))
    else:
        torch.save({"a": Trap()}, path)
    with pytest.raises(UserError, match="is not a file of ZFNet weights, or is damaged"):
        load_model(path)
    assert not Path("witness").exists()


@pytest.mark.parametrize(
    ("value", "expected"), [(float("nan"), "fc8.weight contains NaN"), (3e38, "its network's outputs are not finite")]
)
def test_evaluating_a_network_without_numbers_fails(run_py, tiny_run, tmp_path: Path, value: float, expected) -> None:
    (tmp_path / "run").mkdir()
    shutil.copy(tiny_run.folder / "config.yaml", tmp_path / "run")
    metadata, state = header(tiny_run.weights)
    state["fc8.weight"].fill_(value)
    (tmp_path / "run/model.safetensors").write_bytes(save(state, {"zfnet": json.dumps(metadata)}))
    answer = run_py("job=evaluate", "run=run")
    assert expected in answer.error


def test_layers_that_share_their_weights_are_saved(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_model(tmp_path / "m.safetensors", model, ModelMetadata({}, ("a", "b"), data_config(), 32))
    loaded = load_file(tmp_path / "m.safetensors")
    assert torch.equal(loaded["0.weight"], loaded["1.weight"])
    assert torch.equal(loaded["0.weight"], model[0].weight)


def test_load_run_trusts_what_conf_trusts(tiny_run, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(weights, "imported_packages", lambda _: ["mine"])
    monkeypatch.setattr(weights, "load_model", lambda path, imports: (seen.append(imports), (None, None))[1])
    load_run(tiny_run.folder)
    load_run(tiny_run.folder, ())
    assert seen == [["mine"], ()]
