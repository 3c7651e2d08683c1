import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn.kernels import aggregate as ops
from qgnn.kernels import packing
from qgnn.kernels.quantize import compute_dtype
from qgnn.kernels.schedule import build_schedule, rows_of_edges

from .assertions import assert_bitwise, assert_sum

REDUCTIONS = ("sum", "mean", "max", "min")
both_signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def csr(n, edges):
    """``indptr``, ``indices`` from (source, target) pairs."""
    source, target = (torch.tensor(edges, dtype=torch.int64).view(-1, 2)[:, side] for side in (0, 1))
    order = torch.argsort(target, stable=True)
    indptr = torch.zeros(n + 1, dtype=torch.int32)
    indptr[1:] = torch.bincount(target, minlength=n).cumsum(0)
    return indptr, source[order].to(torch.int32)


def random_edges(n, m, count, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(0, m, (count,), generator=g), torch.randint(0, n, (count,), generator=g)], 1)


GRAPHS = {
    # name: (targets, sources, edges)
    "no nodes": (0, 3, []),
    "no edges": (3, 3, []),
    "one self loop": (1, 1, [(0, 0)]),
    "isolated nodes": (6, 6, [(0, 2), (5, 2), (2, 4)]),
    "duplicates and self loops": (4, 4, [(0, 1), (0, 1), (1, 1), (3, 1), (3, 3), (0, 1)]),
    "one hub": (5, 7, [(e % 7, 2) for e in range(53)]),
    "two hubs": (5, 7, [(e * e % 7, 2 if e % 3 else 4) for e in range(70)] + [(1, 0)]),
    "bipartite": (9, 4, random_edges(9, 4, 40).tolist()),
    "random": (12, 12, random_edges(12, 12, 60).tolist()),
}
graphs = pytest.mark.parametrize("name", GRAPHS)


def graph(name, device, sort=True, dtype=torch.int32, chunk=4):
    n, m, edges = GRAPHS[name]
    indptr, indices = csr(n, edges)
    schedule = build_schedule(indptr.to(dtype), sort, narrow=2, chunk=chunk)
    return n, m, indptr.to(dtype).to(device), indices.to(device), [t.to(device) for t in schedule]


def normal(*shape, device="cpu", seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def check_float(indptr, indices, schedule, x, weight, reduce):
    actual = ops.aggregate(indptr, indices, schedule, x, weight, reduce)
    expected = ops.aggregate_reference(indptr, indices, schedule, x, weight, reduce)
    assert_bitwise(actual[1], expected[1], "arg")
    if reduce in ("max", "min"):
        # one product, rounded once and compared exactly
        assert_bitwise(actual[0], expected[0], reduce)
    else:
        absolute = None if weight is None else weight.abs()
        wide = x.to(compute_dtype(x)).abs()
        magnitude = ops.aggregate_reference(indptr, indices, schedule, wide, absolute, reduce)[0]
        degree = int((indptr[1:] - indptr[:-1]).max()) if indptr.numel() > 1 else 0
        assert_sum(actual[0], expected[0], magnitude, degree, reduce)
    again = ops.aggregate(indptr, indices, schedule, x, weight, reduce)
    assert_bitwise(again[0], actual[0], "second run")


def test_hand_computed():
    # row 0 from 1 and 2, row 1 empty, row 2 from 0 (weight 2) and 0 (weight -1)
    indptr, indices = csr(3, [(1, 0), (2, 0), (0, 2), (0, 2)])
    schedule = list(build_schedule(indptr))
    x = torch.tensor([[1.0, -2.0], [3.0, 4.0], [5.0, 4.0]])
    weight = torch.tensor([1.0, 1.0, 2.0, -1.0])
    table = {
        "sum": ([[8, 8], [0, 0], [1, -2]], []),
        "mean": ([[4, 4], [0, 0], [0.5, -1]], []),
        "max": ([[5, 4], [0, 0], [2, 2]], [[1, 0], [-1, -1], [2, 3]]),
        "min": ([[3, 4], [0, 0], [-1, -4]], [[0, 0], [-1, -1], [3, 2]]),
    }
    for reduce, (out, arg) in table.items():
        actual = ops.aggregate_reference(indptr, indices, schedule, x, weight, reduce)
        assert (actual[0].tolist(), actual[1].tolist()) == (out, arg)


@graphs
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
def test_aggregate(backend, name, reduce, sort):
    _, m, *structure = graph(name, backend, sort)
    x = normal(m, 33, device=backend)
    check_float(*structure, x, None, reduce)
    check_float(*structure, x, normal(structure[1].numel(), device=backend, seed=1), reduce)


@pytest.mark.parametrize("features", [0, 1, 16, 64, 130])
@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_aggregate_widths(backend, features, reduce):
    _, m, *structure = graph("two hubs", backend)
    check_float(*structure, normal(m, features, device=backend), None, reduce)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_aggregate_half(backend, dtype, reduce):
    _, m, *structure = graph("two hubs", backend)
    x = normal(m, 16, device=backend).to(dtype)
    check_float(*structure, x, None, reduce)
    check_float(*structure, x, normal(structure[1].numel(), device=backend).to(dtype), reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_aggregate_double_on_cpu(reduce):
    _, m, *structure = graph("two hubs", "cpu")
    check_float(*structure, normal(m, 17).double(), normal(structure[1].numel()).double(), reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_aggregate_64_bit_offsets(backend, reduce):
    _, m, *structure = graph("two hubs", backend, dtype=torch.int64)
    check_float(*structure, normal(m, 16, device=backend), None, reduce)


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_ties_and_nan(backend, reduce):
    _, _, *structure = graph("two hubs", backend)
    x = torch.tensor([0.0, 1.0, torch.nan, 1.0, -1.0, torch.inf, -torch.inf], device=backend)
    x = torch.stack([x.roll(shift) for shift in range(8)], 1)
    check_float(*structure, x, None, reduce)
    check_float(*structure, torch.zeros_like(x), None, reduce)
    check_float(*structure, torch.full_like(x, -torch.inf if reduce == "max" else torch.inf), None, reduce)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_non_contiguous(backend, reduce):
    _, m, *structure = graph("random", backend)
    x = normal(34, 2 * m, device=backend).t()[::2, 1::3]
    weight = normal(2 * structure[1].numel(), device=backend)[::2]
    check_float(*structure, x, weight, reduce)


def transposed(n, m, indptr, indices):
    """CSR by source: offsets, destinations, positions in the first order."""
    rows, order = rows_of_edges(indptr), torch.argsort(indices.long(), stable=True)
    by_source = torch.zeros(m + 1, dtype=indptr.dtype, device=indptr.device)
    by_source[1:] = torch.bincount(indices.long(), minlength=m).cumsum(0)
    return by_source, rows[order], order.to(indptr.dtype)


@graphs
@pytest.mark.parametrize("features", [1, 33])
def test_backward_of_max_and_edge_dot(backend, name, features):
    n, m, indptr, indices, schedule = graph(name, backend)
    x, grad = normal(m, features, device=backend), normal(n, features, device=backend, seed=1)
    weight = normal(indices.numel(), device=backend, seed=2)
    arg = ops.aggregate_reference(indptr, indices, schedule, x, None, "max")[1]
    by_source = transposed(n, m, indptr, indices)
    longest = int((by_source[0][1:] - by_source[0][:-1]).max())
    for w in (None, weight):
        arguments = (*by_source, grad, arg, w)
        magnitude = ops.aggregate_arg_backward_reference(*by_source, grad.abs(), arg, None if w is None else w.abs())
        actual = ops.aggregate_arg_backward(*arguments)
        assert_sum(actual, ops.aggregate_arg_backward_reference(*arguments), magnitude, longest)
        assert_bitwise(ops.aggregate_arg_backward(*arguments), actual, "second run")
    rows = rows_of_edges(indptr)
    for taken in (None, arg):
        actual = ops.edge_dot(rows, indices, x, grad, taken)
        magnitude = ops.edge_dot_reference(rows, indices, x.abs(), grad.abs(), taken)
        assert_sum(actual, ops.edge_dot_reference(rows, indices, x, grad, taken), magnitude, features)


NOTHING = (None, None, None, None, None, False, None, None, None, None, None, [0] * 5, True)
"""No epilogue, no codes."""


def packed_outputs(n, m, f, device, out_signed):
    """Every output, with and without each operand of the epilogue; codes of rows of all widths, and in one container."""
    g = torch.Generator().manual_seed(3)
    row_scale, col_scale, bias, post_scale, addend = (
        torch.rand(*shape, generator=g).to(device) for shape in ((n,), (f,), (f,), (f,), (n, f))
    )
    self_scale = torch.tensor([1.3], device=device) if n == m else None
    step, bits = (torch.rand(n, generator=g) + 0.05).to(device), (torch.arange(n) % 9).to(torch.uint8).to(device)
    counts, pos = packing.bucket_rows(packing.containers_of(bits, out_signed))
    none, rows = (None, None, None, [0] * 5, True), (step, bits, pos, counts, out_signed)
    eight = (step, bits, None, packing.uniform_counts(n, 8), out_signed)
    return [
        ("acc", NOTHING),
        ("float", (row_scale, None, col_scale, bias, None, True, None, None, *none)),
        ("float", (None, self_scale, None, None, -addend, False, None, bias, *none)),
        ("rows", (row_scale, self_scale, col_scale, -bias, addend, True, -post_scale, bias, *rows)),
        ("rows", (None, None, None, None, None, not out_signed, None, None, *eight)),
    ]


def check_packed(structure, n, m, f, container, signed, device, seed=0):
    codes = torch.randint(0, 256, (m, f), generator=torch.Generator().manual_seed(seed))
    x = packing.pack_reference(codes, None, packing.uniform_counts(m, container)).to(device)
    for output, tail in packed_outputs(n, m, f, device, signed):
        arguments = (*structure, x, container, m, f, signed, output, *tail)
        assert_bitwise(ops.aggregate_packed(*arguments), ops.aggregate_packed_reference(*arguments), output)


@graphs
@both_signs
@pytest.mark.parametrize("container", [0, 1, 2, 4, 8])
def test_aggregate_packed(backend, name, container, signed):
    n, m, *structure = graph(name, backend)
    check_packed(structure, n, m, 33, container, signed, backend)


@pytest.mark.parametrize("features", [0, 1, 7, 16, 64, 130])
@pytest.mark.parametrize("container", [1, 2, 4, 8])
def test_aggregate_packed_widths(backend, features, container):
    n, m, *structure = graph("two hubs", backend)
    check_packed(structure, n, m, features, container, container > 1, backend)


@both_signs
@pytest.mark.parametrize("container", [1, 2, 4, 8])
def test_long_rows_of_extreme_codes(backend, container, signed):
    """600 edges on one row, all codes at one end: narrow partial sums must be widened in time."""
    indptr, indices = csr(2, [(0, 1)] * 600)
    byte = {True: {1: 0xFF, 2: 0xAA, 4: 0x88, 8: 0x80}, False: dict.fromkeys((1, 2, 4, 8), 0xFF)}[signed][container]
    x = torch.full((16,), byte, dtype=torch.uint8, device=backend)
    code = -(1 << (container - 1)) if signed else (1 << container) - 1
    for sort in (True, False):
        schedule = [t.to(backend) for t in build_schedule(indptr, sort)]
        structure = (indptr.to(backend), indices.to(backend), schedule)
        acc = ops.aggregate_packed(*structure, x, container, 1, 16, signed, "acc", *NOTHING)
        assert acc.tolist() == [[0] * 16, [600 * code] * 16]


@both_signs
def test_any_schedule_gives_the_same_integers(backend, signed):
    n, m, edges = GRAPHS["two hubs"]
    indptr, indices = (t.to(backend) for t in csr(n, edges))
    x = torch.randint(0, 256, (m * 48,), generator=torch.Generator().manual_seed(0)).to(torch.uint8).to(backend)
    results = []
    for options in ({"sort": False}, {}, {"narrow": 0, "chunk": 1}, {"narrow": 3, "chunk": 5}):
        schedule = list(build_schedule(indptr, **options))
        results.append(ops.aggregate_packed(indptr, indices, schedule, x, 8, m, 40, signed, "acc", *NOTHING))
    for result in results[1:]:
        assert_bitwise(result, results[0])


@graphs
@both_signs
def test_aggregate_rows(backend, name, signed):
    n, m, indptr, indices, schedule = graph(name, backend, chunk=16)
    g = torch.Generator().manual_seed(0)
    f = 33
    counts, pos = packing.bucket_rows(packing.containers_of(torch.arange(m) % 9, signed))
    x = packing.pack_reference(torch.randint(0, 256, (m, f), generator=g), pos, counts).to(backend)
    pos = None if pos is None else pos.to(backend)
    step, row_scale, bias = (torch.rand(k, generator=g).to(backend) for k in (m, n, f))
    weight = torch.randn(indices.numel(), generator=g).to(backend)
    values = (step.unsqueeze(1) * packing.unpack_reference(x, pos, counts, f, signed)).abs()
    degree = int((indptr[1:] - indptr[:-1]).max()) if n else 0
    for w, r, b, relu in ((None, None, None, False), (weight, row_scale, bias, True)):
        arguments = (indptr, indices, schedule, x, pos, counts, f, signed, step, w, r, b, relu)
        magnitude = ops.aggregate_reference(indptr, indices, schedule, values, None if w is None else w.abs(), "sum")[0]
        magnitude = (magnitude if r is None else magnitude * r.unsqueeze(1)) + (0 if b is None else b)
        actual = ops.aggregate_rows(*arguments)
        assert_sum(actual, ops.aggregate_rows_reference(*arguments), magnitude, degree)
    assert_bitwise(ops.aggregate_rows(*arguments), actual, "second run")


@both_signs
@pytest.mark.parametrize("features", [7, 48])
def test_aggregate_rows_exactly(backend, features, signed):
    """Steps and weights that are small powers of two make every sum exact, so any order must give the bits of the reference: rows of all widths with
    the extreme codes among them, and rows of one width, in a graph with hubs."""
    g = torch.Generator().manual_seed(features)
    m, edges = 7, [(e * e % 7, 0) for e in range(10)] + [(e, 1) for e in range(3)] + [(6, 2)]
    indptr, indices = csr(4, edges)
    schedule = [part.to(backend) for part in build_schedule(indptr, narrow=2, chunk=4)]
    indptr, indices = indptr.to(backend), indices.to(backend)
    step = torch.exp2(torch.randint(-3, 3, (m,), generator=g).float()).to(backend)
    weight = -torch.exp2(torch.randint(-3, 3, (indices.numel(),), generator=g).float()).to(backend)
    widths = torch.tensor([8, 4, 2, 1, 0, 3, 7])[torch.arange(m) % 7]
    for bits in (widths, torch.full((m,), 4)):
        counts, pos = packing.bucket_rows(packing.containers_of(bits, signed))
        codes = torch.randint(0, 256, (m, features), generator=g)
        codes[:, 0], codes[:, -1] = 0x80, 0xFF
        x = packing.pack_reference(codes, pos, counts).to(backend)
        place = None if pos is None else pos.to(backend)
        for w in (None, weight):
            arguments = (
                indptr, indices, schedule, x, place, counts, features, signed, step, w, None, None, False
            )  # fmt: skip
            assert_bitwise(ops.aggregate_rows(*arguments), ops.aggregate_rows_reference(*arguments))


@both_signs
def test_edges_that_are_mostly_dropped(threads, signed):
    """Exact sums, in which most weights are 0: of a row with more edges than are gathered at once, of rows with none left, of
    sources whose codes are all 0, and, of those whose step is NaN or infinite, NaN whatever the codes and the weight are."""
    g = torch.Generator().manual_seed(4)
    n, m, features = 4300, 64, 65
    rows = torch.cat([torch.full((9000,), 7), torch.randint(8, n - 5, (30_000,), generator=g)])
    sources = torch.randint(0, m, rows.shape, generator=g)
    indptr, indices = csr(n, torch.stack([sources, rows], 1).tolist())
    schedule = build_schedule(indptr, narrow=2, chunk=4096)
    counts = packing.uniform_counts(m, 8)
    codes = torch.randint(-3, 4, (m, features), generator=g).masked_fill(torch.arange(m).unsqueeze(1) % 4 == 1, 0)
    x = packing.pack_reference(codes, None, counts)
    step = torch.exp2(torch.randint(-2, 2, (m,), generator=g).float())
    kept = torch.rand(indices.shape, generator=g) < 0.3
    weight = kept * torch.exp2(torch.randint(-2, 2, indices.shape, generator=g).float())
    weight[indptr[9] : indptr[12]] = 0
    broken = step.clone()
    broken[3], broken[5] = math.nan, math.inf
    bias, scale = torch.ones(features), torch.exp2(torch.arange(n) % 3)
    for steps, finish in ((step, (None, None, False)), (broken, (scale, bias, True))):
        arguments = (indptr, indices, schedule, x, None, counts, features, signed, steps, weight, *finish)
        expected = ops.aggregate_rows_reference(*arguments)
        assert bool(expected.isnan().any()) == (steps is broken)
        for count in (1, 2):
            threads(count)
            assert_bitwise(ops.aggregate_rows(*arguments), expected)


def test_edges_by_container():
    """Row 0 from sources 0, 1, 2, 3, 1, row 1 empty, row 2 from 3 and 0; widths 2, 8, 0, 8: places 2, 0, 3, 1."""
    from qgnn.kernels.gpu.aggregate_rows import by_container

    indptr, indices = csr(3, [(0, 0), (1, 0), (2, 0), (3, 0), (1, 0), (3, 2), (0, 2)])
    counts, pos = packing.bucket_rows(packing.containers_of(torch.tensor([2, 8, 0, 8]), True))
    places, ends, edges, sources = by_container(pos, indptr, indices, tuple(counts))
    assert places.tolist() == [0, 1, 0, 2, 3, 1, 2]
    assert ends.tolist() == [[3, 3, 4, 4], [5, 5, 5, 5], [6, 6, 7, 7]]
    assert edges.tolist() == [1, 3, 4, 0, 2, 5, 6]
    assert sources.tolist() == [1, 3, 0, 2]


def test_offsets_beyond_31_bits():
    """x of more than 2^31 bytes. NumPy takes zeros from the system page by page, so only the rows that are touched cost
    memory."""
    m, f = (1 << 24) + 5, 128
    x = torch.from_numpy(np.zeros((m, f), dtype=np.uint8))
    x[-1], x[-2] = 3, 5
    indptr, indices = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([m - 1, m - 2], dtype=torch.int32)
    schedule = list(build_schedule(indptr))
    acc = ops.aggregate_packed(indptr, indices, schedule, x.view(-1), 8, m, f, False, "acc", *NOTHING)
    assert acc.tolist() == [[8] * f]


@pytest.mark.parametrize("name", ["spread", "hub"])
def test_threads_agree(name, threads):
    """Enough work for two threads; one row holds most of the edges in the second graph."""
    n, f = 800, 40
    edges = random_edges(n, n, 8000)
    if name == "hub":
        edges[:6000, 1] = 5
    indptr, indices = csr(n, edges.tolist())
    schedule = list(build_schedule(indptr, narrow=8, chunk=64))
    assert (schedule[2].size(0) > 0) == (name == "hub")
    x, weight, grad = normal(n, f), normal(8000, seed=1), normal(n, f, seed=2)
    rows, by_source = rows_of_edges(indptr), transposed(n, n, indptr, indices)
    counts, pos = packing.bucket_rows(packing.containers_of(torch.arange(n) % 9, True))
    codes = torch.randint(0, 256, (n, f), generator=torch.Generator().manual_seed(3))
    mixed, four = (
        packing.pack_reference(codes, pos, counts),
        packing.pack_reference(codes, None, packing.uniform_counts(n, 4)),
    )

    def everything():
        results = [t for r in REDUCTIONS for t in ops.aggregate(indptr, indices, schedule, x, weight, r)]
        arg = results[-1]
        results.append(ops.aggregate_arg_backward(*by_source, grad, arg, weight))
        results += [ops.edge_dot(rows, indices, x, grad, None), ops.edge_dot(rows, indices, x, grad, arg)]
        results.append(ops.aggregate_packed(indptr, indices, schedule, four, 4, n, f, True, "acc", *NOTHING))
        results.append(
            ops.aggregate_rows(
                indptr, indices, schedule, mixed, pos, counts, f, True, x[:, 0].abs(), weight, None, None, True
            )
        )
        return results

    threads(1)
    single = everything()
    threads(2)
    for a, b in zip(everything(), single, strict=True):
        assert_bitwise(a, b)
    for reduce in REDUCTIONS:
        check_float(indptr, indices, schedule, x, weight, reduce)
    check_packed((indptr, indices, schedule), n, n, f, 8, True, "cpu")


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    st.integers(0, 60),
    st.integers(0, 40),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 6),
    st.integers(0, 99),
)
def test_any_graph(n, edges, features, container, chunk, seed):
    indptr, indices = csr(n, random_edges(n, n, edges, seed).tolist())
    schedule = list(build_schedule(indptr, narrow=chunk, chunk=chunk))
    check_packed((indptr, indices, schedule), n, n, features, container, container > 1, "cpu", seed)


def every_op(device):
    n, m, indptr, indices, schedule = graph("two hubs", device)
    f = 9
    x, grad, weight = normal(m, f, device=device), normal(n, f, device=device), normal(indices.numel(), device=device)
    arg = ops.aggregate_reference(indptr, indices, schedule, x, None, "max")[1]
    rows, by_source = rows_of_edges(indptr), transposed(n, m, indptr, indices)
    codes = torch.randint(0, 256, (m, f), generator=torch.Generator().manual_seed(0)).to(device)
    counts, pos = packing.bucket_rows(packing.containers_of(torch.arange(m, device=device) % 9, True))
    mixed, four = (
        packing.pack_reference(codes, pos, counts),
        packing.pack_reference(codes, None, packing.uniform_counts(m, 4)),
    )
    head = (indptr, indices, schedule)
    yield from ((ops.aggregate, (*head, x, weight if reduce == "sum" else None, reduce)) for reduce in REDUCTIONS)
    yield ops.aggregate_arg_backward, (*by_source, grad, arg, weight)
    yield ops.edge_dot, (rows, indices, x, grad, None)
    yield ops.edge_dot, (rows, indices, x, grad, arg)
    for output, tail in packed_outputs(n, m, f, device, True):
        yield ops.aggregate_packed, (*head, four, 4, m, f, True, output, *tail)
    step = torch.ones(m, device=device)
    yield ops.aggregate_rows, (*head, mixed, pos, counts, f, True, step, weight, None, None, True)


def test_opcheck(backend):
    for op, arguments in every_op(backend):
        torch.library.opcheck(op, arguments)


def test_compiles_whole():
    for op, arguments in every_op("cpu"):
        torch.compiler.reset()
        compiled = torch.compile(lambda *a, op=op: op(*a), backend="aot_eager", fullgraph=True)
        actual, expected = compiled(*arguments), op(*arguments)
        for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (actual, expected)), strict=True):
            assert_bitwise(a, b)
