"""Neighbour sampling for PyG's loaders, in Numba: PyG's own needs pyg-lib or torch-sparse, which have no wheels on PyPI."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import get_worker_info
from torch_geometric.sampler import BaseSampler, EdgeSamplerInput, NodeSamplerInput, SamplerOutput
from torch_geometric.sampler.neighbor_sampler import edge_sample

from .graph import Graph
from .kernels.cpu.common import Array, array
from .kernels.cpu.sample import sample_hop

if TYPE_CHECKING:
    from torch_geometric.data import Data
    from torch_geometric.sampler import NegativeSampling


class NeighborSampler(BaseSampler):
    """Uniform neighbour sampling without replacement (GraphSAGE, Hamilton et al. 2017), for PyG's ``NodeLoader`` and ``LinkLoader``.

    Each seed draws ``num_neighbors[0]`` of its incoming edges, each node that is new ``num_neighbors[1]``, and so on. The output holds the seeds
    first, then the nodes in the order they were met; edges go from source to target and are sorted by target, so that :func:`block` sorts nothing.
    Seeds that repeat keep a row each.

    Args:
        graph: a :class:`qgnn.Graph` or PyG ``Data`` of one kind of nodes, without self loops that were added; layers add those by themselves.
        num_neighbors: edges for each hop; -1 takes all of them.
        seed: of the draws. The same seed gives the same samples, call for call; every loader worker has draws of its own, which change with each
            epoch and follow ``torch.manual_seed`` (or the loader's ``generator``) as well.

    Attributes:
        calls: samples drawn so far; set it to go on where another sampler of the same seed stopped.
    """

    def __init__(self, graph: Graph | Data, num_neighbors: Sequence[int], seed: int = 0) -> None:
        graph = (graph if isinstance(graph, Graph) else Graph.from_data(graph)).to("cpu")
        if graph.num_sources != graph.num_nodes:
            raise ValueError(
                f"the graph has {graph.num_sources} sources and {graph.num_nodes} destinations; they must be the same nodes"
            )
        if graph.num_edges and int(graph.perm.max()) >= graph.given_edges:
            raise ValueError(
                "the graph has self loops that were added, which have no edge ids; pass the graph without them"
            )
        if not num_neighbors or any(not isinstance(k, int) or k < -1 for k in num_neighbors):
            raise ValueError(f"num_neighbors must be counts, one for each hop, or -1 for all, got {num_neighbors!r}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.num_neighbors, self.seed, self.calls, self.num_nodes = list(num_neighbors), seed, 0, graph.num_nodes
        self._csr = array(graph.indptr), array(graph.indices), array(graph.perm)
        # One for each thread that samples at the moment; all -1 between calls. pop and append are atomic.
        self._tables: list[Array] = []

    def sample_from_nodes(self, index: NodeSamplerInput, **kwargs: Any) -> SamplerOutput:
        """The sampled neighbourhood of ``index.node``.

        Raises:
            ValueError: a seed that is no node, or input of a heterogeneous or temporal loader.
        """
        if index.input_type is not None:
            raise ValueError(
                f"NeighborSampler knows one kind of nodes, got seeds of type {index.input_type!r}; use PyG's NeighborLoader"
            )
        out = self._sample(index.node, index.time)
        out.metadata = (index.input_id, index.time)
        return out

    def sample_from_edges(self, index: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None) -> SamplerOutput:
        """The sampled neighbourhood of the ends of links, and of negative links that PyG draws."""
        if index.input_type is not None:
            raise ValueError(
                f"NeighborSampler knows one kind of edges, got links of type {index.input_type!r}; use PyG's LinkNeighborLoader"
            )
        return edge_sample(index, self._sample, self.num_nodes, disjoint=False, neg_sampling=neg_sampling)

    def _key(self) -> np.uint64:
        """A new key for every call. A worker is a copy of the sampler as it was, so its key needs the seed that torch gives it each epoch."""
        worker = get_worker_info()
        entropy = [self.seed, self.calls] if worker is None else [self.seed, self.calls, worker.seed]
        self.calls += 1
        return np.uint64(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])

    def _sample(self, seed: torch.Tensor, time: torch.Tensor | None = None) -> SamplerOutput:
        if time is not None:
            raise ValueError("NeighborSampler does not sample by time; leave input_time and time_attr out")
        seeds = array(seed.long())
        if seeds.size and not 0 <= seeds.min() <= seeds.max() < self.num_nodes:
            raise ValueError(f"seeds must be nodes 0..{self.num_nodes - 1}, got {seeds.min()}..{seeds.max()}")
        indptr, indices, perm = self._csr
        key = self._key()
        local = self._tables.pop() if self._tables else np.full(self.num_nodes, -1, dtype=np.int32)
        local[seeds] = np.arange(seeds.size, dtype=np.int32)
        nodes, edges, total = [seeds], [], seeds.size
        for fan_out in self.num_neighbors:
            frontier = nodes[-1]
            counts = (indptr[frontier + 1] - indptr[frontier]).astype(np.int64)
            starts = np.zeros(frontier.size + 1, dtype=np.int64)
            np.cumsum(counts if fan_out < 0 else np.minimum(counts, fan_out), out=starts[1:])
            drawn = np.empty((4, starts[-1]), dtype=np.int64)  # rows, columns, edge ids, nodes that are new
            fresh = sample_hop(
                indptr, indices, perm, frontier, total - frontier.size, starts, key, local, total, *drawn
            )  # fmt: skip
            nodes.append(drawn[3, :fresh])
            edges.append(drawn[:3])
            total += fresh
        node = np.concatenate(nodes)
        local[node] = -1
        self._tables.append(local)
        row, col, edge = torch.from_numpy(np.concatenate(edges, axis=1))
        return SamplerOutput(
            node=torch.from_numpy(node), row=row, col=col, edge=edge,
            num_sampled_nodes=[part.size for part in nodes], num_sampled_edges=[part.shape[1] for part in edges],
        )  # fmt: skip


def block(batch: Data) -> Graph:
    """The :class:`qgnn.Graph` of a mini-batch whose edges are sorted by target, as those that :class:`NeighborSampler` draws: no sort, and
    ``batch.edge_attr`` is in its order. Quantizers with parameters for each node ("a2q") find those of its nodes by ``batch.n_id``.

    Raises:
        ValueError: the edges are not sorted by target.
    """
    source, target = batch.edge_index
    if bool((target[1:] < target[:-1]).any()):
        raise ValueError("the edges are not sorted by target; use Graph.from_data(batch)")
    indptr = torch.zeros(batch.num_nodes + 1, dtype=torch.int64, device=target.device)
    torch.cumsum(torch.bincount(target, minlength=batch.num_nodes), 0, out=indptr[1:])
    graph = Graph.from_csr(indptr, source)
    if "n_id" in batch:
        graph.notes["nodes"] = batch.n_id
    return graph
