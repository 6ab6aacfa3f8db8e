"""From the name of a data set to its three parts."""

from __future__ import annotations

from zfnet.config.errors import UserError
from zfnet.config.randomness import SUBSET
from zfnet.config.schema import DataConfig
from zfnet.data.cifar import load_cifar
from zfnet.data.folder import load_folder
from zfnet.data.images import ImageSet, Splits, fingerprint, hold_out, stratified
from zfnet.data.shapes import draw_shapes


def load_splits(data: DataConfig) -> Splits:
    """Return the training, validation and test images that the config describes; raise UserError."""
    validation: ImageSet | None = None
    test: ImageSet | None
    if data.name == "folder":
        train, validation, test, mark = load_folder(data)
    elif data.name == "shapes":
        size = data.store_size or data.image_size
        train = draw_shapes(data.train_images or 6000, size, part=0)
        test = draw_shapes(data.test_images or 2000, size, part=1)
        mark = fingerprint(train.images, test.images)
    else:
        train, test, mark = load_cifar(data.name, data.root or "data")
    if validation is None:
        train, validation = hold_out(train, data.validation, data.split_seed)
    if data.subset is not None and data.subset < len(train):
        chosen, _ = stratified(train.labels, data.subset, data.split_seed, SUBSET)
        train = train.take(chosen)
    stored = train.images.shape[1]
    if data.crop_size is not None and data.crop_size > stored:
        raise UserError(
            f"data.crop_size={data.crop_size}: images are stored at {stored}×{stored}; raise data.store_size"
        )
    return Splits(train, validation, test, mark)
