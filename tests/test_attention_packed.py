"""Graph attention on packed codes: the reference, Numba and Triton."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn.kernels import attention as ops
from qgnn.kernels import packing
from qgnn.kernels.matmul import epilogue_reference
from qgnn.kernels.quantize import codes_reference

from .assertions import assert_bitwise, assert_sum
from .test_aggregate import csr, graphs, random_edges
from .test_attention import SLOPE, Case, case

NOTHING = (None, None, None, False, None, None)
"""No epilogue."""


def codes_of(m, features, container, device, seed=0):
    """Signed codes, int32, and packed."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(1 << container >> 1), max(1 << container >> 1, 1), (m, features), generator=generator)
    packed = packing.pack_reference(codes, None, packing.uniform_counts(m, container))
    return codes.to(torch.int32).to(device), packed.to(device)


def operands(n, f, device):
    """Of the epilogue, and steps and widths of rows of all containers: ``rows[signed]``."""
    g = torch.Generator().manual_seed(3)
    col_scale, bias, post_scale, post_shift, addend = (
        torch.randn(*shape, generator=g).to(device) for shape in ((f,), (f,), (f,), (f,), (n, f))
    )
    step, bits, rows = torch.rand(n, generator=g) + 0.05, (torch.arange(n) % 9).to(torch.uint8), {}
    for signed in (True, False):
        counts, pos = packing.bucket_rows(packing.containers_of(bits, signed))
        rows[signed] = (step.to(device), bits.to(device), None if pos is None else pos.to(device), counts, signed)
    return [
        NOTHING,
        (col_scale, bias, None, True, None, None),
        (col_scale, bias, addend, True, post_scale, post_shift),
    ], rows


def check(c, container, seed=0):
    """Every output of :func:`gat_packed` on the graph of ``c``."""
    n, (m, heads, channels), device = c.indptr.numel() - 1, c.x.shape, c.x.device
    f = heads * channels
    codes, packed = codes_of(m, f, container, device, seed)
    head = (c.indptr, c.indices, c.schedule, packed, container, m, heads, channels, c.src, c.dst, SLOPE)
    tail = (None, None, None, [0] * 5, True)
    absolute = codes.view(m, heads, channels).abs().float()
    size, top, _ = ops.gat_aggregate_reference(*c.structure, absolute, c.src, c.dst, None, None, SLOPE)
    raw = ops._raw_reference(c.rows, c.indices, c.src, c.dst, None)
    # A step of the epilogue rounds once, relative to what is the sum of the absolute terms so far; max(v, 0) enlarges no error.
    terms = c.terms(top, torch.where(raw > 0, raw, SLOPE * raw)) + 8
    epilogues, rows = operands(n, f, device)
    for epilogue, signed in zip(epilogues, (None, False, True), strict=True):
        actual = ops.gat_packed(*head, "float", *epilogue, *tail)
        sizes = [t.abs() if isinstance(t, torch.Tensor) else t for t in epilogue]
        bound = epilogue_reference(size.flatten(1), None, None, *sizes)
        assert_sum(actual, ops.gat_packed_reference(*head, "float", *epilogue, *tail), bound, terms, "float")
        if signed is not None:
            # The same floats, quantized: which way a tie between two codes goes is not for a tolerance to say.
            step, bits, pos, counts, _ = rows[signed]
            wanted, _ = codes_reference(actual, step, bits, True, signed)
            result = ops.gat_packed(*head, "rows", *epilogue, *rows[signed])
            assert_bitwise(result, packing.pack_reference(wanted, pos, counts), "rows")


def check_scores(m, heads, channels, container, device):
    codes, packed = codes_of(m, heads * channels, container, device)
    vectors = torch.randn(2, heads * channels, generator=torch.Generator().manual_seed(1)).to(device)
    arguments = (packed, container, m, heads, channels, vectors)
    actual, expected = ops.attention_scores(*arguments), ops.attention_scores_reference(*arguments)
    size = (codes.abs().unsqueeze(1) * vectors.abs()).view(m, 2, heads, channels).sum(3).flatten(1)
    assert_sum(actual, expected, size, channels, "scores")
    assert_bitwise(ops.attention_scores(*arguments), actual, "second run")


def test_hand_computed():
    # Row 0: raw ln 3 from node 1, and 0 from node 2: alpha 3/4 and 1/4; row 1 has no edges.
    indptr, indices = csr(2, [(1, 0), (2, 0)])
    codes = torch.tensor([[7, 7], [4, -4], [-8, 0]])
    x = packing.pack_reference(codes, None, packing.uniform_counts(3, 4))
    scores = ops.attention_scores_reference(x, 4, 3, 1, 2, torch.tensor([[1.0, 10.0], [0.5, 0.0]]))
    assert scores.tolist() == [[77, 3.5], [-36, 2], [-8, -4]]
    src, dst = torch.tensor([[9.0], [math.log(3) - 1], [-1.0]]), torch.tensor([[1.0], [7.0]])
    head = (indptr, indices, [], x, 4, 3, 1, 2, src, dst, SLOPE)
    none = (None, None, None, [0] * 5, True)
    out = ops.gat_packed_reference(*head, "float", *NOTHING, *none)
    # 3/4 * 4 - 1/4 * 8 and -3/4 * 4; 1e-6: six roundings of 2^-24, and the logarithm's own
    torch.testing.assert_close(out, torch.tensor([[1.0, -3.0], [0.0, 0.0]]), rtol=1e-6, atol=1e-6)
    epilogue = (torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([[0.0, 0], [1.0, -9.0]]), True)
    out = ops.gat_packed_reference(*head, "float", *epilogue, torch.tensor([2.0, 1.0]), torch.tensor([0.0, 5.0]), *none)
    torch.testing.assert_close(out, torch.tensor([[6.0, 5.0], [4.0, 5.0]]), rtol=1e-6, atol=1e-6)


@graphs
def test_graphs(backend, name):
    check(case(name, 2, 4, backend, extras=False), 4)


@pytest.mark.parametrize("container", [0, 1, 2, 4, 8])
@pytest.mark.parametrize(
    ("heads", "channels"), [(1, 1), (1, 7), (1, 130), (3, 5), (8, 6), (8, 16), (2, 128)], ids=lambda n: str(n)
)
def test_widths(backend, heads, channels, container):
    """Heads that begin inside a byte, that fill no tile, and that need more than one."""
    if backend == "cpu" or container in (4, 8) or channels in (5, 16):
        check(
            case(
                "one self loop" if heads * channels > 20 else "duplicates and self loops",
                heads,
                channels,
                backend,
                extras=False,
            ),
            container,
        )
    check_scores(5, heads, channels, container, backend)


@pytest.mark.parametrize("container", [4, 8])
def test_hubs(backend, container):
    check(case("two hubs", 8, 16, backend, extras=False), container)


@pytest.mark.parametrize(("heads", "channels"), [(0, 4), (2, 0)])
def test_nothing_to_do(backend, heads, channels):
    c = case("random", heads, channels, backend, extras=False)
    arguments = (
        c.indptr,
        c.indices,
        c.schedule,
        c.x.new_empty(0, dtype=torch.uint8),
        8,
        12,
        heads,
        channels,
        c.src,
        c.dst,
    )
    out = ops.gat_packed(*arguments, SLOPE, "float", *NOTHING, None, None, None, [0] * 5, True)
    assert out.shape == (12, 0)
    assert_bitwise(ops.attention_scores(*arguments[3:8], c.src.new_empty(2, 0)), c.src.new_zeros(12, 2 * heads))


def test_columns_of_the_scores_are_operands(backend):
    """``src`` and ``dst`` as the two halves of one matrix, and without a stride of 1."""
    c = case("two hubs", 4, 8, backend, extras=False)
    n, m = c.indptr.numel() - 1, c.x.size(0)
    _, packed = codes_of(m, 32, 8, backend)
    both = torch.zeros(max(n, m), 8, device=backend)
    both[:m, :4], both[:n, 4:] = c.src, c.dst
    none = (None, None, None, [0] * 5, True)
    head = (c.indptr, c.indices, c.schedule, packed, 8, m, 4, 8)
    expected = ops.gat_packed(*head, c.src, c.dst, SLOPE, "float", *NOTHING, *none)
    assert_bitwise(ops.gat_packed(*head, both[:m, :4], both[:n, 4:], SLOPE, "float", *NOTHING, *none), expected)
    flipped = (t.t().contiguous().t() for t in (c.src, c.dst))
    assert_bitwise(ops.gat_packed(*head, *flipped, SLOPE, "float", *NOTHING, *none), expected)


def test_threads_and_runs_agree(threads):
    n, heads, channels = 600, 4, 16
    c = Case(
        n, n, random_edges(n, n, 6000).tolist(), heads, channels, extras=False, schedule={"narrow": 8, "chunk": 64}
    )
    _, packed = codes_of(n, heads * channels, 4, "cpu")
    epilogues, rows = operands(n, heads * channels, "cpu")
    vectors = torch.randn(2, heads * channels, generator=torch.Generator().manual_seed(1))
    head = (c.indptr, c.indices, c.schedule, packed, 4, n, heads, channels, c.src, c.dst, SLOPE)
    results = []
    for count in (1, 2, 2):
        threads(count)
        out = ops.gat_packed(*head, "rows", *epilogues[2], *rows[True])
        results.append((out, ops.attention_scores(packed, 4, n, heads, channels, vectors)))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_bitwise(a, b)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.integers(1, 8), st.integers(1, 8), st.integers(0, 60), st.integers(1, 4), st.integers(1, 20), st.sampled_from([1, 2, 4, 8]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_graph(n, m, edges, heads, channels, container, seed):
    check(
        Case(n, m, random_edges(n, m, edges, seed).tolist(), heads, channels, extras=False, seed=seed), container, seed
    )


def every_op(device):
    c = case("two hubs", 2, 8, device, extras=False)
    n, m = c.indptr.numel() - 1, c.x.size(0)
    _, packed = codes_of(m, 16, 4, device)
    epilogues, rows = operands(n, 16, device)
    head = (c.indptr, c.indices, c.schedule, packed, 4, m, 2, 8, c.src, c.dst, SLOPE)
    yield ops.attention_scores, (packed, 4, m, 2, 8, torch.ones(2, 16, device=device))
    yield ops.gat_packed, (*head, "float", *epilogues[0], None, None, None, [0] * 5, True)
    yield ops.gat_packed, (*head, "rows", *epilogues[2], *rows[False])


def test_opcheck(backend):
    for op, arguments in every_op(backend):
        torch.library.opcheck(op, arguments)


def test_compiles_whole():
    for op, arguments in every_op("cpu"):
        torch.compiler.reset()
        compiled = torch.compile(lambda *a, op=op: op(*a), backend="aot_eager", fullgraph=True)
        assert_bitwise(compiled(*arguments), op(*arguments))
