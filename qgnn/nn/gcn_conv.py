"""Graph convolution (Kipf and Welling) with PyG's signature."""

from __future__ import annotations

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

from ..features import SparseFeatures
from ..graph import Graph
from ..quant import FeatureMap, Scheme, begin, column_quantizer, layer_quantizer, parse
from ..quant.saved import packs
from .conv import (
    QuantizedConv,
    aggregated,
    check_features,
    check_message_passing,
    edges_of,
    operand_map,
    updated,
)
from .linear import Linear, check_channels, product


class GCNConv(QuantizedConv, pyg.GCNConv):
    """``D^-1/2 (A + I) D^-1/2 X W + b`` on quantized values (A2Q table 4, proof 2; NUMERICS 7).

    The right ``D^-1/2`` multiplies ``X W`` before that is quantized column by column; the left one multiplies the sum. So the sum itself runs over
    integers without a factor per edge.

    Args:
        in_channels, out_channels, improved, cached, add_self_loops, normalize, bias: as PyG's GCNConv. ``cached`` changes nothing: the graph of an
            ``edge_index`` is remembered anyway, until the tensor changes. ``improved`` acts only where ``edge_weight`` is given, as in PyG's code.
        scheme: a scheme name (:mod:`qgnn.quant.scheme`).
        num_nodes: nodes of the graph; needed by "a2q".

    Shapes: ``x`` ``[N, in]`` (or :class:`qgnn.features.SparseFeatures`), ``edge_index`` ``[2, E]`` or a :class:`qgnn.Graph`,
    ``edge_weight`` ``[E]`` or None -> ``[N, out]``. State-dict keys ``lin.weight`` and ``bias``, as PyG's; those of the quantizers start
    with ``quantizer.`` and ``operand_quantizer.``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        improved: bool = False,
        cached: bool = False,
        add_self_loops: bool | None = None,
        normalize: bool = True,
        bias: bool = True,
        *,
        scheme: str | Scheme = "fp32",
        num_nodes: int | None = None,
        **kwargs: object,
    ) -> None:
        super(pyg.GCNConv, self).__init__(aggr="add")
        check_message_passing(kwargs)
        check_channels(in_channels, out_channels)
        if add_self_loops is None:
            add_self_loops = normalize
        if add_self_loops and not normalize:
            raise ValueError(
                "GCNConv adds self loops only when it normalizes; pass normalize=True or add_self_loops=False"
            )
        self.in_channels, self.out_channels = in_channels, out_channels
        self.improved, self.cached, self.add_self_loops, self.normalize = improved, cached, add_self_loops, normalize
        self.lin = Linear(in_channels, out_channels, bias=False, weight_initializer="glorot")
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.scheme = parse(scheme)
        self.quantizer = layer_quantizer(self.scheme, in_channels, out_channels, num_nodes)
        self.operand_quantizer = column_quantizer(self.scheme, out_channels)

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def propagation(
        self, edge_index: Tensor | Graph, nodes: int, edge_weight: Tensor | None = None
    ) -> tuple[Graph, Tensor | None, Tensor | None]:
        """The graph that is summed over, the factor ``D^-1/2`` ``[N]`` (None without normalisation) and the weights of its edges (in CSR order; None
        where all are 1)."""
        base = Graph.of(edges_of(edge_index), nodes)
        graph = base.with_self_loops if self.add_self_loops else base
        if edge_weight is None:
            return graph, graph.inv_sqrt_degree if self.normalize else None, None
        weight = graph.edge_values(edge_weight, 2.0 if self.improved else 1.0)
        if not self.normalize:
            return graph, None, weight
        degree = weight.new_zeros(graph.num_nodes).index_add(0, graph.rows.long(), weight)
        factor = degree.clamp_min(torch.finfo(weight.dtype).tiny).rsqrt()
        return graph, torch.where(degree > 0, factor, torch.zeros_like(factor)), weight

    @packs
    def forward(
        self, x: Tensor | SparseFeatures, edge_index: Tensor | Graph, edge_weight: Tensor | None = None
    ) -> Tensor:
        check_features("x", x, self.in_channels)
        base = Graph.of(edges_of(edge_index), x.size(0))
        graph, factor, weight = self.propagation(base, x.size(0), edge_weight)
        if graph.device != x.device:
            raise ValueError(f"x is on {x.device} and the graph on {graph.device}; move one with .to()")
        begin(self, base)
        h = product(self.quantizer, x, self.lin.weight, factor)
        out = aggregated(self.operand_quantizer, graph, h, weight, scale=factor, bias=self.bias)
        return updated(self.operand_quantizer, out)

    def feature_maps(self, name: str, nodes: int) -> list[FeatureMap]:
        """The maps of this layer, for :func:`qgnn.quant.feature_maps`."""
        if self.quantizer is None:
            given = FeatureMap(f"{name}.input", self.in_channels, nodes, 32, "input", False)
        else:
            given = self.quantizer.feature_map(name, nodes)
        return [given, operand_map(self.operand_quantizer, name, self.out_channels, given.nodes)]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, scheme={self.scheme.name!r}"
