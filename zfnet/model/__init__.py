"""ZFNet, and `Chain`, which represents any feed-forward network as a list of steps."""

from zfnet.model.chain import Chain
from zfnet.model.zfnet import ZFNet

__all__ = ["Chain", "ZFNet"]
