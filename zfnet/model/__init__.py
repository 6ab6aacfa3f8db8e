"""The network."""

from zfnet.model.zfnet import ZFNet

__all__ = ["ZFNet"]
