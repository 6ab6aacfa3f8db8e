"""Loading the training, validation and test images of a data set from its config."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from tests import own as own_classes
from tests.helpers import data_config, random_images
from zfnet.config.errors import UserError
from zfnet.data.sources import _to_label, load_splits, to_image


def test_the_built_in_images() -> None:
    splits = load_splits(data_config(train_images=100, test_images=30, image_size=32, validation=0.2))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [80, 20, 30]
    assert splits.train.images.shape == (100, 32, 32, 3)
    again = load_splits(data_config(train_images=100, test_images=30, image_size=32, validation=0.2))
    assert again.fingerprint == splits.fingerprint
    other = load_splits(data_config(train_images=101, test_images=30, image_size=32, validation=0.2))
    assert other.fingerprint != splits.fingerprint


def test_the_split_does_not_depend_on_the_runs_seed_or_the_subset() -> None:
    """Runs with different seeds or subsets must use the same validation images."""
    base = data_config(train_images=100, test_images=10, image_size=32)
    small = data_config(train_images=100, test_images=10, image_size=32, subset=30)
    assert torch.equal(load_splits(base).validation.rows, load_splits(small).validation.rows)
    assert len(load_splits(small).train) == 30
    huge = data_config(train_images=100, test_images=10, image_size=32, subset=10_000)
    assert len(load_splits(huge).train) == 90


def test_an_eval_subset_bounds_validation_and_test_alone() -> None:
    settings = {"train_images": 100, "test_images": 30, "image_size": 32, "validation": 20}
    whole, part = (load_splits(data_config(**settings, **more)) for more in ({}, {"eval_subset": 20}))
    assert part.sizes() == {"training": 80, "validation": 20, "test": 20}
    assert part.test.labels.bincount().tolist() == [2] * 10
    assert torch.equal(part.train.rows, whole.train.rows)
    assert torch.equal(part.validation.rows, whole.validation.rows)
    assert load_splits(data_config(**(settings | {"validation": 0}), eval_subset=20)).validation is None


def test_no_validation_if_none_is_asked_for() -> None:
    splits = load_splits(data_config(train_images=50, test_images=10, image_size=32, validation=0))
    assert splits.validation is None
    assert len(splits.train) == 50


def test_a_crop_larger_than_the_images_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.crop_size=40: images are stored at 32×32; raise data.store_size"):
        load_splits(data_config(train_images=50, test_images=10, store_size=32, crop_size=40))


# -- custom torch.utils.data.Dataset


def own(form: str = "pil", count: int = 12, target: str = "Items", **changes: Any) -> dict[str, Any]:
    return {"_target_": f"tests.own.{target}", "count": count, "form": form, **changes}


def test_load_datasets_takes_images_arrays_and_tensors() -> None:
    expected = random_images(12, 64)
    marks = set()
    for form in ("pil", "array", "bytes", "floats", "rounded", "one object"):
        splits = load_splits(data_config("dataset", train=own(form), validation=0), ["tests"])
        assert torch.equal(splits.train.pixels(range(12)), expected), form
        assert splits.train.labels.tolist() == [k % 3 for k in range(12)]
        assert splits.train.classes == ("0", "1", "2")
        assert splits.test is None
        marks.add(splits.fingerprint)
    assert len(marks) == 1


def test_load_datasets_reads_16_bits_and_transparency_as_image_files() -> None:
    def pixels(form: str) -> torch.Tensor:
        splits = load_splits(data_config("dataset", train=own(form), validation=0), ["tests"])
        return splits.train.pixels(range(12))

    assert torch.equal(pixels("16 bits"), random_images(12, 64)[..., :1].expand(-1, -1, -1, 3))
    assert pixels("transparent").min() == 255  # transparency becomes white


def test_load_datasets_fingerprint_sees_pixels_labels_and_parts() -> None:
    def mark(**changes: Any) -> str:
        return load_splits(data_config("dataset", **{"train": own(), **changes}), ["tests"]).fingerprint

    marks = [mark(), mark(train=own(seed=1)), mark(train=own(classes=2)), mark(test=own()), mark(store_size=32)]
    assert len(set(marks)) == 5
    assert mark() == marks[0]


def test_load_datasets_takes_val_and_test_and_names_of_classes() -> None:
    data = data_config("dataset", train=own(count=20), val=own(count=5), test=own(count=7))
    splits = load_splits(data, ["tests"])
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [20, 5, 7]
    held_out = load_splits(data_config("dataset", train=own(target="Named"), validation=3), ["tests"])
    assert [len(s) for s in (held_out.train, held_out.validation)] == [9, 3]
    assert held_out.train.classes == ("cat", "dog", "eel")
    named = load_splits(data_config("dataset", train=own(), classes=["a", "b", "c", "d"]), ["tests"])
    assert named.train.classes == ("a", "b", "c", "d")


def test_load_datasets_names_classes_that_are_equal_after_normalisation() -> None:
    odd = load_splits(data_config("dataset", train=own(), classes=["cafe\u0301", "b\n", "\udcff"]), ["tests"])
    assert odd.train.classes == ("caf\u00e9", r"b\n", r"\udcff")
    with pytest.raises(UserError, match=r"two classes are called 'caf\u00e9' \(after Unicode"):
        load_splits(data_config("dataset", train=own(), classes=["cafe\u0301", "b", "caf\u00e9"]), ["tests"])


def test_load_datasets_fits_images_that_are_not_squares() -> None:
    splits = load_splits(data_config("dataset", train=own("wide"), store_size=16), ["tests"])
    assert splits.train.images.shape == (12, 16, 16, 3)
    assert load_splits(data_config("dataset", train=own("wide")), ["tests"]).train.images.shape[1] == 64


def test_load_datasets_seeds_items_and_leaves_the_generators_alone() -> None:
    data = data_config("dataset", train=own("random"))
    np.random.seed(1)
    before = np.random.get_state()[1].tolist(), torch.random.get_rng_state()
    first = load_splits(data, ["tests"])
    assert np.random.get_state()[1].tolist() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    np.random.seed(2)
    assert load_splits(data, ["tests"]).fingerprint == first.fingerprint
    assert len({image.tobytes() for image in first.train.images}) == 12


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train": own("words")}, "data.train: item 0 cannot be used (ValueError: pixels are"),
        ({"train": own("int32")}, "data.train: item 0 cannot be used (ValueError: pixels are int32"),
        ({"train": own("0 to 255")}, "data.train: item 0 cannot be used (ValueError: pixels are floats"),
        ({"train": own("normalised")}, "floats from -1 to 1: return uint8, or floats from 0 to 1 before Normalize"),
        ({"train": own("not a number")}, "floats from nan to nan: return uint8"),
        (
            {"train": own(target="Fractions")},
            "item 1 cannot be used (ValueError: the label 0.5: labels are whole numbers",
        ),
        ({"train": own(target="Negative")}, "data.train: item 0 has the label -1; labels count from 0"),
        ({"train": own("channels first")}, "an array of shape [3, 64, 64]: arrays are [h, w, 3], tensors [3, h, w]"),
        ({"train": own("channels last")}, "a tensor of shape [64, 64, 3]: arrays are [h, w, 3], tensors [3, h, w]"),
        ({"train": own("flat")}, "a tensor of shape [12288]: arrays are [h, w, 3]"),
        ({"train": own(target="OneHot")}, "the label of shape [3]: labels are whole numbers from 0"),
        ({"train": own(target="Words")}, "the label 'b': labels are whole numbers from 0"),
        ({"train": own(target="Mappings")}, "item 0 cannot be used (TypeError: a dict; return (image,"),
        ({"train": own(target="Triples")}, "item 0 cannot be used (TypeError: a tuple of 3; return (image,"),
        ({"train": own(count=0)}, "data.train: the data set is empty"),
        ({"train": {"_target_": "tests.own.NoLength"}}, "data.train: NoLength has no __len__; a map-style data set"),
        ({"train": own(target="Identifiers")}, "labels are 0 to 1100000, more classes than images: number them"),
        ({"train": own(), "classes": ["a", "b"]}, "data.classes=['a', 'b']: the label 2 has no name"),
        ({"train": own(), "test": own(classes=5), "classes": ["a", "b", "c"]}, "the label 4 has no name"),
        ({"train": own(sort=1)}, "data.train.sort: Items has no such setting"),
        ({"train": {"_target_": "tests.own.Items"}}, "data.train.count is missing: Items needs it"),
        ({"train": {"_target_": "tests.own.StepCounter"}}, "must name a subclass of torch.utils.data"),
        ({"train": {"_target_": "os.system"}}, "the package os is not one that this command imports"),
    ],
)
def test_load_datasets_names_what_it_cannot_use(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        load_splits(data_config("dataset", **changes), ["tests"])


def test_load_datasets_names_classes_that_are_no_list(monkeypatch) -> None:
    monkeypatch.setattr(own_classes.Items, "classes", 3, raising=False)
    with pytest.raises(UserError, match=r"^data\.train: its attribute classes is a int, must be a list of names$"):
        load_splits(data_config("dataset", train=own()), ["tests"])


def test_load_datasets_names_an_item_that_fails_in_one_line(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk failed\nsee the manual")

    monkeypatch.setattr(own_classes.Items, "__getitem__", fail)
    with pytest.raises(
        UserError, match=r"^data\.train: item 0 .*\(OSError: disk failed\) \(test_sources\.py, line \d+\)$"
    ):
        load_splits(data_config("dataset", train=own()), ["tests"])


@pytest.mark.parametrize("image", [np.zeros((0, 3, 3), np.uint8), torch.zeros(3, 2, 0).byte()])
def test_to_image_refuses_an_image_without_pixels(image: Any) -> None:
    with pytest.raises(ValueError, match=r"of shape \[.*0.*\]: arrays are"):
        to_image(image)


@pytest.mark.parametrize(
    "label",
    [
        2,
        np.int8(2),
        np.array(2),
        torch.tensor([2]),
        torch.tensor(2.0, requires_grad=True),
        torch.tensor(2).bfloat16(),
        2.0,
    ],
)
def test_load_datasets_takes_whole_numbers_of_any_kind_as_labels(label: Any) -> None:
    assert _to_label(label) == 2
    assert _to_label(True) == 1
    for odd in ("2", [2], None, float("nan"), 0.5, [[1], [2, 3]], np.array([1, 0])):
        with pytest.raises(ValueError, match=r"^the label .*: labels are whole numbers from 0$"):
            _to_label(odd)


@pytest.mark.parametrize("shape", [(5, 5), (5, 5, 1), (5, 5, 2), (5, 5, 3), (5, 5, 4)])
def test_to_image_takes_grey_and_transparent_arrays(shape: tuple[int, ...]) -> None:
    array = np.full(shape, 255, dtype=np.uint8)
    assert np.asarray(to_image(array)).tolist() == np.full((5, 5, 3), 255).tolist()
    tensor = torch.from_numpy(array)
    assert to_image(tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor).size == (5, 5)


def test_load_datasets_warns_of_labels_that_do_not_begin_with_0(caplog) -> None:
    for part, warns in (("FromOne", True), ("Items", False)):
        caplog.clear()
        load_splits(data_config("dataset", train=own(target=part), test=own(target="FromOne")), ["tests"])
        assert ("the labels are 1 to 3: number them from 0" in caplog.text) is warns


def test_load_datasets_imports_nothing_that_the_command_does_not_trust() -> None:
    with pytest.raises(UserError, match=r"the package tests is not one .* add imports=\[tests\]"):
        load_splits(data_config("dataset", train=own()))
