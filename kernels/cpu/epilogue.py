"""Vector code for what follows the sums of a row: the float epilogue, and the codes of its result, packed. As LLVM IR,
since a Numba function with loops in it costs its caller a count of references, an atomic operation, per array and row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj

from .common import inlined
from .gather import WORD, _as_words, _blocks, _pointer, _splat

SINGLE = ir.FloatType()

WIDEST = 64
"""Columns of the widest block: four 512-bit registers of float32, so that the branches between the steps are few."""


def load_block(context: Any, builder: Any, kind: Any, value: Any, width: int, *place: Any) -> Any:
    """``width`` neighbouring elements."""
    vector = ir.VectorType(context.get_data_type(kind.dtype), width).as_pointer()
    return builder.load(builder.bitcast(_pointer(context, builder, kind, value, *place), vector), align=1)


def positive(builder: Any, value: Any) -> Any:
    """``max(value, 0)``; NaN stays."""
    zero = ir.Constant(value.type, [ir.Constant(SINGLE, 0.0)] * value.type.count)
    return builder.select(builder.fcmp_ordered("<", value, zero), zero, value)


def finish(builder: Any, value: Any, steps: Sequence[tuple[Any, Callable[[Any], Any]]]) -> Any:
    """``value`` after those steps whose operand is given: pairs of that condition and the step."""
    memory = cgutils.alloca_once_value(builder, value)
    for given, step in steps:
        with builder.if_then(given):
            builder.store(step(builder.load(memory)), memory)
    return builder.load(memory)


@intrinsic
def epilogue_row(
    typingctx, acc, r, features, row_scale, self_scale, own, col_scale, bias, addend, relu, post_scale, post_shift, i,
    out, o, past_cache,
):  # fmt: skip
    """``out[o]`` = the float part of the integer operations on the sums ``acc[r]`` (int32 or float32) of row ``i``, in the
    order that :mod:`qgnn.kernels.matmul` fixes; ``own[0]``: the codes of that row itself. Empty arrays are left out.
    ``past_cache``: written without keeping it in a cache, where rows are aligned for that."""
    arguments = (
        acc, r, features, row_scale, self_scale, own, col_scale, bias, addend, relu, post_scale, post_shift, i, out, o,
        past_cache,
    )  # fmt: skip

    def codegen(context, builder, signature, args):
        kinds = signature.args
        relu, past_cache = args[9], args[15]
        args = _as_words(context, builder, kinds, args)
        features, i = args[2], args[12]

        def given(a):
            many = arrayobj.make_array(kinds[a])(context, builder, args[a]).nitems
            return builder.icmp_signed("!=", many, WORD(0))

        begin = builder.ptrtoint(_pointer(context, builder, kinds[13], args[13], args[14], WORD(0)), WORD)
        streamed = builder.icmp_signed("==", builder.and_(begin, WORD(63)), WORD(0))
        streamed = builder.and_(builder.trunc(past_cache, ir.IntType(1)), streamed)

        def block(width, column):
            vector = ir.VectorType(SINGLE, width)
            sums = load_block(context, builder, kinds[0], args[0], width, args[1], column)
            sums = builder.sitofp(sums, vector) if isinstance(kinds[0].dtype, types.Integer) else sums

            def spread(a, *place):
                single = builder.load(_pointer(context, builder, kinds[a], args[a], *place))
                return _splat(builder, single, width)

            def row(a, *place):
                return load_block(context, builder, kinds[a], args[a], width, *place, column)

            def own():
                return builder.fmul(spread(4, WORD(0)), builder.sitofp(row(5, WORD(0)), vector))

            steps = (
                (given(3), lambda v: builder.fmul(v, spread(3, i))),
                (given(4), lambda v: builder.fadd(v, own())),
                (given(6), lambda v: builder.fmul(v, row(6))),
                (given(7), lambda v: builder.fadd(v, row(7))),
                (given(8), lambda v: builder.fadd(v, row(8, i))),
                (relu, lambda v: positive(builder, v)),
                (given(10), lambda v: builder.fmul(v, row(10))),
                (given(11), lambda v: builder.fadd(v, row(11))),
            )
            value = finish(builder, sums, steps)
            target = builder.bitcast(
                _pointer(context, builder, kinds[13], args[13], args[14], column), vector.as_pointer()
            )
            if width == WIDEST:
                with builder.if_else(streamed) as (then, otherwise):
                    with then:
                        store = builder.store(value, target, align=64)
                        store.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
                    with otherwise:
                        builder.store(value, target, align=1)
            else:
                builder.store(value, target, align=1)

        _blocks(builder, features, WIDEST, block)
        return context.get_dummy_value()

    return types.void(*arguments), codegen


def _pack_codes(container: int) -> Any:
    lanes, byte = 8 // container, ir.IntType(8)

    @intrinsic
    def pack_codes(typingctx, values, step, largest, signed, data, start, stride):
        """The codes of ``values[0]`` (:mod:`qgnn.kernels.quantize`) with the ``step`` and ``largest`` code of every
        column, packed into the ``stride`` bytes from ``data[start]`` on. All three arrays reach as far as the bytes do."""
        signature = types.void(values, step, largest, signed, data, start, stride)

        def codegen(context, builder, signature, args):
            kinds = signature.args
            signed = args[3]
            args = _as_words(context, builder, kinds, args)

            def block(width, column):
                many = width * lanes
                floats, words = ir.VectorType(SINGLE, many), ir.VectorType(ir.IntType(32), many)
                first = builder.mul(column, WORD(lanes))
                v = load_block(context, builder, kinds[0], args[0], many, WORD(0), first)
                s, q = (load_block(context, builder, kinds[a], args[a], many, first) for a in (1, 2))
                zero, half = (ir.Constant(floats, [ir.Constant(SINGLE, c)] * many) for c in (0.0, 0.5))
                name = f"llvm.fabs.v{many}f32"
                fabs = cgutils.get_or_insert_function(builder.module, ir.FunctionType(floats, [floats]), name)
                # Truncation is floor here, and clamping first changes nothing, as q is an integer. A NaN has code 0.
                c = builder.fadd(builder.fdiv(builder.call(fabs, [v]), s), half)
                c = builder.select(builder.fcmp_ordered("<", q, c), q, c)
                c = builder.fptosi(builder.select(builder.fcmp_ordered(">", c, zero), c, zero), words)
                none = ir.Constant(words, [0] * many)
                below = builder.select(_splat(builder, signed, many), builder.sub(none, c), none)
                codes = builder.select(builder.fcmp_ordered("<", v, zero), below, c)
                codes = builder.trunc(codes, ir.VectorType(byte, many))
                packed = None
                for lane in range(lanes):
                    mine = ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(lane, many, lanes)))
                    part = builder.shuffle_vector(codes, codes, mine)
                    part = builder.and_(part, ir.Constant(part.type, [(1 << container) - 1] * width))
                    part = builder.shl(part, ir.Constant(part.type, [lane * container] * width))
                    packed = part if packed is None else builder.or_(packed, part)
                target = _pointer(context, builder, kinds[4], args[4], builder.add(args[5], column))
                builder.store(packed, builder.bitcast(target, packed.type.as_pointer()), align=1)

            _blocks(builder, args[6], WIDEST // lanes, block)
            return context.get_dummy_value()

        return signature, codegen

    return pack_codes


_pack_8, _pack_4, _pack_2, _pack_1 = (_pack_codes(container) for container in (8, 4, 2, 1))


@inlined
def pack_row(container, values, step, largest, signed, data, start, stride):
    """The codes of ``values[0]`` in ``container``; a row without storage has no bytes."""
    if container == 8:
        _pack_8(values, step, largest, signed, data, start, stride)
    elif container == 4:
        _pack_4(values, step, largest, signed, data, start, stride)
    elif container == 2:
        _pack_2(values, step, largest, signed, data, start, stride)
    elif container == 1:
        _pack_1(values, step, largest, signed, data, start, stride)
