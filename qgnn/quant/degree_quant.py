"""Degree-Quant: nodes of high in-degree are protected from quantization at random while training (DQ algorithm 1, sec. 3.2; NUMERICS 5)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph import Graph
from .scheme import Scheme


def protection_probability(in_degree: Tensor, p_min: float, p_max: float, batch: Tensor | None = None) -> Tensor:
    """Probability of protection of every node.

    Interpolates between ``p_min`` (the lowest in-degree) and ``p_max`` (the highest) by the rank of the in-degree in its graph: the share of
    nodes with a smaller in-degree. Nodes of equal in-degree get equal probabilities; where all are equal, ``p_max``.

    Args:
        in_degree: int64 ``[N]``.
        p_min, p_max: 0 <= p_min <= p_max <= 1.
        batch: int64 ``[N]``, the graph of every node, for several graphs at once; ranks are taken within each.

    Returns:
        float32 ``[N]``.
    """
    if not 0 <= p_min <= p_max <= 1:
        raise ValueError(f"protection needs 0 <= p_min <= p_max <= 1, got {p_min} and {p_max}")
    n = in_degree.numel()
    if n == 0:
        return in_degree.new_empty(0, dtype=torch.float32)
    graph = torch.zeros_like(in_degree) if batch is None else batch
    key = graph * (int(in_degree.max()) + 1) + in_degree
    ordered, _ = torch.sort(key)
    graphs = int(graph.max()) + 1
    size = torch.bincount(graph, minlength=graphs)
    first = torch.cumsum(size, 0) - size
    below = torch.searchsorted(ordered, key) - first[graph]
    highest = torch.zeros(graphs, dtype=below.dtype, device=below.device).scatter_reduce(0, graph, below, "amax")[graph]
    share = torch.where(highest > 0, below / highest.clamp_min(1), torch.ones_like(below, dtype=torch.float32))
    return p_min + (p_max - p_min) * share.to(torch.float32)


def note_batch(graph: Graph, batch: Tensor) -> None:
    """Says which graph each node is of, int64 ``[N]``, for :func:`protective_mask`; probabilities by another ``batch`` are forgotten."""
    if graph.notes.get("batch") is not batch:
        for key in [k for k in graph.notes if isinstance(k, tuple) and k[0] == "protection"]:
            del graph.notes[key]
        graph.notes["batch"] = batch


def batched_graph(x: Tensor, edge_index: Tensor | Graph, batch: Tensor) -> Graph:
    """The graph of a batch of graphs, which knows which graph each node is of (:func:`note_batch`).

    Raises:
        ValueError: ``batch`` does not name the graph of each row of ``x``.
    """
    if batch.shape != x.shape[:1]:
        raise ValueError(f"batch must name the graph of each of the {x.size(0)} nodes, got {tuple(batch.shape)}")
    graph = Graph.of(edge_index, x.size(0))
    note_batch(graph, batch)
    return graph


def protective_mask(scheme: Scheme, graph: Graph) -> Tensor:
    """The mask of one layer in one training step, bool ``[N]``, drawn anew (DQ algorithm 1). Ranks are taken within each graph of a batch, which
    :func:`note_batch` noted where there are several.

    Raises:
        ValueError: the graph is bipartite, so that its sources have no in-degree.
    """
    if graph.num_sources != graph.num_nodes:
        raise ValueError("Degree-Quant protects by in-degree, which sources of a bipartite graph do not have; use int8")
    key = ("protection", scheme.p_min, scheme.p_max)
    if key not in graph.notes:
        batch = graph.notes.get("batch")
        graph.notes[key] = protection_probability(graph.in_degree, scheme.p_min, scheme.p_max, batch)
    return torch.bernoulli(graph.notes[key]).bool()
