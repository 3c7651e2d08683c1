"""Activation compression: what backward keeps of float maps is packed, and nothing else changes."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qgnn
from qgnn.features import SparseFeatures
from qgnn.kernels.packing import tight_bytes
from qgnn.kernels.ranges import range_parameters
from qgnn.memory import SavedTensors
from qgnn.models import GAT, GCN, GIN, GraphSAGE, PooledGIN
from qgnn.nn import GCNConv, Linear
from qgnn.nn.activation import ReLU
from qgnn.quant import saved

NODES, HIDDEN, CLASSES = 300, 64, 16
RANGE_BYTES = 8
"""The scale and the offset of a row."""


@pytest.fixture(scope="module")
def edge_index() -> Tensor:
    torch.manual_seed(0)
    return torch.randint(0, NODES, (2, 4 * NODES))


def hidden_map(features: int = HIDDEN) -> Tensor:
    """A map that something has computed."""
    return torch.randn(NODES, features, requires_grad=True).clone()


def map_bytes(features: int, bits: int) -> int:
    return NODES * (tight_bytes(features, bits) + RANGE_BYTES)


def kept(module: nn.Module, *inputs: object) -> SavedTensors:
    """What one forward pass keeps, after one that has built the graph."""
    module(*inputs)
    with SavedTensors(module) as found:
        out = module(*inputs)
    out.sum().backward()
    return found


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_map_takes_its_bits_and_a_range_a_row(edge_index: Tensor, bits: int) -> None:
    layer = GCNConv(HIDDEN, CLASSES, scheme=f"fp32/saved=int{bits}")
    x = hidden_map()
    layer(x, edge_index)
    with SavedTensors(layer, layer.parameters()) as found:
        out = layer(x, edge_index)
    assert found.by_kind()["feature map"] == map_bytes(HIDDEN, bits)
    assert set(found.parts) <= {("", "feature map"), ("", "other"), ("", "graph")}
    out.sum().backward()


@pytest.mark.parametrize("model", [GCN, GAT, GIN, GraphSAGE])
def test_the_forward_pass_is_exact(edge_index: Tensor, model: type[nn.Module]) -> None:
    torch.manual_seed(1)
    plain = model(HIDDEN, 32, CLASSES, dropout=0.0)
    packed = model(HIDDEN, 32, CLASSES, dropout=0.0, scheme="fp32/saved=int2")
    packed.load_state_dict(plain.state_dict())
    for network in (plain, packed):  # dropout of attention would draw other numbers, as rounding draws some
        for conv in network.convs:
            conv.dropout = 0.0
    x = torch.randn(NODES, HIDDEN)
    out, same = plain(x, edge_index), packed(x, edge_index)
    assert torch.equal(out, same)
    with SavedTensors(plain) as full:
        plain(x, edge_index)
    with SavedTensors(packed) as fewer:
        packed(x, edge_index)
    # 32 bits an element; 2, and 64 for a row of at least 16 elements
    assert fewer.by_kind()["feature map"] < 0.3 * full.by_kind()["feature map"]


def test_the_gradient_of_a_weight_is_unbiased() -> None:
    """``dW = g^T (x + e)``, where the errors ``e`` are independent, have mean 0 (up to 2^-24 of a step) and at most a quarter of the squared step as
    variance. A mean over ``K`` draws is within six of its standard deviations of ``g^T x`` but for 2e-9 of the elements, of which there are 512."""
    torch.manual_seed(2)
    draws, x, grad = 400, torch.randn(64, 32), torch.randn(64, CLASSES)
    layer = Linear(32, CLASSES, bias=False, scheme="fp32/saved=int2")
    total = torch.zeros(CLASSES, 32, dtype=torch.float64)
    for _ in range(draws):
        layer.zero_grad()
        layer(x.clone().requires_grad_().clone()).backward(grad)
        total += layer.weight.grad
    step = range_parameters(*x.aminmax(dim=1), 2, False)[0].double()
    deviation = (grad.double().square() * (step / 2).square().unsqueeze(1)).sum(0).div(draws).sqrt()
    error = (total / draws - grad.double().t() @ x.double()).abs()
    assert (error < 6 * deviation.unsqueeze(1)).all()
    assert error.max() > 1e-4, "two bits do lose something"


def test_a_seed_gives_the_same_gradients(edge_index: Tensor) -> None:
    model = GCN(HIDDEN, 32, CLASSES, scheme="fp32/saved=int4")
    x, gradients = torch.randn(NODES, HIDDEN), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        model.zero_grad()
        model(x, edge_index).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1])
    assert not torch.equal(gradients[0], gradients[2])


def test_data_parameters_and_narrow_maps_stay() -> None:
    x, narrow = torch.randn(NODES, HIDDEN), hidden_map(8)
    wide, few = Linear(HIDDEN, 32, scheme="fp32/saved=int4"), Linear(8, 32, scheme="fp32/saved=int4")
    assert kept(wide, x).peak == 0, "the data are there anyway"
    with SavedTensors(few, few.parameters()) as found:
        few(narrow)
    assert found.peak == narrow.nbytes
    wide.zero_grad()
    wide(x).sum().backward()
    assert torch.equal(wide.weight.grad, torch.ones(NODES, 32).t() @ x), "exact, as the data are"


def test_dropout_of_sparse_features_is_kept_in_bits_and_restored_exactly(edge_index: Tensor) -> None:
    dense = (torch.rand(NODES, HIDDEN) < 0.1).float() / torch.arange(1.0, NODES + 1).unsqueeze(1)
    x = SparseFeatures.from_dense(dense)
    gradients, bytes_kept = [], []
    for scheme in ("fp32", "fp32/saved=int4"):
        torch.manual_seed(5)
        model = GCN(HIDDEN, 32, CLASSES, num_layers=1, dropout=0.4, scheme=scheme)
        torch.manual_seed(6)
        bytes_kept.append(kept(model, x, edge_index))
        model.zero_grad()
        torch.manual_seed(7)
        model(x, edge_index).square().sum().backward()
        gradients.append(model.convs[0].lin.weight.grad)
    assert torch.equal(*gradients)
    values = x.values.numel()
    assert bytes_kept[0].parts["convs.0", "feature map"] == 4 * values
    assert bytes_kept[1].parts["convs.0", "mask"] == -(-values // 8)
    assert not bytes_kept[1].parts["convs.0", "feature map"]


@pytest.mark.parametrize("name", ["fp32/saved=int4", "fixed-4", "msfp12"])
def test_a_converted_model_packs_what_stands_between_its_layers(edge_index: Tensor, name: str) -> None:
    torch.manual_seed(8)
    theirs = pyg.GIN(HIDDEN, HIDDEN, 2, CLASSES, norm="batch_norm")
    x = torch.randn(NODES, HIDDEN)
    full = kept(theirs, x, edge_index)
    model = qgnn.convert(theirs, name)
    fewer = kept(model, x, edge_index)
    assert fewer.by_kind()["feature map"] < 0.35 * full.by_kind()["feature map"]
    assert kept(copy.deepcopy(model), x, edge_index).by_kind() == fewer.by_kind()


def test_relu_keeps_bits_and_passes_the_right_gradients() -> None:
    model = qgnn.convert(nn.Sequential(nn.Linear(HIDDEN, 32), nn.ReLU(), nn.Linear(32, 1)), "fp32/saved=int2")
    x = torch.randn(NODES, HIDDEN, requires_grad=True)
    hidden = model[0](x).detach()
    model(x).sum().backward()
    through = (hidden > 0) * model[2].weight.detach()
    assert torch.allclose(x.grad, through @ model[0].weight.detach(), atol=1e-6)  # sums of 32 terms below 1: 32 u
    assert kept(model, x).by_kind()["mask"] == NODES * 32 // 8


@pytest.mark.parametrize(("name", "bits"), [("fixed-8", 8), ("fixed-4", 4), ("msfp12", 4.5)])
def test_quantized_training_packs_what_batch_normalisation_keeps(edge_index: Tensor, name: str, bits: float) -> None:
    torch.manual_seed(9)
    batch = torch.arange(NODES) // 50
    x = torch.randn(NODES, 24)
    full = kept(PooledGIN(24, HIDDEN, 2, 2), x, edge_index, batch)
    found = kept(PooledGIN(24, HIDDEN, 2, 2, scheme=name), x, edge_index, batch)
    # A row of 64 columns has 64 bits for its range, one an element.
    assert found.by_kind()["feature map"] < (bits + 1) / 32 * 1.1 * full.by_kind()["feature map"]
    assert found.parts["convs.0.nn.4", "feature map"] == map_bytes(HIDDEN, int(bits))


def test_a_pass_that_fails_leaves_nothing_behind(edge_index: Tensor) -> None:
    layer = GCNConv(HIDDEN, CLASSES, scheme="fp32/saved=int4")
    x = hidden_map()
    with pytest.raises(ValueError, match=r"\[N, 64\]"):
        layer(x[:, :10], edge_index)
    model = qgnn.convert(pyg.GCN(HIDDEN, 32, 2, CLASSES), "fp32/saved=int4")
    with pytest.raises(ValueError, match=r"\[N, 64\]"):
        model(x[:, :10], edge_index)
    layer(x, edge_index)
    with SavedTensors(layer, layer.parameters()) as found:
        layer(x, edge_index)
    assert found.by_kind()["feature map"] == map_bytes(HIDDEN, 4)


class Sigmoid(nn.Module):
    """Keeps its own result; ``factor`` changes that in place."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.linear, self.factor = nn.Linear(HIDDEN, 8), factor

    def forward(self, x: Tensor) -> Tensor:
        out = torch.sigmoid(self.linear(x))
        return out if self.factor == 1 else out.mul_(self.factor)


def test_a_pass_without_backward_is_let_go() -> None:
    model = qgnn.convert(Sigmoid(), "fp32/saved=int4")
    found: list[weakref.ref[object]] = []

    class Mark:
        pass

    def watch(*what: object) -> Mark:
        found.append(weakref.ref(mark := Mark()))
        return mark

    saved.watchers.append(watch)
    try:
        out = model(torch.randn(NODES, HIDDEN))
    finally:
        saved.watchers.remove(watch)
    assert found and all(mark() is not None for mark in found)
    del out
    gc.collect()
    assert not any(mark() for mark in found)


def test_a_change_in_place_is_seen() -> None:
    model = qgnn.convert(Sigmoid(2.0), "fp32/saved=int4")
    with pytest.raises(RuntimeError, match="changed in place"):
        model(torch.randn(NODES, HIDDEN)).sum().backward()


@pytest.mark.parametrize("form", ["pair", "dictionary"])
def test_data_in_containers_stay_exact(form: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(HIDDEN, 8)

        def forward(self, given: tuple[Tensor, ...] | dict[str, Tensor]) -> Tensor:
            out: Tensor = self.linear(given["x"] if isinstance(given, dict) else given[0])
            return out

    model, x = qgnn.convert(Net(), "fp32/saved=int2"), torch.randn(NODES, HIDDEN)
    model({"x": x} if form == "dictionary" else (x, x)).sum().backward()
    assert torch.equal(model.linear.weight.grad, torch.ones(NODES, 8).t() @ x)


def test_threads_pack_each_its_own() -> None:
    """The second thread runs while the first is inside of a forward pass."""
    entered, done, sizes = threading.Event(), threading.Event(), []

    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            entered.set()
            done.wait(60)
            return x

    slow = qgnn.convert(nn.Sequential(nn.Linear(HIDDEN, 8), Waits()), "fp32/saved=int4")
    thread = threading.Thread(target=slow, args=(torch.randn(NODES, HIDDEN),))
    thread.start()
    try:
        assert entered.wait(60)
        layer, x = Linear(HIDDEN, 8, scheme="fp32/saved=int4"), hidden_map()
        with SavedTensors(layer, layer.parameters()) as found:
            layer(x)
        sizes.append(found.by_kind()["feature map"])
    finally:
        done.set()
        thread.join()
    assert sizes == [map_bytes(HIDDEN, 4)]


def test_checkpointing_recomputes_the_same(edge_index: Tensor) -> None:
    model, x = GCN(HIDDEN, 32, CLASSES, scheme="fp32/saved=int4"), torch.randn(NODES, HIDDEN)
    gradients = []
    for again in (False, True):
        torch.manual_seed(11)
        model.zero_grad()
        out = checkpoint(model, x, edge_index, use_reentrant=False) if again else model(x, edge_index)
        out.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("shape", [(5,), (3, 4, 20), (0, 20), (2, 0)])
def test_relu_takes_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    out = ReLU()(x)
    out.sum().backward()
    assert torch.equal(out, x.relu()) and torch.equal(x.grad, (x > 0).float())
