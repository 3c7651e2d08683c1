"""Sums over the edges of graphs that fit the caches, as LLVM IR: all rows of a block of columns in one loop.

On such a graph a row of four edges is summed in a dozen cycles, and what surrounds the sums decides. So the kernels take
addresses, 0 for an operand that is not there, instead of arrays, whose descriptors cost more than a row; the sums stay in
registers until they are finished and written; no memory is asked for ahead. One thread of Zen 4, Cora, 16 columns of INT8:
9.5 µs, where the loops of :mod:`.aggregate_packed`, which are made for graphs that do not fit, take 33.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from .common import kernel, parallel_kernel, parallel_lock, parts_for, ready
from .epilogue import finish, positive
from .gather import WIDEST, WORD, _accumulate, _blocks, _interleave, _splat
from .plan import Plan

BYTE, HALF, INT, SINGLE = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.FloatType()

LANES = 16
"""Columns of the narrowest block; the last columns of a row are one block under a mask."""

REACH = 257
"""Edges of the longest row: so many bytes fit a sum of 16 bits."""

SUMS = 8
"""Sums that count as one element in the choice between one thread and many: 1,350,000 take 68 µs on one thread, 41 on two."""

CACHED_BYTES = 1 << 24
"""Bytes of a table and its sums up to which both are taken to lie in a cache."""


def fits(plan: Plan, table_bytes: int, columns: int) -> bool:
    """Whether these kernels are made for a graph and a table of so many bytes and columns."""
    return plan.longest <= REACH and table_bytes + 4 * plan.n * columns <= CACHED_BYTES


class _Block:
    """Emits what a block of ``width`` columns from ``column`` on does; of the last block, only ``many`` columns are there."""

    def __init__(self, builder: Any, width: int, column: Any, many: Any | None) -> None:
        self.builder, self.width, self.column, self.many = builder, width, column, many

    def vector(self, kind: Any, lanes: int = 1) -> Any:
        return ir.VectorType(kind, self.width // lanes)

    def _place(self, base: Any, vector: Any) -> tuple[Any, Any]:
        """Address of the block in the row at ``base``, and which of its elements are there."""
        builder, lanes = self.builder, self.width // vector.count
        size = 4 if vector.element == SINGLE else 1
        place = builder.add(base, builder.mul(builder.udiv(self.column, WORD(lanes)), WORD(size)))
        pointer = builder.inttoptr(place, vector.as_pointer())
        if self.many is None:
            return pointer, None
        index = ir.Constant(ir.VectorType(WORD, vector.count), [lanes * j for j in range(vector.count)])
        return pointer, builder.icmp_unsigned("<", index, _splat(builder, self.many, vector.count))

    def load(self, base: Any, vector: Any) -> Any:
        pointer, mask = self._place(base, vector)
        if mask is None:
            return self.builder.load(pointer, align=1)
        kind = ir.FunctionType(vector, [pointer.type, INT, mask.type, vector])
        name = f"llvm.masked.load.v{vector.count}{'f32' if vector.element == SINGLE else 'i8'}.p0"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [pointer, INT(1), mask, ir.Constant(vector, None)])

    def store(self, value: Any, base: Any) -> None:
        pointer, mask = self._place(base, value.type)
        if mask is None:
            self.builder.store(value, pointer, align=1)
            return
        kind = ir.FunctionType(ir.VoidType(), [value.type, pointer.type, INT, mask.type])
        name = f"llvm.masked.store.v{value.type.count}f32.p0"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        self.builder.call(function, [value, pointer, INT(1), mask])


def _element(builder: Any, base: Any, kind: Any, index: Any) -> Any:
    return builder.load(builder.gep(builder.inttoptr(base, kind.as_pointer()), [index]))


def _row(builder: Any, base: Any, i: Any, size: Any) -> Any:
    return builder.add(base, builder.mul(i, size))


def _rows(
    builder: Any, lo: Any, hi: Any, indptr: Any, columns: Any, row: Callable[[_Block, Any, Any, Any], None]
) -> None:
    """Runs ``row(block, i, first, last)`` for the rows ``lo`` to ``hi``, block by block."""

    def block(width: int, column: Any, many: Any | None = None) -> None:
        bound = cgutils.alloca_once_value(builder, _element(builder, indptr, WORD, lo))
        with cgutils.for_range_slice(builder, lo, hi, WORD(1), WORD) as (i, _):
            first, last = builder.load(bound), _element(builder, indptr, WORD, builder.add(i, WORD(1)))
            builder.store(last, bound)
            row(_Block(builder, width, column, many), i, first, last)

    whole = builder.and_(columns, WORD(-LANES))
    _blocks(builder, whole, WIDEST, block, LANES)
    with builder.if_then(builder.icmp_signed("!=", whole, columns)):
        block(LANES, whole, builder.sub(columns, whole))


def _cases(builder: Any, condition: Any, emit: Callable[[bool], None]) -> None:
    """Code for both values of a condition, so that no row asks for it."""
    with builder.if_else(condition) as cases:
        for case, value in zip(cases, (True, False), strict=True):
            with case:
                emit(value)


@intrinsic
def _sum_values(typingctx, lo, hi, indptr, indices, table, weight, columns, mean, out):
    """``out[i]`` = sum of ``weight[e] * table[source]``, float32, over the edges of row ``i``, divided by their number for a
    ``mean``; weight may be None."""
    weighted = not isinstance(weight, types.NoneType)

    def codegen(context, builder, signature, args):
        lo, hi, indptr, indices, table, weight, columns, mean, out = args
        size = builder.mul(columns, WORD(4))

        def row(block, i, first, last, divided):
            vector = block.vector(SINGLE)

            def add(edge, sums):
                source = builder.sext(_element(builder, indices, INT, edge), WORD)
                value = block.load(_row(builder, table, source, size), vector)
                if weighted:
                    factor = _splat(builder, _element(builder, weight, SINGLE, edge), block.width)
                    value = builder.fmul(value, factor, flags=("contract",))
                return [builder.fadd(sums[0], value, flags=("contract",))]

            (result,) = _accumulate(builder, first, last, [ir.Constant(vector, [0.0] * block.width)], add)
            if divided:
                degree = builder.sub(last, first)
                many = builder.select(builder.icmp_signed(">", degree, WORD(1)), degree, WORD(1))
                factor = builder.fdiv(SINGLE(1.0), builder.sitofp(many, SINGLE))
                result = builder.fmul(result, _splat(builder, factor, block.width))
            block.store(result, _row(builder, out, i, size))

        _cases(
            builder, builder.icmp_signed("!=", mean, WORD(0)),
            lambda divided: _rows(builder, lo, hi, indptr, columns, partial(row, divided=divided)),
        )  # fmt: skip
        return context.get_dummy_value()

    words = [types.int64] * 3
    return types.void(types.int64, types.int64, *words, weight, *words), codegen


def _make_sum_codes(container: int) -> Any:
    lanes, most = 8 // container, (1 << container) - 1

    @intrinsic
    def sum_codes(
        typingctx, lo, hi, indptr, indices, table, stride, columns, signed, row_scale, self_scale, col_scale, bias,
        addend, relu, post_scale, post_shift, out,
    ):  # fmt: skip
        """``out[i]`` = the float part of the integer operations (:mod:`qgnn.kernels.matmul`) on the sums of the codes of row
        ``i``; ``table`` has packed rows of ``stride`` bytes."""

        def codegen(context, builder, signature, args):
            (
                lo, hi, indptr, indices, table, stride, columns, signed, row_scale, self_scale, col_scale, bias, addend,
                relu, post_scale, post_shift, out,
            ) = args  # fmt: skip
            size = builder.mul(columns, WORD(4))
            # Two's complement with its sign bit flipped is code + 2^(container-1): all summands are non-negative.
            half = 1 << (container - 1)
            signed = builder.trunc(signed, ir.IntType(1))
            flip = builder.select(signed, BYTE(half * (255 // most)), BYTE(0))
            shift = builder.select(signed, INT(half), INT(0))

            def row(block, i, first, last, bare):
                packed, short = block.vector(BYTE, lanes), block.vector(HALF, lanes)
                wide, vector = block.vector(INT), block.vector(SINGLE)
                flips = _splat(builder, flip, packed.count)

                def shifted(source):
                    loaded = builder.xor(block.load(_row(builder, table, source, stride), packed), flips)
                    loaded = builder.zext(loaded, short)
                    return [builder.lshr(loaded, ir.Constant(short, [c] * short.count)) for c in range(0, 8, container)]

                def add(edge, sums):
                    source = builder.sext(_element(builder, indices, INT, edge), WORD)
                    return [builder.add(total, bits) for total, bits in zip(sums, shifted(source), strict=True)]

                def value(sums, many):
                    # A code's bits are those from its place on, less those from the next code's place on.
                    above = [builder.shl(total, ir.Constant(short, [container] * short.count)) for total in sums[1:]]
                    sums = [*map(builder.sub, sums, above), sums[-1]]
                    total = builder.zext(_interleave(builder, sums), wide)
                    surplus = builder.mul(builder.trunc(many, INT), shift)
                    return builder.sitofp(builder.sub(total, _splat(builder, surplus, block.width)), vector)

                def spread(base, index):
                    return _splat(builder, _element(builder, base, SINGLE, index), block.width)

                def own():
                    return builder.fmul(spread(self_scale, WORD(0)), value(shifted(i), WORD(1)))

                sums = _accumulate(builder, first, last, [ir.Constant(short, [0] * short.count)] * lanes, add)
                steps = (
                    (row_scale, lambda v: builder.fmul(v, spread(row_scale, i))),
                    (self_scale, lambda v: builder.fadd(v, own())),
                    (col_scale, lambda v: builder.fmul(v, block.load(col_scale, vector))),
                    (bias, lambda v: builder.fadd(v, block.load(bias, vector))),
                    (addend, lambda v: builder.fadd(v, block.load(_row(builder, addend, i, size), vector))),
                    (relu, lambda v: positive(builder, v)),
                    (post_scale, lambda v: builder.fmul(v, block.load(post_scale, vector))),
                    (post_shift, lambda v: builder.fadd(v, block.load(post_shift, vector))),
                )
                given = [
                    (builder.icmp_signed("!=", operand, WORD(0)), step)
                    for operand, step in steps
                    if operand is col_scale or not bare
                ]
                result = finish(builder, value(sums, builder.sub(last, first)), given)
                block.store(result, _row(builder, out, i, size))

            # A branch for each operand and row would be a quarter of the time at 16 columns.
            others = (row_scale, self_scale, bias, addend, relu, post_scale, post_shift)
            bare = builder.icmp_signed("==", reduce(builder.or_, others), WORD(0))
            _cases(builder, bare, lambda bare: _rows(builder, lo, hi, indptr, columns, partial(row, bare=bare)))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 17), codegen

    return sum_codes


_sum_codes_8, _sum_codes_4, _sum_codes_2, _sum_codes_1 = (_make_sum_codes(container) for container in (8, 4, 2, 1))


@kernel
def _run_values(lo, hi, indptr, indices, table, weight, columns, mean, out):
    _sum_values(lo, hi, indptr, indices, table, weight, columns, mean, out)


@parallel_kernel
def _run_values_parallel(bounds, indptr, indices, table, weight, columns, mean, out):
    for part in numba.prange(bounds.size - 1):
        _run_values(bounds[part], bounds[part + 1], indptr, indices, table, weight, columns, mean, out)


@kernel
def _run_codes(
    lo, hi, indptr, indices, container, table, stride, columns, signed, row_scale, self_scale, col_scale, bias, addend,
    relu, post_scale, post_shift, out,
):  # fmt: skip
    if container == 8:
        _sum_codes_8(
            lo, hi, indptr, indices, table, stride, columns, signed, row_scale, self_scale, col_scale, bias, addend,
            relu, post_scale, post_shift, out,
        )  # fmt: skip
    elif container == 4:
        _sum_codes_4(
            lo, hi, indptr, indices, table, stride, columns, signed, row_scale, self_scale, col_scale, bias, addend,
            relu, post_scale, post_shift, out,
        )  # fmt: skip
    elif container == 2:
        _sum_codes_2(
            lo, hi, indptr, indices, table, stride, columns, signed, row_scale, self_scale, col_scale, bias, addend,
            relu, post_scale, post_shift, out,
        )  # fmt: skip
    else:
        _sum_codes_1(
            lo, hi, indptr, indices, table, stride, columns, signed, row_scale, self_scale, col_scale, bias, addend,
            relu, post_scale, post_shift, out,
        )  # fmt: skip


@parallel_kernel
def _run_codes_parallel(
    bounds, indptr, indices, container, table, stride, columns, signed, row_scale, self_scale, col_scale, bias, addend,
    relu, post_scale, post_shift, out,
):  # fmt: skip
    for part in numba.prange(bounds.size - 1):
        _run_codes(
            bounds[part], bounds[part + 1], indptr, indices, container, table, stride, columns, signed, row_scale,
            self_scale, col_scale, bias, addend, relu, post_scale, post_shift, out,
        )  # fmt: skip


def sum_values(plan: Plan, x: Tensor, weight: Tensor | None, mean: bool, out: Tensor) -> None:
    """``out`` = sums of ``weight * x[source]``, or their means; all float32 and contiguous."""
    columns = x.size(1)
    operands = (
        *plan.places, x.data_ptr(), None if weight is None else weight.data_ptr(), columns, int(mean), out.data_ptr(),
    )  # fmt: skip
    parts = parts_for(plan.edges * columns // SUMS)
    if parts > 1:
        with parallel_lock:
            _run_values_parallel(plan.work(parts).bounds, *operands)
    else:
        _run_values(0, plan.n, *operands)


def sum_codes(
    plan: Plan, x: Tensor, container: int, stride: int, columns: int, signed: bool, scales: Sequence[Tensor | None],
    addends: Sequence[Tensor | None], relu: bool, post: Sequence[Tensor | None], out: Tensor,
) -> None:  # fmt: skip
    """``out`` (float32) = the epilogue of the sums of the codes of packed rows of ``stride`` bytes. ``scales`` of rows, of the row
    itself and of columns; ``addends``: bias and summand; ``post``: factor and shift."""
    tensors = [t if t is None else ready(t, torch.float32) for t in (*scales, *addends, *post)]
    places = [0 if t is None else t.data_ptr() for t in tensors]
    operands = (
        *plan.places, container, x.data_ptr(), stride, columns, int(signed), *places[:5], int(relu), *places[5:],
        out.data_ptr(),
    )  # fmt: skip
    parts = parts_for(plan.edges * columns // SUMS)
    if parts > 1:
        with parallel_lock:
            _run_codes_parallel(plan.work(parts).bounds, *operands)
    else:
        _run_codes(0, plan.n, *operands)
