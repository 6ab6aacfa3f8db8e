"""Images in folders: found, labelled, divided, and cached so that no kill, change or bad file does harm."""

from __future__ import annotations

import errno
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import data_config, write_images
from zfnet.config.errors import UserError
from zfnet.config.schema import DataConfig
from zfnet.data import folder as folder_module
from zfnet.data.folder import load_folder
from zfnet.data.images import fingerprint
from zfnet.data.sources import load_splits


@pytest.fixture
def config(tmp_path: Path):
    """Return a function that makes data settings for tmp_path/photos, with a cache of the test's own."""

    def make(**changes: Any) -> DataConfig:
        values = {"name": "folder", "root": str(tmp_path / "photos"), "cache_dir": str(tmp_path / "cache")}
        return data_config(**(values | changes))

    return make


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return tmp_path / "photos"


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_train_val_test(config, photos: Path) -> None:
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        write_images(photos / part, {"cat": count, "dog": count + 1})
    splits = load_splits(config())
    sizes = [len(s) for s in (splits.train, splits.validation, splits.test)]
    assert sizes == [9, 5, 7]
    assert splits.train.classes == ("cat", "dog")
    assert splits.train.labels.tolist() == [0] * 4 + [1] * 5
    assert splits.test.labels.tolist() == [0] * 3 + [1] * 4
    for part, name in ((splits.train, "train"), (splits.validation, "val"), (splits.test, "test")):
        expected = [pixels_of(p) for p in sorted((photos / name).rglob("*.png"))]
        assert np.array_equal(part.pixels(range(len(part))).numpy(), np.stack(expected))
    assert splits.train.images is splits.test.images  # one array, shared


@pytest.mark.parametrize("names", [("training", "valid", "testing"), ("train", "validation", "test")])
def test_other_names_of_the_parts(config, photos: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write_images(photos / name, {"a": 2, "b": 2})
    train, val, test, _ = load_folder(config())
    assert [len(x) for x in (train, val, test)] == [4, 4, 4]


def test_without_val_some_of_train_is_held_out(config, photos: Path) -> None:
    write_images(photos / "train", {"a": 20, "b": 10})
    write_images(photos / "test", {"a": 1})
    splits = load_splits(config(validation=0.2))
    assert torch.bincount(splits.validation.labels).tolist() == [4, 2]
    assert len(splits.train) == 24
    assert len(splits.test) == 1


def test_an_undivided_folder_is_divided_by_a_seeded_rule(config, photos: Path) -> None:
    write_images(photos, {"a": 20, "b": 10})
    splits = load_splits(config(validation=0.25))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [18, 6, 6]
    assert torch.bincount(splits.test.labels).tolist() == [4, 2]
    rows = torch.cat([splits.train.rows, splits.validation.rows, splits.test.rows])
    assert rows.sort().values.tolist() == list(range(30))
    again = load_splits(config(validation=0.25))
    assert torch.equal(again.test.rows, splits.test.rows)
    other = load_splits(config(validation=0.25, split_seed=1))
    assert not torch.equal(other.test.rows, splits.test.rows)


def test_a_subset_is_taken_of_training_images_only(config, photos: Path) -> None:
    write_images(photos, {"a": 20, "b": 10})
    whole, part = load_splits(config()), load_splits(config(subset=9))
    assert torch.bincount(part.train.labels).tolist() == [6, 3]
    assert set(part.train.rows.tolist()) < set(whole.train.rows.tolist())
    assert torch.equal(part.test.rows, whole.test.rows)
    assert torch.equal(part.validation.rows, whole.validation.rows)


def test_formats_mix_and_odd_files_are_passed_over(config, photos: Path) -> None:
    write_images(photos, {"a": 2, "b": 2})
    for suffix in ("jpg", "bmp", "gif", "webp", "tiff", "PNG"):
        Image.new("RGB", (8, 8), "red").save(photos / f"a/extra.{suffix}")
    (photos / "a/notes.txt").write_text("x")
    (photos / "a/.hidden.png").write_bytes(b"x")
    (photos / ".git").mkdir()
    (photos / "b/below").mkdir()
    Image.new("RGB", (8, 8)).save(photos / "b/below/deep.png")
    train, _, test, _ = load_folder(config())
    assert len(train) + len(test) == 4 + 6 + 1


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda p: None, "there is no such folder"),
        (lambda p: p.mkdir(), "needs at least two class folders"),
        (lambda p: write_images(p, {"a": 3}), "needs at least two class folders with images, has 1"),
        (lambda p: [(p / c).mkdir(parents=True) for c in "ab"], "hold no image files"),
        (
            lambda p: [write_images(p / "train", {"a": 1, "b": 1, "cat": 0}), write_images(p / "val", {"cat": 1})],
            "train/cat: holds no image files to learn the class 'cat' from",
        ),
        (lambda p: write_images(p / "test", {"a": 1, "b": 1}), "has test/ but no train/ folder"),
        (
            lambda p: [write_images(p / "train", {"a": 1, "b": 1}), write_images(p / "test", {"c": 1})],
            "its class 'c' has no folder in",
        ),
    ],
)
def test_what_is_missing_is_named(config, photos: Path, prepare, expected: str) -> None:
    prepare(photos)
    with pytest.raises(UserError) as caught:
        load_folder(config())
    assert expected in str(caught.value)
    assert str(photos) in str(caught.value)


def test_an_unreadable_image_is_named(config, photos: Path, tmp_path: Path) -> None:
    write_images(photos, {"a": 4, "b": 4})
    (photos / "a/bad.png").write_bytes(b"text")
    with pytest.raises(UserError) as caught:
        load_folder(config())
    assert str(photos / "a/bad.png") in str(caught.value)
    assert "data.on_error=skip" in str(caught.value)
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_or_left_out_and_counted(config, photos: Path, capsys) -> None:
    write_images(photos, {"a": 4, "b": 4})
    good = sorted(p for p in photos.rglob("*.png"))
    for name in ("a/0bad.png", "b/001b.png"):
        (photos / name).write_bytes(b"text")
    files = sorted(photos.rglob("*.png"))
    for _ in range(2):  # from the cache as well
        train, _, test, _ = load_folder(config(on_error="skip"))
        assert "2 unreadable images are left out" in capsys.readouterr().out
        rows = torch.cat([train.rows, test.rows]).sort().values
        assert len(rows) == 8
        assert np.array_equal(train.images[rows], np.stack([pixels_of(p) for p in good]))
        for part in (train, test):
            assert [files[r].parent.name for r in part.rows.tolist()] == [part.classes[k] for k in part.labels]
    for path in good:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 10 images can be read"):
        load_folder(config(on_error="skip"))


def test_the_fingerprint_is_that_of_images_and_labels(config, photos: Path) -> None:
    write_images(photos / "train", {"cat": 3, "dog": 2})
    write_images(photos / "test", {"cat": 1, "dog": 1})
    (photos / "train/cat/001.png").write_bytes(b"no image")
    train, _, test, mark = load_folder(config(on_error="skip"))
    labels, rows = torch.cat([train.labels, test.labels]), torch.cat([train.rows, test.rows])
    assert len(labels) == 6
    assert mark == fingerprint(train.images[rows.numpy()], labels.numpy())


def test_the_cache_is_used(config, photos: Path, monkeypatch) -> None:
    write_images(photos, {"a": 3, "b": 3})
    first = load_folder(config())
    monkeypatch.setattr(folder_module, "read_image", lambda *_: pytest.fail("decoded again"))
    second = load_folder(config(validation=0.3))
    assert np.array_equal(first[0].images, second[0].images)
    assert first[3] == second[3]


@pytest.mark.parametrize("what", ["content", "time", "name", "new", "size", "fit"])
def test_a_change_makes_a_new_cache(config, photos: Path, what: str) -> None:
    write_images(photos, {"a": 3, "b": 3})
    before = load_folder(config())
    changes: dict[str, Any] = {}
    path = photos / "a/000.png"
    if what == "content":
        Image.new("RGB", (8, 8), "white").save(path)
    elif what == "time":
        os.utime(path, ns=(0, time.time_ns() + 10**9))
    elif what == "name":
        path.rename(photos / "b/zzz.png")
    elif what == "new":
        shutil.copy(path, photos / "a/001b.png")
    elif what == "size":
        changes = {"store_size": 16}
    else:
        changes = {"fit": "stretch"}
    after = load_folder(config(**changes))
    assert after[0].images.filename != before[0].images.filename
    if what in ("content", "name", "new", "size"):
        assert after[3] != before[3]
    else:
        assert after[3] == before[3]  # the fingerprint is of what the images show


def test_a_killed_build_leaves_nothing_that_counts(config, photos: Path, tmp_path: Path, monkeypatch) -> None:
    write_images(photos, {"a": 3, "b": 3})

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.Path, "write_text", die)  # all pixels are written, the manifest is not
        with pytest.raises(Killed):
            load_folder(config())
    left = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert [p.suffix for p in left] == [".partial"]
    (left[0] / "images.npy").write_bytes(b"garbage")
    train, *_ = load_folder(config())
    assert np.array_equal(train.images[0], pixels_of(photos / "a/000.png"))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_several_at_once_decode_once(config, photos: Path, monkeypatch) -> None:
    write_images(photos, {"a": 5, "b": 5})
    count: list[object] = []
    real = folder_module.read_image
    monkeypatch.setattr(folder_module, "read_image", lambda *given: (count.append(given), real(*given))[1])
    with ThreadPoolExecutor(4) as pool:
        marks = set(pool.map(lambda _: load_folder(config())[3], range(4)))
    assert len(marks) == 1
    assert len(count) == 10


def test_a_cache_that_cannot_be_written_is_named(config, photos: Path, tmp_path: Path) -> None:
    write_images(photos, {"a": 2, "b": 2})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"image cache .*file.* cannot be written .* data.cache_dir="):
        load_folder(config(cache_dir=str(tmp_path / "file")))


@pytest.mark.parametrize(
    ("sizes", "changes", "stored"),
    [
        ([(32, 32)] * 4, {}, 32),  # small squares stay as they are
        ([(32, 32)] * 3 + [(40, 40)], {}, 64),
        ([(40, 32)] * 4, {}, 64),
        ([(100, 100)] * 4, {}, 64),
        ([(100, 100)] * 4, {"crop_size": 80}, 80),
        ([(100, 100)] * 4, {"store_size": 72}, 72),
    ],
)
def test_stored_size(config, photos: Path, sizes, changes: dict, stored: int) -> None:
    for k, size in enumerate(sizes):
        path = photos / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    assert load_folder(config(**changes))[0].images.shape[1:] == (stored, stored, 3)


def test_names_with_spaces_accents_and_signs(config, photos: Path) -> None:
    write_images(photos, {"two words": 2, "é=[ü],{}": 2, "日本": 2})
    train, _, _, _ = load_folder(config())
    assert train.classes == ("two words", "é=[ü],{}", "日本")


def test_a_full_disk_is_named_before_anything_is_decoded(config, photos: Path, tmp_path: Path, monkeypatch) -> None:
    write_images(photos / "train", {"cat": 2, "dog": 2})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, "posix_fallocate", full, raising=False)
        with pytest.raises(UserError, match=r"cannot be written .*No space left on device.*data\.cache_dir"):
            load_folder(config())
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(load_folder(config())[0]) > 0


@pytest.mark.parametrize("name", ["manifest.json", "images.npy"])
def test_a_damaged_cache_is_named(config, photos: Path, name: str) -> None:
    write_images(photos, {"a": 3, "b": 3})
    data = config()
    load_folder(data)
    (damaged,) = Path(str(data.cache_dir)).glob(f"*/{name}")
    damaged.write_bytes(b"[[")
    with pytest.raises(UserError, match=rf"the image cache {damaged.parent} is damaged .*: delete it"):
        load_folder(data)
