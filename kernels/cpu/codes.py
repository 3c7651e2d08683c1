"""Numba kernel of :mod:`qgnn.kernels.quantize` where only codes are wanted: one pass over a float32 x, in vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj
from torch import Tensor

from .common import (
    array,
    buckets_of,
    empty_packed,
    even_bounds,
    kernel,
    largest_code,
    optional,
    parallel_kernel,
    parallel_lock,
    parts_for,
    place,
)
from .epilogue import SINGLE, load_block, pack_row
from .gather import WORD, _as_words, _blocks, _pointer, _splat
from .memory import empty


@intrinsic
def _clip_row(typingctx, values, step, largest, signed, clip, i):
    """``clip[i]`` = the clip bits of ``values[0]``; all three arrays reach as far as the bits do."""
    signature = types.void(values, step, largest, signed, clip, i)

    def codegen(context, builder, signature, args):
        kinds = signature.args
        unsigned = builder.not_(args[3])
        args = _as_words(context, builder, kinds, args)
        size = builder.extract_value(arrayobj.make_array(kinds[4])(context, builder, args[4]).shape, 1)

        def block(width, column):
            many = 8 * width
            floats, first = ir.VectorType(SINGLE, many), builder.mul(column, WORD(8))
            v = load_block(context, builder, kinds[0], args[0], many, WORD(0), first)
            s, q = (load_block(context, builder, kinds[a], args[a], many, first) for a in (1, 2))
            name = f"llvm.fabs.v{many}f32"
            fabs = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats]), name)
            beyond = builder.fcmp_ordered(">=", builder.call(fabs, [v]), builder.fmul(s, q))
            below = builder.fcmp_ordered("<", v, ir.Constant(floats, [ir.Constant(SINGLE, 0.0)] * many))
            flags = builder.or_(beyond, builder.and_(below, _splat(builder, unsigned, many)))
            flags = builder.bitcast(flags, ir.IntType(many))
            target = _pointer(context, builder, kinds[4], args[4], args[5], column)
            builder.store(flags, builder.bitcast(target, flags.type.as_pointer()), align=1)

        _blocks(builder, size, 8, block)
        return context.get_dummy_value()

    return signature, codegen


@kernel
def _quantize(lo, hi, x, step, bits, row, signed, pos, buckets, data, clip):
    f = x.shape[1]
    # As wide as the padded bytes of 1-bit codes, the most that a row of f columns is packed into. A NaN there has code 0, and is not clipped.
    values = np.full((1, f + 128), np.nan, np.float32)
    s, q = np.ones(f + 128, np.float32), np.zeros(f + 128, np.float32)
    if not row:
        for k in range(f):
            s[k] = step[k]
            q[k] = largest_code(bits[k], signed)
    for i in range(lo, hi):
        for k in range(f):
            values[0, k] = x[i, k]
        if row:
            largest = np.float32(largest_code(bits[i], signed))
            for k in range(f):
                s[k] = step[i]
                q[k] = largest
        container, start, stride = place(buckets, pos, i)
        pack_row(container, values, s, q, signed, data, start, stride)
        _clip_row(values, s, q, signed, clip, i)


@parallel_kernel
def _quantize_parallel(bounds, x, step, bits, row, signed, pos, buckets, data, clip):
    for part in numba.prange(bounds.size - 1):
        _quantize(bounds[part], bounds[part + 1], x, step, bits, row, signed, pos, buckets, data, clip)


def quantize_codes(
    x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool, pos: Tensor | None, counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Packed codes and clip bits of a float32 ``x``."""
    n, f = x.shape
    data, clip = empty_packed(counts, f), empty((n, (f + 7) // 8), torch.uint8)
    arguments = (
        array(x), array(step.to(x.dtype)), array(bits), row, signed, optional(pos, torch.int32), buckets_of(counts, f),
        data.numpy(), clip.numpy(),
    )  # fmt: skip
    parts = parts_for(x.numel())
    if parts > 1:
        with parallel_lock:
            _quantize_parallel(even_bounds(n, parts), *arguments)
    else:
        _quantize(0, n, *arguments)
    return data, clip
