"""ZFNet: train, sweep, reproduce and explain (Zeiler & Fergus 2013)."""

from zfnet.model.zfnet import ZFNet
from zfnet.runs.weights import load_run

__all__ = ["ZFNet", "load_run"]
