"""The public operations: values, gradients, dtypes and errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import qgnn
from qgnn import Graph, QTensor, ops

REDUCTIONS = ("sum", "mean", "max", "min")


@pytest.fixture
def backend(backend):
    """On a GPU the test's tensors are made there."""
    with torch.device(backend):
        yield backend


def small_graph(nodes: int = 6, edges: int = 14, seed: int = 0) -> tuple[Graph, Tensor]:
    """A graph with duplicate edges, self loops and, as its last node, one without edges; and its edge_index."""
    generator = torch.Generator().manual_seed(seed)
    edge_index = torch.randint(0, nodes - 1, (2, edges), generator=generator, device="cpu").to(
        torch.get_default_device()
    )
    edge_index[:, -1] = edge_index[:, 0]
    edge_index[:, 1] = 2
    return Graph.from_edge_index(edge_index, nodes), edge_index


def summed_by_hand(edge_index: Tensor, x: Tensor, weight: Tensor | None, nodes: int, reduce: str) -> Tensor:
    rows = []
    for i in range(nodes):
        terms = [
            x[j] * (1.0 if weight is None else weight[e]) for e, (j, d) in enumerate(edge_index.t().tolist()) if d == i
        ]
        stacked = torch.stack(terms) if terms else torch.zeros(1, x.size(1), dtype=x.dtype)
        by = {"sum": stacked.sum(0), "mean": stacked.mean(0), "max": stacked.amax(0), "min": stacked.amin(0)}
        rows.append(by[reduce])
    return torch.stack(rows)


# aggregate ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_aggregate_values_and_gradients(backend, reduce, weighted):
    graph, edge_index = small_graph()
    torch.manual_seed(1)
    x = torch.randn(6, 5, requires_grad=True)
    weight = torch.randn(14, requires_grad=True) if weighted else None
    given = [t for t in (x, weight) if t is not None]
    upstream = torch.randn(6, 5)
    out = ops.aggregate(graph, x, weight, reduce)
    expected = summed_by_hand(edge_index, x, weight, 6, reduce)
    # At most 14 terms of size below 10: float32 rounds each partial sum by 2^-24 of at most 140.
    torch.testing.assert_close(out, expected, rtol=0, atol=14 * 140 * 2**-24)
    for got, wanted in zip(
        torch.autograd.grad(out, given, upstream), torch.autograd.grad(expected, given, upstream), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=14 * 140 * 2**-24)
    assert out[5].tolist() == [0.0] * 5  # the node without edges


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_aggregate_gradcheck(reduce, weighted):
    graph, _ = small_graph()
    torch.manual_seed(2)
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    with qgnn.use_backend("reference"):
        if weighted:
            weight = (torch.rand(14, dtype=torch.float64) + 0.5).requires_grad_()
            assert torch.autograd.gradcheck(lambda x, w: ops.aggregate(graph, x, w, reduce), (x, weight))
        else:
            assert torch.autograd.gradcheck(lambda x: ops.aggregate(graph, x, None, reduce), (x,))


def test_aggregate_gradcheck_bipartite():
    graph = Graph.from_edge_index(torch.tensor([[6, 0, 3, 6], [1, 0, 1, 1]]), (7, 2))
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(4, dtype=torch.float64, requires_grad=True)
    with qgnn.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda x, w: ops.aggregate(graph, x, w, "mean"), (x, weight))
        assert ops.aggregate(graph, x).shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduce", ["sum", "mean", "max"])
def test_aggregate_half_precision(backend, dtype, reduce):
    graph, edge_index = small_graph()
    torch.manual_seed(3)
    x = torch.randn(6, 4).to(dtype).requires_grad_()
    weight = torch.rand(14, requires_grad=True)
    out = ops.aggregate(graph, x, weight, reduce)
    expected = summed_by_hand(edge_index, x.float(), weight, 6, reduce)
    assert out.dtype == dtype
    # Summed in float32, so only the result is rounded to the half type: half a unit in the last place, doubled for what float32 adds to it.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), expected, rtol=eps, atol=eps * 0.01)
    gx, gw = torch.autograd.grad(out, [x, weight], torch.ones_like(out))
    ex, ew = torch.autograd.grad(expected, [x, weight], torch.ones_like(expected))
    assert (gx.dtype, gw.dtype) == (dtype, torch.float32)
    # "mean" also rounds the gradient divided by the degree; at most 14 such terms are added.
    torch.testing.assert_close(gx.float(), ex.float(), rtol=2 * eps, atol=4 * eps)
    torch.testing.assert_close(gw, ew, rtol=4 * eps, atol=16 * eps)


def test_aggregate_weights_are_in_the_callers_order_and_added_loops_weigh_one():
    graph, edge_index = small_graph()
    x, weight = torch.randn(6, 3), torch.rand(14)
    loops = graph.add_self_loops()
    from torch_geometric.utils import add_remaining_self_loops

    pyg_edges, pyg_weight = add_remaining_self_loops(edge_index, weight, 1.0, 6)
    torch.testing.assert_close(ops.aggregate(loops, x, weight), summed_by_hand(pyg_edges, x, pyg_weight, 6, "sum"))


def test_aggregate_is_deterministic_and_takes_strided_input(backend):
    graph, _ = small_graph(20, 100)
    x = torch.randn(40, 12)[::2, ::2]
    out = ops.aggregate(graph, x)
    assert torch.equal(out, ops.aggregate(graph, x.clone()))
    assert torch.equal(out, ops.aggregate(graph, x.t().contiguous().t()))


def test_aggregate_columns_of_codes_is_exact(backend):
    graph, edge_index = small_graph()
    torch.manual_seed(4)
    for bits in (8, 4, 2, 1):
        for signed in (True, False):
            x = torch.randn(6, 7) if signed else torch.rand(6, 7)
            step = torch.rand(7) + 0.1
            q = QTensor.quantize(x, step, bits, axis="col", signed=signed)
            sums = summed_by_hand(edge_index, q.codes().double(), None, 6, "sum").float()
            assert torch.equal(ops.aggregate(graph, q), sums * step)
            mean = ops.aggregate(graph, q, reduce="mean")
            torch.testing.assert_close(mean, sums * step / graph.in_degree.clamp_min(1).unsqueeze(1))
            assert mean.dtype == torch.float32


def test_aggregate_rows_of_mixed_widths(backend):
    graph, edge_index = small_graph()
    torch.manual_seed(5)
    q = QTensor.quantize(torch.randn(6, 9), torch.rand(6) + 0.1, torch.tensor([8, 4, 2, 0, 3, 1]))
    weight = torch.rand(14)
    for w in (None, weight):
        for reduce in ("sum", "mean"):
            torch.testing.assert_close(
                ops.aggregate(graph, q, w, reduce), summed_by_hand(edge_index, q.dequantize(), w, 6, reduce)
            )


def test_unsorted_schedule_gives_the_same_integers(backend):
    torch.manual_seed(6)
    edge_index = torch.randint(0, 10, (2, 200))
    edge_index[1, :100] = 3  # one segment of its own
    q = QTensor.quantize(torch.randn(10, 6), torch.rand(6) + 0.1, 4, axis="col")
    sums = [ops.aggregate(Graph.from_edge_index(edge_index, 10, sort=sort), q) for sort in (True, False)]
    assert torch.equal(*sums)


def test_empty_graphs(backend):
    for nodes in (0, 3):
        graph = Graph.from_edge_index(torch.empty(2, 0, dtype=torch.long), nodes)
        x = torch.randn(nodes, 4, requires_grad=True)
        for reduce in REDUCTIONS:
            out = ops.aggregate(graph, x, None, reduce)
            assert torch.equal(out, torch.zeros(nodes, 4))
            assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.zeros(nodes, 4))
        q = QTensor.quantize(x.detach(), torch.ones(4), 4, axis="col")
        assert torch.equal(ops.aggregate(graph, q), torch.zeros(nodes, 4))


@pytest.mark.parametrize(
    ("x", "weight", "reduce", "error", "message"),
    [
        (
            torch.ones(6, 2),
            None,
            "median",
            ValueError,
            "reduce must be one of 'sum', 'mean', 'max', 'min', got 'median'",
        ),
        (torch.ones(5, 2), None, "sum", ValueError, r"x must be \[6, F\] for Graph\(.*\), got shape \(5, 2\)"),
        (torch.ones(6), None, "sum", ValueError, r"x must be \[6, F\]"),
        (
            torch.ones(6, 2, dtype=torch.long),
            None,
            "sum",
            TypeError,
            "x must be a floating-point tensor or a QTensor, got torch.int64",
        ),
        ([[1.0]], None, "sum", TypeError, "x must be a torch.Tensor or a QTensor, got list"),
        (
            torch.ones(6, 2, device="meta"),
            None,
            "sum",
            ValueError,
            r"x is on meta and the graph on cpu; move one with .to\(\)",
        ),
        (
            torch.ones(6, 2),
            torch.ones(13),
            "sum",
            ValueError,
            r"edge_weight must be \[14\], one for each edge, got \(13,\)",
        ),
        (
            torch.ones(6, 2),
            torch.ones(14, dtype=torch.long),
            "sum",
            TypeError,
            "edge_weight must be a floating-point tensor",
        ),
        (
            QTensor.quantize(torch.ones(6, 2), 1.0, 4),
            None,
            "max",
            ValueError,
            r"takes a float tensor; pass x.dequantize\(\)",
        ),
        (
            QTensor.quantize(torch.ones(6, 2), 1.0, 4, axis="col"),
            torch.ones(14),
            "sum",
            ValueError,
            "edge weights need steps per row",
        ),
    ],
)
def test_aggregate_errors(x, weight, reduce, error, message):
    with pytest.raises(error, match=message):
        ops.aggregate(small_graph()[0], x, weight, reduce)


def test_aggregate_wants_a_graph():
    with pytest.raises(TypeError, match=r"g must be a qgnn.Graph, got Tensor; make one with Graph.from_edge_index"):
        ops.aggregate(torch.zeros(2, 1, dtype=torch.long), torch.ones(1, 1))


def test_headroom():
    graph = Graph.from_edge_index(torch.zeros(2, 1, dtype=torch.long), 1)
    graph.max_degree = 2**24 - 1  # 128 * (2^24 - 1) < 2^31; a graph of that size would take 64 MB
    ops.check_headroom(graph)
    graph.max_degree = 2**24
    ops.check_headroom(graph, 3)  # codes of 4 bits have more room
    with pytest.raises(ValueError, match=r"a node has 16777216 in-edges: int32 sums of 8-bit codes could overflow"):
        ops.check_headroom(graph)
    q = QTensor.quantize(torch.ones(1, 2), 1.0, 8, axis="col", signed=False)
    graph.max_degree = 2**23
    with pytest.raises(ValueError, match=r"could overflow"):
        ops.aggregate(graph, q)
    ops.check_product_headroom(65_793)  # 65793 * 255 * 128 = 2,147,483,520 = 2^31 - 128
    with pytest.raises(ValueError, match=r"65794 products of 8-bit codes could overflow int32; split the features"):
        ops.check_product_headroom(65_794)


# fake_quantize ------------------------------------------------------------------------------------------------------------------------


def scalar_formulas(x: float, s: float, b: int, signed: bool) -> tuple[float, float, float, float]:
    """Value and derivatives by x, step and width of one element: NUMERICS 1 and 2, A2Q eq. 1 and 10."""
    q = (max(0, 2 ** (b - 1) - 1) if b else 0) if signed else 2**b - 1
    sign = (x > 0) - (x < 0)
    if not signed and x < 0:
        return 0.0, 0.0, 0.0, 0.0
    value = sign * s * min(math.floor(abs(x) / s + 0.5), q)
    if abs(x) >= s * q:
        return value, 0.0, float(sign * q), sign * 2.0 ** (b - 1 if signed else b) * math.log(2) * s
    return value, 1.0, (value - x) / s, 0.0


@pytest.mark.parametrize("gradient", ["global", "local"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("ste", ["clip", "pass"])
@pytest.mark.parametrize("axis", ["row", "col"])
def test_fake_quantize_by_the_formulas(backend, gradient, signed, ste, axis):
    torch.manual_seed(7)
    n, f = 9, 11
    length = n if axis == "row" else f
    x = (torch.randn(n, f) * 2).requires_grad_()
    x.data[0, 0] = 0.0
    step = (torch.rand(length) * 0.5 + 0.1).requires_grad_()
    bits = (torch.arange(length) % 9 + 0.3).requires_grad_()
    upstream = torch.randn(n, f)
    out = ops.fake_quantize(x, step, bits, axis=axis, signed=signed, gradient=gradient, ste=ste)
    got_x, got_step, got_bits = torch.autograd.grad(out, [x, step, bits], upstream)
    x, step, bits = x.detach(), step.detach(), bits.detach()
    want, want_x = torch.zeros(n, f), torch.zeros(n, f)
    want_step, want_bits = torch.zeros(length, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
    for i in range(n):
        for j in range(f):
            k = i if axis == "row" else j
            xv, g = float(x[i, j]), float(upstream[i, j])
            value, d_x, d_step, d_bits = scalar_formulas(xv, float(step[k]), k % 9, signed)
            want[i, j], want_x[i, j] = value, g * d_x if ste == "clip" else g
            if gradient == "local":
                g = ((value > xv) - (value < xv)) / (f if axis == "row" else n)
            want_step[k] += g * d_step
            want_bits[k] += g * d_bits
    # The values are a step times a small integer in float32: one rounding. The sums have at most 11 terms of size below 2^8.
    torch.testing.assert_close(out, want, rtol=2**-23, atol=0)
    torch.testing.assert_close(got_x, want_x, rtol=2**-23, atol=0)
    torch.testing.assert_close(got_step.double(), want_step, rtol=1e-5, atol=11 * 2**8 * 2**-23)
    torch.testing.assert_close(got_bits.double(), want_bits, rtol=1e-5, atol=11 * 2**8 * 2**-23)


def test_fake_quantize_equals_the_packed_codes(backend):
    torch.manual_seed(8)
    x, step, bits = torch.randn(7, 10), torch.rand(7) + 0.1, torch.randint(0, 9, (7,))
    assert torch.equal(ops.fake_quantize(x, step, bits.float()), QTensor.quantize(x, step, bits).dequantize())


def test_local_gradient_does_not_depend_on_the_upstream_gradient(backend):
    x, step, bits = (
        torch.randn(4, 6),
        torch.full((4,), 0.2, requires_grad=True),
        torch.full((4,), 3.0, requires_grad=True),
    )
    first, second = (
        torch.autograd.grad(ops.fake_quantize(x, step, bits, gradient="local"), [step, bits], torch.full((4, 6), g))
        for g in (1.0, -50.0)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_fake_quantize_with_one_step_for_all(backend):
    x = torch.randn(5, 6)
    step, bits = torch.tensor(0.3, requires_grad=True), torch.tensor([3.0], requires_grad=True)
    out = ops.fake_quantize(x, step, bits)
    assert torch.equal(out, ops.fake_quantize(x, torch.full((5,), 0.3), torch.full((5,), 3.0)))
    assert torch.equal(out, ops.fake_quantize(x, 0.3, 3))
    upstream = torch.randn(5, 6)
    got = torch.autograd.grad(out, [step, bits], upstream)
    rows = [torch.full((5,), v, requires_grad=True) for v in (0.3, 3.0)]
    wanted = torch.autograd.grad(ops.fake_quantize(x, *rows), rows, upstream)
    assert (got[0].shape, got[1].shape) == ((), (1,))
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g.reshape(()), w.sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gradient", ["global", "local"])
def test_fake_quantize_half_precision(backend, dtype, gradient):
    torch.manual_seed(9)
    x = torch.randn(6, 9).to(dtype).requires_grad_()
    step, bits = (torch.rand(6) + 0.1).requires_grad_(), torch.full((6,), 3.0, requires_grad=True)
    out = ops.fake_quantize(x, step, bits, gradient=gradient)
    x32 = x.detach().float().requires_grad_()
    expected = ops.fake_quantize(x32, step, bits, gradient=gradient)
    assert out.dtype == dtype
    assert torch.equal(out, expected.to(dtype))
    got = torch.autograd.grad(out, [x, step, bits], torch.ones_like(out))
    wanted = torch.autograd.grad(expected, [x32, step, bits], torch.ones_like(expected))
    assert got[0].dtype == dtype
    assert torch.equal(got[0].float(), wanted[0])
    torch.testing.assert_close(got[1:], wanted[1:])


def test_fake_quantize_strided(backend):
    base = torch.randn(12, 8)
    step = torch.rand(12)[::2] + 0.1
    x = base[::2, 1::2].requires_grad_()
    dense = x.detach().clone().requires_grad_()
    steps = [s.detach().requires_grad_() for s in (step, step.clone())]
    out, expected = (ops.fake_quantize(v, s, 3) for v, s in zip((x, dense), steps, strict=True))
    assert torch.equal(out, expected)
    upstream = torch.randn(4, 6).t()
    for got, wanted in zip(
        torch.autograd.grad(out, [x, steps[0]], upstream),
        torch.autograd.grad(expected, [dense, steps[1]], upstream),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_nan_passes_and_debug_refuses_it(backend, monkeypatch):
    x = torch.tensor([[1.0, float("nan")], [2.0, 3.0]])
    monkeypatch.delenv("QGNN_DEBUG", raising=False)
    out = ops.fake_quantize(x, 1.0, 4)
    assert out.isnan().tolist() == [[False, True], [False, False]]
    monkeypatch.setenv("QGNN_DEBUG", "1")
    with pytest.raises(ValueError, match=r"x\[0, 1\] is nan; quantization needs finite values"):
        ops.fake_quantize(x, 1.0, 4)
    with pytest.raises(ValueError, match=r"step\[1\] is -1.0; steps must be positive and finite"):
        ops.fake_quantize(torch.ones(2, 2), torch.tensor([1.0, -1.0]), 4)
    with pytest.raises(ValueError, match=r"x\[0, 1\] is nan"):
        ops.quantized_linear(x, torch.ones(2, 2), torch.ones(2), torch.ones(2))


@pytest.mark.parametrize(
    ("x", "arguments", "error", "message"),
    [
        (torch.ones(2, 3, dtype=torch.long), {}, TypeError, "x must be a floating-point tensor, got torch.int64"),
        (torch.ones(3), {}, ValueError, r"x must be 2-D \[nodes, features\]"),
        (torch.ones(2, 3), {"step": torch.ones(3)}, ValueError, r"step must be a number or have shape \[2\]"),
        (torch.ones(2, 3), {"bits": torch.ones(2, 3)}, ValueError, r"bits must be a number or have shape \[2\]"),
        (torch.ones(2, 3), {"bits": torch.ones(2, device="meta")}, ValueError, "bits is on meta and x on cpu"),
        (torch.ones(2, 3), {"axis": "column"}, ValueError, "axis must be"),
        (torch.ones(2, 3), {"gradient": "none"}, ValueError, "gradient must be one of 'global', 'local', got 'none'"),
        (torch.ones(2, 3), {"ste": "ste"}, ValueError, "ste must be one of 'clip', 'pass', got 'ste'"),
    ],
)
def test_fake_quantize_errors(x, arguments, error, message):
    with pytest.raises(error, match=message):
        ops.fake_quantize(x, **{"step": 1.0, "bits": 4, **arguments})


# fake_quantize_affine -----------------------------------------------------------------------------------------------------------------


def test_affine_by_hand(backend):
    x = torch.tensor([[-1.0, -0.26, 0.0, 0.25, 0.75, 1.25, 9.0]], requires_grad=True)
    scale, zero = torch.tensor([0.5]), torch.tensor([1], dtype=torch.int32)
    # x / 0.5 = -2, -0.52, 0, 0.5, 1.5, 2.5, 18, half to even: -2, -1, 0, 0, 2, 2, 18; plus zero point, in 0..7: 0, 0, 1, 1, 3, 3, 7
    out = ops.fake_quantize_affine(x, scale, zero, 3)
    assert out.tolist() == [[-0.5, -0.5, 0.0, 0.0, 1.0, 1.0, 3.0]]
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.tolist() == [[0, 1, 1, 1, 1, 1, 0]]
    (gradient,) = torch.autograd.grad(ops.fake_quantize_affine(x, scale, zero, 3, ste="pass").sum(), x)
    assert gradient.tolist() == [[1] * 7]


def test_affine_protected_rows_pass(backend):
    x = (torch.randn(6, 9) * 5).requires_grad_()
    protect = torch.tensor([True, False, False, True, False, True])
    scale, zero = torch.tensor([0.5]), torch.tensor([3], dtype=torch.int32)
    out = ops.fake_quantize_affine(x, scale, zero, 3, protect=protect)
    assert torch.equal(out[protect], x[protect])
    assert torch.equal(out[~protect], ops.fake_quantize_affine(x, scale, zero, 3)[~protect])
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient[protect], torch.ones(3, 9))
    assert not gradient[~protect].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(3)}, r"x must be a 2-D floating-point tensor \[nodes, features\]"),
        ({"x": torch.ones(3, 2, dtype=torch.int32)}, "x must be a 2-D floating-point tensor"),
        ({"bits": 1}, "an affine quantizer has 2 to 8 bits, got 1"),
        ({"bits": 9}, "an affine quantizer has 2 to 8 bits, got 9"),
        ({"scale": torch.ones(3)}, "scale must be a tensor of one element on cpu"),
        ({"zero": 0}, "zero must be a tensor of one element on cpu"),
        ({"protect": torch.zeros(2, dtype=torch.bool)}, r"protect must be bool of shape \[3\], got torch.bool \(2,\)"),
        ({"protect": torch.zeros(3)}, r"protect must be bool of shape \[3\], got torch.float32 \(3,\)"),
    ],
)
def test_affine_errors(arguments, message):
    given = {
        "x": torch.ones(3, 2),
        "scale": torch.ones(1),
        "zero": torch.zeros(1, dtype=torch.int32),
        "bits": 4,
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        ops.fake_quantize_affine(**given)


# quantized_linear ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("ste", ["clip", "pass"])
def test_quantized_linear_is_fake_quantize_times_weight(backend, signed, ste):
    torch.manual_seed(10)
    x = torch.randn(8, 13) if signed else torch.rand(8, 13)
    given = [x, torch.rand(8) * 0.3 + 0.05, torch.arange(8) + 0.4, torch.randn(5, 13).t()]
    given = [t.detach().requires_grad_() for t in given]
    x, step, bits, weight = given
    out = ops.quantized_linear(x, weight, step, bits, signed=signed, ste=ste)
    expected = ops.fake_quantize(x, step, bits, signed=signed, gradient="local", ste=ste) @ weight
    upstream = torch.randn(8, 5)
    torch.testing.assert_close(out, expected)
    got, wanted = (torch.autograd.grad(y, given, upstream) for y in (out, expected))
    torch.testing.assert_close(got, wanted)
    assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[2], wanted[2])


def test_quantized_linear_with_one_step_for_all(backend):
    x, weight = torch.randn(4, 6), torch.randn(6, 2)
    step, bits = torch.tensor(0.2, requires_grad=True), torch.tensor([4.0], requires_grad=True)
    out = ops.quantized_linear(x, weight, step, bits)
    gradients = torch.autograd.grad(out.sum(), [step, bits])
    wanted = torch.autograd.grad((ops.fake_quantize(x, step, bits, gradient="local") @ weight).sum(), [step, bits])
    torch.testing.assert_close(gradients, wanted)
    assert torch.equal(ops.quantized_linear(x, weight, 0.2, 4), out)


def test_quantized_linear_errors():
    x, weight, steps = torch.ones(4, 3), torch.ones(3, 2), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight must be \[3, M\] for x \(4, 3\), got \(2, 3\)"):
        ops.quantized_linear(x, weight.t(), steps, steps)
    with pytest.raises(ValueError, match=r"step must be a number or have shape \[4\]"):
        ops.quantized_linear(x, weight, torch.ones(3), steps)
    with pytest.raises(TypeError, match=r"x and weight must be float32, got torch.float16 and torch.float32"):
        ops.quantized_linear(x.half(), weight, steps, steps)
    with pytest.raises(ValueError, match=r"ste must be one of"):
        ops.quantized_linear(x, weight, steps, steps, ste="none")


# matmul -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("w_bits", [4, 8, 2])
@pytest.mark.parametrize("x_bits", ["mixed", 8, 4, 2, 1, 0])
def test_matmul(backend, signed, w_bits, x_bits):
    torch.manual_seed(11)
    x = torch.randn(10, 19) if signed else torch.rand(10, 19)
    bits = torch.arange(10) % 9 if x_bits == "mixed" else x_bits
    xq = QTensor.quantize(x, torch.rand(10) * 0.2 + 0.02, bits, signed=signed)
    wq = QTensor.quantize(torch.randn(19, 6), torch.rand(6) * 0.2 + 0.02, w_bits, axis="col")
    bias = torch.randn(6)
    out = ops.matmul(xq, wq, bias)
    acc = xq.codes().double() @ wq.codes().double()
    assert out.acc.dtype == torch.int32
    assert torch.equal(out.acc.double(), acc)
    expected = (
        acc.float() * xq.step.unsqueeze(1) * wq.step + bias
    )  # the order of the epilogue: every rounding is the same
    assert torch.equal(out.as_subclass(torch.Tensor), expected)
    # 19 products of float32 roundings of the two factors and of their sum
    dense = xq.dequantize().double() @ wq.dequantize().double() + bias
    torch.testing.assert_close(out.as_subclass(torch.Tensor).double(), dense, rtol=1e-5, atol=1e-4)


def test_matmul_result_behaves_like_a_tensor():
    xq, wq = QTensor.quantize(torch.randn(3, 4), 0.1, 8), QTensor.quantize(torch.randn(4, 2), 0.1, 8, axis="col")
    out = ops.matmul(xq, wq)
    assert isinstance(out, torch.Tensor)
    assert type(out + 1) is torch.Tensor
    assert out.shape == (3, 2)
    assert torch.equal(out.relu(), ops.matmul(xq, wq).clamp_min(0))


def test_matmul_errors():
    x, w = torch.ones(3, 4), torch.ones(4, 2)
    xq, wq = QTensor.quantize(x, 0.1, 8), QTensor.quantize(w, 0.1, 8, axis="col")
    with pytest.raises(TypeError, match=r"matmul takes two QTensors, got Tensor and QTensor; see QTensor.quantize"):
        ops.matmul(x, wq)
    with pytest.raises(ValueError, match=r"x \(3, 4\) and w \(3, 4\) do not fit"):
        ops.matmul(xq, QTensor.quantize(x, 0.1, 8, axis="col"))
    with pytest.raises(ValueError, match=r'x needs axis="row"; w needs axis="col", signed=True and no zero point'):
        ops.matmul(xq, QTensor.quantize(w, 0.1, 8))
    with pytest.raises(ValueError, match=r"signed=True"):
        ops.matmul(xq, QTensor.quantize(w, 0.1, 8, axis="col", signed=False))
    with pytest.raises(ValueError, match=r"bias must be \[2\], got \(3,\)"):
        ops.matmul(xq, wq, torch.ones(3))
    with pytest.raises(ValueError, match=r"x is on cpu and w on meta"):
        ops.matmul(xq, wq.to("meta"))
    wide = QTensor.quantize(torch.zeros(1, 65_794), 1.0, 1)
    with pytest.raises(ValueError, match=r"65794 products"):
        ops.matmul(wide, QTensor.quantize(torch.zeros(65_794, 1), 1.0, 1, axis="col"))


def test_matmul_with_a_zero_point(backend):
    torch.manual_seed(12)
    plain = QTensor.quantize(torch.rand(5, 7), 0.01, 8, signed=False)
    shifted = QTensor(plain.data, plain.step, plain.bits, "row", False, 7, plain.counts, None, zero=100)
    wq = QTensor.quantize(torch.randn(7, 3), 0.05, 4, axis="col")
    assert torch.equal(ops.matmul(shifted, wq).acc.double(), (plain.codes() - 100).double() @ wq.codes().double())
    with pytest.raises(ValueError, match=r"has a zero point; pass x.dequantize"):
        ops.aggregate(small_graph(5)[0], shifted)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_relu_dropout_keeps_a_bit_an_element(p):
    x = torch.randn(40, 24, requires_grad=True)
    torch.manual_seed(1)
    survived = ops.relu_dropout(torch.ones_like(x), p, True) > 0
    assert survived.all() if p == 0 else 0.4 < survived.float().mean() < 0.8
    expected = torch.relu(x) * survived / (1 - p)
    (grad,) = torch.autograd.grad(expected.square().sum(), x)
    kept = []
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = ops.relu_dropout(x, p, True)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)
    assert sum(t.nbytes for t in kept) == 40 * 24 // 8
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), x)[0], grad, rtol=1e-6, atol=0)
    assert torch.equal(ops.relu_dropout(x, p, False), torch.relu(x))
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\)"):
        ops.relu_dropout(x, 1.0, True)
