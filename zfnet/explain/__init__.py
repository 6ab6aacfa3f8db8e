"""Explanations of a trained network."""

from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.receptive_field import receptive_box, receptive_field

__all__ = ["Deconvnet", "receptive_box", "receptive_field"]
