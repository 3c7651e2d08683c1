"""Numba kernels of :mod:`qgnn.kernels.msfp`: a row goes through buffers of whole blocks, so that its loops run in vectors."""

from __future__ import annotations

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from torch import Tensor

from ..packing import tight_bytes
from .common import array, even_bounds, inlined, kernel, parallel_kernel, parallel_lock, parts_for
from .epilogue import load_block
from .gather import WORD, _as_words, _pointer, _splat
from .memory import empty
from .random import rounded_by, uniform_row
from .tight import pack_tight_row, unpack_tight_row

BLOCK = 16
"""Values that share an exponent (:data:`qgnn.kernels.msfp.BLOCK`)."""

INT = ir.IntType(32)
INFINITY = np.float32(np.inf)


def _for_blocks(builder, blocks, body):
    """``body(block, its first column)`` for every block."""
    with cgutils.for_range(builder, blocks) as loop:
        body(loop.index, builder.mul(loop.index, WORD(BLOCK)))


@intrinsic
def _largest(typingctx, values, blocks, top):
    """``top[j]`` = the largest of block ``j`` of ``values`` (int32 both). Numba's own loop takes five times as long."""

    def codegen(context, builder, signature, args):
        kinds = signature.args
        args = _as_words(context, builder, kinds, args)

        def body(j, column):
            block = load_block(context, builder, kinds[0], args[0], BLOCK, column)
            name = f"llvm.vector.reduce.smax.v{BLOCK}i32"
            reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(INT, [block.type]), name)
            builder.store(builder.call(reduce, [block]), _pointer(context, builder, kinds[2], args[2], j))

        _for_blocks(builder, args[1], body)
        return context.get_dummy_value()

    return types.void(values, blocks, top), codegen


@intrinsic
def _spread(typingctx, values, blocks, out):
    """``out[16 j + k] = values[j]``, int32 both."""

    def codegen(context, builder, signature, args):
        kinds = signature.args
        args = _as_words(context, builder, kinds, args)

        def body(j, column):
            block = _splat(builder, builder.load(_pointer(context, builder, kinds[0], args[0], j)), BLOCK)
            target = _pointer(context, builder, kinds[2], args[2], column)
            builder.store(block, builder.bitcast(target, block.type.as_pointer()), align=1)

        _for_blocks(builder, args[1], body)
        return context.get_dummy_value()

    return types.void(values, blocks, out), codegen


@inlined
def _buffers(features):
    """``field``, ``power`` (int32, an element a block), ``level``, ``scale`` (float32, whole blocks) and ``u`` (float32 ``[F]``) of one row."""
    blocks = (features + BLOCK - 1) // BLOCK
    level = np.zeros(blocks * BLOCK, np.float32)  # zeros stay behind the last feature
    return (
        np.empty(blocks, np.int32),
        np.empty(blocks, np.int32),
        level,
        np.empty_like(level),
        np.empty(features, np.float32),
    )


@inlined
def _levels_row(x, i, m, seed, stochastic, field, power, level, scale, u):
    """``q`` of the row ``x[i]`` in ``level`` and ``E`` of its blocks in ``field``."""
    f = x.shape[1]
    for k in range(f):
        magnitude = abs(x[i, k])
        level[k] = magnitude if magnitude < INFINITY else np.float32(0)  # NaN likewise
    _largest(level.view(np.int32), field.size, field)
    for j in range(field.size):
        field[j] >>= 23
        power[j] = (255 - field[j]) << 23 if field[j] else 0
    _spread(power, field.size, scale.view(np.int32))
    # 1 / unit in two factors that are normal numbers: 2^(128 - E), but 0 where E is 0, and 2^(m - 2).
    rest, most = np.float32(2.0 ** (m - 2)), np.float32((1 << m) - 1)
    if stochastic:
        uniform_row(seed, i * f, u)
        for k in range(f):
            q = rounded_by(level[k] * scale[k] * rest, u[k])
            level[k] = q if q < most else most
    else:
        for k in range(f):
            q = np.rint(level[k] * scale[k] * rest)
            level[k] = q if q < most else most


@kernel
def _msfp(lo, hi, x, m, seed, stochastic, out):
    f = x.shape[1]
    field, power, level, scale, u = _buffers(f)
    first = np.float32(2.0 ** (1 - m))
    for i in range(lo, hi):
        _levels_row(x, i, m, seed, stochastic, field, power, level, scale, u)
        for j in range(field.size):
            power[j] = field[j] << 23
        _spread(power, field.size, scale.view(np.int32))
        for k in range(f):
            v = x[i, k]
            value = level[k] * first * scale[k]
            value = -value if v < 0 else value
            out[i, k] = value if abs(v) < INFINITY else v


@parallel_kernel
def _msfp_parallel(bounds, x, m, seed, stochastic, out):
    for part in numba.prange(bounds.size - 1):
        _msfp(bounds[part], bounds[part + 1], x, m, seed, stochastic, out)


def msfp(x: Tensor, mantissa_bits: int, seed: int) -> Tensor:
    """:func:`qgnn.kernels.msfp.msfp`."""
    n, f = x.shape
    out = empty((n, f), torch.float32)
    arguments = (array(x.float()), mantissa_bits, np.uint64(max(seed, 0)), seed >= 0, out.numpy())
    parts = parts_for(x.numel())
    if parts > 1:
        with parallel_lock:
            _msfp_parallel(even_bounds(n, parts), *arguments)
    else:
        _msfp(0, n, *arguments)
    return out.to(x.dtype)


@kernel
def _msfp_pack(lo, hi, x, m, seed, stochastic, mantissas, exponents):
    f = x.shape[1]
    field, power, level, scale, u = _buffers(f)
    codes = np.empty(level.size, np.uint8)
    for i in range(lo, hi):
        _levels_row(x, i, m, seed, stochastic, field, power, level, scale, u)
        finite = True
        for k in range(f):
            codes[k] = np.uint8(level[k]) | np.uint8(x[i, k] < 0) << m
            finite &= abs(x[i, k]) < INFINITY
        for k in range(f, codes.size):
            codes[k] = 0
        pack_tight_row(codes, 1 + m, mantissas, i)
        for j in range(field.size):
            exponents[i, j] = field[j]
        if not finite:
            for k in range(f):
                if not abs(x[i, k]) < INFINITY:
                    exponents[i, k // BLOCK] = 255


@parallel_kernel
def _msfp_pack_parallel(bounds, x, m, seed, stochastic, mantissas, exponents):
    for part in numba.prange(bounds.size - 1):
        _msfp_pack(bounds[part], bounds[part + 1], x, m, seed, stochastic, mantissas, exponents)


def msfp_pack(x: Tensor, mantissa_bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """:func:`qgnn.kernels.msfp.msfp_pack`."""
    n, blocks = x.size(0), (x.size(1) + BLOCK - 1) // BLOCK
    mantissas = empty((n, tight_bytes(blocks * BLOCK, 1 + mantissa_bits)), torch.uint8)
    exponents = empty((n, blocks), torch.uint8)
    arguments = (
        array(x.float()), mantissa_bits, np.uint64(max(seed, 0)), seed >= 0, mantissas.numpy(), exponents.numpy()
    )  # fmt: skip
    parts = parts_for(x.numel())
    if parts > 1:
        with parallel_lock:
            _msfp_pack_parallel(even_bounds(n, parts), *arguments)
    else:
        _msfp_pack(0, n, *arguments)
    return mantissas, exponents


@kernel
def _msfp_unpack(lo, hi, mantissas, exponents, m, out):
    f, blocks = out.shape[1], exponents.shape[1]
    codes, power = np.empty(blocks * BLOCK, np.uint8), np.empty(blocks, np.int32)
    scale = np.empty(blocks * BLOCK, np.float32)
    first, low = np.float32(2.0 ** (1 - m)), np.uint8((1 << m) - 1)
    for i in range(lo, hi):
        unpack_tight_row(mantissas, i, 1 + m, codes)
        for j in range(blocks):
            power[j] = np.int32(exponents[i, j]) << 23
        _spread(power, blocks, scale.view(np.int32))
        for k in range(f):
            value = np.float32(np.int32(codes[k] & low)) * first * scale[k]
            out[i, k] = -value if codes[k] > low else value


@parallel_kernel
def _msfp_unpack_parallel(bounds, mantissas, exponents, m, out):
    for part in numba.prange(bounds.size - 1):
        _msfp_unpack(bounds[part], bounds[part + 1], mantissas, exponents, m, out)


def msfp_unpack(mantissas: Tensor, exponents: Tensor, mantissa_bits: int, features: int) -> Tensor:
    """:func:`qgnn.kernels.msfp.msfp_unpack`."""
    n = exponents.size(0)
    out = empty((n, features), torch.float32)
    arguments = (array(mantissas), array(exponents), mantissa_bits, out.numpy())
    parts = parts_for(out.numel())
    if parts > 1:
        with parallel_lock:
            _msfp_unpack_parallel(even_bounds(n, parts), *arguments)
    else:
        _msfp_unpack(0, n, *arguments)
    return out
