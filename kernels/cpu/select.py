"""Numba kernels of :mod:`qgnn.kernels.select`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from .common import (
    ROW,
    array,
    buckets_of,
    empty_packed,
    even_bounds,
    inlined,
    kernel,
    optional,
    parallel_kernel,
    parallel_lock,
    parts_for,
    place,
    prefetch,
)
from .memory import empty

AHEAD = 16
"""Rows between the one that is read and the one whose bytes are asked for. 100,000 rows of 128 bytes out of a million, one thread of Zen 4 on a
shared core: 27 ms of its time with 0, 15 with 4 and with 16, 18 with 64."""

LINE = 64
"""Bytes of a cache line."""

NO_STEP = np.empty((1, 0), np.float32)


@inlined
def ask_for(data, step, pos, buckets, index, r):
    """Asks for the cache lines of a row that is wanted soon, and of its step; ``data`` and ``step`` are ``[1, n]``."""
    if r < index.size:
        _, start, stride = place(buckets, pos, index[r])
        for column in range(start, start + stride, LINE):
            prefetch(data, 0, column)
        if step.size:
            prefetch(step, 0, index[r])


@inlined
def values_row(codes, container, half, step, out):
    """``step`` times the codes of one packed row; a row without storage is 0."""
    features = out.size
    if container == 0:
        for k in range(features):
            out[k] = 0
    elif container == 8:
        for k in range(features):
            out[k] = step * np.float32((np.int32(codes[k]) ^ half) - half)
    else:
        lanes, mask = 8 // container, np.int32((1 << container) - 1)
        whole = features // lanes
        if container == 4:
            for j in range(whole):
                b = np.int32(codes[j])
                out[2 * j] = step * np.float32(((b & 15) ^ half) - half)
                out[2 * j + 1] = step * np.float32(((b >> 4) ^ half) - half)
        elif container == 2:
            for j in range(whole):
                b = np.int32(codes[j])
                out[4 * j] = step * np.float32(((b & 3) ^ half) - half)
                out[4 * j + 1] = step * np.float32(((b >> 2 & 3) ^ half) - half)
                out[4 * j + 2] = step * np.float32(((b >> 4 & 3) ^ half) - half)
                out[4 * j + 3] = step * np.float32(((b >> 6) ^ half) - half)
        else:
            for j in range(whole):
                b = np.int32(codes[j])
                for lane in range(8):
                    out[8 * j + lane] = step * np.float32(((b >> lane & 1) ^ half) - half)
        for k in range(whole * lanes, features):
            code = np.int32(codes[whole]) >> ((k - whole * lanes) * container) & mask
            out[k] = step * np.float32((code ^ half) - half)


@kernel
def _rows(lo, hi, data, step, pos, buckets, index, signed, out):
    for r in range(lo, hi):
        ask_for(data, step, pos, buckets, index, r + AHEAD)
        i = index[r]
        container, start, stride = place(buckets, pos, i)
        half = np.int32(1 << (container - 1) if signed and container else 0)
        # A slice: an index that counts from 0 is known not to be negative, so that the loops over it become vector instructions.
        values_row(data[0, start : start + stride], container, half, step[0, i], out[r])


@parallel_kernel
def _rows_parallel(bounds, data, step, pos, buckets, index, signed, out):
    for part in numba.prange(bounds.size - 1):
        _rows(bounds[part], bounds[part + 1], data, step, pos, buckets, index, signed, out)


@kernel
def _codes(lo, hi, data, pos, buckets, index, out_pos, out_buckets, out):
    for r in range(lo, hi):
        ask_for(data, NO_STEP, pos, buckets, index, r + AHEAD)
        _, start, stride = place(buckets, pos, index[r])
        _, target, _ = place(out_buckets, out_pos, r)
        source, copy = data[0, start : start + stride], out[target : target + stride]
        for b in range(stride):
            copy[b] = source[b]


@parallel_kernel
def _codes_parallel(bounds, data, pos, buckets, index, out_pos, out_buckets, out):
    for part in numba.prange(bounds.size - 1):
        _codes(bounds[part], bounds[part + 1], data, pos, buckets, index, out_pos, out_buckets, out)


def _run(serial: Callable[..., None], parallel: Callable[..., None], rows: int, work: int, *arguments: Any) -> None:
    parts = parts_for(work)
    if parts > 1:
        with parallel_lock:
            parallel(even_bounds(rows, parts), *arguments)
    else:
        serial(0, rows, *arguments)


def select_rows(
    data: Tensor, step: Tensor, pos: Tensor | None, counts: Sequence[int], index: Tensor, features: int, signed: bool
) -> Tensor:
    """:func:`qgnn.kernels.select.select_rows`."""
    out = empty((index.numel(), features), torch.float32)
    _run(
        _rows, _rows_parallel, index.numel(), out.numel(),
        array(data.view(1, -1)), array(step.view(1, -1)), optional(pos, torch.int32), buckets_of(counts, features), array(index), signed,
        out.numpy(),
    )  # fmt: skip
    return out


def select_codes(
    data: Tensor, pos: Tensor | None, counts: Sequence[int], index: Tensor, features: int, out_pos: Tensor | None,
    out_counts: Sequence[int],
) -> Tensor:  # fmt: skip
    """:func:`qgnn.kernels.select.select_codes`."""
    out = empty_packed(out_counts, features)
    _run(
        _codes, _codes_parallel, index.numel(), index.numel() * ROW,
        array(data.view(1, -1)), optional(pos, torch.int32), buckets_of(counts, features), array(index),
        optional(out_pos, torch.int32), buckets_of(out_counts, features), out.numpy(),
    )  # fmt: skip
    return out
