"""freeze: the integer model computes what the fake-quantized one does, in two launches a GCN layer, and says what it takes."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.data import Batch, Data, HeteroData

import qgnn
from qgnn import Graph, models
from qgnn.nn import GCNConv
from qgnn.parts import Codec, Operand, Product, Sum

SCHEMES = ("int8", "int4", "dq-int8", "dq-int4", "a2q")
FEATURES = ("binary", "normalised", "non-negative", "signed")
NODES = 40
PYG = {
    "gcn": lambda: pyg.GCN(24, 16, 2, 5, dropout=0.5),
    "gat": lambda: pyg.GAT(24, 16, 2, 5, heads=4, dropout=0.5),
    "gin": lambda: pyg.GIN(24, 16, 2, 5, dropout=0.5),
    "sage": lambda: pyg.GraphSAGE(24, 16, 2, 5, dropout=0.5),
    "wide-sage": lambda: pyg.GraphSAGE(24, 40, 2, 5),
    "gcn-bn-cat": lambda: pyg.GCN(24, 16, 3, 5, norm="batch_norm", jk="cat"),
    "gin-bn": lambda: pyg.GIN(24, 16, 2, 5, norm="batch_norm"),
}


def graph_data(features: str = "signed", nodes: int = NODES) -> Data:
    binary = (torch.rand(nodes, 24) > 0.8).float()
    x = {
        "binary": binary,
        "normalised": binary / binary.sum(1, keepdim=True).clamp_min(1),
        "non-negative": torch.rand(nodes, 24),
        "signed": torch.randn(nodes, 24),
    }[features]
    return Data(x=x, edge_index=torch.randint(0, nodes, (2, 4 * nodes)))


def inputs_of(data: Data) -> list[object]:
    return [data.x, data.edge_index, *([data.batch] if "batch" in data else [])]


def trained(model: nn.Module, scheme: str, data: Data, steps: int = 3) -> nn.Module:
    """A converted model after a few steps: fresh ranges and steps are exact ratios of the data, where ties abound."""
    model = qgnn.convert(model, scheme, num_nodes=data.num_nodes).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with qgnn.use_backend("reference"):
        for _ in range(steps):
            optimizer.zero_grad()
            model(*inputs_of(data)).square().sum().backward()
            optimizer.step()
    return model.eval()


class Net(nn.Module):
    def __init__(self, forward) -> None:
        super().__init__()
        self.first, self.second = pyg.GCNConv(24, 16), pyg.GCNConv(16, 5)
        self.function = forward

    def forward(self, x, edge_index):
        return self.function(self, x, edge_index)


def chain(model, x, edge_index):
    return model.second(model.first(x, edge_index).relu(), edge_index)


class Pooled(nn.Module):
    """A GIN for graphs, of PyG's parts."""

    def __init__(self, pool=pyg.global_add_pool) -> None:
        super().__init__()
        self.gin, self.head, self.pool = pyg.GIN(24, 16, 2, norm="batch_norm"), pyg.MLP([16, 8, 3], norm=None), pool

    def forward(self, x, edge_index, batch):
        return self.head(self.pool(self.gin(x, edge_index), batch))


def batch_data() -> Data:
    return Batch.from_data_list([graph_data(nodes=n) for n in (7, 1, 12, 20)])


def assert_agrees(model: nn.Module, data: Data, frozen: nn.Module) -> None:
    """Codes equal except counted ties, and logits within 1e-4 where there is none (NUMERICS 7)."""
    with torch.no_grad():
        expected = model(*inputs_of(data))
    report, out = frozen.report, frozen()
    difference = (out - expected).abs().max().item()
    assert report.max_difference == pytest.approx(difference)
    assert report.max_relative == pytest.approx(difference / expected.abs().max().item())
    if report.ties == 0:
        assert report.inherited == 0, "codes differ, and no tie explains it"
        assert report.max_relative < 1e-4
        undecided = (expected.topk(2).values.diff().abs() <= 2 * difference).sum()
        assert report.mismatched_predictions <= undecided


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integer_model_is_the_fake_quantized_one(scheme, features):
    ties = 0
    for seed in range(3):
        torch.manual_seed(seed)
        data = graph_data(features)
        model = trained(PYG["gcn"](), scheme, data)
        frozen = qgnn.freeze(model, data)
        assert_agrees(model, data, frozen)
        assert [r.launches for r in frozen.report.layers] == [2, 2]
        assert frozen.report.layers[0].coding == (
            "binary" if features in ("binary", "normalised") else "node" if scheme == "a2q" else "tensor"
        )
        ties += frozen.report.ties
    assert ties < 3


@pytest.mark.parametrize("features", ["binary", "signed"])
@pytest.mark.parametrize("scheme", ["int4", "dq-int8", "a2q", "a2q-nns-m20"])
@pytest.mark.parametrize("kind", PYG)
def test_models_of_pyg(kind, scheme, features):
    torch.manual_seed(3)
    data = graph_data(features)
    model = trained(PYG[kind](), scheme, data)
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    # means of 0/1 features over few neighbours lie at borders exactly, where int8 rounds to even and integers away from zero
    assert frozen.report.ties < (30 if kind == "wide-sage" and features == "binary" else 10)
    assert frozen.report.layers and all(r.kind != "float" for r in frozen.report.layers)


LAUNCHES = {
    "gcn": {"convs.0": 2, "convs.1": 2},
    "gat": {"convs.0": 2, "convs.0.lin": 1, "convs.1": 2, "convs.1.lin": 1},
    "gin": {"convs.0": 1, "convs.0.nn.lins.0": 1, "convs.0.nn.lins.1": 1, "convs.1": 1, "convs.1.nn.lins.0": 1, "convs.1.nn.lins.1": 1},
    # the second layer's input is read twice, with two steps: both codes are written by a kernel of their own
    "sage": {"convs.0": 1, "convs.0.lin_r": 1, "convs.0.lin_l": 1, "convs.1": 1, "convs.1.lin_r": 2, "convs.1.lin_l": 2},
    "gin-bn": {"convs.0": 1, "convs.0.nn.lins.0": 1, "convs.0.nn.lins.1": 1, "convs.1": 1, "convs.1.nn.lins.0": 1, "convs.1.nn.lins.1": 1},
}  # fmt: skip


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", LAUNCHES)
def test_launches_are_those_reported(kind):
    torch.manual_seed(4)
    data = graph_data()
    frozen = qgnn.freeze(trained(PYG[kind](), "a2q", data), data)
    assert frozen.launches() == LAUNCHES[kind]
    assert {r.name: r.launches for r in frozen.report.layers} == LAUNCHES[kind]
    frozen()
    with Operations() as ran, torch.no_grad():
        frozen()
    ours = [name for name in ran.names if name.startswith("qgnn::")]
    assert len(ours) == sum(LAUNCHES[kind].values())


@pytest.mark.parametrize("features", ["binary", "signed"])
@pytest.mark.parametrize("scheme", ["dq-int8", "a2q"])
def test_two_launches_a_layer_and_nothing_else(scheme, features):
    torch.manual_seed(8)
    data = graph_data(features)
    frozen = qgnn.freeze(trained(pyg.GCN(24, 16, 3, 5), scheme, data), data)
    frozen()
    with Operations() as ran, torch.no_grad():
        frozen()
    assert ran.names == ["qgnn::matmul_packed", "qgnn::aggregate_packed"] * 3


@pytest.mark.parametrize("kind", ["gcn", "gat", "gin", "wide-sage"])
@pytest.mark.parametrize("scheme", ["dq-int4", "a2q", "a2q-nns-m5"])
def test_on_every_backend(backend, kind, scheme):
    torch.manual_seed(4)
    data = graph_data(nodes=12)
    model = trained(PYG[kind](), scheme, data)
    with qgnn.use_backend("reference"):
        expected = qgnn.freeze(model, data)()
    data = data.to(backend)
    frozen = qgnn.freeze(model.to(backend), data)
    # attention is a float sum, in another order; integers are exact
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if kind == "gat" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(frozen().cpu(), expected, **tolerance)
    torch.testing.assert_close(frozen(data.x, data.edge_index).cpu(), expected, **tolerance)


def test_linear_layers_and_a_softmax():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.conv, self.after = pyg.Linear(24, 16), pyg.GCNConv(16, 8), nn.Linear(8, 5)

        def forward(self, x, edge_index):
            x = F.dropout(F.relu(self.before(x)), 0.5, self.training)
            return F.log_softmax(self.after(self.conv(x, edge_index).relu_()), dim=-1)

    for scheme in SCHEMES:
        torch.manual_seed(5)
        data = graph_data("non-negative")
        model = trained(Mixed(), scheme, data)
        frozen = qgnn.freeze(model, data)
        assert_agrees(model, data, frozen)
        assert [(r.kind, r.launches) for r in frozen.report.layers] == [("linear", 1), ("gcn", 2), ("linear", 1)]
        torch.testing.assert_close(frozen().exp().sum(1), torch.ones(NODES))


class Normed(nn.Module):
    """Batch normalisations before and after a ReLU, and two in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.last = pyg.GCNConv(24, 16), nn.Linear(16, 8), pyg.GCNConv(8, 5)
        self.norms = nn.ModuleList([pyg.BatchNorm(16), nn.BatchNorm1d(16), nn.BatchNorm1d(8), nn.BatchNorm1d(8)])

    def forward(self, x, edge_index):
        before, after, one, two = self.norms
        x = F.dropout(after(before(self.conv(x, edge_index)).relu()), 0.5, self.training)
        return self.last(two(one(self.linear(x))), edge_index)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_batch_normalisation_is_folded(scheme, tmp_path):
    """A2Q eq. 18: the factors and shifts of all normalisations are in the epilogues; no launch is added, and the file keeps them."""
    torch.manual_seed(11)
    data = graph_data()
    model = trained(Normed(), scheme, data)
    with torch.no_grad():
        for norm in (model.norms[0].module, *model.norms[1:]):
            norm.weight.uniform_(-1, 2)
            norm.bias.normal_()
        model.train()(data.x, data.edge_index)  # ranges that fit
        model.eval()
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    assert [r.launches for r in frozen.report.layers] == [2, 1, 2]
    qgnn.save(frozen, tmp_path / "model")
    assert torch.equal(qgnn.load(tmp_path / "model")(data.x, data.edge_index), frozen())


def test_batch_normalisation_that_cannot_be_folded():
    """Without running statistics it computes with those of the batch: in float, and listed."""
    torch.manual_seed(12)
    data = graph_data()
    model = Net(lambda m, x, e: m.second(m.norm(m.first(x, e)), e))
    model.norm = nn.BatchNorm1d(16, track_running_stats=False)
    model = trained(model, "int8", data)
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    assert frozen.floats == {"norm": "a batch normalisation without running statistics"}
    model = Net(lambda m, x, e: m.second(m.norm(m.first(x, e).unsqueeze(2).expand(-1, -1, 16)).sum(2), e))
    model.norm = nn.BatchNorm1d(16)
    with pytest.raises(ValueError, match=r"batch normalisation norm gets \[40, 16, 16\]; freeze takes maps \[N, F\]"):
        qgnn.freeze(trained(model, "int8", data), data)


@pytest.mark.parametrize("scheme", ["int8", "a2q"])
@pytest.mark.parametrize(
    "arguments", [{"add_self_loops": False}, {"normalize": False}, {"bias": False}, {"improved": True}]
)
def test_variants_of_gcn(scheme, arguments):
    torch.manual_seed(6)
    data = graph_data()
    model = Net(chain)
    model.first, model.second = pyg.GCNConv(24, 16, **arguments), pyg.GCNConv(16, 5, **arguments)
    model = trained(model, scheme, data)
    assert_agrees(model, data, qgnn.freeze(model, data))


@pytest.mark.parametrize("scheme", ["int8", "a2q"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pyg.GATConv(24, 8, 2, concat=False, residual=True), pyg.GATConv(8, 5, residual=True, bias=False)),
        (pyg.GATConv(24, 8, 2, negative_slope=0.5, add_self_loops=False, residual=True), pyg.GATConv(16, 5)),
        (pyg.SAGEConv(24, 16, project=True, normalize=True), pyg.SAGEConv(16, 5, root_weight=False, aggr="add")),
        (pyg.SAGEConv(24, 40, bias=False), pyg.SAGEConv(40, 5, normalize=True)),
        (pyg.GINConv(nn.Linear(24, 16), eps=0.3, train_eps=True), pyg.GINConv(nn.Linear(16, 40), aggr="mean")),
        (pyg.GINConv(nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16))), pyg.GCNConv(16, 5)),
    ],
)  # fmt: skip
def test_variants_of_other_convolutions(scheme, first, second):
    torch.manual_seed(7)
    data = graph_data()
    model = Net(chain)
    model.first, model.second = first, second
    model = trained(model, scheme, data)
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    assert {r.name for r in frozen.report.layers if r.kind == "float"} == {
        f"{name}.res" for name in ("first", "second") if getattr(model, name).__dict__.get("residual")
    }


def test_layer_without_relu_before_another():
    torch.manual_seed(7)
    data = graph_data()
    for scheme in SCHEMES:
        model = trained(Net(lambda m, x, e: m.second(m.first(x, e), e)), scheme, data)
        assert_agrees(model, data, qgnn.freeze(model, data))


def skip(model, x, edge_index):
    h = model.first(x, edge_index)
    h = (model.middle(h.relu(), edge_index) + h).relu()
    return F.log_softmax(model.second(h, edge_index) * 2 + h[:, :5].sigmoid(), -1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_skip_connections_and_float_functions(scheme):
    torch.manual_seed(13)
    data = graph_data()
    model = Net(skip)
    model.middle = pyg.GCNConv(16, 16)
    model = trained(model, scheme, data)
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    # the sum of the skip connection and its ReLU are in the epilogue; what two layers read is packed by a kernel of its own
    assert [r.launches for r in frozen.report.layers] == [2, 3, 3]
    targets = [str(node.target) for node in frozen.program.nodes]
    assert "middle_sum" in targets and not any("add" in t for t in targets[: targets.index("second_product")])


def test_a_summand_of_another_shape_is_not_taken_over():
    torch.manual_seed(14)
    data = graph_data()
    model = trained(Net(lambda m, x, e: m.second((m.first(x, e) + x.sum(0)[:16]).relu(), e)), "int8", data)
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    assert [r.launches for r in frozen.report.layers] == [2, 3]


@pytest.mark.parametrize(
    "pool", [pyg.global_add_pool, pyg.global_mean_pool, pyg.global_max_pool, pyg.MeanAggregation()]
)
@pytest.mark.parametrize("scheme", ["int8", "a2q-nns-m20"])
def test_models_of_graphs(scheme, pool):
    torch.manual_seed(15)
    data = batch_data()
    model = trained(Pooled(pool), scheme, data)
    frozen = qgnn.freeze(model, data)
    assert frozen.inputs == ["x", "edge_index", "batch"]
    assert_agrees(model, data, frozen)
    unseen = Batch.from_data_list([graph_data(nodes=n) for n in (5, 9)])
    with torch.no_grad():
        expected = model(unseen.x, unseen.edge_index, unseen.batch)
    out = frozen(unseen.x, unseen.edge_index, unseen.batch)
    assert out.shape == (2, 3)
    # a tie is worth at most a code of 4 or 8 bits
    assert (out - expected).abs().max() <= 0.1 * expected.abs().max()


@pytest.mark.parametrize("scheme", ["dq-int8", "a2q-nns-m20"])
@pytest.mark.parametrize("kind", [models.GraphGCN, models.GraphGAT, models.GraphGIN, models.PooledGIN])
def test_our_models_of_graphs(kind, scheme):
    torch.manual_seed(16)
    data = batch_data()
    model = kind(24, 8, 3, 2, scheme=scheme)
    for _ in range(3):
        model(*inputs_of(data)).sum().backward()
    model.eval()
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    if kind is models.PooledGIN:  # BatchNorm after ReLU and all
        packs = 2 if scheme == "a2q-nns-m20" else 1
        # the first Linear runs before the first sum, on codes that were bound
        assert [r.launches for r in frozen.report.layers] == [1, 1, packs, 1, packs, packs, 2, packs]


@pytest.mark.parametrize("scheme", ["int8", "a2q"])
@pytest.mark.parametrize("kind", [models.GCN, models.GAT, models.GIN, models.GraphSAGE])
def test_our_models_of_nodes(kind, scheme):
    torch.manual_seed(17)
    data = graph_data()
    model = kind(24, 8, 5, 3, scheme=scheme, num_nodes=NODES, skip=True)
    for _ in range(3):
        model(data.x, data.edge_index).sum().backward()
    model.eval()
    assert_agrees(model, data, qgnn.freeze(model, data))


def hetero_data() -> HeteroData:
    data = HeteroData()
    data["paper"].x, data["author"].x = torch.randn(20, 8), torch.randn(12, 6)
    for source, name, target in (("author", "writes", "paper"), ("paper", "by", "author"), ("paper", "cites", "paper")):
        ends = [torch.randint(0, data[kind].num_nodes, (50,)) for kind in (source, target)]
        data[source, name, target].edge_index = torch.stack(ends)
    return data


@pytest.mark.parametrize("conv", [pyg.SAGEConv, lambda a, b: pyg.GATConv(a, b, add_self_loops=False)])
def test_models_of_several_kinds_of_nodes(conv, tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv((-1, -1), 16), conv((-1, -1), 4)

        def forward(self, x, edge_index):
            return self.second(self.first(x, edge_index).relu(), edge_index)

    torch.manual_seed(18)
    data = hetero_data()
    plain = pyg.to_hetero(Two(), data.metadata())
    plain(data.x_dict, data.edge_index_dict)
    model = qgnn.convert(plain, "int8").train()
    for _ in range(3):
        model(data.x_dict, data.edge_index_dict)
    with torch.no_grad():
        expected = model.eval()(data.x_dict, data.edge_index_dict)
    frozen = qgnn.freeze(model, data)
    assert frozen.report.ties + frozen.report.max_relative < 1e-4 or frozen.report.ties < 20
    assert not frozen.floats
    qgnn.save(frozen, tmp_path / "model")
    loaded = qgnn.load(tmp_path / "model")(data.x_dict, data.edge_index_dict)
    for kind, out in frozen().items():
        assert torch.equal(loaded[kind], out)
        assert (out - expected[kind]).abs().max() <= 0.05 * expected[kind].abs().max()


# -- what is measured --------------------------------------------------------------------------------------------------------------------------


def test_bytes_by_hand():
    torch.manual_seed(9)
    data = Data(x=(torch.rand(10, 20) > 0.5).float(), edge_index=torch.randint(0, 10, (2, 30)))
    model = trained(pyg.GCN(20, 40, 2, 3), "a2q", data)
    # 3 rows of 3 bits lie in 4-bit containers: 40 codes make 20 bytes, padded to 32; 5 of 2 bits: 10 bytes each; 2 of no bits
    model.convs[1].quantizer.bits.data = torch.tensor([2.0, 3, 0, 2, 2, 3, 0, 2, 2, 3])
    report = qgnn.freeze(model, data).report
    first, second = report.layers
    assert first.average_bits == 1
    assert first.code_bytes == 32  # 10 rows of 20 bits, 3 bytes each, to the next 16
    assert first.step_bytes == 10 * 4 + 10
    assert first.operand_bytes == 10 * 32  # 40 codes of 4 bits: 20 bytes, padded to 32
    assert first.weight_bytes == 40 * 10
    assert (first.weight_step_bytes, first.weight_fp32_bytes, first.input_fp32_bytes, first.operand_fp32_bytes) == (
        160,
        3200,
        800,
        1600,
    )
    assert second.average_bits == pytest.approx(1.9)
    assert second.code_bytes == 3 * 32 + 64
    assert second.step_bytes == 10 * 4 + 10 + 10 * 4  # and the place of each row
    assert second.operand_bytes == 32  # 10 rows of 3 codes of 4 bits, 2 bytes each, to the next 16
    assert second.weight_bytes == 3 * 32
    assert (second.weight_step_bytes, second.weight_fp32_bytes, second.input_fp32_bytes, second.operand_fp32_bytes) == (
        12,
        480,
        1600,
        120,
    )
    assert report.packed_bytes == 32 + 320 + 160 + 32
    assert report.fp32_bytes == 800 + 1600 + 1600 + 120


def test_bytes_reported_are_those_stored():
    torch.manual_seed(10)
    data = graph_data()
    frozen = qgnn.freeze(trained(pyg.GCN(24, 64, 2, 5), "a2q", data), data)
    with frozen.recording() as outputs:
        frozen(data.x, data.edge_index)
    rows = [outputs["convs_0_codec"][0], outputs["convs_0_sum"][0]]
    operands = [outputs["convs_0_product"][0], outputs["convs_1_product"][0]]
    for i, record in enumerate(frozen.report.layers):
        assert record.code_bytes == rows[i].data.untyped_storage().nbytes()
        assert record.operand_bytes == operands[i].untyped_storage().nbytes()
        assert record.weight_bytes == frozen.parts[f"convs_{i}_product"].weight.untyped_storage().nbytes()
        assert record.average_bits == frozen.parts[f"convs_{i}_codec"].bits.float().mean().item()


def test_codes_that_differ_are_counted_with_their_reason(monkeypatch):
    """A code changed where its value lies at a border is a tie; what changes because of it is inherited."""
    torch.manual_seed(1)
    data = graph_data()
    model = trained(PYG["gcn"](), "int8", data)
    clean = qgnn.freeze(model, data)
    assert (clean.report.ties, clean.report.inherited) == (0, 0)
    call = Codec.forward

    def one_wrong(self, x, graph=None):
        packed = call(self, x, graph)
        if self.layer == "convs.0" and self.spec.normalize:
            packed.data[0] += 1
        return packed

    monkeypatch.setattr(Codec, "forward", one_wrong)
    report = qgnn.freeze(model, data).report
    first = report.layers[0]
    assert first.differing_codes == 1 and first.ties + first.inherited == 1 + first.differing_operand_codes
    assert report.inherited >= first.differing_operand_codes > 0
    assert first.max_difference > 0 and report.max_difference > clean.report.max_difference
    monkeypatch.undo()
    # values at the border of two codes: a step of 2 and odd values
    part = Operand("layer", torch.full((24,), 2.0), torch.full((24,), 8, dtype=torch.uint8))
    from qgnn.freeze import _map

    values = torch.ones(3, 24)
    data_bytes = part(values)
    data_bytes[:24] -= 1
    compared = _map(part, data_bytes, values, nn.Identity())
    assert (int(compared.differing.sum()), compared.ties()) == (24, 24)


def test_the_report_is_a_table():
    torch.manual_seed(2)
    data = graph_data()
    model = trained(pyg.GraphSAGE(24, 16, 2, 5, aggr="max"), "int8", data)
    model.convs[1] = qgnn.convert(pyg.GCNConv(16, 5), "int8")
    model.supports_edge_weight = False
    with torch.no_grad():
        model(data.x, data.edge_index)
    report = qgnn.freeze(model, data).report
    head, first, second, total = str(report).splitlines()
    assert head.split()[:4] == ["layer", "kind", "bits", "launches"]
    assert first.split() == ["convs.0", "float", "-", "0", "0", "0", "0", "0", "max", "is", "no", "sum"]
    assert second.split()[:4] == ["convs.1", "gcn", "8.00", "3"]
    assert f"{report.ties} codes by ties" in total


def test_without_data_there_is_no_report():
    torch.manual_seed(2)
    data = graph_data()
    model = trained(PYG["gin"](), "int8", data)
    frozen = qgnn.freeze(model)
    assert frozen.report is None and frozen.bound is None
    assert frozen.inputs == ["x", "edge_index"]
    assert torch.equal(frozen(data.x, data.edge_index), qgnn.freeze(model, data)())


# -- the frozen model --------------------------------------------------------------------------------------------------------------------------


def test_the_model_is_not_changed():
    torch.manual_seed(11)
    data = graph_data()
    for scheme in SCHEMES:
        model = trained(pyg.GCN(24, 16, 2, 5, dropout=0.5), scheme, data).train()
        model.convs[1].eval()
        before = copy.deepcopy(model.state_dict())
        modes = [m.training for m in model.modules()]
        frozen = qgnn.freeze(model, data)
        assert [m.training for m in model.modules()] == modes
        assert str(model.state_dict()) == str(before)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        out = frozen()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        assert torch.equal(frozen(), out)  # nor does it share memory with it


@pytest.mark.parametrize("kind", ["gcn", "gat", "gin", "sage"])
def test_bound_and_called_give_the_same_bits_every_time(kind):
    import numba  # the other tests of this file need none

    torch.manual_seed(12)
    data = graph_data()
    for scheme in ("int8", "a2q"):
        frozen = qgnn.freeze(trained(PYG[kind](), scheme, data), data)
        out = frozen()
        assert torch.equal(frozen(), out)
        assert torch.equal(frozen(data.x, data.edge_index), out)
        assert torch.equal(frozen(edge_index=data.edge_index, x=data.x), out)
        assert torch.equal(frozen(data.x.double(), Graph.from_edge_index(data.edge_index, NODES)), out)
        before = numba.get_num_threads()
        try:
            for threads in {1, before}:
                numba.set_num_threads(threads)
                assert torch.equal(frozen(), out)
        finally:
            numba.set_num_threads(before)
        if kind != "gat":  # integer sums do not depend on the order of edges
            assert torch.equal(frozen(data.x, Graph.from_edge_index(data.edge_index, NODES, sort=False)), out)
            order = torch.randperm(data.num_edges)
            assert torch.equal(frozen(data.x, data.edge_index[:, order]), out)
        assert frozen.bind(data.x, data.edge_index) is frozen
        assert torch.equal(frozen(), out)
        assert not out.requires_grad


def test_concurrent_inference():
    torch.manual_seed(13)
    data, other = graph_data(), graph_data(nodes=23)
    frozen = qgnn.freeze(trained(PYG["gcn"](), "int8", data), data)
    expected = [frozen(), frozen(other.x, other.edge_index)]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            results = [frozen(), frozen(other.x, other.edge_index.clone())]
            if not all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)):
                wrong.append("another result")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("kind", ["gcn", "gat", "gin", "sage"])
def test_unseen_graph_with_per_tensor_ranges(kind):
    torch.manual_seed(13)
    data, other = graph_data(), graph_data(nodes=23)
    model = trained(PYG[kind](), "dq-int8", data)
    frozen = qgnn.freeze(model, data)
    with torch.no_grad():
        expected = model(other.x, other.edge_index)
    out = frozen(other.x, other.edge_index)
    assert out.shape == (23, 5)
    # 8 bits: one tie is worth 1/127 of the largest operand
    assert (out - expected).abs().max() <= 0.02 * expected.abs().max()


def test_node_level_a2q_is_tied_to_its_graph():
    torch.manual_seed(14)
    data, other = graph_data(), graph_data(nodes=23)
    frozen = qgnn.freeze(trained(PYG["gcn"](), "a2q", data), data)
    with pytest.raises(
        ValueError, match=r"has steps for 40 nodes, the graph has 23: node-level A2Q is tied to its graph"
    ):
        frozen(other.x, other.edge_index)


@pytest.mark.parametrize("kind", ["gcn", "gat", "gin", "sage"])
@pytest.mark.parametrize("scheme", ["int8", "a2q"])
@pytest.mark.parametrize("nodes", [0, 1])
def test_tiny_graphs(scheme, nodes, kind):
    torch.manual_seed(15)
    data = Data(x=torch.randn(nodes, 24), edge_index=torch.empty(2, 0, dtype=torch.long))
    model = trained(PYG[kind](), scheme, data, steps=1)
    frozen = qgnn.freeze(model, data)
    assert frozen().shape == (nodes, 5)
    assert frozen.report.ties == 0
    torch.testing.assert_close(frozen(), model(data.x, data.edge_index).detach())


def test_moving_takes_the_bound_data_along():
    data = graph_data()
    frozen = qgnn.freeze(trained(PYG["gcn"](), "a2q", data), data).to("meta")
    assert {t.device.type for t in frozen.buffers()} == {"meta"}
    packed, graph = (next(v for v in frozen.bound if isinstance(v, kind)) for kind in (tuple, Graph))
    assert packed.data.device.type == packed.scale.device.type == graph.device.type == "meta"


def test_copies_and_pickles():
    data = graph_data()
    frozen = qgnn.freeze(trained(PYG["sage"](), "a2q", data), data)
    other = copy.deepcopy(frozen)
    assert torch.equal(other(), frozen())
    assert not {id(t) for t in other.buffers()} & {id(t) for t in frozen.buffers()}
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(data.x, data.edge_index), frozen())


def test_graphs_are_not_kept_alive():
    torch.manual_seed(16)
    data = graph_data()
    frozen = qgnn.freeze(trained(PYG["gcn"](), "int8", data), data)
    graph = Graph.from_edge_index(data.edge_index, NODES)
    frozen(data.x, graph)
    gone = weakref.ref(graph)
    del graph
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", ["gcn", "gat", "gin", "sage", "gcn-bn-cat"])
def test_torch_compile_takes_the_whole_model(kind):
    torch.manual_seed(20)
    data, other = graph_data("binary"), graph_data("binary", nodes=23)
    frozen = qgnn.freeze(trained(PYG[kind](), "int8", data), data)
    torch._dynamo.reset()
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager", dynamic=True)
    assert torch.equal(compiled(data.x, data.edge_index), frozen())
    assert torch.equal(compiled(other.x, other.edge_index), frozen(other.x, other.edge_index))
    if frozen.report.layers[0].coding == "binary":
        with pytest.raises(RuntimeError, match=r"was trained on rows of 0 and one constant"):
            compiled(torch.randn(23, 24), other.edge_index)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(frozen, fullgraph=True, backend="eager")(), frozen())
    graph = Graph.from_edge_index(data.edge_index, NODES)
    frozen(data.x, graph)  # what is derived from a graph is derived at its first use
    assert torch.equal(torch.compile(frozen, fullgraph=True, backend="eager")(data.x, graph), frozen())
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["gcn", "gat", "gin", "sage", "pooled"])
@pytest.mark.parametrize("scheme", ["int8", "a2q-nns-m20"])
def test_export_round_trip(kind, scheme):
    torch.manual_seed(21)
    data = batch_data() if kind == "pooled" else graph_data()
    frozen = qgnn.freeze(trained(Pooled() if kind == "pooled" else PYG[kind](), scheme, data), data)
    nodes, edges = torch.export.Dim("nodes", min=2), torch.export.Dim("edges", min=2)
    shapes = ({0: nodes}, {1: edges}, {0: nodes})[: len(frozen.inputs)]
    program = torch.export.export(frozen, tuple(inputs_of(data)), dynamic_shapes=(shapes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    assert torch.equal(loaded(*inputs_of(data)), frozen())
    other = Batch.from_data_list([graph_data(nodes=n) for n in (5, 9)]) if kind == "pooled" else graph_data(nodes=23)
    assert torch.equal(loaded(*inputs_of(other)), frozen(*inputs_of(other)))


class Odd(nn.Module):
    """A summand with one row, names of ModuleDict's own, parameters whose names meet, a layer of fewer rows, PyG's style of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.update, self.head = pyg.GCNConv(24, 16), nn.GRUCell(16, 16), nn.Linear(16, 3)
        self.w = nn.ParameterDict({"a": nn.Parameter(torch.full((16,), 2.0))})
        self.w_a, self.token = nn.Parameter(torch.full((16,), 3.0)), nn.Parameter(torch.randn(1, 3))

    def forward(self, data):
        x, edge_index = data.x, data.edge_index
        h = self.conv(x, edge_index) * self.w["a"] + self.w_a
        h = self.update(h, h).relu()
        return self.head(pyg.global_mean_pool(h, data.batch)) + self.token


def test_what_happens_to_fit_the_data_at_hand(tmp_path):
    torch.manual_seed(27)
    one = Batch.from_data_list([graph_data(nodes=9)])
    model = qgnn.convert(Odd(), "int8")
    for _ in range(3):
        model(one)
    model.eval()
    frozen = qgnn.freeze(model, one)
    with torch.no_grad():
        torch.testing.assert_close(frozen(), model(one), rtol=1e-4, atol=1e-4)
        four = batch_data()
        torch.testing.assert_close(frozen(four), model(four), rtol=0.05, atol=0.05)
    assert frozen.floats == {"update": "GRUCell is no layer of qgnn"}


def test_summands_are_checked_where_they_are_read():
    torch.manual_seed(28)
    data = graph_data()
    model = Net(skip_only)
    model.second = pyg.GCNConv(16, 16)
    frozen = qgnn.freeze(trained(model, "int8", data), data)
    with frozen.recording() as outputs:
        frozen(data.x, data.edge_index)
    product, total = frozen.parts["second_product"], frozen.parts["second_sum"]
    (packed,) = outputs["second_product"]
    assert product.following
    with pytest.raises(ValueError, match=r"what layer second is added to must be \[40, 16\], got \[1, 16\]"):
        total(packed, Graph.from_edge_index(data.edge_index, NODES), torch.zeros(1, 16))


def skip_only(model, x, edge_index):
    h = model.first(x, edge_index)
    return model.second(h.relu(), edge_index) + h


def test_our_models_of_graphs_are_saved_compiled_and_bound(tmp_path):
    torch.manual_seed(29)
    data = batch_data()
    model = models.GraphGCN(24, 8, 3, 2, scheme="int8")
    for _ in range(3):
        model(*inputs_of(data)).sum().backward()
    frozen = qgnn.freeze(model.eval(), data)
    qgnn.save(frozen, tmp_path / "model")
    assert torch.equal(qgnn.load(tmp_path / "model")(*inputs_of(data)), frozen())
    torch._dynamo.reset()
    compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs_of(data)), frozen())
    torch._dynamo.reset()


def test_a_change_of_type_changes_nothing():
    data = graph_data()
    frozen = qgnn.freeze(trained(PYG["gcn"](), "int8", data), data)
    before = frozen()
    assert torch.equal(frozen.half()(), before) and torch.equal(frozen.double()(data.x, data.edge_index), before)


def test_a_cuda_graph_needs_a_gpu():
    data = graph_data()
    model = trained(PYG["gcn"](), "int8", data)
    with pytest.raises(ValueError, match=r"a CUDA graph needs the model on a GPU"):
        qgnn.freeze(model, data, cuda_graph=True)
    with pytest.raises(ValueError, match=r"a CUDA graph is of the data that are bound: pass data"):
        qgnn.freeze(model, cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["gcn", "gat", "gin", "sage"])
def test_a_cuda_graph_replays_the_launches(kind):
    torch.manual_seed(22)
    data = graph_data()
    model = trained(PYG[kind](), "int8", data).to("cuda")
    data = data.to("cuda")
    frozen = qgnn.freeze(model, data, cuda_graph=True)
    first = frozen()
    assert torch.equal(first, frozen(data.x, data.edge_index))
    assert torch.equal(frozen(), first)


# -- what integers do not run ------------------------------------------------------------------------------------------------------------------


def call_with_weights(model, x, edge_index):
    return model.second(model.first(x, edge_index, edge_weight=torch.ones(160)).relu(), edge_index)


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (lambda: Net(call_with_weights), "first", "it uses edge weights; integer sums have none"),
        (lambda: pyg.GraphSAGE(24, 16, 2, 5, aggr="max"), "convs.0", "max is no sum"),
    ],
)
def test_layers_that_stay_in_float_are_listed(make, name, reason, caplog, tmp_path):
    torch.manual_seed(23)
    data = graph_data()
    model = make()
    if name == "convs.0":
        model.convs[1] = pyg.GCNConv(16, 5)
        model.supports_edge_weight = False
    model = trained(model, "int8", data)
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    record = next(r for r in frozen.report.layers if r.name == name)
    assert (record.kind, record.reason, record.launches) == ("float", reason, 0)
    assert f"layer {name} stays in float: {reason}" in caplog.text
    with pytest.raises(
        ValueError, match=rf"save cannot write {name.replace('.', '_')}_float \(\w+Conv\), which stays in float"
    ):
        qgnn.save(frozen, tmp_path / "model")


def test_skipped_layers_stay_in_float(tmp_path):
    torch.manual_seed(24)
    data = batch_data()
    model = qgnn.convert(Pooled(), "int8", skip=("head",)).train()
    for _ in range(3):
        model(*inputs_of(data))
    model.eval()
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    assert frozen.floats == {f"head.lins.{i}": "Linear is no layer of qgnn" for i in (0, 1)}
    qgnn.save(frozen, tmp_path / "model")
    assert torch.equal(qgnn.load(tmp_path / "model")(*inputs_of(data)), frozen())


def statement(h):
    F.relu(h, inplace=True)
    return h


def alias(h):
    before = h
    F.elu(h, inplace=True)
    return before


def assigned(h):
    h[0] = 1.0
    return h


def updated(h):
    """torch.fx takes `+=` for a new value, and `before` for the old one."""
    before = h
    h += 1
    return before


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda m, x, e: m.second(m.first(x, e).relu(), e) if x.sum() > 0 else m.first(x, e),
            "freeze follows the forward code once for all inputs, and that of the model depends on values or sizes",
        ),
        (
            lambda m, x, e: m.second(F.dropout(m.first(x, e), 0.5), e),
            r"here one is always on: pass training=self\.training",
        ),
        (lambda m, x, e: x, "the model has no layer of qgnn that runs; convert it first"),
        (lambda m, x, e: m.second(statement(m.first(x, e)), e), "changes a value in place, with relu, that it reads elsewhere"),
        (lambda m, x, e: m.second(alias(m.first(x, e)), e), "changes a value in place, with elu, that it reads elsewhere"),
        (lambda m, x, e: m.second(m.first(x.add_(1.0), e), e), "changes a value in place, with add_, that it reads elsewhere or was given"),
        (lambda m, x, e: m.second(assigned(m.first(x, e)), e), "object does not support item assignment; use torch functions"),
        (lambda m, x, e: m.second(updated(m.first(x, e)), e), "what it saw computes something else"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed(forward, message):
    torch.manual_seed(17)
    data = graph_data()
    model = qgnn.convert(Net(forward), "int8").eval()
    with torch.no_grad():
        chain(model, data.x, data.edge_index)
    with pytest.raises(ValueError, match=message):
        qgnn.freeze(model, data)


def test_a_layer_used_twice():
    torch.manual_seed(25)
    data = graph_data()
    model = Net(lambda m, x, e: m.first(m.first(x, e).relu(), e))
    model.first = pyg.GCNConv(24, 24)
    model = trained(model, "int8", data)
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    assert sum(isinstance(part, Product) for part in frozen.parts.values()) == 2


def test_layers_over_other_edges():
    torch.manual_seed(26)
    data = graph_data()
    model = trained(Net(lambda m, x, e: m.second(m.first(x, e).relu(), e.flip(0))), "int8", data)
    frozen = qgnn.freeze(model, data)
    assert_agrees(model, data, frozen)
    assert sum(isinstance(part, Sum) for part in frozen.parts.values()) == 2


def test_keyword_arguments_are_fine():
    torch.manual_seed(18)
    data = graph_data()
    model = trained(
        Net(lambda m, x, e: m.second(x=torch.relu(input=m.first(edge_index=e, x=x)), edge_index=e)), "int8", data
    )
    assert_agrees(model, data, qgnn.freeze(model, data))


def test_models_that_are_not_ready():
    data = graph_data()
    with pytest.raises(ValueError, match=r"layer first: GCNConv is no layer of qgnn; convert the model"):
        qgnn.freeze(Net(chain), data)
    with pytest.raises(ValueError, match=r"nothing in this model runs on integers; layer first: it is not quantized"):
        qgnn.freeze(qgnn.convert(Net(chain), "fp32"), data)
    for scheme in (*SCHEMES, "a2q-nns"):
        model = qgnn.convert(Net(chain), scheme, num_nodes=NODES)
        before = str(model.state_dict())
        with pytest.raises(ValueError, match=r"layer first has seen no data, .* train or calibrate the model first"):
            qgnn.freeze(model, data)
        assert str(model.state_dict()) == before
    for scheme in ("fp16", "bi"):
        with pytest.raises(ValueError, match=rf"layer first: scheme {scheme} is a float baseline"):
            qgnn.freeze(trained(Net(chain), scheme, data), data)
    model = trained(Net(chain), "int8", data)
    qgnn.quant.set_enabled(model, False)
    with pytest.raises(ValueError, match=r"layer first is not quantized: its quantizers are off"):
        qgnn.freeze(model, data)


def test_data_that_do_not_fit():
    torch.manual_seed(19)
    data = graph_data()
    model = trained(Net(chain), "int8", data)
    frozen = qgnn.freeze(model, data)
    with pytest.raises(ValueError, match=r"freeze needs data with edge_index, which the model's forward takes"):
        qgnn.freeze(model, Data(x=data.x))
    bad = data.x.clone()
    bad[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"x\[3, 4\] is nan; quantization needs finite values"):
        qgnn.freeze(model, Data(x=bad, edge_index=data.edge_index))
    with pytest.raises(ValueError, match=r"x\[3, 4\] is nan"):
        frozen(bad, data.edge_index)
    with pytest.raises(ValueError, match=r"x of layer first must be a tensor \[N, 24\], got \[40, 23\]"):
        frozen(data.x[:, 1:], data.edge_index)
    for arguments in ([data.x], [data.x, data.edge_index, None]):
        with pytest.raises(ValueError, match=r"pass x and edge_index, or nothing to run on what was bound"):
            frozen(*arguments)
    frozen.bound = None
    with pytest.raises(ValueError, match=r"no data bound: pass x, edge_index, or call bind\(x, edge_index\) first"):
        frozen()
    binary = graph_data("binary")
    frozen = qgnn.freeze(trained(Net(chain), "a2q", binary), binary)
    with pytest.raises(
        ValueError,
        match=r"row 0 of the input has several nonzero values, but the model was trained on rows of 0 and one constant",
    ):
        frozen(data.x, data.edge_index)


def test_headroom_of_sums_and_products():
    data = graph_data()
    frozen = qgnn.freeze(trained(Net(chain), "int8", data), data)
    graph = Graph.from_edge_index(data.edge_index, NODES)
    graph.with_self_loops.max_degree = 2**24
    with pytest.raises(ValueError, match=r"int32 sums of 8-bit codes could overflow"):
        frozen(data.x, graph)
    wide = Data(x=torch.zeros(2, 65_794), edge_index=torch.empty(2, 0, dtype=torch.long))
    layer = qgnn.convert(pyg.GCNConv(65_794, 2), "int8").eval()
    layer(wide.x, wide.edge_index)
    assert type(layer) is GCNConv
    with pytest.raises(ValueError, match=r"65794 products of 8-bit codes could overflow int32"):
        qgnn.freeze(layer, wide)
