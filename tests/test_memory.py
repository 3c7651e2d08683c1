"""What training keeps between forward and backward: an A2Q layer keeps less than FP32 does."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

import qgnn
from qgnn import Graph, ops
from qgnn.memory import SavedTensors
from qgnn.models import GCN
from qgnn.nn import GCNConv

NODES, HIDDEN, CLASSES = 2000, 64, 16


@pytest.fixture(scope="module")
def edge_index():
    torch.manual_seed(0)
    return torch.randint(0, NODES, (2, 4 * NODES))


def kept_bytes(run, owned: list[Tensor]) -> int:
    """Bytes that autograd saves for backward during ``run``, each storage once; parameters and the graph are there anyway and do not count."""
    with SavedTensors(owned=owned) as kept:
        out = run()
    out.sum().backward()
    return kept.peak


def graph_tensors(graph: Graph) -> list[Tensor]:
    loops = graph.with_self_loops
    return [
        t
        for g in (graph, loops)
        for t in (g.indptr, g.indices, g.perm, g.rows, g.inv_sqrt_degree, *g.schedule, *g.transposed[:3])
    ]


def hidden_layer(layer: nn.Module, edge_index: Tensor) -> int:
    """Bytes that a layer keeps whose input is a hidden map after ReLU, ``[NODES, HIDDEN]`` in float32, which needs a gradient."""
    torch.manual_seed(1)
    x = torch.randn(NODES, HIDDEN).relu().requires_grad_()
    layer(x, edge_index)  # the first batch sets steps and builds the graph
    graph = Graph.of(edge_index, NODES)
    return kept_bytes(
        lambda: layer(x, edge_index), [*layer.parameters(), *layer.buffers(), edge_index, *graph_tensors(graph)]
    )


def test_a_hidden_layer_keeps_a_third_of_fp32(edge_index):
    a2q = hidden_layer(GCNConv(HIDDEN, CLASSES, scheme="a2q", num_nodes=NODES), edge_index)
    fp32 = hidden_layer(GCNConv(HIDDEN, CLASSES), edge_index)
    pygs = hidden_layer(pyg.GCNConv(HIDDEN, CLASSES), edge_index)
    assert fp32 == 4 * NODES * HIDDEN  # x, for the gradient of the weight
    assert pygs >= fp32
    # Codes of 8 bits and a clip bit an element; a clip bit an element of the operand; step, gradients of step and width a node; small change.
    assert a2q <= NODES * (HIDDEN + HIDDEN / 8 + CLASSES / 8 + 3 * 4) + 10_000
    assert a2q < 0.4 * fp32


@pytest.mark.parametrize("scheme", ["int8", "dq-int8"])
def test_affine_layers_keep_little_more_than_fp32(edge_index, scheme):
    layer = GCNConv(HIDDEN, CLASSES, scheme=scheme)
    # The quantized x in float32, and a clip bit for each element of it and of the operand; Degree-Quant's mask of the operand
    assert hidden_layer(layer, edge_index) <= NODES * (4 * HIDDEN + HIDDEN / 8 + CLASSES / 8 + 1) + 10_000


def test_a_training_step_keeps_no_more_than_fp32(edge_index):
    torch.manual_seed(2)
    x = (torch.rand(NODES, 100) > 0.9).float()
    kept = {}
    for scheme in ("fp32", "a2q"):
        model = GCN(100, HIDDEN, CLASSES, dropout=0.5, scheme=scheme, num_nodes=NODES)
        model(x, edge_index)
        owned = [*model.parameters(), *model.buffers(), edge_index, x, *graph_tensors(Graph.of(edge_index, NODES))]
        kept[scheme] = kept_bytes(lambda model=model: model(x, edge_index), owned)
    assert kept["a2q"] <= kept["fp32"]


def test_operations_keep_only_what_their_gradient_needs(edge_index):
    torch.manual_seed(3)
    graph = Graph.from_edge_index(edge_index, NODES)
    owned = graph_tensors(graph)
    x = torch.randn(NODES, HIDDEN, requires_grad=True)
    step, bits = torch.full((NODES,), 0.1, requires_grad=True), torch.full((NODES,), 4.0, requires_grad=True)
    weight = torch.randn(HIDDEN, CLASSES, requires_grad=True)
    owned += [x, step, bits, weight]
    clip, node = NODES * HIDDEN // 8, 4 * NODES
    assert kept_bytes(lambda: ops.aggregate(graph, x), owned) == 0
    assert kept_bytes(lambda: ops.aggregate(graph, x, reduce="mean"), owned) == 0
    assert kept_bytes(lambda: ops.fake_quantize(x, step, bits, gradient="local"), owned) == clip + 2 * node
    assert kept_bytes(lambda: ops.fake_quantize(x, step, bits, gradient="local", ste="pass"), owned) == 2 * node
    assert kept_bytes(lambda: ops.fake_quantize(x, step, bits), owned) == NODES  # the rounded widths; x is the caller's
    assert kept_bytes(lambda: ops.quantized_linear(x, weight, step, bits), owned) == NODES * HIDDEN + clip + 2 * node
    assert (
        kept_bytes(lambda: ops.quantized_linear(x, weight, step, bits, ste="pass"), owned) == NODES * HIDDEN + 2 * node
    )
    scale, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    assert kept_bytes(lambda: ops.fake_quantize_affine(x, scale, zero, 8), owned) == clip
    assert kept_bytes(lambda: ops.fake_quantize_affine(x, scale, zero, 8, ste="pass"), owned) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the allocator's peak needs a GPU")
def test_peak_of_a_training_step_on_a_gpu(edge_index):
    torch.manual_seed(4)
    peaks = {}
    x, edges = (
        (torch.rand(NODES * 10, HIDDEN) > 0.9).float().cuda(),
        torch.randint(0, NODES * 10, (2, NODES * 40)).cuda(),
    )
    for scheme in ("fp32", "a2q"):
        model = GCN(HIDDEN, HIDDEN, CLASSES, num_layers=3, dropout=0.5, scheme=scheme, num_nodes=NODES * 10).cuda()
        for _ in range(2):  # the first step sets steps, builds the graph and loads the kernels
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(x, edges).square().sum().backward()
            peaks[scheme] = torch.cuda.max_memory_allocated() - before
            model.zero_grad()
    assert peaks["a2q"] <= peaks["fp32"]


def test_memory_of_the_frozen_codes(edge_index):
    torch.manual_seed(5)
    data = type("Data", (), {"x": (torch.rand(NODES, 100) > 0.9).float(), "edge_index": edge_index})()
    model = GCN(100, HIDDEN, CLASSES, scheme="a2q", num_nodes=NODES)
    model(data.x, edge_index)
    model.convs[1].quantizer.bits.data = torch.randint(1, 4, (NODES,)).float()
    layer = qgnn.freeze(model, data).report.layers[1]
    # 1, 2 and 3 -> 4 bits in equal shares, 8, 16 and 32 bytes a row: 7/3 bits stored an element where the average width is 2
    assert layer.code_bytes <= 1.3 * layer.average_bits * NODES * HIDDEN / 8
