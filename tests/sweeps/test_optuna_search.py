"""Optuna's search: killed and continued, shared by two processes, pruned, and stored in a database."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from tests.helpers import EVERY_STEP, other_process, run_py_in
from tests.sweeps.test_launch import FAST, SMALL, rows
from zfnet.config.errors import UserError
from zfnet.runs.command import CONF
from zfnet.runs.directory import RunDirectory
from zfnet.training import loop

optuna = pytest.importorskip("optuna")
from zfnet.sweeps.launch import NoObjective, Outcome  # noqa: E402
from zfnet.sweeps.optuna_search import Worker, _open_storage, construct, other_images, problem_of, search_space  # noqa: E402

SEARCH = ("-m", "hydra/sweeper=optuna", *SMALL)
SPACE = ("optimizer.lr=tag(log,interval(1e-4,1e-2))", "data.batch_size=choice(20,30)")


def wait_for(happened: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.01)


def trials_in(sweep: Path, storage: str | None = None) -> list[optuna.trial.FrozenTrial]:
    backend = optuna.storages.journal.JournalFileBackend(str(sweep / "study.journal"))
    return optuna.load_study(
        study_name="zfnet", storage=storage or optuna.storages.JournalStorage(backend)
    ).get_trials()


def search_and_wait(*words: Any) -> None:
    """Run run.py, and wait after two steps until this process is killed."""
    step = loop.train_step
    loop.train_step = lambda state, batch: time.sleep(600) if state.step == 2 else step(state, batch)
    run_py_in(*words)


@pytest.mark.slow
def test_run_search_again_resumes_the_trial_of_a_killed_process(run_py, tmp_path) -> None:
    words = [*SEARCH, *SPACE, "trainer.epochs=2", "hydra.sweeper.n_trials=2", EVERY_STEP]
    sweep = tmp_path / "s"
    with other_process(search_and_wait, tmp_path, *words) as process:
        wait_for(lambda: list(sweep.glob("*/checkpoints/step-*")) or not process.is_alive())
        process.kill()
        process.join()
    assert process.exitcode == -signal.SIGKILL
    [lost] = trials_in(sweep)
    assert lost.state.name == "RUNNING"
    [folder] = [path.parent for path in sweep.glob("*/config.yaml")]

    assert run_py(*words).code == 0
    trials = trials_in(sweep)
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].params == lost.params
    log = (folder / "train.log").read_text()
    assert "continuing from epoch" in log
    assert log.count("epoch 2/2") == 1
    assert len(rows(sweep)) == 2
    assert trials[1].value == json.loads((folder / "results.json").read_text())["validation"]["accuracy"]

    assert run_py(*words).code == 0  # all trials are done
    assert len(trials_in(sweep)) == 3
    refused = run_py(*words, "model.dropout=0.3")
    assert "was begun with other settings (model.dropout=0.3)" in refused.error
    assert len(trials_in(sweep)) == 3


def test_a_study_refuses_other_images(tmp_path: Path) -> None:
    study = optuna.create_study()
    marks = {}
    for name in ("one", "two", "other"):
        marks[name] = RunDirectory(tmp_path / name)
        marks[name].folder.mkdir()
        marks[name].write_json("environment.json", {"data_fingerprint": name if name == "other" else "same"})
    assert other_images(study, ["optimizer.lr"], RunDirectory(tmp_path / "failed")) is None
    assert other_images(study, ["optimizer.lr"], marks["one"]) is None
    assert other_images(study, ["optimizer.lr"], marks["two"]) is None
    assert "other was trained on different images from" in str(other_images(study, ["data.batch_size"], marks["other"]))
    assert other_images(study, ["data.root"], marks["other"]) is None


def test_a_storage_from_elsewhere_adds_no_overrides_and_locks_no_file(run_py, tmp_path, monkeypatch) -> None:
    sweep, lock = tmp_path / "s", optuna.storages.journal.JournalFileBackend
    sweep.mkdir()
    study = optuna.create_study(
        study_name="zfnet",
        direction="maximize",
        storage=optuna.storages.JournalStorage(lock(str(sweep / "study.journal"))),
    )
    (tmp_path / "theirs").write_text("keep")
    params = {"imports": "[this]", "seed": "9", "+callbacks.x": "{_target_:this.X}"}
    choices = {key: optuna.distributions.CategoricalDistribution([value]) for key, value in params.items()}
    waiting = optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING, params=params, distributions=choices)
    running = optuna.trial.create_trial(
        state=optuna.trial.TrialState.RUNNING, user_attrs={"worker": str(tmp_path / "theirs")}
    )
    study.add_trials([waiting, running])
    locked: list[Any] = []
    monkeypatch.setattr("zfnet.sweeps.optuna_search.FileLock", lambda path, **_: locked.append(path) or nullcontext())
    monkeypatch.setattr("zfnet.jobs.train.train_and_test", lambda *_: {"validation": {"accuracy": 0.5}})
    answer = run_py(*SEARCH, SPACE[0], "hydra.sweeper.n_trials=2")
    assert answer.code == 0, answer.err
    (config,) = [yaml.safe_load(path.read_text()) for path in sweep.glob("*/config.yaml")]
    assert (config["imports"], config["seed"], config["callbacks"]) == ([], 0, {})
    assert config["optimizer"]["lr"] == trials_in(sweep)[0].params["optimizer.lr"]
    assert tmp_path / "theirs" not in [Path(path) for path in locked]


def test_a_trial_of_a_host_with_a_similar_name_is_not_stale(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node")
    worker = Worker(tmp_path)
    for host, stale in (("node-2", False), ("node", True)):
        trial = SimpleNamespace(user_attrs={"worker": f"/elsewhere/.workers/{host}-12-34"})
        assert worker.is_stale(trial) == stale


def test_a_journal_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "study.journal").symlink_to("token")
    with pytest.raises(UserError, match=r"study\.journal: is a link"):
        _open_storage(SimpleNamespace(storage=None), tmp_path)
    assert (tmp_path / "token").read_text() == "secret"


@pytest.mark.slow
def test_run_search_in_two_processes_runs_no_trial_twice(run_py, tmp_path) -> None:
    words = [*SEARCH, "optimizer.lr=interval(1e-4,1e-3)", "hydra.sweeper.n_trials=6"]
    sweep = tmp_path / "s"
    with other_process(run_py_in, tmp_path, *words) as other:
        wait_for(lambda: list(sweep.glob("*/status.json")) or not other.is_alive())
        assert run_py(*words).code == 0
        other.join(120)
        assert other.exitcode == 0, (tmp_path / "err.txt").read_text()
    counted = [trial for trial in trials_in(sweep) if not trial.user_attrs.get("void")]
    assert [trial.state.name for trial in counted] == ["COMPLETE"] * 6
    assert len({trial.user_attrs["worker"] for trial in counted}) == 2
    accuracies = {float(row["optimizer.lr"]): float(row["validation_accuracy"]) for row in rows(sweep).values()}
    assert accuracies == {trial.params["optimizer.lr"]: trial.value for trial in counted}


@pytest.mark.parametrize("cut", [-1, -5, -40])
def test_a_cut_line_at_the_end_of_the_journal_costs_that_line(tmp_path: Path, cut: int) -> None:
    """A killed process leaves an incomplete line, and the next process must not append to it."""
    settings = SimpleNamespace(storage=None)

    def study() -> optuna.Study:
        return optuna.load_study(study_name="x", storage=_open_storage(settings, tmp_path))

    optuna.create_study(study_name="x", storage=_open_storage(settings, tmp_path))
    for value in (1.0, 2.0):
        study().tell(study().ask(), value)
    journal = tmp_path / "study.journal"
    journal.write_bytes(journal.read_bytes()[:cut])
    assert [trial.value for trial in study().get_trials()] == [1.0, None]
    study().tell(study().ask(), 3.0)
    study().tell(1, 4.0)
    assert [trial.value for trial in study().get_trials()] == [1.0, 4.0, 3.0]


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 500_000, "[" * 60 + "]" * 60, "x", None])
def test_the_journal_is_bounded(tmp_path: Path, line: str | None) -> None:
    settings = SimpleNamespace(storage=None)
    journal = tmp_path / "study.journal"
    if line is None:
        os.mkfifo(journal)
    else:
        optuna.create_study(study_name="x", storage=_open_storage(settings, tmp_path))
        journal.write_bytes(journal.read_bytes() + f"{line}\n".encode())
    with pytest.raises(UserError, match=r"study\.journal cannot be read: ") as caught:
        _open_storage(settings, tmp_path)
    assert "\n" not in str(caught.value)


def test_trial_pruning_ends_trials_that_job_resume_can_finish(run_py, tmp_path, monkeypatch) -> None:
    trial, evaluate = -1, loop.evaluate

    def ever_worse(model, batches, runtime, what, *more):
        nonlocal trial
        trial += what == "validation 1"
        return dataclasses.replace(evaluate(model, batches, runtime, what, *more), accuracy=0.9 - trial / 10)

    words = ["-m", "hydra/sweeper=optuna", *FAST, *SPACE, "trainer.epochs=3"]
    words += ["hydra.sweeper.n_trials=3", "hydra/sweeper/pruner=median"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", ever_worse)
        answer = run_py(*words, "hydra.sweeper.pruner.n_startup_trials=1")
    assert answer.code == 0
    trials = trials_in(tmp_path / "s")
    assert [t.state.name for t in trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    # the last epoch is not reported, because pruning then saves no time
    assert [t.intermediate_values for t in trials] == [{1: 0.9, 2: 0.9}, {1: 0.8}, {1: pytest.approx(0.7)}]
    states = {name: row["state"] for name, row in rows(tmp_path / "s").items()}
    assert sorted(states.values()) == ["done", "pruned", "pruned"]
    assert "pruned: validation accuracy 80.00% after epoch 1, behind other trials" in answer.out
    name = next(name for name, state in states.items() if state == "pruned")
    assert run_py("job=resume", f"run='s/{name}'").code == 0
    assert json.loads((tmp_path / "s" / name / "status.json").read_text())["state"] == "done"
    assert "continuing from epoch 2" in (tmp_path / "s" / name / "train.log").read_text()


def test_a_trial_in_its_own_working_directory_reports_to_its_study(run_py, tmp_path) -> None:
    words = ["hydra/sweeper/pruner=median", "hydra.sweeper.n_trials=1", "hydra.job.chdir=true", "trainer.epochs=2"]
    answer = run_py("-m", "hydra/sweeper=optuna", *FAST, *SPACE, *words)
    assert answer.code == 0, answer.err
    assert [list(t.intermediate_values) for t in trials_in(tmp_path / "s")] == [[1]]
    assert [path.parent.name for path in tmp_path.rglob("study.journal")] == ["s"]
    assert "written to ." not in answer.out.splitlines()


@pytest.mark.parametrize("together", [1, 4])
def test_ask_runs_no_values_twice(run_py, tmp_path, monkeypatch, together: int) -> None:
    began = []
    monkeypatch.setattr("zfnet.jobs.train.train", lambda config, *_: began.append(config.seed) or 0.5)
    words = ["seed=choice(0,1)", "hydra.sweeper.n_trials=6", f"hydra.sweeper.n_jobs={together}"]
    assert run_py(*SEARCH, *words).code == 0
    assert sorted(began) == [0, 1]
    counted = [trial.value for trial in trials_in(tmp_path / "s") if not trial.user_attrs.get("void")]
    assert counted == [0.5] * 6


def test_run_search_goes_on_after_a_failed_trial(run_py, tmp_path, monkeypatch) -> None:
    def half(config, *_):
        if config.optimizer["lr"] > 0.001:
            raise ZeroDivisionError("too fast")
        return config.optimizer["lr"]

    monkeypatch.setattr("zfnet.jobs.train.train", half)
    answer = run_py(*SEARCH, *SPACE, "hydra.sweeper.n_trials=5", "hydra/sweeper/sampler=random")
    trials = trials_in(tmp_path / "s")
    assert answer.code == 1
    for trial in trials:
        if trial.params["optimizer.lr"] > 0.001:
            assert trial.state.name == "FAIL"
            assert trial.user_attrs["error"] == "too fast"
        else:
            assert trial.value == trial.params["optimizer.lr"]
    assert {trial.state.name for trial in trials} == {"FAIL", "COMPLETE"}
    assert answer.err.count("ZeroDivisionError: too fast") == sum(t.state.name == "FAIL" for t in trials)


def test_ask_is_a_function_of_the_seed_and_of_earlier_trials(run_py, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train", lambda config, *_: -config.optimizer["lr"])
    words = [*SEARCH, *SPACE, "hydra.sweeper.sampler.n_startup_trials=1"]
    run_py(*words, "hydra.sweeper.n_trials=3")
    for count in (1, 3):  # the same search in two parts
        run_py(*words, f"hydra.sweeper.n_trials={count}", "hydra.sweep.dir=t")
    run_py(*words, "hydra.sweeper.n_trials=1", "hydra.sweeper.seed=1", "hydra.sweep.dir=u")
    params = {name: [trial.params for trial in trials_in(tmp_path / name)] for name in "stu"}
    assert params["s"] == params["t"]
    assert params["s"][0] != params["u"][0]
    assert len({str(each) for each in params["s"]}) == 3


def test_a_study_refuses_another_search_space_and_is_not_changed(run_py, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train", lambda config, *_: config.optimizer["lr"])
    assert run_py(*SEARCH, *SPACE, "hydra.sweeper.n_trials=1").code == 0
    for word in ("optimizer.lr=interval(1e-4,1e-2)", "data.batch_size=choice(20,40)", "data.batch_size=range(20,30)"):
        key = word.partition("=")[0]
        answer = run_py(*SEARCH, *[each for each in SPACE if not each.startswith(key)], word)
        assert f"the study zfnet was begun with another search space ({key}): choose another" in answer.error
    assert "search space (seed)" in run_py(*SEARCH, *SPACE, "seed=0,1").error
    assert len(trials_in(tmp_path / "s")) == 1
    assert run_py(*SEARCH, "optimizer.lr=tag(log,interval(1e-3,1e-1))", SPACE[1], "hydra.sweeper.n_trials=2").code == 0
    assert len(trials_in(tmp_path / "s")) == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "has nothing to search"),
        (["optimizer.lr=interval(2,1)"], "is not a search space"),
        (["optimizer.lr=interval(1e-4,abc)"], 'interval(1e-4,abc)": is not a search space; its bounds must be numbers'),
        (["optimizer.lrr=interval(1,2)"], "optimizer.lrr: no such key; did you mean 'optimizer.lr'?"),
        ([*SPACE, "trainer.epochs=0"], "no job has started: trainer.epochs=0: must be at least 1"),
        ([*SPACE, "optimizer=sdg"], "optimizer=sdg: no such choice; did you mean 'sgd'?"),
        (["model.dropout=interval(0.2,1)"], "model.dropout=1.0: must be less than 1 (the job model.dropout=1.0)"),
        (["model.dropout=interval(-1,0.2)"], "model.dropout=-1.0: must be at least 0"),
        ([*SPACE, "data.image_size=choice(64,20)"], "data.image_size=53 or more (it is 20), or lower"),
        ([*SPACE, "trainer.epochs=range(2,0,step=-1)", "scheduler.warmup_epochs=1"], "scheduler.warmup_epochs=1: must"),
        ([*SPACE, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0: must be at least 1"),
        ([*SPACE, "hydra/sweeper/sampler=tbe"], "hydra/sweeper/sampler=tbe: no such choice; did you mean 'tpe'?"),
        ([*SPACE, "hydra/sweeper/pruner=medium"], "did you mean 'median'?"),
        (
            [*SPACE, "hydra.sweeper.pruner=median"],
            "hydra.sweeper.pruner=median: choose a file with hydra/sweeper/pruner=…",
        ),
        ([*SPACE, "+hydra.sweeper.sampler_settings.seed=1"], "no such key; did you mean 'sampler'?"),
        ([*SPACE, "+hydra.sweeper.sampler.sed=1"], "did you mean 'seed'?"),
        ([*SPACE, "hydra.sweeper.sampler._target_=os.system"], "must be a sampler of Optuna"),
        ([*SPACE, "hydra.sweeper.direction=up"], "hydra.sweeper.direction=up: must be one of maximize or minimize"),
        ([*SPACE, "hydra.sweeper.storage=postgresql://me:secret@127.0.0.1:1/none"], "hydra.sweeper.storage="),
        ([*SPACE, "hydra.sweeper.storage=nonsense"], "hydra.sweeper.storage=nonsense"),
    ],
)
def test_run_search_names_what_is_wrong_in_one_line(run_py, tmp_path, words, expected) -> None:
    answer = run_py(*SEARCH, *words)
    assert expected in answer.error
    assert "secret" not in answer.error
    assert not (tmp_path / "s").exists() or "storage" in expected


@pytest.mark.parametrize("pruner", ["none", "median"])
def test_run_search_stops_before_training_without_validation_images(run_py, tmp_path, monkeypatch, pruner) -> None:
    monkeypatch.setattr(loop, "train_step", lambda *_: pytest.fail("trained"))
    words = ["data.validation=0", "trainer.monitor=train_loss", "hydra.sweeper.n_trials=3"]
    answer = run_py(*SEARCH, *SPACE, *words, f"hydra/sweeper/pruner={pruner}")
    assert answer.error.startswith("hydra/sweeper=optuna searches by validation accuracy, and this job has none")
    assert answer.out.count("failed: ") == 1
    assert [trial.state.name for trial in trials_in(tmp_path / "s")] == ["FAIL"]


def test_problem_of_ends_a_search_without_an_objective(tmp_path) -> None:
    study = SimpleNamespace(user_attrs={})
    outcomes = [
        Outcome("a", "done", 0.5),
        Outcome("a", "pruned"),
        Outcome("a", "failed", error=UserError("training diverged")),
        Outcome("a", "done"),  # such as job=evaluate
        pickle.loads(pickle.dumps(Outcome("a", "failed", error=NoObjective("none")))),
    ]
    problems = [problem_of(study, (), outcome, tmp_path) for outcome in outcomes]
    assert [type(problem).__name__ for problem in problems] == [*["NoneType"] * 3, *["NoObjective"] * 2]


@pytest.mark.parametrize("slot", ["sampler", "pruner"])
def test_construct_makes_every_choice_of_conf(slot: str) -> None:
    paths = sorted((CONF / "hydra/sweeper" / slot).glob("*.yaml"))
    made = [construct(slot, yaml.safe_load(path.read_text()), seed=0) for path in paths]
    assert len({type(each) for each in made}) == len(paths) >= 4


@pytest.mark.parametrize(
    ("slot", "target"),
    [
        ("sampler", "os.system"),
        ("sampler", "subprocess.Popen"),
        ("sampler", "optuna.samplers.CmaEsSampler"),
        ("sampler", "optuna.samplers.BruteForceSampler"),
        ("sampler", "optuna.samplers.BaseSampler"),
        ("sampler", "optuna.samplers._tpe.sampler.TPESampler"),
        ("sampler", "optuna.samplers.TPESampler.__init__.__globals__"),
        ("sampler", "optuna.pruners.MedianPruner"),
        ("pruner", "optuna.samplers.RandomSampler"),
        ("pruner", "optuna.load_study"),
        ("pruner", None),
        ("pruner", ["optuna.pruners.NopPruner"]),
    ],
)
def test_construct_refuses_all_but_optunas_classes(slot: str, target: object) -> None:
    witness = {"command": "touch hit", "args": ["touch", "hit"]}
    with pytest.raises(UserError, match=rf"hydra\.sweeper\.{slot}\._target_="):
        construct(slot, {"_target_": target, **witness})
    outer = {"_target_": "optuna.pruners.PatientPruner", "patience": 1}
    with pytest.raises(UserError, match=r"hydra\.sweeper\.pruner\."):
        construct("pruner", {**outer, "wrapped_pruner": {"_target_": str(target), **witness}})


def test_construct_nests_pruners() -> None:
    inner = {"_target_": "optuna.pruners.MedianPruner", "n_startup_trials": 2}
    outer = {"_target_": "optuna.pruners.PatientPruner", "wrapped_pruner": inner, "patience": 1}
    assert type(construct("pruner", outer)) is optuna.pruners.PatientPruner


@pytest.fixture
def postgres() -> Iterator[str]:
    """Start a PostgreSQL server with a socket in a temporary folder; yield the address of its database."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        pytest.skip("PostgreSQL is not installed")
    pytest.importorskip("psycopg2")
    tools, folder = programs[-1].parent, Path("/tmp") / f"zfnet-pg-{os.getpid()}"
    folder.mkdir(mode=0o700)
    server = None
    try:
        account = {}
        if os.geteuid() == 0:  # the server refuses to run as root
            nobody = pwd.getpwnam("nobody")
            os.chown(folder, nobody.pw_uid, nobody.pw_gid)
            account = {"user": nobody.pw_uid, "group": nobody.pw_gid}
        data = folder / "data"
        command = [tools / "initdb", "-D", data, "-U", "zfnet", "-A", "trust", "-E", "UTF8", "--no-sync"]
        subprocess.run(command, check=True, capture_output=True, cwd=folder, **account)
        server = subprocess.Popen(
            [tools / "postgres", "-D", data, "-k", folder, "-c", "listen_addresses=", "-F"],
            stderr=subprocess.DEVNULL,
            cwd=folder,
            **account,
        )
        wait_for(lambda: (folder / ".s.PGSQL.5432").exists(), 30)
        yield f"postgresql+psycopg2://zfnet@/postgres?host={folder}"
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)  # fast shutdown: does not wait for clients
            server.wait(30)
        shutil.rmtree(folder)


def test_run_search_in_postgresql_is_shared_by_sweep_directories(run_py, tmp_path, monkeypatch, postgres) -> None:
    monkeypatch.setattr("zfnet.jobs.train.train", lambda config, *_: config.optimizer["lr"])
    words = [*SEARCH, *SPACE, f"hydra.sweeper.storage='{postgres}'", "hydra.sweep.dir=s1"]
    assert run_py(*words, "hydra.sweeper.n_trials=2").code == 0
    assert run_py(*words[:-1], "hydra.sweep.dir=s2", "hydra.sweeper.n_trials=5").code == 0
    trials = trials_in(tmp_path, postgres)
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5
    assert [trial.value for trial in trials] == [trial.params["optimizer.lr"] for trial in trials]
    assert len(list((tmp_path / "s1").glob("*/config.yaml"))) == 2
    assert len(list((tmp_path / "s2").glob("*/config.yaml"))) == 3
    assert not list(tmp_path.glob("*/study.journal"))


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("range(0.1,1,0.2)", [0.1, 0.3, 0.5, 0.7, 0.9]),
        ("range(0.3,0.8,0.1)", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        ("range(1,9,3)", [1, 4, 7]),
    ],
)
def test_search_space_of_a_range_has_all_its_values(word: str, values: list[float]) -> None:
    space = search_space([OverridesParser.create().parse_override(f"a={word}")])["a"]
    assert [space.low, space.high] == [values[0], values[-1]]
    assert space.step == pytest.approx(values[1] - values[0])
    assert all(space._contains(value) for value in values)
