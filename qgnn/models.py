"""Models as the papers train them, made of :mod:`qgnn.nn` layers."""

from __future__ import annotations

import torch
from torch import Tensor

from .features import SparseFeatures, dropout
from .graph import Graph
from .nn import GCNConv
from .ops import relu_dropout
from .quant import Scheme


class GCN(torch.nn.Module):
    """Graph convolutional network: dropout, then ``GCNConv`` and ReLU, layer by layer; the last layer gives the logits.

    Args:
        in_channels, hidden, out_channels: features of a node, of the maps between layers, and classes.
        num_layers: number of ``GCNConv`` layers, at least 1.
        dropout: chance that an input of a layer is set to zero in training.
        input_dropout: the same for the features, the input of the first layer; by default ``dropout``.
        scheme: how it is quantized, see :mod:`qgnn.quant.scheme`.
        num_nodes: nodes of the graph; schemes that learn a step and a width for every node (``"a2q"``) need it.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        num_layers: int = 2,
        dropout: float = 0.5,
        scheme: str | Scheme = "fp32",
        num_nodes: int | None = None,
        input_dropout: float | None = None,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        sizes = [in_channels, *[hidden] * (num_layers - 1), out_channels]
        self.dropout = dropout
        self.input_dropout = dropout if input_dropout is None else input_dropout
        self.convs = torch.nn.ModuleList(
            GCNConv(sizes[i], sizes[i + 1], scheme=scheme, num_nodes=num_nodes) for i in range(num_layers)
        )

    def forward(self, x: Tensor | SparseFeatures, edge_index: Tensor | Graph) -> Tensor:
        """``x`` ``[N, in_channels]`` and ``edge_index`` ``[2, E]`` -> logits ``[N, out_channels]``."""
        first, *rest = self.convs
        h: Tensor = first(dropout(x, self.input_dropout, self.training), edge_index)
        for conv in rest:
            h = conv(relu_dropout(h, self.dropout, self.training), edge_index)
        return h
