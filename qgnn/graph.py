"""Graph: the CSR of a graph by destination, its transpose and its schedule, built once."""

from __future__ import annotations

import weakref
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .kernels.schedule import Schedule, build_schedule, rows_of_edges

if TYPE_CHECKING:
    from torch_geometric.data import Data

_INT32_LIMIT = 2**31 - 2**14
"""Edges from which offsets are int64: kernels count a little beyond the last edge of a row."""


def _first_bad(mask: Tensor) -> int:
    return int(mask.nonzero()[0, 0])


def _check_integers(name: str, value: Tensor, dim: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {value.dtype}; convert it with .long()")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}")
    if value.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimension(s), got shape {tuple(value.shape)}")


_lasting = torch.inference_mode(False)
"""For what a graph keeps: made in inference mode, it would be of no use in training, and have no version to remember more by."""


class Graph:
    """A directed graph with edges sorted by destination (CSR).

    Attributes:
        indptr: ``[N + 1]``, int32 (int64 from 2^31 edges on): the edges of destination ``i`` are ``indptr[i]`` to ``indptr[i + 1]``.
        indices: ``[E]`` int32: the source of every edge.
        perm: ``[E]`` int64: the place of every CSR edge among the caller's edges; ``edge_weight[g.perm]`` is in CSR order. Edges that
            :meth:`add_self_loops` added are numbered after the caller's.
        num_nodes: destinations ``N``.
        num_sources: sources ``M``; equal to ``num_nodes`` unless the graph is bipartite.
        given_edges: edges of the caller, ``E`` before :meth:`add_self_loops`.
        notes: tensors that users of the graph derived from it and want to keep with it.

    Edges are kept as given: duplicates and self loops stay. The transpose and the schedule are built when they are first needed, on the device of
    the graph, and kept. ``sort=False`` turns degree sorting, binning and hub splitting off, for comparison; results of integers do not change.
    """

    def __init__(
        self,
        indptr: Tensor,
        indices: Tensor,
        perm: Tensor,
        num_sources: int,
        *,
        sort: bool = True,
        given_edges: int | None = None,
    ) -> None:
        self.indptr, self.indices, self.perm = indptr, indices, perm
        self.given_edges = indices.numel() if given_edges is None else given_edges
        self.num_nodes, self.num_sources, self.sort = indptr.numel() - 1, num_sources, sort
        self.notes: dict[Any, Tensor] = {}

    @classmethod
    def from_edge_index(
        cls, edge_index: Tensor, num_nodes: int | tuple[int, int] | None = None, *, sort: bool = True
    ) -> Graph:
        """Builds a graph from PyG's ``edge_index``.

        Args:
            edge_index: int32 or int64 ``[2, E]``, sources then destinations.
            num_nodes: nodes, or ``(sources, destinations)`` of a bipartite graph; by default the largest index plus one.

        Raises:
            TypeError: ``edge_index`` is not an integer tensor.
            ValueError: wrong shape, or an index that is negative or not below the number of nodes (the first one is named).
        """
        _check_integers("edge_index", edge_index, 2)
        if edge_index.size(0) != 2:
            raise ValueError(
                f"edge_index must have shape [2, E] (sources, destinations), got {tuple(edge_index.shape)}"
            )
        edges = edge_index.size(1)
        if num_nodes is None:
            num_nodes = int(edge_index.max()) + 1 if edges else 0
        counts_given = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
        if len(counts_given) != 2 or not all(isinstance(n, int) and n >= 0 for n in counts_given):
            raise ValueError(f"num_nodes must be a count, or (sources, destinations), got {num_nodes!r}")
        sources, nodes = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
        for name, row, limit in (("source", edge_index[0], sources), ("destination", edge_index[1], nodes)):
            bad = (row < 0) | (row >= limit)
            if edges and bool(bad.any()):
                e = _first_bad(bad)
                raise ValueError(
                    f"edge_index: {name} {int(row[e])} of edge {e} is outside 0..{limit - 1}; pass num_nodes or mend the edge"
                )
        if max(sources, nodes) >= 2**31:
            raise ValueError(f"a graph has fewer than 2^31 nodes, got {max(sources, nodes)}")
        perm = torch.argsort(edge_index[1], stable=True)
        counts = torch.bincount(edge_index[1], minlength=nodes)
        indptr = torch.zeros(nodes + 1, dtype=torch.int64, device=edge_index.device)
        torch.cumsum(counts, 0, out=indptr[1:])
        return cls(_narrowed(indptr), edge_index[0][perm].to(torch.int32), perm, sources, sort=sort)

    @classmethod
    def from_data(cls, data: Data, *, sort: bool = True) -> Graph:
        """Builds a graph from a PyG ``Data`` with ``edge_index`` and ``num_nodes``."""
        if getattr(data, "edge_index", None) is None:
            raise ValueError("data has no edge_index; Graph.from_csr takes indptr and indices")
        return cls.from_edge_index(data.edge_index, int(data.num_nodes), sort=sort)

    @classmethod
    def from_csr(cls, indptr: Tensor, indices: Tensor, num_sources: int | None = None, *, sort: bool = True) -> Graph:
        """Builds a graph from CSR by destination: ``indptr`` ``[N + 1]`` and ``indices`` ``[E]`` (sources), int32 or int64.

        Raises:
            ValueError: ``indptr`` does not start at 0, end at ``E`` or falls somewhere, or a source is out of range; the first bad place is named.
        """
        _check_integers("indptr", indptr, 1)
        _check_integers("indices", indices, 1)
        if indptr.device != indices.device:
            raise ValueError(f"indptr is on {indptr.device} and indices on {indices.device}; move one")
        if indptr.numel() == 0 or int(indptr[0]) != 0 or int(indptr[-1]) != indices.numel():
            raise ValueError(
                f"indptr must have N + 1 entries, start at 0 and end at the number of edges, {indices.numel()}"
            )
        falling = indptr[1:] < indptr[:-1]
        if bool(falling.any()):
            raise ValueError(
                f"indptr must not fall, but indptr[{_first_bad(falling) + 1}] is below indptr[{_first_bad(falling)}]"
            )
        sources = indptr.numel() - 1 if num_sources is None else num_sources
        bad = (indices < 0) | (indices >= sources)
        if bool(bad.any()):
            e = _first_bad(bad)
            raise ValueError(
                f"indices[{e}] = {int(indices[e])} is outside 0..{sources - 1}; pass num_sources or mend the edge"
            )
        perm = torch.arange(indices.numel(), device=indices.device)
        return cls(_narrowed(indptr.long()), indices.to(torch.int32), perm, sources, sort=sort)

    @classmethod
    def of(cls, edges: Graph | Tensor, num_nodes: int | tuple[int, int]) -> Graph:
        """The graph itself, or the graph of an ``edge_index``, remembered until the tensor changes (in-place changes included,
        but not those through ``.data`` or a NumPy view, which torch does not count) or dies."""
        if isinstance(edges, Graph):
            if edges.num_sources != (num_nodes[0] if isinstance(num_nodes, tuple) else num_nodes):
                raise ValueError(
                    f"the graph has {edges.num_sources} nodes and x {num_nodes} rows; build it with num_nodes of x"
                )
            return edges
        if not isinstance(edges, Tensor) or edges.layout != torch.strided:
            kind = f"a {edges.layout} tensor" if isinstance(edges, Tensor) else type(edges).__name__
            raise TypeError(f"edge_index must be a dense torch.Tensor [2, E] or a qgnn.Graph, got {kind}")
        if edges.is_inference():  # it has no version, so a change in place could not be seen
            return cls.from_edge_index(edges, num_nodes)
        key = (edges._version, edges.data_ptr(), edges.shape, edges.stride(), num_nodes)
        known = _graphs.get(id(edges))
        if known is None or known[0]() is not edges or known[1] != key:
            place = id(edges)
            known = (weakref.ref(edges, lambda _: _graphs.pop(place, None)), key, cls.from_edge_index(edges, num_nodes))
            _graphs[place] = known
        return known[2]

    @property
    def num_edges(self) -> int:
        return self.indices.numel()

    @property
    def device(self) -> torch.device:
        return self.indptr.device

    @cached_property
    @_lasting
    def schedule(self) -> Schedule:
        return build_schedule(self.indptr, self.sort)

    @cached_property
    @_lasting
    def rows(self) -> Tensor:
        """Destination of every CSR edge, int32 ``[E]``."""
        return rows_of_edges(self.indptr)

    @cached_property
    @_lasting
    def in_degree(self) -> Tensor:
        """Edges that end at each node, int64 ``[N]``."""
        return (self.indptr[1:] - self.indptr[:-1]).long()

    @cached_property
    def max_degree(self) -> int:
        """Largest in-degree: what bounds an int32 sum."""
        return int(self.in_degree.max()) if self.num_nodes else 0

    @cached_property
    @_lasting
    def transposed(self) -> tuple[Tensor, Tensor, Tensor, Schedule]:
        """The CSC: ``indptr`` ``[M + 1]``, ``indices`` (destinations, int32), ``edges`` (CSR place of every transposed edge, int32 or int64), and
        the schedule of its rows."""
        edges = torch.argsort(self.indices, stable=True)
        counts = torch.bincount(self.indices, minlength=self.num_sources)
        indptr = torch.zeros(self.num_sources + 1, dtype=self.indptr.dtype, device=self.device)
        indptr[1:] = torch.cumsum(counts, 0)
        return indptr, self.rows[edges], edges.to(self.indptr.dtype), build_schedule(indptr, self.sort)

    @cached_property
    @_lasting
    def with_self_loops(self) -> Graph:
        return self.add_self_loops()

    def add_self_loops(self) -> Graph:
        """A graph in which every node has exactly one self loop more than none: nodes that have self loops keep one of them (the last, as PyG's
        ``add_remaining_self_loops``), the others get one. The loops stand after the other edges of their row."""
        if self.num_sources != self.num_nodes:
            raise ValueError("a bipartite graph has no self loops; pass add_self_loops=False")
        loop = self.indices == self.rows
        nodes = torch.arange(self.num_nodes, device=self.device)
        kept = torch.full_like(nodes, -1).scatter_reduce(0, self.indices[loop].long(), self.perm[loop], "amax")
        loop_perm = torch.where(kept < 0, self.given_edges + nodes, kept)
        rows = torch.cat([self.rows[~loop].long(), nodes])
        order = torch.argsort(rows, stable=True)
        indices = torch.cat([self.indices[~loop], nodes.to(torch.int32)])[order]
        indptr = torch.zeros(self.num_nodes + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(torch.bincount(rows, minlength=self.num_nodes), 0, out=indptr[1:])
        perm = torch.cat([self.perm[~loop], loop_perm])[order]
        return Graph(_narrowed(indptr), indices, perm, self.num_nodes, sort=self.sort, given_edges=self.given_edges)

    def edge_values(
        self, values: Tensor, fill: float = 1.0, *, trailing: tuple[int, ...] = (), name: str = "edge_weight"
    ) -> Tensor:
        """The caller's values of the edges ``[given_edges, *trailing]`` in CSR order ``[E, *trailing]``; self loops that were added get ``fill``.

        Raises:
            TypeError, ValueError: ``values``, called ``name``, are not floats, not one for each of the caller's edges, or on another device.
        """
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise TypeError(
                f"{name} must be a floating-point tensor, got {getattr(values, 'dtype', type(values).__name__)}"
            )
        if values.shape != (self.given_edges, *trailing):
            shape = [self.given_edges, *trailing]
            raise ValueError(f"{name} must be {shape}, one for each edge, got {tuple(values.shape)}")
        if values.device != self.device:
            raise ValueError(f"{name} is on {values.device} and the graph on {self.device}; move one with .to()")
        extra = values.new_full((self.num_nodes, *trailing), fill)
        return torch.cat([values, extra])[self.perm]

    @cached_property
    @_lasting
    def inv_sqrt_degree(self) -> Tensor:
        """``D^-1/2`` of the in-degrees, float32 ``[N]``; 0 for a node without edges. GCN folds it into the steps (NUMERICS 7)."""
        return _inv_sqrt(self.indptr)

    @cached_property
    @_lasting
    def inv_degree(self) -> Tensor:
        """One over the in-degrees, float32 ``[N]``; 1 for a node without edges. A mean is the sum times it."""
        return _inv(self.indptr)

    def to(self, device: torch.device | str) -> Graph:
        """The same graph on another device; transpose and schedule are built there anew."""
        if torch.device(device) == self.device:
            return self
        moved = (self.indptr.to(device), self.indices.to(device), self.perm.to(device))
        return Graph(*moved, self.num_sources, sort=self.sort, given_edges=self.given_edges)

    def __repr__(self) -> str:
        return f"Graph(num_nodes={self.num_nodes}, num_edges={self.num_edges}, device={str(self.device)!r})"


def _degrees(indptr: Tensor) -> Tensor:
    return (indptr[1:] - indptr[:-1]).to(torch.float32)


def _inv_sqrt(indptr: Tensor) -> Tensor:
    degree = _degrees(indptr)
    return torch.where(degree > 0, degree.rsqrt(), torch.zeros_like(degree))


def _inv(indptr: Tensor) -> Tensor:
    return 1 / _degrees(indptr).clamp_min(1)


class TracedGraph(NamedTuple):
    """The part of a :class:`Graph` that inference reads, of an ``edge_index`` whose edges are not known yet, while torch compiles or exports."""

    indptr: Tensor
    indices: Tensor
    schedule: Schedule
    num_sources: int
    num_nodes: int

    @property
    def inv_sqrt_degree(self) -> Tensor:
        """As :attr:`Graph.inv_sqrt_degree`."""
        return _inv_sqrt(self.indptr)

    @property
    def inv_degree(self) -> Tensor:
        """As :attr:`Graph.inv_degree`."""
        return _inv(self.indptr)


@torch.library.custom_op("qgnn::csr", mutates_args=())
def _csr(
    edge_index: Tensor, sources: int, nodes: int, add_self_loops: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    graph = Graph.of(edge_index, sources if sources == nodes else (sources, nodes))
    graph = graph.with_self_loops if add_self_loops else graph
    if graph.max_degree >= 2**24:
        raise ValueError(f"a node has {graph.max_degree} in-edges: int32 sums of 8-bit codes could overflow; split it")
    # Copies: compiled code may write where it has read for the last time.
    order, segments, hubs = (part.clone() for part in graph.schedule)
    return graph.indptr.clone(), graph.indices.clone(), order, segments, hubs


@_csr.register_fake
def _(
    edge_index: Tensor, sources: int, nodes: int, add_self_loops: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    edges, narrow, segments, hubs = (torch.library.get_ctx().new_dynamic_size() for _ in range(4))
    shapes = ((nodes + 1,), (edges,), (narrow,), (segments, 5), (hubs, 3))
    indptr, *others = (edge_index.new_empty(shape, dtype=torch.int32) for shape in shapes)
    return indptr, others[0], others[1], others[2], others[3]


def traced_graph(edge_index: Tensor, sources: int, nodes: int, add_self_loops: bool) -> TracedGraph:
    """The graph of an ``edge_index`` as one operation, for torch.compile and torch.export. Fewer than 2^31 edges."""
    indptr, indices, *schedule = _csr(edge_index, sources, nodes, add_self_loops)
    return TracedGraph(indptr, indices, Schedule(*schedule), sources, nodes)


_graphs: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...], Graph]] = {}


def _narrowed(indptr: Tensor) -> Tensor:
    return indptr.to(torch.int32) if int(indptr[-1]) < _INT32_LIMIT else indptr
