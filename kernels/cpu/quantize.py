"""Numba kernels of :mod:`qgnn.kernels.quantize`: one pass over x that leaves codes or values, clip bits and gradient
sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from .codes import quantize_codes
from .common import (
    Array,
    array,
    as_computed,
    buckets_of,
    codes_row,
    empty_packed,
    even_bounds,
    inlined,
    kernel,
    largest_code,
    optional,
    pack_flags,
    pack_row,
    parallel_kernel,
    parallel_lock,
    parts_for,
    place,
    total,
    unpack_row,
)

BLOCK = 512
"""Rows whose column sums are added up before the blocks' sums are, in order: fixed, so that the result does not depend
on the threads."""

LN2 = math.log(2)


@inlined
def _parameters(step, bits, i, row, signed, s, q, slope):
    """Step, largest code and ``|dx_q/dbits|`` where clipped, for each column: those of row ``i``, or each column's
    own."""
    less = 1 if signed else 0
    if row:
        largest, power = largest_code(bits[i], signed), slope.dtype.type(2.0 ** (np.int64(bits[i]) - less) * LN2)
        for k in range(s.size):
            s[k] = step[i]
            q[k] = largest
            slope[k] = power * step[i]
    else:
        for k in range(s.size):
            s[k] = step[k]
            q[k] = largest_code(bits[k], signed)
            slope[k] = slope.dtype.type(2.0 ** (np.int64(bits[k]) - less) * LN2) * step[k]


@inlined
def _derivatives(x, i, codes, clipped, s, q, slope, signed, d_step, d_bits):
    """A2Q eq. 10, element by element."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    below = -one if signed else zero
    for k in range(x.shape[1]):
        v = x[i, k]
        sign = one if v > zero else (below if v < zero else zero)
        inside = (s[k] * x.dtype.type(codes[k]) - v) / s[k]
        d_step[k] = sign * q[k] if clipped[k] else inside
        d_bits[k] = sign * slope[k] if clipped[k] else zero


@kernel
def _quantize(lo, hi, x, step, bits, row, signed, gradients, packed, pos, buckets, data, out, clip, g_step, g_bits):
    n, f = x.shape
    s, q, slope = np.empty(f, x.dtype), np.empty(f, x.dtype), np.empty(f, x.dtype)
    d_step, d_bits = np.empty(f, x.dtype), np.empty(f, x.dtype)
    codes, clipped = np.empty(f, np.int32), np.empty(f, np.uint8)
    zero, one = x.dtype.type(0), x.dtype.type(1)
    if not row:
        _parameters(step, bits, 0, row, signed, s, q, slope)
    for block in range(lo, hi):
        if gradients and not row:
            g_step[block] = 0
            g_bits[block] = 0
        for i in range(block * BLOCK, min((block + 1) * BLOCK, n)):
            if row:
                _parameters(step, bits, i, row, signed, s, q, slope)
            codes_row(x, i, s, q, signed, codes, clipped)
            pack_flags(clipped, f, clip, i)
            if packed:
                container, start, stride = place(buckets, pos, i)
                pack_row(codes, f, container, data, start, stride)
            else:
                for k in range(f):
                    value = s[k] * x.dtype.type(codes[k])
                    out[i, k] = value if x[i, k] == x[i, k] else x[i, k]
            if gradients:
                _derivatives(x, i, codes, clipped, s, q, slope, signed, d_step, d_bits)
                for k in range(f):
                    difference = s[k] * x.dtype.type(codes[k]) - x[i, k]
                    # a NaN times itself below stays one
                    sign = one if difference > zero else (-one if difference < zero else difference)
                    d_step[k] *= sign
                    d_bits[k] *= sign
                if row:
                    g_step[i, 0] = total(d_step) / max(f, 1)
                    g_bits[i, 0] = total(d_bits) / max(f, 1)
                else:
                    for k in range(f):
                        g_step[block, k] += d_step[k]
                        g_bits[block, k] += d_bits[k]


@parallel_kernel
def _quantize_parallel(
    bounds, x, step, bits, row, signed, gradients, packed, pos, buckets, data, out, clip, g_step, g_bits
):
    for part in numba.prange(bounds.size - 1):
        _quantize(
            bounds[part], bounds[part + 1], x, step, bits, row, signed, gradients, packed, pos, buckets, data, out,
            clip, g_step, g_bits
        )  # fmt: skip


@kernel
def _backward(lo, hi, grad, x, step, bits, row, signed, out, g_step, g_bits):
    n, f = x.shape
    s, q, slope = np.empty(f, x.dtype), np.empty(f, x.dtype), np.empty(f, x.dtype)
    d_step, d_bits = np.empty(f, x.dtype), np.empty(f, x.dtype)
    codes, clipped = np.empty(f, np.int32), np.empty(f, np.uint8)
    if not row:
        _parameters(step, bits, 0, row, signed, s, q, slope)
    for block in range(lo, hi):
        if not row:
            g_step[block] = 0
            g_bits[block] = 0
        for i in range(block * BLOCK, min((block + 1) * BLOCK, n)):
            if row:
                _parameters(step, bits, i, row, signed, s, q, slope)
            codes_row(x, i, s, q, signed, codes, clipped)
            _derivatives(x, i, codes, clipped, s, q, slope, signed, d_step, d_bits)
            for k in range(f):
                d_step[k] *= grad[i, k]
                d_bits[k] *= grad[i, k]
                out[i, k] = x.dtype.type(0) if clipped[k] else grad[i, k]
            if row:
                g_step[i, 0] = total(d_step)
                g_bits[i, 0] = total(d_bits)
            else:
                for k in range(f):
                    g_step[block, k] += d_step[k]
                    g_bits[block, k] += d_bits[k]


@parallel_kernel
def _backward_parallel(bounds, grad, x, step, bits, row, signed, out, g_step, g_bits):
    for part in numba.prange(bounds.size - 1):
        _backward(bounds[part], bounds[part + 1], grad, x, step, bits, row, signed, out, g_step, g_bits)


@kernel
def _mask(lo, hi, grad, clip, out):
    f = grad.shape[1]
    for i in range(lo, hi):
        for k in range(f):
            out[i, k] = grad.dtype.type(0) if clip[i, k >> 3] >> (k & 7) & 1 else grad[i, k]


@parallel_kernel
def _mask_parallel(bounds, grad, clip, out):
    for part in numba.prange(bounds.size - 1):
        _mask(bounds[part], bounds[part + 1], grad, clip, out)


@kernel
def _dequantize(lo, hi, data, step, row, signed, zero, pos, buckets, out):
    f = out.shape[1]
    codes = np.empty((1, f), np.int32)
    for i in range(lo, hi):
        container, start, _ = place(buckets, pos, i)
        unpack_row(data, start, container, signed, f, codes, 0)
        if row:
            for k in range(f):
                out[i, k] = step[i] * step.dtype.type(codes[0, k] - zero)
        else:
            for k in range(f):
                out[i, k] = step[k] * step.dtype.type(codes[0, k] - zero)


@parallel_kernel
def _dequantize_parallel(bounds, data, step, row, signed, zero, pos, buckets, out):
    for part in numba.prange(bounds.size - 1):
        _dequantize(bounds[part], bounds[part + 1], data, step, row, signed, zero, pos, buckets, out)


def _gradient_sums(n: int, f: int, row: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where the kernels leave the sums: one a row, or a row of column sums a block."""
    shape = (n, 1) if row else (-(-n // BLOCK), f)
    return torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)


def _add_blocks(sums: Tensor) -> Tensor:
    """Adds the blocks in their order (NumPy's sum over the first axis does, whatever the threads)."""
    return torch.from_numpy(np.add.reduce(sums.numpy(), axis=0))


def _run_quantize(
    x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool, gradients: bool, pos: Tensor | None, buckets: Array,
    data: Tensor, out: Tensor, packed: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, f = x.shape
    clip = torch.empty(n, (f + 7) // 8, dtype=torch.uint8)
    g_step, g_bits = _gradient_sums(n, f, row, x.dtype)
    arguments = (
        array(x), array(step.to(x.dtype)), array(bits), row, signed, gradients, packed, optional(pos, torch.int32),
        buckets, data.numpy(), out.numpy(), clip.numpy(), g_step.numpy(), g_bits.numpy(),
    )  # fmt: skip
    blocks = -(-n // BLOCK)
    parts = min(parts_for(x.numel()), blocks)
    if parts > 1:
        with parallel_lock:
            _quantize_parallel(even_bounds(blocks, parts), *arguments)
    else:
        _quantize(0, blocks, *arguments)
    if not gradients:
        return clip, x.new_empty(0), x.new_empty(0)
    if row:
        return clip, g_step.view(n), g_bits.view(n)
    return clip, _add_blocks(g_step) / max(n, 1), _add_blocks(g_bits) / max(n, 1)


def quantize(
    x: Tensor,
    step: Tensor,
    bits: Tensor,
    row: bool,
    signed: bool,
    pos: Tensor | None,
    counts: Sequence[int],
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Packed codes, clip bits, local gradients."""
    x, f = as_computed(x), x.size(1)
    if x.dtype == torch.float32 and not gradients:
        return *quantize_codes(x, step, bits, row, signed, pos, counts), x.new_empty(0), x.new_empty(0)
    data = empty_packed(counts, f)
    nothing = x.new_empty(0, f)
    return data, *_run_quantize(x, step, bits, row, signed, gradients, pos, buckets_of(counts, f), data, nothing, True)


def fake_quantize(
    x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantized values, clip bits, local gradients."""
    wide = as_computed(x)
    out = torch.empty(x.shape, dtype=wide.dtype)
    data, buckets = torch.empty(0, dtype=torch.uint8), np.empty((4, 0), dtype=np.int64)
    rest = _run_quantize(wide, step, bits, row, signed, gradients, None, buckets, data, out, False)
    return out.to(x.dtype), *rest


def fake_quantize_backward(
    grad: Tensor, x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Masked gradient, and the global gradients of step and width."""
    wide, (n, f) = as_computed(x), x.shape
    out = torch.empty(x.shape, dtype=wide.dtype)
    g_step, g_bits = _gradient_sums(n, f, row, wide.dtype)
    arguments = (
        array(grad.to(wide.dtype)), array(wide), array(step.to(wide.dtype)), array(bits), row, signed, out.numpy(),
        g_step.numpy(), g_bits.numpy(),
    )  # fmt: skip
    blocks = -(-n // BLOCK)
    parts = min(parts_for(x.numel()), blocks)
    if parts > 1:
        with parallel_lock:
            _backward_parallel(even_bounds(blocks, parts), *arguments)
    else:
        _backward(0, blocks, *arguments)
    if row:
        return out.to(grad.dtype), g_step.view(n), g_bits.view(n)
    return out.to(grad.dtype), _add_blocks(g_step), _add_blocks(g_bits)


def mask_clipped(grad: Tensor, clip: Tensor) -> Tensor:
    """The gradient with zeros where the clip bit is set."""
    wide = as_computed(grad)
    out = torch.empty(grad.shape, dtype=wide.dtype)
    arguments = (array(wide), array(clip), out.numpy())
    parts = parts_for(grad.numel())
    if parts > 1:
        with parallel_lock:
            _mask_parallel(even_bounds(grad.size(0), parts), *arguments)
    else:
        _mask(0, grad.size(0), *arguments)
    return out.to(grad.dtype)


def dequantize(
    data: Tensor,
    step: Tensor,
    row: bool,
    signed: bool,
    zero: int,
    pos: Tensor | None,
    counts: Sequence[int],
    features: int,
) -> Tensor:
    """``step * (code - zero)``."""
    n = sum(counts)
    out = torch.empty(n, features, dtype=step.dtype)
    arguments = (
        array(data), array(step), row, signed, np.int32(zero), optional(pos, torch.int32), buckets_of(counts, features),
        out.numpy(),
    )  # fmt: skip
    parts = parts_for(n * features)
    if parts > 1:
        with parallel_lock:
            _dequantize_parallel(even_bounds(n, parts), *arguments)
    else:
        _dequantize(0, n, *arguments)
    return out
