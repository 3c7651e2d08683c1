"""What the loops of :mod:`.attention` do with one row: exponentials, sums over edges by head, dot products."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from .common import inlined
from .gather import WORD, _as_words, _edge_loop, _pointer, _splat


@intrinsic
def _power_of_two(typingctx, n):
    """``2^n`` in float32 for int32 ``n`` in -126 .. 127."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(32)
        return builder.bitcast(builder.shl(builder.add(args[0], word(127)), word(23)), ir.FloatType())

    return types.float32(types.int32), codegen


def _exp(x):
    """``exp(x)`` for ``x <= 0``; NaN stays. In float32 without a call, so that LLVM vectorises it: 0 below -87, where it would be subnormal, else
    within 2 units in the last place (the polynomial of Cephes' expf, after ``x = n ln 2 + r`` with ln 2 in two parts)."""
    raise RuntimeError("this function is compiled by Numba, not called")


@overload(_exp)
def _exp_overload(x):
    if x == types.float64:
        return lambda x: np.exp(x)

    def polynomial(x):
        f = np.float32
        v = x if x >= f(-87) else f(-87)  # NaN becomes -87: its conversion to an integer is undefined
        n = np.floor(v * f(1.44269504) + f(0.5))
        r = v - n * f(0.693359375)
        r = r - n * f(-2.12194440e-4)
        p = f(1.9875691500e-4)
        p = p * r + f(1.3981999507e-3)
        p = p * r + f(8.3334519073e-3)
        p = p * r + f(4.1665795894e-2)
        p = p * r + f(1.6666665459e-1)
        p = p * r + f(5.0000001201e-1)
        value = (p * (r * r) + r + f(1)) * _power_of_two(np.int32(n))
        value = value if x >= f(-87) else f(0)
        return value if x == x else x

    return polynomial


@inlined
def exponentials(values, first, last):
    """In place. Over a slice: indices that count from 0 need no look at their sign, which would stand against vectors."""
    block = values[first:last]
    for k in range(block.size):
        block[k] = _exp(block[k])


def _head_sum(width: int) -> Any:
    @intrinsic
    def head_sum(typingctx, indices, first, last, table, column, weight, edges, head, out, row):
        """``out[row, column:][:width] = sum of weight[place, head] * table[indices[e], column:][:width]``, where place is ``edges[e]``, or e itself
        if ``edges`` is None."""
        signature = types.void(indices, first, last, table, column, weight, edges, head, out, row)

        def codegen(context, builder, signature, args):
            kinds = signature.args
            args = _as_words(context, builder, kinds, args)
            number = context.get_data_type(kinds[8].dtype)
            vector = ir.VectorType(number, width)

            def body(edge, source, loaded, sums):
                place = edge
                if not isinstance(kinds[6], types.NoneType):
                    place = builder.sext(builder.load(_pointer(context, builder, kinds[6], args[6], edge)), WORD)
                factor = builder.load(_pointer(context, builder, kinds[5], args[5], place, args[7]))
                loaded = builder.fmul(loaded, _splat(builder, factor, width), flags=("contract",))
                return [builder.fadd(sums[0], loaded, flags=("contract",))]

            start = [ir.Constant(vector, [ir.Constant(number, 0.0)] * width)]
            (result,) = _edge_loop(context, builder, width, kinds, args[:5], start, body)
            address = _pointer(context, builder, kinds[8], args[8], args[9], args[4])
            builder.store(result, builder.bitcast(address, vector.as_pointer()), align=1)
            return context.get_dummy_value()

        return signature, codegen

    return head_sum


def _dot(width: int) -> Any:
    @intrinsic
    def dot(typingctx, a, i, b, j, column):
        """``sum of a[i, column:][:width] * b[j, column:][:width]``."""
        signature = a.dtype(a, i, b, j, column)

        def codegen(context, builder, signature, args):
            kinds = signature.args
            args = _as_words(context, builder, kinds, args)
            number = context.get_data_type(kinds[0].dtype)
            vector = ir.VectorType(number, width)
            blocks = []
            for table in (0, 2):
                address = _pointer(context, builder, kinds[table], args[table], args[table + 1], args[4])
                blocks.append(builder.load(builder.bitcast(address, vector.as_pointer()), align=1))
            product = builder.fmul(*blocks, flags=("contract",))
            if width == 1:
                return builder.extract_element(product, ir.IntType(32)(0))
            name = f"llvm.vector.reduce.fadd.v{width}f{32 if number == ir.FloatType() else 64}"
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(number, [number, vector]), name)
            # Free to be reordered once, at compile time, hence the same in every run.
            return builder.call(function, [ir.Constant(number, -0.0), product], fastmath=("reassoc",))

        return signature, codegen

    return dot


_sum_64, _sum_32, _sum_16, _sum_8, _sum_4, _sum_2, _sum_1 = (_head_sum(width) for width in (64, 32, 16, 8, 4, 2, 1))
_dot_64, _dot_16, _dot_8, _dot_4, _dot_1 = (_dot(width) for width in (64, 16, 8, 4, 1))


@inlined
def sum_heads(first, last, indices, table, weight, edges, channels, out, i):
    """``out[i]`` = sum over the edges ``first`` to ``last``, in their order, of ``weight[place, head] * table[indices[e]]``; tables
    ``[., H * C]``."""
    for head in range(weight.shape[1]):
        k = head * channels
        end = k + channels
        while k + 64 <= end:
            _sum_64(indices, first, last, table, k, weight, edges, head, out, i)
            k += 64
        if channels & 32:
            _sum_32(indices, first, last, table, k, weight, edges, head, out, i)
            k += 32
        if channels & 16:
            _sum_16(indices, first, last, table, k, weight, edges, head, out, i)
            k += 16
        if channels & 8:
            _sum_8(indices, first, last, table, k, weight, edges, head, out, i)
            k += 8
        if channels & 4:
            _sum_4(indices, first, last, table, k, weight, edges, head, out, i)
            k += 4
        if channels & 2:
            _sum_2(indices, first, last, table, k, weight, edges, head, out, i)
            k += 2
        if channels & 1:
            _sum_1(indices, first, last, table, k, weight, edges, head, out, i)


@inlined
def dot_head(a, i, b, j, head, channels):
    """Dot product of the channels of one head of ``a[i]`` and ``b[j]``, ``[., H * C]``."""
    k = head * channels
    end = k + channels
    acc = a.dtype.type(0)
    while k + 64 <= end:
        acc += _dot_64(a, i, b, j, k)
        k += 64
    while k + 16 <= end:
        acc += _dot_16(a, i, b, j, k)
        k += 16
    if k + 8 <= end:
        acc += _dot_8(a, i, b, j, k)
        k += 8
    if k + 4 <= end:
        acc += _dot_4(a, i, b, j, k)
        k += 4
    while k < end:
        acc += _dot_1(a, i, b, j, k)
        k += 1
    return acc
