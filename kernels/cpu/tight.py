"""Numba functions of the tight layout of :mod:`qgnn.kernels.packing`: the 8 bytes of 8 codes are one 64-bit word, narrowed and widened in three
steps of shifts, so that a loop over groups runs in vectors. Little-endian processors only, as torch's own are."""

from __future__ import annotations

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from .common import inlined
from .gather import WORD, _pointer

# Every second lane of 8, 16 and 32 bits.
LOW_8, HIGH_8 = np.uint64(0x00FF00FF00FF00FF), np.uint64(0xFF00FF00FF00FF00)
LOW_16, HIGH_16 = np.uint64(0x0000FFFF0000FFFF), np.uint64(0xFFFF0000FFFF0000)
LOW_32, HIGH_32 = np.uint64(0x00000000FFFFFFFF), np.uint64(0xFFFFFFFF00000000)
ONES = np.uint64(0x0101010101010101)


def _word_pointer(context, builder, kind, data, row, column):
    return builder.bitcast(_pointer(context, builder, kind, data, row, column), WORD.as_pointer())


@intrinsic
def load_word(typingctx, data, row, column):
    """The 8 bytes of ``data`` (uint8 ``[N, B]``) at ``column``, at any address."""

    def codegen(context, builder, signature, args):
        return builder.load(_word_pointer(context, builder, signature.args[0], *args), align=1)

    return types.uint64(data, types.intp, types.intp), codegen


@intrinsic
def store_word(typingctx, data, row, column, word):
    """Writes the 8 bytes of ``word`` to ``data`` (uint8 ``[N, B]``) at ``column``, at any address."""

    def codegen(context, builder, signature, args):
        builder.store(args[3], _word_pointer(context, builder, signature.args[0], *args[:3]), align=1)
        return context.get_dummy_value()

    return types.void(data, types.intp, types.intp, types.uint64), codegen


@inlined
def pack_tight_row(codes, bits, data, i):
    """Packs ``codes`` (uint8, whole groups of 8, each below ``2^bits``) into the row ``data[i]``; their memory then holds the packed words."""
    words, stride = codes.view(np.uint64), np.int64(bits)
    s = np.uint64(8 - bits)
    for g in range(words.size):
        w = words[g]
        w = (w & LOW_8) | (w & HIGH_8) >> s
        w = (w & LOW_16) | (w & HIGH_16) >> (s + s)
        words[g] = (w & LOW_32) | (w & HIGH_32) >> (s + s + s + s)
    # A store of 8 bytes writes zeros beyond its group, which the next group overwrites. The last groups, whose 8 bytes leave the row, go byte by
    # byte.
    whole = max((data.shape[1] - 8) // stride + 1, 0)
    for g in range(whole):
        store_word(data, i, g * stride, words[g])
    for g in range(whole, words.size):
        for b in range(stride):
            data[i, g * stride + b] = np.uint8(words[g] >> np.uint64(8 * b))


@inlined
def unpack_tight_row(data, i, bits, codes):
    """The inverse of :func:`pack_tight_row`: ``codes`` (uint8, whole groups of 8) of the row ``data[i]``."""
    words, stride = codes.view(np.uint64), np.int64(bits)
    whole = max((data.shape[1] - 8) // stride + 1, 0)
    for g in range(whole):
        words[g] = load_word(data, i, g * stride)
    for g in range(whole, words.size):
        w = np.uint64(0)
        for b in range(stride):
            w |= np.uint64(data[i, g * stride + b]) << np.uint64(8 * b)
        words[g] = w
    # What belongs to the next group always lies above the bits that count, and goes in the end.
    s, mask = np.uint64(8 - bits), np.uint64((1 << bits) - 1) * ONES
    for g in range(words.size):
        w = words[g]
        w = (w & LOW_32) | (w << (s + s + s + s)) & HIGH_32
        w = (w & LOW_16) | (w << (s + s)) & HIGH_16
        words[g] = ((w & LOW_8) | (w << s) & HIGH_8) & mask
