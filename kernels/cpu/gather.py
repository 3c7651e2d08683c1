"""Vector loops over edges, as LLVM IR: the sums stay in registers from the first edge of a row to the last.

Numba's own loops put the partial sums back into memory after every few edges and ask for no memory ahead.

A row is a sum of blocks of neighbouring columns; ``<W x T>`` is split by LLVM into as many registers as the processor
needs. Rows of any length are cut into as many of the widest block as fit, and at most one of each narrower one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj

from .common import emit_prefetch

AHEAD = 64
"""Edges between the one that is added and the one whose row is asked for. Rows are found at random: no hardware
prefetcher guesses them."""

WORD = ir.IntType(64)

WIDEST = 128
"""Columns of the widest block: of float32 it fills eight 512-bit registers."""


def _pointer(context: Any, builder: Any, kind: Any, value: Any, *offsets: Any) -> Any:
    """Address of an element of a C-contiguous array."""
    view = arrayobj.make_array(kind)(context, builder, value)
    return cgutils.get_item_pointer(context, builder, kind, view, list(offsets), wraparound=False)


def _splat(builder: Any, scalar: Any, width: int) -> Any:
    vector = ir.VectorType(scalar.type, width)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.IntType(32)(0))
    return builder.shuffle_vector(single, single, ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width))


def _accumulate(
    builder: Any, first: Any, last: Any, start: Sequence[Any], body: Callable[[Any, Sequence[Any]], Sequence[Any]]
) -> list[Any]:
    """Runs ``sums = body(edge, sums)`` over the edges ``first`` to ``last``, from ``start`` on."""
    entry, loop, done = builder.block, builder.append_basic_block("edge"), builder.append_basic_block("sums")
    builder.cbranch(builder.icmp_signed("<", first, last), loop, done)
    builder.position_at_end(loop)
    edge = builder.phi(WORD)
    sums = [builder.phi(value.type) for value in start]
    new = body(edge, sums)
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
    line = max(1, 64 // (element.width // 8 if isinstance(element, ir.IntType) else kinds[3].dtype.bitwidth // 8))

    def add(edge: Any, sums: Sequence[Any]) -> Sequence[Any]:
        later = builder.add(edge, WORD(AHEAD))
        later = builder.select(builder.icmp_signed("<", later, final), later, final)
        ahead = builder.sext(builder.load(_pointer(context, builder, kinds[0], indices, later)), WORD)
        for offset in range(0, width, line):
            place = builder.add(column, WORD(offset))
            emit_prefetch(builder, _pointer(context, builder, kinds[3], table, ahead, place))
        source = builder.sext(builder.load(_pointer(context, builder, kinds[0], indices, edge)), WORD)
        address = _pointer(context, builder, kinds[3], table, source, column)
        row = builder.load(builder.bitcast(address, ir.VectorType(element, width).as_pointer()), align=1)
        return body(edge, source, row, sums)

    return _accumulate(builder, first, last, start, add)


def _as_words(context: Any, builder: Any, kinds: Any, arguments: Any) -> list[Any]:
    """Scalar arguments as 64-bit integers; arrays and None as they are."""
    return [
        context.cast(builder, value, kind, types.int64) if isinstance(kind, types.Integer) else value
        for kind, value in zip(kinds, arguments, strict=True)
    ]


def _blocks(builder: Any, size: Any, widest: int, block: Callable[[int, Any], None], narrowest: int = 1) -> None:
    """Runs ``block(width, column)`` for the blocks of a row of ``size`` columns, a multiple of ``narrowest``."""
    whole = builder.and_(size, WORD(-widest))
    with cgutils.for_range_slice(builder, WORD(0), whole, WORD(widest), WORD) as (column, _):
        block(widest, column)
    width = widest // 2
    while width >= narrowest:
        with builder.if_then(builder.icmp_signed("!=", builder.and_(size, WORD(width)), WORD(0))):
            block(width, builder.and_(size, WORD(-2 * width)))
        width //= 2


@intrinsic
def sum_row(typingctx, indices, first, last, table, step, weight, out, row):
    """``out[row] = sum of weight[e] * step[source] * table[source]`` over the edges ``first`` to ``last``, in their
    order; step and weight may be None."""
    signature = types.void(indices, first, last, table, step, weight, out, row)

    def codegen(context, builder, signature, args):
        kinds = signature.args
        args = _as_words(context, builder, kinds, args)
        number = context.get_data_type(kinds[6].dtype)

        def block(width, column):
            vector = ir.VectorType(number, width)

            def body(edge, source, loaded, sums):
                if isinstance(kinds[3].dtype, types.Integer):
                    loaded = (builder.sitofp if kinds[3].dtype.signed else builder.uitofp)(loaded, vector)
                factor = None
                for kind, value, place in ((kinds[4], args[4], source), (kinds[5], args[5], edge)):
                    if not isinstance(kind, types.NoneType):
                        scalar = builder.load(_pointer(context, builder, kind, value, place))
                        factor = scalar if factor is None else builder.fmul(factor, scalar)
                if factor is not None:
                    loaded = builder.fmul(loaded, _splat(builder, factor, width), flags=("contract",))
                return [builder.fadd(sums[0], loaded, flags=("contract",))]

            start = [ir.Constant(vector, [ir.Constant(number, 0.0)] * width)]
            (result,) = _edge_loop(context, builder, width, kinds, [*args[:4], column], start, body)
            address = _pointer(context, builder, kinds[6], args[6], args[7], column)
            builder.store(result, builder.bitcast(address, vector.as_pointer()), align=1)

        size = arrayobj.make_array(kinds[6])(context, builder, args[6]).shape
        _blocks(builder, builder.extract_value(size, 1), WIDEST, block)
        return context.get_dummy_value()

    return signature, codegen


def _interleave(builder: Any, vectors: Sequence[Any]) -> Any:
    """Element 0 of every vector, then element 1 of every vector, and so on."""
    if len(vectors) == 1:
        return vectors[0]
    a, b = _interleave(builder, vectors[::2]), _interleave(builder, vectors[1::2])
    places = [j for pair in zip(range(a.type.count), range(a.type.count, 2 * a.type.count), strict=True) for j in pair]
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places))


def _sum_codes_row(container: int) -> Any:
    lanes, most = 8 // container, (1 << container) - 1
    # Narrow codes are added in 8 bits, those of 8 in 16, so that a register holds many: so many edges at a time.
    narrow = ir.IntType(16 if container == 8 else 8)
    reach = ((1 << narrow.width) - 1) // most

    @intrinsic
    def sum_codes_row(typingctx, indices, first, last, table, signed, out, row):
        """``out[row]`` = sums of the codes in ``table[source]`` over the edges ``first`` to ``last``; int32, in the order
        of the codes."""
        signature = types.void(indices, first, last, table, signed, out, row)

        def codegen(context, builder, signature, args):
            kinds = signature.args
            signed = args[4]
            args = _as_words(context, builder, kinds, args)
            indices, first, last, table = args[:4]
            # Two's complement with its sign bit flipped is code + 2^(container-1): all summands are non-negative.
            half, byte, word = 1 << (container - 1), ir.IntType(8), ir.IntType(32)
            flip = builder.select(signed, byte(half * (255 // most)), byte(0))
            many = builder.trunc(builder.sub(last, first), word)
            surplus = builder.mul(many, builder.select(signed, word(half), word(0)))

            def block(width, column):
                flips, wide = _splat(builder, flip, width), ir.VectorType(word, width * lanes)
                start = [ir.Constant(ir.VectorType(narrow, width), [0] * width)] * lanes

                def body(edge, source, loaded, sums):
                    loaded, new = builder.xor(loaded, flips), []
                    for lane, total in enumerate(sums):
                        code = builder.lshr(loaded, ir.Constant(flips.type, [lane * container] * width))
                        code = builder.and_(code, ir.Constant(flips.type, [most] * width))
                        new.append(builder.add(total, builder.zext(code, total.type)))
                    return new

                total = cgutils.alloca_once_value(builder, ir.Constant(wide, [0] * width * lanes))
                with cgutils.for_range_slice(builder, first, last, WORD(reach), WORD) as (begin, _):
                    end = builder.add(begin, WORD(reach))
                    end = builder.select(builder.icmp_signed("<", end, last), end, last)
                    sums = _edge_loop(context, builder, width, kinds, [indices, begin, end, table, column], start, body)
                    codes = builder.zext(_interleave(builder, sums), wide)
                    builder.store(builder.add(builder.load(total), codes), total)
                address = _pointer(context, builder, kinds[5], args[5], args[6], builder.mul(column, WORD(lanes)))
                address = builder.bitcast(address, wide.as_pointer())
                result = builder.sub(builder.load(total), _splat(builder, surplus, width * lanes))
                builder.store(result, address, align=1)

            size = arrayobj.make_array(kinds[3])(context, builder, table).shape
            _blocks(builder, builder.extract_value(size, 1), WIDEST // lanes, block)
            return context.get_dummy_value()

        return signature, codegen

    return sum_codes_row


sum_codes_8, sum_codes_4, sum_codes_2, sum_codes_1 = (_sum_codes_row(container) for container in (8, 4, 2, 1))


@intrinsic
def stream_row(typingctx, values, r, out, row, past_cache):
    """``out[row] = values[r]``; ``past_cache``: without keeping it in a cache, where the row is aligned for that."""
    signature = types.void(values, r, out, row, past_cache)

    def codegen(context, builder, signature, args):
        kinds = signature.args
        past_cache = args[4]
        args = _as_words(context, builder, kinds, args)
        number = context.get_data_type(kinds[2].dtype)
        lanes = 64 // (kinds[2].dtype.bitwidth // 8)
        size = builder.extract_value(arrayobj.make_array(kinds[2])(context, builder, args[2]).shape, 1)

        def copy(width, column, aligned):
            vector = ir.VectorType(number, width).as_pointer()
            source = _pointer(context, builder, kinds[0], args[0], args[1], column)
            target = _pointer(context, builder, kinds[2], args[2], args[3], column)
            value = builder.load(builder.bitcast(source, vector), align=1)
            store = builder.store(value, builder.bitcast(target, vector), align=64 if aligned else 1)
            if aligned:
                store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))

        begin = builder.ptrtoint(_pointer(context, builder, kinds[2], args[2], args[3], WORD(0)), WORD)
        uneven = builder.and_(builder.or_(begin, builder.mul(size, WORD(64 // lanes))), WORD(63))
        aligned = builder.icmp_signed("==", uneven, WORD(0))
        with builder.if_else(builder.and_(aligned, past_cache)) as (then, otherwise):
            with then, cgutils.for_range_slice(builder, WORD(0), size, WORD(lanes), WORD) as (column, _):
                copy(lanes, column, True)
            with otherwise:
                _blocks(builder, size, lanes, lambda width, column: copy(width, column, False))
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def drain(typingctx):
    """What was written past the caches is there for other threads."""

    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen
