"""CIFAR and Imagenette through torchvision: error messages without a network, and no unverified file is opened."""

from __future__ import annotations

import pickle
import socket
import threading
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from tests.helpers import Trap, data_config
from zfnet.config.errors import UserError
from zfnet.data import sources
from zfnet.data.sources import NETWORK_TIMEOUT_S, load_cifar, load_splits


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Make every download fail, and return the socket timeouts that were set."""
    timeouts: list[float | None] = []

    def fail(*_: object, **__: object) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise urllib.error.URLError("no route to host")

    for name in ("download_and_extract_archive", "download_url"):
        monkeypatch.setattr(f"torchvision.datasets.utils.{name}", fail)
        for module in (torchvision.datasets.cifar, torchvision.datasets.imagenette):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fail)
    return timeouts


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenette"])
def test_without_network_one_line_says_what_to_do(name: str, tmp_path: Path, offline) -> None:
    before = socket.getdefaulttimeout()
    with pytest.raises(UserError) as caught:
        load_splits(data_config(name=name, root=str(tmp_path / "none")))
    text = str(caught.value)
    for part in (f"{name} is not in {tmp_path / 'none'}", "no route to host", "data.root=", "experiment=quickstart"):
        assert part in text
    assert "\n" not in text
    assert offline == [NETWORK_TIMEOUT_S]
    assert socket.getdefaulttimeout() == before
    assert not (tmp_path / "none").exists()


def test_the_command_gives_the_same_message(run_py, offline) -> None:
    answer = run_py("model=small", "data.image_size=64")
    assert answer.error.startswith("cifar10 is not in")


def test_a_strangers_pickle_is_not_opened(tmp_path: Path, offline, monkeypatch) -> None:
    """The files are pickles; a pickle that differs from the published file is never loaded."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / torchvision.datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    for name in [*(f"data_batch_{k}" for k in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="could not be downloaded"):
        load_cifar("cifar10", str(tmp_path / "data"))
    assert not (tmp_path / "witness").exists()


def test_from_files_to_splits(monkeypatch, tmp_path: Path) -> None:
    """Replace torchvision's class to check which images become training, validation and test."""

    class Fake:
        classes = tuple("abcdefghij")

        def __init__(self, root: str, train: bool) -> None:
            count = 100 if train else 20
            self.data = np.full((count, 32, 32, 3), 0 if train else 255, dtype=np.uint8)
            self.data[:, 0, 0, 0] = np.arange(count)
            self.targets = [k % 10 for k in range(count)]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    splits = load_splits(data_config(name="cifar10", root=str(tmp_path), validation=20))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [80, 20, 20]
    assert splits.validation.labels.bincount().tolist() == [2] * 10
    for part in (splits.train, splits.validation):
        assert (part.pixels(range(len(part)))[:, 1] == 0).all()
        assert (part.labels == part.rows % 10).all()
    assert (splits.test.pixels([3])[:, 1] == 255).all()
    assert splits.test.classes == Fake.classes


def test_processes_that_start_together_download_once(tmp_path: Path) -> None:
    started, downloads = threading.Barrier(2), []

    class Slow:
        def __init__(self, root: str, download: bool = False) -> None:
            if not download and not Path(root, "images").exists():
                raise RuntimeError("Dataset not found or corrupted.")
            if download:
                downloads.append(root)
                time.sleep(0.2)
                Path(root, "images").touch()

    def start() -> Slow:
        started.wait()
        return sources._read_or_download(Slow, "cifar10", tmp_path / "new")

    with ThreadPoolExecutor(2) as pool:
        assert all(isinstance(one.result(), Slow) for one in [pool.submit(start) for _ in range(2)])
    assert len(downloads) == 1


def write_imagenette(root: Path) -> None:
    for part, count in (("train", 40), ("val", 10)):
        for number in range(count):
            file = root / "imagenette2-320" / part / ("n01440764", "n02102040")[number % 2] / f"{number}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(file)


def test_imagenettes_validation_folder_is_the_test_set(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "IMAGENETTE_IMAGES", (40, 10))
    write_imagenette(tmp_path)
    splits = load_splits(data_config(name="imagenette", root=str(tmp_path), validation=0.25, cache_dir=str(tmp_path)))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [30, 10, 10]
    assert splits.test.classes == splits.train.classes == ("tench", "English springer")
    for part in (splits.train, splits.validation, splits.test):
        assert all((tmp_path / part.files[row]).is_file() for row in part.rows.tolist())


def test_a_part_of_imagenette_is_refused(tmp_path: Path) -> None:
    write_imagenette(tmp_path)
    with pytest.raises(UserError, match=r"40 \+ 10 images, Imagenette has 9469 \+ 3925; delete it"):
        load_splits(data_config(name="imagenette", root=str(tmp_path), cache_dir=str(tmp_path)))
