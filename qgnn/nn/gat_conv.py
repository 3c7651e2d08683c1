"""Graph attention (Velickovic et al. 2018) with PyG's signature."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn

from .. import ops
from ..graph import Graph
from ..quant import ColumnQuantizer, FeatureMap, Scheme, begin, column_quantizer, parse
from ..quant.saved import packs
from .conv import (
    Features,
    QuantizedConv,
    both_sides,
    check_features,
    check_message_passing,
    graph_of,
    operand_map,
    updated,
)
from .linear import Linear, check_channels


class GATConv(QuantizedConv, pyg.GATConv):
    """``sum_j softmax_j(leaky_relu(a_src . W x_j + a_dst . W x_i)) W x_j`` on quantized values (A2Q table 4).

    ``W x`` is quantized with a step per column, the attention vectors with a step per head; scores, softmax and the weighted sum are float32, for
    the precision that they need (DQ app. A.1). No tensor of edges times heads times features exists (:func:`qgnn.ops.gat_aggregate`).

    Args:
        in_channels: features, or ``(source, target)`` of a bipartite graph, which get weights of their own.
        out_channels, heads, concat, negative_slope, dropout, add_self_loops, edge_dim, fill_value, bias, residual: as PyG's GATConv.
        scheme: a scheme name (:mod:`qgnn.quant.scheme`). Edge features and the residual stay in float32.
        num_nodes: nodes of the graph, or ``(sources, targets)`` with a pair of ``in_channels``; needed by "a2q".

    Shapes: ``x`` ``[N, in]``, or a pair ``([M, in], [N, in] or None)``; ``edge_index`` ``[2, E]`` or a :class:`qgnn.Graph`; ``edge_attr`` ``[E]`` or
    ``[E, edge_dim]`` -> ``[N, heads * out]``, ``[N, out]`` without ``concat``; with ``return_attention_weights`` also ``(edge_index, alpha
    [E, heads])`` of the graph that was summed over. State-dict keys as PyG's.
    """

    def __init__(
        self,
        in_channels: int | tuple[int, int],
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool = True,
        edge_dim: int | None = None,
        fill_value: float | Tensor | str = "mean",
        bias: bool = True,
        residual: bool = False,
        *,
        scheme: str | Scheme = "fp32",
        num_nodes: int | tuple[int, int] | None = None,
        **kwargs: object,
    ) -> None:
        super(pyg.GATConv, self).__init__(aggr="add", node_dim=0)
        check_message_passing(kwargs)
        channels = (in_channels, in_channels) if isinstance(in_channels, int) else in_channels
        nodes = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
        check_channels(min(channels), out_channels)
        self.in_channels, self.out_channels, self.heads, self.concat = in_channels, out_channels, heads, concat
        self.negative_slope, self.dropout, self.add_self_loops = negative_slope, dropout, add_self_loops
        self.edge_dim, self.fill_value, self.residual, self.scheme = edge_dim, fill_value, residual, parse(scheme)
        width = heads * out_channels

        def linear(size: int, out: int, scheme: Scheme | str = "fp32", rows: int | None = None) -> Linear:
            return Linear(size, out, False, "glorot", scheme=scheme, num_nodes=rows)

        if isinstance(in_channels, int):
            self.lin: Linear | None = linear(in_channels, width, self.scheme, nodes[0])
            self.lin_src = self.lin_dst = None
        else:
            self.lin = None
            self.lin_src = linear(channels[0], width, self.scheme, nodes[0])
            self.lin_dst = linear(channels[1], width, self.scheme, nodes[1])
        self.att_src = nn.Parameter(torch.empty(1, heads, out_channels))
        self.att_dst = nn.Parameter(torch.empty(1, heads, out_channels))
        self.lin_edge = None if edge_dim is None else linear(edge_dim, width)
        self.att_edge = None if edge_dim is None else nn.Parameter(torch.empty(1, heads, out_channels))
        total = width if concat else out_channels
        self.res = linear(channels[1], total) if residual else None
        self.bias = nn.Parameter(torch.empty(total)) if bias else None
        self.operand_quantizer = column_quantizer(self.scheme, width)
        self.src_quantizer = column_quantizer(self.scheme, heads, parameters=True)
        self.dst_quantizer = column_quantizer(self.scheme, heads, parameters=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for child in self.children():
            if isinstance(child, Linear):
                child.reset_parameters()
        for vector in (self.att_src, self.att_dst, self.att_edge):
            if vector is not None:
                nn.init.xavier_uniform_(vector)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @packs
    def forward(
        self,
        x: Features | tuple[Features, Features | None],
        edge_index: Tensor | Graph,
        edge_attr: Tensor | None = None,
        size: tuple[int, int] | None = None,
        return_attention_weights: bool | None = None,
    ) -> Any:
        source, target, sizes = both_sides(x, size)
        to_source, to_target = (self.lin or self.lin_src), (self.lin or self.lin_dst)
        assert to_source is not None and to_target is not None, "lin, or lin_src and lin_dst"
        check_features("x", source, to_source.in_channels)
        base = graph_of(edge_index, sizes, source)
        begin(self, base)
        graph = base.with_self_loops if self.add_self_loops else base
        h_source = self._operand(to_source(source))
        shared = target is source and to_target is to_source
        h_target = h_source if shared else None if target is None else self._operand(to_target(target))
        src = self._scores(h_source, self.att_src, self.src_quantizer)
        dst = (
            src.new_zeros(graph.num_nodes, self.heads)
            if h_target is None
            else self._scores(h_target, self.att_dst, self.dst_quantizer)
        )
        edge_score = None if edge_attr is None or self.lin_edge is None else self._edge_scores(base, graph, edge_attr)
        scale = None
        if self.training and self.dropout:
            scale = F.dropout(src.new_ones(graph.num_edges, self.heads), self.dropout)
        heads = h_source.view(-1, self.heads, self.out_channels)
        out = ops.gat_aggregate_csr(graph, heads, src, dst, edge_score, scale, self.negative_slope)
        out = out.flatten(1)
        if self.operand_quantizer is not None:
            out = self.operand_quantizer.attended(out)
        out = out if self.concat else out.view(-1, self.heads, self.out_channels).mean(1)
        if self.res is not None and target is not None:
            out = out + self.res(target)
        out = updated(self.operand_quantizer, out if self.bias is None else out + self.bias)
        if return_attention_weights is None:
            return out
        return out, self._attention(graph, src, dst, edge_score)

    def _operand(self, h: Tensor) -> Tensor:
        return h if self.operand_quantizer is None else self.operand_quantizer(h)

    def _scores(self, h: Tensor, vector: Tensor, quantizer: ColumnQuantizer | None) -> Tensor:
        """``[N, heads]``: the part of the score that a node brings along."""
        a = vector[0] if quantizer is None else quantizer(vector[0].t()).t()
        scores = (h.view(-1, self.heads, self.out_channels) * a).sum(-1)
        return scores if quantizer is None else quantizer.scores(scores)

    def _edge_scores(self, base: Graph, graph: Graph, edge_attr: Tensor) -> Tensor:
        """``[E, heads]`` in the order of ``graph``; self loops get ``fill_value``, by default the mean over the node's other edges."""
        assert self.lin_edge is not None and self.att_edge is not None, "as the caller looked"
        attr = edge_attr.unsqueeze(1) if edge_attr.dim() == 1 else edge_attr
        if attr.shape != (base.given_edges, self.lin_edge.in_channels):
            raise ValueError(
                f"edge_attr must be [{base.given_edges}, {self.lin_edge.in_channels}], got {tuple(edge_attr.shape)}"
            )
        values = graph.edge_values(attr, trailing=(attr.size(1),), name="edge_attr")
        if self.add_self_loops:
            rows = graph.rows.long()
            loop = graph.indices == graph.rows
            values = torch.where(loop.unsqueeze(1), self._loop_values(graph, rows, loop, values)[rows], values)
        edge = self.lin_edge(values).view(-1, self.heads, self.out_channels)
        return (edge * self.att_edge).sum(-1)

    def _loop_values(self, graph: Graph, rows: Tensor, loop: Tensor, values: Tensor) -> Tensor:
        """The attributes ``[N, edge_dim]`` of the self loops."""
        if self.fill_value == "mean":
            others = values.masked_fill(loop.unsqueeze(1), 0)
            count = torch.bincount(rows[~loop], minlength=graph.num_nodes).clamp_min(1).to(values.dtype)
            return values.new_zeros(graph.num_nodes, values.size(1)).index_add(0, rows, others) / count.unsqueeze(1)
        if isinstance(self.fill_value, str):
            raise ValueError(f'fill_value must be a number, a tensor or "mean", got {self.fill_value!r}')
        fill = torch.as_tensor(self.fill_value, dtype=values.dtype, device=values.device)
        return fill.expand(graph.num_nodes, values.size(1))

    def _attention(self, graph: Graph, src: Tensor, dst: Tensor, edge_score: Tensor | None) -> tuple[Tensor, Tensor]:
        """Edges ``[2, E]`` by destination, and their attention weights ``[E, heads]``."""
        scores = src[graph.indices.long()] + dst[graph.rows.long()]
        scores = F.leaky_relu(scores if edge_score is None else scores + edge_score, self.negative_slope)
        return torch.stack([graph.indices, graph.rows]).long(), ops.edge_softmax(
            Graph.from_csr(graph.indptr, graph.indices, graph.num_sources), scores
        )

    def feature_maps(self, name: str, nodes: int) -> list[FeatureMap]:
        """The maps of this layer, for :func:`qgnn.quant.feature_maps`."""
        names = ("lin", "lin_src", "lin_dst")
        children = [
            (child, part) for child, part in self.named_children() if isinstance(part, Linear) and child in names
        ]
        maps = [m for child, part in children for m in part.feature_maps(f"{name}.{child}", nodes)]
        width = self.heads * self.out_channels
        return [*maps, operand_map(self.operand_quantizer, name, width, maps[0].nodes)]

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, heads={self.heads}, scheme={self.scheme.name!r}"
