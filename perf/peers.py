"""Other people's ways to compute what we do: PyG's message passing, torch's CSR, torch-scatter, SciPy, and torch.compile."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..environment import FEATURES
from ..graph import Graph
from .scene import Scene, csr

Compute = Callable[[Tensor], Tensor]


def compiled(module: nn.Module) -> Any:
    """``module`` under torch.compile, without a graph break, for every shape: one compilation serves all graphs. For one shape only it is about as
    fast. Needs a C++ compiler on a CPU."""
    dynamo = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = 64  # models of one class share their code, and each counts
    return torch.compile(module, fullgraph=True, dynamic=True)


def traced(module: nn.Module) -> Any:
    """:func:`compiled` without its compiler: what it traces, run by torch."""
    return torch.compile(module, fullgraph=True, dynamic=True, backend="eager")


def torch_scatter() -> Any:
    """The module.

    Raises:
        ImportError: it is not installed; the sentence says how to do that.
    """
    if importlib.util.find_spec("torch_scatter") is None:
        peers = next(feature for feature in FEATURES if feature.extra == "peers")
        raise ImportError(f"torch-scatter is not installed; {peers.install}")
    import torch_scatter as module

    return module


def scipy_csr(at: Scene) -> Any:
    """``A`` as SciPy's CSR matrix."""
    from scipy.sparse import csr_matrix

    if at.device != "cpu":
        raise ValueError("SciPy runs on a CPU only")
    graph = at.graph
    ones = torch.ones(graph.num_edges).numpy()
    return csr_matrix((ones, graph.indices.numpy(), graph.indptr.numpy()), shape=(at.nodes, at.nodes))


class _OnCsr(nn.Module):
    """Stands in a model where a convolution stood."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, x: Tensor, *_: object, **__: object) -> Tensor:
        return self.compute(x)


def on_adjacency(network: Any, at: Scene) -> Compute:
    """PyG's GCN fed with the normalised adjacency matrix, torch's CSR, in place of edges: its way without messages."""
    network = copy.deepcopy(network)
    for conv in network.convs:
        conv.normalize = False  # the matrix is
    return partial(network, edge_index=at.normalized)


def on_csr(network: nn.Module, at: Scene) -> nn.Module:
    """A copy of a PyG model whose convolutions compute the same with torch's cached CSR product, in the type of its parameters: the best that torch
    has without a new kernel."""
    network = copy.deepcopy(network)
    dtype = next(network.parameters()).dtype
    convolutions: Any = network.convs
    for i, conv in enumerate(convolutions):
        convolutions[i] = _OnCsr(_BY_TYPE[type(conv).__name__](conv, at, dtype))
    return network


def _gcn(conv: Any, at: Scene, dtype: torch.dtype) -> Compute:
    matrix = at.normalized.to(dtype)
    return lambda x: matrix @ conv.lin(x) + conv.bias


def _gin(conv: Any, at: Scene, dtype: torch.dtype) -> Compute:
    matrix = at.adjacency.to(dtype)
    return lambda x: conv.nn(matrix @ x + (1 + conv.eps) * x)


def _sage(conv: Any, at: Scene, dtype: torch.dtype) -> Compute:
    matrix = at.averaging.to(dtype)
    return lambda x: conv.lin_l(matrix @ x) + conv.lin_r(x)


def _gat(conv: Any, at: Scene, dtype: torch.dtype) -> Compute:
    def compute(x: Tensor) -> Tensor:
        h = conv.lin(x).view(-1, conv.heads, conv.out_channels)
        source, target = (h * conv.att_src).sum(-1), (h * conv.att_dst).sum(-1)
        out = attention_on_csr(at.graph.with_self_loops, h, source, target, conv.negative_slope)
        return (out.flatten(1) if conv.concat else out.mean(1)) + conv.bias

    return compute


def attention_on_csr(graph: Graph, x: Tensor, source: Tensor, target: Tensor, slope: float) -> Tensor:
    """Graph attention of ``x`` ``[N, H, C]`` with the scores' halves ``[N, H]``: one CSR product a head; a column of ones beside the features sums
    the weights that the softmax divides by."""
    rows, indices, indptr = graph.rows.long(), graph.indices.long(), graph.indptr.long()
    score = F.leaky_relu(source[indices] + target[rows], slope)
    peak = torch.segment_reduce(score, "max", offsets=indptr)
    weight = (score - peak[rows]).exp()
    ones = x.new_ones(x.size(0), 1)
    summed = [csr(graph, weight[:, k].contiguous()) @ torch.cat([x[:, k], ones], 1) for k in range(x.size(1))]
    return torch.stack([s[:, :-1] / s[:, -1:] for s in summed], 1)


_BY_TYPE: dict[str, Callable[[Any, Scene, torch.dtype], Compute]] = {
    "GCNConv": _gcn,
    "GATConv": _gat,
    "GINConv": _gin,
    "SAGEConv": _sage,
}
