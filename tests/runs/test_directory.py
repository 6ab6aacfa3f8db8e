"""Run directories: how they are listed, claimed and refused."""

from __future__ import annotations

import csv
import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers import TINY, claim, compose, raise_disk_full, write_images
from zfnet.config.errors import UserError
from zfnet.runs import directory as run_module
from zfnet.runs.command import CONF
from zfnet.runs.directory import RunDirectory, find_run, list_runs, write_atomically, write_tensors
from zfnet.runs.session import hold_directory
from zfnet.training.checkpoint import step_files


def test_last_is_the_newest_finished_training_run(tiny_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no finished training run"):
        find_run("last")
    (tmp_path / "outputs/train").mkdir(parents=True)
    (tmp_path / "outputs/train/a").symlink_to(tiny_run.folder)
    claim(RunDirectory(tmp_path / "outputs/train/b"), compose(*TINY))  # newer, but it did not run
    assert find_run("last").folder == Path("outputs/train/a")


def test_last_is_the_same_run_in_all_jobs_of_a_sweep(run_py, tiny_run, tmp_path: Path) -> None:
    """Otherwise the second job would extend the run that the first job made."""
    (tmp_path / "outputs/train").mkdir(parents=True)
    (tmp_path / "outputs/train/a").symlink_to(tiny_run.folder)
    words = ("job=extend", "run=last", "trainer.epochs=3,4", "hydra.sweep.dir=outputs/sweeps/s", "logger=none")
    answer = run_py("-m", *words)
    assert answer.code == 0, answer.err
    assert "job 0: trainer.epochs=3\n" in answer.out  # without the mark of `prepare_overrides`
    parents = [run.read_config().parent for run in list_runs(Path("outputs/sweeps"))]
    assert [parent and (parent.run, parent.epoch) for parent in parents] == [("outputs/train/a", 2)] * 2


def test_a_linked_run_is_listed_once_under_its_own_name(tmp_path: Path) -> None:
    claim(RunDirectory(tmp_path / "outputs/train/b"), compose(*TINY))
    (tmp_path / "outputs/again").symlink_to(".")
    (tmp_path / "outputs/train/a").symlink_to("b")
    assert [run.folder.relative_to(tmp_path) for run in list_runs(tmp_path / "outputs")] == [Path("outputs/train/b")]


def test_another_runs_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert claim(run, compose(*TINY)) is False
    before = (run.folder / "config.yaml").read_bytes()
    assert claim(run, compose(*TINY)) is True
    with pytest.raises(UserError, match="contains a run with another config"):
        claim(run, compose(*TINY, "seed=1"))
    assert (run.folder / "config.yaml").read_bytes() == before


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "first")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(run_module.os, name, raise_disk_full)
            with pytest.raises(UserError, match=r"results\.json cannot be written: No space left on device"):
                write_atomically(path, "second")
        assert path.read_text() == "first"
        assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    write_atomically(path, b"third")
    assert path.read_text() == "third"


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path: Path, monkeypatch) -> None:
    done: list[object] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "replace", lambda *paths: (replace(*paths), done.append("named")))
    write_atomically(tmp_path / "results.json", "first")
    assert done == [(tmp_path / "results.json").stat().st_ino, "named", tmp_path.stat().st_ino]


def test_files_have_the_mode_that_the_user_gives_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a.json", "{}")
        write_tensors(tmp_path / "b.safetensors", {"x": torch.ones(2)}, {})
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode) for path in tmp_path.iterdir()} == {
        "a.json": "0o100640",
        "b.safetensors": "0o100640",
    }


@pytest.mark.parametrize("what", ["job=runs", "sweep", "run=last", "data", "images", "checkpoints"])
def test_a_folder_that_cannot_be_read_is_named(
    what: str, run_py, tiny_run, tmp_path: Path, monkeypatch, caplog
) -> None:
    """Patch `os` instead of changing the folder's mode, because tests may run as root, which can read every folder."""
    real = {name: getattr(os, name) for name in ("scandir", "listdir")}

    def refusing(name: str):
        def call(path="."):
            if not isinstance(path, int) and Path(path).name == "secret":
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real[name](path)

        return call

    folder = {"data": "photos/train/cat/secret", "images": "photos/secret"}.get(what, "outputs/s/secret")
    write_images(tmp_path, {f"photos/train/{name}": 1 for name in ("cat", "dog")})
    shutil.copytree(tiny_run.folder, tmp_path / "outputs/s/a")
    shutil.copytree(tiny_run.folder, tmp_path / folder)
    if what == "checkpoints":
        (tmp_path / "outputs/s/a/checkpoints").rename(tmp_path / "outputs/s/a/secret")
    monkeypatch.chdir(tmp_path)
    for name in real:
        monkeypatch.setattr(os, name, refusing(name))
    if what == "checkpoints":
        with pytest.raises(UserError, match="outputs/s/a/secret cannot be read: Permission denied"):
            step_files(Path("outputs/s/a/secret"))
        return
    answer = run_py(
        *{
            "job=runs": ["job=runs"],
            "sweep": ["job=compare", "job.sweep=outputs/s"],
            "run=last": ["job=summary", "run=last"],
            "data": ["job=summary", "data=folder", "data.root=photos"],
            "images": ["job=predict", "run=outputs/s/a", "images=photos"],
        }[what]
    )
    assert folder in (text := answer.out + answer.err + caplog.text)
    assert "cannot be read" in text
    assert "Permission denied" in text
    assert answer.code == (what == "data")
    assert what != "job=runs" or "outputs/s/a" in answer.out


def test_a_table_holds_no_formulas(tmp_path: Path) -> None:
    """A file can have any name, and a spreadsheet evaluates cells that begin like these."""
    texts = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "a=b", "-1.5", "+3", "-inf", ""]
    RunDirectory(tmp_path).write_csv("t.csv", [{"=image": text, "n": -1.5} for text in texts])
    with open(tmp_path / "t.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["'=image", "n"]
    assert [row[0] for row in rows] == [f"'{t}" for t in texts[:5]] + texts[5:]
    assert {row[1] for row in rows} == {"-1.5"}


def test_a_folder_of_configs_is_no_run(tmp_path: Path) -> None:
    shutil.copy(CONF / "config.yaml", tmp_path)
    with pytest.raises(UserError, match="is not empty and contains no run"):
        claim(RunDirectory(tmp_path), compose(*TINY))


def test_a_folder_that_holds_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and contains no run"):
        claim(RunDirectory(tmp_path), compose(*TINY))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_where_data_lies_and_what_is_logged_do_not_make_another_run(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    claim(run, compose(*TINY))
    assert claim(run, compose(*TINY, "data.device_memory=0.1", "trainer.log_every=1", "logger=tensorboard"))
    with pytest.raises(UserError):
        claim(run, compose(*TINY, "optimizer=sgd"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": 1}', "\xff"])
def test_a_damaged_status_is_no_crash(tmp_path: Path, content: str) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "status.json").write_bytes(content.encode("latin-1"))
    assert run.state in ("none", "1")
    (tmp_path / "config.yaml").write_text("[")
    assert run.job is None


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for read in (run.read_config, run.read_history, lambda: run.read_json("results.json")):
        with pytest.raises(UserError, match=f"run={tmp_path}"):
            read()
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        run.read_json("results.json")


def test_runs_are_found_at_every_depth_of_outputs(tmp_path: Path) -> None:
    for name in ("outputs/train/a", "outputs/sweeps/t/lr=1,seed=0", "outputs/train/a/.hydra"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    folders = [run.folder.relative_to(tmp_path).as_posix() for run in list_runs(tmp_path / "outputs")]
    assert folders == ["outputs/sweeps/t/lr=1,seed=0", "outputs/train/a"]


def test_run_last_looks_at_training_runs_that_are_done(tiny_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, age in (("old", 100), ("new", 0), ("failed", 0), ("evaluation", 0), ("incomplete", 0)):
        shutil.copytree(tiny_run.folder, tmp_path / "outputs/train" / name)
        results = tmp_path / "outputs/train" / name / "results.json"
        os.utime(results, (results.stat().st_atime, results.stat().st_mtime - age))
    RunDirectory(tmp_path / "outputs/train/failed").set_status("failed", "x")
    (tmp_path / "outputs/train/incomplete/results.json").unlink()
    config = tmp_path / "outputs/train/evaluation/config.yaml"
    config.write_text(config.read_text().replace("name: train", "name: summary", 1))
    assert find_run("last").folder.name == "new"


def test_a_claim_that_was_killed_leaves_the_directory_free(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.123.partial").write_text("half")
    assert claim(RunDirectory(tmp_path), compose(*TINY)) is False


def test_a_record_that_contains_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("&a\nseed: *a\n")
    with pytest.raises(UserError, match=r"config\.yaml"):
        RunDirectory(tmp_path).read_config()


def test_recorded_bounds_what_aliases_multiply(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"config.yaml cannot be read: it contains more than 100,000 values"):
        RunDirectory(tmp_path).recorded_config()


@pytest.mark.parametrize("name", ["train.log", "figures", "checkpoints", "profile/trace"])
def test_a_run_does_not_write_through_links(tiny_run, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_run.folder, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    place = run.folder / name
    if place.is_dir():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(tmp_path / "elsewhere")
    refused = pytest.raises(UserError, match=f"{name}: is a link, so the run would write elsewhere")
    with refused:
        claim(run, run.read_config())
    with refused, hold_directory(run, "train.log"):  # a continued reproduction calls it alone
        pass
    assert not any((tmp_path / "elsewhere").iterdir())


def test_folders_in_a_run_that_cannot_be_read_are_no_crash(run_py, tiny_run, tmp_path: Path, monkeypatch) -> None:
    """Patch `os` for the reason above."""

    def refusing(real):
        def call(path=".", *args, **kwargs):
            if "secret" in str(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **kwargs)

        return call

    (tmp_path / "run/secret").mkdir(parents=True)
    with monkeypatch.context() as patch:
        for name in ("stat", "listdir"):
            patch.setattr(os, name, refusing(getattr(os, name)))
        RunDirectory(tmp_path / "run").remove_partials()
        with pytest.raises(UserError, match="run/secret cannot be read: Permission denied"):
            claim(RunDirectory(tmp_path / "run/secret"), compose(*TINY))
        answer = run_py("job=compare", f"runs=[{tmp_path}/run/secret/a,{tiny_run.folder}]")
    assert "secret/a: there is no training run" in answer.err


def test_a_job_without_a_directory_keeps_the_users(run_py, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_py("job=runs", "job.root=nowhere").code == 1
    assert (tmp_path / "here").is_dir()


def test_a_loop_of_links_is_no_link_to_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").symlink_to("checkpoints")
    RunDirectory(tmp_path).refuse_links()
    with pytest.raises(UserError, match="checkpoints cannot be read: Too many levels of symbolic links"):
        step_files(tmp_path / "checkpoints")


@pytest.mark.parametrize("text", ["x,y\n1,2\n", "epoch,lr\n1e300,1\n", "epoch,lr\n1,1\n,\n"])
def test_a_history_without_its_epochs_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "history.csv").write_text(text)
    with pytest.raises(UserError, match=r"history\.csv cannot be read: a row has no epoch"):
        RunDirectory(tmp_path).read_history()


def test_links_of_earlier_wandb_runs_are_no_obstacle(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    logs = run.folder / "wandb/offline-run-20260101_000000-abc/logs"
    logs.mkdir(parents=True)
    (logs / "debug-core.log").symlink_to(tmp_path / "elsewhere.log")
    run.refuse_links()
    (logs / "other.log").symlink_to(tmp_path / "elsewhere.log")
    with pytest.raises(UserError, match=r"other\.log: is a link"):
        run.refuse_links()
