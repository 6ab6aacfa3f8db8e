"""From the name of a data set to its three parts."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import data_config
from zfnet.config.errors import UserError
from zfnet.data.sources import load_splits


def test_the_built_in_images() -> None:
    splits = load_splits(data_config(train_images=100, test_images=30, image_size=32, validation=0.2))
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [80, 20, 30]
    assert splits.train.images.shape == (100, 32, 32, 3)
    again = load_splits(data_config(train_images=100, test_images=30, image_size=32, validation=0.2))
    assert again.fingerprint == splits.fingerprint
    other = load_splits(data_config(train_images=101, test_images=30, image_size=32, validation=0.2))
    assert other.fingerprint != splits.fingerprint


def test_the_split_does_not_depend_on_the_runs_seed_or_the_subset() -> None:
    """All seeds and all learning curves are compared on the same validation images."""
    base = data_config(train_images=100, test_images=10, image_size=32)
    small = data_config(train_images=100, test_images=10, image_size=32, subset=30)
    assert torch.equal(load_splits(base).validation.rows, load_splits(small).validation.rows)
    assert len(load_splits(small).train) == 30
    huge = data_config(train_images=100, test_images=10, image_size=32, subset=10_000)
    assert len(load_splits(huge).train) == 90


def test_no_validation_if_none_is_asked_for() -> None:
    splits = load_splits(data_config(train_images=50, test_images=10, image_size=32, validation=0))
    assert splits.validation is None
    assert len(splits.train) == 50


def test_a_crop_larger_than_the_images_is_named() -> None:
    with pytest.raises(
        UserError, match=r"data\.crop_size=40: images are stored at 32×32; raise data.store_size"
    ):
        load_splits(data_config(train_images=50, test_images=10, store_size=32, crop_size=40))
