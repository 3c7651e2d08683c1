"""Numba kernels of a tensor's codes in its own range (:mod:`qgnn.kernels.fixed_point`): two passes, of which the second has most of it in a cache."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from ..packing import code_range, row_bytes, uniform_counts
from ..ranges import SMALLEST
from .common import (
    array,
    as_computed,
    empty_packed,
    even_bounds,
    inlined,
    kernel,
    parallel_kernel,
    parallel_lock,
    parts_for,
)
from .fixed_rows import NARROW, codes_row, joined, parameter


@inlined
def _scaled_row(values, factor, i, row):
    """``row[0]`` = ``factor[i] * values``, no factor is 1, and zeros behind them."""
    for k in range(values.size):
        row[0, k] = values[k]
    for k in range(values.size, row.shape[1]):
        row[0, k] = 0
    if factor.size:
        f = parameter(factor, i)
        for k in range(row.shape[1]):
            row[0, k] *= f


@kernel
def _top(lo, hi, x, width, factor, tops, part):
    """``tops[part]`` = the bits of the largest magnitude in the rows ``lo`` to ``hi`` of ``width`` values. As integers, the bits of floats without a
    sign are in order, and NaN's above infinity's."""
    row = np.empty((1, width), x.dtype)
    words = row.view(tops.dtype)
    top = tops.dtype.type(0)
    for i in range(lo, hi):
        _scaled_row(x[i * width : (i + 1) * width], factor, i, row)
        for k in range(width):
            row[0, k] = abs(row[0, k])
        for k in range(width):
            top = words[0, k] if words[0, k] > top else top
    tops[part] = top


@kernel
def _own_bytes(lo, hi, x, width, factor, tops, smallest, lowest, highest, seed, scale, out, stride):
    """The codes of rows of ``width`` values in the range of the largest of ``tops``, in rows of ``stride`` bytes. Rows of zeros, which gradients of a
    few labelled nodes mostly are, have the codes 0 whatever they draw."""
    top = tops.view(x.dtype)[np.argmax(tops)]
    c = (smallest if top < smallest else top) / highest
    scale[0] = c
    row, codes, u = np.empty((1, width), x.dtype), np.empty(width, x.dtype), np.empty(width, np.float32)
    words, none = row.view(tops.dtype), tops.dtype.type(0)
    for i in range(lo, hi):
        _scaled_row(x[i * width : (i + 1) * width], factor, i, row)
        result = out[i * stride : (i + 1) * stride]
        some = none
        for k in range(width):
            some = words[0, k] if words[0, k] > some else some
        if some or c != c:
            codes_row(row, 0, c, x.dtype.type(0), lowest, highest, seed, i * width, u, codes)
            for k in range(min(width, result.size)):
                result[k] = np.uint8(np.int32(codes[k]))
            for k in range(width, result.size):
                result[k] = 0
        else:
            result[:] = 0


@parallel_kernel
def _own_parallel(bounds, x, width, factor, tops, smallest, lowest, highest, seed, scale, out, stride):
    for part in numba.prange(bounds.size - 1):
        _top(bounds[part], bounds[part + 1], x, width, factor, tops, part)
    for part in numba.prange(bounds.size - 1):
        own = scale[part : part + 1]
        _own_bytes(
            bounds[part], bounds[part + 1], x, width, factor, tops, smallest, lowest, highest, seed, own, out, stride
        )


def own_range_codes(x: Tensor, factor: Tensor | None, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """Codes in rows of bytes, and the scale."""
    (n, f), wide = x.shape, as_computed(x)
    width, stride = f, row_bytes(8, f)
    if 0 < f < NARROW:
        wide, factor = wide if factor is None else wide * factor.to(wide.dtype).view(-1, 1), None
        width = stride = joined(f)
    values = array(wide).reshape(-1)
    data = empty_packed(uniform_counts(n, 8), f)
    bytes_ = data.numpy()[: n * row_bytes(8, f)]
    factors = values[:0] if factor is None else array(factor.to(wide.dtype)).reshape(-1)
    lowest, highest = (values.dtype.type(code) for code in code_range(bits, True))
    rows, parts = -(-values.size // max(width, 1)), parts_for(values.size)
    # Every range of rows writes the scale, which is the same, to a place of its own.
    tops, scale = np.zeros(parts, np.uint64 if values.itemsize == 8 else np.uint32), np.empty(parts, values.dtype)
    tail = tops, values.dtype.type(SMALLEST), lowest, highest, seed
    if parts > 1:
        with parallel_lock:
            _own_parallel(even_bounds(rows, parts), values, width, factors, *tail, scale, bytes_, stride)
    else:
        _top(0, rows, values, width, factors, tops, 0)
        _own_bytes(0, rows, values, width, factors, *tail, scale, bytes_, stride)
    return data, torch.from_numpy(scale[:1])
