"""A run accepts only the data that it was trained on, identified by content and not by location."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.helpers import EVERY_STEP, TINY_EXACT, Killed, claim, compose, killed_before, load_for_job, write_images
from zfnet.config.errors import UserError
from zfnet.config.schema import Config
from zfnet.data import load_splits
from zfnet.jobs.reproduce import reproduce
from zfnet.jobs.train import train
from zfnet.runs.directory import RunDirectory

FOLDER = (*(w for w in TINY_EXACT if "_images=" not in w), "data=folder", "data.image_size=64", "data.validation=4")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Write 18 training and 4 validation images of two classes, in batches of 9, and 4 test images."""
    write_images(tmp_path / "photos/train", {"cat": 10, "dog": 12}, size=64)
    write_images(tmp_path / "photos/test", {"cat": 2, "dog": 2}, size=64)
    return tmp_path / "photos"


def config_for(root: Path, *words: str) -> Config:
    config = compose(*FOLDER, EVERY_STEP, "data.root=nowhere", *words)  # one composed config for all folders
    config.data.root = str(root)
    return config


def start(folder: Path, root: Path, *words: str, at: int | None = None) -> RunDirectory:
    """Train in `folder` on the images at `root`, up to step `at` or to the end."""
    config, run = config_for(root, *words), RunDirectory(folder)
    if at is None:
        train(config, run)
    else:
        with killed_before(at), pytest.raises(Killed):
            train(config, run)
    return run


def files_of(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in ("train.log", "status.json")}


def exchange(photos: Path) -> None:
    Image.new("RGB", (64, 64), "red").save(photos / "train/cat/003.png")


def to_validation(photos: Path) -> None:
    """Divide the same images and labels, in the same order, in another way."""
    for split in ("val", "test"):
        (photos / split / "dog").mkdir(parents=True, exist_ok=True)
    (photos / "train/dog/011.png").rename(photos / "val/dog/011.png")


def remembered(photos: Path) -> dict[str, object]:
    """Return the entries of environment.json about these images."""
    splits = load_splits(config_for(photos).data)
    return json.loads(json.dumps({"data_fingerprint": splits.fingerprint, "data": splits.describe()}))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (exchange, "other pixels or labels"),
        (lambda p: write_images(p / "train", {"eel": 3}, size=64), "class 'eel' is new; 21 training images, not 18"),
        (lambda p: [shutil.rmtree(p / s / "cat") for s in ("train", "test")], "class 'cat' is gone; 10 training"),
        (lambda p: (p / "test/dog/001.png").unlink(), "3 test images, not 4"),
        (lambda p: [(p / s / "cat").rename(p / s / "ant") for s in ("train", "test")], "'ant' is new, 'cat' is gone"),
        (to_validation, "21 training images, not 18; 1 validation images, not 4"),
    ],
)
def test_difference_sees_pixels_counts_classes_and_splits(photos: Path, change: Callable, expected: str) -> None:
    if "'cat' is gone; 1" in expected:
        write_images(photos / "train", {"fox": 2}, size=64)
    recorded, splits = remembered(photos), config_for(photos).data
    assert load_splits(splits).difference(recorded) is None
    change(photos)
    assert expected in str(load_splits(splits).difference(recorded))


@pytest.mark.parametrize("data", [[], {"classes": 3, "images": "x"}, {"classes": [[1]], "images": {"a": [2]}}, None])
def test_difference_takes_a_strange_record(photos: Path, data: object) -> None:
    """Older records contain only the fingerprint."""
    splits = load_splits(config_for(photos).data)
    assert splits.difference({"data_fingerprint": "0", "data": data})
    assert splits.difference({}) is None


def test_a_run_does_not_go_on_with_other_images(photos: Path, tmp_path: Path, run_py) -> None:
    run = start(tmp_path / "r", photos, at=3)
    exchange(photos)
    before = files_of(run.folder)
    answer = run_py("job=resume", "run=r")
    assert answer.error.startswith("r was trained on other images (other pixels or labels): restore those, or")
    assert files_of(run.folder) == before


def test_another_folder_is_recognised_in_the_directory_of_a_run(photos: Path, tmp_path: Path) -> None:
    others = Path(shutil.copytree(photos, tmp_path / "others"))
    exchange(others)
    run = start(tmp_path / "r", photos, at=3)
    for _ in ("stopped", "finished"):
        with pytest.raises(UserError, match="r was trained on other images"):
            start(run.folder, others)
        start(run.folder, photos)
    assert run.read_config().data.root == str(photos)


@pytest.mark.parametrize("at", [3, None])
def test_data_that_moved_is_found_and_recorded(photos: Path, tmp_path: Path, run_py, at: int | None) -> None:
    run = start(tmp_path / "r", photos, at=at)
    (run.folder / ".hydra").mkdir()
    (run.folder / ".hydra/config.yaml").write_text(yaml.safe_dump(run.recorded_config() | {"hydra": {}}))
    moved = photos.rename(tmp_path / "moved")
    if at is None:
        start(run.folder, moved)
    else:
        answer = run_py("job=resume", "run=r", f"data.root={moved}")
        assert answer.code == 0, answer.err
    assert run.state == "done"
    for name in ("config.yaml", ".hydra/config.yaml"):
        assert str(photos) not in (run.folder / name).read_text()
        assert yaml.safe_load((run.folder / name).read_text())["data"]["root"] == str(moved)


def test_another_folder_is_recognised_in_the_directory_of_a_sweep(
    photos: Path, tmp_path: Path, run_py, monkeypatch
) -> None:
    monkeypatch.setattr("zfnet.sweeps.callback.SweepReport.on_multirun_end", lambda *_, **__: None)
    monkeypatch.setattr("zfnet.sweeps.callback.SweepReport.on_job_end", lambda *_, **__: None)
    others = Path(shutil.copytree(photos, tmp_path / "others"))
    moved = Path(shutil.copytree(photos, tmp_path / "moved"))
    exchange(others)
    words = ("-m", *FOLDER, "seed=0", "hydra.sweep.dir=s", "hydra.sweep.subdir=job")
    assert run_py(*words, f"data.root={photos}").code == 0
    answer = run_py(*words, f"data.root={others}")
    assert answer.code == 1
    assert "job: s/job was trained on other images (other pixels or labels)" in answer.err
    answer = run_py(*words, f"data.root={moved}")
    assert answer.code == 0, answer.err
    assert RunDirectory("s/job").read_config().data.root == str(moved)


def test_a_run_that_stopped_at_a_bad_image_goes_on_without_it(photos: Path, tmp_path: Path) -> None:
    (photos / "train/cat/004.png").write_bytes(b"no image")
    (photos / "train/dog/link.png").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"004\.png cannot be read as an image"):
        start(tmp_path / "r", photos)
    run = start(tmp_path / "r", photos, "data.on_error=skip")
    assert run.read_json("results.json")["unreadable"] == ["train/cat/004.png", "train/dog/link.png"]
    assert run.read_config().data.on_error == "skip"


def again(run: RunDirectory, root: Path) -> RunDirectory:
    """Reproduce a run, which compares its metrics and weights with the record."""
    config, other = config_for(root), RunDirectory(run.folder.with_name("again"))
    config.run = str(run.folder)
    claim(other, config)
    reproduce(config, other)
    return other


def test_evaluation_and_reproduction_say_that_the_images_changed(photos: Path, tmp_path: Path, caplog) -> None:
    run = start(tmp_path / "r", photos)
    line = f"the images are not those of run={run.folder}: other pixels or labels"
    load_for_job(run).split("all")
    assert not caplog.records
    exchange(photos)
    load_for_job(run).split("all")
    assert caplog.messages == [line]
    with pytest.raises(UserError, match=r"not identical to .* data_fingerprint"):
        again(run, photos)
    assert (tmp_path / "again/reproduce.log").read_text().count(line) == 1


def test_validation_that_chooses_and_reports_says_so(photos: Path, tmp_path: Path) -> None:
    (photos / "test").rename(photos / "val")
    run = start(tmp_path / "r", photos)
    line = "no test images: validation chooses the epoch and gives the result, so its accuracy is optimistic"
    assert (run.folder / "train.log").read_text().count(line) == 1
    results = run.read_json("results.json")
    assert results.pop("validation_chose_and_reports") is True
    run.write_json("results.json", results)  # earlier versions did not write this key
    assert again(run, photos).read_json("reproduction.json")["identical"]


def test_names_of_any_bytes_end_no_run(tmp_path: Path, run_py) -> None:
    odd = {"new\nline": 5, "\x1b[31mred": 5, b"lone\xff".decode(errors="surrogateescape"): 5, "cafe\u0301": 5, "$_$": 5}
    write_images(tmp_path / "photos", odd, size=64)
    for name in odd:
        (tmp_path / "photos" / name / f"bad {name}.png").write_bytes(b"no image")
    run = start(tmp_path / "r", tmp_path / "photos", "data.on_error=skip")
    names = ["$_$", r"\x1b[31mred", "caf\u00e9", r"lone\udcff", r"new\nline"]
    assert list(run.read_json("results.json")["test"]["per_class"]) == names
    assert "\x1b" not in (run.folder / "train.log").read_text()
    answer = run_py("job=predict", "run=r", "images=photos", "hydra.run.dir=p")  # draws the names, too
    assert answer.code == 0, answer.err
    assert "\x1b" not in answer.out + answer.err
    assert len(json.loads(Path("p/predictions.json").read_text())["unreadable"]) == 5
