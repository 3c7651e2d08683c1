"""Numba kernel of :mod:`qgnn.kernels.binary`: one pass over x.

Floats are compared as the integers of their bits: those of positive floats are ordered alike, and integers have a vectorised maximum.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from ..packing import row_bytes, uniform_counts
from .common import array, empty_packed, even_bounds, kernel, parallel_kernel, parallel_lock, parts_for
from .epilogue import load_block
from .gather import WORD, _as_words, _blocks, _pointer, _splat

ONE, INFINITY = (int(np.float32(v).view(np.int32)) for v in (1, np.inf))
MAGNITUDE = 0x7FFFFFFF


@intrinsic
def _pack_equal(typingctx, values, top, data, start, stride):
    """One bit for each of ``values`` (int32, the bits of floats) that is ``top`` and not 0, into ``stride`` bytes from ``data[start]`` on, and
    whether all others are 0. ``values`` reaches as far as the bytes do."""
    signature = types.boolean(values, top, data, start, stride)

    def codegen(context, builder, signature, args):
        kinds = signature.args
        top = args[1]
        values, _, data, start, stride = _as_words(context, builder, kinds, args)
        others = cgutils.alloca_once_value(builder, WORD(0))

        def block(width, column):
            many = ir.IntType(8 * width)
            v = load_block(context, builder, kinds[0], values, 8 * width, builder.mul(column, WORD(8)))
            magnitude = builder.and_(v, ir.Constant(v.type, [MAGNITUDE] * v.type.count))
            given = builder.icmp_signed("!=", magnitude, ir.Constant(v.type, [0] * v.type.count))
            equal = builder.icmp_signed("==", v, _splat(builder, top, v.type.count))
            given, equal = builder.bitcast(given, many), builder.bitcast(equal, many)
            target = builder.bitcast(
                _pointer(context, builder, kinds[2], data, builder.add(start, column)), many.as_pointer()
            )
            builder.store(builder.and_(given, equal), target, align=1)
            other = builder.and_(given, builder.not_(equal))
            other = builder.zext(other, WORD) if width < 8 else other
            builder.store(builder.or_(builder.load(others), other), others)

        _blocks(builder, stride, 8, block)
        return builder.icmp_signed("==", builder.load(others), WORD(0))

    return signature, codegen


@kernel
def _quantize(lo, hi, x, stride, data, step, valid):
    f = x.shape[1]
    values = np.zeros(8 * stride, np.int32)
    for i in range(lo, hi):
        top = np.int32(0)
        for k in range(f):
            values[k] = x[i, k]
            top = max(top, x[i, k])
        whole = _pack_equal(values, top, data, i * stride, stride)
        step[i] = top if top else ONE
        valid[i] = whole and top < INFINITY


@parallel_kernel
def _quantize_parallel(bounds, x, stride, data, step, valid):
    for part in numba.prange(bounds.size - 1):
        _quantize(bounds[part], bounds[part + 1], x, stride, data, step, valid)


def quantize_binary(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, the step of every row, and whether they are exact."""
    n, f = x.shape
    data = empty_packed(uniform_counts(n, 1), f)
    step, valid = torch.empty(n, dtype=torch.float32), torch.empty(n, dtype=torch.bool)
    arguments = (
        array(x).view(np.int32), row_bytes(1, f), data.numpy(), step.numpy().view(np.int32), valid.numpy()
    )  # fmt: skip
    parts = parts_for(x.numel())
    if parts > 1:
        with parallel_lock:
            _quantize_parallel(even_bounds(n, parts), *arguments)
    else:
        _quantize(0, n, *arguments)
    return data, step, valid
