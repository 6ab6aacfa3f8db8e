"""Dividing sets: parts are disjoint, complete, in proportion, and equal for equal seeds."""

from __future__ import annotations

import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import augment_config, data_config, other_process
from zfnet.config.errors import UserError
from zfnet.data.batches import Batches
from zfnet.data.images import fingerprint, hold_out, image_set, stratified

labels_and_count = st.lists(st.integers(0, 4), min_size=2, max_size=80).flatmap(
    lambda labels: st.tuples(st.just(torch.tensor(labels)), st.integers(0, len(labels)))
)


def some_set(labels: torch.Tensor):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    return image_set(images, labels, [str(k) for k in range(5)], torch.arange(len(labels))[:, None].repeat(1, 4))


@settings(deadline=None)
@given(labels_and_count, st.integers(0, 2**40))
def test_stratified(given_: tuple[torch.Tensor, int], seed: int) -> None:
    labels, count = given_
    chosen, others = stratified(labels, count, seed)
    assert len(chosen) == count
    assert torch.equal(torch.cat([chosen, others]).sort().values, torch.arange(len(labels)))
    assert torch.equal(chosen, chosen.sort().values)
    for label in labels.unique():
        exact = count * (labels == label).sum().item() / len(labels)
        assert abs((labels[chosen] == label).sum().item() - exact) < 1
    again, _ = stratified(labels, count, seed)
    assert torch.equal(chosen, again)


def test_seeds_and_purposes_choose_apart() -> None:
    labels = torch.arange(1000) % 10
    a, _ = stratified(labels, 100, 0)
    b, _ = stratified(labels, 100, 1)
    c, _ = stratified(labels, 100, 0, purpose=8)
    for x, y in ((a, b), (a, c), (b, c)):
        assert len(set(x.tolist()) & set(y.tolist())) < 30  # 10 expected by chance


def test_a_choice_does_not_depend_on_other_classes() -> None:
    """Images are chosen by random number within each class, so adding another class does not change the choice."""
    labels = torch.tensor([0] * 50)
    more = torch.tensor([0] * 50 + [1] * 50)
    a, _ = stratified(labels, 10, 0)
    b, _ = stratified(more, 20, 0)
    assert a.tolist() == [i for i in b.tolist() if i < 50]


@settings(deadline=None)
@given(st.integers(10, 60), st.one_of(st.integers(1, 9), st.floats(0.05, 0.9)))
def test_hold_out(n: int, amount: float) -> None:
    whole = some_set(torch.arange(n) % 5)
    train, validation = hold_out(whole, amount, 0)
    assert validation is not None
    assert len(validation) == (max(1, round(amount * n)) if amount < 1 else amount)
    rows = torch.cat([train.rows, validation.rows])
    assert rows.sort().values.tolist() == list(range(n))
    for part in (train, validation):
        assert torch.equal(part.labels, whole.labels[part.rows])
        assert torch.equal(part.pixels(range(len(part)))[:, 0, 0, 0].long(), part.rows)
        assert torch.equal(part.boxes[:, 0], part.rows)


def test_hold_out_at_its_ends() -> None:
    whole = some_set(torch.arange(10) % 5)
    assert hold_out(whole, 0, 0) == (whole, None)
    for amount in (10, 11, 1000):
        with pytest.raises(UserError, match="leaves no training images out of 10"):
            hold_out(whole, amount, 0)


def test_a_fraction_holds_out_at_least_one_image() -> None:
    """Otherwise a small folder would train without the validation images that the config sets."""
    _, validation = hold_out(some_set(torch.arange(4) % 2), 0.1, 0)
    assert validation is not None
    assert len(validation) == 1


def test_take_shares_the_pixels() -> None:
    whole = some_set(torch.arange(10) % 5)
    part = whole.take(torch.tensor([7, 3])).take(torch.tensor([1]))
    assert part.images is whole.images
    assert part.rows.tolist() == [3]


def test_fingerprint_sees_every_byte() -> None:
    a = np.zeros((9000, 2), dtype=np.uint8)
    marks = {fingerprint(a)}
    for place in (0, 4095, 4096, 8999):
        b = a.copy()
        b[place, 1] = 1
        marks.add(fingerprint(b))
    assert len(marks) == 5
    assert fingerprint(a[::2]) == fingerprint(a[::2].copy())


def stream_an_epoch(results: Connection, path: Path) -> None:
    """Send the number of images read, and how many KiB this process has grown by meanwhile."""
    import resource  # not on Windows

    def kibibytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    torch.set_num_threads(1)
    stored = np.load(path, mmap_mode="r")
    images = image_set(stored, torch.arange(len(stored)) % 3, "abc")
    data = data_config(image_size=64, crop_size=224, batch_size=16)
    batches = Batches(images, data, torch.device("cpu"), augment=augment_config(flip=0.5))
    next(batches.epoch(0))
    limit = kibibytes("VmData") * 1024 + stored.nbytes // 4
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = kibibytes("VmRSS")
    seen = sum(len(batch.labels) for batch in batches.epoch(1))
    results.send((seen, kibibytes("VmHWM") - before, stored.nbytes // 1024))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_map_larger_than_the_memory_allowed_streams(tmp_path: Path) -> None:
    """Read an epoch from a file four times as large as the memory limit; few pages of the file stay in memory."""
    np.lib.format.open_memmap(tmp_path / "i.npy", "w+", np.uint8, (1024, 256, 256, 3)).flush()  # sparse
    ours, theirs = multiprocessing.Pipe()
    with other_process(stream_an_epoch, theirs, tmp_path / "i.npy"):
        theirs.close()
        seen, grown, size = ours.recv()
    assert seen == 1024
    assert grown < size / 4


def test_classes_without_images_are_those_that_no_label_names() -> None:
    assert some_set(torch.tensor([0, 3, 3])).classes_without_images() == ["1", "2", "4"]
    assert some_set(torch.arange(5)).classes_without_images() == []
