"""Sampled neighbourhoods: what they hold, how they are drawn, and PyG's loaders on top."""

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import chi2
from torch_geometric.data import Data
from torch_geometric.loader import LinkLoader, NodeLoader
from torch_geometric.sampler import NegativeSampling, NodeSamplerInput, SamplerOutput

from qgnn import Graph, ops
from qgnn.sampler import NeighborSampler, block

NODES, EDGES, HUB = 300, 2000, 7


def data() -> Data:
    """A random multigraph: node 7 has 500 edges more than the others, the last ten nodes have none."""
    draw = torch.Generator().manual_seed(0)
    edges = torch.randint(0, NODES - 10, (2, EDGES), generator=draw)
    to_hub = torch.stack([torch.randint(0, NODES - 10, (500,), generator=draw), torch.full((500,), HUB)])
    edge_index = torch.cat([edges, to_hub], 1)[:, torch.randperm(EDGES + 500, generator=draw)]
    return Data(
        x=torch.rand(NODES, 3, generator=draw), edge_index=edge_index, y=torch.arange(NODES) % 4,
        edge_attr=torch.arange(EDGES + 500).float(),
    )  # fmt: skip


def sample(sampler: NeighborSampler, seeds: torch.Tensor) -> SamplerOutput:
    return sampler.sample_from_nodes(NodeSamplerInput(None, seeds))


def same(a: SamplerOutput, b: SamplerOutput) -> bool:
    return a.edge.tolist() == b.edge.tolist() and a.node.tolist() == b.node.tolist()


@pytest.mark.parametrize("fan_outs", [[5], [25, 10], [3, 0, 2], [-1, 4], [4, -1]])
def test_hops_hold_existing_edges_as_many_as_asked_for_and_none_twice(fan_outs: list[int]) -> None:
    whole = data()
    degree = Graph.from_data(whole).in_degree
    seeds = torch.tensor([HUB, 0, 299, 12, 50])
    out = sample(NeighborSampler(whole, fan_outs), seeds)
    assert out.node[: seeds.numel()].equal(seeds), "seeds first"
    assert out.node.unique().numel() == out.node.numel(), "every node once"
    assert out.edge.unique().numel() == out.edge.numel(), "without replacement"
    assert torch.stack([out.node[out.row], out.node[out.col]]).equal(whole.edge_index[:, out.edge]), "edges that exist"
    assert bool((out.col[1:] >= out.col[:-1]).all()), "sorted by target"
    expected = torch.zeros(out.node.numel(), dtype=torch.long)
    ends = list(itertools.accumulate(out.num_sampled_nodes))
    for fan_out, first, last in zip(fan_outs, [0, *ends], ends, strict=False):
        hop = degree[out.node[first:last]]
        expected[first:last] = hop if fan_out < 0 else hop.clamp_max(fan_out)
    assert torch.bincount(out.col, minlength=out.node.numel()).equal(expected), "min(degree, fan-out) for each node"
    per_hop = [int(expected[first:last].sum()) for first, last in zip([0, *ends], ends, strict=False)]
    assert out.num_sampled_edges == per_hop[:-1], "edges of the last hop's nodes are not drawn"
    assert per_hop[-1] == 0
    # a node that is not a seed is there because an edge of an earlier place led to it
    first_edge = torch.full((out.node.numel(),), out.row.numel()).scatter_reduce(
        0, out.row, torch.arange(out.row.numel()), "amin"
    )
    assert bool((first_edge[seeds.numel() :].diff() > 0).all()), "in the order they were met"


def test_all_neighbours_of_all_nodes_are_the_graph() -> None:
    whole = data()
    out = sample(NeighborSampler(Graph.from_data(whole), [-1]), torch.arange(NODES))
    assert out.edge.sort().values.equal(torch.arange(whole.num_edges))
    assert out.node.equal(torch.arange(NODES))


def test_no_seeds_and_isolated_seeds_have_no_edges() -> None:
    sampler = NeighborSampler(data(), [4, 4])
    assert sample(sampler, torch.arange(0)).node.numel() == 0
    out = sample(sampler, torch.tensor([298, 295]))
    assert out.node.tolist() == [298, 295]
    assert out.row.numel() == 0
    assert out.num_sampled_nodes == [2, 0, 0]


def test_repeated_seeds_keep_a_row_each() -> None:
    out = sample(NeighborSampler(data(), [3]), torch.tensor([HUB, 4, HUB]))
    assert out.node[:3].tolist() == [HUB, 4, HUB]
    draws = [out.edge[out.col == place].tolist() for place in (0, 2)]
    assert len(draws[0]) == len(draws[1]) == 3
    assert draws[0] != draws[1]


def chi_square(counts: torch.Tensor, trials: int, taken: int) -> float:
    """Statistic of how often each of n things is among the ``taken`` = k of a trial; chi-square with n - 1 degrees of freedom when all subsets are
    equally likely. A count has the mean T k/n and the variance T k/n (1 - k/n), two counts the covariance of -1/(n - 1) of that: hence the usual
    sum is divided by (1 - k/n) n/(n - 1)."""
    n = counts.numel()
    mean = trials * taken / n
    return float(((counts - mean) ** 2 / mean).sum()) / ((n - taken) / (n - 1))


@pytest.mark.parametrize(("degree", "fan_out"), [(20, 5), (11, 10), (3000, 7)])
def test_every_neighbour_is_equally_likely(degree: int, fan_out: int) -> None:
    star = torch.stack([torch.arange(1, degree + 1), torch.zeros(degree, dtype=torch.long)])
    trials = 20 * degree
    out = sample(NeighborSampler(Data(edge_index=star, num_nodes=degree + 1), [fan_out]), torch.zeros(trials).long())
    value = chi_square(torch.bincount(out.edge, minlength=degree).double(), trials, fan_out)
    # the seed is fixed; a sampler without fault falls outside for one seed in 5,000
    assert chi2.ppf(1e-4, degree - 1) < value < chi2.isf(1e-4, degree - 1)


def test_every_subset_is_equally_likely_call_for_call() -> None:
    star = torch.tensor([[1, 2, 3, 4, 5], [0] * 5])
    sampler = NeighborSampler(Data(edge_index=star, num_nodes=6), [2])
    subsets = {pair: i for i, pair in enumerate(itertools.combinations(range(5), 2))}
    draws = [subsets[tuple(sorted(sample(sampler, torch.tensor([0])).edge.tolist()))] for _ in range(2000)]
    value = chi_square(torch.bincount(torch.tensor(draws), minlength=10).double(), 2000, 1)
    assert chi2.ppf(1e-4, 9) < value < chi2.isf(1e-4, 9)


def test_same_seed_same_samples_and_calls_differ() -> None:
    whole, seeds = data(), torch.tensor([HUB, 3, 4])
    first, second, other = (NeighborSampler(whole, [5, 5], seed=s) for s in (1, 1, 2))
    a, b = sample(first, seeds), sample(first, seeds)
    assert not same(a, b)
    assert same(a, sample(second, seeds))
    assert not same(a, sample(other, seeds))
    resumed = NeighborSampler(whole, [5, 5], seed=1)
    resumed.calls = 1
    assert same(b, sample(resumed, seeds)), "goes on where the first one stood"


def test_node_loader_gives_features_labels_and_ids() -> None:
    whole = data()
    seeds = torch.randperm(NODES, generator=torch.Generator().manual_seed(1))[:70]
    loader = NodeLoader(whole, node_sampler=NeighborSampler(whole, [4, 3]), input_nodes=seeds, batch_size=32)
    batches = list(loader)
    assert [b.batch_size for b in batches] == [32, 32, 6]
    assert torch.cat([b.input_id for b in batches]).equal(torch.arange(70)), "places in input_nodes"
    assert torch.cat([b.n_id[: b.batch_size] for b in batches]).equal(seeds)
    for batch in batches:
        assert batch.x.equal(whole.x[batch.n_id])
        assert batch.y.equal(whole.y[batch.n_id])
        assert batch.edge_attr.equal(whole.edge_attr[batch.e_id])
        assert batch.n_id[batch.edge_index].equal(whole.edge_index[:, batch.e_id])
        assert sum(batch.num_sampled_nodes) == batch.num_nodes


def test_block_is_the_graph_of_a_batch_in_its_order() -> None:
    whole = data()
    loader = NodeLoader(whole, node_sampler=NeighborSampler(whole, [4, 3]), input_nodes=torch.arange(40), batch_size=40)
    batch = next(iter(loader))
    graph, sorted_anew = block(batch), Graph.from_data(batch)
    assert graph.indptr.equal(sorted_anew.indptr)
    assert graph.indices.equal(sorted_anew.indices)
    assert graph.edge_values(batch.edge_attr).equal(batch.edge_attr)
    expected = torch.zeros(batch.num_nodes, 3).index_add_(0, batch.edge_index[1], batch.x[batch.edge_index[0]])
    # sums of at most 4 values in [0, 1): 3 roundings of at most 2^-23 each, in either order
    torch.testing.assert_close(ops.aggregate(graph, batch.x), expected, rtol=0, atol=8 * 2**-23)
    with pytest.raises(ValueError, match=r"not sorted by target; use Graph.from_data"):
        block(whole)


# Python 3.12 warns of every fork while torch's threads are there, torch of more workers than cores
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_workers_draw_for_themselves_and_anew_each_epoch() -> None:
    whole = data()

    def epochs() -> list[list[Data]]:
        seeds = torch.full((8,), HUB)
        sampler = NeighborSampler(whole, [20])
        loader = NodeLoader(whole, node_sampler=sampler, input_nodes=seeds, batch_size=2, num_workers=2)
        torch.manual_seed(3)
        return [list(loader) for _ in range(2)]

    first, again = epochs(), epochs()
    draws = [[batch.e_id.tolist() for batch in epoch] for epoch in first]
    assert draws == [[batch.e_id.tolist() for batch in epoch] for epoch in again], "follows torch's seed"
    flat = [tuple(batch) for epoch in draws for batch in epoch]
    assert len(set(flat)) == len(flat) == 8, "no two workers, batches or epochs alike"
    for batch in itertools.chain(*first):
        assert batch.n_id[batch.edge_index].equal(whole.edge_index[:, batch.e_id])
        assert batch.x.equal(whole.x[batch.n_id])


@pytest.mark.parametrize("negatives", [None, NegativeSampling("binary", 2.0), NegativeSampling("triplet", 1)])
def test_link_loader_finds_the_ends_of_its_links(negatives: NegativeSampling | None) -> None:
    whole = data()
    links = whole.edge_index[:, :30]
    loader = LinkLoader(
        whole,
        link_sampler=NeighborSampler(whole, [4, 3]),
        edge_label_index=links,
        neg_sampling=negatives,
        batch_size=16,
    )
    batches = list(loader)
    if negatives is None or negatives.is_binary():
        found = [b.n_id[b.edge_label_index[:, : b.input_id.numel()]] for b in batches]
    else:
        found = [b.n_id[torch.stack([b.src_index, b.dst_pos_index])] for b in batches]
    assert torch.cat(found, 1).equal(links)
    if negatives is not None and negatives.is_binary():
        assert [b.edge_label.sum() for b in batches] == [16, 14]
        assert [b.edge_label.numel() for b in batches] == [48, 42]
    assert all(b.n_id[b.edge_index].equal(whole.edge_index[:, b.e_id]) for b in batches)


def test_wrong_arguments_say_what_to_do() -> None:
    whole = data()
    with pytest.raises(ValueError, match="one for each hop, or -1 for all"):
        NeighborSampler(whole, [])
    with pytest.raises(ValueError, match="one for each hop, or -1 for all"):
        NeighborSampler(whole, [5, -2])
    with pytest.raises(ValueError, match="seed must not be negative"):
        NeighborSampler(whole, [5], seed=-1)
    with pytest.raises(ValueError, match="pass the graph without them"):
        NeighborSampler(Graph.from_data(whole).with_self_loops, [5])
    with pytest.raises(ValueError, match="they must be the same nodes"):
        NeighborSampler(Graph.from_edge_index(whole.edge_index, (NODES, NODES + 1)), [5])
    sampler = NeighborSampler(whole, [5])
    with pytest.raises(ValueError, match=r"seeds must be nodes 0\.\.299, got 0\.\.300"):
        sample(sampler, torch.tensor([0, 300]))
    with pytest.raises(ValueError, match="use PyG's NeighborLoader"):
        sampler.sample_from_nodes(NodeSamplerInput(None, torch.tensor([0]), input_type="paper"))
    with pytest.raises(ValueError, match="does not sample by time"):
        sampler.sample_from_nodes(NodeSamplerInput(None, torch.tensor([0]), time=torch.tensor([0])))
    out = sample(sampler, torch.tensor([HUB]))
    assert out.node.numel() > 1, "and goes on"
    assert np.all(sampler._tables[0] == -1)
