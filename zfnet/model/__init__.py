"""ZFNet; `Chain`, which represents a feed-forward network as a list of steps; `Network`, which reads any network."""

from zfnet.model.chain import Chain, Network
from zfnet.model.zfnet import ZFNet

__all__ = ["Chain", "Network", "ZFNet"]
