"""One graph as every candidate wants it, made once and used by all benchmarks on that graph."""

from __future__ import annotations

import warnings
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from ..data import Dataset, load
from ..graph import Graph


class Scene:
    """A data set of one graph on a device, with its edges in the order of our CSR, which favours no candidate's gather."""

    def __init__(self, name: str, device: str) -> None:
        dataset = load(name)
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{dataset.name} has many graphs; benchmarks run on one")
        data = dataset.data
        if not isinstance(data.edge_index, Tensor) or not isinstance(data.x, Tensor):
            raise ValueError(f"{dataset.name} is not one graph with dense features; benchmarks run on such")
        self.name, self.device, self.classes = dataset.name, device, dataset.num_classes
        self.x = data.x.float().to(device)
        self.graph = Graph.from_edge_index(data.edge_index, self.x.size(0)).to(device)

    @property
    def nodes(self) -> int:
        return self.graph.num_nodes

    @cached_property
    def edge_index(self) -> Tensor:
        """``[2, E]`` int64: sources, destinations."""
        return torch.stack([self.graph.indices.long(), self.graph.rows.long()])

    @cached_property
    def pyg_edges(self) -> Any:
        """PyG's ``EdgeIndex`` of the same edges, its CSR made beforehand."""
        from torch_geometric import EdgeIndex

        edges = EdgeIndex(self.edge_index, sparse_size=(self.nodes, self.nodes), sort_order="col")
        return edges.fill_cache_()

    @cached_property
    def adjacency(self) -> Tensor:
        """``A``, row by destination."""
        return csr(self.graph, torch.ones(self.graph.num_edges, device=self.device))

    @cached_property
    def normalized(self) -> Tensor:
        """``D^-1/2 (A + I) D^-1/2``, a GCN's."""
        looped = self.graph.with_self_loops
        factor = looped.inv_sqrt_degree
        return csr(looped, factor[looped.rows] * factor[looped.indices])

    @cached_property
    def averaging(self) -> Tensor:
        """``D^-1 A``, a GraphSAGE's."""
        degree = self.graph.in_degree.clamp_min(1).float()
        return csr(self.graph, degree.reciprocal()[self.graph.rows])

    def features(self, width: int) -> Tensor:
        """Normally distributed ``[N, width]``, always the same."""
        return torch.randn(self.nodes, width, generator=torch.Generator().manual_seed(0)).to(self.device)


@lru_cache(maxsize=1)
def scene(name: str, device: str) -> Scene:
    """The scene of a name of :func:`qgnn.data.load`; the last one is kept, the one before makes room."""
    return Scene(name, device)


def csr(graph: Graph, values: Tensor) -> Tensor:
    """torch's CSR matrix with int32 indices, which its CPU product (MKL) takes as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support beta
        return torch.sparse_csr_tensor(graph.indptr, graph.indices, values, (graph.num_nodes, graph.num_sources))
