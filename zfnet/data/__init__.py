"""Where images come from, and how they become batches."""

from zfnet.data.batches import Batch, Batches, preprocess
from zfnet.data.images import ImageSet, Splits
from zfnet.data.sources import load_splits

__all__ = ["Batch", "Batches", "ImageSet", "Splits", "load_splits", "preprocess"]
