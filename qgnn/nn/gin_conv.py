"""Graph isomorphism convolution (Xu et al. 2019) with PyG's signature."""

from __future__ import annotations

import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

from ..graph import Graph
from ..quant import FeatureMap, Scheme, begin, column_quantizer, feature_maps, parse
from ..quant.base import finished
from ..quant.saved import packs
from .conv import (
    Features,
    QuantizedConv,
    aggregated,
    both_sides,
    check_features,
    check_message_passing,
    check_reduction,
    dense,
    graph_of,
    leading_linear,
    narrows,
    operand_map,
    reset,
    updated,
)
from .linear import Linear


class GINConv(QuantizedConv, pyg.GINConv):
    """``nn((1 + eps) x_i + sum_j x_j)`` on quantized values (A2Q table 4).

    The operand of the aggregation, ``x``, has a step per column, so that the sum runs over integers; the layers of ``nn`` quantize what they read:
    A2Q with a step and a width per node, as magnitudes after a sum follow the in-degree (A2Q figure 1). Where ``nn`` starts with a Linear that
    makes the map narrower, that product runs before the sum, which is then of fewer columns.

    Args:
        nn: a :class:`qgnn.nn.Linear`, or a ``Sequential`` (or another module) of these with BatchNorm and activations between them.
        eps: start value of epsilon.
        train_eps: whether epsilon is learned.
        aggr: "add", "mean", "max" or "min" (A2Q table 15).
        scheme: of the operand; the layers of ``nn`` have theirs.

    Shapes: ``x`` ``[N, in]``, or a pair ``([M, in], [N, in] or None)`` for a bipartite graph; ``edge_index`` ``[2, E]`` or a
    :class:`qgnn.Graph` -> ``[N, out]``. State-dict keys ``eps`` and ``nn.*``, as PyG's.
    """

    def __init__(
        self,
        nn: nn.Module,
        eps: float = 0.0,
        train_eps: bool = False,
        *,
        aggr: str = "add",
        scheme: str | Scheme = "fp32",
        **kwargs: object,
    ) -> None:
        self.reduce = check_reduction(aggr)
        super(pyg.GINConv, self).__init__(aggr)
        check_message_passing(kwargs)
        linear = leading_linear(nn) or next((m for m in nn.modules() if isinstance(m, Linear)), None)
        if linear is None:
            raise ValueError("the nn of a GINConv must hold a qgnn.nn.Linear: it says how many features there are")
        self.nn, self.initial_eps, self.in_channels = nn, eps, linear.in_channels
        narrower = narrows(linear.in_channels, linear.out_channels, self.reduce)
        self.first = narrower and leading_linear(nn) is linear
        self.scheme = parse(scheme)
        self.operand_channels = linear.out_channels if self.first else linear.in_channels
        self.operand_quantizer = column_quantizer(self.scheme, self.operand_channels)
        if train_eps:
            self.eps = torch.nn.Parameter(torch.tensor([float(eps)]))
        else:
            self.register_buffer("eps", torch.tensor([float(eps)]))

    def reset_parameters(self) -> None:
        reset(self.nn)
        torch.nn.init.constant_(self.eps, self.initial_eps)

    @packs
    def forward(
        self,
        x: Features | tuple[Features, Features | None],
        edge_index: Tensor | Graph,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        source, target, sizes = both_sides(x, size)
        check_features("x", source, self.in_channels)
        graph = graph_of(edge_index, sizes, source)
        begin(self, graph)
        own, other = 1 + self.eps, None if target is source else target
        # one map is one tensor in memory: what a node adds of its own is what its neighbours read
        shared = own if target is source else None
        if not self.first:
            out = aggregated(self.operand_quantizer, graph, dense(source), reduce=self.reduce, own=shared)
            out = self.nn(out if other is None else out + own * dense(other))
            return updated(self.operand_quantizer, out)
        linear = leading_linear(self.nn)
        assert linear is not None, "as __init__ found it"
        h, bias = linear.product(source), linear.bias if other is None else None
        out = aggregated(self.operand_quantizer, graph, h, reduce=self.reduce, own=shared, bias=bias)
        if other is not None:
            out = finished(out + own * linear.product(other), None, linear.bias)
        for layer in list(self.nn)[1:] if isinstance(self.nn, nn.Sequential) else []:
            out = layer(out)
        return updated(self.operand_quantizer, out)

    def feature_maps(self, name: str, nodes: int) -> list[FeatureMap]:
        """The maps of this layer, for :func:`qgnn.quant.feature_maps`."""
        inner = feature_maps(self.nn, nodes, f"{name}.nn")
        return [*inner, operand_map(self.operand_quantizer, name, self.operand_channels, inner[0].nodes)]

    def extra_repr(self) -> str:
        return f"aggr={self.aggr!r}, scheme={self.scheme.name!r}"
