"""Vector loops over edges, as LLVM IR: the sums stay in registers from the first edge of a row to the last.

Numba's own loops put the partial sums back into memory after every few edges and ask for no memory ahead. Measured as
processor time of one thread (Zen 5, AVX-512, busy machine), float32 sums: 20,000 nodes, 280,000 edges, F = 64: 1.1 ms,
torch CSR 8.7, PyG scatter 70; 2,708 nodes, 13,264 edges, F = 16: 46 µs, torch CSR 34, PyG scatter 348.

A block is ``W`` neighbouring columns; ``<W x T>`` is split by LLVM into as many registers as the processor needs. Rows
of any length are a sum of blocks of :data:`BLOCKS` columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj

BLOCKS = (128, 64, 32, 16, 8, 4, 2, 1)

AHEAD = 16
"""Edges between the one that is added and the one whose row is asked for. Rows are found at random: no hardware
prefetcher guesses them."""

WORD = ir.IntType(64)


def _pointer(context: Any, builder: Any, kind: Any, value: Any, *offsets: Any) -> Any:
    """Address of an element of a C-contiguous array."""
    view = arrayobj.make_array(kind)(context, builder, value)
    return cgutils.get_item_pointer(context, builder, kind, view, list(offsets), wraparound=False)


def _prefetch(builder: Any, pointer: Any) -> None:
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    # read access, keep in all levels of cache, data
    builder.call(function, [builder.bitcast(pointer, byte), word(0), word(3), word(1)])


def _splat(builder: Any, scalar: Any, width: int) -> Any:
    vector = ir.VectorType(scalar.type, width)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width))


def _edge_loop(
    context: Any, builder: Any, width: int, kinds: Any, arguments: Any, start: Sequence[Any], body: Callable[...,
    Sequence[Any]]
) -> list[Any]:  # fmt: skip
    """Runs ``sums = body(edge, source, row, sums)`` over the edges ``first`` to ``last``; ``row`` is the loaded block
    of the source."""
    indices, first, last, table, column = arguments
    element = context.get_data_type(kinds[3].dtype)
    many = arrayobj.make_array(kinds[0])(context, builder, indices).nitems
    # The edges asked for may belong to the next rows: those are summed next.
    final = builder.sub(many, WORD(1))
    entry, loop, done = builder.block, builder.append_basic_block("edge"), builder.append_basic_block("sums")
    builder.cbranch(builder.icmp_signed("<", first, last), loop, done)
    builder.position_at_end(loop)
    edge = builder.phi(WORD)
    sums = [builder.phi(value.type) for value in start]
    later = builder.add(edge, WORD(AHEAD))
    later = builder.select(builder.icmp_signed("<", later, final), later, final)
    ahead = builder.sext(builder.load(_pointer(context, builder, kinds[0], indices, later)), WORD)
    line = max(1, 64 // (element.width // 8 if isinstance(element, ir.IntType) else kinds[3].dtype.bitwidth // 8))
    for offset in range(0, width, line):
        _prefetch(builder, _pointer(context, builder, kinds[3], table, ahead, builder.add(column, WORD(offset))))
    source = builder.sext(builder.load(_pointer(context, builder, kinds[0], indices, edge)), WORD)
    address = _pointer(context, builder, kinds[3], table, source, column)
    row = builder.load(builder.bitcast(address, ir.VectorType(element, width).as_pointer()), align=1)
    new = body(edge, source, row, sums)
    following = builder.add(edge, WORD(1))
    end = builder.block
    edge.add_incoming(first, entry)
    edge.add_incoming(following, end)
    for phi, value, update in zip(sums, start, new, strict=True):
        phi.add_incoming(value, entry)
        phi.add_incoming(update, end)
    builder.cbranch(builder.icmp_signed("<", following, last), loop, done)
    builder.position_at_end(done)
    results = []
    for value, update in zip(start, new, strict=True):
        phi = builder.phi(value.type)
        phi.add_incoming(value, entry)
        phi.add_incoming(update, end)
        results.append(phi)
    return results


def _as_words(context: Any, builder: Any, kinds: Any, arguments: Any) -> list[Any]:
    """Scalar arguments as 64-bit integers; arrays and None as they are."""
    return [
        context.cast(builder, value, kind, types.int64) if isinstance(kind, types.Integer) else value
        for kind, value in zip(kinds, arguments, strict=True)
    ]


def _sum_block(width: int) -> Any:
    @intrinsic
    def sum_block(typingctx, indices, first, last, table, column, step, weight, out, row):
        """``out[row, column:][:width] = sum of weight[e] * step[source] * table[source, column:][:width]``; step and
        weight may be None."""
        signature = types.void(indices, first, last, table, column, step, weight, out, row)

        def codegen(context, builder, signature, args):
            kinds = signature.args
            args = _as_words(context, builder, kinds, args)
            number = context.get_data_type(kinds[7].dtype)
            vector = ir.VectorType(number, width)

            def body(edge, source, loaded, sums):
                if isinstance(kinds[3].dtype, types.Integer):
                    loaded = (builder.sitofp if kinds[3].dtype.signed else builder.uitofp)(loaded, vector)
                factor = None
                for kind, value, place in ((kinds[5], args[5], source), (kinds[6], args[6], edge)):
                    if not isinstance(kind, types.NoneType):
                        scalar = builder.load(_pointer(context, builder, kind, value, place))
                        factor = scalar if factor is None else builder.fmul(factor, scalar)
                if factor is not None:
                    loaded = builder.fmul(loaded, _splat(builder, factor, width), flags=("contract",))
                return [builder.fadd(sums[0], loaded, flags=("contract",))]

            start = [ir.Constant(vector, [ir.Constant(number, 0.0)] * width)]
            (result,) = _edge_loop(context, builder, width, kinds, args[:5], start, body)
            address = _pointer(context, builder, kinds[7], args[7], args[8], args[4])
            builder.store(result, builder.bitcast(address, vector.as_pointer()), align=1)
            return context.get_dummy_value()

        return signature, codegen

    return sum_block


def _sum_codes_block(width: int, container: int) -> Any:
    lanes = 8 // container
    narrow = ir.VectorType(ir.IntType(16 if container == 8 else 8), width)
    byte, word = ir.VectorType(ir.IntType(8), width), ir.VectorType(ir.IntType(32), width)

    @intrinsic
    def sum_codes(typingctx, indices, first, last, table, column, flip, planes):
        """Adds the codes in ``width`` bytes from ``column`` on, each xor ``flip``, to ``planes[lane, column:]``
        (int32). The edges must be so few that the sums fit 8 bits (16 for containers of 8 bits), of which a register
        holds four (two) times as many."""
        signature = types.void(indices, first, last, table, column, flip, planes)

        def codegen(context, builder, signature, args):
            kinds = signature.args
            args = _as_words(context, builder, kinds, args)
            mask = _splat(builder, builder.trunc(args[5], ir.IntType(8)), width)
            low = ir.Constant(byte, [(1 << container) - 1] * width)

            def body(edge, source, loaded, sums):
                loaded = builder.xor(loaded, mask)
                if container == 8:
                    return [builder.add(sums[0], builder.zext(loaded, narrow))]
                new = []
                for lane in range(lanes):
                    shifted = builder.lshr(loaded, ir.Constant(byte, [lane * container] * width))
                    new.append(builder.add(sums[lane], builder.and_(shifted, low)))
                return new

            start = [ir.Constant(narrow, [0] * width)] * lanes
            results = _edge_loop(context, builder, width, kinds, args[:5], start, body)
            for lane, result in enumerate(results):
                address = _pointer(context, builder, kinds[6], args[6], WORD(lane), args[4])
                address = builder.bitcast(address, word.as_pointer())
                builder.store(builder.add(builder.load(address, align=1), builder.zext(result, word)), address, align=1)
            return context.get_dummy_value()

        return signature, codegen

    return sum_codes


sum_128, sum_64, sum_32, sum_16, sum_8, sum_4, sum_2, sum_1 = (_sum_block(width) for width in BLOCKS)

WIDTHS = (64, 16, 4, 1)
"""Bytes of the blocks of packed rows: rows of 16 bytes and more are padded to a multiple of 16."""

codes8_64, codes8_16, codes8_4, codes8_1 = (_sum_codes_block(width, 8) for width in WIDTHS)
codes4_64, codes4_16, codes4_4, codes4_1 = (_sum_codes_block(width, 4) for width in WIDTHS)
codes2_64, codes2_16, codes2_4, codes2_1 = (_sum_codes_block(width, 2) for width in WIDTHS)
codes1_64, codes1_16, codes1_4, codes1_1 = (_sum_codes_block(width, 1) for width in WIDTHS)
