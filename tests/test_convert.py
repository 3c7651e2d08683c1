"""convert: which models it takes, and what it keeps of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import nn

import qgnn
from qgnn.nn import GCNConv, Linear

SCHEMES = ("fp32", "int8", "int4", "dq-int8", "dq-int4", "a2q")
NODES = 9


class Net(nn.Module):
    """Plain Python forward code around PyG's layers and torch's Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"conv": pyg.GCNConv(6, 8, improved=True, bias=False)})
        self.mix = pyg.Linear(8, 7)
        self.head = nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Dropout(0.3), nn.Linear(4, 3, bias=False))

    def forward(self, x, edge_index, edge_weight=None):
        x = F.relu(self.body["conv"](x, edge_index, edge_weight))
        return self.head(F.relu(self.mix(F.dropout(x, 0.5, self.training))))


@pytest.fixture
def data():
    torch.manual_seed(0)
    return torch.randn(NODES, 6), torch.randint(0, NODES, (2, 30))


def test_layers_are_replaced_and_the_rest_stays():
    converted = qgnn.convert(Net(), "int8")
    assert isinstance(converted, Net)
    assert type(converted.body["conv"]) is GCNConv
    assert type(converted.mix) is type(converted.head[0]) is type(converted.head[3]) is Linear
    assert type(converted.head[1]) is nn.ReLU
    assert type(converted.head[2]) is nn.Dropout
    conv = converted.body["conv"]
    assert (conv.in_channels, conv.out_channels, conv.improved, conv.normalize, conv.add_self_loops, conv.bias) == (
        6,
        8,
        True,
        True,
        True,
        None,
    )
    assert converted.head[3].bias is None
    assert {m.scheme.name for m in (conv, converted.mix, converted.head[0])} == {"int8"}


@pytest.mark.parametrize(
    "make", [Net, lambda: pyg.GCN(6, 8, 2, 3), lambda: pyg.GCN(6, 8, 3, 3, dropout=0.5, act="relu")]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_kept_and_the_original_is_unchanged(make, scheme, data):
    model = make().eval()
    before, out = copy.deepcopy(model.state_dict()), model(*data)
    converted = qgnn.convert(model, scheme, num_nodes=NODES)
    own = {k: v for k, v in converted.state_dict().items() if "quantizer" not in k}
    assert list(own) == list(before)
    for name, value in own.items():
        assert torch.equal(value, before[name]), name
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(*data), out)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("make", [Net, lambda: pyg.GCN(6, 8, 2, 3)])
def test_fp32_computes_what_pyg_does(make, data):
    model = make().eval()
    torch.testing.assert_close(qgnn.convert(model, "fp32")(*data), model(*data), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_converted_models_train(scheme):
    torch.manual_seed(1)
    target = torch.arange(NODES) % 3
    edge_index = torch.stack([torch.arange(NODES), (torch.arange(NODES) + 3) % NODES])  # within the classes
    x = torch.cat([F.one_hot(target).float(), torch.zeros(NODES, 3)], 1) + 0.3 * torch.randn(NODES, 6)
    model = qgnn.convert(pyg.GCN(6, 16, 2, 3), scheme, num_nodes=NODES)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, edge_index), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_layer_alone_and_the_mode_of_every_layer():
    layer = qgnn.convert(pyg.GCNConv(6, 3).eval(), "int8")
    assert type(layer) is GCNConv
    assert not layer.training
    model = Net().train()
    model.mix.eval()
    converted = qgnn.convert(model, "int8")
    assert converted.body["conv"].training
    assert not converted.mix.training


def test_double_precision_and_frozen_weights_stay():
    model = pyg.GCN(6, 8, 2, 3).double()
    assert {p.dtype for p in qgnn.convert(model, "fp32").parameters()} == {torch.float64}
    model.convs[0].lin.weight.requires_grad_(False)
    converted = qgnn.convert(model, "fp32")
    assert not converted.convs[0].lin.weight.requires_grad
    assert converted.convs[1].lin.weight.requires_grad


def test_converting_again_changes_the_scheme(data):
    model = qgnn.convert(pyg.GCN(6, 8, 2, 3), "int8")
    model(*data)
    again = qgnn.convert(model, "a2q", num_nodes=NODES)
    assert again.convs[0].scheme.name == "a2q"
    assert again.convs[0].quantizer.kind == "new"
    assert torch.equal(again.convs[0].lin.weight, model.convs[0].lin.weight)


def test_lazy_sizes(data):
    model = pyg.GCN(-1, 8, 2, 3)
    with pytest.raises(
        ValueError, match=r"GCNConv\(-1, 8\) has not seen its input yet: run the model once before convert"
    ):
        qgnn.convert(model, "int8")
    model(*data)
    assert qgnn.convert(model, "int8").convs[0].in_channels == 6
    linear = nn.Sequential(pyg.Linear(-1, 3))
    with pytest.raises(ValueError, match=r"has not seen its input yet: run the model once"):
        qgnn.convert(linear, "int8")
    linear(data[0])
    assert qgnn.convert(linear, "int8")[0].in_channels == 6


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg.GCNConv(6, 8)
        self.norm = nn.LayerNorm(8)
        self.blocks = nn.ModuleList([pyg.GATv2Conv(8, 8), pyg.APPNP(2, 0.1)])


def test_layers_that_cannot_be_quantized_are_named():
    with pytest.raises(
        ValueError,
        match=r"cannot quantize norm \(LayerNorm\), blocks.0 \(GATv2Conv\), blocks.1 \(APPNP\); GCNConv, GATConv, GINConv, SAGEConv and Linear",
    ):
        qgnn.convert(Mixed(), "int8")
    with pytest.raises(ValueError, match=r"cannot quantize the model \(GATv2Conv\)"):
        qgnn.convert(pyg.GATv2Conv(8, 8), "int8")


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (pyg.GCNConv(6, 3, aggr="max"), "has another aggregation or flow"),
        (pyg.GCNConv(6, 3, flow="target_to_source"), "has another aggregation or flow"),
    ],
)
def test_graph_convolutions_that_are_no_gcn(layer, message):
    with pytest.raises(ValueError, match=message):
        qgnn.convert(layer, "int8")


def test_scheme_errors():
    with pytest.raises(ValueError, match=r"there is no scheme 'int5'; choose one of fp32, fp16, int8"):
        qgnn.convert(Net(), "int5")
    with pytest.raises(ValueError, match=r'scheme "a2q" learns a step and a width per node: pass num_nodes'):
        qgnn.convert(Net(), "a2q")
