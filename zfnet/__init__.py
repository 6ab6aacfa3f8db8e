"""ZFNet: train, sweep, reproduce and explain (Zeiler & Fergus 2013)."""

from zfnet.model import ZFNet
from zfnet.weights import load_run

__all__ = ["ZFNet", "load_run"]
