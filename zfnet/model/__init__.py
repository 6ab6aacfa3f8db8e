"""The network, and any network as a chain of layers."""

from zfnet.model.chain import Chain
from zfnet.model.zfnet import ZFNet

__all__ = ["Chain", "ZFNet"]
