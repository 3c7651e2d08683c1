"""A graph in parts, one for each process: the part's own nodes with all their in-edges, and the halo, the sources of these edges that others own."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..graph import Graph

VERSION = 1


def assign(graph: Graph, parts: int) -> tuple[Tensor, str]:
    """The part of every node, int64 ``[N]``, and how it was found.

    "metis" (Karypis and Kumar 1998), where pymetis is installed, cuts few edges. Else "bandwidth": the order of Cuthill and McKee (1969), in which
    neighbours stand near each other, cut into blocks of equal numbers of nodes. Both see an undirected graph, and give the same parts in every run.

    Raises:
        ValueError: there are fewer nodes than parts, or a part would have none.
    """
    from scipy.sparse import coo_matrix, csgraph

    nodes = graph.num_nodes
    if nodes < parts:
        raise ValueError(f"{nodes} nodes cannot be parted among {parts} processes; start fewer")
    source, target = graph.indices.cpu().numpy(), graph.rows.cpu().numpy()
    other = source != target
    pairs = coo_matrix((np.ones(int(other.sum()), np.int8), (target[other], source[other])), (nodes, nodes)).tocsr()
    both = (pairs + pairs.T).tocsr()
    if importlib.util.find_spec("pymetis") is not None:
        import pymetis

        _, found = pymetis.part_graph(parts, adjacency=pymetis.CSRAdjacency(both.indptr, both.indices))
        owner, method = np.asarray(found, np.int64), "metis"
    else:
        order = csgraph.reverse_cuthill_mckee(both, symmetric_mode=True)
        owner, method = np.empty(nodes, np.int64), "bandwidth"
        owner[order] = np.arange(nodes) * parts // nodes
    if np.unique(owner).size < parts:
        raise ValueError(f"{nodes} nodes give {parts} processes parts of which some are empty; start fewer")
    return torch.from_numpy(owner), method


@dataclass(frozen=True)
class Plan:
    """Who sends what to whom.

    Attributes:
        rank, counts: this part, and the nodes of every part.
        inner: the part's nodes, int64 ``[n]``, ascending; their places are their numbers here.
        halo: the nodes that others own, int64 ``[h]``, by owner and ascending.
        send: places of the rows to send, int64 ``[s]``, to the first part first.
        send_counts, halo_counts: rows to and from every part.
        method: how the graph was parted.
    """

    rank: int
    counts: list[int]
    inner: Tensor
    halo: Tensor
    send: Tensor
    send_counts: list[int]
    halo_counts: list[int]
    method: str

    @property
    def nodes(self) -> int:
        """Nodes of the whole graph."""
        return sum(self.counts)

    @cached_property
    def senders(self) -> Graph:
        """The rows that were sent as sources and the part's nodes as destinations: sums what comes back in a fixed order."""
        edges = torch.stack([torch.arange(self.send.numel(), device=self.send.device), self.send])
        return Graph.from_edge_index(edges, (self.send.numel(), self.inner.numel()))

    def to(self, device: torch.device | str) -> Plan:
        """The same on another device."""
        moved = {name: getattr(self, name).to(device) for name in ("inner", "halo", "send")}
        return Plan(**{**vars_of(self), **moved})


def vars_of(plan: Plan) -> dict[str, object]:
    """Its fields, without what it has cached."""
    return {name: getattr(plan, name) for name in Plan.__dataclass_fields__}


class PartitionedGraph(Graph):
    """A part of a graph. As a :class:`qgnn.Graph` it is that of the edges between inner nodes; degrees count all edges, as in the whole graph.

    Attributes:
        halo: edges from the halo, a bipartite graph of ``h`` sources and ``n`` destinations.
        plan: which rows travel.
    """

    def __init__(self, inner: Graph, halo: Graph, plan: Plan) -> None:
        super().__init__(inner.indptr, inner.indices, inner.perm, inner.num_sources, given_edges=inner.given_edges)
        self.halo, self.plan = halo, plan

    @cached_property
    def in_degree(self) -> Tensor:
        return (self.indptr.diff() + self.halo.indptr.diff()).long()

    @cached_property
    def inv_sqrt_degree(self) -> Tensor:
        degree = self.in_degree.float()
        return torch.where(degree > 0, degree.rsqrt(), torch.zeros_like(degree))

    @cached_property
    def inv_degree(self) -> Tensor:
        return 1 / self.in_degree.float().clamp_min(1)

    @cached_property
    def with_self_loops(self) -> PartitionedGraph:
        return PartitionedGraph(self.add_self_loops(), self.halo, self.plan)

    @cached_property
    def joint(self) -> Graph:
        """All edges, as a bipartite graph: sources are the inner nodes, then the halo; for what cannot be summed in two parts, as a softmax."""
        rows = torch.cat([self.rows, self.halo.rows]).long()
        sources = torch.cat([self.indices, self.halo.indices + self.num_nodes])
        order = torch.argsort(rows, stable=True)
        return Graph.from_csr(self.indptr + self.halo.indptr, sources[order], self.num_nodes + self.halo.num_sources)

    @cached_property
    def attended(self) -> Graph:
        """What graph attention is called with: its self loops bring all edges along."""
        view = copy.copy(self)
        view.__dict__["with_self_loops"] = self.with_self_loops.joint
        return view

    def to(self, device: torch.device | str) -> PartitionedGraph:
        return PartitionedGraph(
            Graph(self.indptr, self.indices, self.perm, self.num_sources, given_edges=self.given_edges).to(device),
            self.halo.to(device),
            self.plan.to(device),
        )


def part_of(graph: Graph, owner: Tensor, rank: int, method: str) -> PartitionedGraph:
    """Part ``rank`` of a graph whose nodes belong to ``owner`` ``[N]``."""
    counts = torch.bincount(owner).tolist()
    rows, sources = graph.rows.long(), graph.indices.long()
    inner = (owner == rank).nonzero().squeeze(1)
    place = torch.full_like(owner, -1)
    place[inner] = torch.arange(inner.numel())
    into = owner[rows] == rank
    local, remote = into & (owner[sources] == rank), into & (owner[sources] != rank)
    halo = torch.unique(sources[remote])
    halo = halo[torch.argsort(owner[halo], stable=True)]
    place[halo] = torch.arange(halo.numel())
    # A row goes to a part once, however many edges lead there: pairs of (part, node), in the order in which that part keeps its halo.
    out = (owner[sources] == rank) & (owner[rows] != rank)
    pairs = torch.unique(owner[rows[out]] * graph.num_nodes + sources[out])
    to, send = pairs // graph.num_nodes, place[pairs % graph.num_nodes]
    edges = [torch.stack([place[sources[kind]], place[rows[kind]]]) for kind in (local, remote)]
    plan = Plan(
        rank,
        counts,
        inner,
        halo,
        send,
        torch.bincount(to, minlength=len(counts)).tolist(),
        torch.bincount(owner[halo], minlength=len(counts)).tolist(),
        method,
    )
    size = inner.numel()
    return PartitionedGraph(
        Graph.from_edge_index(edges[0], size), Graph.from_edge_index(edges[1], (halo.numel(), size)), plan
    )


def fingerprint(graph: Graph) -> str:
    """Of the edges: parts of one graph do not fit another."""
    digest = hashlib.sha256(f"{graph.num_nodes} ".encode())
    for part in (graph.indptr, graph.indices):
        digest.update(part.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_part(path: Path, part: PartitionedGraph, whole: str) -> None:
    """Writes a part of the graph with fingerprint ``whole``: safetensors with a checksum, which appears complete or not at all."""
    plan = part.plan
    tensors = {
        "indptr": part.indptr, "indices": part.indices, "halo_indptr": part.halo.indptr, "halo_indices": part.halo.indices,
        "inner": plan.inner, "halo": plan.halo, "send": plan.send,
    }  # fmt: skip
    facts = {
        "version": VERSION, "graph": whole, "rank": plan.rank, "counts": plan.counts, "send_counts": plan.send_counts,
        "halo_counts": plan.halo_counts, "method": plan.method,
    }  # fmt: skip
    about = json.dumps(facts)
    data = save(tensors, {"qgnn-part": about, "sha256": _checksum(about, tensors)})
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _checksum(about: str, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def read_part(path: Path, rank: int, parts: int, whole: str) -> PartitionedGraph:
    """Reads part ``rank`` of ``parts`` of the graph with fingerprint ``whole``.

    Raises:
        ValueError: it is missing or damaged, or of another graph, process or number of processes.
    """
    again = f"delete the folder {path.parent}, and it is made anew"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"part {rank} of the graph is missing: {path} ({error.strerror}); {again}") from error
    try:
        tensors, header = load(data), json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        about, checksum = header["__metadata__"]["qgnn-part"], header["__metadata__"]["sha256"]
        if _checksum(about, tensors) != checksum:
            raise ValueError("its checksum differs")
        facts = json.loads(about)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"part {rank} of the graph is damaged: {path} ({error}); {again}") from error
    if facts["version"] != VERSION or facts["graph"] != whole:
        raise ValueError(f"{path} is a part of another graph, or of another version; {again}")
    if (facts["rank"], len(facts["counts"])) != (rank, parts):
        raise ValueError(
            f"{path} is part {facts['rank']} of {len(facts['counts'])}, and this is process {rank} of {parts}: start "
            f"{len(facts['counts'])} processes, or {again}"
        )
    plan = Plan(
        rank, facts["counts"], tensors["inner"], tensors["halo"], tensors["send"], facts["send_counts"], facts["halo_counts"], facts["method"]
    )  # fmt: skip
    return PartitionedGraph(
        Graph.from_csr(tensors["indptr"], tensors["indices"]),
        Graph.from_csr(tensors["halo_indptr"], tensors["halo_indices"], plan.halo.numel()),
        plan,
    )
