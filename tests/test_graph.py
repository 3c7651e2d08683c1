"""Graph: what it accepts, the CSR it builds, and how long it is remembered."""

from __future__ import annotations

import gc

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.utils import add_remaining_self_loops

from qgnn import Graph, ops
from qgnn import graph as graph_module

# 4 nodes, edges source -> destination: 2->1, 0->1, 3->3, 2->1 (again), 1->0; node 2 has no in-edge.
EDGES = torch.tensor([[2, 0, 3, 2, 1], [1, 1, 3, 1, 0]])


def triples(graph: Graph, values: torch.Tensor, fill: float) -> list[tuple[int, int, float]]:
    """The edges (source, destination, value) of a graph in a canonical order."""
    return sorted(
        zip(graph.indices.tolist(), graph.rows.tolist(), graph.edge_values(values, fill).tolist(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_worked_example(dtype):
    graph = Graph.from_edge_index(EDGES.to(dtype), 4)
    assert graph.indptr.tolist() == [0, 1, 4, 4, 5]
    assert graph.indices.tolist() == [
        1,
        2,
        0,
        2,
        3,
    ]  # within a row in the caller's order; duplicates and the loop are kept
    assert graph.perm.tolist() == [4, 0, 1, 3, 2]
    assert graph.rows.tolist() == [0, 1, 1, 1, 3]
    assert graph.in_degree.tolist() == [1, 3, 0, 1]
    assert (graph.num_nodes, graph.num_sources, graph.num_edges, graph.given_edges, graph.max_degree) == (4, 4, 5, 5, 3)
    assert graph.indptr.dtype == graph.indices.dtype == torch.int32
    assert graph.perm.dtype == torch.int64
    assert graph.device == torch.device("cpu")
    assert repr(graph) == "Graph(num_nodes=4, num_edges=5, device='cpu')"


def test_perm_puts_the_callers_values_in_csr_order():
    torch.manual_seed(0)
    edges = torch.randint(0, 30, (2, 200))
    graph = Graph.from_edge_index(edges, 30)
    assert torch.equal(edges[0][graph.perm], graph.indices.long())
    assert torch.equal(edges[1][graph.perm], graph.rows.long())
    assert torch.equal(graph.edge_values(torch.arange(200.0)), graph.perm.float())


def test_number_of_nodes_by_default_is_the_largest_index_plus_one():
    assert Graph.from_edge_index(EDGES).num_nodes == 4
    assert Graph.from_edge_index(EDGES, 9).in_degree.tolist() == [1, 3, 0, 1, 0, 0, 0, 0, 0]


def test_from_data():
    graph = Graph.from_data(Data(x=torch.zeros(6, 2), edge_index=EDGES))
    assert graph.num_nodes == 6
    assert graph.indices.tolist() == [1, 2, 0, 2, 3]
    with pytest.raises(ValueError, match=r"no edge_index; Graph\.from_csr"):
        Graph.from_data(Data(x=torch.zeros(6, 2)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_from_csr(dtype):
    graph = Graph.from_csr(torch.tensor([0, 1, 4, 4, 5], dtype=dtype), torch.tensor([1, 2, 0, 2, 3], dtype=dtype))
    assert graph.perm.tolist() == [0, 1, 2, 3, 4]
    assert graph.rows.tolist() == [0, 1, 1, 1, 3]
    assert graph.indptr.dtype == graph.indices.dtype == torch.int32


def test_bipartite():
    graph = Graph.from_edge_index(torch.tensor([[6, 0, 3], [1, 0, 1]]), (7, 2))
    assert (graph.num_sources, graph.num_nodes) == (7, 2)
    assert graph.indptr.tolist() == [0, 1, 3]
    indptr, indices, edges, _ = graph.transposed
    assert indptr.tolist() == [0, 1, 1, 1, 2, 2, 2, 3]
    assert (indices.tolist(), edges.tolist()) == ([0, 1, 1], [0, 2, 1])
    with pytest.raises(ValueError, match=r"bipartite graph has no self loops; pass add_self_loops=False"):
        graph.add_self_loops()
    assert Graph.from_csr(torch.tensor([0, 1]), torch.tensor([4]), num_sources=5).num_sources == 5


@pytest.mark.parametrize(
    ("edges", "nodes", "error", "message"),
    [
        ([[0], [1]], None, TypeError, "edge_index must be a torch.Tensor, got list"),
        (
            torch.zeros(2, 3),
            None,
            TypeError,
            r"edge_index must be int32 or int64, got torch.float32; convert it with .long\(\)",
        ),
        (torch.zeros(2, 3, dtype=torch.int16), None, TypeError, "must be int32 or int64, got torch.int16"),
        (
            torch.zeros(6, dtype=torch.long),
            None,
            ValueError,
            r"edge_index must have 2 dimension\(s\), got shape \(6,\)",
        ),
        (
            torch.zeros(3, 2, dtype=torch.long),
            None,
            ValueError,
            r"must have shape \[2, E\] \(sources, destinations\), got \(3, 2\)",
        ),
        (
            torch.tensor([[0, 4], [1, 1]]),
            4,
            ValueError,
            "source 4 of edge 1 is outside 0..3; pass num_nodes or mend the edge",
        ),
        (torch.tensor([[0, 1], [1, 9]]), 4, ValueError, "destination 9 of edge 1 is outside 0..3"),
        (torch.tensor([[0, -1], [1, 1]]), None, ValueError, "source -1 of edge 1 is outside 0..1"),
        (torch.tensor([[0, 3], [1, 1]]), (3, 2), ValueError, "source 3 of edge 1 is outside 0..2"),
        (torch.tensor([[0, 1], [1, 2]]), (3, 2), ValueError, "destination 2 of edge 1 is outside 0..1"),
        (torch.tensor([[0], [1]]), 2**31, ValueError, r"fewer than 2\^31 nodes, got 2147483648"),
    ],
)
def test_edge_index_errors(edges, nodes, error, message):
    with pytest.raises(error, match=message):
        Graph.from_edge_index(edges, nodes)


@pytest.mark.parametrize(
    ("indptr", "indices", "sources", "error", "message"),
    [
        (
            torch.tensor([0.0, 1.0]),
            torch.tensor([0]),
            None,
            TypeError,
            "indptr must be int32 or int64, got torch.float32",
        ),
        (torch.tensor([0, 1]), torch.tensor([0.0]), None, TypeError, "indices must be int32 or int64"),
        (torch.tensor([[0, 1]]), torch.tensor([0]), None, ValueError, r"indptr must have 1 dimension\(s\)"),
        (
            torch.tensor([], dtype=torch.long),
            torch.tensor([], dtype=torch.long),
            None,
            ValueError,
            r"N \+ 1 entries, start at 0 and end at .* 0",
        ),
        (torch.tensor([1, 1]), torch.tensor([0]), None, ValueError, "start at 0 and end at the number of edges, 1"),
        (torch.tensor([0, 2]), torch.tensor([0]), None, ValueError, "start at 0 and end at the number of edges, 1"),
        (
            torch.tensor([0, 2, 1, 2]),
            torch.tensor([0, 0]),
            None,
            ValueError,
            r"must not fall, but indptr\[2\] is below indptr\[1\]",
        ),
        (
            torch.tensor([0, 1, 2]),
            torch.tensor([0, 2]),
            None,
            ValueError,
            r"indices\[1\] = 2 is outside 0..1; pass num_sources",
        ),
        (torch.tensor([0, 1, 2]), torch.tensor([0, 2]), 2, ValueError, r"indices\[1\] = 2 is outside 0..1"),
        (
            torch.tensor([0, 1]),
            torch.tensor([0], device="meta"),
            None,
            ValueError,
            "indptr is on cpu and indices on meta; move one",
        ),
    ],
)
def test_csr_errors(indptr, indices, sources, error, message):
    with pytest.raises(error, match=message):
        Graph.from_csr(indptr, indices, sources)


@pytest.mark.parametrize("seed", range(3))
def test_self_loops_are_pygs(seed):
    torch.manual_seed(seed)
    edges, values = torch.randint(0, 8, (2, 60)), torch.rand(60)  # about 8 loops, some of them twice
    graph = Graph.from_edge_index(edges, 8).add_self_loops()
    expected, expected_values = add_remaining_self_loops(edges, values, 2.0, 8)
    assert triples(graph, values, 2.0) == sorted(zip(*expected.tolist(), expected_values.tolist(), strict=True))
    assert torch.equal(graph.in_degree, torch.bincount(expected[1], minlength=8))


def test_self_loops_stand_last_and_only_once():
    graph = Graph.from_edge_index(EDGES, 4)
    loops = graph.with_self_loops
    assert loops is graph.with_self_loops
    assert loops.indices.tolist() == [1, 0, 2, 0, 2, 1, 2, 3]
    assert loops.perm.tolist() == [
        4,
        5,
        0,
        1,
        3,
        6,
        7,
        2,
    ]  # the loop 3->3 was there; 5, 6 and 7 were added to nodes 0, 1 and 2
    assert (loops.num_edges, loops.given_edges) == (8, 5)
    again = loops.add_self_loops()
    assert torch.equal(again.perm, loops.perm)
    assert torch.equal(again.indices, loops.indices)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (torch.ones(5, dtype=torch.long), TypeError, "edge_weight must be a floating-point tensor, got torch.int64"),
        ([1.0] * 5, TypeError, "edge_weight must be a floating-point tensor, got list"),
        (torch.ones(6), ValueError, r"edge_weight must be \[5\], one for each edge, got \(6,\)"),
        (torch.ones(5, 1), ValueError, r"edge_weight must be \[5\], one for each edge, got \(5, 1\)"),
        (
            torch.ones(5, device="meta"),
            ValueError,
            r"edge_weight is on meta and the graph on cpu; move one with .to\(\)",
        ),
    ],
)
def test_edge_value_errors(values, error, message):
    with pytest.raises(error, match=message):
        Graph.from_edge_index(EDGES, 4).with_self_loops.edge_values(values)


def test_transposed():
    indptr, indices, edges, schedule = Graph.from_edge_index(EDGES, 4).transposed
    assert indptr.tolist() == [0, 1, 2, 4, 5]
    assert indices.tolist() == [1, 0, 1, 1, 3]
    assert edges.tolist() == [2, 0, 1, 3, 4]
    assert sorted(schedule.order.tolist()) == [0, 1, 2, 3]
    assert indptr.dtype == indices.dtype == edges.dtype == torch.int32


def test_transpose_of_the_transpose_is_the_graph():
    torch.manual_seed(1)
    graph = Graph.from_edge_index(torch.randint(0, 20, (2, 100)), 20)
    indptr, indices, edges, _ = graph.transposed
    back = Graph.from_csr(indptr, indices).transposed
    assert torch.equal(back[0], graph.indptr)
    assert torch.equal(
        torch.stack([graph.indices, graph.rows])[:, edges.long()],
        torch.stack([Graph.from_csr(indptr, indices).rows, indices]),
    )


def test_schedule_and_transpose_are_built_once(monkeypatch):
    built = []
    build = graph_module.build_schedule
    monkeypatch.setattr(graph_module, "build_schedule", lambda *arguments: built.append(1) or build(*arguments))
    graph = Graph.from_edge_index(EDGES, 4)
    assert not built  # lazily
    for _ in range(2):
        assert sorted(graph.schedule.order.tolist()) == [0, 1, 2, 3]
        assert graph.transposed is graph.transposed
    assert len(built) == 2  # one for the rows, one for the columns


def test_sorting_can_be_turned_off():
    hub = torch.stack([torch.zeros(100, dtype=torch.long), torch.arange(100) % 3])
    assert Graph.from_edge_index(hub, 4).schedule.order.tolist() == [0, 1, 2, 3]  # degrees 34, 33, 33, 0
    assert (
        Graph.from_edge_index(hub.flip(0), 100).schedule.order.tolist()[-1] != 0
    )  # node 0 has 100 edges, a segment of its own
    unsorted = Graph.from_edge_index(hub.flip(0), 100, sort=False)
    assert unsorted.schedule.order.tolist() == list(range(100))
    assert not unsorted.add_self_loops().sort
    assert not unsorted.to("meta").sort
    assert not Graph.from_csr(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), sort=False).sort
    assert not Graph.from_data(Data(x=torch.zeros(100, 1), edge_index=hub), sort=False).sort


def test_to():
    graph = Graph.from_edge_index(EDGES, 4).with_self_loops
    assert graph.to("cpu") is graph
    moved = graph.to("meta")
    assert moved.device.type == moved.indices.device.type == moved.perm.device.type == "meta"
    assert (moved.num_edges, moved.num_sources, moved.given_edges) == (8, 4, 5)


@pytest.mark.parametrize("nodes", [0, 1, 3])
def test_no_edges(nodes):
    none = torch.empty(2, 0, dtype=torch.long)
    for graph in (
        Graph.from_edge_index(none, nodes),
        Graph.from_csr(torch.zeros(nodes + 1, dtype=torch.long), none[0]),
    ):
        assert (graph.num_nodes, graph.num_edges, graph.max_degree) == (nodes, 0, 0)
        assert graph.inv_sqrt_degree.tolist() == [0.0] * nodes
        assert graph.transposed[0].tolist() == [0] * (nodes + 1)
        assert graph.schedule.segments.shape == (0, 5)
        assert graph.with_self_loops.num_edges == nodes
        assert graph.with_self_loops.indices.tolist() == list(range(nodes))
    assert Graph.from_edge_index(none).num_nodes == 0


def test_inv_sqrt_degree():
    factor = Graph.from_edge_index(EDGES, 4).inv_sqrt_degree
    assert torch.allclose(factor, torch.tensor([1.0, 3**-0.5, 0.0, 1.0]))
    assert factor.dtype == torch.float32


def test_graph_of_an_edge_index_is_remembered():
    edges = EDGES.clone()
    graph = Graph.of(edges, 4)
    assert Graph.of(edges, 4) is graph
    assert Graph.of(graph, 4) is graph
    with pytest.raises(ValueError, match=r"the graph has 4 nodes and x 5 rows; build it with num_nodes of x"):
        Graph.of(graph, 5)
    assert Graph.of(edges, 5).num_nodes == 5
    assert Graph.of(edges.clone(), 4) is not graph


def test_a_change_in_place_is_seen():
    edges = EDGES.clone()
    before = Graph.of(edges, 4)
    edges[0, 0] = 3
    after = Graph.of(edges, 4)
    assert after is not before
    assert after.indices.tolist() == [1, 3, 0, 2, 3]
    assert Graph.of(edges, 4) is after
    edges.resize_(2, 4)
    assert Graph.of(edges, 4).num_edges == 4
    edges.set_(torch.tensor([[0], [1]]))
    assert Graph.of(edges, 4).num_edges == 1


def test_a_remembered_graph_is_released_with_its_tensor():
    gc.collect()
    before = len(graph_module._graphs)
    edges = EDGES.clone()
    Graph.of(edges, 4)
    edges[0, 0] = 3
    Graph.of(edges, 4)
    assert len(graph_module._graphs) == before + 1
    del edges
    gc.collect()
    assert len(graph_module._graphs) == before


def test_inference_tensors_are_not_remembered():
    with torch.inference_mode():
        edges = EDGES.clone()
        assert Graph.of(edges, 4).indices.tolist() == [1, 2, 0, 2, 3]
        edges[0, 0] = 3  # has no version counter that would show it
        assert Graph.of(edges, 4).indices.tolist() == [1, 3, 0, 2, 3]


def test_graph_of_something_else():
    with pytest.raises(TypeError, match=r"edge_index must be a dense torch.Tensor \[2, E\] or a qgnn.Graph, got list"):
        Graph.of([[0], [1]], 2)
    with pytest.raises(TypeError, match=r"got a torch.sparse_coo tensor"):
        Graph.of(torch.eye(3).to_sparse(), 3)


def test_what_a_graph_keeps_from_inference_mode_is_of_use_in_training():
    edge_index, x = torch.randint(20, (2, 90)), torch.randn(20, 3, requires_grad=True)
    g = Graph.from_edge_index(edge_index, 20)
    with torch.inference_mode():
        first = ops.aggregate(g, x)
        assert not any(part.is_inference() for part in (*g.schedule, g.rows, *g.transposed[:3], g.inv_degree))
    ops.aggregate(g, x).sum().backward()
    torch.testing.assert_close(first, torch.zeros(20, 3).index_add(0, edge_index[1], x.detach()[edge_index[0]]))
    torch.testing.assert_close(x.grad, torch.bincount(edge_index[0], minlength=20).float()[:, None].expand(20, 3))
