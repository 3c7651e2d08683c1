"""Layers with PyTorch Geometric's signatures, quantized by scheme."""

from .gat_conv import GATConv
from .gcn_conv import GCNConv
from .gin_conv import GINConv
from .linear import Linear
from .sage_conv import SAGEConv

__all__ = ["GATConv", "GCNConv", "GINConv", "Linear", "SAGEConv"]
