"""Numba kernels of :mod:`qgnn.kernels.quantize`: one pass over x that leaves codes or values, clip bits and gradient sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from .common import (
    array,
    as_computed,
    buckets_of,
    codes_row,
    empty_packed,
    even_bounds,
    kernel,
    largest_code,
    optional,
    pack_flags,
    pack_row,
    parallel_kernel,
    parallel_lock,
    parts_for,
    place,
    total,
    unpack_row,
)

BLOCK = 512
"""Rows whose column sums are added up before the blocks' sums are, in order: fixed, so that the result does not depend on the threads."""

LN2 = math.log(2)


@kernel
def _parameters(step, bits, first, signed, s, q, slope):
    """Per column: step, largest code and ``|dx_q/dbits|`` where clipped, from ``step[first + k]``, or from ``step[first]`` for every column."""
    same = step.size - first < s.size or s.size == 0
    if same:
        largest = largest_code(bits[first], signed)
        power = slope.dtype.type(2.0 ** (np.int64(bits[first]) - (1 if signed else 0)) * LN2)
        for k in range(s.size):
            s[k] = step[first]
            q[k] = largest
            slope[k] = power * step[first]
    else:
        for k in range(s.size):
            s[k] = step[k]
            q[k] = largest_code(bits[k], signed)
            slope[k] = slope.dtype.type(2.0 ** (np.int64(bits[k]) - (1 if signed else 0)) * LN2) * step[k]
