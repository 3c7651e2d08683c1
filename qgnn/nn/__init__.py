"""Layers with PyG's constructor arguments and state-dict keys, quantized by a scheme."""

from .gcn_conv import GCNConv
from .linear import Linear

__all__ = ["GCNConv", "Linear"]
