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
from functools import lru_cache
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
from .memory import empty

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

SUMS = 16
"""Sums over edges that count as one element in that choice: 1,700,000 take 80 µs, about what it takes to wake a thread."""

ROW = 64
"""Elements that a row of a packed result counts as besides: unpacking, finishing and packing it takes 30 to 50 ns."""

# A byte in all 8 bytes of a word, and of each of them the bit that stands for it.
ALL_BYTES, ONE_EACH = np.uint64(0x0101010101010101), np.uint64(0x8040201008040201)

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


def run_ranges(serial: Any, parallel: Any, units: int, work: int, *arguments: Any) -> None:
    """``serial(0, units, *arguments)`` or, for much work, ``parallel(bounds, *arguments)`` over ranges of the units."""
    parts = parts_for(work)
    if parts > 1:
        with parallel_lock:
            parallel(even_bounds(units, parts), *arguments)
    else:
        serial(0, units, *arguments)


def ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in that dtype and contiguous, itself if it is."""
    tensor = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def array(tensor: Tensor) -> Array:
    """A C-contiguous NumPy view (a copy only if the tensor is not contiguous)."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    return (tensor if tensor.is_contiguous() else tensor.contiguous()).numpy()


_NOTHING: dict[tuple[torch.dtype, int], Array] = {
    (dtype, dim): torch.zeros((0,) * dim, dtype=dtype, device="cpu").numpy()
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.float32, torch.float64)
    for dim in (1, 2)
}


def optional(tensor: Tensor | None, dtype: torch.dtype, dim: int = 1) -> Array:
    """As :func:`array` in one dtype; nothing becomes an empty array, so that a kernel is compiled once for both."""
    if tensor is None:
        return _NOTHING[dtype, dim]
    return array(tensor if tensor.dtype == dtype else tensor.to(dtype))


def output_of(kind: str, rows: int, columns: int, counts: Sequence[int]) -> tuple[Tensor, tuple[Array, Array, Array]]:
    """The result of an integer operation (:mod:`qgnn.kernels.matmul`), uninitialised, and its views for a kernel: of int32 sums, of float32 values
    and of packed bytes, the two others empty."""
    sums, values, packed = _NOTHING[torch.int32, 2], _NOTHING[torch.float32, 2], _NOTHING[torch.uint8, 1]
    if kind == "acc":
        out = empty((rows, columns), torch.int32)
        return out, (out.numpy(), values, packed)
    if kind == "float":
        out = empty((rows, columns), torch.float32)
        return out, (sums, out.numpy(), packed)
    out = empty_packed(counts, columns)
    return out, (sums, values, out.numpy())


NO_HUBS: Array = np.empty((0, 3), np.int64)
NO_BUCKETS: Array = np.empty((4, 0), np.int64)

PAST_CACHE_BYTES = 1 << 24
"""Bytes of an output from which it is written past the caches: the next operation would not find it there anyway."""


def as_computed(x: Tensor) -> Tensor:
    """Half precision in float32; float32 and float64 as they are."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def buckets_of(counts: Sequence[int], features: int) -> NDArray[np.int64]:
    """Rows: end of each bucket in places, its first byte, bytes of a row, container."""
    return _layout(tuple(counts), features)[0]


def empty_packed(counts: Sequence[int], features: int) -> Tensor:
    """A buffer whose gaps between buckets are zero; the rows, their padding included, are the kernel's to write."""
    _, size, gaps = _layout(tuple(counts), features)
    data = empty((size,), torch.uint8)
    for start, end in gaps:
        data[start:end] = 0
    return data


@lru_cache(maxsize=256)
def _layout(counts: tuple[int, ...], features: int) -> tuple[NDArray[np.int64], int, list[tuple[int, int]]]:
    """The buckets of packed rows, their bytes, and the gaps between them. A model asks for the same few at every call."""
    starts, strides = bucket_starts(counts, features), [row_bytes(c, features) for c in CONTAINERS]
    buckets = np.array([np.cumsum(counts, dtype=np.int64), starts[:-1], strides, CONTAINERS], dtype=np.int64)
    ends = [start + count * stride for start, count, stride in zip(starts, counts, strides, strict=False)]
    return buckets, starts[-1], [gap for gap in zip(ends, starts[1:], strict=True) if gap[0] < gap[1]]


def emit_prefetch(builder: Any, pointer: Any) -> None:
    """Asks for a cache line: read access, second-level cache, data; a hint, never a fault.

    Into the first level, whose misses a core counts on fewer fingers, is slower by far: 11,461,588 edges, rows of 128
    bytes, two threads of Zen 4: 16, 32, 64 edges ahead 182, 194, 216 ms; into the second level 163, 113, 84.
    """
    byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.bitcast(pointer, byte), word(0), word(2), word(1)])


@intrinsic
def prefetch(typingctx, table, row, column):
    """Asks for the cache line of ``table[row, column]``."""

    def codegen(context, builder, signature, args):
        kind = signature.args[0]
        view = arrayobj.make_array(kind)(context, builder, args[0])
        index = [context.cast(builder, a, t, types.intp) for a, t in zip(args[1:], signature.args[1:], strict=True)]
        emit_prefetch(builder, cgutils.get_item_pointer(context, builder, kind, view, index, wraparound=False))
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
def spread_bits(bits, flags):
    """``flags`` (uint8, 8 for each byte of ``bits`` at least) are 0 where a bit is 0, and else not."""
    groups = flags.view(np.uint64)
    for g in range(bits.size):
        groups[g] = (np.uint64(bits[g]) * ALL_BYTES) & ONE_EACH


@inlined
def place(buckets, pos, i):
    """Container, first byte and bytes of row ``i`` (:mod:`qgnn.kernels.packing`)."""
    p = np.int64(pos[i]) if pos.size else i
    # no loop: see :data:`inlined`
    b = int(p >= buckets[0, 0]) + int(p >= buckets[0, 1]) + int(p >= buckets[0, 2]) + int(p >= buckets[0, 3])
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
