"""Parts of a graph, their files, and rows on the wire; without processes."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn import data
from qgnn.distributed import partition
from qgnn.distributed.partition import PartitionedGraph, assign, fingerprint, part_of, read_part, write_part
from qgnn.distributed.wire import Traffic, decode, encode, message_bytes
from qgnn.graph import Graph
from qgnn.kernels.aggregate import aggregate
from qgnn.kernels.random import NEAREST


def random_graph(nodes, edges, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Graph.from_edge_index(torch.randint(nodes, (2, edges), generator=generator), nodes)


def total(graph, x):
    return aggregate(graph.indptr, graph.indices, list(graph.schedule), x, None, "sum")[0]


def parts_of(graph, owner):
    return [part_of(graph, owner, rank, "test") for rank in range(int(owner.max()) + 1)]


def sent(parts, x, to):
    """The halo of a part, put together from what the others' plans send."""
    rows = []
    for part in parts:
        first = sum(part.plan.send_counts[:to])
        places = part.plan.send[first : first + part.plan.send_counts[to]]
        rows.append(x[part.plan.inner][places])
    return torch.cat(rows)


@given(st.integers(2, 30), st.integers(0, 120), st.integers(2, 5), st.integers(0, 2**20))
@settings(max_examples=40, deadline=None)
def test_parts_sum_to_the_whole(nodes, edges, count, seed):
    """Nodes are shared, edges belong to the part of their destination, and what is sent is what the others' halos want."""
    count = min(count, nodes)
    graph = random_graph(nodes, edges, seed)
    owner = torch.arange(nodes) % count
    owner = owner[torch.randperm(nodes, generator=torch.Generator().manual_seed(seed))]
    x = torch.randint(-100, 100, (nodes, 3), generator=torch.Generator().manual_seed(seed)).float()
    loops = graph.with_self_loops
    parts = parts_of(graph, owner)
    assert torch.cat([part.plan.inner for part in parts]).sort().values.equal(torch.arange(nodes))
    assert sum(part.num_edges + part.halo.num_edges for part in parts) == graph.num_edges
    for rank, part in enumerate(parts):
        inner, halo = part.plan.inner, part.plan.halo
        assert part.plan.nodes == nodes and part.plan.halo_counts[rank] == part.plan.send_counts[rank] == 0
        assert sent(parts, x, rank).equal(x[halo])
        # whole numbers below 2^24: float sums are exact in any order
        assert (total(part, x[inner]) + total(part.halo, x[halo])).equal(total(graph, x)[inner])
        assert total(part.joint, torch.cat([x[inner], x[halo]])).equal(total(graph, x)[inner])
        assert part.in_degree.equal(graph.in_degree[inner])
        for name in ("inv_sqrt_degree", "inv_degree"):
            assert getattr(part, name).equal(getattr(graph, name)[inner])
            assert getattr(part.with_self_loops, name).equal(getattr(loops, name)[inner])


@pytest.mark.parametrize("installed", [True, False])
def test_assignment(installed, monkeypatch):
    """With and without METIS: every part has its share of the nodes, few edges are cut, and two runs agree."""
    found = importlib.util.find_spec("pymetis") if installed else None
    monkeypatch.setattr(partition.importlib.util, "find_spec", lambda name: found)
    graph = Graph.from_data(data.load("digits").data)
    owner, method = assign(graph, 4)
    assert method == ("metis" if found else "bandwidth")
    assert assign(graph, 4)[0].equal(owner)
    share = torch.bincount(owner, minlength=4) / (graph.num_nodes / 4)
    assert share.min() > 0.9 and share.max() < 1.1  # METIS promises 1.03
    cut = (owner[graph.indices.long()] != owner[graph.rows.long()]).double().mean()
    assert cut < 0.35  # at random 3 of 4 edges are cut


def test_too_many_parts():
    with pytest.raises(ValueError, match="3 nodes cannot be parted among 4 processes; start fewer"):
        assign(random_graph(3, 5), 4)


@pytest.fixture
def written(tmp_path):
    graph = random_graph(40, 160)
    parts = parts_of(graph, torch.arange(40) % 2)
    for rank, part in enumerate(parts):
        write_part(tmp_path / f"part-{rank}.safetensors", part, fingerprint(graph))
    return graph, parts, tmp_path


def test_part_is_read_as_written(written):
    graph, parts, folder = written
    part = read_part(folder / "part-1.safetensors", 1, 2, fingerprint(graph))
    assert isinstance(part, PartitionedGraph)
    for name in ("indptr", "indices"):
        assert getattr(part, name).equal(getattr(parts[1], name))
        assert getattr(part.halo, name).equal(getattr(parts[1].halo, name))
    for name in ("inner", "halo", "send"):
        assert getattr(part.plan, name).equal(getattr(parts[1].plan, name))
    assert part.plan.counts == [20, 20] and part.plan.method == "test"


def test_missing_and_foreign_parts(written):
    graph, _, folder = written
    whole = fingerprint(graph)
    with pytest.raises(ValueError, match=r"part 2 of the graph is missing: .*part-2.*delete the folder"):
        read_part(folder / "part-2.safetensors", 2, 3, whole)
    with pytest.raises(ValueError, match=r"is part 1 of 2, and this is process 1 of 4: start 2 processes, or delete"):
        read_part(folder / "part-1.safetensors", 1, 4, whole)
    with pytest.raises(ValueError, match=r"is part 1 of 2, and this is process 0 of 2"):
        read_part(folder / "part-1.safetensors", 0, 2, whole)
    with pytest.raises(ValueError, match=r"part of another graph"):
        read_part(folder / "part-1.safetensors", 1, 2, fingerprint(random_graph(40, 160, 1)))


@pytest.mark.parametrize("place", [0.0, 0.2, 0.5, 0.99, "end"])
def test_damaged_parts(written, place):
    """A byte that is changed anywhere, or a file that was cut off."""
    graph, _, folder = written
    path = folder / "part-0.safetensors"
    content = bytearray(path.read_bytes())
    if place == "end":
        content = content[:-9]
    else:
        content[int(place * len(content))] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"part 0 of the graph is (damaged|missing): .*delete the folder"):
        read_part(path, 0, 2, fingerprint(graph))


@pytest.mark.parametrize(("width", "bits"), [("int8", 8), ("int4", 4)])
def test_rows_on_the_wire(width, bits):
    """A value is off by less than a step to either side, by half of one to the nearest, and not at all on average."""
    rows = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    steps = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    size = sum(message_bytes(50, 7, width))
    near = encode(rows, width, None, NEAREST)
    assert near.numel() == size
    # the quotient, and the product of code and step, round: an ulp of 2^-23 each
    assert ((decode(near, 50, 7, width, None) - rows).abs() <= steps * 0.5 * (1 + 2**-14)).all()
    draws = [decode(encode(rows, width, None, seed), 50, 7, width, None) for seed in range(400)]
    error = torch.stack(draws) - rows
    assert (error.abs() <= steps * (1 + 2**-14)).all()
    # A draw's error has a deviation of at most half a step; the mean of 400 of 2.5 %, and 350 values stay within 5 of these.
    assert (error.mean(0).abs() <= 5 * 0.025 * steps + 1e-6).all()
    assert all(draw[3].eq(0).all() for draw in draws)
    assert encode(rows, width, None, 5).equal(encode(rows, width, None, 5))
    assert not encode(rows, width, None, 5).equal(encode(rows, width, None, 6))


def test_floats_and_known_codes_travel_exactly():
    rows = torch.randn(9, 5)
    assert decode(encode(rows, "fp32", None, NEAREST), 9, 5, "fp32", None).equal(rows)
    step = torch.rand(5) + 0.1
    for width, top in (("int8", 127), ("int4", 7)):
        values = torch.randint(-top, top + 1, (9, 5)) * step
        data = encode(values, width, step, NEAREST)
        assert data.numel() == message_bytes(9, 5, width, known=True)[0] and message_bytes(9, 5, width, True)[1] == 0
        assert decode(data, 9, 5, width, step).equal(values)


def test_bytes_on_the_wire():
    """Codes of 8 and 4 bits are 1/4 and 1/8 of the floats; steps are counted apart."""
    assert message_bytes(300, 32, "fp32") == (38400, 0)
    assert message_bytes(300, 32, "int8") == (9600, 1200)
    assert message_bytes(300, 32, "int4") == (4800, 1200)
    assert message_bytes(0, 32, "int4") == (0, 0)
    traffic = Traffic()
    traffic.count("forward", 10, 2)
    traffic.count("backward", 5, 1)
    traffic.count("forward", 10, 2)
    assert traffic.vector().tolist() == [20, 4, 5, 1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_arrives(bad):
    rows = torch.ones(2, 4)
    rows[1, 2] = bad
    out = decode(encode(rows, "int8", None, 1), 2, 4, "int8", None)
    assert out[0].equal(rows[0]) and not out[1].isfinite().any()


def test_empty_rows():
    for width in ("fp32", "int8", "int4"):
        assert decode(encode(torch.zeros(0, 3), width, None, 1), 0, 3, width, None).shape == (0, 3)
