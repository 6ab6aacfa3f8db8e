"""Train, resume, reproduce and evaluate each example of examples/extend, and run each command of docs/extend.md."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import zfnet
from examples.extend.macro_f1 import MacroF1
from tests.conftest import ROOT
from tests.helpers import EVERY_STEP, TINY_EXACT, Killed, killed_before, read_csv, train_tiny_exact, weights_and_history
from zfnet import load_run
from zfnet.config.errors import UserError
from zfnet.explain import Deconvnet
from zfnet.jobs.train import compose
from zfnet.runs.directory import RunDirectory
from zfnet.training.metrics import Evaluation

CONF = ROOT / "examples/extend/conf"
EXAMPLES = ("--config-dir", CONF, "imports=[examples,lion_pytorch]")
# also without the settings of TINY_EXACT's network, and without those of its images
_ONE_EPOCH = (*TINY_EXACT, "trainer.epochs=1")
_OWN_MODEL = tuple(word for word in _ONE_EPOCH if not word.startswith("model."))
_OWN_DATA = tuple(word for word in _ONE_EPOCH if "_images=" not in word)
SLOTS = {
    "optimizer=lion": _ONE_EPOCH,
    "model=tiny_resnet": (*_OWN_MODEL, "model.width=4"),
    "data=gratings": (*_OWN_DATA, "data.train.count=72", "data.val.count=8", "data.test.count=20"),
    "loss=focal": _ONE_EPOCH,
    "augment=speckle": _ONE_EPOCH,
    "scheduler=linear_cosine": (*TINY_EXACT, "trainer.epochs=3"),
    "logger=json_lines": _ONE_EPOCH,
    "callbacks=lookahead": (*_ONE_EPOCH, "callbacks.lookahead.every=3"),  # also after step 5
    "callbacks=macro_f1": _ONE_EPOCH,
}
EVALUATED = ("model=tiny_resnet", "data=gratings", "loss=focal", "callbacks=lookahead")

_TRAINED: dict[str, Path] = {}


def train_and_kill(run_py, choice: str, folder: str = "r") -> Path:
    """Return the folder of a run with an example, killed before step 5 and resumed. Later calls copy that run."""
    if choice in _TRAINED:
        return shutil.copytree(_TRAINED[choice], Path(folder).absolute())
    words = (*EXAMPLES, *SLOTS[choice], choice, EVERY_STEP, f"hydra.run.dir={folder}")
    with killed_before(5), pytest.raises(Killed):
        run_py(*words)
    answer = run_py(*EXAMPLES, "job=resume", f"run={folder}")
    assert answer.code == 0, answer.err
    assert "continuing from epoch 1, step 5" in answer.out
    _TRAINED[choice] = Path(folder).absolute()
    return _TRAINED[choice]


@pytest.mark.parametrize("choice", SLOTS)
def test_killed_resumed_reproduced_and_evaluated(run_py, choice: str) -> None:
    """Only the examples that an evaluation uses are evaluated again."""
    folder = train_and_kill(run_py, choice)
    answer = run_py(*EXAMPLES, "job=reproduce", "run=r", "hydra.run.dir=again")
    assert answer.code == 0, answer.err
    assert "identical: every metric of" in answer.out
    assert weights_and_history(RunDirectory("again")) == weights_and_history(RunDirectory(folder))
    if choice not in EVALUATED:
        return
    answer = run_py(*EXAMPLES, "job=evaluate", "run=r", "hydra.run.dir=measured")
    assert answer.code == 0, answer.err
    before, after = (json.loads(Path(f, "results.json").read_text())["test"] for f in ("r", "measured"))
    assert after["accuracy"] == before["accuracy"]


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run without any example."""
    return train_tiny_exact(tmp_path_factory.mktemp("plain") / "run", "trainer.epochs=1").weights.read_bytes()


def test_each_example_makes_another_run_than_without_it(run_py, plain_weights: bytes) -> None:
    """An example without any effect would pass all other tests."""
    weights = {}
    for choice in ("optimizer=lion", "loss=focal", "augment=speckle", "callbacks=lookahead", "logger=json_lines"):
        weights[choice] = RunDirectory(train_and_kill(run_py, choice, choice.replace("=", "_"))).weights.read_bytes()
    assert weights.pop("logger=json_lines") == plain_weights  # a logger does not change the weights
    assert len({*weights.values(), plain_weights}) == 5


def test_the_schedule_rises_and_falls(run_py) -> None:
    folder = train_and_kill(run_py, "scheduler=linear_cosine")
    rates = [row["lr"] for row in RunDirectory(folder).read_history()]
    assert rates[:2] == pytest.approx([1e-4, 5.5e-4])
    assert rates[2] == pytest.approx(1e-3)  # the maximum, where the cosine begins


def test_evaluating_needs_no_optimizer(run_py) -> None:
    train_and_kill(run_py, "optimizer=lion")
    assert run_py("job=evaluate", "run=r").code == 0
    answer = run_py("job=resume", "run=r")
    assert answer.code == 1
    assert answer.err == (
        "error: optimizer._target_=lion_pytorch.Lion: the package lion_pytorch is not one that this command imports; "
        "if you trust it, add imports=[lion_pytorch]\n"
    )


def test_a_network_of_ones_own(run_py) -> None:
    """Loading it requires imports=[examples], the code's hash is recorded, and the deconvnet's error names a layer."""
    folder = train_and_kill(run_py, "model=tiny_resnet")
    answer = run_py("job=evaluate", "run=r")
    assert answer.code == 1
    assert answer.err == (
        "error: r/model.safetensors: model._target_=examples.extend.tiny_resnet.TinyResNet: the package examples is "
        "not one that this command imports; if you trust it, add imports=[examples]\n"
    )
    assert run_py(*EXAMPLES, "job=evaluate", "run=r", "hydra.run.dir=measured").code == 0
    hashes = [RunDirectory(run).environment["code"]["imported"]["examples"] for run in ("r", "measured")]
    assert hashes[0] == hashes[1] is not None
    with pytest.raises(UserError, match=r"blocks\.0\.conv2 .* is not the output of blocks\.0\.norm1"):
        Deconvnet(load_run(folder, ["examples"]).model, image_size=64)


def test_a_metric_of_ones_own(run_py, plain_weights: bytes) -> None:
    """Its value is F1, it does not change the weights, and early stopping can monitor it."""
    history = RunDirectory(train_and_kill(run_py, "callbacks=macro_f1")).read_history()
    assert all(0 <= row["validation_f1"] <= 1 for row in history)
    assert RunDirectory("r").weights.read_bytes() == plain_weights
    confusion = torch.tensor([[2, 1, 0], [0, 0, 0], [1, 0, 1]])  # class 1 is predicted once but has no images
    true, predicted = confusion.nonzero().repeat_interleave(confusion[confusion > 0], 0).unbind(1)
    result = Evaluation(0.0, 0.0, None, predicted, torch.ones(len(true)), true, 3)
    f1 = MacroF1().measure(None, {"validation": result})["validation_f1"]
    assert f1 == pytest.approx((4 / 6 + 0 + 2 / 3) / 3)
    words = [*EXAMPLES, *TINY_EXACT, "callbacks=[early_stopping,macro_f1]", "callbacks.early_stopping.patience=1"]
    words += ["callbacks.early_stopping.monitor=validation_f1", "callbacks.early_stopping.min_delta=2"]
    assert run_py(*words, "trainer.epochs=4", "hydra.run.dir=short").code == 0
    assert len(RunDirectory("short").read_history()) == 2


def test_the_loggers_lines(run_py) -> None:
    train_and_kill(run_py, "logger=json_lines")
    lines = [json.loads(line) for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "epoch/validation_loss" in line] == [1]
    assert set(lines[-1]) == {"result/validation_accuracy", "result/test_accuracy"}


@pytest.mark.drawn
@pytest.mark.parametrize("choice", ["model=tiny_resnet", "loss=focal"])
def test_the_job_explains_any_network(run_py, choice: str) -> None:
    train_and_kill(run_py, choice)
    answer = run_py(*EXAMPLES, "job=saliency", "run=r", "job.count=2", "hydra.run.dir=maps")
    assert answer.code == 0, answer.err
    rows = read_csv("maps/saliency.csv")
    assert len(rows) == 2
    assert all(float(row["largest"]) > 0 and abs(float(row["agreement_with_other_class"])) <= 1 for row in rows)
    assert Path("maps/figures/saliency.png").stat().st_size > 5_000
    assert json.loads(Path("maps/status.json").read_text())["state"] == "done"


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: f"{p.parent.name}={p.stem}")
def test_each_file_opens_with_what_it_is_and_its_command(path: Path) -> None:
    head = path.read_text(encoding="utf-8").removeprefix("# @package _global_\n").split("\n\n")[0]
    for line in ("# Source: ", "#   python run.py --config-dir examples/extend/conf ", "# Expected: "):
        assert line in head


PAGE = (ROOT / "docs/extend.md").read_text(encoding="utf-8")
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.S) for line in block.splitlines() if "run.py" in line
]
QUICK = ("debug=batch", "trainer=exact", "trainer.device=cpu")
FEW = ("data.train_images=80", "data.test_images=20")


@pytest.mark.parametrize("line", COMMANDS, ids=lambda line: line.split()[-1])
def test_each_command_of_the_page(run_py, tiny_run, line: str) -> None:
    words = shlex.split(line.replace("run=last", f"run={tiny_run.folder}").replace("examples/extend/conf", str(CONF)))
    assert words[:2] == ["python", "run.py"]
    trains = not any(word.startswith("job=") for word in words)
    few = (*QUICK, *(() if "data=gratings" in words else FEW)) if trains else ()
    answer = run_py(*words[2:], *few, "hydra.run.dir=r")
    assert answer.code == 0, answer.err
    assert RunDirectory("r").state == "done"
    assert (" on Gratings: " in answer.out) is ("data=gratings" in words)


def test_the_page_has_a_command_for_each_slot() -> None:
    assert len(COMMANDS) == 10
    for path in CONF.rglob("*.yaml"):
        assert f"{path.parent.name}={path.stem}" in PAGE


def test_the_python_of_the_page(tmp_path: Path, monkeypatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zfnet, "compose", lambda words: compose([*words, *QUICK, *FEW]))
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["config"].loss == {"_target_": "examples.extend.focal_loss.FocalLoss", "gamma": 2.0, "weight": None}
    assert names["run"].results["epochs"] == 1


# run both commands in one process, without figures: importing PyTorch and drawing take most of the time
PROJECT = """
import json, os, runpy, sys
import zfnet.jobs.evaluate, zfnet.jobs.train
for job in (zfnet.jobs.train, zfnet.jobs.evaluate):
    assert job.__file__.startswith(os.getcwd())  # the project's copy, not this repository's
    for name in ("draw_curves", "draw_results", "draw_samples", "save_figure"):
        setattr(job, name, lambda *_: None)
for words in json.loads(sys.argv[1]):
    sys.argv[:] = ["run.py", *words]
    runpy.run_path("run.py", run_name="__main__")
    sys.modules.pop("tiny_resnet")  # the next command must import it again
"""


@pytest.mark.slow
def test_a_project_of_ones_own(tmp_path: Path) -> None:
    """Follow the page's steps: add a file beside run.py, one in conf/, and conf/local.yaml. Then one word uses it."""
    for folder in ("conf", "zfnet", "hydra_plugins"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", "local.yaml"))
    shutil.copy(ROOT / "run.py", tmp_path)
    shutil.copy(ROOT / "examples/extend/tiny_resnet.py", tmp_path)
    text = (CONF / "model/tiny_resnet.yaml").read_text(encoding="utf-8").replace("examples.extend.", "")
    (tmp_path / "conf/model/tiny_resnet.yaml").write_text(text, encoding="utf-8")
    (local,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    (tmp_path / "conf/local.yaml").write_text(textwrap.dedent(local), encoding="utf-8")
    words = ["experiment=quickstart", "model=tiny_resnet", "model.width=4", *QUICK, *FEW, "hydra.run.dir=r"]
    both = json.dumps([words, ["job=evaluate", "run=r", "hydra.run.dir=measured"]])
    done = subprocess.run([sys.executable, "-c", PROJECT, both], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert RunDirectory(tmp_path / "measured").state == "done"
