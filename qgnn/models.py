"""Models as the papers train them (A2Q figure 9; Degree-Quant tables 5 and 6), made of :mod:`qgnn.nn` layers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .features import SparseFeatures, dropout
from .graph import Graph
from .nn import GATConv, GCNConv, GINConv, Linear, SAGEConv
from .nn.activation import relu
from .parts import pool
from .quant import FeatureMap, Scheme, batched_graph, feature_maps, parse
from .quant.saved import attach, packs_maps
from .recipes import Recipe

Activation = Literal["relu", "elu"]
Aggregation = Literal["sum", "mean", "max"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "elu": F.elu}

ATOM_KINDS = 28
"""Kinds of atoms in ZINC."""


def _check_sizes(num_layers: int, activation: str = "relu") -> None:
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


class _NodeModel(nn.Module):
    """Dropout, then convolutions with an activation and dropout between them; the last one gives the outputs.

    With ``skip``, what a layer between the first and the last reads is added to what the next one reads (A2Q table 14).
    """

    def __init__(
        self,
        convs: Iterable[nn.Module],
        dropout: float,
        input_dropout: float | None,
        skip: bool,
        scheme: str | Scheme,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.dropout, self.input_dropout = dropout, dropout if input_dropout is None else input_dropout
        self.skip, self.activation = skip, activation
        if packs_maps(parse(scheme)):
            attach(self)

    def forward(self, x: Tensor | SparseFeatures, edge_index: Tensor | Graph) -> Tensor:
        """``x`` ``[N, in_channels]`` and ``edge_index`` ``[2, E]`` -> outputs ``[N, out_channels]``."""
        first, *rest = self.convs
        h: Tensor = first(dropout(x, self.input_dropout, self.training), edge_index)
        read: Tensor | None = None
        for conv in rest:
            h = self.activate(h)  # the output of the layer, which nothing needs any more, is let go
            read = h if read is None or not self.skip else h + read
            h = conv(read, edge_index)
        return h

    def activate(self, h: Tensor) -> Tensor:
        """What stands between two layers: activation and dropout."""
        if self.activation == "relu":
            return ops.relu_dropout(h, self.dropout, self.training)
        return F.dropout(ACTIVATIONS[self.activation](h), self.dropout, self.training)


class GCN(_NodeModel):
    """Graph convolutional network: dropout, then ``GCNConv`` and ReLU, layer by layer; the last layer gives the logits.

    Args:
        in_channels, hidden, out_channels: features of a node, of the maps between layers, and classes.
        num_layers: number of ``GCNConv`` layers, at least 1.
        dropout: chance that an input of a layer is set to zero in training.
        input_dropout: the same for the features, the input of the first layer; by default ``dropout``.
        scheme: how it is quantized, see :mod:`qgnn.quant.scheme`.
        num_nodes: nodes of the graph; schemes that learn a step and a width for every node (``"a2q"``) need it.
        skip: add the input of every hidden layer but the first to its output (A2Q table 14).
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
        skip: bool = False,
    ) -> None:
        _check_sizes(num_layers)
        sizes = [in_channels, *[hidden] * (num_layers - 1), out_channels]
        convs = (GCNConv(a, b, scheme=scheme, num_nodes=num_nodes) for a, b in pairwise(sizes))
        super().__init__(convs, dropout, input_dropout, skip, scheme)


class GAT(_NodeModel):
    """Graph attention network: ``heads`` heads of ``hidden`` features side by side, and one head of ``out_channels`` in the last layer.

    Args:
        attention_dropout: chance that a node does not see a neighbour in training.
        activation: between the layers, "elu" or "relu".

    The others are :class:`GCN`'s; the map between two layers has ``heads * hidden`` features.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        num_layers: int = 2,
        dropout: float = 0.6,
        scheme: str | Scheme = "fp32",
        num_nodes: int | None = None,
        input_dropout: float | None = None,
        skip: bool = False,
        *,
        heads: int = 8,
        attention_dropout: float = 0.6,
        activation: Activation = "elu",
    ) -> None:
        _check_sizes(num_layers, activation)
        sizes = [in_channels, *[heads * hidden] * (num_layers - 1)]
        convs = [
            GATConv(size, hidden, heads, dropout=attention_dropout, scheme=scheme, num_nodes=num_nodes)
            for size in sizes[:-1]
        ]
        last = GATConv(sizes[-1], out_channels, dropout=attention_dropout, scheme=scheme, num_nodes=num_nodes)
        super().__init__([*convs, last], dropout, input_dropout, skip, scheme, activation)


class GIN(_NodeModel):
    """Graph isomorphism network: ``GINConv`` layers, each of one Linear, as both papers have it on citation networks.

    Args:
        aggr: how neighbours are combined, "sum", "mean" or "max" (A2Q table 15).
        mlp_layers: Linears of a layer; from 2 on, BatchNorm and ReLU stand between them.

    The others are :class:`GCN`'s.
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
        skip: bool = False,
        *,
        aggr: Aggregation = "sum",
        mlp_layers: int = 1,
    ) -> None:
        _check_sizes(num_layers)
        if mlp_layers < 1:
            raise ValueError(f"mlp_layers must be at least 1, got {mlp_layers}")

        def mlp(size: int, out: int) -> nn.Sequential:
            widths = [size, *[hidden] * (mlp_layers - 1), out]
            linears = [Linear(a, b, scheme=scheme, num_nodes=num_nodes) for a, b in pairwise(widths)]
            between = [part for linear in linears[:-1] for part in (linear, nn.BatchNorm1d(hidden), relu(scheme))]
            return nn.Sequential(*between, linears[-1])

        sizes = [in_channels, *[hidden] * (num_layers - 1), out_channels]
        convs = (GINConv(mlp(a, b), aggr=aggr, scheme=scheme) for a, b in pairwise(sizes))
        super().__init__(convs, dropout, input_dropout, skip, scheme)


class GraphSAGE(_NodeModel):
    """GraphSAGE: ``SAGEConv`` layers.

    Args:
        aggr: how neighbours are combined, "mean", "sum" or "max".

    The others are :class:`GCN`'s.
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
        skip: bool = False,
        *,
        aggr: Aggregation = "mean",
    ) -> None:
        _check_sizes(num_layers)
        sizes = [in_channels, *[hidden] * (num_layers - 1), out_channels]
        convs = (SAGEConv(a, b, aggr, scheme=scheme, num_nodes=num_nodes) for a, b in pairwise(sizes))
        super().__init__(convs, dropout, input_dropout, skip, scheme)


def _mlp(widths: Sequence[int], scheme: Scheme) -> nn.Sequential:
    """Linears with ReLU between them."""
    linears = [Linear(a, b, scheme=scheme) for a, b in pairwise(widths)]
    return nn.Sequential(*(part for linear in linears[:-1] for part in (linear, relu(scheme))), linears[-1])


class _GraphModel(nn.Module, ABC):
    """Maps of the nodes, each pooled to one row a graph, and a prediction from these rows.

    Rows of the children named in ``PER_GRAPH`` are graphs: no node's protective mask holds for them (DQ figure 13), and the bookkeeping of widths
    counts them by the graphs that evaluation saw since :func:`qgnn.quant.reset_usage`.
    """

    PER_GRAPH: tuple[str, ...]

    def __init__(self, pool: Aggregation, scheme: Scheme) -> None:
        super().__init__()
        self.pool = pool
        if packs_maps(scheme):
            attach(self)
        self.seen_nodes = self.seen_graphs = 0

    def forward(self, x: Tensor, edge_index: Tensor | Graph, batch: Tensor, num_graphs: int | None = None) -> Tensor:
        """``x`` ``[N, in_channels]``, ``edge_index`` ``[2, E]``, ``batch`` ``[N]``, the graph of every node, and their number, by default the
        largest plus one -> outputs ``[G, out_channels]``."""
        graph = batched_graph(x, edge_index, batch)
        out = self.predict([pool(h, batch, num_graphs, self.pool) for h in self.maps(x, graph)])
        if not self.training and isinstance(out, Tensor):  # it is no tensor while torch.fx follows this code
            self.seen_nodes, self.seen_graphs = self.seen_nodes + x.size(0), self.seen_graphs + out.size(0)
        return out

    def reset_usage(self) -> None:
        """Counts nodes and graphs anew."""
        self.seen_nodes = self.seen_graphs = 0

    @abstractmethod
    def maps(self, x: Tensor, graph: Graph) -> list[Tensor]:
        """The maps to pool, ``[N, F]`` each."""

    @abstractmethod
    def predict(self, pooled: list[Tensor]) -> Tensor:
        """Outputs ``[G, out_channels]`` of the pooled maps ``[G, F]``."""

    def feature_maps(self, name: str, nodes: int) -> list[FeatureMap]:
        """The maps of this model, for :func:`qgnn.quant.feature_maps`."""
        graphs = round(nodes * self.seen_graphs / self.seen_nodes) if self.seen_nodes else nodes
        return [
            m
            for child, part in self.named_children()
            for m in feature_maps(part, graphs if child in self.PER_GRAPH else nodes, f"{name}.{child}")
        ]


class _ResidualModel(_GraphModel):
    """What the models for superpixels and molecules share (Dwivedi et al. 2020): an embedding of the nodes, then layers
    ``h + activation(BatchNorm(conv(h)))``, with dropout after each. A2Q counts the embedding as a layer: "5+1MLP" has four convolutions.

    ``kinds`` > 0: a node's features are the number of its kind, which a table turns into a vector.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        convs: Iterable[nn.Module],
        kinds: int,
        dropout: float,
        scheme: Scheme,
        pool: Aggregation,
        activation: Activation = "relu",
    ) -> None:
        super().__init__(pool, scheme)
        self.embedding = nn.Embedding(kinds, width) if kinds else Linear(in_channels, width, scheme=scheme)
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in self.convs)
        self.dropout, self.activation = dropout, activation

    def maps(self, x: Tensor, graph: Graph) -> list[Tensor]:
        """The embedding and the output of every layer."""
        h = self.embedding(x.flatten().long() if isinstance(self.embedding, nn.Embedding) else x)
        maps = [h]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            h = h + ACTIVATIONS[self.activation](norm(conv(h, graph)))
            h = F.dropout(h, self.dropout, self.training)
            maps.append(h)
        return maps


class _ReadoutModel(_ResidualModel):
    """The last map, pooled, goes through an output MLP."""

    PER_GRAPH = ("mlp",)

    def __init__(
        self,
        in_channels: int,
        width: int,
        out_channels: int,
        convs: Iterable[nn.Module],
        kinds: int,
        dropout: float,
        scheme: Scheme,
        pool: Aggregation,
        readout: Sequence[int] | None,
        activation: Activation = "relu",
    ) -> None:
        super().__init__(in_channels, width, convs, kinds, dropout, scheme, pool, activation)
        hidden = [math.ceil(width / 2)] * 2 if readout is None else readout
        self.mlp = _mlp([width, *hidden, out_channels], scheme)

    def maps(self, x: Tensor, graph: Graph) -> list[Tensor]:
        """The output of the last layer."""
        return super().maps(x, graph)[-1:]

    def predict(self, pooled: list[Tensor]) -> Tensor:
        out: Tensor = self.mlp(pooled[0])
        return out


class GraphGCN(_ReadoutModel):
    """GCN for whole graphs, as both papers have it on superpixels and molecules: embedding, residual layers with BatchNorm, mean over the nodes,
    output MLP. The convolutions have no bias, as BatchNorm has one.

    Args:
        in_channels, hidden, out_channels: features of a node, of the maps between layers, and outputs for a graph.
        num_layers: number of convolutions, at least 1.
        dropout: chance that an output of a layer is set to zero in training.
        scheme: how it is quantized, see :mod:`qgnn.quant.scheme`; A2Q's is "a2q-nns".
        kinds: 0, or the number of kinds of nodes: then ``x`` is ``[N]`` or ``[N, 1]``, the kind of every node, 0 to ``kinds - 1``.
        pool: how the nodes of a graph are combined, "mean", "sum" or "max".
        readout: widths of the output MLP's hidden layers; by default two of half the width of its input, rounded up.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        num_layers: int = 4,
        dropout: float = 0.0,
        scheme: str | Scheme = "fp32",
        *,
        kinds: int = 0,
        pool: Aggregation = "mean",
        readout: Sequence[int] | None = None,
    ) -> None:
        _check_sizes(num_layers)
        scheme = parse(scheme)
        convs = (GCNConv(hidden, hidden, bias=False, scheme=scheme) for _ in range(num_layers))
        super().__init__(in_channels, hidden, out_channels, convs, kinds, dropout, scheme, pool, readout)


class GraphGAT(_ReadoutModel):
    """As :class:`GraphGCN`, with attention: ``heads`` heads of ``hidden`` features, and one head of ``heads * hidden`` in the last layer.

    Args:
        heads: attention heads.
        attention_dropout: chance that a node does not see a neighbour in training.
        activation: of the layers, "elu" or "relu".

    The others are :class:`GraphGCN`'s.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        num_layers: int = 4,
        dropout: float = 0.0,
        scheme: str | Scheme = "fp32",
        *,
        heads: int = 8,
        attention_dropout: float = 0.0,
        activation: Activation = "elu",
        kinds: int = 0,
        pool: Aggregation = "mean",
        readout: Sequence[int] | None = None,
    ) -> None:
        _check_sizes(num_layers, activation)
        scheme, width = parse(scheme), heads * hidden
        shapes = [(hidden, heads)] * (num_layers - 1) + [(width, 1)]
        convs = (GATConv(width, out, h, dropout=attention_dropout, bias=False, scheme=scheme) for out, h in shapes)
        super().__init__(in_channels, width, out_channels, convs, kinds, dropout, scheme, pool, readout, activation)


class GraphGIN(_ResidualModel):
    """GIN for superpixels and molecules: 2-layer MLPs and a learned epsilon; the pooled map of the embedding and of every layer gives a prediction of
    its own, and these are summed (Xu et al. 2019). Degree-Quant's parameter counts say that its table of ``kinds`` gives none.

    The arguments are :class:`GraphGCN`'s.
    """

    PER_GRAPH = ("predictions",)

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        num_layers: int = 4,
        dropout: float = 0.0,
        scheme: str | Scheme = "fp32",
        *,
        kinds: int = 0,
        pool: Aggregation = "sum",
    ) -> None:
        _check_sizes(num_layers)
        scheme = parse(scheme)
        convs = (GINConv(_mlp([hidden] * 3, scheme), train_eps=True, scheme=scheme) for _ in range(num_layers))
        super().__init__(in_channels, hidden, convs, kinds, dropout, scheme, pool)
        read = num_layers if kinds else num_layers + 1
        self.predictions = nn.ModuleList(Linear(hidden, out_channels, scheme=scheme) for _ in range(read))

    def maps(self, x: Tensor, graph: Graph) -> list[Tensor]:
        """The maps that have a prediction."""
        return super().maps(x, graph)[-len(self.predictions) :]

    def predict(self, pooled: list[Tensor]) -> Tensor:
        return torch.stack([part(h) for part, h in zip(self.predictions, pooled, strict=True)]).sum(0)


class PooledGIN(_GraphModel):
    """GIN for TU data sets, as Degree-Quant has it on REDDIT-BINARY: convolutions with a 2-layer MLP, BatchNorm at its end, and a learned epsilon;
    mean over the nodes; output MLP with one hidden layer. No residual connections.

    Where a node has a single scalar as feature, the sum of the first layer and the product after it stay in float32 (DQ app. A.1).

    Args:
        dropout: chance that an input of the last Linear is set to zero in training.

    The others are :class:`GraphGCN`'s.
    """

    PER_GRAPH = ("lin1", "lin2")

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        num_layers: int = 5,
        dropout: float = 0.5,
        scheme: str | Scheme = "fp32",
        *,
        pool: Aggregation = "mean",
    ) -> None:
        _check_sizes(num_layers)
        scheme = parse(scheme)
        super().__init__(pool, scheme)
        self.dropout = dropout

        def conv(size: int) -> GINConv:
            first = "fp32" if size == 1 else scheme
            linears = Linear(size, hidden, scheme=first), Linear(hidden, hidden, scheme=scheme)
            inner = (linears[0], relu(scheme), linears[1], relu(scheme))
            return GINConv(nn.Sequential(*inner, nn.BatchNorm1d(hidden)), train_eps=True, scheme=first)

        self.convs = nn.ModuleList(conv(size) for size in [in_channels, *[hidden] * (num_layers - 1)])
        self.lin1 = Linear(hidden, hidden, scheme=scheme)
        self.lin2 = Linear(hidden, out_channels, scheme=scheme)

    def maps(self, x: Tensor, graph: Graph) -> list[Tensor]:
        """The output of the last layer."""
        for conv in self.convs:
            x = conv(x, graph)
        return [x]

    def predict(self, pooled: list[Tensor]) -> Tensor:
        h: Tensor = self.lin1(pooled[0])
        out: Tensor = self.lin2(ops.relu_dropout(h, self.dropout, self.training))
        return out


_Architecture = tuple[type[nn.Module], tuple[int, int, int], dict[str, Any]]

# GIN on citation networks has the hidden 16 as outputs, whatever the classes: training leaves those beyond the classes unused.
# The output MLP's widths are not in the paper. Two of half its input, rounded up, give all printed counts but that of GAT on ZINC: 105,049 for the
# printed 105,044. Of the MLPs that give the printed one, 66-55-44 has the simplest widths.
_TABLE_6: dict[tuple[str, str], _Architecture] = {
    ("gcn", "Cora"): (GCN, (1433, 16, 7), {}),
    ("gat", "Cora"): (GAT, (1433, 8, 7), {}),
    ("gin", "Cora"): (GIN, (1433, 16, 16), {}),
    ("gcn", "CiteSeer"): (GCN, (3703, 16, 6), {}),
    ("gat", "CiteSeer"): (GAT, (3703, 8, 6), {}),
    ("gin", "CiteSeer"): (GIN, (3703, 16, 16), {}),
    ("gcn", "MNIST"): (GraphGCN, (3, 146, 10), {}),
    ("gat", "MNIST"): (GraphGAT, (3, 19, 10), {}),
    ("gin", "MNIST"): (GraphGIN, (3, 110, 10), {}),
    ("gcn", "CIFAR10"): (GraphGCN, (5, 146, 10), {}),
    ("gat", "CIFAR10"): (GraphGAT, (5, 19, 10), {}),
    ("gin", "CIFAR10"): (GraphGIN, (5, 110, 10), {}),
    ("gcn", "ZINC"): (GraphGCN, (1, 145, 1), {"kinds": ATOM_KINDS}),
    ("gat", "ZINC"): (GraphGAT, (1, 18, 1), {"kinds": ATOM_KINDS, "readout": (66, 55, 44)}),
    ("gin", "ZINC"): (GraphGIN, (1, 110, 1), {"kinds": ATOM_KINDS}),
    ("gin", "REDDIT-BINARY"): (PooledGIN, (1, 64, 2), {}),
}


NODE_MODELS: dict[str, type[nn.Module]] = {"gcn": GCN, "gat": GAT, "gin": GIN, "sage": GraphSAGE}
GRAPH_MODELS: dict[str, type[nn.Module]] = {"gcn": GraphGCN, "gat": GraphGAT, "gin": GraphGIN}


def paper_architecture(
    model: str, dataset: str, scheme: str | Scheme = "fp32", num_nodes: int | None = None
) -> nn.Module:
    """The architecture of Degree-Quant's tables 5 and 6, which A2Q trains as well.

    Args:
        model: "gcn", "gat" or "gin".
        dataset: "Cora", "CiteSeer", "MNIST", "CIFAR10", "ZINC" or, with "gin", "REDDIT-BINARY".
        scheme: a scheme name (:mod:`qgnn.quant.scheme`).
        num_nodes: nodes of the graph, for "a2q" on Cora and CiteSeer.
    """
    if (model, dataset) not in _TABLE_6:
        known = ", ".join("-".join(place) for place in _TABLE_6)
        raise ValueError(f"Degree-Quant's table 6 has no {model!r} for {dataset!r}; it has {known}")
    kind, sizes, settings = _TABLE_6[model, dataset]
    nodes = {"num_nodes": num_nodes} if issubclass(kind, _NodeModel) else {}
    return kind(*sizes, scheme=scheme, **nodes, **settings)


def build(
    model: str,
    in_channels: int,
    out_channels: int,
    *,
    task: str,
    family: str,
    recipe: Recipe,
    scheme: str | Scheme,
    num_nodes: int | None = None,
) -> nn.Module:
    """An untrained model of a recipe's sizes, with the dropout of its warm-up.

    Args:
        model: "gcn", "gat", "gin" or "sage".
        in_channels, out_channels: features of a node, and outputs.
        task: of the data set; "graph...": one output row a graph.
        family: of the data set. GIN for "tu" is :class:`PooledGIN`; molecules with one feature, the kind of atom, get a table.
        recipe: sizes and dropout.
        scheme: a scheme name (:mod:`qgnn.quant.scheme`).
        num_nodes: nodes of the graph, for "a2q".

    Raises:
        ValueError: an unknown model, one that the task does not have, or a setting that the model does not.
    """
    kinds: dict[str, type[nn.Module]] = NODE_MODELS
    if task.startswith("graph"):
        kinds = {**GRAPH_MODELS, "gin": PooledGIN} if family == "tu" else GRAPH_MODELS
    if model not in kinds:
        raise ValueError(f"there is no model {model!r} for task {task!r}; choose one of {', '.join(kinds)}")
    kind = kinds[model]
    of_nodes = issubclass(kind, _NodeModel)
    known = {"aggr": of_nodes and model in ("gin", "sage"), "skip": of_nodes, "input_dropout": of_nodes}
    for name in (name for name, has in known.items() if getattr(recipe, name) and not has):
        raise ValueError(f"{kind.__name__} has no {name}: leave that setting of the recipe out")
    settings: dict[str, Any] = {"num_layers": recipe.layers, "dropout": recipe.warmup_dropout, "scheme": scheme}
    if model == "gat":
        attention = {"heads": recipe.heads, "attention_dropout": recipe.attention_dropout}
        settings |= {**attention, "activation": recipe.activation}
    if of_nodes:
        settings |= {"num_nodes": num_nodes, "input_dropout": recipe.input_dropout, "skip": bool(recipe.skip)}
        if recipe.aggr:
            settings["aggr"] = recipe.aggr
    elif family == "molecules" and in_channels == 1:
        settings["kinds"] = ATOM_KINDS
    return kind(in_channels, recipe.hidden, out_channels, **settings)
