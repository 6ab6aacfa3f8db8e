"""ZFNet, `Chain`, which represents any feed-forward network as a list of steps, and `Network`, for all others."""

from zfnet.model.chain import Chain, Network
from zfnet.model.zfnet import ZFNet

__all__ = ["Chain", "Network", "ZFNet"]
