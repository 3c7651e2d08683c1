"""freeze: the integer model computes what the fake-quantized one does, in two launches a GCN layer, and says what it takes."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.data import Data

import qgnn
from qgnn import Graph
from qgnn.freeze import _record, _report
from qgnn.nn import GCNConv

SCHEMES = ("int8", "int4", "dq-int8", "dq-int4", "a2q")
FEATURES = ("binary", "normalised", "non-negative", "signed")
NODES = 40


def graph_data(features: str = "signed", nodes: int = NODES) -> Data:
    binary = (torch.rand(nodes, 24) > 0.8).float()
    x = {
        "binary": binary,
        "normalised": binary / binary.sum(1, keepdim=True).clamp_min(1),
        "non-negative": torch.rand(nodes, 24),
        "signed": torch.randn(nodes, 24),
    }[features]
    return Data(x=x, edge_index=torch.randint(0, nodes, (2, 4 * nodes)))


def trained(model: nn.Module, scheme: str, data: Data, steps: int = 3) -> nn.Module:
    """A converted model after a few steps: fresh ranges and steps are exact ratios of the data, where ties abound."""
    model = qgnn.convert(model, scheme, num_nodes=data.num_nodes).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with qgnn.use_backend("reference"):
        for _ in range(steps):
            optimizer.zero_grad()
            model(data.x, data.edge_index).square().sum().backward()
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


def assert_agrees(model: nn.Module, data: Data, frozen: nn.Module) -> None:
    """Codes equal except counted ties, and logits within 1e-4 where there is none (NUMERICS 7)."""
    with torch.no_grad():
        expected = model(data.x, data.edge_index)
    report, out = frozen.report, frozen()
    difference = (out - expected).abs().max().item()
    assert report.max_difference == pytest.approx(difference)
    assert report.max_relative == pytest.approx(difference / expected.abs().max().item())
    codes = sum(x.numel() for x in (s.codes() for s in frozen.trace()[:-1]))
    assert report.ties <= 1e-3 * codes
    if report.ties == 0:
        assert report.max_relative < 1e-4
        assert report.mismatched_predictions == 0


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_integer_model_is_the_fake_quantized_one(scheme, features):
    ties = 0
    for seed in range(3):
        torch.manual_seed(seed)
        data = graph_data(features)
        model = trained(pyg.GCN(24, 16, 2, 5, dropout=0.5), scheme, data)
        frozen = qgnn.freeze(model, data)
        assert_agrees(model, data, frozen)
        assert [r.launches for r in frozen.report.layers] == [2, 2]
        assert frozen.chain[0].spec.coding == (
            "binary" if features in ("binary", "normalised") else "node" if scheme == "a2q" else "tensor"
        )
        ties += frozen.report.ties
    assert ties < 3


@pytest.mark.parametrize("scheme", ["dq-int4", "a2q"])
def test_on_every_backend(backend, scheme):
    torch.manual_seed(4)
    data = graph_data(nodes=12)
    model = trained(pyg.GCN(24, 9, 2, 5), scheme, data)
    with qgnn.use_backend("reference"):
        expected = qgnn.freeze(model, data)()
    data = data.to(backend)
    frozen = qgnn.freeze(model.to(backend), data)
    assert torch.equal(frozen().cpu(), expected)
    assert torch.equal(frozen(data.x, data.edge_index).cpu(), expected)


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
        assert [r.kind for r in frozen.report.layers] == ["linear", "gcn", "linear"]
        assert frozen.tail == ["log_softmax"]
        torch.testing.assert_close(frozen().exp().sum(1), torch.ones(NODES))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_batch_normalisation_is_folded(scheme):
    """A2Q eq. 18: the factors and shifts of both normalisations are in the epilogues; no launch is added, and the file keeps them."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first, self.linear, self.second = (
                pyg.GCNConv(24, 16),
                pyg.BatchNorm(16),
                nn.Linear(16, 5),
                nn.BatchNorm1d(5),
            )

        def forward(self, x, edge_index):
            return self.second(self.linear(F.dropout(self.first(self.conv(x, edge_index)).relu(), 0.5, self.training)))

    torch.manual_seed(11)
    data = graph_data()
    model = trained(Normed(), scheme, data)
    with torch.no_grad():
        for norm in (model.first.module, model.second):
            norm.weight.uniform_(-1, 2)
            norm.bias.normal_()
        trained_range = model(data.x, data.edge_index)
    frozen = qgnn.freeze(model, data)
    assert trained_range.shape == (NODES, 5)
    assert_agrees(model, data, frozen)
    assert [r.launches for r in frozen.report.layers] == [2, 1]
    torch.testing.assert_close(
        frozen.chain[1].norm_scale, model.second.weight * (model.second.running_var + 1e-5) ** -0.5
    )


def test_batch_normalisation_that_cannot_be_folded():
    torch.manual_seed(12)
    data = graph_data()
    norm = nn.BatchNorm1d(16).eval()
    model = trained(Net(lambda m, x, e: m.second(norm(m.first(x, e).relu()), e)), "int8", data)
    with pytest.raises(ValueError, match=r"batch normalisation before its first layer or after a ReLU"):
        qgnn.freeze(model, data)
    model = trained(
        Net(lambda m, x, e: m.second(F.batch_norm(m.first(x, e), None, None, training=True), e)), "int8", data
    )
    with pytest.raises(ValueError, match=r"with running statistics, in eval mode"):
        qgnn.freeze(model, data)


@pytest.mark.parametrize("scheme", ["int8", "a2q"])
@pytest.mark.parametrize(
    "arguments", [{"add_self_loops": False}, {"normalize": False}, {"bias": False}, {"improved": True}]
)
def test_variants_of_the_convolution(scheme, arguments):
    torch.manual_seed(6)
    data = graph_data()
    model = Net(chain)
    model.first, model.second = pyg.GCNConv(24, 16, **arguments), pyg.GCNConv(16, 5, **arguments)
    model = trained(model, scheme, data)
    assert_agrees(model, data, qgnn.freeze(model, data))


def test_layer_without_relu_before_another():
    torch.manual_seed(7)
    data = graph_data()
    for scheme in SCHEMES:
        model = trained(Net(lambda m, x, e: m.second(m.first(x, e), e)), scheme, data)
        assert_agrees(model, data, qgnn.freeze(model, data))


@pytest.mark.parametrize("features", ["binary", "signed"])
@pytest.mark.parametrize("scheme", ["dq-int8", "a2q"])
def test_two_launches_a_layer_and_nothing_else(scheme, features):
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    torch.manual_seed(8)
    data = graph_data(features)
    frozen = qgnn.freeze(trained(pyg.GCN(24, 16, 3, 5), scheme, data), data)
    frozen()
    names: list[str] = []
    with Operations(), torch.no_grad():
        frozen()
    assert names == ["qgnn::matmul_packed", "qgnn::aggregate_packed"] * 3


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
    states = frozen.trace()
    for record, state, layer in zip(frozen.report.layers, states, frozen.chain, strict=False):
        assert record.code_bytes == state.data.untyped_storage().nbytes()
        assert record.weight_bytes == layer.weight.untyped_storage().nbytes()
        assert record.average_bits == state.bits.float().mean().item()


def test_differing_codes_of_inputs_and_operands_are_counted():
    torch.manual_seed(1)
    data = Data(x=torch.ones(2, 1), edge_index=torch.empty(2, 0, dtype=torch.long))
    model = qgnn.convert(pyg.GCN(1, 1, 2, 1), "int8")
    model(data.x, data.edge_index)
    frozen = qgnn.freeze(model, data)
    assert frozen.report.ties == 0
    recorder, out = _record(model, data.x, data.edge_index)
    recorder.operands[model.convs[0]] += 1  # as if float rounding had gone the other way, in both nodes
    report = _report(frozen, recorder, out)
    assert [(r.differing_codes, r.differing_operand_codes) for r in report.layers] == [(0, 2), (0, 0)]
    assert report.ties == 2


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


def test_bound_and_called_give_the_same_bits_every_time():
    torch.manual_seed(12)
    data = graph_data()
    for scheme in SCHEMES:
        frozen = qgnn.freeze(trained(pyg.GCN(24, 16, 2, 5), scheme, data), data)
        out = frozen()
        assert torch.equal(frozen(), out)
        assert torch.equal(frozen(data.x, data.edge_index), out)
        assert torch.equal(frozen(data.x.double(), Graph.from_edge_index(data.edge_index, NODES)), out)
        assert torch.equal(frozen(data.x, Graph.from_edge_index(data.edge_index, NODES, sort=False)), out)
        order = torch.randperm(data.num_edges)
        assert torch.equal(frozen(data.x, data.edge_index[:, order]), out)  # integer sums do not depend on it
        assert frozen.bind(data.x, data.edge_index) is frozen
        assert torch.equal(frozen(), out)
        assert not out.requires_grad


def test_unseen_graph_with_per_tensor_ranges():
    torch.manual_seed(13)
    data, other = graph_data(), graph_data(nodes=23)
    model = trained(pyg.GCN(24, 16, 2, 5), "dq-int8", data)
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
    frozen = qgnn.freeze(trained(pyg.GCN(24, 16, 2, 5), "a2q", data), data)
    with pytest.raises(
        ValueError, match=r"has steps for 40 nodes, the graph has 23: node-level A2Q is tied to its graph"
    ):
        frozen(other.x, other.edge_index)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("nodes", [0, 1])
def test_tiny_graphs(scheme, nodes):
    torch.manual_seed(15)
    data = Data(x=torch.randn(nodes, 24), edge_index=torch.empty(2, 0, dtype=torch.long))
    model = trained(pyg.GCN(24, 16, 2, 5), scheme, data)
    frozen = qgnn.freeze(model, data)
    assert frozen().shape == (nodes, 5)
    assert frozen.report.ties == 0
    torch.testing.assert_close(frozen(), model(data.x, data.edge_index).detach())


def test_moving_takes_the_bound_data_along():
    data = graph_data()
    frozen = qgnn.freeze(trained(pyg.GCN(24, 16, 2, 5), "a2q", data), data).to("meta")
    assert frozen.bound.x.device.type == frozen.bound.scale.device.type == frozen.bound.graph.device.type == "meta"


def test_graphs_are_not_kept_alive():
    torch.manual_seed(16)
    data = graph_data()
    model = Net(lambda m, x, e: m.second(m.first(x, e).relu()))
    model.second = nn.Linear(16, 5)
    frozen = qgnn.freeze(trained(model, "int8", data), data)
    for _ in range(4):
        frozen(data.x, data.edge_index.clone())
    gc.collect()
    assert len(frozen._places) == 1


def call_with_weights(model, x, edge_index):
    return model.second(model.first(x, edge_index, edge_weight=torch.ones(edge_index.size(1))).relu(), edge_index)


def skip(model, x, edge_index):
    h = model.first(x, edge_index).relu()
    return model.second(h, edge_index) + h[:, :5]


def set_a_row(model, x, edge_index):
    h = model.first(x, edge_index).relu()
    h[0] = 1.0
    return model.second(h, edge_index)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda m, x, e: m.second(m.first(x, e).relu() + m.first.lin.weight.new_zeros(1), e),
            "freeze cannot run .*add.* on integers; it takes chains",
        ),
        (lambda m, x, e: m.second(m.first(x, e).sigmoid(), e), "freeze cannot run sigmoid on integers"),
        (set_a_row, "freeze cannot run __setitem__ on integers"),
        (lambda m, x, e: m.second(F.relu(m.first(x, e)), e) * 2, "freeze cannot run .*mul.* on integers"),
        (
            lambda m, x, e: m.second(torch.cat([m.first(x, e)]), e),
            "layer second does not take the output of the layer before it; .* without skip",
        ),
        (lambda m, x, e: m.second(x[:, :16], e), "freeze cannot run .*getitem.* on integers"),
        (skip, "freeze cannot run .*add.* on integers"),
        (
            lambda m, x, e: m.second(m.first(x.relu(), e), e),
            "applies relu before its first layer; apply it to the data instead",
        ),
        (
            lambda m, x, e: m.second(m.first(x, e).softmax(-1), e),
            "applies softmax between layers; integers run only BatchNorm and ReLU there",
        ),
        (
            lambda m, x, e: m.second(m.first(x, e), e).log_softmax(0),
            "takes log_softmax over the classes, dim=-1, got dim=0",
        ),
        (
            lambda m, x, e: m.second(m.first(x, e).relu(), e.flip(0)),
            "layer second uses other edges than the model was given",
        ),
        (call_with_weights, "layer first uses edge weights; integer sums have none"),
        (
            lambda m, x, e: torch.stack([m.second(m.first(x, e), e)])[0],
            "the model's output is not that of its last layer",
        ),
        (
            lambda m, x, e: m.second(F.dropout(m.first(x, e), 0.5), e),
            "freeze needs the model in eval mode; a dropout changed its input",
        ),
    ],
)
def test_what_integers_cannot_run(forward, message):
    torch.manual_seed(17)
    data = graph_data()
    model = qgnn.convert(Net(forward), "int8")
    with torch.no_grad():
        model(data.x, data.edge_index)
    with pytest.raises(ValueError, match=message):
        qgnn.freeze(model, data)


@pytest.mark.parametrize("kind", [pyg.GAT, pyg.GIN, pyg.GraphSAGE])
def test_convolutions_without_an_integer_layer_are_named(kind):
    data = graph_data()
    model = trained(kind(24, 8, 2, 5), "int8", data)
    with pytest.raises(ValueError, match=r"convs.0 is a \w+Conv; freeze takes chains of GCNConv and Linear"):
        qgnn.freeze(model, data)


def test_groups_cannot_be_frozen():
    data = graph_data()
    with pytest.raises(ValueError, match=r"a2q-nns chooses steps as values come"):
        qgnn.freeze(trained(Net(chain), "a2q-nns", data), data)


def test_a_layer_used_twice():
    data = graph_data()
    model = Net(lambda m, x, e: m.first(m.first(x, e).relu(), e))
    model.first = pyg.GCNConv(24, 24)
    with pytest.raises(ValueError, match=r"layer first is used twice; freeze takes chains"):
        qgnn.freeze(trained(model, "int8", data, steps=1), data)


def test_keyword_arguments_are_fine():
    torch.manual_seed(18)
    data = graph_data()
    model = trained(
        Net(lambda m, x, e: m.second(x=torch.relu(input=m.first(edge_index=e, x=x)), edge_index=e)), "int8", data
    )
    assert_agrees(model, data, qgnn.freeze(model, data))


def test_models_that_are_not_ready():
    data = graph_data()
    with pytest.raises(ValueError, match=r"the model has no GCNConv or Linear of qgnn; convert it first"):
        qgnn.freeze(Identity(), data)
    with pytest.raises(
        ValueError, match=r"layer first is not quantized; convert the model with a scheme other than fp32"
    ):
        qgnn.freeze(qgnn.convert(Net(chain), "fp32"), data)
    for scheme in SCHEMES:
        model = qgnn.convert(Net(chain), scheme, num_nodes=NODES)
        before = str(model.state_dict())
        with pytest.raises(
            ValueError, match=r"layer first has seen no data, so it has no steps yet; train the model first"
        ):
            qgnn.freeze(model, data)
        assert str(model.state_dict()) == before
    model = trained(Net(chain), "int8", data)
    qgnn.quant.set_enabled(model, False)
    with pytest.raises(ValueError, match=r"layer first is not quantized"):
        qgnn.freeze(model, data)


class Identity(nn.Module):
    def forward(self, x, edge_index):
        return x


def test_data_that_do_not_fit():
    torch.manual_seed(19)
    data = graph_data()
    model = trained(Net(chain), "int8", data)
    frozen = qgnn.freeze(model, data)
    with pytest.raises(ValueError, match=r"freeze needs data with x and edge_index"):
        qgnn.freeze(model, Data(x=data.x))
    with pytest.raises(ValueError, match=r"data has edge weights; integer sums have none"):
        qgnn.freeze(model, Data(x=data.x, edge_index=data.edge_index, edge_weight=torch.ones(data.num_edges)))
    bad = data.x.clone()
    bad[3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"x\[3, 4\] is nan; quantization needs finite values"):
        qgnn.freeze(model, Data(x=bad, edge_index=data.edge_index))
    with pytest.raises(ValueError, match=r"x\[3, 4\] is nan"):
        frozen(bad, data.edge_index)
    with pytest.raises(ValueError, match=r"x of layer first must be a tensor \[N, 24\], got \[40, 23\]"):
        frozen(data.x[:, 1:], data.edge_index)
    with pytest.raises(ValueError, match=r"pass both x and edge_index, or neither to run on what was bound"):
        frozen(data.x)
    frozen.bound = None
    with pytest.raises(ValueError, match=r"no data bound: pass x and edge_index, or call bind\(x, edge_index\) first"):
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
