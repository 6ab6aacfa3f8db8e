"""ZFNet: train, sweep, reproduce and explain (Zeiler & Fergus 2013)."""

from zfnet.model import ZFNet

__all__ = ["ZFNet"]
