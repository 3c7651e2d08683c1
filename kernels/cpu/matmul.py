"""CPU backend of :mod:`qgnn.kernels.matmul`: a few rows at a time are unpacked, multiplied and finished, all in the first cache."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from .common import (
    NO_BUCKETS,
    PAST_CACHE_BYTES,
    ROW,
    array,
    buckets_of,
    even_bounds,
    kernel,
    largest_code,
    optional,
    output_of,
    parallel_kernel,
    parallel_lock,
    parts_for,
    place,
    unpack_row,
)
from .epilogue import epilogue_row, pack_row
from .gather import drain, stream_row
from .product import TILE, laid_weights, multiply_rows, unpack_positive

ACC, FLOAT, ROWS, COLUMNS = range(4)
OUTPUTS = {"acc": ACC, "float": FLOAT, "rows": ROWS, "columns": COLUMNS}

BLOCK_BYTES = 1 << 20
"""Bytes of the rows that :func:`matmul_transposed` unpacks at once: about what a core's second cache holds."""


PRODUCTS = 64
"""Products that count as one element in the choice between one thread and many: so many are one instruction."""


@kernel
def _multiply(
    lo, hi, x, x_pos, x_buckets, x_signed, x_zero, weights, sums, m, mode, row_scale, col_scale, bias, addend, relu,
    post_scale, post_shift, out_step, out_bits, out_pos, out_buckets, out_signed, past_cache, ints, floats, data,
):  # fmt: skip
    # A row of the tile holds the codes of the padded bytes of any container.
    tile = np.zeros((TILE, 4 * weights.shape[0] + 128), np.uint8)
    offsets, acc = np.zeros(TILE, np.int32), np.empty((TILE, weights.shape[1]), np.int32)
    own, no_scale = np.empty((1, 0), np.int32), np.empty(0, np.float32)
    # As wide as the padded bytes of 1-bit codes, the most that a row of m columns is packed into.
    values, s, q = np.zeros((1, m + 128), np.float32), np.ones(m + 128, np.float32), np.zeros(m + 128, np.float32)
    if mode == COLUMNS:
        for j in range(m):
            s[j] = out_step[j]
            q[j] = largest_code(out_bits[j], out_signed)
    for first in range(lo, hi, TILE):
        count = min(TILE, hi - first)
        for r in range(count):
            container, start, stride = place(x_buckets, x_pos, first + r)
            offsets[r] = x_zero + unpack_positive(container, x, start, stride, x_signed, tile, r)
        multiply_rows(tile, weights, sums, offsets, acc)
        for r in range(count):
            i = first + r
            if mode == ACC:
                stream_row(acc, r, ints, i, past_cache)
            elif mode == FLOAT:
                epilogue_row(
                    acc, r, m, row_scale, no_scale, own, col_scale, bias, addend, relu, post_scale, post_shift, i,
                    floats, i, past_cache,
                )  # fmt: skip
            else:
                epilogue_row(
                    acc, r, m, row_scale, no_scale, own, col_scale, bias, addend, relu, post_scale, post_shift, i,
                    values, 0, False,
                )  # fmt: skip
                if mode == ROWS:
                    largest = np.float32(largest_code(out_bits[i], out_signed))
                    for j in range(m):
                        s[j] = out_step[i]
                        q[j] = largest
                container, start, stride = place(out_buckets, out_pos, i)
                pack_row(container, values, s, q, out_signed, data, start, stride)
    drain()


@parallel_kernel
def _multiply_parallel(
    bounds, x, x_pos, x_buckets, x_signed, x_zero, weights, sums, m, mode, row_scale, col_scale, bias, addend, relu,
    post_scale, post_shift, out_step, out_bits, out_pos, out_buckets, out_signed, past_cache, ints, floats, data,
):  # fmt: skip
    for part in numba.prange(bounds.size - 1):
        _multiply(
            bounds[part], bounds[part + 1], x, x_pos, x_buckets, x_signed, x_zero, weights, sums, m, mode, row_scale,
            col_scale, bias, addend, relu, post_scale, post_shift, out_step, out_bits, out_pos, out_buckets,
            out_signed, past_cache, ints, floats, data,
        )  # fmt: skip


def matmul_packed(
    x: Tensor, x_pos: Tensor | None, x_counts: Sequence[int], x_signed: bool, x_zero: int, w: Tensor, w_container: int,
    features: int, columns: int, output: str, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None,
    addend: Tensor | None, relu: bool, post_scale: Tensor | None, post_shift: Tensor | None, out_step: Tensor | None,
    out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    """Integer product of packed matrices, and its epilogue."""
    n = sum(x_counts)
    out, views = output_of(output, n, columns, out_counts)
    arguments = (
        array(x), optional(x_pos, torch.int32), buckets_of(x_counts, features), x_signed, x_zero,
        *laid_weights(w, w_container, columns, features), columns, OUTPUTS[output], optional(row_scale, torch.float32),
        optional(col_scale, torch.float32), optional(bias, torch.float32), optional(addend, torch.float32, 2), relu,
        optional(post_scale, torch.float32), optional(post_shift, torch.float32), optional(out_step, torch.float32),
        optional(out_bits, torch.uint8), optional(out_pos, torch.int32),
        buckets_of(out_counts, columns) if output in ("rows", "columns") else NO_BUCKETS, out_signed,
        out.numel() * out.itemsize >= PAST_CACHE_BYTES, *views,
    )  # fmt: skip
    parts = parts_for(n * (features * columns // PRODUCTS + ROW))
    if parts > 1:
        with parallel_lock:
            _multiply_parallel(even_bounds(n, parts), *arguments)
    else:
        _multiply(0, n, *arguments)
    return out


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
