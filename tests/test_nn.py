"""Layers: PyG's numbers, PyG's state dicts, and what every graph layer keeps to."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

from qgnn import Graph, use_backend
from qgnn.nn import GCNConv, Linear

SCHEMES = ("fp32", "int8", "int4", "dq-int8", "a2q")
NODES, FEATURES, CLASSES = 12, 7, 5

VARIANTS = {
    "default": {},
    "improved": {"improved": True},
    "no normalisation": {"normalize": False},
    "no self loops": {"add_self_loops": False},
    "no bias": {"bias": False},
    "cached": {"cached": True},
}


@pytest.fixture
def backend(backend):
    """On a GPU the test's tensors are made there."""
    with torch.device(backend):
        yield backend


def graph_data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features, edges with duplicates, self loops and a node without edges, and edge weights."""
    torch.manual_seed(seed)
    edge_index = torch.randint(0, NODES - 1, (2, 40))
    edge_index[:, 3] = edge_index[:, 2]
    edge_index[:, 4:6] = 2  # the same self loop twice
    return torch.randn(NODES, FEATURES), edge_index, torch.rand(40) + 0.1


def seen(layer: nn.Module, x: Tensor, *edges: Tensor) -> nn.Module:
    """The layer in evaluation, after one training pass in which its quantizer took ranges and steps. On the reference: the search for steps is
    long in Triton's interpreter."""
    with use_backend("reference"):
        layer.train()(x, *edges)
    return layer.eval()


def assert_layer_properties(layer: nn.Module, x: Tensor, edge_index: Tensor) -> None:
    """What every graph layer keeps to: shape, invariance to the order of edges, equivariance to the order of nodes, and the same result from a
    Graph as from an edge_index. Sums of at most 40 terms below 10 are reordered: each rounds by 2^-24 of at most 400, forward and once more in the
    product."""
    nodes = x.size(0)
    with torch.no_grad():
        out = layer(x, edge_index)
        tolerance = {"rtol": 0.0, "atol": 2 * 40 * 400 * 2**-24}
        assert out.shape == (nodes, CLASSES)
        assert torch.equal(layer(x, edge_index), out)
        assert torch.equal(layer(x, Graph.from_edge_index(edge_index, nodes)), out)
        assert torch.equal(layer(x, edge_index.int()), out)
        torch.testing.assert_close(layer(x, edge_index[:, torch.randperm(edge_index.size(1))]), out, **tolerance)
        order = torch.randperm(nodes)
        place = torch.argsort(order)
        permute_nodes(layer, order)
        torch.testing.assert_close(layer(x[order], place[edge_index]), out[order], **tolerance)


def permute_nodes(layer: nn.Module, order: Tensor) -> None:
    """Reorders what an A2Q layer learned per node."""
    for name in ("bits", "log_step"):
        parameter = getattr(getattr(layer, "quantizer", None), name, None)
        if parameter is not None:
            parameter.data = parameter.data[order]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gcn_conv_layer_properties(backend, scheme):
    x, edge_index, _ = graph_data()
    assert_layer_properties(
        seen(GCNConv(FEATURES, CLASSES, scheme=scheme, num_nodes=NODES), x, edge_index), x, edge_index
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weighted", [False, True])
def test_gcn_conv_is_pygs(backend, variant, weighted):
    x, edge_index, weight = graph_data()
    theirs, ours = pyg.GCNConv(FEATURES, CLASSES, **VARIANTS[variant]), GCNConv(FEATURES, CLASSES, **VARIANTS[variant])
    if theirs.bias is not None:
        nn.init.normal_(theirs.bias)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert str(ours.load_state_dict(theirs.state_dict())) == "<All keys matched successfully>"
    results = []
    for layer in (theirs, ours):
        given = [x.clone().requires_grad_()] + ([weight.clone().requires_grad_()] if weighted else [])
        out = layer(given[0], edge_index, *given[1:])
        upstream = torch.arange(out.numel(), dtype=out.dtype).view_as(out).sin()
        results.append([out, *torch.autograd.grad(out, [*given, *layer.parameters()], upstream)])
    # Both add at most 40 products of numbers below 10 in float32, in different orders and with the factors applied at different places.
    if weighted and theirs.add_self_loops:
        # Edge 5 repeats the self loop of edge 4, and only its weight is used; PyG's index_put gives both the gradient of the one that is left.
        results[0][2][4] = 0
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


def test_gcn_conv_is_reset_like_pygs():
    theirs, ours = pyg.GCNConv(FEATURES, CLASSES), GCNConv(FEATURES, CLASSES)
    for layer in (theirs, ours):
        nn.init.ones_(layer.bias)
        torch.manual_seed(3)
        layer.reset_parameters()
    assert torch.equal(ours.lin.weight, theirs.lin.weight)
    assert not ours.bias.any()


@pytest.mark.parametrize(
    "initializers", [(None, None), ("glorot", "zeros"), ("uniform", "zeros"), ("kaiming_uniform", None)]
)
def test_linear_is_pygs(initializers):
    torch.manual_seed(4)
    theirs = pyg.Linear(FEATURES, CLASSES, True, *initializers)
    torch.manual_seed(4)
    ours = Linear(FEATURES, CLASSES, True, *initializers)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    x = torch.randn(4, FEATURES)
    torch.testing.assert_close(ours(x), theirs(x))
    assert Linear(FEATURES, CLASSES, bias=False).bias is None


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_quantized_layers_keep_pygs_keys_and_prefix_their_own(scheme):
    layer = GCNConv(FEATURES, CLASSES, scheme=scheme, num_nodes=NODES)
    keys = [k for k in layer.state_dict() if not k.startswith(("quantizer.", "operand_quantizer."))]
    assert keys == list(pyg.GCNConv(FEATURES, CLASSES).state_dict())
    keys = [
        k
        for k in Linear(FEATURES, CLASSES, scheme=scheme, num_nodes=NODES).state_dict()
        if not k.startswith("quantizer.")
    ]
    assert keys == ["weight", "bias"]


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_state_dict_restores_behaviour(scheme):
    x, edge_index, _ = graph_data()
    layer = seen(GCNConv(FEATURES, CLASSES, scheme=scheme, num_nodes=NODES), x, edge_index)
    other = GCNConv(FEATURES, CLASSES, scheme=scheme, num_nodes=NODES)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x, edge_index), layer(x, edge_index))
    assert torch.equal(
        other.train()(x * 0.5, edge_index) if scheme == "a2q" else other.eval()(x * 0.5, edge_index),
        layer(x * 0.5, edge_index),
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_parameter_gets_a_gradient(backend, scheme):
    x, edge_index, _ = graph_data()
    layer = GCNConv(FEATURES, CLASSES, scheme=scheme, num_nodes=NODES)
    seen(layer, x * 0.5, edge_index).train()  # so that x clips, and the widths get a gradient
    x.requires_grad_()
    layer(x, edge_index).square().sum().backward()
    for name, parameter in [*layer.named_parameters(), ("x", x)]:
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_edge_weights_with_quantization(backend, scheme):
    x, edge_index, weight = graph_data()
    layer = GCNConv(FEATURES, CLASSES, scheme=scheme, num_nodes=NODES)
    seen(layer, x, edge_index)
    weight.requires_grad_()
    out = layer(x, edge_index, weight)
    (gradient,) = torch.autograd.grad(out.square().sum(), weight)
    assert gradient.any()
    assert not torch.equal(out, layer(x, edge_index))
    torch.testing.assert_close(layer(x, edge_index, torch.ones(40)), layer(x, edge_index), rtol=1e-5, atol=1e-5)


def test_quantization_error_shrinks_with_the_width():
    x, edge_index, _ = graph_data()
    layer = GCNConv(FEATURES, CLASSES)
    exact = layer(x, edge_index)
    errors = {}
    for scheme in ("int4", "int8"):
        quantized = GCNConv(FEATURES, CLASSES, scheme=scheme)
        quantized.load_state_dict(layer.state_dict(), strict=False)
        errors[scheme] = ((seen(quantized, x, edge_index)(x, edge_index) - exact).norm() / exact.norm()).item()
    assert 0 < errors["int8"] < 0.02 < errors["int4"] < 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_graphs_without_edges(backend, scheme):
    none = torch.empty(2, 0, dtype=torch.long)
    for nodes in (0, 1, 3):
        layer = GCNConv(FEATURES, CLASSES, scheme=scheme, num_nodes=nodes)
        seen(layer, torch.randn(nodes, FEATURES), none).train()
        assert layer(torch.randn(nodes, FEATURES), none).shape == (nodes, CLASSES)
        assert layer.eval()(torch.randn(nodes, FEATURES), none).shape == (nodes, CLASSES)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_channels": -1}, ValueError, r"must be at least 1, got -1 and 5; lazy sizes \(-1\) cannot be quantized"),
        ({"out_channels": 0}, ValueError, "must be at least 1, got 7 and 0"),
        (
            {"normalize": False, "add_self_loops": True},
            ValueError,
            "adds self loops only when it normalizes; pass normalize=True",
        ),
        ({"aggr": "mean"}, ValueError, "aggr='mean' is not supported; this layer has aggr='add'"),
        ({"flow": "target_to_source"}, ValueError, "flow='target_to_source' is not supported"),
        ({"groups": 2}, TypeError, "unknown argument 'groups'"),
        ({"scheme": "int3"}, ValueError, "there is no scheme 'int3'; choose one of fp32, "),
        ({"scheme": "a2q"}, ValueError, 'scheme "a2q" learns a step and a width per node: pass num_nodes'),
    ],
)
def test_constructor_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        GCNConv(**{"in_channels": FEATURES, "out_channels": CLASSES, **arguments})


def test_constructor_takes_pygs_defaults():
    GCNConv(FEATURES, CLASSES, aggr="add", flow="source_to_target", node_dim=-2)
    with pytest.raises(ValueError, match=r"initializer must be one of"):
        Linear(FEATURES, CLASSES, weight_initializer="normal")
    with pytest.raises(ValueError, match=r"at least 1"):
        Linear(-1, CLASSES)


def test_forward_errors():
    x, edge_index, weight = graph_data()
    layer = GCNConv(FEATURES, CLASSES)
    with pytest.raises(ValueError, match=r"x must be a tensor \[N, 7\], got \[12, 6\]"):
        layer(x[:, 1:], edge_index)
    with pytest.raises(ValueError, match=r"x must be a tensor \[N, 7\], got tuple"):
        layer((x, x), edge_index)
    with pytest.raises(ValueError, match=r"edge_weight must be \[40\], one for each edge, got \(41,\)"):
        layer(x, edge_index, torch.ones(41))
    with pytest.raises(ValueError, match=r"edge_weight must be \[40\]"):
        layer(x, edge_index, weight.unsqueeze(1))
    with pytest.raises(TypeError, match=r"edge_weight must be a floating-point tensor"):
        layer(x, edge_index, torch.ones(40, dtype=torch.long))
    with pytest.raises(TypeError, match=r"dense torch.Tensor \[2, E\] or a qgnn.Graph, got a torch.sparse_coo tensor"):
        layer(x, torch.eye(NODES).to_sparse())
    with pytest.raises(ValueError, match=r"is outside 0..4"):
        layer(x[:5], edge_index)
    with pytest.raises(ValueError, match=r"x is on meta and the graph on cpu"):
        layer.to("meta")(x.to("meta"), edge_index)


def test_a_graph_of_another_size_is_refused():
    x, edge_index, _ = graph_data()
    with pytest.raises(ValueError, match=r"the graph has 20 nodes and x 12 rows"):
        GCNConv(FEATURES, CLASSES)(x, Graph.from_edge_index(edge_index, 20))
    with pytest.raises(
        ValueError,
        match=r"steps for 12 nodes and got 20; node-level A2Q is tied to its graph: convert with num_nodes=20",
    ):
        GCNConv(FEATURES, CLASSES, scheme="a2q", num_nodes=NODES)(torch.randn(20, FEATURES), edge_index)
