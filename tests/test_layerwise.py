"""Inference layer by layer, and node-level A2Q on sampled batches."""

import copy
from dataclasses import replace

import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader

from qgnn import QTensor, QuantizedFeatureStore, models, quant
from qgnn.layerwise import layerwise
from qgnn.objectives import Classification
from qgnn.recipes import RECIPES
from qgnn.sampler import NeighborSampler, block
from qgnn.tasks import SampledNodeTask

N, F = 120, 12
KINDS = {"gcn": models.GCN, "gat": models.GAT, "gin": models.GIN, "sage": models.GraphSAGE}


def data() -> Data:
    draw = torch.Generator().manual_seed(0)
    edges = torch.randint(0, N, (2, 700), generator=draw)
    return Data(x=torch.randn(N, F, generator=draw), edge_index=edges[:, edges[0] != edges[1]], num_nodes=N)


def made(kind: str, scheme: str, **settings: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind](F, 6, 4, num_layers=3, scheme=scheme, num_nodes=N, **settings).eval()
    with torch.no_grad():
        model(data().x, data().edge_index)  # steps start
    return model


def magnitudes(model: torch.nn.Module) -> torch.nn.Module:
    """The model with the magnitudes of its weights and without biases: of magnitudes it computes those of all terms of a sum, added up."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data * 0 if name.endswith("bias") else parameter.data.abs()
    return model


@torch.no_grad()
def rounding(kind: str, unit: float, **settings: object) -> float:
    """By how much two orders of the same additions may differ, ``unit`` being the last place. A sum has at most 48 products, or 20 neighbours
    and itself, and some factors: below 2^7 roundings in a layer and 2^9 in three, of each of the two. A softmax makes the error of its logits,
    which are below 2^3, one of GAT's coefficients, at most twice: 2^4. All relative to the terms' magnitudes. Codes are the same, as no value of
    this graph lies so near to a tie."""
    model, whole = magnitudes(made(kind, "fp32", **settings)), data()
    roundings = 2**10 * (2**4 if kind == "gat" else 1)
    return roundings * unit * float(model(whole.x.abs(), whole.edge_index).max())


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("scheme", ["fp32", "a2q", "a2q-nns", "dq-int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_chunks_give_the_outputs_of_the_whole_graph(kind, scheme):
    model, whole = made(kind, scheme, skip=kind != "gat"), data()
    with torch.no_grad():
        expected = model(whole.x, whole.edge_index)
    for chunk in (17, N, 1000):
        found = layerwise(model, whole, whole.x, chunk=chunk)
        assert torch.allclose(found, expected, rtol=0, atol=rounding(kind, 2.0**-53, skip=kind != "gat"))


@torch.no_grad()
def test_maps_between_layers_at_few_bits_are_off_by_what_their_steps_allow():
    model, whole = made("sage", "fp32"), data()
    first, second, third = model.convs
    _, *widest = magnitudes(model).convs
    exact, graph, errors = layerwise(model, whole, whole.x), whole.edge_index, []
    one = first(whole.x, graph).relu()
    two = second(one, graph).relu()
    assert torch.allclose(third(two, graph), exact, rtol=0, atol=rounding("sage", 2.0**-24))
    for bits in (8, 4, 2):
        # Half a step of each map, the second's after what the first's has changed in it; ReLU makes no difference larger.
        half = 0.5 / (2**bits - 1)
        off = widest[0]((half * one.amax(1, keepdim=True)).expand_as(one), graph)
        off = off + half * (two + off).amax(1, keepdim=True)
        # 2^-13 of that for the store's own roundings
        bound = widest[1](off, graph) * (1 + 2.0**-13) + rounding("sage", 2.0**-24)
        error = (layerwise(model, whole, whole.x, bits=bits, chunk=50) - exact).abs()
        assert bool((error <= bound).all())
        errors.append(float(error.max()))
    assert 0 < errors[0] < errors[1] < errors[2]


def test_a_store_is_read_as_its_values():
    model, whole = made("gcn", "fp32"), data()
    store = QuantizedFeatureStore()
    store[None, "x", None] = whole.x
    assert layerwise(model, whole, store, chunk=31).equal(layerwise(model, whole, store[None, "x", None], chunk=31))


def test_what_does_not_fit_is_refused():
    model, whole = made("gcn", "fp32"), data()
    with pytest.raises(ValueError, match="120 nodes"):
        layerwise(model, whole, whole.x[:5])
    with pytest.raises(ValueError, match="chunk must be"):
        layerwise(model, whole, whole.x, chunk=0)
    with pytest.raises(ValueError, match=r"model\.eval"):
        layerwise(model.train(), whole, whole.x)


def sampled(neighbours: list[int], seeds: torch.Tensor) -> Data:
    whole = data()
    return next(iter(NodeLoader(whole, NeighborSampler(whole, neighbours), seeds, batch_size=seeds.numel())))


@torch.no_grad()
@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("kind", KINDS)
def test_a2q_takes_the_parameters_of_the_nodes_of_a_batch(kind):
    model, whole, seeds = made(kind, "a2q"), data(), torch.arange(0, N, 5)
    expected = model(whole.x, whole.edge_index)[seeds]
    # GCN's factors are of the degrees in the batch, in which the nodes of the last hop have no edges: one more hop.
    batch = sampled([-1] * (4 if kind == "gcn" else 3), seeds)
    found = model(batch.x, block(batch))[: seeds.numel()]
    assert torch.allclose(found, expected, rtol=0, atol=rounding(kind, 2.0**-53))


@pytest.mark.parametrize("kind", KINDS)
def test_a2q_learns_for_the_nodes_of_a_batch_only(kind):
    model, batch = made(kind, "a2q"), sampled([2, 2], torch.arange(5))
    model(batch.x, block(batch)).sum().backward()
    layer = next(part for part in model.modules() if isinstance(part, quant.a2q.A2QQuantizer))
    learned = layer.log_step.grad.nonzero().view(-1)
    assert learned.numel()
    assert set(learned.tolist()) <= set(batch.n_id.tolist())
    assert batch.n_id.numel() < N


def test_steps_of_all_nodes_start_from_the_whole_graph():
    model, batch = models.GCN(F, 6, 4, scheme="a2q", num_nodes=N), sampled([2, 2], torch.arange(5))
    with pytest.raises(ValueError, match="a pass over the whole graph"):
        model(batch.x, block(batch))


def test_a_task_with_features_in_few_bits_evaluates_what_it_trains_on_without_the_whole_matrix(monkeypatch):
    model, whole = made("sage", "fp32"), data()
    whole.y, whole.train_mask = torch.arange(N) % 4, torch.arange(N) < 50
    whole.val_mask = whole.test_mask = ~whole.train_mask
    recipe = replace(RECIPES["sage", "fp32", "citation"], layers=3, fanout=3, batch=20, feature_bits=2)
    task = SampledNodeTask(whole, Classification(), recipe)
    values = task.example().x
    assert not values.equal(whole.x)
    for batch in task.batches():
        assert batch.x.equal(values[batch.n_id])
    with torch.no_grad():
        expected = model(values, whole.edge_index)
    monkeypatch.setattr(QTensor, "dequantize", None)
    assert torch.allclose(task.outputs(model), expected, rtol=0, atol=rounding("sage", 2.0**-24))
    assert task.evaluate(model).loss == pytest.approx(task.scores(expected).loss, abs=2 * rounding("sage", 2.0**-24))
