"""Numba kernels of :mod:`qgnn.kernels.fixed_point`: row by row, each step a loop that runs in vectors."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..packing import code_range, tight_bytes
from ..random import NEAREST
from .common import array, as_computed, inlined, kernel, parallel_kernel, run_ranges
from .fixed_rows import NARROW, codes_row, container, joined, parameter, rows_of
from .memory import empty
from .own_range import own_range_codes
from .tight import pack_tight_row, unpack_tight_row
from .transpose import transpose_codes

__all__ = [
    "fixed_point", "fixed_point_codes", "fixed_point_pack", "fixed_point_unpack", "loosen", "own_range_codes",
    "tighten", "transpose_codes",
]  # fmt: skip


@inlined
def _byte_row(codes, out, i):
    """``out[i]`` = codes as bytes, and zeros behind the last one."""
    for k in range(codes.size):
        out[i, k] = np.uint8(np.int32(codes[k]))
    for k in range(codes.size, out.shape[1]):
        out[i, k] = 0


@kernel
def _values(lo, hi, x, scale, offset, lowest, highest, seed, out):
    f = x.shape[1]
    codes, u = np.empty(f, x.dtype), np.empty(f, np.float32)
    for i in range(lo, hi):
        c, d = parameter(scale, i), parameter(offset, i)
        codes_row(x, i, c, d, lowest, highest, seed, i * f, u, codes)
        for k in range(f):
            value, v = c * (codes[k] + d), x[i, k]
            out[i, k] = value if v == v else v


@kernel
def _bytes(lo, hi, x, scale, offset, lowest, highest, seed, bits, out):
    """Tight rows of ``bits``; rows of bytes, with zeros behind the last code, where ``bits`` is 0."""
    f = x.shape[1]
    codes, u = np.empty(f, x.dtype), np.empty(f, np.float32)
    row = np.zeros((f + 7) // 8 * 8, np.uint8)
    for i in range(lo, hi):
        codes_row(x, i, parameter(scale, i), parameter(offset, i), lowest, highest, seed, i * f, u, codes)
        if bits:
            for k in range(f):
                row[k] = np.uint8(np.int32(codes[k] - lowest))
            for k in range(f, row.size):
                row[k] = 0
            pack_tight_row(row, bits, out, i)
        else:
            _byte_row(codes, out, i)


@kernel
def _unpack(lo, hi, data, scale, offset, bits, lowest, out):
    f = out.shape[1]
    row = np.empty((f + 7) // 8 * 8, np.uint8)
    for i in range(lo, hi):
        c, d = parameter(scale, i), parameter(offset, i)
        unpack_tight_row(data, i, bits, row)
        for k in range(f):
            out[i, k] = c * (np.float32(np.int32(row[k]) + lowest) + d)


@kernel
def _tighten(lo, hi, data, features, bits, lowest, out):
    row = np.zeros((features + 7) // 8 * 8, np.uint8)
    for i in range(lo, hi):
        for k in range(features):
            row[k] = np.uint8(data[i, k] - lowest)
        for k in range(features, row.size):
            row[k] = 0
        pack_tight_row(row, bits, out, i)


@kernel
def _loosen(lo, hi, data, features, bits, lowest, out):
    row = np.empty((features + 7) // 8 * 8, np.uint8)
    for i in range(lo, hi):
        unpack_tight_row(data, i, bits, row)
        for k in range(features):
            out[i, k] = np.uint8(row[k] + lowest)
        for k in range(features, out.shape[1]):
            out[i, k] = 0


@parallel_kernel
def _values_parallel(bounds, x, scale, offset, lowest, highest, seed, out):
    for part in numba.prange(bounds.size - 1):
        _values(bounds[part], bounds[part + 1], x, scale, offset, lowest, highest, seed, out)


@parallel_kernel
def _bytes_parallel(bounds, x, scale, offset, lowest, highest, seed, bits, out):
    for part in numba.prange(bounds.size - 1):
        _bytes(bounds[part], bounds[part + 1], x, scale, offset, lowest, highest, seed, bits, out)


@parallel_kernel
def _unpack_parallel(bounds, data, scale, offset, bits, lowest, out):
    for part in numba.prange(bounds.size - 1):
        _unpack(bounds[part], bounds[part + 1], data, scale, offset, bits, lowest, out)


@parallel_kernel
def _tighten_parallel(bounds, data, features, bits, lowest, out):
    for part in numba.prange(bounds.size - 1):
        _tighten(bounds[part], bounds[part + 1], data, features, bits, lowest, out)


@parallel_kernel
def _loosen_parallel(bounds, data, features, bits, lowest, out):
    for part in numba.prange(bounds.size - 1):
        _loosen(bounds[part], bounds[part + 1], data, features, bits, lowest, out)


def _quantizer(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> tuple[Any, ...]:
    """The arguments that :func:`codes_row` is called with; the range of codes in the dtype of ``x``."""
    view = array(x)
    lowest, highest = (view.dtype.type(code) for code in code_range(bits, signed))
    return view, array(scale.to(x.dtype)).reshape(-1), array(offset.to(x.dtype)).reshape(-1), lowest, highest, seed


def fixed_point(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    """Quantized values."""
    wide = as_computed(x)
    out = empty(tuple(x.shape), wide.dtype)
    arguments = _quantizer(wide, scale, offset, bits, signed, seed)
    run_ranges(_values, _values_parallel, x.size(0), x.numel(), *arguments, out.numpy())
    return out.to(x.dtype)


def fixed_point_codes(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    """Codes in rows of bytes."""
    n, f = x.shape
    data, rows = container(n, f)
    values, *quantizer = _quantizer(as_computed(x), scale, offset, bits, signed, seed)
    split = 0
    if 0 < f < NARROW and seed == NEAREST and scale.numel() == offset.numel() == 1:
        wide = joined(f)
        split = n * f // wide * (wide // f)
        arguments = values[:split].reshape(-1, wide), *quantizer, 0, rows[:split].reshape(-1, wide)
        run_ranges(_bytes, _bytes_parallel, n * f // wide, n * f, *arguments)
    run_ranges(_bytes, _bytes_parallel, n - split, (n - split) * f, values[split:], *quantizer, 0, rows[split:])
    return data


def fixed_point_pack(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    """Codes in tight rows."""
    n, f = x.shape
    out = empty((n, tight_bytes(f, bits)), torch.uint8)
    arguments = _quantizer(as_computed(x), scale, offset, bits, signed, seed)
    run_ranges(_bytes, _bytes_parallel, n, x.numel(), *arguments, bits, out.numpy())
    return out


def fixed_point_unpack(data: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, features: int) -> Tensor:
    """Values of tight rows."""
    out = empty((data.size(0), features), torch.float32)
    parameters = array(scale).reshape(-1), array(offset).reshape(-1)
    lowest = np.int32(code_range(bits, signed)[0])
    run_ranges(
        _unpack, _unpack_parallel, data.size(0), out.numel(), array(data), *parameters, bits, lowest, out.numpy()
    )
    return out


def tighten(data: Tensor, rows: int, features: int, bits: int, signed: bool) -> Tensor:
    """Rows of bytes to tight rows."""
    out = empty((rows, tight_bytes(features, bits)), torch.uint8)
    lowest = np.uint8(code_range(bits, signed)[0] & 255)
    arguments = rows_of(data, rows, features), features, bits, lowest, out.numpy()
    run_ranges(_tighten, _tighten_parallel, rows, rows * features, *arguments)
    return out


def loosen(data: Tensor, bits: int, signed: bool, features: int) -> Tensor:
    """Tight rows to rows of bytes."""
    out, rows = container(data.size(0), features)
    lowest = np.uint8(code_range(bits, signed)[0] & 255)
    arguments = array(data), features, bits, lowest, rows
    run_ranges(_loosen, _loosen_parallel, data.size(0), data.size(0) * features, *arguments)
    return out
