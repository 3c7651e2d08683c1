"""GATConv, GINConv and SAGEConv: PyG's numbers and state-dict keys in float, and what their quantizers do to them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

import qgnn
from qgnn import Graph, quant
from qgnn.features import SparseFeatures
from qgnn.nn import GATConv, GINConv, Linear, SAGEConv

NODES, FEATURES, OUT = 30, 12, 5
SCHEMES = ("fp16", "int8", "int4", "nqat-int4", "dq-int8", "dq-int4", "a2q", "a2q-global", "a2q-nns-m8", "bi")


def graph_data(seed: int = 0, sources: int = NODES) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    edges = torch.stack(
        [torch.randint(0, sources, (90,), generator=generator), torch.randint(0, NODES, (90,), generator=generator)]
    )
    return torch.randn(sources, FEATURES, generator=generator), edges


def gin_nn(wide: bool, linear: type = nn.Linear) -> nn.Sequential:
    """A GIN's network, whose first Linear makes the map wider or narrower."""
    width = 2 * FEATURES if wide else FEATURES // 2
    return nn.Sequential(linear(FEATURES, width), nn.BatchNorm1d(width), nn.ReLU(), linear(width, OUT))


def pairs() -> list[tuple[str, nn.Module]]:
    """PyG's layers in every arrangement of their arguments."""
    return [
        ("gat", pyg.GATConv(FEATURES, OUT)),
        ("gat heads", pyg.GATConv(FEATURES, OUT, heads=3)),
        ("gat mean", pyg.GATConv(FEATURES, OUT, heads=3, concat=False, negative_slope=0.1)),
        ("gat residual", pyg.GATConv(FEATURES, OUT, heads=2, residual=True, bias=False)),
        ("gat no loops", pyg.GATConv(FEATURES, OUT, heads=2, add_self_loops=False)),
        ("gin narrow", pyg.GINConv(gin_nn(False), eps=0.3)),
        ("gin wide", pyg.GINConv(gin_nn(True), eps=0.3, train_eps=True)),
        ("gin mean", pyg.GINConv(gin_nn(False), aggr="mean")),
        ("gin max", pyg.GINConv(gin_nn(False), aggr="max")),
        ("gin linear", pyg.GINConv(nn.Linear(FEATURES, OUT))),
        ("sage", pyg.SAGEConv(FEATURES, OUT)),
        ("sage wide", pyg.SAGEConv(FEATURES, 2 * FEATURES, normalize=True)),
        ("sage max", pyg.SAGEConv(FEATURES, OUT, aggr="max", root_weight=False)),
        ("sage sum", pyg.SAGEConv(FEATURES, OUT, aggr="sum", project=True, bias=False)),
    ]


@pytest.mark.parametrize(("name", "layer"), pairs(), ids=[name for name, _ in pairs()])
def test_float_layers_are_pygs(backend, name, layer):
    """Forward, gradients of input and parameters, keys. Sums run in another order: float32, some thirty terms."""
    del name
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).to(backend)
    x, edges = (t.to(backend) for t in graph_data())
    ours = qgnn.convert(layer, "fp32")
    assert list(ours.state_dict()) == list(layer.state_dict())
    given, copied = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(given, edges), layer(copied, edges)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(given.grad, copied.grad, rtol=1e-3, atol=1e-4)
    expected_grads = dict(layer.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_grads[key].grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        pyg.GATConv((FEATURES, FEATURES), OUT, heads=2, add_self_loops=False),
        pyg.GATConv((FEATURES, FEATURES), OUT, heads=2),
        pyg.GATConv(FEATURES, OUT, add_self_loops=False),
        pyg.GINConv(gin_nn(False)),
        pyg.GINConv(gin_nn(True)),
        pyg.SAGEConv((FEATURES, FEATURES), OUT),
        pyg.SAGEConv((FEATURES, FEATURES), 2 * FEATURES),
    ],
)
def test_bipartite_inputs(layer):
    torch.manual_seed(0)
    source, edges = graph_data(sources=40)
    target = torch.randn(NODES, FEATURES)
    if getattr(layer, "add_self_loops", False):  # PyG adds loops to the nodes that both sides have
        source, edges = graph_data()
    ours = qgnn.convert(layer, "fp32")
    torch.testing.assert_close(ours((source, target), edges), layer((source, target), edges), rtol=1e-4, atol=1e-5)
    if not isinstance(layer, pyg.GATConv) or not layer.add_self_loops:
        size = (source.size(0), NODES)
        out, expected = ours((source, None), edges, size=size), layer((source, None), edges, size=size)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("out", [OUT, 2 * FEATURES], ids=["product first", "mean first"])
def test_node_level_a2q_on_a_bipartite_graph(out):
    """Each product has the steps of the nodes that it reads."""
    source, edges = graph_data(sources=40)
    layer = SAGEConv((FEATURES, FEATURES), out, project=True, scheme="a2q", num_nodes=(40, NODES))
    assert layer((source, torch.randn(NODES, FEATURES)), edges).shape == (NODES, out)
    maps = {m.name: m.nodes for m in layer.feature_maps("sage", NODES)}
    assert maps["sage.lin.input"] == 40 and maps["sage.lin_r.input"] == NODES
    assert maps["sage.lin_l.input"] == (40 if out == OUT else NODES)


@pytest.mark.parametrize("fill", ["mean", 0.5])
@pytest.mark.parametrize("loops", [True, False])
def test_edge_features_of_attention(fill, loops):
    torch.manual_seed(0)
    x, edges = graph_data()
    edges = torch.cat([edges, torch.tensor([[3, 4], [3, 4]])], 1)  # loops of the caller's, which PyG replaces
    attr = torch.randn(edges.size(1), 4)
    layer = pyg.GATConv(FEATURES, OUT, heads=2, edge_dim=4, fill_value=fill, add_self_loops=loops)
    ours = qgnn.convert(layer, "fp32")
    torch.testing.assert_close(ours(x, edges, attr), layer(x, edges, attr), rtol=1e-4, atol=1e-5)


def test_attention_weights():
    torch.manual_seed(0)
    x, edges = graph_data()
    edges = torch.unique(edges, dim=1)
    layer = pyg.GATConv(FEATURES, OUT, heads=2)
    out, (found, alpha) = qgnn.convert(layer, "fp32")(x, edges, return_attention_weights=True)
    expected, (edge_index, weights) = layer(x, edges, return_attention_weights=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    place = {(int(j), int(i)): e for e, (j, i) in enumerate(edge_index.t())}
    order = torch.tensor([place[int(j), int(i)] for j, i in found.t()])
    assert found.size(1) == edge_index.size(1)
    torch.testing.assert_close(alpha, weights[order], rtol=1e-4, atol=1e-6)


def test_attention_dropout_keeps_the_mean():
    """Each of 400 draws keeps an edge with probability 0.5 and doubles it: the mean over draws is the layer without dropout."""
    torch.manual_seed(0)
    x, edges = graph_data()
    layer = GATConv(FEATURES, OUT, heads=2, dropout=0.5)
    draws = torch.stack([layer(x, edges).detach() for _ in range(400)])
    expected = layer.eval()(x, edges).detach()
    error = (draws.mean(0) - expected).abs() / (draws.std(0) / 400**0.5 + 1e-6)
    assert float(error.max()) < 6  # standard deviations of the mean
    assert float(draws.std(0).max()) > 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["gat", "gin narrow", "gin wide", "sage", "sage wide"])
def test_quantized_layers_train(scheme, kind):
    """Every parameter that a scheme trains gets a finite gradient, evaluation is the same twice, and the state dict brings it back."""
    torch.manual_seed(0)
    x, edges = graph_data()
    layer = qgnn.convert(dict(pairs())[kind], scheme, num_nodes=NODES)
    untouched = qgnn.convert(dict(pairs())[kind], scheme, num_nodes=NODES)
    for _ in range(2):
        layer.zero_grad()
        out = layer(torch.relu(x) + 0.1, edges)
        (out * torch.randn_like(out)).sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), key
    layer.eval()
    with torch.no_grad():
        first, second = layer(x.abs(), edges), layer(x.abs(), edges)
    assert torch.equal(first, second)
    untouched.load_state_dict(layer.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(untouched.eval()(x.abs(), edges), first, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["gat heads", "gin narrow", "gin wide", "sage", "sage wide"])
def test_8_bits_stay_near_float(kind):
    """One step of 8 bits is 1/127 of the largest value. Errors of input, weight and operand add up: 5 % of the largest output leave room."""
    torch.manual_seed(0)
    x, edges = graph_data()
    layer = dict(pairs())[kind].eval()
    ours = qgnn.convert(layer, "int8-extremes").eval()
    with torch.no_grad():
        out, expected = ours(x, edges), layer(x, edges)
    assert float((out - expected).abs().max()) < 0.05 * float(expected.abs().max())
    assert not torch.allclose(out, expected, rtol=1e-6)


def test_the_operand_lies_on_a_grid_of_4_bits():
    torch.manual_seed(0)
    x, edges = graph_data()
    layer = GINConv(Linear(FEATURES, FEATURES + 1, scheme="a2q", num_nodes=NODES), scheme="a2q")
    layer(x, edges)
    step, bits = layer.operand_quantizer.codes()
    assert step.shape == (FEATURES,) and (bits == 4).all()
    codes = layer.operand_quantizer(x) / step
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert float(codes.detach().abs().max().round()) <= 7


@pytest.mark.parametrize("kind", ["gat mean", "gin max", "sage max"])
def test_our_layers_convert_to_another_scheme(kind):
    """With all of their arguments."""
    torch.manual_seed(0)
    x, edges = graph_data()
    layer = dict(pairs())[kind].eval()
    again = qgnn.convert(qgnn.convert(layer, "int8"), "fp32").eval()
    torch.testing.assert_close(again(x, edges), layer(x, edges), rtol=1e-4, atol=1e-5)


def test_a_narrowing_product_runs_before_the_sum():
    """The same function in float; the operand has the narrower width."""
    narrow = GINConv(Linear(FEATURES, OUT, scheme="int8"), scheme="int8")
    wide = GINConv(Linear(OUT, FEATURES, scheme="int8"), scheme="int8")
    largest = GINConv(Linear(FEATURES, OUT, scheme="int8"), aggr="max", scheme="int8")
    assert [c.operand_quantizer.channels for c in (narrow, wide, largest)] == [OUT, OUT, FEATURES]


@pytest.mark.parametrize("kind", ["gat", "gin narrow", "gin max", "sage"])
def test_sparse_features_are_dense_ones(kind):
    torch.manual_seed(0)
    x, edges = graph_data()
    x = (x > 0.8).float()
    layer = dict(pairs())[kind].eval()
    ours = qgnn.convert(layer, "fp32").eval()
    expected = ours(x, edges)
    assert torch.equal(SparseFeatures.from_dense(x).to_dense(), x)
    torch.testing.assert_close(ours(SparseFeatures.from_dense(x), edges), expected, rtol=1e-5, atol=1e-6)


def test_protected_nodes_of_a_gin_reach_its_network(monkeypatch):
    """Under Degree-Quant the network of a GIN reads the sums of protected nodes unquantized; with every node protected only weights are."""
    torch.manual_seed(0)
    x, edges = graph_data()
    layer = GINConv(Linear(FEATURES, FEATURES + 1, scheme="dq-int4"), scheme="dq-int4")
    monkeypatch.setattr("qgnn.quant.protective_mask", lambda scheme, graph: torch.ones(NODES, dtype=torch.bool))
    out = layer(x, edges)
    exact = GINConv(Linear(FEATURES, FEATURES + 1))
    weight = layer.nn.quantizer.weight.eval()(layer.nn.weight).detach()
    exact.load_state_dict({"eps": layer.eps, "nn.weight": weight, "nn.bias": layer.nn.bias.detach()})
    torch.testing.assert_close(out, exact(x, edges), rtol=1e-4, atol=1e-5)
    monkeypatch.undo()
    assert not torch.allclose(layer.eval()(x, edges), out, rtol=1e-3)


def test_masks_need_in_degrees_of_the_sources():
    source, edges = graph_data(sources=40)
    layer = SAGEConv(FEATURES, OUT, scheme="dq-int8")
    with pytest.raises(ValueError, match="sources of a bipartite graph do not have; use int8"):
        layer((source, torch.randn(NODES, FEATURES)), edges)


def test_feature_maps_of_every_layer():
    x, edges = graph_data()
    model = nn.ModuleDict(
        {
            "gat": qgnn.convert(pyg.GATConv(FEATURES, OUT, heads=2), "a2q", num_nodes=NODES),
            "gin": qgnn.convert(pyg.GINConv(gin_nn(True)), "a2q", num_nodes=NODES),
            "sage": qgnn.convert(pyg.SAGEConv(FEATURES, OUT), "dq-int4"),
        }
    )
    for layer in model.values():
        layer(x, edges)
    maps = {m.name: (m.dim, m.nodes, m.learned) for m in quant.feature_maps(model, NODES)}
    assert maps == {
        "gat.lin.input": (FEATURES, NODES, True),
        "gat.operand": (2 * OUT, NODES, False),
        "gin.nn.0.input": (FEATURES, NODES, True),
        "gin.nn.3.input": (2 * FEATURES, NODES, True),
        "gin.operand": (FEATURES, NODES, False),
        "sage.lin_l.input": (FEATURES, NODES, False),
        "sage.lin_r.input": (FEATURES, NODES, False),
        "sage.operand": (OUT, NODES, False),
    }


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GINConv(nn.ReLU()), "must hold a qgnn.nn.Linear"),
        (lambda: GINConv(Linear(2, 2), aggr="median"), "aggr='median' is not supported"),
        (lambda: SAGEConv(2, 2, aggr="lstm"), "aggr='lstm' is not supported"),
        (lambda: GATConv(2, 2, flow="target_to_source"), "flow='target_to_source' is not supported"),
        (lambda: GATConv(-1, 2), "in_channels and out_channels must be at least 1"),
        (lambda: GATConv(FEATURES, 2)(torch.randn(3, 2), graph_data()[1]), rf"x must be a tensor \[N, {FEATURES}\]"),
        (lambda: SAGEConv(2, 2)([torch.randn(3, 2)], graph_data()[1]), "x must be a tensor, or a pair"),
        (
            lambda: GATConv(FEATURES, 2, edge_dim=3)(*graph_data(), torch.randn(90, 2)),
            r"edge_attr must be \[90, 3\]",
        ),
        (
            lambda: GATConv(FEATURES, 2, edge_dim=2, fill_value="median")(*graph_data(), torch.randn(90, 2)),
            "fill_value",
        ),
        (lambda: GATConv(FEATURES, 2, scheme="a2q"), "pass num_nodes"),
        (lambda: GATConv(FEATURES, 2, scheme="a2q", num_nodes=4)(*graph_data()), "has steps for 4 nodes and got 30"),
    ],
)
def test_one_clear_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_deep_copies_are_independent():
    x, edges = graph_data()
    layer = qgnn.convert(pyg.GINConv(gin_nn(True)), "dq-int4")
    layer(x, edges)
    other = copy.deepcopy(layer)
    other(3 * x, edges)
    assert float(other.operand_quantizer.message.high) != float(layer.operand_quantizer.message.high)


def test_a_graph_serves_as_edges():
    x, edges = graph_data()
    layer = SAGEConv(FEATURES, OUT)
    assert torch.equal(layer(x, Graph.from_edge_index(edges, NODES)), layer(x, edges))


def test_attention_without_edge_dim_takes_no_notice_of_edge_features():
    """As PyG's: GAT models hand them on to every layer."""
    x, edge_index = graph_data()
    layer = GATConv(FEATURES, 2)
    assert torch.equal(layer(x, edge_index, torch.randn(90)), layer(x, edge_index))
