"""What the loops of graph attention do with one row: scores, exponentials, sums over edges by head, dot products; and how all rows are run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, overload

from .common import Array, inlined, parallel_lock, parts_for, prefetch
from .gather import AHEAD, WORD, _as_words, _blocks, _edge_loop, _interleave, _pointer, _splat
from .plan import split_rows

TILE = 64
"""Rows of a tile: at 8 edges a row and 8 heads their scores fill 16 KB, a part of the L1 cache."""


def run(serial: Callable[..., Any], parallel: Callable[..., Any], work: int, indptr: Array, *arguments: Any) -> None:
    """Runs a kernel over all rows, cut into ranges of equal work. ``work`` is a count of elements."""
    parts = parts_for(work)
    if parts > 1:
        bounds = split_rows(indptr, parts, indptr[-1] + 1)
        with parallel_lock:
            parallel(bounds, indptr, *arguments)
    else:
        serial(0, indptr.size - 1, indptr, *arguments)


@inlined
def score(e, h, i, j, src, dst, edge_score):
    raw = src[j, h] + dst[i, h]
    return raw + edge_score[e, h] if edge_score.size else raw


@inlined
def row_scores(first, last, i, indices, src, dst, edge_score, slope, scratch):
    zero = scratch.dtype.type(0)
    for e in range(first, last):
        j = indices[e]
        if e + AHEAD < indices.size:
            prefetch(src, indices[e + AHEAD], 0)
        for h in range(scratch.shape[1]):
            raw = score(e, h, i, j, src, dst, edge_score)
            scratch[e, h] = raw if raw > zero else slope * raw


@inlined
def row_top(first, last, i, lowest, scratch, top):
    """``top[i]``: the largest scores of the row, NaN left out."""
    for h in range(scratch.shape[1]):
        top[i, h] = lowest
    for e in range(first, last):
        for h in range(scratch.shape[1]):
            top[i, h] = scratch[e, h] if scratch[e, h] > top[i, h] else top[i, h]


@inlined
def row_shift(first, last, i, scratch, top):
    for e in range(first, last):
        for h in range(scratch.shape[1]):
            scratch[e, h] -= top[i, h]


@inlined
def row_total(first, last, i, scratch, total):
    one = scratch.dtype.type(1)
    for h in range(scratch.shape[1]):
        total[i, h] = 0
    for e in range(first, last):
        for h in range(scratch.shape[1]):
            total[i, h] += scratch[e, h]
    for h in range(scratch.shape[1]):
        total[i, h] = one if total[i, h] == 0 else total[i, h]


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


def _head_codes(container: int) -> Any:
    lanes, word = 8 // container, ir.IntType(32)

    @intrinsic
    def head_codes(typingctx, indices, first, last, table, begin, size, weight, head, out):
        """``out[0]`` = sums over the edges, in their order, of ``weight[e, head]`` times the signed codes in the bytes ``begin`` to
        ``begin + size`` of ``table[indices[e]]``."""
        signature = types.void(indices, first, last, table, begin, size, weight, head, out)

        def codegen(context, builder, signature, args):
            kinds = signature.args
            args = _as_words(context, builder, kinds, args)

            def block(width, column):
                vector, words = ir.VectorType(ir.FloatType(), width), ir.VectorType(word, width)

                def body(edge, source, loaded, sums):
                    factor = builder.load(_pointer(context, builder, kinds[6], args[6], edge, args[7]))
                    factor, loaded, new = _splat(builder, factor, width), builder.zext(loaded, words), []
                    for lane, total in enumerate(sums):
                        code = builder.shl(loaded, ir.Constant(words, [32 - container * (lane + 1)] * width))
                        code = builder.ashr(code, ir.Constant(words, [32 - container] * width))
                        term = builder.fmul(builder.sitofp(code, vector), factor, flags=("contract",))
                        new.append(builder.fadd(total, term, flags=("contract",)))
                    return new

                start = [ir.Constant(vector, [ir.Constant(ir.FloatType(), 0.0)] * width)] * lanes
                operands = [*args[:4], builder.add(args[4], column)]
                result = _interleave(builder, _edge_loop(context, builder, width, kinds, operands, start, body))
                address = _pointer(context, builder, kinds[8], args[8], WORD(0), builder.mul(column, WORD(lanes)))
                builder.store(result, builder.bitcast(address, result.type.as_pointer()), align=1)

            _blocks(builder, args[5], 64 // lanes, block)
            return context.get_dummy_value()

        return signature, codegen

    return head_codes


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
_codes_8, _codes_4, _codes_2, _codes_1 = (_head_codes(container) for container in (8, 4, 2, 1))
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
def sum_head_codes(first, last, indices, table, container, weight, head, channels, part, out):
    """``out[0]``, the channels of ``head``: sums over the edges ``first`` to ``last`` of ``weight[e, head]`` times the signed codes of
    ``indices[e]``. ``part`` is scratch for whole bytes of codes, whose first and last may belong to other heads."""
    begin = head * channels * container // 8
    size = ((head + 1) * channels * container + 7) // 8 - begin
    if container == 8:
        _codes_8(indices, first, last, table, begin, size, weight, head, part)
    elif container == 4:
        _codes_4(indices, first, last, table, begin, size, weight, head, part)
    elif container == 2:
        _codes_2(indices, first, last, table, begin, size, weight, head, part)
    elif container == 1:
        _codes_1(indices, first, last, table, begin, size, weight, head, part)
    skipped = head * channels - begin * 8 // max(container, 1)
    for k in range(channels):
        out[0, head * channels + k] = part[0, skipped + k] if container else np.float32(0)


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
