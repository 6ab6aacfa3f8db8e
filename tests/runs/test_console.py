"""Bad input of every kind: one line that names the thing, exit code 1, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

SHAPES = ("experiment=quickstart", "trainer.epochs=1", "data.train_images=100", "data.test_images=20")

# the part of a run's .hydra/config.yaml that matters here: job is no group in it, and Hydra logs nothing
RECORD = """
defaults: [override hydra/job_logging: none, override hydra/hydra_logging: none, _self_]
job: {name: train}
hydra: {run: {dir: 'x/${job.name}'}}
"""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["optimizer.lrr=0.1"], "optimizer.lrr: no such key; did you mean 'optimizer.lr'?"),
        (["trainer.epoch=3"], "trainer.epoch: no such key; did you mean 'trainer.epochs'?"),
        (["optimzer=sgd"], "optimzer: no such key; did you mean 'optimizer'?"),
        (["optimizer=sdg"], "optimizer=sdg: no such choice; did you mean 'sgd'?"),
        (["experiment=blogg"], "experiment=blogg: no such choice; did you mean 'blog'?"),
        (["optimizer.lr=abc"], "optimizer.lr=abc: must be a number"),
        (["optimizer.lr=-1"], "optimizer.lr=-1: must be a number greater than 0"),
        (["optimizer.lr=0"], "optimizer.lr=0: must be a number greater than 0"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: must be a finite number"),
        (["trainer.epochs=0"], "trainer.epochs=0: must be at least 1"),
        (["trainer.epochs=two"], "trainer.epochs"),
        (["data.batch_size=0"], "data.batch_size=0: must be at least 1"),
        (["model.dropout=1"], "model.dropout=1: must be less than 1"),
        (["trainer.device=cuda:99"], "trainer.device=cuda:99"),
        (["trainer.device=gpu"], "trainer.device=gpu: must be one of"),
        (["seed=-1"], "seed=-1: must be at least 0"),
        (["+optimizer.colour=red"], "optimizer.colour: AdamW has no such setting"),
        (
            ["optimizer._target_=os.system"],
            "optimizer._target_=os.system: the package os is not one that this command imports",
        ),
        (["data.image_size=20"], "too few for its"),
        (["data=folder"], "data.root is not set"),
        (["data=folder", "data.root=/nowhere"], "data.root=/nowhere: there is no such folder"),
        (["job=resume"], "job=resume needs run=<dir>"),
        (["job=resume", "run=nowhere"], "run=nowhere: there is no run"),
        (["run=x"], "job=train reads no run: job=resume goes on with one"),
        (["images=cat.jpg"], "job=train reads no image files"),
        (["optimizer.lr"], "the command line cannot be parsed"),
        (["data.mean=[0.5,0.5]"], "must have 3 values"),
        (["scheduler.interval=year"], "scheduler.interval=year: must be epoch or step"),
        (["scheduler.patience=-x"], "scheduler.patience=-x: must be a number"),
        (["model=null"], "model=null: no such choice; known: "),
        (["data="], "data=: no such choice; known: base, cifar10, "),
        (["optimizer=3"], "optimizer=3: no such choice; known: adagrad, "),
        (["seed=${oc.env:ZFNET_NONE}"], "seed: Environment variable 'ZFNET_NONE' not found"),
        (["ü=3"], "the command line cannot be parsed (ü=3): write key=value"),
        (["+data.fit=größe"], "data.fit=größe: must be one of crop or stretch"),
        (["hydra.run.dir=file"], "File exists: 'file'"),
        (["hydra.run.dir=file/run"], "Not a directory: 'file/run'"),
        (["-cp", "record", "job=summary"], "node `job` is not a container"),
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
    assert answer.code == 1
    assert expected in answer.err
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert "Traceback" not in answer.err + answer.out
    if "/nowhere" in expected or "cuda:99" in expected:  # found out by a run, which is kept as failed
        return
    assert set(tmp_path.rglob("*")) == before


def test_a_refused_config_takes_nothing_of_others_away(run_py, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "outputs/train/other").mkdir(parents=True)
    assert run_py("optimizer.lr=abc").code == 1
    assert run_py("optimizer.lr=abc", "hydra.run.dir=mine/run").code == 1
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "other", "outputs", "train"]


def test_a_reader_that_has_had_enough_is_no_error(run_py, monkeypatch) -> None:
    """`python run.py … | head`."""

    def closed(*_: object) -> None:
        raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr("zfnet.jobs.summary.SummaryJob.main", closed)
        patch.setattr("zfnet.runs.console.os.dup2", lambda *_: None)  # stdout is the test's own
        answer = run_py("job=summary")
    assert (answer.code, answer.out, answer.err) == (1, "", "")


def test_full_error_shows_the_traceback(run_py, monkeypatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    from zfnet.config.errors import UserError

    with pytest.raises(UserError, match="lr=-1"):
        run_py("optimizer.lr=-1")


def test_an_error_of_the_program_is_named_and_logged(run_py, tmp_path: Path, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("left over")

    monkeypatch.setattr("zfnet.jobs.train.evaluate", broken)
    answer = run_py(*SHAPES, "hydra.run.dir=r")
    assert answer.code == 1
    assert answer.err == "error: ZeroDivisionError: left over (HYDRA_FULL_ERROR=1 shows where)\n"
    log = (tmp_path / "r/train.log").read_text()
    assert "Traceback" in log
    assert "in broken" in log


def test_help_lists_the_groups(run_py) -> None:
    answer = run_py("--help")
    assert answer.code == 0
    for group in ("job", "model", "optimizer", "scheduler", "data", "augment", "trainer", "experiment"):
        assert f"{group}: " in answer.out
