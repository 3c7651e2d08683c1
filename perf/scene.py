"""One graph as every candidate wants it, made once and used by all benchmarks on that graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from itertools import cycle
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data import Dataset, load
from ..graph import Graph
from .bench import Run

T = TypeVar("T")

COPIES = 16
"""Of an input, at most: what is smaller than a sixteenth of twice the cache, such as Cora's maps, stays in it, for all candidates alike."""


class Scene:
    """One graph on a device, with its edges in the order of our CSR, which favours no candidate's gather."""

    def __init__(self, name: str, graph: Graph, x: Tensor, classes: int) -> None:
        self.name, self.graph, self.x, self.classes = name, graph, x, classes
        self.device = x.device.type

    @classmethod
    def load(cls, name: str, device: str) -> Scene:
        """Of a data set.

        Raises:
            ValueError: it is not one graph with dense features.
        """
        dataset = load(name)
        if not isinstance(dataset, Dataset):
            raise ValueError(f"{dataset.name} has many graphs; benchmarks run on one")
        data = dataset.data
        if not isinstance(data.edge_index, Tensor) or not isinstance(data.x, Tensor):
            raise ValueError(f"{dataset.name} is not one graph with dense features; benchmarks run on such")
        graph = Graph.from_edge_index(data.edge_index, data.x.size(0)).to(device)
        return cls(dataset.name, graph, data.x.float().to(device), dataset.num_classes)

    @property
    def half(self) -> torch.dtype:
        """FP16; FP32 on a CPU, where torch's CSR product has no other: the path is checked there, and not timed."""
        return torch.float16 if self.device == "cuda" else torch.float32

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
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(self.nodes, width, generator=generator, device=self.device)


@lru_cache(maxsize=1)
def scene(name: str, device: str) -> Scene:
    """The scene of a name of :func:`qgnn.data.load`; the last one is kept, the one before makes room."""
    return Scene.load(name, device)


def csr(graph: Graph, values: Tensor) -> Tensor:
    """torch's CSR matrix with int32 indices, which its CPU product (MKL) takes as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support beta
        return torch.sparse_csr_tensor(graph.indptr, graph.indices, values, (graph.num_nodes, graph.num_sources))


def copies(operand: Tensor, device: str) -> list[Tensor]:
    """The operand, and on a GPU as many copies as together exceed its L2 cache twice, :data:`COPIES` at most."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    count = min(COPIES, 1 + 2 * cache // max(1, operand.numel() * operand.element_size()))
    return [operand, *(operand.clone() for _ in range(count - 1))]


def turns(run: Callable[[T], Any], inputs: Sequence[T]) -> Run:
    """Runs on one input after the other: none finds in the cache what the call before it left there."""
    ring = cycle(inputs)
    return lambda: run(next(ring))
