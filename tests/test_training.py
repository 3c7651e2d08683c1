"""Quantized training: both passes of every layer against plain torch, what backward keeps, widths at run time, seeds, and freezing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data

import qgnn
from qgnn import Graph, autograd_training, quant
from qgnn.autograd_training import FixedProduct, Rounding
from qgnn.features import SparseFeatures, dropout
from qgnn.kernels.backend import use_backend
from qgnn.models import GCN
from qgnn.nn import GATConv, GCNConv, GINConv, Linear, SAGEConv
from qgnn.quant import Components, parse, set_width
from qgnn.quant.qat import SLACK
from qgnn.quant.schedules import ADQ, SDQ

from .test_memory import graph_tensors, kept_bytes

NODES = 30


# a plain-torch emulation ------------------------------------------------------------------------------------------------------------------


def fixed(x: Tensor, bits: int, signed: bool = True, slack: float = 0.0) -> tuple[Tensor, Tensor]:
    """Codes (whole numbers, float64) and scale of ``x`` in its own range (NUMERICS 6, offset 0)."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    scale = x.abs().max() * (1 + slack) / high
    return torch.round(x / scale).clamp(low, high).double(), scale


def exactly(left: Tensor, right: Tensor) -> Tensor:
    """The sums of an integer product, float32 as the epilogue of the kernels has them."""
    return (left @ right).float()


class Product(torch.autograd.Function):
    """``row_i (x W^T)_i + b``; the gradient of the product is quantized once."""

    @staticmethod
    def forward(ctx, x, weight, row, bias, width, gradient, signed):
        (xc, xs), (wc, ws) = fixed(x, width, signed, SLACK), fixed(weight, width)
        ctx.save_for_backward(xc, xs, wc, ws, row)
        ctx.gradient = gradient
        out = exactly(xc, wc.t()) * (xs if row is None else (xs * row).unsqueeze(1)) * ws
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx, grad):
        xc, xs, wc, ws, row = ctx.saved_tensors
        gc, gs = fixed(grad if row is None else grad * row.unsqueeze(1), ctx.gradient)
        grad_x, grad_weight = exactly(gc, wc) * gs * ws, (exactly(xc.t(), gc) * xs * gs).t()
        return grad_x, grad_weight, None, grad.sum(0) if ctx.needs_input_grad[3] else None, None, None, None


class Sum(torch.autograd.Function):
    """``row_i (A h)_i + own h_i + b`` over a dense adjacency; the gradient is summed as codes."""

    @staticmethod
    def forward(ctx, h, adjacency, row, own, bias, width, gradient):
        hc, hs = fixed(h, width, slack=SLACK)
        ctx.save_for_backward(adjacency, row, own)
        ctx.gradient = gradient
        return Sum.summed(adjacency, hc, hs, row, own) + (0 if bias is None else bias)

    @staticmethod
    def summed(adjacency, codes, scale, row, own):
        out = exactly(adjacency, codes)
        out = out if row is None else out * row.unsqueeze(1)
        return (out if own is None else out + own * codes.float()) * scale

    @staticmethod
    def backward(ctx, grad):
        adjacency, row, own = ctx.saved_tensors
        gc, gs = fixed(grad if row is None else grad * row.unsqueeze(1), ctx.gradient)
        grad_bias = grad.sum(0) if ctx.needs_input_grad[4] else None
        return Sum.summed(adjacency.t(), gc, gs, None, own), None, None, None, grad_bias, None, None


def dense(graph: Graph) -> Tensor:
    adjacency = torch.zeros(graph.num_nodes, graph.num_sources, dtype=torch.float64, device=graph.device)
    ones = torch.ones(graph.num_edges, dtype=torch.float64, device=graph.device)
    return adjacency.index_put_((graph.rows.long(), graph.indices.long()), ones, accumulate=True)


def emulated(layer: nn.Module, x: Tensor, graph: Graph, width: int, gradient: int, signed: bool) -> Tensor:
    """The layer in fixed point, without the package's kernels."""

    def product(x: Tensor, linear: nn.Module, row: Tensor | None, bias: Tensor | None, signed: bool) -> Tensor:
        return Product.apply(x, linear.weight, row, bias, width, gradient, signed)

    def summed(h: Tensor, graph: Graph, row: Tensor | None, own: Tensor | None, bias: Tensor | None) -> Tensor:
        return Sum.apply(h, dense(graph), row, own, bias, width, gradient)

    if isinstance(layer, Linear):
        return product(x, layer, None, layer.bias, signed)
    if isinstance(layer, GCNConv):
        loops = graph.with_self_loops
        row = loops.inv_sqrt_degree
        return summed(product(x, layer.lin, row, None, signed), loops, row, None, layer.bias)
    if isinstance(layer, SAGEConv):
        mean = graph.inv_degree
        if layer.first:
            out = summed(product(x, layer.lin_l, None, None, signed), graph, mean, None, layer.lin_l.bias)
        else:
            # The mean of non-negative features is found to be so from the first batch.
            out = product(summed(x, graph, mean, None, None), layer.lin_l, None, layer.lin_l.bias, signed)
        return out + product(x, layer.lin_r, None, None, signed)
    assert isinstance(layer, GINConv)
    own = (1 + layer.eps).detach()
    if layer.first:
        return summed(product(x, layer.nn, None, None, signed), graph, None, own, layer.nn.bias)
    return product(summed(x, graph, None, own, None), layer.nn, None, layer.nn.bias, signed)


LAYERS = {
    "linear": lambda scheme: Linear(20, 6, scheme=scheme),
    "gcn": lambda scheme: GCNConv(20, 6, scheme=scheme),
    "sage-first": lambda scheme: SAGEConv(20, 6, scheme=scheme),
    "sage-last": lambda scheme: SAGEConv(20, 24, scheme=scheme),
    "gin-first": lambda scheme: GINConv(Linear(20, 6, scheme=scheme), eps=0.3, scheme=scheme),
    "gin-last": lambda scheme: GINConv(Linear(20, 24, scheme=scheme), scheme=scheme),
}


def nearest(scheme: str | quant.Scheme) -> quant.Scheme:
    """The scheme with gradients rounded to the nearest, but where it says how: an emulation then gives the same bits."""
    parsed = parse(scheme)
    return parsed if "/rounding=" in parsed.name else replace(parsed, rounding="nearest")


def example(name: str, scheme: str | quant.Scheme, signed: bool = True, device: str = "cpu"):
    """A layer, features that need a gradient, and a graph with a node without edges and one with many."""
    torch.manual_seed(0)
    layer = LAYERS[name](nearest(scheme))
    x = torch.randn(NODES, 20)
    edges = torch.cat([torch.randint(0, NODES - 1, (2, 90)), torch.stack([torch.arange(25), torch.full((25,), 3)])], 1)
    x = (x if signed else x.relu()).to(device).requires_grad_()
    return layer.to(device), x, Graph.from_edge_index(edges.to(device), NODES)


def call(layer: nn.Module, x: Tensor, graph: Graph) -> Tensor:
    return layer(x) if isinstance(layer, Linear) else layer(x, graph)


def gradients(out: Tensor, layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Of one upstream gradient: it must not depend on ``out``, in which an emulation may round differently."""
    torch.manual_seed(1)
    upstream = torch.randn(out.shape).to(out.device)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return list(torch.autograd.grad(out, [x, *parameters], upstream))


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(result, wanted)


# fixed point: exact in both passes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
    ("scheme", "width", "gradient"), [("fixed-8", 8, 8), ("fixed-3", 3, 3), ("fixed-4/grad=6", 4, 6)]
)
@pytest.mark.parametrize("name", LAYERS)
def test_both_passes_run_on_integers(name, scheme, width, gradient, signed):
    layer, x, graph = example(name, scheme, signed)
    out = call(layer, x, graph)
    wanted = emulated(layer, x, graph, width, gradient, signed)
    assert_same([out, *gradients(out, layer, x)], [wanted, *gradients(wanted, layer, x)])


@pytest.mark.parametrize("name", ["gcn", "gin-first"])
def test_backends_agree_to_the_bit(name, backend):
    layer, x, graph = example(name, "fixed-5", device=backend)
    out = call(layer, x, graph)
    results = [out, *gradients(out, layer, x)]
    if backend == "cpu":
        with use_backend("reference"):
            out = call(layer, x, graph)
            wanted = [out, *gradients(out, layer, x)]
    else:
        out = emulated(layer, x, graph, 5, 5, True)
        wanted = [out, *gradients(out, layer, x)]
    assert_same(results, wanted)


def test_a_gradient_width_changes_the_gradients_only():
    results = []
    for scheme in ("fixed-8", "fixed-8/gradients=3"):
        layer, x, graph = example("gcn", scheme)
        out = layer(x, graph)
        results.append((out, gradients(out, layer, x)))
    (out, wide), (same, narrow) = results
    assert torch.equal(out, same)
    assert torch.equal(wide[1], narrow[1])  # a bias adds up what comes
    for k in (0, 2):
        assert not torch.equal(wide[k], narrow[k])
    # 3 bits of a gradient are codes -3 to 3: a product with one column of gradients has as many different rows
    layer, x, _ = example("linear", "fixed-8/gradients=3")
    narrow_x = gradients(layer(x)[:, :1], layer, x)[0]
    assert len(torch.unique(narrow_x, dim=0)) <= 7


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_binary_features_are_exact(kind):
    torch.manual_seed(2)
    x = (torch.rand(NODES, 20) < 0.3).float() * (1 + torch.rand(NODES, 1))
    layer, _, graph = example("gcn", "fixed-8")
    out = layer(x if kind == "dense" else SparseFeatures.from_dense(x), graph)
    assert layer.quantizer.kind == "binary"
    loops = graph.with_self_loops
    row, (wc, ws) = loops.inv_sqrt_degree, fixed(layer.lin.weight, 8)
    h = (x @ (wc.float() * ws).t() * row.unsqueeze(1)).detach().requires_grad_()
    wanted = Sum.apply(h, dense(loops), row, None, layer.bias, 8, 8)
    # Sums of 20 products and one product after: 22 roundings of 2^-24 of the largest sum of magnitudes may move a code of h by one.
    assert (out - wanted).abs().max() <= 1.01 * fixed(h, 8)[1] * loops.max_degree * row.max() ** 2
    upstream = torch.randn(out.shape)
    (grad_h,) = torch.autograd.grad(wanted, h, upstream)
    gc, gs = fixed(grad_h * row.unsqueeze(1), 8)
    (grad_weight,) = torch.autograd.grad(out, layer.lin.weight, upstream)
    # exact factors, float sums: NODES + 2 roundings
    bound = (NODES + 2) * 2.0**-24 * (gc.float().abs() * gs).t() @ x
    assert ((grad_weight - (gc.float() * gs).t() @ x).abs() <= bound + 1e-12).all()


def test_rows_that_are_not_binary_any_more_give_nan():
    x = torch.tensor([[0.0, 2.0, 2.0], [0.0, 1.0, 2.0]])
    out = FixedProduct.apply(x, torch.randn(4, 3), None, None, None, Rounding(8, 8, 8))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("option", ["weights=fp32", "inputs=fp32", "messages=fp32", "gradients=fp32"])
def test_a_component_can_stay_in_float(option):
    scheme = f"fixed-4/{option}"
    layer, x, graph = example("gcn", scheme)
    out = layer(x, graph)
    results = [out, *gradients(out, layer, x)]

    def kept(tensor: Tensor, component: str, slack: float = 0.0) -> Tensor:
        codes, scale = fixed(tensor, 4, slack=slack)
        return tensor if option.startswith(component) else codes.float() * scale

    loops = graph.with_self_loops
    row, adjacency = loops.inv_sqrt_degree.unsqueeze(1), dense(loops).float()
    left, weight = kept(x, "inputs", SLACK), kept(layer.lin.weight, "weights")
    h = left @ weight.t() * row
    wanted = adjacency @ kept(h, "messages", SLACK) * row + layer.bias
    torch.manual_seed(1)
    grad_h = row * (adjacency.t() @ kept(torch.randn(out.shape) * row, "gradients"))
    grad_h = kept(grad_h, "gradients")
    expected = [wanted, grad_h @ weight, None, grad_h.t() @ left]
    # Float sums of some 60 terms in another order: a code may move by one where the value lies between two. What is kept of a float product is packed
    # by rows, in 4 bits and stochastically (qgnn.quant.saved): an error of half a step of 15 to 7, of values of a third of the range, at most.
    packed = option in ("weights=fp32", "inputs=fp32")
    for place, (result, value) in enumerate(zip(results, expected, strict=True)):
        if value is not None:
            assert (result - value).norm() <= (0.25 if packed and place == 3 else 1e-2) * value.norm()
    exact, *_ = example("gcn", "fp32")
    exact.load_state_dict({k: v for k, v in layer.state_dict().items() if "quantizer" not in k})
    floats = exact(x, graph)
    for result, value in zip(results, [floats, *gradients(floats, exact, x)], strict=True):
        assert result.shape == value.shape


@pytest.mark.parametrize("name", ["gcn", "gin-last", "sage-first"])
def test_result_and_output_take_widths_too(name):
    layer, x, graph = example(name, "fixed-8/aggregation=4/update=3")
    out = call(layer, x, graph)
    assert len(torch.unique(out)) <= 7
    wide, *_ = example(name, "fixed-8/aggregation=4")
    assert len(torch.unique(call(wide, x, graph))) > 7
    for gradient in gradients(out, layer, x):
        assert gradient.isfinite().all()


def test_epsilon_learns_from_the_codes():
    torch.manual_seed(3)
    edges = torch.randint(0, NODES, (2, 90))
    x = torch.randn(NODES, 6, requires_grad=True)
    scheme = nearest("fixed-5")
    layer = GINConv(Linear(6, 8, scheme=scheme), train_eps=True, scheme=scheme)
    fixed_eps = GINConv(Linear(6, 8, scheme=scheme), scheme=scheme)
    fixed_eps.load_state_dict(layer.state_dict())
    out, wanted = layer(x, edges), fixed_eps(x, edges)
    assert torch.equal(out, wanted)
    grad_x, grad_eps, *others = gradients(out, layer, x)
    assert_same([grad_x, *others], gradients(wanted, fixed_eps, x))
    # what the Linear gives back, times the codes that the node brought along
    codes, scale = fixed(x, 5, slack=SLACK)
    summed = torch.randn(NODES, 6, requires_grad=True)
    summed.data = layer.nn.quantizer.top * 0 + Sum.summed(
        dense(Graph.of(edges, NODES)), codes, scale, None, torch.ones(1)
    )
    (back,) = gradients(layer.nn(summed), layer.nn, summed)[:1]
    terms = back * codes.float() * scale
    assert (grad_eps - terms.sum()).abs() <= 180 * 2.0**-24 * terms.abs().sum()


@pytest.mark.parametrize("reduce", ["max", "min", "mean"])
def test_other_reductions_and_learned_epsilon_quantize_both_passes(reduce):
    torch.manual_seed(3)
    edges = torch.randint(0, NODES, (2, 90))
    x = torch.randn(NODES, 6, requires_grad=True)
    layer = GINConv(Linear(6, 8, scheme="fixed-8"), train_eps=True, aggr=reduce, scheme="fixed-4")
    floats = GINConv(Linear(6, 8, scheme="fixed-8"), train_eps=True, aggr=reduce)
    floats.load_state_dict({k: v for k, v in layer.state_dict().items() if "operand" not in k})
    codes, scale = fixed(x, 4, slack=SLACK)
    quantized = (codes.float() * scale).detach().requires_grad_()
    out, wanted = layer(x, edges), floats(quantized, edges)
    assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-6)
    results, expected = gradients(out, layer, x), gradients(wanted, floats, quantized)
    assert not torch.equal(results[0], expected[0])  # 4 bits of the gradient of the result
    assert (results[0] - expected[0]).norm() <= 0.3 * expected[0].norm()
    assert results[1].shape == (1,)  # epsilon's


def test_the_weight_gradient_of_many_rows_is_summed_in_float(monkeypatch):
    layer, x, graph = example("gcn", "fixed-7")
    wanted = gradients(layer(x, graph), layer, x)
    monkeypatch.setattr(autograd_training, "LONGEST", NODES - 1)  # as if int32 did not hold the sums of more rows
    *same, weight = gradients(layer(x, graph), layer, x)
    assert_same(same, wanted[:-1])
    # NODES + 2 roundings of sums of magnitudes, which are at most as large as NODES products of the largest values
    bound = (NODES + 2) * 2.0**-24 * NODES * x.abs().max() * 10
    assert ((weight - wanted[-1]).abs() <= bound).all()
    assert not torch.equal(weight, torch.zeros_like(weight))


def test_sparse_features_may_come_dropped_first():
    layer, _, graph = example("gcn", "fixed-8")
    x = SparseFeatures.from_dense((torch.arange(20) % 3 == 0).float().expand(NODES, 20))
    torch.manual_seed(10)
    assert layer(dropout(x, 0.5, True), graph).isfinite().all()
    assert layer.quantizer.kind == "binary"


def test_sparse_features_with_float_gradients():
    torch.manual_seed(10)
    x = (torch.rand(NODES, 20) < 0.3).float()
    layer = Linear(20, 6, scheme="fixed-8/gradients=fp32")
    out = layer(SparseFeatures.from_dense(x))
    upstream = torch.randn(out.shape)
    (grad,) = torch.autograd.grad(out, layer.weight, upstream)
    assert ((grad - upstream.t() @ x).abs() <= NODES * 2.0**-24 * (upstream.abs().t() @ x)).all()


def test_sums_that_int32_cannot_hold_are_refused(monkeypatch):
    layer, x, _ = example("gin-last", "fixed-8")
    hub = Graph.from_edge_index(torch.stack([torch.full((25,), 3), torch.arange(25)]), NODES)
    monkeypatch.setattr(quant.training, "LARGEST_SUM", 20)
    with pytest.raises(ValueError, match="a node has 25 out-edges: int32 sums"):
        layer(x, hub)


@pytest.mark.parametrize("name", ["linear", "gcn"])
@pytest.mark.parametrize("training", [True, False])
def test_nan_reaches_the_output(name, training):
    layer, x, graph = example(name, "fixed-8")
    call(layer, x, graph)
    bad = x.detach().index_fill(0, torch.tensor([4]), torch.nan)
    assert call(layer.train(training), bad, graph).isnan().all()
    assert call(layer.eval(), x, graph).isfinite().all(), "the range that is kept is a number"


def test_a_batch_of_nothing_leaves_the_range_alone():
    layer, x, _ = example("linear", "fixed-8")
    wanted = layer(x)
    layer(x[:0]).sum().backward()
    assert not layer.weight.grad.any()
    assert torch.equal(layer.eval()(x), wanted)


def test_features_that_were_never_negative_get_a_sign_when_they_are():
    layer, x, _ = example("linear", "fixed-8")
    layer(x.abs())
    assert layer.quantizer.kind == "unsigned"
    out = layer(x)
    other, *_ = example("linear", "fixed-8")
    assert torch.equal(out, other(x)) and layer.quantizer.kind == "signed"


def test_where_values_are_not_looked_at_negative_features_give_nan(monkeypatch):
    layer, x, _ = example("linear", "fixed-8")
    layer(x.abs())
    monkeypatch.setattr(quant.training, "checks_values", lambda x: False)  # as on a GPU
    assert layer(x.abs()).isfinite().all()
    assert layer(x).isnan().all()


def test_an_input_gradient_over_many_outputs_is_summed_in_float(monkeypatch):
    layer, x, _ = example("linear", "fixed-7")
    wanted = gradients(layer(x), layer, x)[0]
    monkeypatch.setattr(autograd_training, "LONGEST", 5)  # as if int32 did not hold the sums of more outputs
    result = gradients(layer(x), layer, x)[0]
    # 6 products of codes below 2^6, times the scales: 8 roundings of the sum of magnitudes, which is at most 6 times the largest product
    assert (result - wanted).abs().max() <= 8 * 2.0**-24 * 6 * 4 * layer.weight.abs().max()


def test_nothing_is_kept_for_a_weight_that_does_not_learn():
    layer, x, _ = example("linear", "fixed-4")
    layer(x)
    layer.weight.requires_grad_(False)
    kept = kept_bytes(lambda: layer(x), [*layer.parameters(), *layer.buffers()])
    assert kept < x.numel() // 2


def test_a_mean_with_factors_of_nodes():
    layer, x, graph = example("sage-last", "fixed-8")
    factor = torch.rand(NODES)
    results = [
        layer.operand_quantizer.train(training).aggregate(graph, x, reduce="mean", scale=factor)
        for training in (True, False)
    ]
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)


def test_zeros_stay_zeros():
    layer, x, graph = example("gcn", "fixed-8")
    out = layer(x * 0, graph)
    assert torch.equal(out, layer.bias.expand_as(out))
    assert not gradients(out * 0, layer, x)[0].any()


# Microsoft floating point --------------------------------------------------------------------------------------------------------------------


def msfp(x: Tensor, width: int) -> Tensor:
    """Rounded in blocks of 16 along the rows (NUMERICS 6)."""
    mantissa = width - 9
    blocks = F.pad(x, (0, -x.size(1) % 16)).view(x.size(0), -1, 16)
    unit = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(2, keepdim=True))) - mantissa + 1)
    codes = torch.round(blocks.abs() / unit).clamp_max(2**mantissa - 1)
    return torch.where(blocks == 0, 0, blocks.sign() * codes * unit).flatten(1)[:, : x.size(1)]


@pytest.mark.parametrize(
    ("scheme", "width", "gradient"), [("msfp16", 16, 16), ("msfp12", 12, 12), ("msfp14/grad=12", 14, 12)]
)
def test_msfp_blocks_lie_along_what_is_summed(scheme, width, gradient):
    layer, x, _ = example("linear", scheme)
    out = layer(x)
    grad_x, grad_weight, grad_bias = gradients(out, layer, x)
    left, weight = msfp(x, width), msfp(layer.weight, width)
    torch.manual_seed(1)
    upstream = torch.randn(out.shape)
    along_out, along_nodes = msfp(upstream, gradient), msfp(upstream.t(), gradient).t()
    # Products of values are exact in float32 (at most 14 bits); up to NODES + 1 sums round by 2^-24 of the sum of magnitudes each.
    for result, a, b, bias in (
        (out, left, weight.t(), layer.bias),
        (grad_x, along_out, weight, torch.zeros(20)),
        (grad_weight, along_nodes.t(), left, torch.zeros(20)),
    ):
        bound = (NODES + 1) * 2.0**-24 * (a.abs() @ b.abs() + bias.abs())
        assert ((result - (a @ b + bias)).abs() <= bound).all()
    assert torch.equal(grad_bias, upstream.sum(0))


@pytest.mark.parametrize("name", ["gcn", "sage-first", "sage-last", "gin-first", "gin-last"])
def test_msfp_layers(name):
    """The error of MSFP16 is that of 7 mantissa bits and of MSFP12 that of 3: 16 times as large, in both passes."""
    errors = []
    for scheme in ("msfp16", "msfp12"):
        layer, x, graph = example(name, scheme)
        floats, *_ = example(name, "fp32")
        out, wanted = layer(x, graph), floats(x, graph)
        pairs = zip([out, *gradients(out, layer, x)], [wanted, *gradients(wanted, floats, x)], strict=True)
        errors.append([float((a - b).detach().norm() / b.detach().norm()) for a, b in pairs])
    for fine, coarse in zip(*errors, strict=True):
        assert coarse < 0.5
        assert fine < coarse / 4 or coarse < 1e-6  # the gradient of a bias is exact


# attention -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("concat", [True, False])
def test_attention(concat):
    torch.manual_seed(4)
    edges = torch.randint(0, NODES, (2, 90))
    x = torch.randn(NODES, 20, requires_grad=True)
    layer = GATConv(20, 5, 3, concat, scheme=nearest("fixed-6"))
    out = layer(x, edges)

    def through(tensor: Tensor) -> Tensor:
        codes, scale = fixed(tensor, 6, slack=SLACK)
        return tensor + (codes.float() * scale - tensor).detach()

    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            codes, scale = fixed(grad, 6)
            return codes.float() * scale

    count = dense(Graph.from_edge_index(edges, NODES).with_self_loops).float().unsqueeze(2)
    h = through(Product.apply(x, layer.lin.weight, None, None, 6, 6, True))
    heads = h.view(-1, 3, 5)
    src, dst = (through((heads * through(a[0].t()).t()).sum(-1)) for a in (layer.att_src, layer.att_dst))
    score = F.leaky_relu(dst.unsqueeze(1) + src.unsqueeze(0), 0.2)
    weight = count * (score - score.amax(1, keepdim=True)).exp()
    alpha = weight / weight.sum(1, keepdim=True)
    wanted = Rounded.apply(torch.einsum("ijh,jhc->ihc", alpha, heads).flatten(1))
    wanted = (wanted if concat else wanted.view(-1, 3, 5).mean(1)) + layer.bias
    assert torch.allclose(out, wanted, rtol=1e-5, atol=1e-6)
    floats = GATConv(20, 5, 3, concat)
    floats.load_state_dict({k: v for k, v in layer.state_dict().items() if "quantizer" not in k})
    exact = floats(x, edges)
    results = zip(gradients(out, layer, x), gradients(wanted, layer, x), gradients(exact, floats, x), strict=True)
    for result, value, unquantized in results:
        # Attention's sums are floats: where one lies between two codes of the gradient after it, the code moves by one.
        assert (result - value).norm() <= 0.02 * value.norm()
        if value.numel() != layer.bias.numel():
            assert (unquantized - value).norm() > 0.04 * value.norm()


# what backward keeps ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "bits"), [("fixed-8", 8), ("fixed-4", 4), ("fixed-3", 3), ("msfp16", 8.5), ("msfp12", 4.5)]
)
@pytest.mark.parametrize("name", ["gcn", "gin", "sage"])
def test_maps_are_kept_at_the_width_of_the_scheme(name, scheme, bits):
    torch.manual_seed(5)
    nodes, hidden, classes = 500, 64, 8
    edges = torch.randint(0, nodes, (2, 4 * nodes))
    x = torch.randn(nodes, hidden).relu().requires_grad_()
    layer = {
        "gcn": lambda: GCNConv(hidden, classes, scheme=scheme),
        "gin": lambda: GINConv(Linear(hidden, classes, scheme=scheme), scheme=scheme),
        "sage": lambda: SAGEConv(hidden, classes, root_weight=False, scheme=scheme),
    }[name]()
    layer(x, edges)
    graph = Graph.of(edges, nodes)
    owned = [*layer.parameters(), *layer.buffers(), edges, *graph_tensors(graph), graph.inv_degree]
    kept = kept_bytes(lambda: layer(x, edges), owned)
    weight = hidden * classes if scheme.startswith("fixed") else 0
    # The codes of x, at their width, and those of the weight; scales.
    assert nodes * hidden * bits / 8 <= kept <= nodes * hidden * bits / 8 + weight + 64
    assert kept < 4 * nodes * hidden


def test_a_model_keeps_a_bit_for_relu_and_dropout():
    torch.manual_seed(6)
    nodes, hidden = 500, 64
    edges = torch.randint(0, nodes, (2, 4 * nodes))
    x = SparseFeatures.from_dense((torch.rand(nodes, 100) > 0.9).float())
    kept = {}
    for scheme in ("fp32", "fixed-8", "fixed-4"):
        model = GCN(100, hidden, 8, scheme=scheme).eval()
        model(x, edges)
        model.train()
        graph = Graph.of(edges, nodes)
        owned = [*model.parameters(), *model.buffers(), edges, x.values]
        owned += graph_tensors(graph)
        kept[scheme] = kept_bytes(
            lambda model=model: model.convs[1](qgnn.ops.relu_dropout(model.convs[0](x, edges), 0.5, True), edges), owned
        )
    maps = nodes * hidden
    assert kept["fp32"] >= 4 * maps + maps / 8
    assert kept["fixed-8"] <= maps + maps / 8 + 8 * hidden + 64
    assert kept["fixed-4"] <= maps / 2 + maps / 8 + 8 * hidden + 64


# widths at run time, seeds ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "other", "width"),
    [("fixed-8", "fixed-4", 4), ("msfp16", "msfp13", 13), ("int8", "int4", 4), ("sdq:8,4", "fixed-4", 4)],
)
def test_widths_are_set_while_training_runs(start, other, width):
    layer, x, graph = example("gcn", start)
    layer(x, graph)
    modules, state = list(layer.modules()), set(layer.state_dict())
    before = {name: value.clone() if isinstance(value, Tensor) else value for name, value in layer.state_dict().items()}
    set_width(layer, width)
    out = layer(x, graph)
    narrow = parse(other) if start != "int8" else replace(parse("int8"), bits=4)
    fresh, *_ = example("gcn", narrow)
    fresh(x, graph)
    fresh.load_state_dict(before)  # QAT's ranges remember the batches that they saw
    wanted = fresh(x, graph)
    assert torch.equal(out, wanted)
    assert_same(gradients(out, layer, x), gradients(wanted, fresh, x))
    assert list(layer.modules()) == modules
    assert {name for name in layer.state_dict() if not name.endswith(".width")} == state
    assert not any("width" in name for name in state)


def test_own_widths_of_components_stay():
    layer, *_ = example("gcn", "fixed-8/gradients=6/messages=fp32")
    set_width(layer, 4)
    widths = {
        name: layer.scheme.components.at(name, layer.quantizer.width) for name in ("inputs", "gradients", "messages")
    }
    assert widths == {"inputs": 4, "gradients": 6, "messages": 32}


@pytest.mark.parametrize(
    ("scheme", "width", "message"),
    [("fixed-8", 9, "widths of 2 to 8, got 9"), ("msfp16", 8, "widths of 12 to 16, got 8"), ("bi", 4, "cannot be set")],
)
def test_widths_that_there_are_not(scheme, width, message):
    layer, *_ = example("gcn", scheme)
    with pytest.raises(ValueError, match=message):
        set_width(layer, width)


def trained(scheme: str, seed: int) -> list[Tensor]:
    torch.manual_seed(7)
    edges, x, y = torch.randint(0, NODES, (2, 90)), torch.randn(NODES, 20), torch.randint(0, 3, (NODES,))
    model = GCN(20, 16, 3, scheme=scheme)
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(x, edges), y).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("scheme", ["fixed-8", "fixed-4/rounding=nearest", "msfp13/rounding=stochastic"])
def test_a_seed_fixes_the_training(scheme):
    assert_same(trained(scheme, 0), trained(scheme, 0))
    assert any(not torch.equal(a, b) for a, b in zip(trained(scheme, 0), trained(scheme, 1), strict=True))


@pytest.mark.parametrize(("scheme", "step"), [("fixed-3", 1 / 3), ("msfp12", 2.0**-2)])
def test_stochastic_rounding_of_gradients_is_unbiased(scheme, step):
    layer, x, _ = example("linear", f"{scheme}/rounding=stochastic")
    exact, *_ = example("linear", f"{scheme}/gradients=fp32")
    torch.manual_seed(9)
    upstream = torch.rand(NODES, 6) * 2 - 1
    upstream[:, 0] = 1  # the largest of every range: MSFP cuts none of the values
    (wanted,) = torch.autograd.grad(exact(x), x, upstream)
    draws = 400
    results = torch.stack([torch.autograd.grad(layer(x), x, upstream)[0] for _ in range(draws)])
    assert len(torch.unique(results[:, 0], dim=0)) > 1
    # An element of the rounded gradient lies within one step, so the mean over the draws of its product with the weights has Hoeffding's tail
    # 2 exp(-2 t^2 draws / (step^2 sum w^2)). With 600 elements, t of 3 times the root below fails with a chance of 1200 exp(-18) < 2e-5.
    root = (
        step * layer.weight.detach().square().sum(0).sqrt() * 1.1 / math.sqrt(draws)
    )  # 1.1: the quantized weights are a little larger
    assert ((results.mean(0) - wanted).abs() <= 3 * root).all()


# state, convert, freeze ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["fixed-8", "fixed-4/update=6", "msfp14"])
def test_state_dicts_hold_the_ranges_of_evaluation(scheme):
    layer, x, graph = example("gcn", scheme)
    layer(x, graph)
    wanted = layer.eval()(x * 0.5, graph)
    other = GCNConv(20, 6, scheme=scheme)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x * 0.5, graph), wanted)
    other.train()
    assert scheme == "msfp14" or not torch.equal(other(x * 0.5, graph), wanted)  # the batch's own range


@pytest.mark.parametrize("scheme", ["fixed-8", "fixed-5"])
def test_data_beyond_the_ranges_are_cut_as_integers_are(scheme):
    torch.manual_seed(8)
    data = Data(x=torch.randn(NODES, 20), edge_index=torch.randint(0, NODES, (2, 90)))
    model = qgnn.convert(Net(), scheme)
    model(data.x, data.edge_index)
    data.x = 3 * data.x
    report = qgnn.freeze(model, data).report
    assert report.max_relative <= 1e-4
    assert sum(layer.differing_codes for layer in report.layers) == report.ties + report.inherited


def test_evaluation_agrees_with_training():
    layer, x, graph = example("gcn", "fixed-8")
    out = layer(x, graph)
    # Integers in training, floats of the same values in evaluation: the sum of at most 50 terms.
    assert torch.allclose(layer.eval()(x, graph), out, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = pyg.GCNConv(20, 16), pyg.GCNConv(16, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.second(self.first(x, edge_index).relu(), edge_index)


@pytest.mark.parametrize("scheme", ["fixed-8", "fixed-4"])
def test_convert_train_freeze(scheme):
    torch.manual_seed(8)
    data = Data(x=torch.randn(NODES, 20), edge_index=torch.randint(0, NODES, (2, 90)))
    model = qgnn.convert(Net(), scheme)
    for _ in range(2):
        model(data.x, data.edge_index).square().mean().backward()
    frozen = qgnn.freeze(model, data)
    report = frozen.report
    assert report.max_relative <= 1e-4
    assert {layer.kind for layer in report.layers} == {"gcn"}
    assert sum(layer.differing_codes for layer in report.layers) == report.ties + report.inherited == 0


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("msfp14", "floating-point format"),
        ("fixed-8/weights=fp32", "keeps weights in float32"),
        ("fixed-8/messages=fp32", "sums in float32"),
    ],
)
def test_what_cannot_be_frozen_says_so(scheme, message):
    data = Data(x=torch.randn(NODES, 20), edge_index=torch.randint(0, NODES, (2, 90)))
    model = qgnn.convert(Net(), scheme)
    model(data.x, data.edge_index)
    with pytest.raises(ValueError, match=message):
        qgnn.freeze(model, data)


# names -------------------------------------------------------------------------------------------------------------------------------------


def test_names():
    assert parse("fixed-5") == quant.Scheme("fixed-5", "fixed", 5, components=Components(), rounding="stochastic")
    scheme = parse("msfp13/grad=16/messages=fp32/rounding=stochastic")
    assert (scheme.method, scheme.bits, scheme.rounding) == ("msfp", 13, "stochastic")
    assert scheme.components == Components(gradients=16, messages=32)
    assert parse("sdq:8,6,4,4").schedule == SDQ((8, 6, 4, 4))
    assert parse("adq:12,16/over=msfp").schedule == ADQ((12, 16))
    assert (parse("sdq:8,4/over=dq").method, parse("sdq:8,4/over=int").method) == ("dq", "qat")
    assert (parse("adq:4,8/grad=8").bits, parse("adq:4,8/grad=8").components) == (4, Components(gradients=8))
    assert parse("fp32/saved=int2").saved == "int2"
    for name in ("fixed-8/grad=6", "sdq:8", "fp32/saved=int4"):
        assert parse(name).name == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fixed-9", "there is no scheme 'fixed-9'"),
        ("msfp11", "there is no scheme 'msfp11'"),
        ("fixed-8/grad=9", "its options are /weights=.* with 2 to 8 or fp32"),
        ("msfp16/grad=8", "with 12 to 16 or fp32"),
        ("fixed-8/saved=int4", "has no option /saved=int4"),
        ("int8/grad=4", "its options are none"),
        ("fp32/saved=int3", "/saved= with int8, int4, int2"),
        ("fixed-8/rounding=up", "/rounding= with nearest or stochastic"),
        ("sdq:8,9", "must be 2 to 8"),
        ("sdq:8,,4", "must be 2 to 8"),
        ("adq:4", "adq goes up"),
        ("adq:8,4", "adq goes up"),
        ("sdq:8,4/over=a2q", "choose one of fixed, msfp, int, dq"),
        ("fixed-8/", "has no option /"),
        ("fixed-8/grad=6/gradients=4", "says /gradients= more than once"),
    ],
)
def test_names_that_there_are_not(name, message):
    with pytest.raises(ValueError, match=message):
        parse(name)
