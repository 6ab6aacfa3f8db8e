"""model.safetensors and load_run: what was trained is what is loaded, and garbage is one line."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file

from tests.helpers import data_config, random_images, tiny_model_config
from zfnet import ZFNet, load_run
from zfnet.config.errors import UserError
from zfnet.data import preprocess
from zfnet.runs.weights import ModelMetadata, load_model, save_model, weights_hash


@pytest.fixture
def saved(tmp_path: Path):
    """A network with settings of its own, its file, and the hash that was returned."""
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
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["zfnet"]), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda h: h.update(format="zfnet-9"), "another version of this program"),
        (lambda h: h.pop("format"), "not a file of ZFNet weights"),
        (lambda h: h.pop("classes"), "not a file of ZFNet weights"),
        (lambda h: h.update(model=None), "model=None: must hold keys and values"),
        (lambda h: h["model"].update(norm="os.system"), "model.norm=os.system: must be one of"),
        (lambda h: h["model"].update(extra=1), "model.extra: no such key"),
        (lambda h: h["data"].update(root="${oc.env:HOME}"), "may not contain an interpolation"),
        (lambda h: h["data"].update(image_size=10), "too few for its"),
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
    assert "\n" not in str(caught.value)


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
    with pytest.raises(UserError, match="or is damaged"):
        load_model(path)


def test_load_run(tiny_run) -> None:
    loaded = load_run(tiny_run.folder)
    assert loaded.config == tiny_run.read_config()
    assert loaded.classes[0] == "disc"
    assert len(loaded.classes) == 10
    assert weights_hash(loaded.model.state_dict()) == tiny_run.read_json("results.json")["weights_sha256"]
    images = preprocess(random_images(2, loaded.metadata.stored_size), loaded.metadata.data)
    assert loaded.model(images).shape == (2, 10)


def test_load_run_reproduces_the_reported_figures(tiny_run) -> None:
    """The weights that are kept are those that results.json speaks of."""
    from zfnet.data import Batches, load_splits
    from zfnet.training.device import resolve_runtime
    from zfnet.training.loop import evaluate

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


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("kind", ["pickle", "torch", "cut", "text", "empty", "plain"])
def test_another_kind_of_file_is_refused_and_never_run(tiny_run, tmp_path: Path, kind: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif kind == "torch":
        torch.save({"a": Bomb()}, path)
    elif kind == "cut":
        path.write_bytes(tiny_run.weights.read_bytes()[:-100])
    elif kind == "text":
        path.write_text("weights")
    elif kind == "empty":
        path.touch()
    else:  # safetensors without our header
        save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is not a file of ZFNet weights, or is damaged"):
        load_model(path)
    assert not Path("exploded").exists()
