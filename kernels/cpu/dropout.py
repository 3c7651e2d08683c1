"""Numba kernels of :mod:`qgnn.kernels.dropout`: chunk by chunk, each step a loop that runs in vectors."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..random import threshold
from .common import array, as_computed, kernel, parallel_kernel, run_ranges, spread_bits
from .memory import empty
from .random import words_row

CHUNK = 1024
"""Elements of which words and flags lie in the first cache; a whole number of bytes of bits."""

# A product with this moves the lowest bits of 8 bytes into the highest byte, the first byte's to bit 0.
GATHER, HIGHEST = np.uint64(0x0102040810204080), np.uint64(56)


@kernel
def _dropout(lo, hi, x, least, factor, seed, relu, out, bits):
    """Chunks ``lo`` to ``hi``; a negative ``seed`` drops nothing."""
    zero = x.dtype.type(0)
    words, flags = np.empty(CHUNK, np.uint32), np.zeros(CHUNK, np.uint8)
    words[:] = np.uint32(0xFFFFFFFF)
    groups = flags.view(np.uint64)
    for chunk in range(lo, hi):
        first = chunk * CHUNK
        # Numba takes `first + k` for an index that could be negative: such a loop would not run in vectors.
        values, results = x[first : first + CHUNK], out[first : first + CHUNK]
        count = values.size
        if seed >= 0:
            words_row(np.uint64(seed), first // 2, words)
        if relu:
            for k in range(count):
                v = values[k]
                v = zero if v <= zero else v
                v *= factor
                value = zero if words[k] < least else v
                results[k] = value
                flags[k] = np.uint8(0 if value > zero else 1)
        else:
            for k in range(count):
                dropped, v = words[k] < least, values[k] * factor
                results[k] = zero if dropped else v
                flags[k] = np.uint8(1 if dropped else 0)
        for k in range(count, (count + 7) // 8 * 8):
            flags[k] = 0
        packed = bits[first // 8 : (first + CHUNK) // 8]
        for g in range(packed.size):
            packed[g] = np.uint8((groups[g] * GATHER) >> HIGHEST)


@kernel
def _backward(lo, hi, grad, bits, factor, out):
    zero = grad.dtype.type(0)
    flags = np.empty(CHUNK, np.uint8)
    for chunk in range(lo, hi):
        first = chunk * CHUNK
        values, results = grad[first : first + CHUNK], out[first : first + CHUNK]
        spread_bits(bits[first // 8 : (first + CHUNK) // 8], flags)
        for k in range(values.size):
            v = values[k] * factor
            results[k] = zero if flags[k] else v


@parallel_kernel
def _dropout_parallel(bounds, x, least, factor, seed, relu, out, bits):
    for part in numba.prange(bounds.size - 1):
        _dropout(bounds[part], bounds[part + 1], x, least, factor, seed, relu, out, bits)


@parallel_kernel
def _backward_parallel(bounds, grad, bits, factor, out):
    for part in numba.prange(bounds.size - 1):
        _backward(bounds[part], bounds[part + 1], grad, bits, factor, out)


def _flat(x: Tensor) -> Any:
    return array(as_computed(x)).reshape(-1)


def dropout(x: Tensor, p: float, seed: Tensor | None, relu: bool) -> tuple[Tensor, Tensor]:
    """Values and bits."""
    flat = _flat(x)
    out = empty(tuple(x.shape), torch.float64 if x.dtype == torch.float64 else torch.float32)
    bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8)
    factor, drawn = flat.dtype.type(1 / (1 - p)), -1 if seed is None else int(seed)
    arguments = flat, np.uint32(threshold(p)), factor, drawn, relu, out.numpy().reshape(-1), bits.numpy()
    run_ranges(_dropout, _dropout_parallel, -(-x.numel() // CHUNK), x.numel(), *arguments)
    return out.to(x.dtype), bits


def dropout_backward(grad: Tensor, bits: Tensor, p: float) -> Tensor:
    """Masked and scaled gradient."""
    flat = _flat(grad)
    out = empty(tuple(grad.shape), torch.float64 if grad.dtype == torch.float64 else torch.float32)
    arguments = flat, array(bits), flat.dtype.type(1 / (1 - p)), out.numpy().reshape(-1)
    run_ranges(_backward, _backward_parallel, -(-grad.numel() // CHUNK), grad.numel(), *arguments)
    return out.to(grad.dtype)
