"""The variants of the methods: A2Q's ablations and its groups for unseen graphs, half precision, binary features."""

from __future__ import annotations

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.data import Data

import qgnn
from qgnn import Graph, ops, quant
from qgnn.features import SparseFeatures
from qgnn.kernels.quantize import largest_code
from qgnn.nn import GCNConv, GINConv, Linear
from qgnn.parts import Codec
from qgnn.qtensor import rounded_bits
from qgnn.quant import A2QQuantizer, GroupQuantizer, LearnedColumns, parse, protective_mask
from qgnn.quant.a2q import bits_by_degree, drawn_steps
from qgnn.quant.degree_quant import note_batch

NODES = 20


def star(nodes: int = NODES) -> Tensor:
    """Every node points at node 0, and each at the next: in-degrees from 1 up, node 0's the highest."""
    others = torch.arange(1, nodes)
    return torch.stack([torch.cat([others, others - 1]), torch.cat([torch.zeros_like(others), others])])


def layer_of(scheme: str, seed: int = 0) -> tuple[GCNConv, Tensor]:
    torch.manual_seed(seed)
    layer = GCNConv(6, 4, scheme=scheme, num_nodes=NODES)
    x = torch.randn(NODES, 6)
    layer(x, star())
    return layer, x


# A2Q's ablations


@pytest.mark.parametrize(
    ("scheme", "steps", "bits"),
    [
        ("a2q", True, True),
        ("a2q-fixed", False, False),
        ("a2q-steps", True, False),
        ("a2q-bits", False, True),
        ("a2q-manual", True, False),
        ("a2q-nns-steps", True, False),
    ],
)
def test_what_learns(scheme, steps, bits):
    layer, x = layer_of(scheme)
    layer(x, star()).square().sum().backward()
    learning = {n.rsplit(".", 1)[1] for n, p in layer.named_parameters() if p.grad is not None and "quantizer" in n}
    expected = {"bits"} if bits else set()
    assert learning == (expected | {"log_step", "log_weight_step", "log_operand_step"} if steps else expected)


@pytest.mark.parametrize("scheme", ["a2q-steps", "a2q-nns-steps"])
def test_widths_that_do_not_learn_are_all_the_same(scheme):
    """Not spread over the nodes by their magnitudes: A2Q's table 12 has 4 bits for every node."""
    layer, _ = layer_of(scheme)
    (bits,) = (p for name, p in layer.named_parameters() if name.endswith(".bits"))
    assert set(bits.tolist()) == {4.0}


def test_widths_by_in_degree():
    degree = torch.tensor([5, 1, 3, 3, 2, 1, 1, 1, 1, 1])
    assert bits_by_degree(degree, 2.2).tolist() == [3, 2, 3, 2, 2, 2, 2, 2, 2, 2]  # of equal ones the first
    assert bits_by_degree(degree, 4.0).tolist() == [4] * 10
    torch.manual_seed(0)
    layer = GCNConv(6, 4, scheme="a2q-manual", num_nodes=NODES)
    quant.start_values(layer, 2.1, 0.0)
    layer(torch.randn(NODES, 6), star())
    assert sorted(layer.quantizer.bits.tolist()) == [2.0] * 18 + [3.0] * 2  # the tenth of 20 nodes that 2.1 asks for
    assert layer.quantizer.bits[0] == 3  # the highest in-degree
    with pytest.raises(ValueError, match=r"-manual is for layers of a convolution"):
        Linear(6, 4, scheme="a2q-manual", num_nodes=3)(torch.randn(3, 6))


def test_the_papers_initialisation():
    """Steps from N(0.01, 0.01) in magnitude: their mean is 0.01 (1/sqrt(2 pi e)^... of a folded normal) = 0.01167 within 6 deviations."""
    torch.manual_seed(0)
    drawn = drawn_steps(torch.empty(20000), 0.01)
    assert bool((drawn > 0).all())
    # mean of |N(s, s)|: s (sqrt(2/pi) exp(-1/2) + erf(1/sqrt(2))) = 1.1664 s; its deviation is below s
    assert abs(float(drawn.mean()) - 0.011664) < 6 * 0.01 / 20000**0.5
    layer = GCNConv(6, 4, scheme="a2q", num_nodes=NODES)
    quant.start_values(layer, 4.0, 0.01)
    layer(torch.randn(NODES, 6), star())
    assert layer.quantizer.bits.tolist() == [4.0] * NODES
    for steps in (layer.quantizer.log_step, layer.quantizer.log_weight_step, layer.operand_quantizer.log_operand_step):
        assert float(steps.detach().exp().max()) < 0.07  # six deviations above the mean


def test_the_global_gradient_comes_from_the_loss():
    """Nodes that the loss does not reach get no global gradient; the local one is the quantization error's and reaches all."""
    reached = {}
    for scheme in ("a2q", "a2q-global"):
        layer, x = layer_of(scheme)
        layer(x, star())[1].sum().backward()  # node 1 hears from 0 and itself
        reached[scheme] = layer.quantizer.log_step.grad.ne(0)
    assert reached["a2q"].all()
    assert reached["a2q-global"].nonzero().flatten().tolist() == [0, 1]


def test_a_binary_input_can_learn_its_widths(tmp_path):
    """-input: 0/1 features get what every other map has, from the first batch to the file, sparse ones too; without it they are exact at 1 bit."""
    torch.manual_seed(0)
    x, edges = (torch.rand(NODES, 12) > 0.6).float(), star()
    model = qgnn.convert(pyg.GCN(12, 6, 2, 3), "a2q-input", num_nodes=NODES)
    model(SparseFeatures.from_dense(x), edges).sum().backward()
    first = model.convs[0].quantizer
    assert first.kind == "unsigned" and first.bits.grad.any() and first.log_step.grad is not None
    with torch.no_grad():
        first.bits.copy_(torch.arange(NODES) % 4)  # rows of 0 bits read as 0
        first.log_step.fill_(0.3)  # above the features' 1, so that they do not come back as they were
        expected = model.eval()(x, edges)
        torch.testing.assert_close(model(SparseFeatures.from_dense(x), edges), expected)
    given, _, hidden, _ = quant.feature_maps(model, NODES)
    assert given.quantized and given.learned and given.mean_bits() == 1.5
    assert quant.averages(quant.feature_maps(model, NODES)).average_bits == (1.5 + hidden.mean_bits()) / 2
    assert float(quant.learned_kb(model, 8)) * 1024 == NODES * (12 + 6)
    frozen = qgnn.freeze(model, Data(x=x, edge_index=edges))
    qgnn.save(frozen, tmp_path / "model")
    loaded = qgnn.load(tmp_path / "model")
    (codec, *_) = (part for part in loaded.parts.values() if isinstance(part, Codec))
    assert codec.spec.coding == "node" and codec.bits.tolist() == [0, 1, 2, 3] * (NODES // 4)
    for integers in (frozen(), loaded(x, edges)):
        torch.testing.assert_close(integers, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))  # NUMERICS 7
    plain = qgnn.convert(pyg.GCN(12, 6, 2, 3), "a2q", num_nodes=NODES)
    plain(x, edges)
    assert plain.convs[0].quantizer.kind == "binary"


def test_the_operand_has_the_gradient_of_its_level():
    assert LearnedColumns(3, parse("a2q"), False).gradient == "local"
    assert LearnedColumns(3, parse("a2q"), True).gradient == "global"  # attention vectors
    assert LearnedColumns(3, parse("a2q-nns"), False).gradient == "global"


# groups


def group_layer(groups: int = 16, signed: bool = True) -> tuple[Linear, Tensor]:
    torch.manual_seed(0)
    layer = Linear(8, 3, scheme=f"a2q-nns-m{groups}")
    x = torch.randn(200, 8) * torch.rand(200, 1).exp()
    x = x if signed else x.abs() + 0.1
    layer(x)
    return layer, x


@pytest.mark.parametrize("signed", [True, False])
def test_a_row_takes_the_group_with_the_nearest_maximum(signed):
    layer, x = group_layer(signed=signed)
    quantizer = layer.quantizer
    assert isinstance(quantizer, GroupQuantizer)
    step, widths = quantizer.log_step.detach().exp(), rounded_bits(quantizer.bits)
    q_max = step * largest_code(widths, signed)
    nearest = (x.abs().amax(1, keepdim=True) - q_max).abs().argmin(1)
    x_q = ops.fake_quantize(x, step[nearest], widths[nearest].float(), signed=signed)
    expected = x_q @ quantizer.weight_codes(layer.weight.detach()).dequantize().t() + layer.bias
    torch.testing.assert_close(layer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected)


def test_groups_serve_graphs_of_any_size_and_start_near_the_data():
    layer, x = group_layer(64)
    for rows in (1, 7, 1000):
        assert layer(torch.randn(rows, 8)).shape == (rows, 3)
    error = (layer.eval()(x) - nn.functional.linear(x, layer.weight, layer.bias)).abs().max()
    assert float(error.detach()) < 0.5 * float(x.abs().max())
    assert float(layer.quantizer.bits.detach().mean()) == pytest.approx(4.0, abs=0.01)


def test_usage_is_counted_in_evaluation_after_a_reset():
    layer, x = group_layer()
    quantizer = layer.quantizer
    layer.eval()(x)
    assert int(quantizer.usage.sum()) == 0, "inference counts nothing"
    with pytest.raises(ValueError, match=r"no node was counted yet: call qgnn.quant.reset_usage"):
        quant.feature_maps(layer, 200)
    quant.reset_usage(layer)
    with torch.no_grad():
        layer(x)
        layer(x[:50])
    assert int(quantizer.usage.sum()) == 250
    widths = rounded_bits(quantizer.bits).float()
    expected = float((widths * quantizer.usage).sum() / 250)
    assert quant.average_width(layer) == pytest.approx(expected)
    (found,) = quant.feature_maps(layer, 250)
    assert (found.nodes, found.learned) == (250, True)
    assert found.mean_bits() == pytest.approx(expected)
    quant.reset_usage(layer)
    assert int(quantizer.usage.sum()) == 0


def test_memory_of_the_last_training_batch():
    layer, x = group_layer()
    layer.train()(x[:40])
    bits = layer.quantizer.bits
    memory = quant.memory_kb(layer)
    memory.backward()
    assert float(bits.grad.sum()) == pytest.approx(8 * 40 / (8 * 1024))
    assert bool((bits.grad[layer.quantizer.counts == 0] == 0).all())
    assert quant.learned_kb(layer, 2.0) == pytest.approx(2 * 8 * 40 / (8 * 1024))


def test_the_table_of_groups_follows_the_parameters():
    layer, x = group_layer()
    layer.eval()
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        layer.quantizer.log_step += 0.5
        changed = layer(x)
    assert not torch.equal(changed, first)
    torch.testing.assert_close(layer(x).detach(), changed)


def test_groups_have_no_codes_to_freeze():
    layer, x = group_layer()
    with pytest.raises(ValueError, match=r"it has no fixed codes to freeze"):
        layer.quantizer.input_codes(x)


def test_masks_rank_within_each_graph_of_a_batch():
    """Two stars of 5 nodes: in each the centre has p_max = 1, and the leaves, of the lowest in-degree, p_min = 0."""
    edges = torch.cat([torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]]), torch.tensor([[6, 7], [5, 5]])], 1)
    graph = Graph.from_edge_index(edges, 10)
    note_batch(graph, torch.arange(2).repeat_interleave(5))
    scheme = quant.Scheme("test", "dq", 8, p_max=1.0)
    assert protective_mask(scheme, graph).nonzero().flatten().tolist() == [0, 5]


# baselines


def test_half_precision_rounds_sparse_features_too():
    """1e-9 is 0 in float16, and its product with 10,000 is not."""
    layer, x = Linear(2, 1, bias=False, scheme="fp16"), torch.full((3, 2), 1e-9)
    with torch.no_grad():
        layer.weight.fill_(1e4)
        assert not layer(SparseFeatures.from_dense(x)).any() and not layer(x).any()


def test_half_precision_is_that_of_float16():
    torch.manual_seed(0)
    layer, x = Linear(6, 4, scheme="fp16"), torch.randn(9, 6)
    expected = (x.half().float() @ layer.weight.half().float().t()).half().float() + layer.bias
    assert torch.equal(layer(x), expected)
    assert layer.feature_maps("layer", 9)[0].mean_bits() == 16
    conv = GCNConv(6, 4, scheme="fp16")
    exact = GCNConv(6, 4)
    exact.load_state_dict({k: v for k, v in conv.state_dict().items() if "quantizer" not in k})
    out, expected = conv(x, star(9)), exact(x, star(9))
    assert not torch.equal(out, expected)
    # three roundings of 2^-11 (input, weight, operand), sums of at most 10 terms
    torch.testing.assert_close(out, expected, rtol=0, atol=10 * 3 * 2**-11 * float(x.abs().max()))


def test_binary_layer_by_hand():
    layer = Linear(2, 1, scheme="bi")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.5, -1.5]]))
        layer.bias.zero_()
    x = torch.tensor([[1.0, 3.0], [3.0, 1.0]], requires_grad=True)
    # standardised columns: -1 and 1; row means of magnitudes: 1 (but for the 1e-4 in the deviation); weight: +1 and -1 times 1
    torch.testing.assert_close(layer(x), torch.tensor([[-2.0], [2.0]]), rtol=0, atol=1e-3)
    out = layer(torch.randn(50, 2))
    assert len(out.detach().abs().round(decimals=4).unique()) > 2, "rows have scales of their own"
    assert layer.feature_maps("layer", 50)[0].mean_bits() == 1


def test_gradient_of_the_sign():
    from qgnn.autograd import Sign

    x = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]], requires_grad=True)
    out = Sign.apply(x)
    out.backward(torch.full_like(x, 3.0))
    assert out.tolist() == [[-1, -1, -1, 1, 1, 1, 1]]
    assert x.grad.tolist() == [[0, 3, 3, 3, 3, 3, 0]]


@pytest.mark.parametrize("scheme", ["fp16", "bi"])
def test_baselines_have_no_integers(scheme):
    model = qgnn.convert(pyg.GCN(6, 8, 2, 3), scheme)
    from torch_geometric.data import Data

    data = Data(x=torch.randn(NODES, 6), edge_index=star())
    model(data.x, data.edge_index)
    with pytest.raises(ValueError, match=rf"scheme {scheme} is a float baseline"):
        qgnn.freeze(model, data)


def test_the_network_of_a_gin_learns_a_width_for_each_node():
    torch.manual_seed(0)
    conv = GINConv(Linear(6, 8, scheme="a2q", num_nodes=NODES), scheme="a2q")
    conv(torch.randn(NODES, 6), star())
    (quantizer,) = (m for m in conv.modules() if isinstance(m, A2QQuantizer))
    assert quantizer.bits.shape == (NODES,)
    assert float(quantizer.bits[0].detach()) == float(
        quantizer.bits.max().detach()
    )  # the sum over most neighbours is largest
