"""Integer product of a few rows, as LLVM IR: four unsigned times four signed bytes are added to every int32, exactly.

Weights ``[M, K]`` are laid so that one load holds four neighbouring codes of 16 columns: ``[K / 4, M]`` words of four
bytes, zero where K or M is padded. Codes of x are made non-negative by an offset; what it adds is taken off the sums.
"""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic
from numba.np import arrayobj
from torch import Tensor

from ..packing import row_bytes, uniform_counts, unpack_reference
from .common import Array, array, inlined
from .epilogue import load_block
from .gather import WORD, _as_words, _blocks, _interleave, _pointer, _splat

TILE = 4
"""Rows that are multiplied together: with :data:`VECTORS` they take 16 of the 32 registers for sums, and every load of
weights serves four products."""

VECTORS = 4
LANES = 16


def has_byte_products() -> bool:
    """Whether Numba makes code for AVX-512 VNNI, whose ``vpdpbusd`` is 64 products and sums."""
    features = config.CPU_FEATURES if config.CPU_FEATURES is not None else get_host_cpu_features()
    return config.CPU_NAME in (None, "host") and "+avx512vnni" in features.split(",")


def _dot(builder: Any, native: bool, acc: Any, x: Any, w: Any) -> Any:
    """``acc`` + the products of the four bytes in every word of ``x`` (unsigned) and ``w`` (signed)."""
    if native:
        kind = ir.FunctionType(acc.type, [acc.type] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(function, [acc, x, w])
    for lane in range(4):
        shift, left, right = (ir.Constant(x.type, [bits] * LANES) for bits in (8 * lane, 24 - 8 * lane, 24))
        # Both factors fit 16 bits, which LLVM sees: x86 has an instruction for such products.
        a = builder.and_(builder.lshr(x, shift), ir.Constant(x.type, [255] * LANES))
        acc = builder.add(acc, builder.mul(a, builder.ashr(builder.shl(w, left), right)))
    return acc


def _lay(w: Tensor, container: int, columns: int, features: int) -> tuple[Array, Array]:
    padded = np.zeros((-(-columns // LANES) * LANES, -(-features // 4) * 4), np.int8)
    if container == 8:  # a byte is a code: weights that are trained come anew in every step
        stride = row_bytes(8, features)
        rows = array(w)[: columns * stride].reshape(columns, stride)[:, :features]
        padded[:columns, :features] = rows.view(np.int8)
    else:
        padded[:columns, :features] = unpack_reference(w, None, uniform_counts(columns, container), features, True)
    return np.ascontiguousarray(padded.view(np.int32).T), padded.sum(1, dtype=np.int32)


_weights: dict[int, tuple[weakref.ref[Tensor], tuple[int, ...], tuple[Array, Array]]] = {}


def laid_weights(w: Tensor, container: int, columns: int, features: int) -> tuple[Array, Array]:
    """Packed signed weights ``[M, K]`` as words ``[K / 4, M]``, M padded to a multiple of 16, and their sums over K, int32
    ``[M]``; remembered until ``w`` changes or dies."""
    if w.is_inference():  # it has no version, so a change in place could not be seen
        return _lay(w, container, columns, features)
    place, key = id(w), (w.data_ptr(), w._version, container, columns, features)
    known = _weights.get(place)
    if known is None or known[0]() is not w or known[1] != key:
        gone = weakref.ref(w, lambda _: _weights.pop(place, None))
        known = _weights[place] = (gone, key, _lay(w, container, columns, features))
    return known[2]


def make_multiply_rows(native: bool) -> Any:
    @intrinsic
    def multiply_rows(typingctx, tile, weights, sums, offsets, acc):
        """``acc[r, j] = sum over k of (tile[r, k] - offsets[r]) * w[j, k]`` for the rows of ``tile`` (uint8)."""
        signature = types.void(tile, weights, sums, offsets, acc)

        def codegen(context, builder, signature, args):
            kinds = signature.args
            word = ir.IntType(32)
            vector = ir.VectorType(word, LANES)
            shape = arrayobj.make_array(kinds[1])(context, builder, args[1]).shape
            depth, columns = builder.extract_value(shape, 0), builder.extract_value(shape, 1)

            def block(vectors, place):
                first = builder.mul(place, WORD(LANES))
                column = [builder.add(first, WORD(LANES * v)) for v in range(vectors)]
                zero = ir.Constant(vector, [0] * LANES)
                memory = [[cgutils.alloca_once_value(builder, zero) for _ in range(vectors)] for _ in range(TILE)]
                with cgutils.for_range(builder, depth, intp=WORD) as loop:
                    w = [load_block(context, builder, kinds[1], args[1], LANES, loop.index, c) for c in column]
                    for r in range(TILE):
                        pointer = _pointer(
                            context, builder, kinds[0], args[0], WORD(r), builder.mul(loop.index, WORD(4))
                        )
                        x = _splat(builder, builder.load(builder.bitcast(pointer, word.as_pointer()), align=1), LANES)
                        for v in range(vectors):
                            builder.store(_dot(builder, native, builder.load(memory[r][v]), x, w[v]), memory[r][v])
                for r in range(TILE):
                    offset = builder.load(_pointer(context, builder, kinds[3], args[3], WORD(r)))
                    for v in range(vectors):
                        surplus = load_block(context, builder, kinds[2], args[2], LANES, column[v])
                        surplus = builder.mul(surplus, _splat(builder, offset, LANES))
                        target = _pointer(context, builder, kinds[4], args[4], WORD(r), column[v])
                        result = builder.sub(builder.load(memory[r][v]), surplus)
                        builder.store(result, builder.bitcast(target, vector.as_pointer()), align=1)

            _blocks(builder, builder.udiv(columns, WORD(LANES)), VECTORS, block)
            return context.get_dummy_value()

        return signature, codegen

    return multiply_rows


multiply_rows = make_multiply_rows(has_byte_products())


def _unpack_codes(container: int) -> Any:
    lanes, byte = 8 // container, ir.IntType(8)
    half, most = 1 << (container - 1), (1 << container) - 1

    @intrinsic
    def unpack_codes(typingctx, data, start, stride, signed, out, r):
        """``out[r]`` (uint8) = the codes in ``stride`` bytes from ``data[start]`` on, plus ``2^(container-1)`` if they are signed."""
        signature = types.void(data, start, stride, signed, out, r)

        def codegen(context, builder, signature, args):
            kinds = signature.args
            signed = args[3]
            args = _as_words(context, builder, kinds, args)
            # two's complement with its sign bit flipped
            flip = builder.select(signed, byte(half * (255 // most)), byte(0))

            def block(width, column):
                flips = _splat(builder, flip, width)
                loaded = load_block(context, builder, kinds[0], args[0], width, builder.add(args[1], column))
                loaded, codes = builder.xor(loaded, flips), []
                for lane in range(lanes):
                    code = builder.lshr(loaded, ir.Constant(flips.type, [lane * container] * width))
                    codes.append(builder.and_(code, ir.Constant(flips.type, [most] * width)))
                result = _interleave(builder, codes)
                target = _pointer(context, builder, kinds[4], args[4], args[5], builder.mul(column, WORD(lanes)))
                builder.store(result, builder.bitcast(target, result.type.as_pointer()), align=1)

            _blocks(builder, args[2], 64, block)
            return context.get_dummy_value()

        return signature, codegen

    return unpack_codes


_unpack_8, _unpack_4, _unpack_2, _unpack_1 = (_unpack_codes(container) for container in (8, 4, 2, 1))


@inlined
def unpack_positive(container, data, start, stride, signed, out, r):
    """Codes of a packed row plus the offset that makes them non-negative, into ``out[r]``; returns the offset."""
    if container == 8:
        _unpack_8(data, start, stride, signed, out, r)
    elif container == 4:
        _unpack_4(data, start, stride, signed, out, r)
    elif container == 2:
        _unpack_2(data, start, stride, signed, out, r)
    elif container == 1:
        _unpack_1(data, start, stride, signed, out, r)
    else:
        out[r] = 0
    return (1 << container) >> 1 if signed and container else 0
