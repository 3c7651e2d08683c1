"""QTensor: the numbers of the symmetric quantizer by hand, the bytes it takes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qgnn
from qgnn import QTensor


@pytest.fixture
def backend(backend):
    """On a GPU the test's tensors are made there."""
    with torch.device(backend):
        yield backend


def test_rounding_is_half_away_from_zero(backend):
    x = torch.tensor([[0.0, -0.0, 0.24, 0.25, -0.25, 0.74, 0.75, -0.75, 3.4, 3.5, 100.0, -100.0]])
    q = QTensor.quantize(x, 0.5, 4)
    assert q.codes().tolist() == [[0, 0, 0, 1, -1, 1, 2, -2, 7, 7, 7, -7]]
    assert q.dequantize().tolist() == [[0.0, 0.0, 0.0, 0.5, -0.5, 0.5, 1.0, -1.0, 3.5, 3.5, 3.5, -3.5]]
    assert q.codes().dtype == torch.int32
    assert q.dequantize().dtype == torch.float32


@pytest.mark.parametrize(
    ("signed", "largest"), [(True, [0, 0, 1, 3, 7, 15, 31, 63, 127]), (False, [0, 1, 3, 7, 15, 31, 63, 127, 255])]
)
def test_largest_code_of_every_width(backend, signed, largest):
    widths = torch.arange(9)
    x = torch.full((9, 3), 1000.0)
    x[:, 1] = 0
    q = QTensor.quantize(x, 1.0, widths, signed=signed)
    assert q.codes().tolist() == [[top, 0, top] for top in largest]
    assert q.bits.tolist() == list(range(9))
    if signed:
        assert QTensor.quantize(-x, 1.0, widths).codes().tolist() == [[-top, 0, -top] for top in largest]


def test_widths_round_half_to_even_and_are_clamped():
    q = QTensor.quantize(torch.ones(8, 2), 1.0, torch.tensor([-3.0, 0.4, 0.5, 1.5, 2.5, 3.5, 8.4, 11.0]))
    assert q.bits.tolist() == [0, 0, 0, 2, 2, 4, 8, 8]
    assert q.bits.dtype == torch.uint8


def test_steps_by_row_and_by_column(backend):
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, -5.0, 6.0]])
    row = QTensor.quantize(x, torch.tensor([1.0, 2.0]), 8)
    assert row.codes().tolist() == [[1, 2, 3], [2, -3, 3]]  # -2.5 goes away from zero
    assert row.dequantize().tolist() == [[1, 2, 3], [4, -6, 6]]
    column = QTensor.quantize(x, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([8, 2, 3]), axis="col")
    assert column.codes().tolist() == [[1, 1, 1], [4, -1, 2]]
    assert column.dequantize().tolist() == [[1, 2, 3], [4, -2, 6]]
    assert column.shape == row.shape == (2, 3)
    assert column.step.shape == (3,)


@pytest.mark.parametrize("axis", ["row", "col"])
@pytest.mark.parametrize("signed", [True, False])
@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 5), f=st.integers(1, 19), seed=st.integers(0, 999))
def test_dequantized_is_step_times_code(axis, signed, n, f, seed):
    torch.manual_seed(seed)
    length = n if axis == "row" else f
    x, step, bits = torch.randn(n, f), torch.rand(length) + 0.1, torch.randint(0, 9, (length,))
    x = x if signed else x.abs()
    q = QTensor.quantize(x, step, bits, axis=axis, signed=signed)
    s, b = (v.unsqueeze(1) if axis == "row" else v for v in (step, bits))
    largest = torch.clamp_min(2 ** (b - 1) - 1, 0).floor() if signed else 2**b - 1
    codes = torch.sign(x) * torch.minimum(torch.floor(x.abs() / s + 0.5), largest)
    assert torch.equal(q.codes(), codes.int())
    assert torch.equal(q.dequantize(), s * codes)


def test_non_contiguous_and_half_precision_inputs(backend):
    x = torch.randn(8, 12)
    expected = QTensor.quantize(x[::2, ::3].clone(), 0.25, 5)
    assert torch.equal(QTensor.quantize(x[::2, ::3], 0.25, 5).data, expected.data)
    assert torch.equal(QTensor.quantize(x.t()[::3, ::2].t(), torch.tensor([0.25, 9.0] * 4)[::2], 5).data, expected.data)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rounded = x.to(dtype)
        assert torch.equal(
            QTensor.quantize(rounded, 0.25, 5).codes(), QTensor.quantize(rounded.float(), 0.25, 5).codes()
        )


def test_bytes_by_hand():
    x = torch.ones(32, 64)
    for bits, row in ((8, 64), (7, 64), (4, 32), (3, 32), (2, 16), (1, 8), (0, 0)):
        q = QTensor.quantize(x, 0.5, bits, signed=False)
        assert q.code_nbytes == 32 * row
        assert q.nbytes == 32 * row + 32 * 4 + 32  # codes, float32 steps, uint8 widths
    assert QTensor.quantize(x, 0.5, 1).code_nbytes == 0  # a signed code of 1 bit is always 0
    mixed = QTensor.quantize(x, 0.5, torch.arange(32) % 4, signed=False)  # 8 rows each of 0, 1, 2 and (3 ->) 4 bits
    assert mixed.counts == (0, 8, 8, 8, 8)
    assert mixed.code_nbytes == 8 * (32 + 16 + 8)
    assert mixed.nbytes == 8 * (32 + 16 + 8) + 32 * 4 + 32 + 32 * 4  # and the place of each row
    column = QTensor.quantize(x, 0.5, torch.arange(64) % 4, axis="col", signed=False)
    assert column.code_nbytes == 32 * 32  # the container of the widest column
    assert column.nbytes == 32 * 32 + 64 * 4 + 64


def test_bytes_grow_with_the_average_width():
    torch.manual_seed(0)
    x = torch.rand(200, 64)
    sizes = [QTensor.quantize(x, 0.1, torch.randint(0, top + 1, (200,)), signed=False).nbytes for top in range(1, 9)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] / 3
    assert sizes[-1] < x.numel() * 4


def test_bytes_are_those_really_allocated():
    q = QTensor.quantize(torch.rand(20, 40), 0.1, torch.arange(20) % 9, signed=False)
    tensors = [q.data, q.step, q.bits, q.pos]
    assert q.nbytes == sum(t.untyped_storage().nbytes() for t in tensors)
    assert q.step.is_contiguous()
    assert q.step.untyped_storage().nbytes() == 80


def test_later_changes_of_the_callers_steps_do_not_change_it():
    x, step = torch.randn(4, 6), torch.full((4,), 0.1, requires_grad=True)
    q = QTensor.quantize(x, step, 4)
    before = q.dequantize()
    with torch.no_grad():
        step.mul_(3)
    assert torch.equal(q.dequantize(), before)
    assert not q.step.requires_grad


def test_container():
    x = torch.rand(4, 5)
    assert [QTensor.quantize(x, 0.1, b).container for b in (0, 1, 2, 3, 4, 5, 8)] == [0, 0, 2, 4, 4, 8, 8]
    assert QTensor.quantize(torch.rand(0, 5), 0.1, 2).container == 8
    with pytest.raises(ValueError, match=r"rows of several containers; the operation needs one"):
        _ = QTensor.quantize(x, 0.1, torch.tensor([2, 4, 4, 4])).container


def test_columns_are_packed_once_for_products():
    q = QTensor.quantize(torch.randn(6, 3), 0.1, 4, axis="col")
    data, container = q.columns
    assert container == 4
    assert q.columns[0] is data
    assert torch.equal(QTensor.quantize(q.dequantize().t().contiguous(), 0.1, 4).data, data)
    assert QTensor.quantize(torch.randn(6, 3), 0.1, torch.tensor([2, 8, 2]), axis="col").columns[1] == 8


def test_to_and_repr():
    q = QTensor.quantize(torch.rand(3, 6), 0.1, torch.tensor([1, 2, 2]), signed=False)
    moved = q.to("meta")
    assert {t.device.type for t in (moved.data, moved.step, moved.bits, moved.pos)} == {"meta"}
    assert (moved.shape, moved.axis, moved.signed, moved.counts) == (q.shape, "row", False, q.counts)
    assert torch.equal(q.to("cpu").codes(), q.codes())
    assert repr(q) == f"QTensor(shape=(3, 6), bits=[1, 2], axis='row', signed=False, nbytes={q.nbytes})"
    assert q.rows is not None
    assert q.pos is not None
    assert torch.equal(q.rows[q.pos.long()], torch.arange(3, dtype=torch.int32))


def test_empty(backend):
    q = QTensor.quantize(torch.rand(0, 5), torch.empty(0), torch.empty(0))
    assert q.codes().shape == q.dequantize().shape == (0, 5)
    q = QTensor.quantize(torch.rand(3, 0), 1.0, 8)
    assert q.codes().shape == q.dequantize().shape == (3, 0)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("x", "arguments", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "x must be a torch.Tensor, got list"),
        (
            torch.ones(2, 2, dtype=torch.int32),
            {},
            TypeError,
            r"x must be a floating-point tensor, got torch.int32; convert it with .float\(\)",
        ),
        (torch.ones(4), {}, ValueError, r"x must be 2-D \[nodes, features\], got shape \(4,\)"),
        (torch.tensor([[1.0, 2.0], [3.0, NAN]]), {}, ValueError, r"x\[1, 1\] is nan; quantization needs finite values"),
        (torch.tensor([[1.0, -INF], [3.0, NAN]]), {}, ValueError, r"x\[0, 1\] is -inf"),
        (
            torch.ones(3, 2),
            {"step": torch.tensor([1.0, 0.0, -1.0])},
            ValueError,
            r"step\[1\] is 0.0; steps must be positive and finite",
        ),
        (torch.ones(3, 2), {"step": torch.tensor([1.0, 1.0, -1.0])}, ValueError, r"step\[2\] is -1.0"),
        (torch.ones(3, 2), {"step": torch.tensor([1.0, INF, 1.0])}, ValueError, r"step\[1\] is inf"),
        (torch.ones(3, 2), {"step": NAN}, ValueError, r"step\[0\] is nan"),
        (
            torch.ones(3, 2),
            {"step": torch.ones(2)},
            ValueError,
            r"step must be a number or have shape \[3\] for axis=\"row\" of x \(3, 2\), got \(2,\)",
        ),
        (torch.ones(3, 2), {"bits": torch.ones(4)}, ValueError, r"bits must be a number or have shape \[3\]"),
        (
            torch.ones(3, 2),
            {"step": torch.ones(3), "axis": "col"},
            ValueError,
            r"step must be a number or have shape \[2\] for axis=\"col\"",
        ),
        (torch.ones(3, 2), {"axis": "node"}, ValueError, r"axis must be \"row\" .* or \"col\" .*, got 'node'"),
        (
            torch.ones(3, 2),
            {"step": torch.ones(3, device="meta")},
            ValueError,
            "step is on meta and x on cpu; move one",
        ),
        (torch.ones(3, 2), {"bits": NAN}, ValueError, "bits has values that are not finite; widths are 0 to 8"),
        (
            torch.tensor([[1.0, 0.0], [-0.0, -2.0]]),
            {"signed": False},
            ValueError,
            r"x\[1, 1\] is negative; pass signed=True",
        ),
    ],
)
def test_errors(x, arguments, error, message):
    with pytest.raises(error, match=message):
        QTensor.quantize(x, **{"step": 1.0, "bits": 4, **arguments})


def test_backends_give_the_same_bytes(backend):
    torch.manual_seed(3)
    x, step, bits = torch.randn(9, 21), torch.rand(9) + 0.05, torch.randint(0, 9, (9,))
    for axis, s, b in (("row", step, bits), ("col", torch.rand(21) + 0.05, torch.randint(0, 9, (21,)))):
        q = QTensor.quantize(x, s, b, axis=axis)
        with qgnn.use_backend("reference"):
            expected = QTensor.quantize(x, s, b, axis=axis)
            values = expected.dequantize()
        assert torch.equal(q.data, expected.data)
        assert torch.equal(q.dequantize(), values)
