"""convert: which models it takes, and what it keeps of them."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch_geometric import EdgeIndex
from torch_geometric.data import Batch, HeteroData
from torch_geometric.nn import to_hetero

import qgnn
from qgnn.nn import GATConv, GCNConv, GINConv, Linear, SAGEConv

SCHEMES = ("fp32", "int8", "int4", "dq-int8", "dq-int4", "a2q")
NODES = 9
MODELS = {"GCN": GCNConv, "GAT": GATConv, "GIN": GINConv, "GraphSAGE": SAGEConv}
OPTIONS = {
    "plain": {},
    "norm": {"norm": "batch_norm", "dropout": 0.5},
    "cat": {"jk": "cat", "act": "elu"},
    "max": {"jk": "max", "act_first": True, "norm": "BatchNorm"},
    "last": {"jk": "last", "num_layers": 3},
}


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


class Loops(nn.Module):
    """One layer used twice, tied weights, a skip connection, a loop, and a list that is no ModuleList."""

    def __init__(self) -> None:
        super().__init__()
        self.first = pyg.GCNConv(6, 6)
        self.blocks = nn.ModuleList(pyg.SAGEConv(6, 6) for _ in range(2))
        self.again = self.blocks[0]
        self.order = [self.first, *self.blocks, self.again]
        self.encode, self.decode = nn.Linear(6, 6), nn.Linear(6, 6)
        self.decode.weight = self.encode.weight

    def forward(self, x, edge_index):
        for layer in self.order:
            x = x + torch.relu(layer(x, edge_index))
        return self.decode(torch.relu(self.encode(x)))


class Pooled(nn.Module):
    """Graph level: three pools, an MLP."""

    def __init__(self, features: int = 6) -> None:
        super().__init__()
        self.conv1 = pyg.GINConv(pyg.MLP([features, 8, 8]), train_eps=True)
        self.conv2 = pyg.GATConv(8, 4, heads=2)
        self.pool = pyg.MaxAggregation()
        self.mlp = pyg.MLP([24, 8, 2], dropout=0.5)

    def forward(self, x, edge_index, batch):
        x = F.elu(self.conv2(self.conv1(x, edge_index), edge_index))
        pools = [pyg.global_add_pool(x, batch), pyg.global_mean_pool(x, batch), self.pool(x, batch)]
        return self.mlp(torch.cat(pools, 1))


def model_of(kind: str, options: str) -> nn.Module:
    torch.manual_seed(0)
    return getattr(pyg, kind)(6, 8, **{"num_layers": 2, **OPTIONS[options]}, out_channels=3)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(NODES, 6), torch.randint(0, NODES, (2, 30))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if "quantizer" not in k}


def reloaded(model: nn.Module) -> nn.Module:
    """Through torch's pickles."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


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
    assert converted.convert_report.quantized == ["body.conv", "mix", "head.0", "head.3"]
    assert converted.convert_report.float == {}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", MODELS)
def test_models_of_pyg(kind, options, data, caplog):
    """In float the same function, keys and weights; what is quantized extends PyG's layers."""
    model = model_of(kind, options).eval()
    before, out = copy.deepcopy(model.state_dict()), model(*data)
    converted = qgnn.convert(model, "fp32")
    # Sums run in another order: float32, some thirty terms
    torch.testing.assert_close(converted(*data), out, rtol=1e-4, atol=1e-5)
    for scheme in SCHEMES:
        converted = qgnn.convert(model, scheme, num_nodes=NODES)
        own = weights(converted)
        assert list(own) == list(before)
        assert all(torch.equal(value, before[name]) for name, value in own.items())
        for conv, theirs in zip(converted.convs, model.convs, strict=True):
            assert type(conv) is MODELS[kind] and isinstance(conv, type(theirs))
    assert {"convs.0", "convs.1"} <= set(converted.convert_report.quantized)
    assert converted.convert_report.float == {} and not caplog.records
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.add_(1.0)
    assert torch.equal(model(*data), out)
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("scheme", [*SCHEMES[1:], "a2q-nns-m8", "fp16", "bi"])
@pytest.mark.parametrize("kind", MODELS)
def test_converted_models_train_and_can_be_kept(kind, scheme, data):
    """Evaluation gives the same bits from the model, a deep copy, a pickle and a state dict."""
    model = model_of(kind, "norm")
    converted = qgnn.convert(model, scheme, num_nodes=NODES)
    before = weights(converted)["convs.1.nn.lins.0.weight" if kind == "GIN" else next(iter(weights(converted)))].clone()
    optimizer = torch.optim.Adam(converted.parameters(), lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(converted(*data), torch.arange(NODES) % 3).backward()
        optimizer.step()
    converted.eval()
    with torch.no_grad():
        out = converted(*data)
        other = qgnn.convert(model, scheme, num_nodes=NODES).eval()
        other.load_state_dict(converted.state_dict())
        for same in (copy.deepcopy(converted), reloaded(converted), other):
            assert torch.equal(same(*data), out)
    assert out.isfinite().all()
    assert not any(torch.equal(before, value) for value in weights(converted).values())
    assert reloaded(converted).convert_report == converted.convert_report


@pytest.mark.parametrize("make", [Net, Loops])
def test_plain_python_forward(make, data):
    model = make().eval()
    torch.testing.assert_close(qgnn.convert(model, "fp32")(*data), model(*data), rtol=1e-4, atol=1e-5)
    converted = qgnn.convert(model, "a2q", num_nodes=NODES).train()
    converted(*data).sum().backward()
    assert list(weights(converted)) == list(model.state_dict())


def test_shared_modules_and_weights_stay_shared(data):
    converted = qgnn.convert(Loops(), "int8")
    assert converted.again is converted.blocks[0] is converted.order[1] is converted.order[3]
    assert type(converted.again) is SAGEConv
    assert converted.encode.weight is converted.decode.weight
    assert converted.convert_report.quantized.count("blocks.0") == 1
    assert "again" not in converted.convert_report.quantized
    gin = qgnn.convert(model_of("GIN", "plain"), "int8")
    assert gin.act is gin.convs[0].nn.act


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_converted_models_learn(scheme):
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


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("scheme", ["dq-int4", "a2q"])
def test_models_of_pyg_learn_cora(kind, scheme, citation_root):
    """15 steps on the 128 most frequent words: the largest class is 32 % of the test nodes."""
    torch.manual_seed(0)
    data = qgnn.data.load("Cora", citation_root).data
    x = data.x[:, data.x.sum(0).topk(128).indices]
    model = getattr(pyg, kind)(x.size(1), 16, 2, 7, norm="batch_norm")
    model = qgnn.convert(model, scheme, num_nodes=data.num_nodes)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(15):
        optimizer.zero_grad()
        F.cross_entropy(model(x, data.edge_index)[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()
    with torch.no_grad():
        right = model.eval()(x, data.edge_index).argmax(1) == data.y
    assert float(right[data.test_mask].float().mean()) > 0.4


def hetero_data() -> HeteroData:
    torch.manual_seed(0)
    data = HeteroData()
    data["user"].x, data["item"].x = torch.randn(20, 5), torch.randn(12, 7)
    edges = torch.stack([torch.randint(0, 20, (40,)), torch.randint(0, 12, (40,))])
    data["user", "buys", "item"].edge_index, data["item", "bought_by", "user"].edge_index = edges, edges.flip(0)
    data["user", "knows", "user"].edge_index = torch.randint(0, 20, (2, 50))
    return data


class TwoConvs(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.conv1, self.conv2, self.lin = make(8), make(4), pyg.Linear(-1, 3)

    def forward(self, x, edge_index):
        x = self.conv1(x, edge_index).relu()
        return self.lin(self.conv2(x, edge_index).relu())


@pytest.mark.parametrize("kind", ["sage", "gat"])
def test_heterogeneous_models(kind):
    data, nodes = hetero_data(), {"user": 20, "item": 12}
    given = data.x_dict, data.edge_index_dict
    make = {
        "sage": lambda out: pyg.SAGEConv((-1, -1), out),
        "gat": lambda out: pyg.GATConv((-1, -1), out, add_self_loops=False),
    }[kind]
    model = to_hetero(TwoConvs(make), data.metadata()).eval()
    with pytest.raises(ValueError, match="has not seen its input yet: run the model once before convert"):
        qgnn.convert(model, "int8")
    out = model(*given)
    converted = qgnn.convert(model, "fp32")
    assert len(converted.convert_report.quantized) == 2 * 3 + 2
    for name, value in converted(*given).items():
        torch.testing.assert_close(value, out[name], rtol=1e-4, atol=1e-5)
    for scheme, num_nodes in (("int8", None), ("a2q-nns-m8", None), ("a2q", nodes)):
        converted = qgnn.convert(model, scheme, num_nodes=num_nodes)
        assert list(weights(converted)) == list(model.state_dict())
        sum(value.sum() for value in converted.train()(*given).values()).backward()
        expected = converted.eval()(*given)
        for same in (copy.deepcopy(converted), reloaded(converted)):
            assert all(torch.equal(value, expected[name]) for name, value in same(*given).items())
    conv = converted.conv1["user__buys__item"] if isinstance(converted.conv1, nn.ModuleDict) else None
    if kind == "sage" and conv is not None:
        assert conv.lin_r.quantizer.bits.numel() == 12
    for num_nodes in (20, {"user": 20}):
        with pytest.raises(
            ValueError, match=r"pass num_nodes=\{type: nodes, ...\} for all of them, or use \"a2q-nns\""
        ):
            qgnn.convert(model, "a2q", num_nodes=num_nodes)


@pytest.mark.parametrize("make", [pyg.GraphSAGE, lambda *sizes: pyg.GAT(*sizes, add_self_loops=False)])
def test_converted_models_become_heterogeneous(make):
    data = hetero_data()
    data["item"].x = torch.randn(12, 5)
    model = to_hetero(qgnn.convert(make(5, 8, 2, 3), "int8"), data.metadata())
    out = model(data.x_dict, data.edge_index_dict)
    assert {name: value.shape for name, value in out.items()} == {"user": (20, 3), "item": (12, 3)}
    assert len([m for m in model.modules() if isinstance(m, (SAGEConv, GATConv))]) == 2 * 3
    assert model.convs[0]["user__buys__item"].operand_quantizer.message.high.isfinite()


def test_layers_of_a_hetero_conv_know_their_nodes():
    data = hetero_data()
    sizes = {"user": 5, "item": 7}
    model = pyg.HeteroConv({edge: pyg.SAGEConv((sizes[edge[0]], sizes[edge[2]]), 4) for edge in data.edge_types})
    converted = qgnn.convert(model, "a2q", num_nodes={"user": 20, "item": 12})
    assert converted(data.x_dict, data.edge_index_dict)["item"].shape == (12, 4)
    assert converted.convs["user", "buys", "item"].lin_r.quantizer.bits.numel() == 12


@pytest.mark.parametrize("scheme", ["fp32", "int8", "dq-int4", "a2q-nns-m8"])
def test_pooling_on_batches_of_proteins(scheme, citation_root):
    torch.manual_seed(0)
    graphs = qgnn.data.load("PROTEINS", citation_root).graphs[:32]
    batch = Batch.from_data_list(graphs)
    model = Pooled(batch.x.size(1))
    converted = qgnn.convert(model, scheme)
    assert converted.convert_report.float == {}
    out = converted(batch.x, batch.edge_index, batch.batch)
    F.cross_entropy(out, batch.y).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in converted.parameters())
    if scheme == "fp32":
        expected = model.eval()(batch.x, batch.edge_index, batch.batch)
        out = converted.eval()(batch.x, batch.edge_index, batch.batch)
        # BatchNorm's running means differ after the training step
        assert out.shape == expected.shape
    fresh = qgnn.convert(model.eval(), scheme)
    one = fresh(batch.x, batch.edge_index, batch.batch)
    assert one.shape == (32, 2) and one.isfinite().all()


def test_a_jumping_knowledge_lstm_stays_float(caplog, data):
    model = pyg.GCN(6, 8, 2, 3, jk="lstm").eval()
    with caplog.at_level(logging.WARNING, logger="qgnn.convert"):
        converted = qgnn.convert(model, "int8")
    assert type(converted.jk.att) is nn.Linear
    assert converted.convert_report.quantized == ["convs.0", "convs.1", "lin"]
    assert list(converted.convert_report.float) == ["jk"]
    (record,) = caplog.records
    assert record.getMessage() == "these parts compute in float: jk (JumpingKnowledge has no quantized counterpart)"
    converted(*data)


def test_what_is_skipped_stays(data, caplog):
    model = Net().eval()
    converted = qgnn.convert(model, "int8", skip=("head", pyg.GCNConv))
    assert type(converted.body["conv"]) is pyg.GCNConv
    assert type(converted.head[0]) is nn.Linear
    assert converted.convert_report.quantized == ["mix"]
    assert converted.convert_report.float == {"body.conv": "skipped", "head": "skipped"}
    assert not caplog.records
    both = qgnn.convert(model, "int8", skip=["mix", "body", "head"])
    assert torch.equal(both(*data), model(*data))
    assert qgnn.convert(Loops(), "int8", skip="again").again is not None
    assert "blocks.0" in qgnn.convert(Loops(), "int8", skip="again").convert_report.float
    with pytest.raises(ValueError, match=r"skip: there is no module 'convs.7' in the model"):
        qgnn.convert(model, "int8", skip=["convs.7"])


def test_a_layer_alone_and_the_mode_of_every_layer():
    layer = qgnn.convert(pyg.GCNConv(6, 3).eval(), "int8")
    assert type(layer) is GCNConv
    assert layer.convert_report.quantized == [""]
    assert not layer.training and not layer.quantizer.training
    model = Net().train()
    model.mix.eval()
    converted = qgnn.convert(model, "int8", skip=["head"])
    assert converted.body["conv"].training
    assert not converted.mix.training and not converted.mix.quantizer.training
    gin = pyg.GINConv(pyg.MLP([6, 8, 3]))
    gin.nn.norms[0].eval()
    converted = qgnn.convert(gin, "int8")
    assert converted.training and not converted.nn.norms[0].training and converted.nn.lins[0].quantizer.training


def test_double_precision_and_frozen_weights_stay():
    model = pyg.GCN(6, 8, 2, 3).double()
    assert {p.dtype for p in qgnn.convert(model, "fp32").parameters()} == {torch.float64}
    model.convs[0].lin.weight.requires_grad_(False)
    converted = qgnn.convert(model, "fp32")
    assert not converted.convs[0].lin.weight.requires_grad
    assert converted.convs[1].lin.weight.requires_grad


def test_hooks_stay(data):
    model, seen = pyg.GCN(6, 8, 2, 3), []
    model.convs[0].register_forward_hook(lambda layer, args, out: seen.append((type(layer), out.shape)))
    model.convs[1].register_forward_pre_hook(lambda layer, args, kwargs: seen.append(len(args)), with_kwargs=True)
    model.convs[1].register_full_backward_hook(lambda layer, *_: seen.append("backward"))
    converted = qgnn.convert(model, "int8")
    converted(*data).sum().backward()
    assert seen == [(GCNConv, (NODES, 8)), 2, "backward"]


class Watching(pyg.GCN):
    """Its first layer has a hook that holds the whole model."""

    def __init__(self) -> None:
        super().__init__(6, 8, 2, 3)
        self.shapes: list[torch.Size] = []
        self.convs[0].register_forward_hook(self.note)

    def note(self, layer, args, out):
        self.shapes.append(out.shape)


def test_a_hook_may_hold_the_model(data):
    model = Watching()
    converted = qgnn.convert(model, "int8")
    converted(*data)
    assert [type(conv) for conv in converted.convs] == [GCNConv, GCNConv]
    assert converted.shapes == [(NODES, 8)] and not model.shapes


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
    for lazy in (pyg.Linear(-1, 3), nn.LazyLinear(3)):
        linear = nn.Sequential(lazy)
        with pytest.raises(ValueError, match=r"has not seen its input yet: run the model once"):
            qgnn.convert(linear, "int8")
        linear(data[0])
        assert qgnn.convert(linear, "int8")[0].in_channels == 6


class OwnConv(pyg.GCNConv):
    def message(self, x_j, edge_weight):
        return 2 * x_j


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg.GCNConv(6, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.blocks = nn.ModuleList([pyg.GATv2Conv(8, 8), pyg.APPNP(2, 0.1), OwnConv(8, 8)])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.normed, self.gated = weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8)
        self.gated.gate = nn.Parameter(torch.ones(8))
        self.residual = pyg.GATConv(8, 8, residual=True)

    def forward(self, x, edge_index):
        x = self.scale * self.norm(self.conv(x, edge_index))
        for block in self.blocks:
            x = block(x, edge_index)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.residual(self.gated.gate * self.gated(self.normed(x)), edge_index)


def test_what_cannot_be_quantized_stays_and_is_named(caplog, data):
    model = Mixed().eval()
    with caplog.at_level(logging.WARNING, logger="qgnn.convert"):
        converted = qgnn.convert(model, "int8")
    assert converted.convert_report.quantized == ["conv", "residual"]
    floats = dict(converted.convert_report.float)
    assert floats.pop("gated") == "Linear: it has other parameters than usual: gate"
    assert list(floats) == [
        "",
        "norm",
        *(f"blocks.{i}" for i in range(3)),
        "attention",
        "normed",
        "normed.parametrizations.weight",
        "residual.res",
    ]
    assert all(reason.endswith("no quantized counterpart") for reason in floats.values())
    (record,) = caplog.records
    assert "blocks.2 (OwnConv has no quantized counterpart)" in record.getMessage()
    assert "the model (the parameters of Mixed" in record.getMessage()
    assert type(converted.blocks[0].lin_l) is pyg.Linear
    assert type(converted.attention.out_proj) is type(model.attention.out_proj)
    torch.testing.assert_close(qgnn.convert(model, "fp32")(*data), model(*data), rtol=1e-4, atol=1e-5)
    assert converted(*data).shape == (NODES, 8)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (pyg.GCNConv(6, 3, aggr="max"), "GCNConv: aggr='max' is not supported"),
        (pyg.GCNConv(6, 3, flow="target_to_source"), "GCNConv: flow='target_to_source' is not supported"),
        (pyg.SAGEConv(6, 3, aggr="lstm"), "is not supported; choose one of add, sum, mean, max, min"),
        (pyg.SAGEConv(6, 3, aggr=["mean", "max"]), "is not supported; choose one of add, sum, mean, max, min"),
        (pyg.GINConv(torch.relu), "GINConv: its nn is no module"),
        (pyg.GINConv(nn.Sequential(nn.ReLU())), "GINConv: the nn of a GINConv must hold a qgnn.nn.Linear"),
    ],
)
def test_arguments_without_integers_stay_float(layer, reason, data):
    converted = qgnn.convert(nn.ModuleDict({"layer": layer}), "int8")
    assert type(converted["layer"]) is type(layer)
    assert reason in converted.convert_report.float["layer"]
    assert converted.convert_report.quantized == []


def test_hooks_on_messages_keep_a_layer_float(data):
    layer = pyg.SAGEConv(6, 3)
    layer.register_propagate_forward_hook(lambda *_: None)
    converted = qgnn.convert(layer, "int8")
    assert type(converted) is pyg.SAGEConv
    assert converted.convert_report.float == {"": "SAGEConv: it has hooks on its messages"}


def test_aggregations_given_as_modules(data):
    for aggr in (pyg.MeanAggregation(), pyg.MaxAggregation()):
        layer = pyg.SAGEConv(6, 3, aggr=aggr, project=True)
        converted = qgnn.convert(layer, "fp32")
        torch.testing.assert_close(converted(*data), layer(*data), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(SAGEConv(6, 3, aggr=aggr)(*data).shape, torch.Size([NODES, 3]))


@pytest.mark.parametrize("kind", MODELS)
def test_other_forms_of_edges(kind, data):
    model = qgnn.convert(model_of(kind, "plain"), "fp32").eval()
    x, edges = data
    out = model(x, edges)
    wrapped = EdgeIndex(edges.clone(), sparse_size=(NODES, NODES))
    assert torch.equal(model(x, wrapped), out)
    assert torch.equal(model(x, qgnn.Graph.from_edge_index(edges, NODES)), out)
    with pytest.raises(TypeError, match=r"dense torch.Tensor \[2, E\] or a qgnn.Graph, got a torch.sparse_coo tensor"):
        model(x, torch.sparse_coo_tensor(edges, torch.ones(30), (NODES, NODES)))


def test_linear_takes_any_leading_sizes():
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    x = torch.randn(4, 5, 6)
    converted = qgnn.convert(layer, "fp32")
    assert isinstance(converted, nn.Linear)
    torch.testing.assert_close(converted(x), layer(x))
    torch.testing.assert_close(converted(x[0, 0]), layer(x[0, 0]))
    quantized = qgnn.convert(layer, "int8")
    assert torch.equal(quantized(x), quantized.eval()(x.flatten(0, 1)).view(4, 5, 3))


def test_explainers_are_refused():
    with pytest.raises(ValueError, match="explain the model before convert"):
        qgnn.convert(pyg.GCNConv(6, 3), "int8").explain = True


def test_scheme_errors():
    with pytest.raises(ValueError, match=r"there is no scheme 'int5'; choose one of fp32, fp16, int8"):
        qgnn.convert(Net(), "int5")
    with pytest.raises(ValueError, match=r'scheme "a2q" learns a step and a width per node: pass num_nodes'):
        qgnn.convert(Net(), "a2q")
