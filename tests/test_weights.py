"""Weights: what `load_run` gives, the blog's names, and files that are something else."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers import TINY, compose
from zfnet import ZFNet, load_run
from zfnet.errors import UserError
from zfnet.weights import load_model, save_model, weights_hash


def test_load_run_gives_the_network_that_was_measured(tiny_run) -> None:
    found = load_run(tiny_run.folder)
    assert not found.model.training
    assert weights_hash(found.model.state_dict()) == tiny_run.read_json("results.json")["weights_sha256"]
    assert found.classes[:2] == ("disc", "ring")
    assert found.config == tiny_run.read_config()
    assert found.facts.stored_size == 64
    assert found.model(torch.zeros(1, 3, 64, 64)).shape == (1, 10)


def test_load_run_says_what_is_missing(tiny_run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run"):
        load_run(tmp_path)
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    (tmp_path / "run/model.safetensors").unlink()
    with pytest.raises(UserError, match="there are no weights; did the run finish"):
        load_run(tmp_path / "run")


def test_weights_survive_a_round_trip(tiny_run, tmp_path: Path) -> None:
    model, facts = load_model(tiny_run.weights)
    digest = save_model(tmp_path / "again.safetensors", model, facts)
    again, same = load_model(tmp_path / "again.safetensors")
    assert same == facts
    assert weights_hash(again.state_dict()) == digest == weights_hash(model.state_dict())


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("kind", ["pickle", "torch", "cut", "text", "empty", "plain"])
def test_another_kind_of_file_is_refused_and_never_run(
    tiny_run, tmp_path: Path, kind: str, monkeypatch
) -> None:
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


def blog_network() -> nn.Module:
    """The blog's class, at the size of the small network."""
    features = nn.Sequential(
        *(nn.Conv2d(3, 32, 7, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(32, 64, 5, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
        *(nn.Conv2d(64, 96, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(96, 96, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(96, 64, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2)),
    )
    with torch.no_grad():
        inputs = features(torch.zeros(1, 3, 64, 64)).numel()
    classifier = nn.Sequential(
        *(nn.Linear(inputs, 256), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(256, 256), nn.ReLU(), nn.Dropout()),
        nn.Linear(256, 10),
    )
    return nn.ModuleDict({"features": features, "classifier": classifier})


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_the_blogs_weights_give_the_blogs_answers(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(0)
    blog = blog_network().eval()
    save_file({prefix + k: v for k, v in blog.state_dict().items()}, tmp_path / "blog.safetensors")
    model = ZFNet(10, 64, compose(*TINY).model).eval()
    model.load_weights(load_file(tmp_path / "blog.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = blog["classifier"](blog["features"](images).flatten(1))  # type: ignore[index]
        torch.testing.assert_close(model(images), expected)


def test_weights_that_do_not_fit_are_named() -> None:
    model = ZFNet(10, 64, compose(*TINY).model)
    state = dict(model.state_dict())
    before = weights_hash(state)
    for change, expected in (
        ({"fc8.bias": None}, "the weights lack fc8.bias"),
        ({"fc9.bias": torch.zeros(1)}, "the weights hold fc9.bias"),
        ({"fc8.bias": torch.zeros(11)}, r"fc8.bias is \[11\], this network's is \[10\]"),
    ):
        wrong = {k: v for k, v in {**state, **change}.items() if v is not None}
        with pytest.raises(UserError, match=expected):
            model.load_weights(wrong)
    assert weights_hash(model.state_dict()) == before
