"""Explanations of a trained network."""

from zfnet.explain.deconvnet import Deconvnet
from zfnet.explain.receptive_field import ReceptiveField, receptive_box, receptive_field

__all__ = ["Deconvnet", "ReceptiveField", "receptive_box", "receptive_field"]
