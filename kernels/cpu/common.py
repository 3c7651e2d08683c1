"""What the Numba kernels share: threads, views of tensors, and the row-wise pieces of quantization, packing and the
integer epilogue.

A kernel is written once, as a body that takes a range ``lo, hi`` of its units of work (rows, blocks of rows). Small
work calls the body itself, on one thread; large work runs it through a ``prange`` over a few ranges. What a range
computes never depends on where the ranges are cut.

Numba's on-disk cache notices a change of the file a kernel stands in, not of the functions it calls in other files:
after an edit here, remove ``__pycache__`` beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np import arrayobj
from numpy.typing import NDArray
from torch import Tensor

from ..packing import CONTAINERS, bucket_starts, row_bytes

Array = NDArray[Any]

# error_model: a division that checks for zero is not vectorised. No fastmath: codes must agree with the reference to
# the bit.
kernel = numba.njit(nogil=True, cache=True, error_model="numpy")
# What a kernel calls once per row: passing a dozen arrays, seven words each, costs more than a short row's work. No
# early returns in these: with them Numba does not see that an array's reference count need not be touched, an atomic
# operation per array and row.
inlined = numba.njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
parallel_kernel = numba.njit(nogil=True, cache=True, error_model="numpy", parallel=True)
# Sums of floats: free to be reordered once, at compile time (lanes of a vector register), hence still the same in every
# run.
sum_kernel = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})

SERIAL_WORK = 1 << 17
"""Elements below which the work stays on one thread: it is then about as long as it takes to wake a second one."""

parallel_lock = threading.Lock()
"""Held around parallel kernels: Numba's fallback threading layer ends the process when two Python threads enter it at
once."""


def parts_for(work: int) -> int:
    """Ranges to cut ``work`` elements into: one a thread, and a single one for small work. ``torch.set_num_threads``
    limits both libraries."""
    if work < SERIAL_WORK:
        return 1
    return max(1, min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def even_bounds(units: int, parts: int) -> NDArray[np.int64]:
    """``parts + 1`` bounds of nearly equal ranges of ``units``."""
    return np.arange(parts + 1, dtype=np.int64) * units // parts


def array(tensor: Tensor) -> Array:
    """A C-contiguous NumPy view (a copy only if the tensor is not contiguous)."""
    return tensor.detach().contiguous().numpy()


def optional(tensor: Tensor | None, dtype: torch.dtype) -> Array:
    """As :func:`array` in one dtype; nothing becomes an empty array, so that a kernel is compiled once for both."""
    return array(torch.empty(0, dtype=dtype) if tensor is None else tensor.to(dtype))


def as_computed(x: Tensor) -> Tensor:
    """Half precision in float32; float32 and float64 as they are."""
    return x if x.dtype == torch.float64 else x.float()


def buckets_of(counts: Sequence[int], features: int) -> NDArray[np.int64]:
    """Rows: end of each bucket in places, its first byte, bytes of a row, container."""
    ends = np.cumsum(np.asarray(counts, dtype=np.int64))
    strides = [row_bytes(c, features) for c in CONTAINERS]
    return np.array([ends, bucket_starts(counts, features)[:-1], strides, CONTAINERS], dtype=np.int64)


def empty_packed(counts: Sequence[int], features: int) -> Tensor:
    """A buffer whose gaps between buckets are zero; the rows, their padding included, are the kernel's to write."""
    starts = bucket_starts(counts, features)
    data = torch.empty(starts[-1], dtype=torch.uint8)
    view = data.numpy()
    for container, count, start, end in zip(CONTAINERS, counts, starts[:-1], starts[1:], strict=True):
        view[start + count * row_bytes(container, features) : end] = 0
    return data


@intrinsic
def prefetch(typingctx, table, row, column):
    """Asks for the cache line of ``table[row, column]``; a hint, never a fault."""

    def codegen(context, builder, signature, args):
        kind = signature.args[0]
        view = arrayobj.make_array(kind)(context, builder, args[0])
        index = [context.cast(builder, a, t, types.intp) for a, t in zip(args[1:], signature.args[1:], strict=True)]
        pointer = cgutils.get_item_pointer(context, builder, kind, view, index, wraparound=False)
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, word, word, word]), "llvm.prefetch.p0"
        )
        # read access, keep in all levels of cache, data
        builder.call(function, [builder.bitcast(pointer, byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(table, row, column), codegen


@sum_kernel
def total(values):
    acc = values.dtype.type(0)
    for k in range(values.size):
        acc += values[k]
    return acc


@inlined
def largest_code(bits, signed):
    exponent = np.int64(bits) - (1 if signed else 0)
    return (1 << exponent) - 1 if exponent > 0 else 0


@inlined
def codes_row(x, i, step, q, signed, codes, clipped):
    """Codes (int32) and clip flags (uint8) of ``x[i]``; ``step`` and ``q`` per column. A NaN has code 0 and is not
    clipped."""
    negative = np.int32(-1 if signed else 0)
    never = np.uint8(0 if signed else 1)
    for k in range(x.shape[1]):
        v = x[i, k]
        magnitude = abs(v)
        # truncation is floor here, and clamping first changes nothing, as q is an integer
        c = magnitude / step[k] + np.float32(0.5)
        c = q[k] if q[k] < c else c
        c = c if c > 0 else x.dtype.type(0)
        sign = negative if v < 0 else np.int32(1)
        codes[k] = np.int32(c) * sign
        below = never if v < 0 else np.uint8(0)
        clipped[k] = np.uint8(magnitude >= step[k] * q[k]) | below


@inlined
def pack_flags(flags, features, bits, i):
    """One bit per flag into ``bits[i]``."""
    whole = features // 8
    for j in range(whole):
        b = np.uint8(0)
        for lane in range(8):
            b |= np.uint8(flags[8 * j + lane] << lane)
        bits[i, j] = b
    if 8 * whole < features:
        b = np.uint8(0)
        for k in range(8 * whole, features):
            b |= np.uint8(flags[k] << (k - 8 * whole))
        bits[i, whole] = b


@inlined
def place(buckets, pos, i):
    """Container, first byte and bytes of row ``i`` (:mod:`qgnn.kernels.packing`)."""
    p = np.int64(pos[i]) if pos.size else i
    b = 0
    while p >= buckets[0, b]:
        b += 1
    first = buckets[0, b - 1] if b else 0
    return buckets[3, b], buckets[1, b] + (p - first) * buckets[2, b], buckets[2, b]


@inlined
def pack_row(codes, features, container, data, start, stride):
    """Writes ``codes`` and the zero bytes after them; bits above the container are dropped."""
    lanes = 8 // max(container, 1)
    whole = features // lanes if container else 0
    if container == 8:
        for j in range(whole):
            data[start + j] = np.uint8(codes[j])
    elif container == 4:
        for j in range(whole):
            data[start + j] = np.uint8((codes[2 * j] & 15) | (codes[2 * j + 1] & 15) << 4)
    elif container == 2:
        for j in range(whole):
            k = 4 * j
            data[start + j] = np.uint8(
                (codes[k] & 3) | (codes[k + 1] & 3) << 2 | (codes[k + 2] & 3) << 4 | (codes[k + 3] & 3) << 6
            )
    elif container == 1:
        for j in range(whole):
            b = np.int32(0)
            for lane in range(8):
                b |= (codes[8 * j + lane] & 1) << lane
            data[start + j] = np.uint8(b)
    for j in range(whole, stride):
        data[start + j] = 0
    for k in range(whole * lanes, features if container else 0):
        data[start + whole] |= np.uint8((codes[k] & ((1 << container) - 1)) << ((k - whole * lanes) * container))


@inlined
def unpack_row(data, start, container, signed, features, out, i):
    """Codes of one packed row into ``out[i]``; a row without storage is 0."""
    half = np.int32(1 << (container - 1) if signed and container else 0)
    if container == 0:
        for k in range(features):
            out[i, k] = 0
    lanes = 8 // max(container, 1)
    whole = features // lanes if container else 0
    if container == 8:
        for j in range(whole):
            out[i, j] = (np.int32(data[start + j]) ^ half) - half
    elif container == 4:
        for j in range(whole):
            b = np.int32(data[start + j])
            out[i, 2 * j] = ((b & 15) ^ half) - half
            out[i, 2 * j + 1] = ((b >> 4) ^ half) - half
    elif container == 2:
        for j in range(whole):
            b = np.int32(data[start + j])
            out[i, 4 * j] = ((b & 3) ^ half) - half
            out[i, 4 * j + 1] = ((b >> 2 & 3) ^ half) - half
            out[i, 4 * j + 2] = ((b >> 4 & 3) ^ half) - half
            out[i, 4 * j + 3] = ((b >> 6) ^ half) - half
    elif container == 1:
        for j in range(whole):
            b = np.int32(data[start + j])
            for lane in range(8):
                out[i, 8 * j + lane] = ((b >> lane & 1) ^ half) - half
    mask = (1 << container) - 1
    for k in range(whole * lanes, features if container else 0):
        code = np.int32(data[start + whole]) >> ((k - whole * lanes) * container) & mask
        out[i, k] = (code ^ half) - half


@inlined
def epilogue_row(row_scale, col_scale, bias, relu, i, values):
    """The float part of the integer operations, in the order that :mod:`qgnn.kernels.matmul` fixes, on
    ``values[0]``."""
    f = values.shape[1]
    if row_scale.size:
        scale = row_scale[i]
        for k in range(f):
            values[0, k] *= scale
    if col_scale.size:
        for k in range(f):
            values[0, k] *= col_scale[k]
    if bias.size:
        for k in range(f):
            values[0, k] += bias[k]
    if relu:
        for k in range(f):
            v = values[0, k]
            values[0, k] = np.float32(0) if v < 0 else v
