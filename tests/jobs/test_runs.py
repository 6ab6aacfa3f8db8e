"""job=runs: the actual state of runs, newest first, including damaged ones."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.helpers import TINY, claim, compose
from zfnet.jobs.runs import Row, describe, run_table
from zfnet.runs.directory import RunDirectory


def claimed(folder: Path, state: str, changed: float, *words: str) -> RunDirectory:
    run = RunDirectory(folder)
    claim(run, compose(*TINY, *words))
    run.set_status(state)
    for path in folder.iterdir():
        os.utime(path, (changed, changed))
    return run


def test_runs_lists_states_newest_first(run_py, tiny_run, tmp_path: Path) -> None:
    root = tmp_path / "outputs/train"
    claimed(root / "stopped", "stopped", 1e9)
    claimed(root / "killed", "running", 1.1e9)
    alive = claimed(root / "alive", "running", 1.2e9)
    (root / "done").symlink_to(tiny_run.folder)
    with alive.lock():
        answer = run_py("job=runs")
    assert answer.code == 0, answer.err
    lines = [line.split() for line in answer.out.splitlines()]
    assert [(line[0], line[-1]) for line in lines[1:]] == [
        ("done", "outputs/train/done"),
        ("running", "outputs/train/alive"),
        ("killed", "outputs/train/killed"),
        ("stopped", "outputs/train/stopped"),
    ]
    assert f"{tiny_run.read_json('results.json')['validation']['accuracy']:.2%} val." in answer.out
    status = RunDirectory(root / "killed").read_json("status.json")
    assert status["state"] == "running"  # listing does not change the record


def test_runs_lists_damaged_directories(run_py, tmp_path: Path) -> None:
    for name, files in {
        "a": {"config.yaml": b"{", "status.json": b"["},
        "b": {"config.yaml": b"\x00\xff", "results.json": b"[]"},
        "c": {"config.yaml": b"job: 3", "results.json": b'{"test": {"accuracy": NaN}}'},
        "d": {"config.yaml": b"job: {name: train}", "results.json": b'{"test": null, "validation": [1]}'},
        "e\x1b[31m": {"config.yaml": b"", "status.json": b'{"state": {"x": 1}}'},
    }.items():
        folder = tmp_path / "outputs/train" / name
        folder.mkdir(parents=True)
        for file, content in files.items():
            (folder / file).write_bytes(content)
    (tmp_path / "outputs/train/f/config.yaml").mkdir(parents=True)  # a folder where a file should be
    answer = run_py("job=runs")
    assert answer.code == 0, answer.err
    assert len(answer.out.splitlines()) == 1 + 6
    assert run_py("job=runs", "job.sort=accuracy").code == 0
    assert "\x1b" not in answer.out


def listed(answer) -> list[str]:
    assert answer.code == 0, answer.err
    return [line.split()[-1].rpartition("/")[2] for line in answer.out.splitlines()[1:]]


def test_runs_shows_trainings_sorts_and_filters(run_py, tmp_path: Path) -> None:
    for n, (name, words, accuracy) in enumerate(
        (("a", ["optimizer.lr=0.001"], 0.5), ("b", ["optimizer.lr=0.01"], 0.9), ("c", ["optimizer=sgd"], 0.7))
    ):
        run = claimed(tmp_path / "outputs/train" / name, "failed" if name == "c" else "done", 1e9 + n, *words)
        run.write_json("results.json", {"validation": {"accuracy": accuracy}, "test": {"accuracy": 0.5}})
        (run.folder / ".hydra").mkdir()
        (run.folder / ".hydra/overrides.yaml").write_text(f"[job=train, hydra.run.dir=x, ++{words[0]}]")
        for path in run.folder.rglob("*"):
            os.utime(path, (1e9 + n, 1e9 + n))
    figure = claimed(tmp_path / "outputs/occlusion/d", "done", 1e9)
    text = (figure.folder / "config.yaml").read_text().replace("name: train", "name: occlusion", 1)
    (figure.folder / "config.yaml").write_text(text)
    answer = run_py("job=runs")
    assert "done" in answer.out.splitlines()[2]
    assert answer.out.splitlines()[2].split()[-4:] == ["small", "shapes", "optimizer.lr=0.01", "outputs/train/b"]
    assert answer.err.startswith("not shown: 1 of other jobs")
    assert listed(run_py("job=runs", "job.all=true")) == ["d", "c", "b", "a"]
    assert listed(run_py("job=runs", "job.sort=accuracy")) == ["b", "c", "a"]
    assert listed(run_py("job=runs", "job.where=[state:done,optimizer.lr:1e-2]")) == ["b"]
    assert listed(run_py("job=runs", "job.where=[optimizer._target_:torch.optim.SGD]")) == ["c"]
    assert run_py("job=runs", "job.where=[model:zfnet]").out.startswith("no such runs below outputs\n")
    assert "error: job.where=done: must be key:value" in run_py("job=runs", "job.where=[done]").err
    assert run_py("job=runs", "job.where=[optimzer.lr:1]").error.endswith("did you mean 'optimizer.lr'?")
    answer = run_py("job=runs", "job.where=[foo:bar]")
    assert answer.error.endswith("no run has a key foo; known: state, job, model, data, or a key of --cfg job")


def test_runs_without_any_run(run_py, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    assert run_py("job=runs").out == "no runs below outputs\n"
    assert run_py("job=runs", "job.root=nowhere").error == "job.root=nowhere: there is no such folder"


def test_describe_reads_size_and_accuracy_from_disk(tiny_run, tmp_path: Path) -> None:
    plain = tiny_run.plain_config()
    row = describe(tiny_run, plain)
    assert row.size == sum(p.lstat().st_size for p in tiny_run.folder.rglob("*") if p.is_file())
    assert (row.job, row.model, row.data, row.overrides) == ("train", "small", "shapes", "")
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    results = tiny_run.read_json("results.json")
    RunDirectory(tmp_path / "run").write_json("results.json", {**results, "test": None})
    assert describe(RunDirectory(tmp_path / "run"), plain).accuracy == ("validation", results["validation"]["accuracy"])
    compared = describe(tiny_run, {"job": {"name": "compare"}, "runs": ["a"], "model": {"name": "zfnet"}, "data": {}})
    assert (compared.model, compared.data) == ("", "")
    assert run_table([compared], 0, 80)[2:] == run_table([compared], 0, 80)[2:3]  # no line about the network


def test_run_table_fits_80_columns() -> None:
    usual, long = "outputs/reproduce/2026-01-31_12-00-00-000000", "outputs/sweeps/" + "x" * 200
    rows = [
        Row("running", 0.0, "reproduce", "small", "shapes", ("validation", 1.0), 5 * 2**30, "seed=1", usual),
        Row(
            "stopped", 0.0, "train", "zfnet", "cifar10", None, 900 * 2**20, "optimizer.lr=0.1 " * 20 + "\x1b[31m", long
        ),
    ]
    lines = run_table(rows, 59 * 60, 80)
    assert max(map(len, lines)) <= 80
    assert lines[2].endswith(usual[-34:])
    assert "100.00% val." in lines[2]
    assert "5.0G" in lines[2]
    assert "59min" in lines[2]
    assert lines[3] == "  small on shapes: seed=1"
    assert lines[5].startswith("  zfnet on cifar10: optimizer.lr=0.1 optimizer.lr=0.1")
    assert "\x1b" not in "".join(lines + run_table(rows, 0, None))
    assert run_table(rows, 0, None)[2].endswith(long)
    assert run_table(rows[:1], 0, 80)[2].endswith(f" {usual}")  # it fits without the job column
