"""job=reproduce: it trains from the record, leaves the original unchanged, and names differences."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import zfnet.runs.provenance
import zfnet.training.loop
from tests.helpers import EVERY_STEP, TINY, TINY_EXACT, Killed, compose, killed_before, no_figures, train_tiny
from zfnet.jobs.train import train
from zfnet.runs.command import CONF
from zfnet.runs.directory import RunDirectory

CPU = ("trainer.device=cpu", "logger=none")
SHORT = ("trainer=exact", "trainer.epochs=1", "data.train_images=60", "data.test_images=20")


@pytest.fixture(scope="module")
def exact_run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    with no_figures():
        return train_tiny(tmp_path_factory.mktemp("exact") / "run", *SHORT)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_identical_whatever_todays_defaults_are(run_py, exact_run, tmp_path: Path) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    for name, old, new in (
        ("optimizer/adamw.yaml", "lr: ", "lr: 0.5  # "),
        ("loss/cross_entropy.yaml", "label_smoothing: 0.0", "label_smoothing: 0.9"),
        ("config.yaml", "seed: 0", "seed: 7"),
    ):
        path = tmp_path / "conf" / name
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")
    before = contents(exact_run.folder)
    answer = run_py("--config-path", tmp_path / "conf", "job=reproduce", f"run={exact_run.folder}")
    assert answer.code == 0, answer.err
    assert "identical: every metric of 1 epoch," in answer.out
    assert contents(exact_run.folder) == before
    (folder,) = tmp_path.glob("outputs/reproduce/*")
    comparison = json.loads((folder / "reproduction.json").read_text())
    assert comparison["identical"] is True
    assert comparison["variation"] == []
    assert comparison["first_difference"] is None
    now = RunDirectory(folder)
    assert now.state == "done"
    assert now.read_json("results.json")["weights_sha256"] == comparison["weights_sha256"]["recorded"]
    assert now.read_config().optimizer == exact_run.read_config().optimizer


def test_hydras_own_way_trains_the_same(run_py, exact_run, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:  # this run only needs to write its record
        patch.setattr("zfnet.jobs.train.train_and_test", lambda *_: {"validation": None})
        assert run_py(*TINY, *SHORT, "hydra.run.dir=one").code == 0
    answer = run_py("--config-path", tmp_path / "one/.hydra", "--config-name", "config")
    assert answer.code == 0, answer.err
    (folder,) = tmp_path.glob("outputs/train/*")
    now = RunDirectory(folder)
    assert now.read_config() == exact_run.read_config()
    weights = [run.read_json("results.json")["weights_sha256"] for run in (exact_run, now)]
    assert weights[0] == weights[1]


def test_changed_code_is_named(run_py, exact_run, monkeypatch) -> None:
    code = {**exact_run.read_json("environment.json")["code"], "source_sha256": "0" * 64}
    monkeypatch.setattr(zfnet.runs.provenance, "_code", lambda: code)
    step = zfnet.training.loop.train_step

    def other(state, batch) -> None:
        step(state, batch)
        state.model.fc8.bias.data[0] += 1e-3

    monkeypatch.setattr(zfnet.training.loop, "train_step", other)
    answer = run_py("job=reproduce", f"run={exact_run.folder}", "hydra.run.dir=again")
    assert re.search(
        r"^not identical to .*: epoch 1, train_loss was [\d.]+, is [\d.]+; "
        r"the environment differs in code.source_sha256 \(again/reproduction.json\)$",
        answer.error,
    )
    comparison = RunDirectory("again").read_json("reproduction.json")
    assert comparison["identical"] is False
    assert [d["what"] for d in comparison["surroundings"]] == ["code.source_sha256"]
    assert RunDirectory("again").state == "done"


def test_changed_code_of_ones_own_is_named(run_py, tmp_path: Path, monkeypatch) -> None:
    """job=reproduce names the module, and so does job=resume of a run that began with other code."""
    text = "import torch.nn as nn\n\nclass Loss(nn.CrossEntropyLoss):\n    def forward(self, *args):\n"
    module = tmp_path / "own_loss.py"
    monkeypatch.syspath_prepend(tmp_path)

    def write(factor: int) -> None:
        module.write_text(f"{text}        return {factor} * super().forward(*args)\n")
        monkeypatch.delitem(sys.modules, "own_loss", raising=False)
        importlib.invalidate_caches()
        monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two versions have equal time and size

    trust = ("imports=[own_loss]",)
    words = (*TINY_EXACT, *trust, "loss._target_=own_loss.Loss")
    write(1)
    assert run_py(*words, "hydra.run.dir=r").code == 0
    with killed_before(5), pytest.raises(Killed):
        run_py(*words, EVERY_STEP, "hydra.run.dir=dead")
    assert "has changed" not in run_py(*trust, "job=reproduce", "run=r", "hydra.run.dir=same").out
    write(2)
    answer = run_py(*trust, "job=reproduce", "run=r", "hydra.run.dir=again")
    assert answer.error.endswith("the environment differs in code.imported.own_loss (again/reproduction.json)")
    answer = run_py(*trust, "job=resume", "run=dead")
    assert answer.code == 0, answer.err
    assert "the code of own_loss has changed since the run was stopped" in answer.out + answer.err
    write(1)  # the code of the start again; the record says that it changed in between
    answer = run_py(*trust, "job=reproduce", "run=dead", "hydra.run.dir=of_dead")
    assert "the environment differs in code.imported.own_loss, code.changed (of_dead/" in answer.error


def test_changed_data_is_named(run_py, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind, base in (("dark", 0), ("light", 128)):
        folder = tmp_path / "photos" / kind
        folder.mkdir(parents=True)
        for n in range(12):
            pixels = base + rng.integers(0, 128, (64, 64, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{n}.png")
    words = ("data=folder", f"data.root={tmp_path / 'photos'}", "data.image_size=64", "data.batch_size=8")
    one = RunDirectory(tmp_path / "one")
    train(compose("experiment=quickstart", *CPU, *SHORT[:2], *words), one)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos/dark/0.png")
    answer = run_py("job=reproduce", f"run={one.folder}", "hydra.run.dir=again")
    assert answer.code == 1
    assert "the environment differs in data_fingerprint (again" in answer.err


def test_overrides_make_a_variation_and_no_failure(run_py, exact_run) -> None:
    answer = run_py("job=reproduce", f"run={exact_run.folder}", "optimizer=sgd", "optimizer.lr=0.3", "hydra.run.dir=v")
    assert answer.code == 0, answer.err
    assert "a variation of" in answer.out
    comparison = RunDirectory("v").read_json("reproduction.json")
    changed = {d["what"]: d["now"] for d in comparison["variation"]}
    assert changed["optimizer.lr"] == 0.3
    assert changed["optimizer._target_"] == "torch.optim.SGD"
    assert comparison["first_difference"]["epoch"] == 1


def test_what_cannot_matter_is_no_variation_and_a_stopped_one_goes_on(run_py, exact_run, monkeypatch) -> None:
    words = ("job=reproduce", f"run={exact_run.folder}", "trainer.log_every=1", "hydra.run.dir=again")
    with monkeypatch.context() as patch:
        patch.setattr("zfnet.jobs.train.evaluate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt("power cut")))
        assert run_py(*words).code == 130
    assert RunDirectory("again").state == "stopped"
    with monkeypatch.context() as patch:
        given: list[Any] = []
        patch.setattr("zfnet.training.loggers._import", lambda name: name)  # mlflow need not be installed
        patch.setattr("zfnet.jobs.resume.reproduce", lambda config, run: given.append(config))
        words = ("imports=[tests]", "trainer.devices=2", "logger=mlflow", "logger.mlflow.tracking_uri=http://x")
        assert run_py("job=resume", "run=again", *words).code == 0
        (config,) = given
        assert (config.job.name, config.imports, config.trainer.devices) == ("reproduce", ["tests"], 2)
        assert config.logger["mlflow"]["tracking_uri"] == "http://x"
        assert Path(str(config.run)) == exact_run.folder
    torch.set_num_threads(2)  # the original used 1 thread
    monkeypatch.setattr("zfnet.training.device.DEFAULT_THREADS", 2)
    answer = run_py("job=resume", "run=again")
    assert torch.get_num_threads() == 2
    assert answer.code == 0, answer.err
    assert RunDirectory("again").read_json("environment.json")["cpu"]["threads"] == 1
    assert "identical" in answer.out
    assert RunDirectory("again").read_json("reproduction.json")["variation"] == []
    assert "nothing to do" in run_py("job=resume", "run=again").out


def test_refusals(run_py, exact_run, tmp_path: Path) -> None:
    before = contents(exact_run.folder)
    inside = run_py("job=reproduce", f"run={exact_run.folder}", f"hydra.run.dir={exact_run.folder}")
    assert (inside.code, "is inside the run's own directory" in inside.err) == (1, True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/letter.txt").write_text("mine")
    full = run_py("job=reproduce", f"run={exact_run.folder}", "hydra.run.dir=full")
    assert (full.code, "full is not empty" in full.err) == (1, True)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["letter.txt"]
    shutil.copytree(exact_run.folder, tmp_path / "half")
    RunDirectory("half").set_status("stopped")
    half = run_py("job=reproduce", "run=half")
    assert (half.code, "is not finished (state: stopped)" in half.err) == (1, True)
    assert contents(exact_run.folder) == before
    assert not list(tmp_path.glob("outputs/*/*"))
