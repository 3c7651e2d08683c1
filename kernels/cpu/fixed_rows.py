"""What the Numba kernels of :mod:`qgnn.kernels.fixed_point` share: codes of a row, and buffers of rows of bytes."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..packing import row_bytes, uniform_counts
from .common import Array, array, empty_packed, inlined
from .random import rounded_by, uniform_row

NARROW = 16
"""Features from which a row of bytes is padded. Narrower rows of a map lie one behind the other, and are as good as one: what is done row by row is
done faster with rows of :func:`joined` features."""


def joined(features: int) -> int:
    """Features of about a thousand that are whole narrow rows."""
    return 1024 // features * features


@inlined
def parameter(values, i):
    return values[i if values.size > 1 else 0]


@inlined
def codes_row(x, i, c, d, lowest, highest, seed, first, u, codes):
    """Codes (whole numbers in the dtype of ``x``) of ``x[i]``, whose first element draws the number ``first``; a negative ``seed`` rounds half to
    even. A NaN has the lowest one."""
    f = x.shape[1]
    if seed < 0:
        for k in range(f):
            code = np.rint(x[i, k] / c - d)
            code = code if code > lowest else lowest
            codes[k] = highest if code > highest else code
    else:
        uniform_row(np.uint64(seed), first, u)
        for k in range(f):
            code = rounded_by(x[i, k] / c - d, u[k])
            code = code if code > lowest else lowest
            codes[k] = highest if code > highest else code


def container(rows: int, features: int) -> tuple[Tensor, Array]:
    """A buffer of codes of 8 bits, and its rows, uint8 ``[rows, bytes]``."""
    data = empty_packed(uniform_counts(rows, 8), features)
    return data, rows_of(data, rows, features)


def rows_of(data: Tensor, rows: int, features: int) -> Array:
    stride = row_bytes(8, features)
    return array(data)[: rows * stride].reshape(rows, stride)
