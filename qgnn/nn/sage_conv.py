"""GraphSAGE convolution (Hamilton et al. 2017) with PyG's signature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor

from ..graph import Graph
from ..quant import FeatureMap, Scheme, begin, column_quantizer, parse
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
    narrows,
    operand_map,
    updated,
)
from .linear import Linear, check_channels


class SAGEConv(QuantizedConv, pyg.SAGEConv):
    """``W_l mean_j x_j + W_r x_i`` on quantized values.

    As in :class:`qgnn.nn.GINConv`, the operand of the aggregation has a step per column, the inputs of the two products are quantized by the
    scheme, and where ``W_l`` makes the map narrower its product runs before the mean.

    Args:
        in_channels: features, or ``(source, target)`` of a bipartite graph.
        out_channels, normalize, root_weight, project, bias: as PyG's SAGEConv.
        aggr: "mean", "add", "max" or "min".
        scheme: a scheme name (:mod:`qgnn.quant.scheme`).
        num_nodes: nodes of the graph, or ``(sources, targets)`` of a bipartite one; needed by "a2q".

    Shapes: ``x`` ``[N, in]``, or a pair ``([M, in], [N, in] or None)``; ``edge_index`` ``[2, E]`` or a :class:`qgnn.Graph` -> ``[N, out]``.
    State-dict keys ``lin_l.weight``, ``lin_l.bias``, ``lin_r.weight`` and ``lin.*`` (``project``), as PyG's.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        aggr: str = "mean",
        normalize: bool = False,
        root_weight: bool = True,
        project: bool = False,
        bias: bool = True,
        *,
        scheme: str | Scheme = "fp32",
        num_nodes: int | tuple[int, int] | None = None,
        **kwargs: object,
    ) -> None:
        reduce = check_reduction(aggr)
        super(pyg.SAGEConv, self).__init__(aggr)
        check_message_passing(kwargs)
        source, target = (in_channels, in_channels) if isinstance(in_channels, int) else in_channels
        self.in_channels, self.out_channels = in_channels, out_channels
        self.normalize, self.root_weight, self.project = normalize, root_weight, project
        self.reduce, self.scheme = reduce, parse(scheme)
        check_channels(min(source, target), out_channels)
        sources, targets = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
        self.first = narrows(source, out_channels, self.reduce)
        if project:
            self.lin = Linear(source, source, scheme=self.scheme, num_nodes=sources)
        self.lin_l = Linear(
            source, out_channels, bias, scheme=self.scheme, num_nodes=sources if self.first else targets
        )
        if root_weight:
            self.lin_r = Linear(target, out_channels, False, scheme=self.scheme, num_nodes=targets)
        self.operand_channels = out_channels if self.first else source
        self.operand_quantizer = column_quantizer(self.scheme, self.operand_channels)

    def reset_parameters(self) -> None:
        for child in self.children():
            if isinstance(child, Linear):
                child.reset_parameters()

    @packs
    def forward(
        self,
        x: Features | tuple[Features, Features | None],
        edge_index: Tensor | Graph,
        size: tuple[int, int] | None = None,
    ) -> Tensor:
        source, target, sizes = both_sides(x, size)
        check_features("x", source, self.lin_l.in_channels)
        graph = graph_of(edge_index, sizes, source)
        begin(self, graph)
        if self.project:
            source = torch.relu(self.lin(source))
        if self.first:
            h = self.lin_l.product(source)
            out = aggregated(self.operand_quantizer, graph, h, reduce=self.reduce, bias=self.lin_l.bias)
        else:
            out = self.lin_l(aggregated(self.operand_quantizer, graph, dense(source), reduce=self.reduce))
        if self.root_weight and target is not None:
            out = out + self.lin_r(target)
        out = updated(self.operand_quantizer, out)
        return F.normalize(out, p=2.0, dim=-1) if self.normalize else out

    def feature_maps(self, name: str, nodes: int) -> list[FeatureMap]:
        """The maps of this layer, for :func:`qgnn.quant.feature_maps`."""
        children = [(child, part) for child, part in self.named_children() if isinstance(part, Linear)]
        maps = [m for child, part in children for m in part.feature_maps(f"{name}.{child}", nodes)]
        return [*maps, operand_map(self.operand_quantizer, name, self.operand_channels, maps[0].nodes)]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, aggr={self.aggr!r}, scheme={self.scheme.name!r}"
