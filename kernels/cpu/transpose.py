"""Numba kernels of the transposed map of codes of 8 bits (:mod:`qgnn.kernels.fixed_point`)."""

from __future__ import annotations

import numba
import numpy as np
from torch import Tensor

from .common import inlined, kernel, parallel_kernel, run_ranges
from .fixed_rows import container, rows_of
from .tight import LOW_8, LOW_16, LOW_32, load_word, store_word

BAND = 32
"""Columns that are transposed together, a multiple of 8: the bytes that a row has of them are in one line of a cache."""


@inlined
def _swapped(a, b, shift, low):
    """Two words, the upper lanes of the first exchanged for the lower ones of the second; ``low`` marks the lower lanes."""
    t = ((a >> shift) ^ b) & low
    return a ^ (t << shift), b ^ t


@inlined
def _transpose_square(data, i, k, out):
    """8 rows of 8 bytes of ``data``, from ``[i, k]`` on, as columns of ``out``."""
    s8, s16, s32 = np.uint64(8), np.uint64(16), np.uint64(32)
    w0, w1 = load_word(data, i, k), load_word(data, i + 1, k)
    w2, w3 = load_word(data, i + 2, k), load_word(data, i + 3, k)
    w4, w5 = load_word(data, i + 4, k), load_word(data, i + 5, k)
    w6, w7 = load_word(data, i + 6, k), load_word(data, i + 7, k)
    (w0, w4), (w1, w5) = _swapped(w0, w4, s32, LOW_32), _swapped(w1, w5, s32, LOW_32)
    (w2, w6), (w3, w7) = _swapped(w2, w6, s32, LOW_32), _swapped(w3, w7, s32, LOW_32)
    (w0, w2), (w1, w3) = _swapped(w0, w2, s16, LOW_16), _swapped(w1, w3, s16, LOW_16)
    (w4, w6), (w5, w7) = _swapped(w4, w6, s16, LOW_16), _swapped(w5, w7, s16, LOW_16)
    (w0, w1), (w2, w3) = _swapped(w0, w1, s8, LOW_8), _swapped(w2, w3, s8, LOW_8)
    (w4, w5), (w6, w7) = _swapped(w4, w5, s8, LOW_8), _swapped(w6, w7, s8, LOW_8)
    store_word(out, k, i, w0)
    store_word(out, k + 1, i, w1)
    store_word(out, k + 2, i, w2)
    store_word(out, k + 3, i, w3)
    store_word(out, k + 4, i, w4)
    store_word(out, k + 5, i, w5)
    store_word(out, k + 6, i, w6)
    store_word(out, k + 7, i, w7)


@kernel
def _transpose(lo, hi, data, out):
    """Columns of ``data`` (uint8), in bands ``lo`` to ``hi``, as rows of ``out``, with zeros behind the last byte."""
    n = data.shape[0]
    for band in range(lo, hi):
        first, last = band * BAND, min((band + 1) * BAND, out.shape[0])
        squares = (last - first) // 8
        for i in range(0, n // 8 * 8, 8):
            for j in range(squares):
                _transpose_square(data, i, first + 8 * j, out)
            for k in range(first + 8 * squares, last):
                for r in range(i, i + 8):
                    out[k, r] = data[r, k]
        for k in range(first, last):
            for r in range(n // 8 * 8, n):
                out[k, r] = data[r, k]
            for r in range(n, out.shape[1]):
                out[k, r] = 0


@parallel_kernel
def _transpose_parallel(bounds, data, out):
    for part in numba.prange(bounds.size - 1):
        _transpose(bounds[part], bounds[part + 1], data, out)


def transpose_codes(data: Tensor, rows: int, features: int) -> Tensor:
    """Squares of 8 bytes, each in eight registers."""
    out, turned = container(features, rows)
    arguments = rows_of(data, rows, features), turned
    run_ranges(_transpose, _transpose_parallel, -(-features // BAND), rows * features, *arguments)
    return out
