"""CPU backend of :mod:`qgnn.kernels.matmul`: blocks of rows are unpacked by Numba and multiplied by torch's integer
matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from ..packing import uniform_counts
from .common import (
    Array,
    array,
    buckets_of,
    codes_row,
    empty_packed,
    epilogue_row,
    even_bounds,
    kernel,
    largest_code,
    optional,
    pack_row,
    parallel_kernel,
    parallel_lock,
    parts_for,
    place,
    unpack_row,
)

BLOCK_BYTES = 1 << 20
"""Unpacked bytes of a block of rows: with the accumulators that it leaves, about what a core's second cache holds."""

OFFSET = 128
"""Taken off unsigned codes, which then fit int8; the product is corrected by ``OFFSET * sum_k w_code``, modulo 2^32."""


@kernel
def _unpack(lo, hi, first, data, signed, offset, pos, buckets, out):
    """Rows ``first + lo`` to ``first + hi``, less ``offset``, into ``out[lo:hi]``."""
    for i in range(lo, hi):
        container, start, _ = place(buckets, pos, first + i)
        unpack_row(data, start, container, signed, out.shape[1], out, i)
        if offset:
            for k in range(out.shape[1]):
                out[i, k] -= out.dtype.type(offset)


@parallel_kernel
def _unpack_parallel(bounds, first, data, signed, offset, pos, buckets, out):
    for part in numba.prange(bounds.size - 1):
        _unpack(bounds[part], bounds[part + 1], first, data, signed, offset, pos, buckets, out)


def _unpack_rows(
    rows: int, first: int, data: Array, signed: bool, offset: int, pos: Array, buckets: Array, out: Array
) -> None:
    parts = parts_for(rows * out.shape[1])
    if parts > 1:
        with parallel_lock:
            _unpack_parallel(even_bounds(rows, parts), first, data, signed, offset, pos, buckets, out)
    else:
        _unpack(0, rows, first, data, signed, offset, pos, buckets, out)


@cache
def _integer_product_is_exact() -> bool:
    """Whether ``torch._int_mm`` adds up exactly here. Without VNNI instructions oneDNN saturates pairs of products at
    16 bits."""
    a, b = torch.full((32, 64), -128, dtype=torch.int8), torch.full((64, 32), 127, dtype=torch.int8)
    try:
        low, high = torch._int_mm(a, b), torch._int_mm(b.t(), b)
    except RuntimeError:
        return False
    return bool((low == -128 * 127 * 64).all()) and bool((high == 127 * 127 * 64).all())


def _product(x: Tensor, w: Tensor, out: Tensor) -> None:
    """``out = x @ w.t()`` for int8 codes, int32 sums."""
    if x.size(1) == 1:  # torch._int_mm misreads a factor whose strides are both 1
        torch.mul(x.to(torch.int32), w.t().to(torch.int32), out=out)
    elif _integer_product_is_exact():
        torch._int_mm(x, w.t(), out=out)
    elif x.size(1) << 14 <= 1 << 24:  # every partial sum of products up to 2^14 is exact in float32
        out.copy_(x.float() @ w.float().t())
    else:
        out.copy_(x.double() @ w.double().t())


@kernel
def _finish(
    lo, hi, first, acc, correction, row_scale, col_scale, bias, relu, step, q, packed, buckets, integers, floats, data
):
    """Epilogue of rows ``first + lo`` to ``first + hi``; ``integers``, ``floats``, ``data``: the output that is not
    empty is written."""
    m = acc.shape[1]
    values = np.empty((1, m), np.float32)
    codes, clipped = np.empty(m, np.int32), np.empty(m, np.uint8)
    nowhere = np.empty(0, np.int32)
    for r in range(lo, hi):
        i = first + r
        if integers.shape[0]:
            for j in range(m):
                integers[i, j] = acc[r, j] + correction[j]
            continue
        for j in range(m):
            values[0, j] = np.float32(np.int32(acc[r, j] + correction[j]))
        epilogue_row(row_scale, col_scale, bias, relu, i, values)
        if packed:
            codes_row(values, 0, step, q, True, codes, clipped)
            container, start, stride = place(buckets, nowhere, i)
            pack_row(codes, m, container, data, start, stride)
        else:
            for j in range(m):
                floats[i, j] = values[0, j]


@parallel_kernel
def _finish_parallel(
    bounds, first, acc, correction, row_scale, col_scale, bias, relu, step, q, packed, buckets, integers, floats, data
):
    for part in numba.prange(bounds.size - 1):
        _finish(
            bounds[part],
            bounds[part + 1],
            first,
            acc,
            correction,
            row_scale,
            col_scale,
            bias,
            relu,
            step,
            q,
            packed,
            buckets,
            integers,
            floats,
            data,
        )


@kernel
def _largest_codes(bits, q):
    for j in range(bits.size):
        q[j] = largest_code(bits[j], True)


def matmul_packed(
    x: Tensor, x_pos: Tensor | None, x_counts: Sequence[int], x_signed: bool, x_zero: int, w: Tensor, w_container: int,
    features: int, columns: int, output: str, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None,
    relu: bool, out_step: Tensor | None, out_bits: Tensor | None, out_container: int,
) -> Tensor:  # fmt: skip
    """Integer product of packed matrices, and its epilogue."""
    n = sum(x_counts)
    weights = torch.empty(columns, features, dtype=torch.int8)
    everywhere = np.empty(0, np.int32)
    w_buckets = buckets_of(uniform_counts(columns, w_container), features)
    _unpack_rows(columns, 0, array(w), True, 0, everywhere, w_buckets, weights.numpy())
    offset = 0 if x_signed else OFFSET
    correction = weights.sum(1, dtype=torch.int64) * (offset - x_zero)
    packed = output == "packed" and out_step is not None and out_bits is not None
    integers = torch.empty(n if output == "acc" else 0, columns, dtype=torch.int32)
    floats = torch.empty(0 if packed or output == "acc" else n, columns, dtype=torch.float32)
    out_counts = uniform_counts(n, out_container) if packed else uniform_counts(0, 0)
    data = empty_packed(out_counts, columns)
    q = np.empty(columns, np.float32)
    if out_bits is not None:
        _largest_codes(array(out_bits), q)
    tail = (
        correction.to(torch.int32).numpy(), optional(row_scale, torch.float32), optional(col_scale, torch.float32),
        optional(bias, torch.float32), relu, optional(out_step, torch.float32), q, packed,
        buckets_of(out_counts, columns), integers.numpy(), floats.numpy(), data.numpy(),
    )  # fmt: skip
    rows = min(n, max(64, BLOCK_BYTES // max(1, features + 4 * columns)))
    codes, acc = torch.empty(rows, features, dtype=torch.int8), torch.zeros(rows, columns, dtype=torch.int32)
    source = (array(x), x_signed, offset, optional(x_pos, torch.int32), buckets_of(x_counts, features))
    for first in range(0, n if columns else 0, max(1, rows)):
        size = min(rows, n - first)
        if features:
            _unpack_rows(size, first, *source, codes.numpy())
            _product(codes[:size], weights, acc[:size])
        parts = parts_for(size * columns)
        if parts > 1:
            with parallel_lock:
                _finish_parallel(even_bounds(size, parts), first, acc.numpy(), *tail)
        else:
            _finish(0, size, first, acc.numpy(), *tail)
    return integers if output == "acc" else data if packed else floats


@kernel
def _unpack_scaled(lo, hi, first, data, signed, zero, pos, buckets, scale, out):
    f = out.shape[1]
    codes = np.empty((1, f), np.int32)
    for i in range(lo, hi):
        container, start, _ = place(buckets, pos, first + i)
        unpack_row(data, start, container, signed, f, codes, 0)
        for k in range(f):
            out[i, k] = scale[first + i] * np.float32(codes[0, k] - zero)


def matmul_transposed(
    x: Tensor, pos: Tensor | None, counts: Sequence[int], signed: bool, zero: int, features: int, scale: Tensor,
    grad: Tensor,
) -> Tensor:  # fmt: skip
    """Weight gradient from packed rows; the products of blocks of rows are added in order."""
    n, m = grad.shape
    out = torch.zeros(features, m, dtype=torch.float32)
    rows = min(n, max(64, BLOCK_BYTES // max(1, 4 * (features + m))))
    values = torch.empty(rows, features, dtype=torch.float32)
    source = (
        array(x), signed, np.int32(zero), optional(pos, torch.int32), buckets_of(counts, features), array(scale),
    )  # fmt: skip
    for first in range(0, n, max(1, rows)):
        size = min(rows, n - first)
        _unpack_scaled(0, size, first, *source, values.numpy())
        out.addmm_(values[:size].t(), grad[first : first + size])
    return out
