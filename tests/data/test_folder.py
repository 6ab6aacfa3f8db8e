"""Reading image folders: labels, splits, and a cache that survives kills, changed files and bad files."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import Killed, compose_checked, data_config, raise_disk_full, tiny_model_config, write_images
from zfnet.config.errors import UserError
from zfnet.config.schema import DataConfig
from zfnet.data import decode, preprocess
from zfnet.data import folder as folder_module
from zfnet.data.folder import load_folder
from zfnet.data.images import fingerprint
from zfnet.data.sources import load_splits
from zfnet.runs.directory import RunDirectory
from zfnet.runs.weights import ModelMetadata, TrainedRun


@pytest.fixture
def config(tmp_path: Path):
    """Return a function that makes a data config for tmp_path/photos, with a separate cache for each test."""

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


@pytest.mark.parametrize(
    "names",
    [
        *(("training", "valid", "testing"), ("train", "validation", "test"), ("Train", "VAL", "Test")),
        *(("seg_train", "seg_val", "seg_test"), ("training_set", "ValidationData", "test-images")),
        *(("my shapes train", "my shapes val", "my shapes test"), ("train/Train", "val/val", "test/test")),
    ],
)
def test_other_names_of_the_splits(config, photos: Path, names: tuple[str, ...]) -> None:
    for number, name in enumerate(names):
        write_images(photos / name, {"a": 2, "b": 2 + number})
    assert load_folder(config()).sizes() == {"training": 4, "validation": 5, "test": 6}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "val", "valid"), "val/ and valid/ both name the split val: remove one, or join them"),
        (("Train", "train"), "Train/ and train/ both name the split train"),
        (("Validation", "dogs"), "has Validation/ but no train/ folder; found: Validation, dogs; data.root="),
        (("my_train", "holdout"), "my_train/ is not clearly a class or a split"),
        (("cats/train", "cats/test", "dogs/train", "dogs/test"), "cats/ is not clearly a class or a split"),
    ],
)
def test_splits_never_become_classes(config, photos: Path, folders: tuple[str, ...], expected: str) -> None:
    for name in folders:
        write_images(photos / name, {"a": 2, "b": 2})
    with pytest.raises(UserError) as caught:
        load_folder(config())
    assert expected in str(caught.value)
    assert str(photos) in str(caught.value)


def test_a_class_may_be_called_like_a_train(config, photos: Path) -> None:
    write_images(photos, {"train station": 3, "bus_stop": 3, "test tube": 3, "restrain": 3})
    assert load_folder(config()).train.classes == ("bus_stop", "restrain", "test tube", "train station")


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
    assert sum(load_folder(config()).sizes().values()) == 4 + 6 + 1


def test_what_is_left_out_is_counted_in_one_line(config, photos: Path, tmp_path: Path, caplog) -> None:
    """test_files.py tests the listing of folders in detail."""
    write_images(photos / "train", {"a": 3, "b": 3, ".ipynb_checkpoints": 1, "__MACOSX": 1})
    write_images(photos, {"predict": 1, ".thumbs": 1})
    write_images(photos / "test", {"a": 1})
    (photos / "train/a/x.HEIC").write_bytes(b"")
    for name in ("README.md", "train/loose.png", "test/a/._000.png"):
        (photos / name).write_bytes(b"")
    write_images(tmp_path / "far", {"away": 2})
    (photos / "train/b/more").symlink_to(tmp_path / "far")
    (photos / "train/b/round").symlink_to(photos)
    assert load_folder(config()).sizes() == {"training": 8, "test": 1}
    (record,) = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert record == (
        f"data.root={photos}: left out: 3 hidden folders (.thumbs, .ipynb_checkpoints, __MACOSX), "
        "2 files outside the class folders (README.md, loose.png), 1 folder next to the splits (predict), "
        "1 file of unknown format (.heic), 1 link to folders that were already read (round), "
        "1 hidden file (._000.png); to read .heic, convert them to .jpg or .png"
    )
    caplog.clear()
    for path in (photos / "train/b").glob("0*"):
        path.rename(path.with_suffix(".heic"))
    (photos / "train/b/more").unlink()
    with pytest.raises(
        UserError, match=r"contains no image files for the class 'b' \(left out: .*4 files of unknown format \(.heic\)"
    ):
        load_folder(config())


def test_a_complete_folder_says_nothing(config, photos: Path, caplog) -> None:
    write_images(photos, {"a": 3, "b": 3})
    load_folder(config())
    assert not caplog.records


def test_a_folder_that_cannot_be_read_is_named(config, photos: Path, monkeypatch, caplog) -> None:
    write_images(photos, {"a": 3, "b": 3})
    write_images(photos / "b", {"closed": 1})
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(
        UserError, match=r"a folder cannot be read \(.*closed: Permission denied\): .* or set data.on_error=skip"
    ):
        load_folder(config())
    assert sum(load_folder(config(on_error="skip")).sizes().values()) == 6
    assert f"1 folder that cannot be read ({photos}/b/closed: Permission denied)" in caplog.text


@pytest.mark.parametrize("link", ["nowhere", "000.png"])
def test_a_link_that_leads_nowhere_is_an_unreadable_image(config, photos: Path, link: str) -> None:
    """A broken link, and a link to itself."""
    write_images(photos, {"a": 3, "b": 3})
    (photos / "b/000.png").unlink()
    (photos / "b/000.png").symlink_to(link)
    with pytest.raises(UserError, match=r"b/000\.png cannot be read as an image .*data\.on_error=skip"):
        load_folder(config())
    assert load_folder(config(on_error="skip")).unreadable == ("b/000.png",)
    with pytest.raises(UserError, match=r"b/000\.png cannot be read as an image"):  # although a cache exists now
        load_folder(config())


def test_names_that_are_equal_after_normalisation_are_equal(config, photos: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    write_images(photos / "train", {composed: 2, "a": 2})
    write_images(photos / "test", {decomposed: 2, "a": 2})
    splits = load_folder(config())
    assert splits.train.classes == splits.test.classes == ("a", composed)
    assert torch.bincount(splits.test.labels).tolist() == [2, 2]
    write_images(photos / "train", {decomposed: 2})
    with pytest.raises(UserError, match=f"two folders are called '{composed}' .after Unicode normalisation.: rename"):
        load_folder(config())


def test_messages_about_odd_names_are_one_line(config, photos: Path) -> None:
    odd = b"a\n\x1b[2J\xff".decode(errors="surrogateescape")
    write_images(photos, {odd: 2, "b": 2})
    (photos / odd / f"{odd}.png").write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        load_folder(config())
    assert str(caught.value).isprintable()
    assert r"a\n\x1b[2J\udcff.png" in str(caught.value)


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (lambda p: None, "there is no such folder"),
        (lambda p: p.mkdir(), "needs at least two class folders"),
        (lambda p: write_images(p, {"a": 3}), "needs at least two class folders with images, has 1"),
        (lambda p: [(p / c).mkdir(parents=True) for c in "ab"], "contain no image files"),
        (
            lambda p: [write_images(p / "train", {"a": 1, "b": 1, "cat": 0}), write_images(p / "val", {"cat": 1})],
            "train/cat: contains no image files for the class 'cat'",
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


def test_an_unreadable_image_is_left_out_and_counted(config, photos: Path, caplog) -> None:
    write_images(photos, {"a": 4, "b": 4})
    good = sorted(p for p in photos.rglob("*.png"))
    for name in ("a/0bad.png", "b/001b.png"):
        (photos / name).write_bytes(b"text")
    files = sorted(photos.rglob("*.png"))
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        splits = load_folder(config(on_error="skip"))
        train, test = splits.train, splits.test
        assert "2 unreadable images are left out" in caplog.text
        assert splits.unreadable == ("a/0bad.png", "b/001b.png")
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
    splits = load_folder(config(on_error="skip"))
    train, test = splits.train, splits.test
    labels, rows = torch.cat([train.labels, test.labels]), torch.cat([train.rows, test.rows])
    assert len(labels) == 6
    assert splits.fingerprint == fingerprint(train.images[rows.numpy()], labels.numpy())


def test_the_cache_is_used(config, photos: Path, monkeypatch) -> None:
    write_images(photos, {"a": 3, "b": 3})
    first = load_folder(config())
    monkeypatch.setattr(folder_module, "read_image", lambda *_: pytest.fail("an image was decoded again"))
    second = load_folder(config(validation=0.3))
    assert np.array_equal(first.train.images, second.train.images)
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("what", ["content", "label", "new", "size", "fit", "draft"])
def test_a_change_makes_a_new_cache(config, photos: Path, what: str) -> None:
    write_images(photos, {"a": 3, "b": 3})
    before = load_folder(config())
    changes: dict[str, Any] = {}
    path = photos / "a/000.png"
    if what == "content":
        Image.new("RGB", (8, 8), "white").save(path)
    elif what == "label":
        path.rename(photos / "b/zzz.png")
    elif what == "new":
        shutil.copy(path, photos / "a/001b.png")
    elif what == "size":
        changes = {"store_size": 16}
    else:
        changes = {"fit": "stretch"} if what == "fit" else {"draft": False}
    after = load_folder(config(**changes))
    assert after.train.images.filename != before.train.images.filename
    assert (after.fingerprint == before.fingerprint) == (
        what in ("fit", "draft")
    )  # the fingerprint depends only on pixels and labels


@pytest.mark.parametrize("how", ["in place", "elsewhere"])
def test_equal_names_sizes_and_times_are_not_equal_content(config, photos: Path, tmp_path: Path, how: str) -> None:
    """The cache also remembers the files' status, and a change in place must invalidate it."""
    for folder in (photos, tmp_path / "others"):
        for name in ("a/0", "a/1", "b/0", "b/1"):
            path = folder / f"{name}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red" if folder == photos else "blue").save(path)
            os.utime(path, ns=(0, 10**18))
    data = config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module, "_COARSEST_CLOCK_NS", -(10**12))
        first = load_folder(data)
        if how == "in place":
            for path in photos.rglob("*.bmp"):
                path.write_bytes((tmp_path / "others" / path.relative_to(photos)).read_bytes())
                os.utime(path, ns=(0, 10**18))
        second = load_folder(data if how == "in place" else config(root=str(tmp_path / "others")))
    assert [int(s.train.pixels([0])[0, 0, 0, 0]) for s in (first, second)] == [255, 0]
    assert first.fingerprint != second.fingerprint


def test_the_cache_is_found_wherever_the_files_lie(config, photos: Path, monkeypatch) -> None:
    write_images(photos, {"a": 3, "b": 3})
    first = load_folder(config())
    monkeypatch.setattr(folder_module, "read_image", lambda *_: pytest.fail("an image was decoded again"))
    photos.rename(photos.with_name("moved"))
    for path in photos.with_name("moved").rglob("*.png"):
        os.utime(path, ns=(0, 10**18))
    moved = config(root=str(photos.with_name("moved")))
    monkeypatch.setattr(folder_module, "_COARSEST_CLOCK_NS", -(10**12))  # trust the times of files that are this new
    assert load_folder(moved).train.images.filename == first.train.images.filename
    monkeypatch.setattr(folder_module, "_hash_and_size", lambda *_: pytest.fail("a file was hashed again"))
    assert load_folder(moved).fingerprint == first.fingerprint


def test_the_time_of_a_young_file_is_not_trusted(config, photos: Path, monkeypatch) -> None:
    """A file system with a clock in whole seconds can give two changes the same time."""
    write_images(photos, {"a": 3, "b": 3})
    read: list[str] = []
    real = folder_module._hash_and_size
    monkeypatch.setattr(folder_module, "_hash_and_size", lambda f, **limits: (read.append(f), real(f, **limits))[1])
    for _ in range(2):
        load_folder(config())
    assert len(read) == 12


def test_files_that_change_while_they_are_read_are_named(config, photos: Path, tmp_path: Path, monkeypatch) -> None:
    write_images(photos, {"a": 3, "b": 3})
    real = folder_module.read_image

    def change(file: Path, *limits: int) -> Image.Image:
        image = real(file, *limits)
        Image.new("RGB", (8, 8)).save(file)
        return image

    monkeypatch.setattr(folder_module, "read_image", change)
    with pytest.raises(UserError, match="files changed while they were read: start again"):
        load_folder(config())
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def test_a_killed_build_leaves_nothing_that_counts(config, photos: Path, tmp_path: Path, monkeypatch) -> None:
    write_images(photos, {"a": 3, "b": 3})

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(folder_module.Path, "write_text", die)  # die after writing the pixels, before the manifest
        with pytest.raises(Killed):
            load_folder(config())
    left = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    assert [p.suffix for p in left] == [".partial"]
    (left[0] / "images.npy").write_bytes(b"garbage")
    train = load_folder(config()).train
    assert np.array_equal(train.images[0], pixels_of(photos / "a/000.png"))
    assert not list((tmp_path / "cache").glob("*.partial"))


def test_concurrent_loads_decode_once(config, photos: Path, monkeypatch) -> None:
    write_images(photos, {"a": 5, "b": 5})
    count: list[object] = []
    real = folder_module.read_image
    monkeypatch.setattr(folder_module, "read_image", lambda *given: (count.append(given), real(*given))[1])
    with ThreadPoolExecutor(4) as pool:
        marks = set(pool.map(lambda _: load_folder(config()).fingerprint, range(4)))
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
    assert load_folder(config(**changes)).train.images.shape[1:] == (stored, stored, 3)


def test_names_with_spaces_accents_and_signs(config, photos: Path) -> None:
    write_images(photos, {"two words": 2, "é=[ü],{}": 2, "日本": 2})
    assert load_folder(config()).train.classes == ("two words", "é=[ü],{}", "日本")


def test_a_full_disk_is_named_before_anything_is_decoded(config, photos: Path, tmp_path: Path, monkeypatch) -> None:
    write_images(photos / "train", {"cat": 2, "dog": 2})
    with monkeypatch.context() as patch:
        patch.setattr(folder_module.os, "posix_fallocate", raise_disk_full, raising=False)
        with pytest.raises(UserError, match=r"cannot be written .*No space left on device.*data\.cache_dir"):
            load_folder(config())
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"] * 2
    assert len(load_folder(config()).train) > 0


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b"[["),
        ("manifest.json", b'{"unreadable": [[6, "x"]], "fingerprint": "x"}'),
        ("manifest.json", b'{"unreadable": [[1e999, "x"]], "fingerprint": "x"}'),
        ("images.npy", b"[["),
        ("images.npy", b""),
        ("images.npy", np.zeros((5, 8, 8, 3), np.uint8)),
        ("images.npy", np.zeros((6, 8, 8, 3), np.float32)),
        ("images.npy", np.zeros(6, np.uint8)),
    ],
)
def test_a_damaged_cache_is_named(config, photos: Path, name: str, content: bytes | np.ndarray) -> None:
    write_images(photos, {"a": 3, "b": 3})
    data = config(on_error="skip")
    load_folder(data)
    (damaged,) = Path(str(data.cache_dir)).glob(f"*/{name}")
    if isinstance(content, bytes):
        damaged.write_bytes(content)
    else:
        np.save(damaged, content)
    with pytest.raises(UserError, match=rf"the image cache {damaged.parent} is damaged .*: delete it"):
        load_folder(data)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"unreadable": [], "fingerprint": ' + "9" * 500_000 + "}"])
def test_the_manifest_of_a_cache_is_bounded(config, photos: Path, content: str) -> None:
    write_images(photos, {"a": 3, "b": 3})
    load_folder(config())
    (manifest,) = Path(str(config().cache_dir)).glob("*/manifest.json")
    manifest.write_text(content)
    with pytest.raises(UserError, match=r"the image cache .* is damaged .*: delete it"):
        load_folder(config())


@pytest.mark.parametrize("draft", [True, False])
def test_large_jpegs_are_drafted_in_training_and_afterwards(config, photos: Path, monkeypatch, draft: bool) -> None:
    write_images(photos, {"a": 3, "b": 3}, size=150, suffix="jpg")
    data, sides = config(draft=draft, store_size=32, image_size=70), []
    monkeypatch.setattr(Image.Image, "transpose", lambda image, _: image)
    real = decode.to_rgb
    monkeypatch.setattr(decode, "to_rgb", lambda image: sides.append(image.width) or real(image))
    trained = load_folder(data).train
    assert set(sides) == {75 if draft else 150}
    metadata = ModelMetadata(tiny_model_config(), ("a", "b"), data, stored_size=32)
    run = TrainedRun(RunDirectory(photos), compose_checked(), torch.nn.Linear(1, 1), metadata)
    seen = run.inputs(*(photos / file for file in trained.files))
    assert torch.equal(seen, preprocess(torch.from_numpy(trained.images.copy()), data, channels_last=False))


def test_splits_that_hold_a_folder_of_their_own_name_are_found(config, photos: Path) -> None:
    for split in ("seg_train", "seg_test"):
        write_images(photos / split / split, {"a": 3, "b": 3})
    assert load_folder(config()).sizes() == {"training": 6, "test": 6}


@pytest.mark.parametrize("content", ["", ".", "../other"])
def test_a_key_that_a_full_disk_cut_is_made_again(config, photos: Path, monkeypatch, content: str) -> None:
    monkeypatch.setattr(folder_module, "_COARSEST_CLOCK_NS", -(10**12))  # trust the times of files that are this new
    write_images(photos, {"a": 3, "b": 3})
    first = load_folder(config())
    (key,) = Path(config().cache_dir).glob("*.key")
    key.write_text(content)
    assert load_folder(config()).fingerprint == first.fingerprint
    assert (key.parent / key.read_text() / "images.npy").is_file()


@pytest.mark.parametrize("max_pixels", [10_000, 2**30])
def test_an_image_whose_header_claims_more_than_pillow_allows_is_one_of_the_unreadable(
    config, photos: Path, max_pixels: int
) -> None:
    write_images(photos, {"a": 3, "b": 3})
    content = bytearray((photos / "b/000.png").read_bytes())
    content[16:24] = struct.pack(">II", 20_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))  # of the header
    (photos / "b/000.png").write_bytes(content)
    with pytest.raises(UserError, match=r"b/000\.png cannot be read as an image .*data\.on_error=skip"):
        load_folder(config(max_pixels=max_pixels))
    assert load_folder(config(on_error="skip", max_pixels=max_pixels)).unreadable == ("b/000.png",)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_for_splits_are_one_line(config, photos: Path, count: int) -> None:
    write_images(photos, {"a": 1, "b": count - 1})
    with pytest.raises(UserError, match="image"):
        load_splits(config(validation=0.1))
