"""export_workload: the accelerator gets the layers, the graph and the widths that the kernels read; architectures and files, by name."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch_geometric.nn as pyg
from torch import nn
from torch_geometric.data import Batch, Data, HeteroData
from torch_geometric.utils import add_remaining_self_loops

import qgnn
from qgnn import Graph, accel, models
from qgnn.export import architecture_workload, workload_from
from qgnn.parts import Codec
from qgnn.quant import LayerQuantizer, parse
from qgnn.quant.a2q import LearnedQuantizer
from qgnn.recipes import recipe_for
from qgnn.train import build

NODES = 30
SCHEMES = ("int8", "dq-int4", "a2q")


def graph_data(nodes: int = NODES, binary: bool = False) -> Data:
    """A graph with self loops, duplicate edges and rows without edges."""
    x = (torch.rand(nodes, 24) > 0.7).float() if binary else torch.randn(nodes, 24)
    return Data(x=x, edge_index=torch.randint(0, nodes, (2, 2 * nodes)))


def batch_data() -> Batch:
    return Batch.from_data_list([graph_data(n) for n in (7, 1, 12)])


def calibrated(model: nn.Module, scheme: str, data: Data) -> nn.Module:
    """A converted model with ranges; learned widths are spread, as training does, while the largest values of groups stay about as they were."""
    model = qgnn.calibrate(qgnn.convert(model, scheme, num_nodes=data.num_nodes), data).eval()
    for quantizer in model.modules():
        if isinstance(quantizer, LearnedQuantizer):
            before = quantizer.bits.detach().clone()
            nn.init.uniform_(quantizer.bits, 1, 8)
            if quantizer.scheme.groups:  # the largest value is nearly the step times 2^bits
                noise = 0.1 * torch.rand_like(before)  # and steps differ
                quantizer.log_step.data += noise + math.log(2) * (before - quantizer.bits.detach())
    return model


def learned_widths(model: nn.Module, nodes: int) -> dict[str, torch.Tensor]:
    """Width of every node in each layer's input, from its quantizer (NUMERICS 1: learned widths are rounded half to even)."""
    widths = {}
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, LayerQuantizer):
            learned = isinstance(quantizer, LearnedQuantizer) and quantizer.kind != "binary"
            fixed = 1 if quantizer.kind == "binary" else quantizer.scheme.bits
            widths[name.removesuffix(".quantizer")] = (
                quantizer.bits.detach().round() if learned else torch.full((nodes,), fixed)
            )
    return widths


def shapes(workload: accel.Workload) -> list[tuple]:
    return [(layer.name, layer.f_in, layer.f_out, layer.kind, layer.heads) for layer in workload.layers]


def edges(workload: accel.Workload) -> list[list[int]]:
    rows = np.repeat(np.arange(workload.num_nodes), workload.degrees)
    return sorted(np.stack([workload.indices, rows]).T.tolist())


class Net(nn.Module):
    """Two layers, called by ``function``."""

    def __init__(self, first: nn.Module, second: nn.Module, function=None) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.function = function or (lambda m, x, e: m.second(m.first(x, e).relu(), e))

    def forward(self, x, edge_index):
        return self.function(self, x, edge_index)


# By hand. A sum runs after the product where that has fewer columns than the features ("gcn"), else before it.
MODELS = {
    "gcn": (
        lambda: pyg.GCN(24, 16, 2, 5),
        [("convs.0", 24, 16, "gcn", 1), ("convs.1", 16, 5, "gcn", 1)],
    ),
    "gcn-norm-cat": (
        lambda: pyg.GCN(24, 16, 2, 5, norm="batch_norm", jk="cat"),
        [("convs.0", 24, 16, "gcn", 1), ("convs.1", 16, 16, "gcn", 1), ("lin", 32, 5, "linear", 1)],
    ),
    "gat": (  # four heads of 4 columns side by side, then the mean of four of 5
        lambda: pyg.GAT(24, 16, 2, 5, heads=4),
        [("convs.0.lin", 24, 16, "gat", 4), ("convs.1.lin", 16, 20, "gat", 4)],
    ),
    "gin": (  # PyG's MLP runs after the sum
        lambda: pyg.GIN(24, 16, 1, 5, norm="batch_norm"),
        [("convs.0.nn.lins.0", 24, 5, "gin", 1), ("convs.0.nn.lins.1", 5, 5, "linear", 1)],
    ),
    "sage": (
        lambda: pyg.GraphSAGE(24, 40, 2, 5),
        [
            ("convs.0.lin_r", 24, 40, "linear", 1),
            ("convs.0.lin_l", 24, 40, "sage", 1),
            ("convs.1.lin_r", 40, 5, "linear", 1),
            ("convs.1.lin_l", 40, 5, "gcn", 1),
        ],
    ),
    "sage-project": (
        lambda: Net(pyg.SAGEConv(24, 40, project=True, root_weight=False), pyg.SAGEConv(40, 5, root_weight=False)),
        [
            ("first.lin", 24, 24, "linear", 1),
            ("first.lin_l", 24, 40, "sage", 1),
            ("second.lin_l", 40, 5, "gcn", 1),
        ],
    ),
    "our-gin": (  # a Linear to fewer columns runs before the sum
        lambda: models.GIN(24, 16, 5, mlp_layers=2),
        [
            ("convs.0.nn.0", 24, 16, "gcn", 1),
            ("convs.0.nn.3", 16, 16, "linear", 1),
            ("convs.1.nn.0", 16, 16, "gin", 1),
            ("convs.1.nn.3", 16, 5, "linear", 1),
        ],
    ),
    "skip": (
        lambda: models.GCN(24, 16, 5, num_layers=3, skip=True),
        [("convs.0", 24, 16, "gcn", 1), ("convs.1", 16, 16, "gcn", 1), ("convs.2", 16, 5, "gcn", 1)],
    ),
    "linear-gin": (  # the sum belongs to the GIN, though it reads what a Linear gave
        lambda: Net(
            nn.Linear(24, 8), pyg.GINConv(nn.Sequential(nn.Linear(8, 9))), lambda m, x, e: m.second(m.first(x), e)
        ),
        [("first", 24, 8, "linear", 1), ("second.nn.0", 8, 9, "gin", 1)],
    ),
}  # fmt: skip
LOOPS = ("gcn", "gcn-norm-cat", "gat", "skip")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", MODELS)
def test_layers_widths_and_graph(kind, scheme):
    torch.manual_seed(0)
    data = graph_data(binary=kind == "gcn")
    make, expected = MODELS[kind]
    model = calibrated(make(), scheme, data)
    frozen = qgnn.freeze(model, data)
    workload = qgnn.export_workload(frozen, data)
    assert shapes(workload) == expected
    widths = learned_widths(model, NODES)
    averages = {record.name: record.average_bits for record in frozen.report.layers if record.coding}
    assert list(averages) != [] and set(averages) == {layer.name for layer in workload.layers}
    for layer in workload.layers:
        assert layer.bits.dtype == np.uint8
        assert layer.bits.tolist() == widths[layer.name].tolist()
        # float32 means of at most 8: 2^-24 relative for each of the 30 sums
        assert float(layer.bits.mean()) == pytest.approx(averages[layer.name], rel=1e-5)
        assert layer.binary_input == (kind == "gcn" and layer.name == "convs.0")
        assert layer.nns_groups == 0
    given = add_remaining_self_loops(data.edge_index, num_nodes=NODES)[0] if kind in LOOPS else data.edge_index
    assert edges(workload) == sorted(given.t().tolist())


def test_the_arrays_are_those_of_the_graph():
    torch.manual_seed(1)
    data = graph_data()
    model = calibrated(pyg.GCN(24, 16, 2, 5), "int8", data)
    data.edge_index = Graph.from_edge_index(data.edge_index, NODES)
    workload = qgnn.export_workload(model, data)
    read = data.edge_index.with_self_loops
    assert workload.num_edges > data.edge_index.num_edges
    assert np.shares_memory(workload.indptr, read.indptr.numpy())
    assert np.shares_memory(workload.indices, read.indices.numpy())


@pytest.mark.parametrize("scheme", ["int8", "a2q"])
def test_trained_frozen_and_loaded_models_are_one_workload(scheme, tmp_path):
    torch.manual_seed(2)
    data = graph_data()
    model = calibrated(pyg.GAT(24, 16, 2, 5, heads=4), scheme, data)
    before = copy.deepcopy(model.state_dict())
    workload = qgnn.export_workload(model, data, name="gat")
    assert workload.name == "gat" and not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if torch.is_tensor(value))
    frozen = qgnn.freeze(model, data)
    qgnn.save(frozen, tmp_path / "model")
    for other in (frozen, qgnn.load(tmp_path / "model"), qgnn.freeze(model)):
        assert qgnn.export_workload(other, data).fingerprint() == workload.fingerprint()


def test_layers_without_a_graph():
    torch.manual_seed(3)
    data = Data(x=torch.rand(NODES, 24))
    model = calibrated(pyg.MLP([24, 16, 5], norm="batch_norm"), "int4", data)
    workload = qgnn.export_workload(model, data)
    assert shapes(workload) == [("lins.0", 24, 16, "linear", 1), ("lins.1", 16, 5, "linear", 1)]
    assert (workload.num_nodes, workload.num_edges) == (NODES, 0)
    assert all((layer.bits == 4).all() for layer in workload.layers)


def test_rows_of_ones_are_marked_whatever_their_width():
    torch.manual_seed(4)
    data = graph_data()
    model = calibrated(pyg.GCN(24, 16, 2, 5), "int8", data)  # so that the kind of the input is "signed"
    data.x = graph_data(binary=True).x
    first, second = qgnn.export_workload(model, data).layers
    assert first.binary_input and (first.bits == 8).all()
    assert not second.binary_input


@pytest.fixture(scope="module")
def proteins(citation_root):
    return Batch.from_data_list(list(qgnn.data.load("PROTEINS", citation_root).graphs[:24]))


@pytest.mark.parametrize("architecture", [models.PooledGIN, models.GraphGCN])
def test_groups_that_the_nodes_of_proteins_take(architecture, proteins, caplog):
    torch.manual_seed(5)
    batch = proteins
    model = calibrated(architecture(batch.x.size(1), 16, 2, 2), "a2q-nns-m9", batch)
    frozen = qgnn.freeze(model, batch)
    with frozen.recording() as outputs:
        frozen(batch.x, batch.edge_index, batch.batch)
    workload = qgnn.export_workload(frozen, batch)
    if architecture is models.PooledGIN:
        hidden = [f"convs.{i}.nn.{j}" for i in range(2) for j in (0, 2)]
        left_out = "lin1, lin2"
    else:
        hidden, left_out = ["embedding", "convs.0", "convs.1"], "mlp.0, mlp.2, mlp.4"
    assert [layer.name for layer in workload.layers] == hidden
    assert f"left out, as their rows are not the nodes of the graph: {left_out}" in caplog.text
    spread = 0
    for layer in workload.layers:
        (name,) = (n for n, part in frozen.parts.items() if isinstance(part, Codec) and part.layer == layer.name)
        codec, ((_, scale),) = frozen.part(name), outputs[name]
        if codec.spec.normalize:
            scale = scale * torch.from_numpy(workload.degrees).sqrt()
        # the kernel gives every row the step of its group, and steps differ, so that the nearest one names the group
        group = (scale.unsqueeze(1) / codec.step - 1).abs().argmin(1)
        assert codec.step.unique().numel() == 9
        assert layer.bits.tolist() == codec.bits[group].tolist()
        assert layer.nns_groups == 9
        spread = max(spread, len(set(layer.bits.tolist())))
    assert spread > 1, "all nodes have one width, so that their order shows nowhere"


def test_the_simulator_takes_it():
    """Operations of ACCELERATOR's formulas, by hand: N F_in F_out of every product, and E C of every sum."""
    torch.manual_seed(6)
    data = graph_data()
    model = calibrated(pyg.GraphSAGE(24, 40, 2, 5), "a2q", data)
    workload = qgnn.export_workload(model, data)
    total = accel.simulate(workload, accel.load_config("paper-table")).total
    assert total.int_macs == NODES * (2 * 24 * 40 + 2 * 40 * 5)
    assert total.aggregation_adds == data.num_edges * (24 + 5)
    memory = accel.simulate(workload).memory
    found = qgnn.quant.averages(qgnn.quant.feature_maps(model, NODES))
    assert memory.average_bits_by_layer == pytest.approx(found.average_bits, rel=1e-6)
    assert memory.average_bits_by_dimension == pytest.approx(found.average_bits_dim, rel=1e-6)


# What the accelerator does not run


class Unused(nn.Module):
    """Has a Linear, which says how many features there are, and leaves it out."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(24, 30)

    def forward(self, h):
        return h


class Bipartite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg.SAGEConv((24, 6), 5)

    def forward(self, x, target, edge_index):
        return self.conv((x, target), edge_index)


def weighted(model, x, edge_index):
    return model.second(model.first(x, edge_index, torch.ones(edge_index.size(1))).relu(), edge_index)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Net(pyg.GCNConv(24, 16), pyg.GCNConv(16, 5), weighted),
            "layers stay in float: first: it uses edge weights; integer sums have none",
        ),
        (
            lambda: Net(pyg.GCNConv(24, 16), pyg.GCNConv(16, 5), lambda m, x, e: m.second(m.first(x, e), e.flip(0))),
            "one graph; layers first and second sum over different edges",
        ),
        (
            lambda: Net(pyg.GCNConv(24, 24), nn.Identity(), lambda m, x, e: m.first(m.first(x, e), e.flip(0))),
            "one graph; layers first and first sum over different edges",
        ),
        (
            lambda: Net(pyg.GCNConv(24, 16), pyg.SAGEConv(16, 5)),
            r"layers first and second sum over different edges \(self loops count\)",
        ),
        (
            lambda: Net(pyg.GINConv(Unused()), pyg.GINConv(nn.Linear(24, 30))),
            "before or after a product of the nodes, once for each; layer first does not",
        ),
        (
            lambda: Net(
                pyg.GINConv(Unused()), nn.Linear(48, 5), lambda m, x, e: m.second(torch.cat([m.first(x, e), x], 1))
            ),
            "once for each; layer first does not",
        ),
        (
            lambda: Net(
                pyg.GINConv(Unused()), nn.Linear(24, 5), lambda m, x, e: m.second(m.first(x, e) + m.first(-x, e))
            ),
            "once for each; layer first does not",
        ),
        (
            lambda: Net(pyg.SAGEConv(24, 16, aggr="max"), pyg.SAGEConv(16, 5)),
            "layers stay in float: first: max is no sum",
        ),
    ],
)
def test_what_the_accelerator_has_not(make, message):
    torch.manual_seed(7)
    data = graph_data()
    model = calibrated(make(), "int8", data)
    with pytest.raises(ValueError, match=message):
        qgnn.export_workload(model, data)


def test_skipped_layers_are_named():
    torch.manual_seed(8)
    data = graph_data()
    model = qgnn.calibrate(qgnn.convert(pyg.GCN(24, 16, 2, 5), "int8", skip=("convs.1",)), data)
    with pytest.raises(ValueError, match=r"layers stay in float: convs\.1: GCNConv is no layer of qgnn"):
        qgnn.export_workload(model, data)


def test_data_that_do_not_fit():
    torch.manual_seed(9)
    data = graph_data()
    frozen = qgnn.freeze(calibrated(pyg.GCN(24, 16, 2, 5), "a2q", data), data)
    with pytest.raises(ValueError, match="of one kind of nodes, and HeteroData have several"):
        qgnn.export_workload(frozen, HeteroData())
    with pytest.raises(ValueError, match="the model takes edge_index, which the data do not have"):
        qgnn.export_workload(frozen, Data(x=data.x))
    with pytest.raises(ValueError, match="steps for 30 nodes, the graph has 31: node-level A2Q is tied to its graph"):
        qgnn.export_workload(frozen, graph_data(31))
    two = Data(x=data.x, target=torch.rand(9, 6), edge_index=data.edge_index % 9)
    with pytest.raises(ValueError, match="one set of nodes; layer conv has sources and destinations"):
        qgnn.export_workload(calibrated(Bipartite(), "int8", two), two)


# By name


@pytest.mark.parametrize(
    ("model", "dataset"), [("gcn", "digits"), ("gat", "digits"), ("gin", "Cora"), ("sage", "Cora"), ("gin", "MUTAG")]
)
def test_an_architecture_is_what_would_be_trained(model, dataset, citation_root):
    """The layers and the graph of the model that training builds, calibrated on all of the data set."""
    torch.manual_seed(10)
    loaded = qgnn.data.load(dataset, citation_root)
    recipe = recipe_for(model, parse("a2q"), loaded).changed(hidden=9)
    data = Batch.from_data_list(list(loaded.graphs)) if dataset == "MUTAG" else loaded.data
    network = qgnn.calibrate(build(parse("int8"), loaded, recipe, model), data)
    expected = qgnn.export_workload(network, data)
    state = torch.random.get_rng_state()
    workload = architecture_workload(model, loaded, 5, hidden=9)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert workload.fingerprint()["graph"] == expected.fingerprint()["graph"]
    assert shapes(workload) == shapes(expected)
    assert [layer.binary_input for layer in workload.layers] == [layer.binary_input for layer in expected.layers]
    assert any(layer.binary_input for layer in workload.layers) == (dataset == "Cora")
    assert all((layer.bits == 5).all() for layer in workload.layers)
    assert workload.name == f"{dataset} {model} uniform:5"


def test_commands_take_architectures_and_files(citation_root, tmp_path):
    torch.manual_seed(11)
    by_name = workload_from("gcn", "cora", citation_root, "uniform:4", 16)
    assert shapes(by_name) == [("convs.0", 1433, 16, "gcn", 1), ("convs.1", 16, 7, "gcn", 1)]
    assert (by_name.num_nodes, by_name.num_edges) == (2708, 10556 + 2708)
    data = qgnn.data.load("digits").data
    path = tmp_path / "small.qgnn"
    frozen = qgnn.freeze(calibrated(models.GCN(64, 8, 10), "a2q", data), data)
    qgnn.save(frozen, path)
    by_file = workload_from(str(path), "digits")
    assert by_file.name == "digits small"
    assert by_file.fingerprint() == qgnn.export_workload(frozen, data).fingerprint()


def test_files_of_graphs_run_on_all_of_them(citation_root, tmp_path):
    torch.manual_seed(12)
    loaded = qgnn.data.load("MUTAG", citation_root)
    some = Batch.from_data_list(list(loaded.graphs)[:20])
    frozen = qgnn.freeze(calibrated(models.PooledGIN(7, 8, 2, 2), "a2q-nns-m6", some), some)
    qgnn.save(frozen, tmp_path / "gin")
    workload = workload_from(str(tmp_path / "gin"), "MUTAG", citation_root)
    whole = Batch.from_data_list(list(loaded.graphs))
    assert workload.num_nodes == whole.num_nodes and workload.num_edges == whole.num_edges
    assert workload.fingerprint() == qgnn.export_workload(frozen, whole).fingerprint()


def test_files_see_features_as_their_training_did(citation_root, tmp_path):
    """Groups depend on the values, and citation networks are trained on rows divided by their sums."""
    torch.manual_seed(13)
    loaded = qgnn.data.load("Cora", citation_root)
    data = copy.copy(loaded.data)
    data.x = data.x * torch.rand(data.num_nodes, 1433)  # so that rows are not binary
    data.x = data.x / data.x.sum(1, keepdim=True).clamp_min(1e-12)
    frozen = qgnn.freeze(calibrated(models.GCN(1433, 8, 7), "a2q-nns-m20", data), data)
    qgnn.save(frozen, tmp_path / "gcn")
    workload = workload_from(str(tmp_path / "gcn"), "Cora", citation_root)
    normalised = copy.copy(loaded.data)
    normalised.x = loaded.data.x / loaded.data.x.sum(1, keepdim=True).clamp_min(1e-12)
    wanted = [qgnn.export_workload(frozen, given).fingerprint()["bits"] for given in (normalised, loaded.data)]
    assert workload.fingerprint()["bits"] == wanted[0] != wanted[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dataset": None}, "the model gcn needs data: name a data set"),
        ({"bits": None}, "the architecture gcn needs widths, such as uniform:4 .*, got None"),
        ({"bits": "4"}, "such as uniform:4 for 4 bits in every node, got '4'"),
        ({"bits": "uniform:33"}, "must be 0 to 32, got 33"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"model": "gnc"}, "gnc is no model file, nor one of the architectures gcn, gat, gin, sage"),
        ({"dataset": "nowhere"}, "there is no data set 'nowhere'"),
        ({"model": __file__}, "has widths and sizes of its own; leave bits and hidden out"),
        ({"model": __file__, "bits": None}, "is damaged or no qgnn model"),
    ],
)
def test_commands_say_what_is_wrong(given, message):
    arguments = {"model": "gcn", "dataset": "digits", "bits": "uniform:4"} | given
    with pytest.raises(ValueError, match=message):
        workload_from(**arguments)
