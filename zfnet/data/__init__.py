"""Load images and build batches from them."""

from zfnet.data.batches import Batch, Batches, preprocess
from zfnet.data.images import ImageSet, Splits
from zfnet.data.sources import known_classes, load_splits

__all__ = ["Batch", "Batches", "ImageSet", "Splits", "known_classes", "load_splits", "preprocess"]
