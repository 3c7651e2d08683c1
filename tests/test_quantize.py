import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn.kernels import packing
from qgnn.kernels import quantize as ops

from .assertions import assert_bitwise, assert_sum

SHAPES = [(0, 5), (4, 0), (5, 1), (9, 16), (7, 33), (11, 64), (6, 130)]
both_axes = pytest.mark.parametrize("row", [True, False], ids=["row", "column"])
both_signs = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def problem(n, f, row, signed, device, dtype=torch.float32, seed=0):
    """x with zeros, ties at half steps, values at the clipping point, huge ones and infinities; all widths from 0 to
    8."""
    generator = torch.Generator().manual_seed(seed)
    count = n if row else f
    step = torch.rand(count, generator=generator) * 0.3 + 0.01
    bits = (torch.arange(count) % 9).to(torch.uint8)
    x = torch.randn(n, f, generator=generator) * 2
    s, q = (t.unsqueeze(1) if row else t.unsqueeze(0) for t in (step, ops.largest_code(bits, signed).float()))
    kind = torch.randint(0, 8, (n, f), generator=generator)
    half = torch.randint(-20, 20, (n, f), generator=generator) + 0.5
    special = [torch.zeros(n, f), half * s, s * q.expand(n, f), -s * q.expand(n, f), torch.full((n, f), 3e4)]
    for index, values in enumerate(special):
        x = torch.where(kind == index, values, x)
    return x.to(dtype).to(device), step.to(device), bits.to(device)


def layout(bits, n, row, signed):
    containers = packing.containers_of(bits, signed) if row else torch.full((n,), 8, device=bits.device)
    return packing.bucket_rows(containers)


def spread(values, row):
    return values.unsqueeze(1) if row else values.unsqueeze(0)


def check_local(x, step, bits, row, signed, actual, expected):
    if x.numel() == 0:
        assert_bitwise(actual[0], torch.zeros_like(expected[0]))
        assert_bitwise(actual[1], torch.zeros_like(expected[1]))
        return
    codes, clipped = ops.codes_reference(x, step, bits, row, signed)
    derivatives = ops.derivatives_reference(x, codes, clipped, step, bits, row, signed)
    dim = 1 if row else 0
    for a, e, d in zip(actual, expected, derivatives, strict=True):
        assert_sum(a, e, d.abs().mean(dim), x.size(dim), "local gradient")


@both_signs
def test_hand_computed_codes(signed):
    # step 1/2, widths 3, 1, 0, 8
    x = torch.tensor([[0.0, 0.25, -0.25, 0.74, 0.75, 1.5, 9.0, -9.0]] * 4)
    step, bits = torch.full((4,), 0.5), torch.tensor([3, 1, 0, 8], dtype=torch.uint8)
    codes, clipped = ops.codes_reference(x, step, bits, True, signed)
    if signed:
        assert codes[0].tolist() == [0, 1, -1, 1, 2, 3, 3, -3]
        assert clipped[0].tolist() == [False] * 5 + [True] * 3
        assert codes[1].tolist() == codes[2].tolist() == [0] * 8 and clipped[1].all() and clipped[2].all()
        assert codes[3].tolist() == [0, 1, -1, 1, 2, 3, 18, -18] and not clipped[3].any()
    else:
        assert codes[0].tolist() == [0, 1, 0, 1, 2, 3, 7, 0]
        assert clipped[0].tolist() == [False, False, True, False, False, False, True, True]
        assert codes[1].tolist() == [0, 1, 0, 1, 1, 1, 1, 0]
        assert codes[2].tolist() == [0] * 8
        assert codes[3].tolist() == [0, 1, 0, 1, 2, 3, 18, 0]


def test_hand_computed_gradients():
    # Q = 1: 0.3 -> code 1, error +0.2, d_step 0.4; -2 clipped, error +1.5 -> sign + , d_step -1, d_bits -2 ln2 / 2
    x = torch.tensor([[0.3, -2.0]])
    step, bits = torch.tensor([0.5]), torch.tensor([2], dtype=torch.uint8)
    *_, g_step, g_bits = ops.fake_quantize_reference(x, step, bits, True, True, True)
    assert g_step.item() == pytest.approx((0.4 - 1) / 2)
    assert g_bits.item() == pytest.approx(-math.log(2) / 2)
    out, g_step, g_bits = ops.fake_quantize_backward_reference(torch.tensor([[3.0, 5.0]]), x, step, bits, True, True)
    assert out.tolist() == [[3.0, 0.0]]
    assert g_step.item() == pytest.approx(3 * 0.4 - 5)
    assert g_bits.item() == pytest.approx(-5 * math.log(2))


@both_axes
@both_signs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize(backend, shape, row, signed):
    x, step, bits = problem(*shape, row, signed, backend)
    counts, pos = layout(bits, shape[0], row, signed)
    actual = ops.quantize(x, step, bits, row, signed, pos, counts, True)
    expected = ops.quantize_reference(x, step, bits, row, signed, pos, counts, True)
    assert_bitwise(actual[0], expected[0], "packed codes")
    assert_bitwise(actual[1], expected[1], "clip bits")
    check_local(x, step, bits, row, signed, actual[2:], expected[2:])
    without = ops.quantize(x, step, bits, row, signed, pos, counts, False)
    assert_bitwise(without[0], expected[0])
    assert without[2].numel() == without[3].numel() == 0


@both_axes
@both_signs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fake_quantize(backend, dtype, row, signed):
    x, step, bits = problem(13, 33, row, signed, backend, dtype)
    actual = ops.fake_quantize(x, step, bits, row, signed, True)
    expected = ops.fake_quantize_reference(x, step, bits, row, signed, True)
    assert_bitwise(actual[0], expected[0], "values")
    assert_bitwise(actual[1], expected[1], "clip bits")
    check_local(x, step, bits, row, signed, actual[2:], expected[2:])


@both_axes
@both_signs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_quantize_backward(backend, dtype, row, signed):
    x, step, bits = problem(13, 33, row, signed, backend, dtype)
    grad = torch.randn(13, 33, generator=torch.Generator().manual_seed(1)).to(dtype).to(backend)
    actual = ops.fake_quantize_backward(grad, x, step, bits, row, signed)
    expected = ops.fake_quantize_backward_reference(grad, x, step, bits, row, signed)
    assert_bitwise(actual[0], expected[0], "gradient of x")
    codes, clipped = ops.codes_reference(x, step, bits, row, signed)
    derivatives = ops.derivatives_reference(x, codes, clipped, step, bits, row, signed)
    for a, e, d in zip(actual[1:], expected[1:], derivatives, strict=True):
        assert_sum(a, e, (grad * d).abs().sum(1 if row else 0), x.size(1 if row else 0), "global gradient")


def test_nan_stays_nan(backend):
    x = torch.tensor([[float("nan"), 1.0, float("inf"), -float("inf")]], device=backend)
    step, bits = torch.tensor([0.5], device=backend), torch.tensor([4], dtype=torch.uint8, device=backend)
    out, clip, *_ = ops.fake_quantize(x, step, bits, True, True, False)
    assert_bitwise(out, torch.tensor([[float("nan"), 1.0, 3.5, -3.5]]))
    assert clip.tolist() == [[0b1100]]


@pytest.mark.parametrize("shape", [(0, 5), (3, 1), (5, 33), (4, 64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_mask_clipped(backend, shape, dtype):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(shape, generator=generator).to(dtype).to(backend)
    clip = torch.randint(0, 256, (shape[0], -(-shape[1] // 8)), generator=generator).to(torch.uint8).to(backend)
    assert_bitwise(ops.mask_clipped(grad, clip), ops.mask_clipped_reference(grad, clip))


@both_axes
@both_signs
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantize(backend, shape, row, signed):
    n, f = shape
    _, step, bits = problem(n, f, row, signed, backend)
    counts, pos = layout(bits, n, row, signed)
    codes = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(backend)
    data = packing.pack_reference(codes, pos, counts)
    for zero in (0, 7):
        arguments = (data, step, row, signed, zero, pos, counts, f)
        assert_bitwise(ops.dequantize(*arguments), ops.dequantize_reference(*arguments))


def test_non_contiguous(backend):
    x, step, bits = problem(12, 34, True, True, backend)
    x, step, bits = x[::2, 1::3], step[::2], bits[::2]
    counts, pos = layout(bits, 6, True, True)
    actual = ops.quantize(x, step, bits, True, True, pos, counts, False)
    expected = ops.quantize_reference(x, step, bits, True, True, pos, counts, False)
    assert_bitwise(actual[0], expected[0])
    grad = torch.ones(34, 12, device=backend).t()[::2, 1::3]
    actual = ops.fake_quantize_backward(grad, x, step, bits, True, True)
    assert_bitwise(actual[0], ops.fake_quantize_backward_reference(grad, x, step, bits, True, True)[0])
    assert_bitwise(ops.mask_clipped(grad, expected[1]), ops.mask_clipped_reference(grad, expected[1]))


@both_axes
def test_threads_and_runs_agree(row, threads):
    x, step, bits = problem(4000, 65, row, True, "cpu")
    counts, pos = layout(bits, 4000, row, True)
    results = []
    for count in (1, 2, 2):
        threads(count)
        results.append(
            ops.quantize(x, step, bits, row, True, pos, counts, True)
            + ops.fake_quantize(x, step, bits, row, True, True)
            + ops.fake_quantize_backward(x, x, step, bits, row, True)
        )
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert_bitwise(a, b)
    data = results[0][0]
    arguments = (data, step, row, True, 0, pos, counts, 65)
    assert_bitwise(ops.dequantize(*arguments), ops.dequantize_reference(*arguments))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 12), st.integers(0, 40), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_any_shape(n, f, row, signed, seed):
    x, step, bits = problem(n, f, row, signed, "cpu", seed=seed)
    counts, pos = layout(bits, n, row, signed)
    actual = ops.quantize(x, step, bits, row, signed, pos, counts, False)
    expected = ops.quantize_reference(x, step, bits, row, signed, pos, counts, False)
    assert_bitwise(actual[0], expected[0])
    assert_bitwise(actual[1], expected[1])
    arguments = (actual[0], step, row, signed, 0, pos, counts, f)
    assert_bitwise(ops.dequantize(*arguments), ops.dequantize_reference(*arguments))


def every_op(device):
    x, step, bits = problem(6, 9, True, True, device)
    counts, pos = layout(bits, 6, True, True)
    data, clip, *_ = ops.quantize_reference(x, step, bits, True, True, pos, counts, False)
    return [
        (ops.quantize, (x, step, bits, True, True, pos, counts, True)),
        (ops.quantize, (x, step, bits, True, True, pos, counts, False)),
        (ops.fake_quantize, (x, step, bits, True, True, True)),
        (ops.fake_quantize_backward, (x, x, step, bits, True, True)),
        (ops.mask_clipped, (x, clip)),
        (ops.dequantize, (data, step, True, True, 0, pos, counts, 9)),
    ]


def test_opcheck(backend):
    for op, arguments in every_op(backend):
        torch.library.opcheck(op, arguments)


def test_compiles_whole():
    for op, arguments in every_op("cpu"):
        actual = torch.compile(lambda *a, op=op: op(*a), backend="aot_eager", fullgraph=True)(*arguments)
        expected = op(*arguments)
        for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (actual, expected)), strict=True):
            assert_bitwise(a, b)
