"""Segment reductions: torch-scatter's semantics, by hand-computed tables and against plain loops, and every backend against the reference."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric.utils import scatter as pyg_scatter

import qgnn
from qgnn import ops
from qgnn.kernels import scatter as kernels

from .assertions import EPSILON, assert_bitwise, assert_sum

REDUCTIONS = ("sum", "mean", "max", "min", "mul")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)
dtypes = pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
reductions = pytest.mark.parametrize("reduce", REDUCTIONS)


def normal(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def random_index(size: int, *shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    return torch.randint(0, size, shape, generator=torch.Generator().manual_seed(seed)).to(device)


# Tables. Numbers are so small that every type holds them, and every mean, exactly; group 2 of 4 is empty.

COLUMN = ([3, -2, 5, -2, 4, 0], [0, 1, 0, 3, 1, 1])
ROWS = ([[3, -2], [5, 6], [1, -4], [-5, 0]], [1, 0, 1, 3])
TABLES = [
    # src, index, dim, {reduce: out}
    (
        *COLUMN, 0,
        {"sum": [8, 2, 0, -2], "mean": [4, 2 / 3, 0, -2], "max": [5, 4, 0, -2], "min": [3, -2, 0, -2], "mul": [15, 0, 1, -2]},
    ),
    (
        *ROWS, 0,
        {
            "sum": [[5, 6], [4, -6], [0, 0], [-5, 0]], "mean": [[5, 6], [2, -3], [0, 0], [-5, 0]], "max": [[5, 6], [3, -2], [0, 0], [-5, 0]],
            "min": [[5, 6], [1, -4], [0, 0], [-5, 0]], "mul": [[5, 6], [3, 8], [1, 1], [-5, 0]],
        },
    ),
    (
        [[3, 5, 1, -5], [-2, 6, -4, 0]], [1, 0, 1, 3], 1,
        {
            "sum": [[5, 4, 0, -5], [6, -6, 0, 0]], "mean": [[5, 2, 0, -5], [6, -3, 0, 0]], "max": [[5, 3, 0, -5], [6, -2, 0, 0]],
            "min": [[5, 1, 0, -5], [6, -4, 0, 0]], "mul": [[5, 3, 1, -5], [6, 8, 1, 0]],
        },
    ),
    (  # an index for every element
        [[1, 2, 3], [4, 5, 6]], [[0, 0, 3], [1, 3, 1]], -1,
        {
            "sum": [[3, 0, 0, 3], [0, 10, 0, 5]], "mean": [[1.5, 0, 0, 3], [0, 5, 0, 5]], "max": [[2, 0, 0, 3], [0, 6, 0, 5]],
            "min": [[1, 0, 0, 3], [0, 4, 0, 5]], "mul": [[2, 1, 1, 3], [1, 24, 1, 5]],
        },
    ),
    (  # an index for every row of every block
        [[[1, 2], [3, 4]], [[5, 6], [7, 8]]], [[3, 3], [1, 0]], 1,
        {
            "sum": [[[0, 0], [0, 0], [0, 0], [4, 6]], [[7, 8], [5, 6], [0, 0], [0, 0]]],
            "mean": [[[0, 0], [0, 0], [0, 0], [2, 3]], [[7, 8], [5, 6], [0, 0], [0, 0]]],
            "max": [[[0, 0], [0, 0], [0, 0], [3, 4]], [[7, 8], [5, 6], [0, 0], [0, 0]]],
            "min": [[[0, 0], [0, 0], [0, 0], [1, 2]], [[7, 8], [5, 6], [0, 0], [0, 0]]],
            "mul": [[[1, 1], [1, 1], [1, 1], [3, 8]], [[7, 8], [5, 6], [1, 1], [1, 1]]],
        },
    ),
]  # fmt: skip


def expected_mean(values: list, dtype: torch.dtype, rounding: str) -> Tensor:
    """The table's mean, for integers rounded as torch-scatter rounds it."""
    exact = torch.tensor(values, dtype=torch.float64)
    if not dtype.is_floating_point:
        exact = exact.floor() if rounding == "floor" else exact.trunc()
    return exact.to(dtype)


def assert_table(actual: Tensor, expected: Tensor, reduce: str) -> None:
    if reduce == "mean" and actual.is_floating_point():
        # The sum is exact; 1 / count, the product and the conversion round once each.
        torch.testing.assert_close(actual.cpu(), expected, rtol=3 * 2 * EPSILON[actual.dtype], atol=0)
    else:
        assert_bitwise(actual, expected)


@pytest.mark.parametrize("table", TABLES, ids=["vector", "rows", "columns", "elements", "blocks"])
@dtypes
def test_scatter_tables(backend, table, dtype):
    values, index, dim, results = table
    src, index = torch.tensor(values, dtype=dtype, device=backend), torch.tensor(index, device=backend)
    apart = torch.stack([src, src + 1], -1)[..., 0]
    for reduce, result in results.items():
        expected = expected_mean(result, dtype, "floor") if reduce == "mean" else torch.tensor(result, dtype=dtype)
        assert_table(ops.scatter(apart, index.to(torch.int32), dim, None, reduce), expected, reduce)
        longer = ops.scatter(src, index, dim, 6, reduce)
        nothing = torch.full_like(longer, int(reduce == "mul"))
        assert_table(longer.narrow(dim, 0, 4), expected, reduce)
        assert_bitwise(longer.narrow(dim, 4, 2), nothing.narrow(dim, 4, 2))
        assert longer.is_contiguous()


def test_broadcast_forms_agree(backend):
    src, index = normal(3, 5, 4, device=backend), random_index(6, 5, device=backend)
    expected = ops.scatter(src, index, 1, 6)
    for form in (index.view(1, 5), index.view(1, 5, 1), index.view(1, 5, 1).expand(3, 5, 4)):
        assert_bitwise(ops.scatter(src, form, 1, 6), expected)
    copied = index.view(1, 5, 1).expand(3, 5, 4).contiguous()
    blocks = index.view(1, 5).expand(3, 5).contiguous()
    for form in (copied, blocks):
        # at most 5 terms in one group
        assert_sum(ops.scatter(src, form, 1, 6), expected, ops.scatter(src.abs(), index, 1, 6), 5)
        assert_bitwise(ops.scatter(src, form, 1, 6, "min"), ops.scatter(src, index, 1, 6, "min"))


def test_without_looking_at_values(backend, monkeypatch):
    """As on a GPU, which would have to be synchronised."""
    src, index, indptr = (t.to(backend) for t in (normal(9, 4), random_index(5, 9), torch.tensor([0, 3, 3, 7, 9])))
    few = normal(4, 4, device=backend)
    every = [
        lambda: ops.scatter(src, index, 0, 5),
        lambda: ops.segment_csr(src, indptr),
        lambda: ops.gather_csr(few, indptr),
    ]
    looked = [run() for run in every]
    monkeypatch.setattr(ops, "_readable", lambda tensor: False)
    for run, expected in zip(every, looked, strict=True):
        assert_bitwise(run(), expected)
    with pytest.raises(ValueError, match="index: -1 is outside"):  # without dim_size it has looked anyway
        ops.scatter(src, index - 1 - index.min(), 0)


def test_values_on_a_gpu_are_looked_at_on_request(monkeypatch):
    monkeypatch.delenv("QGNN_DEBUG", raising=False)
    elsewhere = torch.empty(1, device="meta")
    assert (ops._readable(torch.empty(1)), ops._readable(elsewhere)) == (True, False)
    monkeypatch.setenv("QGNN_DEBUG", "1")
    assert ops._readable(elsewhere)


SEGMENTS = [0, 2, 2, 5, 6]


@dtypes
def test_segment_csr_tables(backend, dtype):
    src = torch.tensor([[1, 2], [-4, 5], [-3, 3], [2, 3], [-1, 4], [7, -7]], dtype=dtype, device=backend)
    indptr = torch.tensor(SEGMENTS, device=backend)
    table = {
        "sum": [[-3, 7], [0, 0], [-2, 10], [7, -7]],
        "mean": [[-1.5, 3.5], [0, 0], [-2 / 3, 10 / 3], [7, -7]],
        "max": [[1, 5], [0, 0], [2, 4], [7, -7]],
        "min": [[-4, 2], [0, 0], [-3, 3], [7, -7]],
    }
    for reduce, result in table.items():
        expected = expected_mean(result, dtype, "trunc") if reduce == "mean" else torch.tensor(result, dtype=dtype)
        assert_table(ops.segment_csr(src, indptr.to(torch.int32), reduce), expected, reduce)
        # in blocks, along the second dimension, with one indptr for both and with one each
        both = torch.stack([src, src.flip(0)])
        flipped = 6 - indptr.flip(0)
        assert_table(ops.segment_csr(both, indptr[None], reduce)[0], expected, reduce)
        each = ops.segment_csr(both, torch.stack([indptr, flipped]), reduce)
        assert_table(each, torch.stack([expected, expected.flip(0)]), reduce)
        # some left out, at both ends
        assert_table(ops.segment_csr(src, indptr[1:-1], reduce), expected[1:-1], reduce)
    assert_bitwise(ops.segment_csr(src[:, 0], indptr, "add"), torch.tensor([-3, 0, -2, 7], dtype=dtype))


@dtypes
def test_gather_csr_tables(backend, dtype):
    src = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]], dtype=dtype, device=backend)
    indptr = torch.tensor(SEGMENTS, device=backend)
    expected = torch.tensor([[1, 2], [1, 2], [5, 6], [5, 6], [5, 6], [7, 8]], dtype=dtype)
    assert_bitwise(ops.gather_csr(src, indptr), expected)
    assert_bitwise(ops.gather_csr(src[:, 0], indptr.to(torch.int32)), expected[:, 0])
    both = torch.stack([src, src.flip(0)])
    assert_bitwise(
        ops.gather_csr(both, torch.stack([indptr, 6 - indptr.flip(0)])), torch.stack([expected, expected.flip(0)])
    )
    assert_bitwise(ops.gather_csr(src, indptr + 1), torch.cat([torch.zeros(1, 2, dtype=dtype), expected]))


@reductions
def test_nothing(backend, reduce):
    no_index = torch.empty(0, dtype=torch.int64, device=backend)
    fill = float(reduce == "mul")
    assert ops.scatter(torch.ones(0, 3, device=backend), no_index, 0, None, reduce).shape == (0, 3)
    assert ops.scatter(torch.ones(0, 3, device=backend), no_index, 0, 2, reduce).tolist() == [[fill] * 3] * 2
    assert ops.scatter(torch.ones(2, 0, device=backend), no_index.new_tensor([4, 1]), 0, None, reduce).shape == (5, 0)
    src = torch.ones(0, 3, device=backend, requires_grad=True)
    ops.scatter(src, no_index, 0, 2, reduce).sum().backward()
    assert src.grad.shape == (0, 3)
    if reduce != "mul":
        segments = no_index.new_zeros(3)
        assert ops.segment_csr(torch.ones(0, 3, device=backend), segments, reduce).tolist() == [[0.0] * 3] * 2
        assert ops.segment_csr(torch.ones(4, 3, device=backend), segments[:1], reduce).shape == (0, 3)
    assert ops.gather_csr(torch.ones(2, 3, device=backend), no_index.new_zeros(3)).shape == (0, 3)
    assert ops.gather_csr(torch.ones(0, 4, 3, device=backend), no_index.new_zeros(0, 5)).shape == (0, 0, 3)


# Every backend against the reference --------------------------------------------------------------------------------------------------


def structure(lengths: list[int], device: str, dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor]:
    """Groups of these lengths, and rows in random order."""
    indptr = torch.tensor([0, *lengths]).cumsum(0).to(dtype)
    order = torch.randperm(int(indptr[-1]), generator=torch.Generator().manual_seed(0))
    return indptr.to(device), order.to(torch.int32).to(device)


LENGTHS = {
    "empty ones": [0, 3, 0, 0, 1, 2, 0],
    "one long": [1, 75, 2],
    "even": [8] * 5,
    "one": [1],
    "nothing": [0, 0],
    "none": [],
}


def check_reduce(indptr: Tensor, indices: Tensor, x: Tensor, reduce: str) -> None:
    actual = kernels.segment_reduce(indptr, indices, x, reduce)
    expected = kernels.segment_reduce_reference(indptr, indices, x, reduce)
    assert_bitwise(actual[1], expected[1], "arg")
    longest = int((indptr[1:] - indptr[:-1]).max()) if indptr.numel() > 1 else 0
    if reduce in ("sum", "mean") and x.is_floating_point():
        magnitude = kernels.segment_reduce_reference(indptr, indices, x.to(EXACT[x.dtype]).abs(), reduce)[0]
        assert_sum(actual[0], expected[0], magnitude, longest, reduce)
    elif reduce == "mul" and x.is_floating_point():
        # Each factor rounds once, in whatever order: (1 + eps)^n - 1 < 2 n eps each; and the conversion, at both.
        bound = 4 * longest * EPSILON[EXACT[x.dtype]] + 2 * EPSILON[x.dtype]
        torch.testing.assert_close(actual[0], expected[0], rtol=bound, atol=1e-30, equal_nan=True)
    else:
        assert_bitwise(actual[0], expected[0], reduce)
    assert_bitwise(kernels.segment_reduce(indptr, indices, x, reduce)[0], actual[0], "second run")


EXACT = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in FLOATS}


@pytest.mark.parametrize("name", LENGTHS)
@reductions
def test_segment_reduce(backend, name, reduce):
    for offsets in INTEGERS if name == "empty ones" else (torch.int32,):
        indptr, indices = structure(LENGTHS[name], backend, offsets)
        check_reduce(indptr, indices, normal(indices.numel(), 33, device=backend), reduce)


@pytest.mark.parametrize("features", [0, 1, 16, 130])
@reductions
def test_segment_reduce_widths(backend, features, reduce):
    indptr, indices = structure(LENGTHS["one long"], backend)
    check_reduce(indptr, indices, normal(2 * indices.numel(), features, device=backend)[::2], reduce)


@dtypes
@reductions
def test_segment_reduce_dtypes(backend, dtype, reduce):
    indptr, indices = structure(LENGTHS["empty ones"], backend)
    if dtype.is_floating_point:
        check_reduce(indptr, indices, normal(indices.numel(), 6, device=backend).to(dtype), reduce)
    elif reduce != "mean":
        x = random_index(9, indices.numel(), 6, device=backend).to(dtype) - 4
        x[:, 1], x[::2, 2], x[:, 3] = torch.iinfo(dtype).min, torch.iinfo(dtype).max, torch.iinfo(dtype).max
        check_reduce(indptr, indices, x, reduce)  # at both ends of the range, where sums wrap


@pytest.mark.parametrize("reduce", ["max", "min"])
def test_ties_nan_and_infinity(backend, reduce):
    indptr, indices = structure([3, 4, 40, 1], backend)
    values = torch.tensor([0.0, 1.0, torch.nan, 1.0, -1.0, torch.inf, -torch.inf, -0.0], device=backend).repeat(6)
    check_reduce(indptr, indices, torch.stack([values.roll(shift) for shift in range(8)], 1), reduce)
    for end in (torch.inf, -torch.inf, torch.nan):
        check_reduce(indptr, indices, torch.full((48, 3), end, device=backend), reduce)


def test_group(backend):
    for size, index in ((5, [3, 0, 3, 3, 1, 0]), (4, [0, 0, 2, 3]), (3, []), (0, []), (1, [0, 0])):
        for dtype in INTEGERS:
            given = torch.tensor(index, dtype=dtype, device=backend)
            for actual, expected in zip(kernels.group(given, size), kernels.group_reference(given, size), strict=True):
                assert_bitwise(actual, expected)
    assert kernels.group_reference(torch.tensor([3, 0, 3, 1]), 5)[0].tolist() == [0, 1, 2, 2, 4, 4]
    assert kernels.group_reference(torch.tensor([3, 0, 3, 1]), 5)[1].tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in LENGTHS), *(("empty ones", dtype) for dtype in FLOATS)]
)
def test_mul_backward(backend, name, dtype):
    indptr, indices = structure(LENGTHS[name], backend)
    x = normal(indices.numel(), 5, device=backend).to(dtype)
    x[::3, 1], x[:, 2] = 0, 0
    grad = normal(indptr.numel() - 1, 5, device=backend, seed=1).to(dtype)
    actual = kernels.segment_mul_backward(indptr, indices, grad, x)
    expected = kernels.segment_mul_backward_reference(indptr, indices, grad, x)
    # As the product itself, with one factor and one division more.
    bound = 4 * (max(LENGTHS[name], default=0) + 2) * EPSILON[EXACT[dtype]] + 2 * EPSILON[dtype]
    smallest = torch.finfo(dtype).tiny
    torch.testing.assert_close(actual, expected, rtol=bound, atol=smallest)
    assert_bitwise(kernels.segment_mul_backward(indptr, indices, grad, x), actual, "second run")


def test_mul_backward_whatever_the_default_dtype(float64_by_default):
    indptr, indices = structure(LENGTHS["empty ones"], "cpu")
    x = torch.zeros(indices.numel(), 2, dtype=torch.float32)
    grad = torch.ones(indptr.numel() - 1, 2, dtype=torch.float32)
    expected = kernels.segment_mul_backward_reference(indptr, indices, grad, x)
    assert_bitwise(kernels.segment_mul_backward(indptr, indices, grad, x), expected)


# Gradients ----------------------------------------------------------------------------------------------------------------------------

INDICES = {
    "rows": (torch.tensor([2, 0, 2, 2, 4, 0]), 0),
    "sorted": (torch.tensor([0, 0, 1, 3, 3, 3]), 0),
    "columns": (torch.tensor([1, 1, 0]), 1),
    "elements": (torch.tensor([[0, 1, 1], [2, 2, 1], [0, 0, 0], [3, 1, 1], [0, 1, 0], [2, 2, 2]]), 0),
}


@pytest.mark.parametrize("name", INDICES)
@reductions
@pytest.mark.parametrize("choice", ["cpu", "reference"])
def test_scatter_gradcheck(name, reduce, choice):
    index, dim = INDICES[name]
    src = normal(6, 3).double().requires_grad_()
    with qgnn.use_backend(choice):
        assert torch.autograd.gradcheck(lambda x: ops.scatter(x, index, dim, 5, reduce), (src,))


@pytest.mark.parametrize("indptr", [[0, 2, 2, 6], [1, 3, 4], [[0, 2, 6], [1, 1, 5]]], ids=["all", "some", "blocks"])
def test_segment_gradcheck(indptr):
    indptr = torch.tensor(indptr)
    src = normal(*([2] * (indptr.dim() - 1)), 6, 3).double().requires_grad_()
    for reduce in REDUCTIONS[:-1]:
        assert torch.autograd.gradcheck(lambda x, reduce=reduce: ops.segment_csr(x, indptr, reduce), (src,))
    few = normal(*([2] * (indptr.dim() - 1)), indptr.size(-1) - 1, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.gather_csr(x, indptr), (few,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_gradients_by_hand(backend, dtype):
    index, upstream = torch.tensor([1, 0, 1, 3, 1], device=backend), torch.tensor([5, 6, 7, -2], device=backend)
    table = {
        "sum": [6, 5, 6, -2, 6],
        "mean": [2, 5, 2, -2, 2],
        "max": [6, 5, 0, -2, 0],  # 4 stands there twice: the first takes it
        "min": [0, 5, 0, -2, 6],
        "mul": [24, 5, 24, -2, 96],  # 6 times the product of the others
    }
    values = torch.tensor([4, -3, 4, 0, 1], dtype=dtype, device=backend)
    for reduce, expected in table.items():
        for shape in ((5,), (5, 1)):
            src = values.view(shape).requires_grad_()
            out = ops.scatter(src, index, 0, 4, reduce)
            (grad,) = torch.autograd.grad(out, src, upstream.to(dtype).view(4, *shape[1:]))
            assert_bitwise(grad, torch.tensor(expected, dtype=dtype).view(shape))


def test_mean_of_more_rows_than_half_precision_counts(backend):
    src = torch.ones(70_000, 1, dtype=torch.float16, device=backend, requires_grad=True)
    out = ops.scatter(src, torch.zeros(70_000, dtype=torch.int64, device=backend), 0, 1, "mean")
    (grad,) = torch.autograd.grad(out, src, torch.full_like(out, 7000))
    # 70,000 ones are exact in float32, 1 / 70,000 and the product round; the result is the float16 next to 1, and to 0.1
    assert out.item() == 1
    assert torch.equal(grad.cpu(), torch.full((70_000, 1), 0.1, dtype=torch.float16))


def test_mul_gradient_where_factors_are_zero(backend):
    src = torch.tensor([0.0, 2.0, 3.0, 0.0, 5.0, 0.0], device=backend, requires_grad=True)
    out = ops.scatter(src, torch.tensor([0, 0, 0, 1, 1, 1], device=backend), reduce="mul")
    assert out.tolist() == [0, 0]
    # one zero: it takes 2 * 3, the others nothing; two zeros: nothing at all
    assert torch.autograd.grad(out.sum(), src)[0].tolist() == [6, 0, 0, 0, 0, 0]


@reductions
def test_agrees_with_pyg(reduce):
    for shape, dim in (((40, 7), 0), ((40, 7), 1), ((5, 20, 3), 1), ((30,), 0)):
        index = random_index(9, shape[dim])
        src = normal(*shape).double().requires_grad_()
        ours, theirs = (f(src, index, dim, 11, reduce) for f in (ops.scatter, pyg_scatter))
        # At most 40 terms (factors) of size below 5, in double: 40 * 2^-53 relative, and sums may cancel from 200.
        torch.testing.assert_close(ours, theirs, rtol=80 * 2**-53, atol=200 * 80 * 2**-53)
        upstream = normal(*ours.shape, seed=1).double()
        grads = [torch.autograd.grad(out, src, upstream)[0] for out in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=160 * 2**-53, atol=200 * 80 * 2**-53)


# Properties ---------------------------------------------------------------------------------------------------------------------------


def by_loop(src: Tensor, index: Tensor, dim: int, size: int, reduce: str) -> Tensor:
    """One element after the other, in exact integers."""
    shape = [size if d == dim else n for d, n in enumerate(src.shape)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for place in torch.cartesian_prod(*(torch.arange(n) for n in src.shape)).view(-1, src.dim()).tolist():
        target = (*place[:dim], int(index[tuple(place)]), *place[dim + 1 :])
        groups.setdefault(target, []).append(int(src[tuple(place)]))
    out = torch.full(shape, int(reduce == "mul"), dtype=src.dtype)
    by = {"sum": sum, "max": max, "min": min, "mul": math.prod, "mean": lambda terms: sum(terms) // len(terms)}
    for target, terms in groups.items():
        out[target] = by[reduce](terms)
    return out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.integers(0, 2),
    st.sampled_from(["vector", "leading", "full"]),
    st.sampled_from(REDUCTIONS),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_any_shape(shape, dim, form, reduce, size, seed):
    dim %= len(shape)
    src = random_index(7, *shape, seed=seed) - 3
    wanted = {"vector": (shape[dim],), "leading": shape[: dim + 1], "full": shape}[form]
    index = random_index(size, *wanted, seed=seed + 1)
    aligned = index if form != "vector" else index.view(-1, *[1] * (len(shape) - dim - 1))
    aligned = aligned.view(*aligned.shape, *[1] * (len(shape) - aligned.dim())) if form == "leading" else aligned
    expected = by_loop(src, aligned.expand(shape), dim, size, reduce)
    assert_bitwise(ops.scatter(src, index, dim - len(shape), size, reduce), expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), max_size=6), st.integers(0, 4), st.sampled_from(REDUCTIONS[:-1]), st.integers(0, 9))
def test_any_segments(lengths, features, reduce, spare):
    indptr = torch.tensor([0, *lengths]).cumsum(0) + spare % 3
    src = normal(int(indptr[-1]) + spare, features, seed=spare)
    bounds = indptr.tolist()
    pieces = [src[a:b] for a, b in pairwise(bounds)]
    by = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax, "min": torch.amin}
    rows = [by[reduce](piece, 0) if len(piece) else torch.zeros(features) for piece in pieces]
    expected = torch.stack(rows) if rows else torch.zeros(0, features)
    # 5 terms below 5
    torch.testing.assert_close(ops.segment_csr(src, indptr, reduce), expected, rtol=0, atol=2 * 5 * 25 * 2**-24)
    repeated = [row.expand(length, features) for row, length in zip(expected, lengths, strict=True)]
    assert_bitwise(ops.gather_csr(expected, indptr), torch.cat([torch.zeros(bounds[0], features), *repeated]))


@pytest.mark.parametrize("name", ["spread", "one long"])
def test_threads_agree(name, threads):
    """Enough work for two threads, and one group that is split among them."""
    index = random_index(500, 12_000)
    if name == "one long":
        index[:10_000] = 7
    indptr = torch.tensor([0, *([9_000] if name == "one long" else [15] * 600), 12_000])
    src, upstream = normal(12_000, 24), normal(500, 24, seed=1)

    def everything() -> list[Tensor]:
        results = []
        for reduce in REDUCTIONS:
            leaf = src.clone().requires_grad_()
            out = ops.scatter(leaf, index, 0, 500, reduce)
            results += [out, *torch.autograd.grad(out, leaf, upstream)]
        sums = ops.segment_csr(src, indptr)
        whole = src.int()
        exact = [ops.scatter(whole, index, 0, 500, reduce) for reduce in REDUCTIONS]
        return [*results, *exact, sums, ops.gather_csr(sums, indptr)]

    threads(1)
    single = everything()
    threads(2)
    for a, b in zip(everything(), single, strict=True):
        assert_bitwise(a, b)


def every_op(device: str):
    indptr, indices = structure(LENGTHS["empty ones"], device)
    x, grad = normal(6, 5, device=device), normal(7, 5, device=device)
    yield kernels.group, (torch.tensor([2, 0, 2], device=device), 4)
    yield from ((kernels.segment_reduce, (indptr, indices, x, reduce)) for reduce in REDUCTIONS)
    yield kernels.segment_reduce, (indptr, indices, x.int(), "min")
    yield kernels.segment_mul_backward, (indptr, indices, grad, x)
    yield kernels.segment_gather, (indptr, indices, grad)


def test_opcheck(backend):
    for op, arguments in every_op(backend):
        torch.library.opcheck(op, arguments)


def test_compiles_whole():
    for op, arguments in every_op("cpu"):
        torch.compiler.reset()
        compiled = torch.compile(lambda *a, op=op: op(*a), backend="aot_eager", fullgraph=True)
        actual, expected = compiled(*arguments), op(*arguments)
        for a, b in zip(*((t,) if isinstance(t, Tensor) else t for t in (actual, expected)), strict=True):
            assert_bitwise(a, b)


# Errors -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"index": [0, 3, 1]}, ValueError, r"index: 3 is outside 0..2; pass a larger dim_size or mend the index"),
        ({"index": [0, -1, 1]}, ValueError, r"index: -1 is outside 0..2"),
        ({"index": [0, 1]}, ValueError, r"index \(2,\) does not fit src \(3, 4\) along dim 0"),
        ({"index": [[[0]]]}, ValueError, r"index \(1, 1, 1\) must have 1 to 2 dimensions"),
        ({"index": [0.0, 1.0, 2.0]}, TypeError, r"index must be an int32 or int64 tensor, got torch.float32"),
        (
            {"src": torch.ones(3, 4, dtype=torch.bool)},
            TypeError,
            r"src must be a tensor of float16, .*, got torch.bool",
        ),
        ({"src": torch.ones(3, 4, device="meta")}, ValueError, r"src is on meta and index on cpu"),
        ({"dim": 2}, ValueError, r"dim must be in -2..1"),
        ({"dim_size": -1}, ValueError, r"dim_size must be positive or 0"),
        ({"reduce": "median"}, ValueError, r"reduce must be one of 'sum', 'mean', 'max', 'min', 'mul', got 'median'"),
    ],
)
def test_scatter_errors(arguments, kind, message):
    given = {"src": torch.ones(3, 4), "index": [0, 1, 2], "dim": 0, "dim_size": 3, **arguments}
    given["index"] = torch.tensor(given["index"])
    with pytest.raises(kind, match=message):
        ops.scatter(**given)


@pytest.mark.parametrize(
    ("indptr", "message"),
    [
        ([0, 2, 4], r"indptr leaves 0..3, the elements of src along dim 0"),
        ([-1, 2, 3], r"indptr leaves 0..3"),
        ([0, 2, 1], r"indptr must not fall"),
        ([], r"indptr has no elements"),
        ([[0, 1], [0, 1]], r"indptr \(2, 2\) does not fit src, which starts with \(3,\)"),
    ],
)
def test_segment_errors(indptr, message):
    with pytest.raises(ValueError, match=message):
        ops.segment_csr(torch.ones(3, 4), torch.tensor(indptr, dtype=torch.int64))


def test_other_segment_errors():
    with pytest.raises(ValueError, match=r"src has 2147483647 rows that are grouped, and int32 has to count them"):
        ops.segment_csr(torch.zeros(1).expand(2**31 - 1), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"reduce must be one of 'sum', 'mean', 'max', 'min', got 'mul'"):
        ops.segment_csr(torch.ones(3), torch.tensor([0, 3]), "mul")
    with pytest.raises(ValueError, match=r"src \(3, 4\) must have 1 elements along dim 0, one for each segment"):
        ops.gather_csr(torch.ones(3, 4), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match=r"indptr must be an int32 or int64 tensor, got list"):
        ops.gather_csr(torch.ones(3, 4), [0, 3])
