import math
import tracemalloc

import pytest
import torch
import torch_geometric.nn as pyg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch_geometric.utils import softmax

from qgnn import Graph, ops
from qgnn.kernels import attention
from qgnn.kernels.backend import implementation, use_backend
from qgnn.kernels.schedule import build_schedule, rows_of_edges

from .assertions import assert_bitwise, assert_sum
from .test_aggregate import GRAPHS, csr, graphs, normal, random_edges, transposed

SLOPE = 0.2


class Case:
    """A graph with small segments and hubs, and the operands of both operations on it."""

    def __init__(self, n, m, edges, heads, channels, device="cpu", **options):
        dtype, offsets = options.get("dtype", torch.float32), options.get("offsets", torch.int32)
        indptr, indices = csr(n, edges)
        indptr = indptr.to(offsets)
        by_source, sizes = transposed(n, m, indptr, indices), options.get("schedule", {"narrow": 2, "chunk": 4})
        schedule, back = ([t.to(device) for t in build_schedule(p, **sizes)] for p in (indptr, by_source[0]))
        rows, by_source = rows_of_edges(indptr).to(device), [t.to(device) for t in by_source]
        self.indptr, self.indices, self.rows, self.schedule = indptr.to(device), indices.to(device), rows, schedule
        self.transposed = [*by_source, *back]
        e = indices.numel()

        def values(*shape, k):
            return normal(*shape, device=device, seed=10 * options.get("seed", 0) + k).to(dtype)

        self.x, self.grad = values(m, heads, channels, k=1), values(n, heads, channels, k=2)
        self.src, self.dst, self.scores = values(m, heads, k=3), values(n, heads, k=4), 3 * values(e, heads, k=5)
        self.edge_score = self.scale = None
        if options.get("extras", True):
            self.edge_score, self.scale = values(e, heads, k=6), values(e, heads, k=7).abs()

    @property
    def structure(self):
        return self.indptr, self.indices, self.rows, self.schedule

    @property
    def operands(self):
        return self.x, self.src, self.dst, self.edge_score, self.scale

    def forward(self):
        return *self.structure, *self.operands, SLOPE

    def backward(self):
        results = attention.gat_aggregate_reference(*self.forward())
        return *self.structure, self.transposed, self.grad, *self.operands, *results, SLOPE

    def terms(self, top, scores):
        """Relative error of alpha in units of eps, as the terms of a sum. An exponential of ``-d`` is within ``2 d`` (rounding of the argument, and
        of its product with log2 e) plus 4 (of the function); the online softmax rescales once an edge, whose exponents add up to ``d``; and
        the sum of ``degree`` of them rounds as often. exp(-d) is 0 in float32 beyond 104."""
        degree = max((p[1:] - p[:-1]).max().item() if p.numel() > 1 else 0 for p in (self.indptr, self.transposed[0]))
        spread = (top[self.rows.long()] - scores).max().item() if scores.numel() else 0
        return 6 * degree + 4 * min(spread, 104) + 16


def case(name, heads, channels, device, **options):
    return Case(*GRAPHS[name], heads, channels, device, **options)


def check_softmax(c):
    arguments = (c.indptr, c.rows, c.schedule, c.scores)
    actual, expected = attention.edge_softmax(*arguments), attention.edge_softmax_reference(*arguments)
    top = attention._statistics_reference(c.rows, c.indptr.numel() - 1, c.scores.float())[0]
    terms = c.terms(top, c.scores.float())
    assert_sum(actual, expected, expected.float(), terms, "alpha")
    grad = normal(*c.scores.shape, device=c.scores.device, seed=8).to(c.scores.dtype)
    arguments = (c.indptr, c.rows, c.schedule, expected, grad)
    actual = attention.edge_softmax_backward(*arguments)
    wide = expected.float()
    inner = attention._row_sum(c.rows, c.indptr.numel() - 1, wide * grad.float().abs())[c.rows.long()]
    magnitude = wide * (grad.float().abs() + inner)
    assert_sum(actual, attention.edge_softmax_backward_reference(*arguments), magnitude, terms, "gradient")


def check_gat(c):
    """Forward, then backward from the reference's results, so that each is compared by itself."""
    actual, expected = attention.gat_aggregate(*c.forward()), attention.gat_aggregate_reference(*c.forward())
    sizes = (c.x.abs(), *c.operands[1:])
    magnitude = attention.gat_aggregate_reference(
        *c.structure, *(t if t is None else t.to(expected[1].dtype) for t in sizes), SLOPE
    )[0]
    raw = attention._raw_reference(
        c.rows, c.indices, c.src.to(expected[1].dtype), c.dst.to(expected[1].dtype), c.edge_score
    )
    terms = c.terms(expected[1], torch.where(raw > 0, raw, SLOPE * raw))
    # The scores are the same three sums and one product everywhere, and the maximum rounds nothing.
    assert_bitwise(actual[1], expected[1], "top")
    assert_sum(actual[2], expected[2], expected[2], terms, "total")
    assert_sum(actual[0], expected[0], magnitude, terms, "out")
    arguments = c.backward()
    actual = attention.gat_backward(*arguments)
    # With |g|, |x| and -|out| every term of every gradient is positive.
    wide = [t.to(expected[1].dtype) for t in (c.grad, c.x, expected[0])]
    absolute = (
        *c.structure,
        c.transposed,
        wide[0].abs(),
        wide[1].abs(),
        *c.operands[1:],
        -wide[2].abs(),
        *expected[1:],
        SLOPE,
    )
    bounds = attention.gat_backward_reference(*absolute)
    for name, a, b, bound in zip(
        ("x", "src", "dst", "edge_score"), actual, attention.gat_backward_reference(*arguments), bounds, strict=True
    ):
        assert_sum(a, b, bound, terms + c.x.size(2), f"gradient of {name}")


def test_hand_computed():
    # Row 0: raw ln 3 from node 1, and -5 ln 9 from node 2, which the slope makes -ln 9: p = 3, 1/9 of the largest, 1 and 1/27; row 1 empty.
    indptr, indices = csr(2, [(1, 0), (2, 0)])
    rows, schedule = rows_of_edges(indptr), list(build_schedule(indptr))
    src, dst = torch.tensor([[9.0], [math.log(3) - 1], [-5 * math.log(9) - 1]]), torch.tensor([[1.0], [7.0]])
    x = torch.tensor([[[5.0, 5.0]], [[28.0, 0.0]], [[0.0, 56.0]]])
    out, top, total = attention.gat_aggregate_reference(indptr, indices, rows, schedule, x, src, dst, None, None, 0.2)
    # 27/28 * 28 and 1/28 * 56; 1e-6: six roundings of 2^-24, and the logarithms' own
    torch.testing.assert_close(out, torch.tensor([[[27.0, 2.0]], [[0.0, 0.0]]]), rtol=1e-6, atol=0)
    torch.testing.assert_close(top[0, 0], torch.tensor(math.log(3)), rtol=1e-6, atol=0)
    assert top[1, 0] == torch.finfo(torch.float32).min
    torch.testing.assert_close(total, torch.tensor([[28 / 27], [1.0]]), rtol=1e-6, atol=0)
    scores = torch.tensor([[math.log(3)], [-math.log(9)]])
    alpha = attention.edge_softmax_reference(indptr, rows, schedule, scores)
    torch.testing.assert_close(alpha, torch.tensor([[27 / 28], [1 / 28]]), rtol=1e-6, atol=0)
    # alpha * (grad - <alpha, grad>) for grad = (28, 0): 27/28 * (28 - 27) and 1/28 * (0 - 27)
    grad = attention.edge_softmax_backward_reference(indptr, rows, schedule, alpha, torch.tensor([[28.0], [0.0]]))
    torch.testing.assert_close(grad, torch.tensor([[27 / 28], [-27 / 28]]), rtol=1e-5, atol=0)


@graphs
def test_graphs(backend, name):
    c = case(name, 3, 5, backend)
    check_gat(c)
    check_softmax(c)


@pytest.mark.parametrize(
    ("heads", "channels"), [(2, 0), (0, 4), (1, 1), (1, 130), (8, 1), (8, 7), (20, 8)], ids=lambda n: str(n)
)
def test_widths(backend, heads, channels):
    # 130 channels are two blocks, which share the slots of a hub's statistics
    name = "one hub" if channels == 130 else "duplicates and self loops"
    c = case(name, heads, channels, backend, extras=heads != 8)
    check_gat(c)
    check_softmax(c)


def test_two_runs_give_the_same_bits(backend):
    for op, arguments in every_op(backend, "one hub"):
        first, second = op(*arguments), op(*arguments)
        for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (first, second)), strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half(backend, dtype):
    c = case("two hubs", 4, 8, backend, dtype=dtype)
    check_gat(c)
    check_softmax(c)


def test_64_bit_offsets(backend):
    c = case("two hubs", 4, 8, backend, offsets=torch.int64)
    check_gat(c)
    check_softmax(c)


def test_non_contiguous(backend):
    c = case("two hubs", 4, 8, backend)
    for name in ("x", "grad", "src", "dst", "edge_score", "scale", "scores"):
        value = getattr(c, name)
        setattr(c, name, torch.stack([value, value], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1))
        assert not getattr(c, name).is_contiguous()
    check_gat(c)
    check_softmax(c)


def test_large_scores_do_not_overflow(backend):
    c = case("two hubs", 2, 4, backend, extras=False)
    c.src, c.scores = c.src * 1e4, c.scores * 1e4
    check_gat(c)
    check_softmax(c)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, which Triton's interpreter computes with
@pytest.mark.parametrize("name", ["duplicates and self loops", "two hubs"])
def test_infinite_and_nan_scores(backend, name):
    """-inf takes the edge out, a row of nothing else is as an empty one; NaN and +inf make their row NaN, and no other."""
    c = case(name, 3, 4, backend)
    e = c.indices.numel()
    c.edge_score[:, 0] = -torch.inf
    c.edge_score[: e // 2, 1] = -torch.inf
    c.edge_score[e // 2, 2], c.edge_score[-1, 2] = torch.nan, torch.inf
    c.scores = c.edge_score
    out = attention.gat_aggregate(*c.forward())[0]
    expected = attention.gat_aggregate_reference(*c.forward())[0]
    assert torch.equal(out.isnan(), expected.isnan())
    bad = torch.zeros(out.size(0), dtype=torch.bool, device=out.device)
    bad[c.rows[[e // 2, -1]].long()] = True
    assert torch.equal(out[:, 2].isnan().all(1), bad)
    assert (out[:, 0] == 0).all()
    # Both are sums of the same few terms below: see Case.terms for 1e-5, some 80 roundings
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    arguments = (c.indptr, c.rows, c.schedule, c.scores)
    alpha = attention.edge_softmax(*arguments)
    assert (alpha[:, 0] == 0).all()
    torch.testing.assert_close(alpha, attention.edge_softmax_reference(*arguments), rtol=1e-5, atol=0, equal_nan=True)
    for a, b in zip(
        attention.gat_backward(*c.backward()), attention.gat_backward_reference(*c.backward()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_nan_in_x_stays_in_its_channel(backend):
    c = case("two hubs", 2, 4, backend)
    c.x[1, 1, 2] = torch.nan
    touched = torch.zeros(c.indptr.numel() - 1, dtype=torch.bool, device=c.x.device)
    touched[c.rows[c.indices == 1].long()] = True
    nan = attention.gat_aggregate(*c.forward())[0].isnan()
    assert torch.equal(nan[:, 1, 2], touched)
    assert nan.sum() == touched.sum()


def test_exponential_in_float32():
    """Every exponent, and the ends of the range: 2 units in the last place of exp, as kernels/cpu/attention_rows.py says."""
    from qgnn.kernels.cpu.attention_rows import exponentials

    x = torch.cat([-torch.linspace(0, 87, 100_001), torch.tensor([-0.0, -1e-30, -87.1, -104.0, -3e38, -torch.inf])])
    actual = x.clone()
    exponentials(actual.numpy(), 0, actual.numel())
    exact = x.double().exp()
    # a unit in the last place is at most 2^-23 of the value
    assert ((actual.double() - exact).abs() <= 2 * 2.0**-23 * exact)[x >= -87].all()
    assert (actual[x < -87] == 0).all()
    assert actual[-6] == 1


@pytest.mark.parametrize("name", ["spread", "hub"])
def test_threads_agree(name, threads):
    """Enough work for two threads; one row holds most of the edges in the second graph."""
    n, edges = 800, random_edges(800, 800, 8000)
    if name == "hub":
        edges[:6000, 1] = 5
    c = Case(n, n, edges.tolist(), 8, 4)
    c.scores = normal(8000, 8).repeat(1, 4)

    def everything():
        alpha = attention.edge_softmax(c.indptr, c.rows, c.schedule, c.scores)
        gradient = attention.edge_softmax_backward(c.indptr, c.rows, c.schedule, alpha, c.scores)
        return alpha, gradient, *attention.gat_aggregate(*c.forward()), *attention.gat_backward(*c.backward())

    threads(1)
    alone = everything()
    threads(2)
    for a, b in zip(everything(), alone, strict=True):
        assert_bitwise(a, b)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    st.integers(1, 8),
    st.integers(0, 60),
    st.integers(1, 9),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_graph(n, m, edges, heads, channels, extras, seed):
    c = Case(n, m, random_edges(n, m, edges, seed).tolist(), heads, channels, extras=extras, seed=seed)
    check_gat(c)
    check_softmax(c)


def every_op(device, name):
    c = case(name, 2, 5, device)
    alpha = attention.edge_softmax_reference(c.indptr, c.rows, c.schedule, c.scores)
    yield attention.edge_softmax, (c.indptr, c.rows, c.schedule, c.scores)
    yield attention.edge_softmax_backward, (c.indptr, c.rows, c.schedule, alpha, c.scores)
    yield attention.gat_aggregate, c.forward()
    yield attention.gat_backward, c.backward()


def test_opcheck(backend):
    for op, arguments in every_op(backend, "isolated nodes"):
        torch.library.opcheck(op, arguments)


# The public operations

EDGES = torch.tensor([[3, 0, 2, 1, 4, 4, 2, 0, 0], [1, 1, 0, 1, 3, 3, 2, 4, 1]])


def leaf(*shape, seed=0):
    return normal(*shape, seed=seed).double().requires_grad_()


@pytest.mark.parametrize("reference", [False, True], ids=["cpu", "reference"])
def test_gradcheck(reference):
    loops = Graph.from_edge_index(EDGES, 5).with_self_loops
    bipartite = Graph.from_edge_index(EDGES, (6, 5))
    scale = torch.rand(9, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with use_backend("reference" if reference else "cpu"):
        for g in (loops, bipartite):
            operands = leaf(g.num_sources, 2, 3), leaf(g.num_sources, 2, seed=1), leaf(5, 2, seed=2), leaf(9, 2, seed=3)
            torch.autograd.gradcheck(
                lambda x, s, d, e, g=g: ops.gat_aggregate(g, x, s, d, 0.3, edge_score=e, dropout_scale=scale), operands
            )
            torch.autograd.gradcheck(lambda x, s, d, g=g: ops.gat_aggregate(g, x, s, d), operands[:3])
            torch.autograd.gradcheck(lambda s, g=g: ops.edge_softmax(g, s), leaf(9, 2))
            torch.autograd.gradcheck(lambda s, g=g: ops.edge_softmax(g, s), leaf(9))


def test_softmax_is_pygs():
    edges = random_edges(50, 50, 300).t()
    scores = normal(300, 4).double()
    expected = softmax(scores, edges[1], num_nodes=50)
    # PyG divides by a total that is 1e-16 too large; the rest is some 20 roundings of 2^-53
    torch.testing.assert_close(ops.edge_softmax(Graph.from_edge_index(edges, 50), scores), expected, rtol=1e-14, atol=0)
    flat = ops.edge_softmax(Graph.from_edge_index(edges, 50), scores[:, 1].contiguous())
    assert_bitwise(flat, ops.edge_softmax(Graph.from_edge_index(edges, 50), scores)[:, 1])


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("loops", [False, True], ids=["plain", "self loops"])
def test_is_pygs_gat_layer(heads, loops):
    edges = random_edges(30, 30, 120).t().contiguous()
    torch.manual_seed(0)
    layer = pyg.GATConv(6, 5, heads, add_self_loops=loops, bias=False).double()
    x = leaf(30, 6)
    upstream = normal(30, heads * 5, seed=1).double()
    parameters = (x, layer.lin.weight, layer.att_src, layer.att_dst)
    expected = layer(x, edges)
    g = Graph.from_edge_index(edges, 30)
    h = layer.lin(x).view(30, heads, 5)
    actual = ops.gat_aggregate(
        g.with_self_loops if loops else g, h, (h * layer.att_src).sum(2), (h * layer.att_dst).sum(2)
    ).flatten(1)
    # Float64, values near 1, some hundred roundings
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(actual, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-11)


def test_edge_operands_are_in_the_callers_order(backend):
    g = Graph.from_edge_index(EDGES, 5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = Graph.from_edge_index(EDGES[:, order], 5)
    move = {"device": backend}
    x, src, dst = normal(5, 2, 3, **move), normal(5, 2, seed=1, **move), normal(5, 2, seed=2, **move)
    score, scale = normal(9, 2, seed=3, **move), normal(9, 2, seed=4, **move).abs()
    a = ops.gat_aggregate(g.to(backend), x, src, dst, edge_score=score, dropout_scale=scale)
    b = ops.gat_aggregate(shuffled.to(backend), x, src, dst, edge_score=score[order], dropout_scale=scale[order])
    # In each row the same at most four terms in another order: ten roundings of 2^-24 of values below 10
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a, b = ops.edge_softmax(g.to(backend), score), ops.edge_softmax(shuffled.to(backend), score[order])
    torch.testing.assert_close(a[order], b, rtol=1e-5, atol=0)
    totals = torch.zeros(5, 2, **move).index_add_(0, EDGES[1].to(backend), a)
    torch.testing.assert_close(totals, torch.ones(5, 2, **move), rtol=1e-6, atol=0)


def test_added_self_loops_score_0_and_keep_their_x():
    g = Graph.from_edge_index(EDGES, 5).with_self_loops
    x, src, dst = normal(5, 1, 2), normal(5, 1, seed=1), normal(5, 1, seed=2)
    taken_out = torch.full((9, 1), -torch.inf)
    loops_only = ops.gat_aggregate(g, x, src, dst, edge_score=taken_out)
    expected = x.clone()
    expected[[1, 2]] = 0  # their loops were given, so they are taken out as well
    assert_bitwise(loops_only, expected)
    alpha = ops.edge_softmax(g, torch.zeros(9))
    # In-edges with the loop: node 0 two, 1 four, 2 one, 3 three, 4 two
    expected = torch.tensor([1 / 4, 1 / 4, 1 / 2, 1 / 4, 1 / 3, 1 / 3, 1, 1 / 2, 1 / 4])
    torch.testing.assert_close(alpha, expected, rtol=2**-23, atol=0)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("extras", [False, True], ids=["plain", "scores and dropout"])
def test_nothing_of_edges_times_channels(backend, extras):
    n, e, heads, channels = 8, 120, 2, 32
    c = Case(n, n, random_edges(n, n, e).tolist(), heads, channels, backend, extras=extras, schedule={})
    forward, backward = c.forward(), c.backward()
    functions = [
        implementation("attention", f, getattr(attention, f"{f}_reference"), c.x)
        for f in ("gat_aggregate", "gat_backward")
    ]
    for function, arguments in zip(functions, (forward, backward), strict=True):
        function(*arguments)
        with Largest() as seen:
            function(*arguments)
        # 2048: a tile in registers, which Triton's interpreter makes a tensor of
        assert seen.numel <= max(e * heads, n * heads * channels, 2048)
    if backend == "cpu" and functions[0].__module__.endswith("cpu.attention"):
        tracemalloc.start()
        try:
            for function, arguments in zip(functions, (forward, backward), strict=True):
                function(*arguments)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        # NumPy's scratch of 4 bytes an edge and head, and change
        assert peak <= 4 * e * heads + 8 * 4 * n * heads * channels + 50_000


def test_what_is_kept_for_backward():
    n, e, heads, channels = 100, 3000, 4, 8
    g = Graph.from_edge_index(random_edges(n, n, e).t(), n)
    x, src, dst = (t.requires_grad_() for t in (normal(n, heads, channels), normal(n, heads), normal(n, heads, seed=1)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.gat_aggregate(g, x, src, dst)
    # x and out, src and dst, top and total
    assert sum(t.numel() for t in kept) == 2 * n * heads * channels + 4 * n * heads


def test_gradients_that_nobody_wants_are_none():
    g = Graph.from_edge_index(EDGES, 5)
    x, src = normal(5, 2, 3).requires_grad_(), normal(5, 2).half().requires_grad_()
    ops.gat_aggregate(g, x, src, normal(5, 2)).sum().backward()
    assert x.grad is not None
    assert src.grad.dtype == torch.float16


G = Graph.from_edge_index(EDGES, (6, 5))
GOOD = {"x": torch.ones(6, 2, 3), "src": torch.ones(6, 2), "dst": torch.ones(5, 2)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(6, 6)}, ValueError, r"x must be \[M, H, C\]"),
        ({"x": torch.ones(5, 2, 3)}, ValueError, r"x must be \[M, H, C\] = \[6, 2, 3\] for Graph.*, got \(5, 2, 3\)"),
        (
            {"x": torch.ones(6, 2, 3, dtype=torch.int32)},
            TypeError,
            "x must be a dense floating-point tensor, got torch.int32",
        ),
        ({"x": [1.0]}, TypeError, "x must be a dense floating-point tensor, got list"),
        ({"src": torch.ones(5, 2)}, ValueError, r"src must be \[M, H\] = \[6, 2\] for Graph.*, got \(5, 2\)"),
        ({"dst": torch.ones(5, 3)}, ValueError, r"dst must be \[N, H\] = \[5, 2\] for Graph.*, got \(5, 3\)"),
        ({"dst": torch.ones(5, 2, device="meta")}, ValueError, "dst is on meta and the graph on cpu"),
        ({"edge_score": torch.ones(9)}, ValueError, r"edge_score must be \[9, 2\], one for each edge, got \(9,\)"),
        ({"dropout_scale": torch.ones(8, 2)}, ValueError, r"dropout_scale must be \[9, 2\], one for each edge"),
        ({"dropout_scale": torch.ones(9, 2, requires_grad=True)}, ValueError, "dropout_scale takes no gradient"),
    ],
)
def test_errors(changes, error, message):
    with pytest.raises(error, match=message):
        ops.gat_aggregate(G, **{**GOOD, **changes})


def test_errors_of_the_rest():
    with pytest.raises(TypeError, match=r"g must be a qgnn.Graph, got Tensor"):
        ops.gat_aggregate(EDGES, **GOOD)
    with pytest.raises(ValueError, match=r"scores must be \[9, 2\], one for each edge, got \(8, 2\)"):
        ops.edge_softmax(G, torch.ones(8, 2))
    with pytest.raises(ValueError, match=r"scores must be \[9, 2\], one for each edge, got \(9, 2, 1\)"):
        ops.edge_softmax(G, torch.ones(9, 2, 1))
    with pytest.raises(TypeError, match="scores must be a floating-point tensor, got list"):
        ops.edge_softmax(G, [1.0])
