import pytest
import torch

from qgnn.kernels import matmul as ops
from qgnn.kernels import packing

from .assertions import assert_bitwise, assert_sum

SHAPES = [(0, 4, 3), (5, 0, 3), (3, 4, 0), (1, 1, 1), (9, 33, 5), (20, 64, 16), (17, 130, 33)]
both_signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def problem(n, k, m, signed, w_container, device):
    """Rows of all widths from 0 to 8 with random bytes as codes, weights, and everything the epilogue takes."""
    g = torch.Generator().manual_seed(0)
    counts, pos = packing.bucket_rows(packing.containers_of(torch.arange(n) % 9, signed))
    x = packing.pack_reference(torch.randint(0, 256, (n, k), generator=g), pos, counts)
    w = packing.pack_reference(torch.randint(0, 256, (m, k), generator=g), None, packing.uniform_counts(m, w_container))
    row_scale, col_scale, bias = (
        torch.rand(n, generator=g) * 0.01,
        torch.rand(m, generator=g),
        torch.randn(m, generator=g),
    )
    step, bits = torch.rand(m, generator=g) + 0.1, (torch.arange(m) % 9).to(torch.uint8)
    tensors = [x, pos, w, row_scale, col_scale, bias, step, bits]
    x, pos, w, *rest = [t if t is None else t.to(device) for t in tensors]
    return x, pos, counts, w, rest


NOTHING = (None, None, None, None, False, None, None, None, None, None, [0] * 5, True)
"""No epilogue, no codes."""


def tails(n, m, rest):
    """A zero point and what follows the product: every output, with and without each operand of the epilogue; codes of rows of all widths, signed
    and unsigned, and in one container."""
    row_scale, col_scale, bias, step, bits = rest
    device = bias.device
    g = torch.Generator().manual_seed(2)
    addend, post_scale, post_shift = (t.to(device) for t in (torch.randn(n, m, generator=g), bias + 2, bias - 1))
    none = (None, None, None, [0] * 5, True)
    row_step = (torch.rand(n, generator=g) + 0.1).to(device)
    widths = (torch.arange(n) % 9).to(torch.uint8)
    rows = {}
    for signed in (True, False):
        counts, pos = packing.bucket_rows(packing.containers_of(widths, signed))
        rows[signed] = (row_step, widths.to(device), None if pos is None else pos.to(device), counts, signed)
    eight = (row_step, widths.to(device), None, packing.uniform_counts(n, 8), True)
    columns = [(step, bits.clamp(max=c), None, packing.uniform_counts(n, c), True) for c in (8, 4)]
    return [
        (17, "acc", NOTHING),
        (0, "float", (row_scale, col_scale, bias, None, True, None, None, *none)),
        (3, "float", (None, None, None, addend, False, post_scale, post_shift, *none)),
        (0, "columns", (row_scale, col_scale, bias, None, False, None, None, *columns[0])),
        (0, "columns", (row_scale, col_scale, None, addend, True, None, post_shift, *columns[1])),
        (0, "rows", (row_scale, col_scale, bias, addend, True, post_scale, post_shift, *rows[True])),
        (5, "rows", (None, None, None, None, True, post_scale, None, *rows[False])),
        (0, "rows", (row_scale, col_scale, None, None, False, None, None, *eight)),
    ]


def test_hand_computed():
    x = packing.pack_reference(torch.tensor([[1, 2, 3], [3, 0, 1]]), None, packing.uniform_counts(2, 2))
    w = packing.pack_reference(torch.tensor([[1, -1, 2], [-7, 0, 7]]), None, packing.uniform_counts(2, 4))
    counts = packing.uniform_counts(2, 2)
    head = (x, None, counts, False, 1, w, 4, 3, 2)
    # codes less the zero point 1: [0, 1, 2], [2, -1, 0]
    acc = ops.matmul_packed_reference(*head, "acc", *NOTHING)
    assert acc.tolist() == [[3, 14], [3, -14]]
    scale, bias = torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0])
    none = (None, None, None, [0] * 5, True)
    columns = torch.tensor([2.0, 1.0])
    out = ops.matmul_packed_reference(*head, "float", scale, columns, bias, None, True, None, None, *none)
    assert out.tolist() == [[6, 15], [3, 0]]
    step, bits = torch.tensor([4.0, 4.0]), torch.tensor([4, 2], dtype=torch.uint8)
    four = (None, packing.uniform_counts(2, 4), True)
    packed = ops.matmul_packed_reference(
        *head, "columns", scale, None, bias, None, False, None, None, step, bits, *four
    )
    assert packed[:2].tolist() == [0x11, 0xF0]  # 3 / 4 -> 1, 15 / 4 -> 1 (Q = 1); 1.5 / 4 -> 0, -6 / 4 -> -1
    # the same by row: 3 / 4 -> 1, 15 / 4 -> 4; 1.5 / 4 -> 0, -6 / 4 -> -1 (Q = 1)
    packed = ops.matmul_packed_reference(*head, "rows", scale, None, bias, None, False, None, None, step, bits, *four)
    assert packed[:2].tolist() == [0x41, 0xF0]
    # after max(v + addend, 0) = [[3, 0], [0, 0]]: times 2, plus [-1, 5]
    addend, post_shift = torch.tensor([[0.0, -15.0], [-1.5, 6.0]]), torch.tensor([-1.0, 5.0])
    out = ops.matmul_packed_reference(
        *head, "float", scale, None, bias, addend, True, 2 * scale.new_ones(2), post_shift, *none
    )
    assert out.tolist() == [[5, 5], [-1, 5]]


@both_signs
@pytest.mark.parametrize("w_container", [4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmul_packed(backend, shape, signed, w_container):
    n, k, m = shape
    x, pos, counts, w, rest = problem(n, k, m, signed, w_container, backend)
    head = (x, pos, counts, signed)
    sizes = (w, w_container, k, m)
    for zero, output, tail in tails(n, m, rest):
        arguments = (*head, zero, *sizes, output, *tail)
        actual, expected = ops.matmul_packed(*arguments), ops.matmul_packed_reference(*arguments)
        # the epilogue's roundings are prescribed, so its floats agree to the bit as well
        assert_bitwise(actual, expected, output)


@both_signs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmul_transposed(backend, shape, signed):
    n, k, m = shape
    x, pos, counts, _, (scale, *_) = problem(n, k, m, signed, 8, backend)
    grad = torch.randn(n, m, generator=torch.Generator().manual_seed(1)).to(backend)
    for zero in (0, 7):
        arguments = (x, pos, counts, signed, zero, k, scale, grad)
        values = scale.unsqueeze(1) * (packing.unpack_reference(x, pos, counts, k, signed) - zero)
        magnitude = values.abs().t() @ grad.abs()
        actual, again = ops.matmul_transposed(*arguments), ops.matmul_transposed(*arguments)
        assert_sum(actual, ops.matmul_transposed_reference(*arguments), magnitude, n)
        assert_bitwise(again, actual, "second run")


def test_extreme_accumulators(backend):
    """All codes at their ends: 4096 * 255 * 127 and its negative, which float32 would not hold exactly."""
    n, k, m = 3, 4097, 2
    x = torch.full((n * packing.row_bytes(8, k),), 255, dtype=torch.uint8, device=backend)
    codes = torch.tensor([[127] * k, [-127] * k])
    w = packing.pack_reference(codes, None, packing.uniform_counts(m, 8)).to(backend)
    counts = packing.uniform_counts(n, 8)
    acc = ops.matmul_packed(x, None, counts, False, 0, w, 8, k, m, "acc", *NOTHING)
    assert acc.tolist() == [[k * 255 * 127, -k * 255 * 127]] * n


def test_non_contiguous_gradient(backend):
    x, pos, counts, _, (scale, *_) = problem(12, 9, 6, True, 8, backend)
    grad = torch.randn(6, 24, generator=torch.Generator().manual_seed(1)).to(backend).t()[::2]
    arguments = (x, pos, counts, True, 0, 9, scale)
    assert_bitwise(ops.matmul_transposed(*arguments, grad), ops.matmul_transposed(*arguments, grad.contiguous()))


@pytest.mark.parametrize("k", [65, 2000])
def test_long_products(k):
    """Sums of unsigned 8-bit codes, less a zero point, past what 16 bits hold, and past the whole steps of any blocking."""
    x, pos, counts, w, _ = problem(9, k, 5, False, 8, "cpu")
    arguments = (x, pos, counts, False, 3, w, 8, k, 5, "acc", *NOTHING)
    assert_bitwise(ops.matmul_packed(*arguments), ops.matmul_packed_reference(*arguments))


def test_threads_agree(threads):
    """More rows than one block holds, on one thread and on two."""
    n, k, m = 6000, 300, 65
    x, pos, counts, w, rest = problem(n, k, m, True, 4, "cpu")
    row_scale = rest[0]
    calls = [(x, pos, counts, True, zero, w, 4, k, m, output, *tail) for zero, output, tail in tails(n, m, rest)]
    expected = [ops.matmul_packed_reference(*call) for call in calls]
    grad = torch.randn(n, m, generator=torch.Generator().manual_seed(1))
    transposed = (x, pos, counts, True, 0, k, row_scale, grad)
    values = row_scale.unsqueeze(1) * packing.unpack_reference(x, pos, counts, k, True)
    for count in (1, 2):
        threads(count)
        for call, result in zip(calls, expected, strict=True):
            assert_bitwise(ops.matmul_packed(*call), result)
        expected_t = ops.matmul_transposed_reference(*transposed)
        assert_sum(ops.matmul_transposed(*transposed), expected_t, values.abs().t() @ grad.abs(), n)


def every_op(device):
    x, pos, counts, w, rest = problem(12, 9, 5, True, 8, device)
    for zero, output, tail in tails(12, 5, rest):
        yield ops.matmul_packed, (x, pos, counts, True, zero, w, 8, 9, 5, output, *tail)
    yield ops.matmul_transposed, (x, pos, counts, True, 0, 9, rest[0], torch.ones(12, 5, device=device))


def test_opcheck(backend):
    for op, arguments in every_op(backend):
        torch.library.opcheck(op, arguments)


def test_compiles_whole():
    for op, arguments in every_op("cpu"):
        torch.compiler.reset()
        compiled = torch.compile(lambda *a, op=op: op(*a), backend="aot_eager", fullgraph=True)
        assert_bitwise(compiled(*arguments), op(*arguments))


@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("m", [1, 2, 17])
@pytest.mark.parametrize("signed", [True, False])
def test_thin_products(backend, n, k, m, signed):
    """One row, one feature or one column: libraries read such strides in more than one way."""
    generator = torch.Generator().manual_seed(n * 100 + k * 10 + m)
    x = torch.randint(-7 if signed else 0, 8, (n, k), generator=generator).float()
    w = torch.randint(-7, 8, (k, m), generator=generator).float()
    counts = packing.uniform_counts(n, 8)
    rows = packing.pack_reference(x.int(), None, counts).to(backend)
    columns = packing.pack_reference(w.t().int(), None, packing.uniform_counts(m, 4)).to(backend)
    acc = ops.matmul_packed(rows, None, counts, signed, 0, columns, 4, k, m, "acc", *NOTHING)
    assert_bitwise(acc, (x @ w).to(torch.int32))
