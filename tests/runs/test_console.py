"""Bad input of every kind gives one line that names the problem and exit code 1, and leaves no files behind."""

from __future__ import annotations

import fcntl
import functools
import io
import logging
import os
import pty
import re
import shutil
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tqdm.auto import tqdm

import zfnet
from tests.helpers import TINY, TINY_EXACT, claim, compose, data_config
from zfnet.config.errors import UserError
from zfnet.runs.command import CONF
from zfnet.runs.directory import RunDirectory
from zfnet.runs.session import _Terminal
from zfnet.training.callbacks import ProgressBar

SHAPES = (*TINY_EXACT, "trainer.epochs=1")

# the relevant part of a run's .hydra/config.yaml: job is not a group, and Hydra does not log
RECORD = """
defaults: [override hydra/job_logging: none, override hydra/hydra_logging: none, _self_]
job: {name: train}
hydra: {run: {dir: 'x/${job.name}'}}
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optimizer.lrr=0.1"], "optimizer.lrr: no such key; did you mean 'optimizer.lr'?"),
        (["expriment=quickstart"], "expriment: no such key; did you mean 'experiment'?"),
        (["--experiment", "blog"], "--experiment: no such option; settings have no dashes, as in experiment=blog"),
        (["--experiment=blog"], "--experiment: no such option; settings have no dashes, as in experiment=blog"),
        (["--seed", "3"], "--seed: no such option; settings have no dashes, as in seed=3"),
        (["--lr=0.1"], "--lr: no such option; settings have no dashes, as in optimizer.lr=0.01"),
        (
            ["optimizer.lr=0,001"],
            "0,001: several values need a sweep (run.py -m); write a decimal number with a point: opti",
        ),
        (["job=summary", "model=[small,zfnet]"], "choose one, or sweep over them with run.py -m model=small,zfnet"),
        (["hydra/lancher=basic"], "hydra/lancher: no such group; did you mean 'hydra/launcher'?"),
        (
            ["-m", "optimizer=glob(*)", "hydra/launcher=nope"],
            "hydra/launcher=nope: no such choice; known: basic, joblib",
        ),
        (["optimizer=sdg"], "optimizer=sdg: no such choice; did you mean 'sgd'?"),
        (["optimizer.lr=abc"], "optimizer.lr=abc: must be a number"),
        (["+optimizer.colour=red"], "optimizer.colour: AdamW has no such setting"),
        (["trainer.device=cuda:99"], "trainer.device=cuda:99"),
        (["data=folder", "data.root=/nowhere"], "data.root=/nowhere: there is no such folder"),
        (["job=resume"], "job=resume needs run=<dir>"),
        (["job=resume", "run=nowhere"], "run=nowhere: there is no run"),
        (["job=resume", f"run={'a' * 300}"], "aaa: there is no run"),
        (["optimizer.lr"], "the command line cannot be parsed"),
        (["model=null"], "model=null: no such choice; known: "),
        (["hydra.run.dir=file"], "the folder file cannot be created (File exists): choose another with hydra.run.dir"),
        (
            ["hydra.run.dir=file/run"],
            "the folder file/run cannot be created (Not a directory): choose another with hydra.",
        ),
        ([f"hydra.run.dir={'x' * 300}"], "x cannot be created (File name too long): choose another with hydra.run"),
        (["-m", "seed=0,1", "hydra.sweep.dir=file/run"], "file/run cannot be created (Not a directory): choose"),
        (
            ["-cp", "record", "job=summary"],
            "job=summary: this config has no config group named job; write job.name=summary",
        ),
        (["-cp", "broken"], "broken/config.yaml, line 3, column 2: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_line_and_nothing_written(run_py, tmp_path: Path, words, expected) -> None:
    (tmp_path / "file").touch()
    for name, text in (("record", RECORD), ("broken", "seed: 1\nmodel: {a: 1\nb: [\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    before = set(tmp_path.rglob("*"))
    words = [str(tmp_path / word) if word in ("record", "broken") else word for word in words]
    answer = run_py(*words)
    assert expected in answer.error
    assert "Traceback" not in answer.err + answer.out
    if "/nowhere" in expected or "cuda:99" in expected:  # found by a run, whose failed directory is kept
        return
    assert set(tmp_path.rglob("*")) == before


def test_a_strangers_record_sends_no_codes_to_the_terminal(run_py, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump({**compose(*TINY).to_dict(), "\x1b[2Jkey": 1}))
    answer = run_py("job=evaluate", "run=run")
    assert "\\x1b[2Jkey" in answer.error
    assert "\x1b" not in answer.error


def test_the_title_of_a_strangers_data_set_holds_no_codes() -> None:
    own = data_config("dataset", train={"_target_": "a.\x1b[2JItems"})
    assert own.title == "\\x1b[2JItems"
    assert data_config("dataset", train={}).title == "None"


def test_names_in_the_log_send_no_codes_to_the_terminal(capsys) -> None:
    _Terminal().emit(logging.LogRecord("zfnet", logging.INFO, "", 0, "class \x1b[2J of\n%s", ("two",), None))
    assert capsys.readouterr().out == "class \\x1b[2J of\ntwo\n"


def test_a_refused_config_takes_nothing_of_others_away(run_py, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "outputs/train/other").mkdir(parents=True)
    assert run_py("optimizer.lr=abc").code == 1
    assert run_py("optimizer.lr=abc", "hydra.run.dir=mine/run").code == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "other", "outputs", "train"]


def test_a_closed_pipe_is_no_error(run_py, monkeypatch) -> None:
    """`python run.py … | head`: no message, also not from Python, which flushes the streams at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        answer = run_py("job=summary")
        closed.flush()
    assert (answer.code, answer.err) == (1, "")


def test_an_error_that_nobody_can_read_keeps_its_exit_code(run_py, monkeypatch) -> None:
    """After SIGHUP the terminal is gone, and Python would exit with 120."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", closed)
        closed.write("stopping")
        assert run_py("job=summary").code == 0
        closed.flush()


def test_a_deleted_current_directory_is_named(run_py, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    answer = run_py("job=summary")
    assert (answer.code, answer.err) == (1, "error: the current directory was deleted: change to another directory\n")


def test_each_line_is_written_at_once(run_py, monkeypatch) -> None:
    """A log of a job on a cluster shows the progress of a run."""
    with io.TextIOWrapper(io.BytesIO()) as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert run_py("optimizer.lr=-1").code == 1
        assert stdout.line_buffering


def test_closed_streams_end_no_training(run_py, tmp_path: Path, monkeypatch) -> None:
    """`python run.py … >&- 2>&-`: Python sets the streams to None."""
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, None)
        assert run_py(*SHAPES, "hydra.run.dir=run").code == 0
    assert RunDirectory(tmp_path / "run").state == "done"


def test_full_error_shows_the_traceback(run_py, monkeypatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(UserError, match="lr=-1"):
        run_py("optimizer.lr=-1")


def test_an_error_of_the_program_is_named_and_logged(run_py, tmp_path: Path, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("left over")

    monkeypatch.setattr("zfnet.jobs.train.evaluate", broken)
    answer = run_py(*SHAPES, "hydra.run.dir=r")
    where = r"\(test_console\.py, line \d+\) \(HYDRA_FULL_ERROR=1 shows where\)"
    assert re.fullmatch(f"ZeroDivisionError: left over {where}", answer.error)
    log = (tmp_path / "r/train.log").read_text()
    assert "Traceback" in log
    assert "in broken" in log


@pytest.mark.parametrize(
    "word", ["hydra.job.chdir=true", "hydra/job_logging=default", "hydra.output_subdir=.hydra", "hydra.output_subdir=h"]
)
def test_hydras_own_settings_work_as_in_any_program(run_py, tmp_path: Path, monkeypatch, word: str) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train_and_test", lambda *_: {"validation": {"accuracy": 0.5}})
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # Hydra's own logging adds handlers permanently
    here = Path.cwd()
    assert run_py(*SHAPES, "hydra.run.dir=r", word).code == 0
    assert Path.cwd() == here
    assert (tmp_path / "r/config.yaml").is_file()
    assert (tmp_path / "r/.hydra/overrides.yaml").is_file()
    assert (tmp_path / "r/run.log").exists() == ("logging" in word)
    assert (tmp_path / "r/h").exists() == word.endswith("=h")
    assert run_py(*SHAPES, "seed=1", "hydra.run.dir=r", word).err.startswith("error: ")  # another run's directory


def test_a_search_path_adds_choices(run_py, tmp_path: Path) -> None:
    (tmp_path / "more/model").mkdir(parents=True)
    shutil.copy(CONF / "model/small.yaml", tmp_path / "more/model/mine.yaml")
    answer = run_py("job=summary", "model=mine", f"hydra.searchpath=[file://{tmp_path}/more]")
    assert (answer.code, answer.err) == (0, "")


NO_KEY = "model.nothing: no such key with model=mine; known: model."
NO_CHOICE = "model=mina: no such choice; did you mean 'mine'?"


@pytest.mark.parametrize(
    ("option", "words", "expected"),
    [
        ("--config-dir={}", ["model=mine", "model.nothing=80"], NO_KEY),
        ("--config-dir={}", ["optimizer.lr=0,001"], "optimizer.lr=0,001: several values need a sweep (run.py -m)"),
        ("--config-dir={}", ["model=mina"], NO_CHOICE),
        ("--config-dir={}", ["-m", "model=mine,mina"], f"no job has started: {NO_CHOICE}"),
        (
            "--config-dir={}",
            ["-m", "hydra/sweeper=optuna", "optimizer.lrr=1,2"],
            "no job has started: optimizer.lrr: no such key; did you mean 'optimizer.lr'?",
        ),
        ("hydra.searchpath=[file://{}]", ["model=mine", "model.nothing=80"], NO_KEY),
        ("hydra.searchpath=[file://{}]", ["-m", "model=mine,mina"], f"no job has started: {NO_CHOICE}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_fault_is_named_with_a_further_folder(run_py, tmp_path: Path, option: str, words, expected: str) -> None:
    (tmp_path / "more/model").mkdir(parents=True)
    shutil.copy(CONF / "model/small.yaml", tmp_path / "more/model/mine.yaml")
    answer = run_py(*words, option.format(tmp_path / "more"))
    assert answer.error.startswith(expected)


@pytest.mark.parametrize(
    ("word", "text", "expected"),
    [
        ("experiment=mine", "trainer: {epochs: 3}", "its first line must be # @package _global_"),
        ("debug=mine", "trainer: {epochs: 3}", "its first line must be # @package _global_"),
        ("job=mine", "job: {name: mine}", "its first line must be # @package _global_"),
        ("job=mine", "# @package _global_\nname: mine", "its keys must be under job:, after # @package _global_"),
        ("model=mine", "", "is empty"),
        ("augment=mine", "# nothing", "is empty"),
    ],
)
def test_a_choice_whose_file_is_wrong_is_named(run_py, tmp_path: Path, word: str, text: str, expected: str) -> None:
    file = Path(word.replace("=", "/") + ".yaml")
    (tmp_path / "more" / file).parent.mkdir(parents=True)
    (tmp_path / "more" / file).write_text(text)
    assert run_py("--config-dir=more", word).error == f"{file}: {expected}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [("/model: small", "with a slash: override /GROUP"), ("override /model: smal", "model=smal: no such choice; did ")],
)
def test_a_wrong_defaults_list_of_an_experiment(run_py, tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "more/experiment").mkdir(parents=True)
    (tmp_path / "more/experiment/mine.yaml").write_text(f"# @package _global_\ndefaults:\n  - {line}\n")
    assert expected in run_py("--config-dir=more", "experiment=mine").error


@pytest.mark.parametrize("word", ["model=small,zfnet", "seed=0,1", "optimizer.lr=range(1,3)"])
def test_no_list_is_offered_for_one_value(run_py, word: str) -> None:
    assert run_py(word).error == f"{word}: several values need a sweep (run.py -m)"


def test_a_reason_on_the_second_line_is_shown(run_py, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("hydra: {launcher: 3}\n")
    answer = run_py("--config-path", tmp_path)
    assert answer.code == 1
    assert re.fullmatch(r"error: In 'config': \w+ raised while composing config: \S.*\n", answer.err), answer.err


def test_unusual_names_are_taken_literally(run_py, tmp_path: Path, monkeypatch) -> None:
    """Names that Hydra's grammar does not allow or would misread."""
    seen = []
    monkeypatch.setattr("zfnet.jobs.predict.PredictJob.main", lambda job, config, output: seen.append(config))
    run = tmp_path / "a run (1), x=2"
    claim(RunDirectory(run), compose(*SHAPES))
    names = ["cat (1).jpg", "it's.png", "a+b@c#d%e.png", "~/x.png", "größe.png", "a=b.png"]
    for name in names[:3]:
        answer = run_py("job=predict", f"run={run.name}", f"images={name}")
        assert (answer.code, answer.err) == (0, "")
    assert run_py("job=predict", f"run={run.name}", f"images=[{','.join(names[:6])}]").code == 0
    assert [c.images for c in seen] == [*([name] for name in names[:3]), names[:6]]
    assert {c.run for c in seen} == {run.name}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["expriment=quickstart"], "expriment: no such key; did you mean 'experiment'?"),
        (["optimizer=sdg"], "optimizer=sdg: no such choice; did you mean 'sgd'?"),
        (["optimizer.lr=abc"], "optimizer.lr=abc: must be a number"),
        (["optimizer.lr=0,001"], "write a decimal number with a point: optimizer.lr=0.001"),
        (["optimizer.lr"], "cannot be parsed (optimizer.lr): write key=value"),
        (["model=null"], "model=null: no such choice; known: "),
        (["lr=0.1"], "lr: no such key; did you mean 'optimizer.lr'?"),
        (["trainer.epoch=3"], "trainer.epoch: no such key; did you mean 'trainer.epochs'?"),
        (["optimzer=sgd"], "optimzer: no such key; did you mean 'optimizer'?"),
        (["logger=csv,none"], "write a list as logger=[csv,none]"),
        (
            ["experiment=[quickstart,cifar10_small]"],
            "choose one, or sweep over them with run.py -m experiment=quickstart,",
        ),
        (["~loss.weight"], "~loss.weight: is already null"),
        (["~optimizer.maximize"], "optimizer.maximize"),
        (["~loss.weigth"], "loss.weigth: no such key; did you mean 'loss.weight'?"),
        (["trainer.freeze=conv1"], "trainer.freeze=conv1: must be a list, as in [conv1]"),
        (["data.mean=0.5,0.4,0.3"], "write a list as data.mean=[0.5,0.4,0.3]"),
        (["optimizer.lr=choice(1,2"], "optimizer.lr=choice(1,2: must be a number"),
        (["optimizer=sgd", "optimizer.betas=1"], "optimizer.betas: no such key with optimizer=sgd; known: optimizer."),
        (["model.conv1=[1]"], "model.conv1=[1]: is a mapping; set one of its keys, as in model.conv1.channels="),
        (["model.conv3=null", "optimizer.lrr=0.1"], "optimizer.lrr: no such key; did you mean 'optimizer.lr'?"),
        (["job=predict", "run=last", "images="], "images=: is empty; name a file or folder"),
        (["job=compare", "job.sweep="], "job.sweep=: is empty; name a file or folder"),
        (["optimizer=adamw", "optimizer.foreach=true"], "AdamW accepts it: write +optimizer.foreach=true"),
        (["loss.ignore_index=3"], "is not in conf/loss/, but CrossEntropyLoss accepts it: write +loss.ignore_index=3"),
        (["optimizer.param_groups=[]"], "AdamW accepts it: write +optimizer.param_groups=[]"),
        (["optimizer._target_=torch.optim.AdamWW"], "there is no such name; did you mean 'torch.optim.AdamW'?"),
        (["loss._target_=torch.nn.CrosEntropyLoss"], "did you mean 'torch.nn.CrossEntropyLoss'?"),
        (["model=small", "data.image_size=9"], "set data.image_size="),
        (["experiment=blogg"], "experiment=blogg: no such choice; did you mean 'blog'?"),
        (["optimizer.lr=-1"], "optimizer.lr=-1: must be a number greater than 0"),
        (["optimizer.lr=0"], "optimizer.lr=0: must be a number greater than 0"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: must be a finite number"),
        (["trainer.epochs=0"], "trainer.epochs=0: must be at least 1"),
        (["trainer.epochs=two"], "trainer.epochs"),
        (["data.batch_size=0"], "data.batch_size=0: must be at least 1"),
        (["model.dropout=1"], "model.dropout=1: must be less than 1"),
        (["trainer.device=gpu"], "trainer.device=gpu: must be one of"),
        (["seed=-1"], "seed=-1: must be at least 0"),
        (
            ["optimizer._target_=os.system"],
            "optimizer._target_=os.system: the package os is not one that this command imports",
        ),
        (["data.image_size=20"], "too few for its"),
        (["data=folder"], "data.root is not set"),
        (["+loss.reduction=mean"], "loss.reduction=mean: must be sum"),
        (["run=x"], "job=train does not read a run: job=resume continues one"),
        (["images=cat.jpg"], "job=train does not read image files"),
        (["data.mean=[0.5,0.5]"], "must have 3 values"),
        (["scheduler.interval=year"], "scheduler.interval=year: must be epoch or step"),
        (["scheduler.patience=-x"], "scheduler.patience=-x: must be a number"),
        (["data="], "data=: no such choice; known: base, cifar10, "),
        (["optimizer=3"], "optimizer=3: no such choice; known: adagrad, "),
        (["seed=${oc.env:ZFNET_NONE}"], "seed: Environment variable 'ZFNET_NONE' not found"),
        (["ü=3"], "the command line cannot be parsed (ü=3): write key=value"),
        (["+data.fit=größe"], "data.fit=größe: must be one of crop or stretch"),
        ("experiment=quickstart", "give a list of overrides, as in compose(['experiment=quickstart'])"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_compose_says_in_python_what_the_command_line_says(words, expected: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ipykernel", "-f", "optimizer=adamm"])  # arguments of another program
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        zfnet.compose(words)
    assert "\n" not in str(caught.value)


def test_fit_names_what_is_wrong_before_it_takes_a_directory(tmp_path: Path) -> None:
    def changed(part: str, key: str, value: object):
        config = compose(*TINY_EXACT)
        group = getattr(config, part)
        group.__setitem__(key, value) if isinstance(group, dict) else setattr(group, key, value)
        return config

    for config, expected in (
        (changed("optimizer", "lr", -1), "optimizer.lr=-1: must be a number greater than 0"),
        (changed("trainer", "epochs", "x"), "trainer.epochs=x: must be a whole number"),
        (compose("job=summary"), "job=summary: fit trains only"),
        (["experiment=quickstart"], "fit: needs a config from compose"),
    ):
        with pytest.raises(UserError, match=re.escape(expected)):
            zfnet.fit(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that calls another on a terminal of 80 columns and returns the displayed lines."""

    def show(call: Callable[[], object]) -> list[str]:
        screen, program = pty.openpty()
        fcntl.ioctl(program, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        shown = []

        def read() -> None:
            try:
                while data := os.read(screen, 4096):
                    shown.append(data)
            except OSError:  # the terminal was closed
                return

        reader = threading.Thread(target=read)
        reader.start()
        with monkeypatch.context() as patch, open(program, "w") as file:
            patch.setenv("COLUMNS", "80")  # otherwise shutil reads the size of pytest's terminal
            patch.setattr(sys, "stdout", file)
            patch.setattr(sys, "stderr", file)
            call()
        reader.join(10)
        os.close(screen)
        return re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", b"".join(shown).decode()))

    return show


def test_nothing_is_longer_than_a_line_of_80_columns(run_py, terminal, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.training.callbacks.tqdm", functools.partial(tqdm, mininterval=0))  # every step
    commands = (
        [*TINY_EXACT, "hydra.run.dir=run"],
        ["-m", *SHAPES, "seed=0,1", "data.subset=18", "hydra.sweep.dir=outputs/sweep"],
        ["job=evaluate", "run=run"],
        ["job=compare", "runs=[outputs/sweep]"],
        ["job=runs"],
        ["job=summary", "model=zfnet"],
    )
    for words in commands:
        lines = terminal(lambda words=words: run_py(*words))
        assert [line for line in lines if len(line) > 80] == []
        assert len(lines) > 3, words
        if words[-1] == "hydra.run.dir=run":
            assert any("epoch 1/2:  50%|" in line and "/8, " in line for line in lines)


def test_the_bar_shows_all_of_itself_in_80_columns(terminal) -> None:
    """In a long run, the time left, loss and accuracy come last, so a narrow terminal would cut them off."""
    settings = SimpleNamespace(trainer=SimpleNamespace(epochs=100), data=SimpleNamespace(batch_size=32))
    state = SimpleNamespace(epoch=98, step=139_193, step_in_epoch=0, steps_per_epoch=1406, config=settings)
    state.last_reading, state.epoch_seconds = (12.34, 1.0), 1.0
    bar = ProgressBar()
    bar.began = (time.perf_counter() - 193 * 60, 139_000)  # one minute per step

    def run() -> None:
        bar.on_epoch_start(state)
        bar.on_step_end(state)
        bar.bar.refresh()
        bar.bar.close()

    lines = terminal(run)
    assert max(map(len, lines)) <= 80
    whole = r"^epoch 99/100: .*\| 1/1406, 23 h 27 min left, loss 12.34, accuracy 100%$"
    assert any(re.search(whole, line) for line in lines)


def test_help_lists_the_groups(run_py) -> None:
    answer = run_py("--help")
    assert answer.code == 0
    for group in ("job", "model", "optimizer", "scheduler", "data", "augment", "trainer", "experiment"):
        assert f"{group}: " in answer.out
