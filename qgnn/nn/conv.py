"""What the convolutions share: checks of arguments, inputs of one or two node sets, and the choice of what runs first."""

from __future__ import annotations

import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric import EdgeIndex

from ..features import SparseFeatures
from ..graph import Graph
from ..quant import ColumnQuantizer, FeatureMap
from ..quant.base import finished, summed
from .linear import Linear

Features = Tensor | SparseFeatures

_MESSAGE_PASSING_DEFAULTS = {
    "aggr": ("add", "sum"),
    "flow": ("source_to_target",),
    "node_dim": (-2, 0),
    "decomposed_layers": (1,),
}
REDUCTIONS = {"add": "sum", "sum": "sum", "mean": "mean", "max": "max", "min": "min"}
"""PyG's names of aggregations, and ours."""
_MODULES = {
    pyg.SumAggregation: "sum",
    pyg.MeanAggregation: "mean",
    pyg.MaxAggregation: "max",
    pyg.MinAggregation: "min",
}


class QuantizedConv:
    """What a convolution that extends PyG's changes about it besides ``forward``.

    Extending PyG's class makes ``isinstance`` hold and ``to_hetero`` see a convolution. The messages of PyG's ``propagate`` are never made, so what
    works on these messages is refused.
    """

    __repr__ = nn.Module.__repr__

    @property
    def explain(self) -> bool:
        """Whether PyG's explainers mask the messages: never."""
        return False

    @explain.setter
    def explain(self, explain: bool | None) -> None:
        if explain:
            raise ValueError("a quantized convolution has no messages to mask; explain the model before convert")


def check_message_passing(arguments: dict[str, object]) -> None:
    """Raises ValueError for arguments of PyG's MessagePassing that differ from what a layer does."""
    for name, value in arguments.items():
        if name not in _MESSAGE_PASSING_DEFAULTS:
            raise TypeError(f"unknown argument {name!r}")
        if value not in _MESSAGE_PASSING_DEFAULTS[name]:
            raise ValueError(
                f"{name}={value!r} is not supported; this layer has {name}={_MESSAGE_PASSING_DEFAULTS[name][0]!r}"
            )


def check_features(name: str, x: object, channels: int) -> None:
    """Raises ValueError unless ``x`` is ``[N, channels]``."""
    if not isinstance(x, Tensor | SparseFeatures) or len(x.shape) != 2 or x.size(1) != channels:
        shape = list(x.shape) if isinstance(x, Tensor | SparseFeatures) else type(x).__name__
        raise ValueError(f"{name} must be a tensor [N, {channels}], got {shape}")


def check_reduction(aggr: object) -> str:
    """The reduction of PyG's ``aggr``, a name or a module; ValueError for one that has no integer sum behind it."""
    if type(aggr) in _MODULES:
        return _MODULES[type(aggr)]
    if not isinstance(aggr, str) or aggr not in REDUCTIONS:
        raise ValueError(f"aggr={aggr!r} is not supported; choose one of {', '.join(REDUCTIONS)}")
    return REDUCTIONS[aggr]


def edges_of(edge_index: Tensor | Graph) -> Tensor | Graph:
    """``edge_index`` without PyG's EdgeIndex around it, which has no memory address to remember its graph by."""
    return edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index


def both_sides(
    x: Features | tuple[Features, Features | None], size: tuple[int, int] | None
) -> tuple[Features, Features | None, tuple[int, int]]:
    """Sources, destinations and their numbers, of one tensor for both or of a bipartite pair. Where the destinations have no features, ``size``
    says how many there are (as in PyG); by default as many as sources."""
    if isinstance(x, Tensor | SparseFeatures):
        return x, x, (x.size(0), x.size(0))
    if not isinstance(x, tuple | list) or len(x) != 2 or x[0] is None:
        raise ValueError("x must be a tensor, or a pair (x_source, x_target) for a bipartite graph")
    source, target = x
    count = target.size(0) if target is not None else size[1] if size is not None else source.size(0)
    return source, target, (source.size(0), count)


def graph_of(edge_index: Tensor | Graph, sizes: tuple[int, int], source: Features) -> Graph:
    """The graph of an ``edge_index``, checked against the features."""
    graph = Graph.of(edges_of(edge_index), sizes[0] if sizes[0] == sizes[1] else sizes)
    if graph.num_nodes != sizes[1]:
        raise ValueError(f"the graph has {graph.num_nodes} destinations and x {sizes[1]}; build it for both sizes")
    if graph.device != source.device:
        raise ValueError(f"x is on {source.device} and the graph on {graph.device}; move one with .to()")
    return graph


def operand_map(quantizer: ColumnQuantizer | None, name: str, channels: int, nodes: int) -> FeatureMap:
    """The map that an aggregation reads."""
    if quantizer is None:
        return FeatureMap(f"{name}.operand", channels, nodes, 32, "operand", False)
    return quantizer.feature_map(name, nodes)


def leading_linear(module: nn.Module) -> Linear | None:
    """The Linear that a module applies first, if it is one or is a Sequential that starts with one."""
    first = next(iter(module), None) if isinstance(module, nn.Sequential) else module
    return first if isinstance(first, Linear) else None


def narrows(in_channels: int, out_channels: int, reduce: str) -> bool:
    """Whether an aggregation should run after a Linear of these sizes: where that gives fewer columns, fewer are summed, and a sum or mean of
    products is the product of the sum or mean. Maximum and minimum are not, and run first."""
    return out_channels < in_channels and reduce in ("sum", "mean")


def dense(x: Features) -> Tensor:
    """``x`` as a tensor."""
    return x.to_dense() if isinstance(x, SparseFeatures) else x


def aggregated(
    quantizer: ColumnQuantizer | None,
    graph: Graph,
    h: Tensor,
    weight: Tensor | None = None,
    reduce: str = "sum",
    *,
    scale: Tensor | None = None,
    own: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """:meth:`qgnn.quant.ColumnQuantizer.aggregate`, also where nothing is quantized."""
    if quantizer is None:
        return finished(summed(graph, h, weight, reduce, own), scale, bias)
    return quantizer.aggregate(graph, h, weight, reduce, scale=scale, own=own, bias=bias)


def updated(quantizer: ColumnQuantizer | None, out: Tensor) -> Tensor:
    """The output of a layer, as its scheme hands it on."""
    return out if quantizer is None else quantizer.update(out)


def reset(module: nn.Module) -> None:
    """Calls ``reset_parameters`` of every part that has one."""
    for part in module.modules():
        reset_parameters = getattr(part, "reset_parameters", None)
        if callable(reset_parameters):
            reset_parameters()
