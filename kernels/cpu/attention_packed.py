"""Numba graph attention on packed codes, for inference (contract: :mod:`qgnn.kernels.attention`). A source's codes are unpacked
in registers, edge by edge."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from ..packing import row_bytes
from .attention_rows import (
    TILE,
    dot_head,
    exponentials,
    row_scores,
    row_shift,
    row_top,
    row_total,
    run,
    sum_head_codes,
)
from .common import (
    array,
    buckets_of,
    empty_packed,
    even_bounds,
    kernel,
    largest_code,
    optional,
    parallel_kernel,
    parallel_lock,
    parts_for,
    place,
    unpack_row,
)
from .epilogue import epilogue_row, pack_row


@kernel
def _attention_scores(lo, hi, data, stride, container, vectors, out):
    heads, f = out.shape[1] // 2, vectors.shape[1]
    codes, values = np.empty((1, f), np.int32), np.empty((1, f), np.float32)
    for i in range(lo, hi):
        unpack_row(data, i * stride, container, True, f, codes, 0)
        for k in range(f):
            values[0, k] = np.float32(codes[0, k])
        for side in range(2):
            for h in range(heads):
                out[i, side * heads + h] = dot_head(values, 0, vectors, side, h, f // heads)


@parallel_kernel
def _attention_scores_parallel(bounds, data, stride, container, vectors, out):
    for part in numba.prange(bounds.size - 1):
        _attention_scores(bounds[part], bounds[part + 1], data, stride, container, vectors, out)


@kernel
def _gat_packed(
    lo, hi, indptr, indices, lowest, table, container, src, dst, slope, scratch, flat, top, total, col_scale, bias, addend, relu, post_scale,
    post_shift, packs, out_step, out_bits, out_pos, out_buckets, out_signed, floats, packed,
):  # fmt: skip
    heads, f = src.shape[1], floats.shape[1]
    no_scores, nothing, own = np.empty((0, 0), np.float32), np.empty(0, np.float32), np.empty((1, 0), np.int32)
    channels = f // heads
    acc, part = np.empty((1, f), np.float32), np.empty((1, channels + 16), np.float32)
    # as wide as the padded bytes of 1-bit codes, the most that a row of f columns is packed into
    values, s, q = np.zeros((1, f + 128), np.float32), np.ones(f + 128, np.float32), np.zeros(f + 128, np.float32)
    for start in range(lo, hi, TILE):
        stop = min(start + TILE, hi)
        for i in range(start, stop):
            row_scores(indptr[i], indptr[i + 1], i, indices, src, dst, no_scores, slope, scratch)
            row_top(indptr[i], indptr[i + 1], i, lowest, scratch, top)
            row_shift(indptr[i], indptr[i + 1], i, scratch, top)
        exponentials(flat, indptr[start] * heads, indptr[stop] * heads)
        for i in range(start, stop):
            row_total(indptr[i], indptr[i + 1], i, scratch, total)
            for h in range(heads):
                sum_head_codes(indptr[i], indptr[i + 1], indices, table, container, scratch, h, channels, part, acc)
                for k in range(h * channels, (h + 1) * channels):
                    acc[0, k] /= total[i, h]
            if packs:
                epilogue_row(
                    acc, 0, f, nothing, nothing, own, col_scale, bias, addend, relu, post_scale, post_shift, i, values, 0, False,
                )  # fmt: skip
                largest = np.float32(largest_code(out_bits[i], out_signed))
                for k in range(f):
                    s[k] = out_step[i]
                    q[k] = largest
                width, begin, size = place(out_buckets, out_pos, i)
                pack_row(width, values, s, q, out_signed, packed, begin, size)
            else:
                epilogue_row(
                    acc, 0, f, nothing, nothing, own, col_scale, bias, addend, relu, post_scale, post_shift, i, floats, i, False,
                )  # fmt: skip


@parallel_kernel
def _gat_packed_parallel(
    bounds, indptr, indices, lowest, table, container, src, dst, slope, scratch, flat, top, total, col_scale, bias, addend, relu, post_scale,
    post_shift, packs, out_step, out_bits, out_pos, out_buckets, out_signed, floats, packed,
):  # fmt: skip
    for part in numba.prange(bounds.size - 1):
        _gat_packed(
            bounds[part], bounds[part + 1], indptr, indices, lowest, table, container, src, dst, slope, scratch, flat, top, total, col_scale,
            bias, addend, relu, post_scale, post_shift, packs, out_step, out_bits, out_pos, out_buckets, out_signed, floats, packed,
        )  # fmt: skip


def attention_scores(x: Tensor, container: int, sources: int, heads: int, channels: int, vectors: Tensor) -> Tensor:
    out = torch.empty(sources, 2 * heads, dtype=torch.float32)
    arguments = (array(x), row_bytes(container, heads * channels), container, array(vectors), out.numpy())
    parts = parts_for(sources * heads * channels)
    if parts > 1:
        with parallel_lock:
            _attention_scores_parallel(even_bounds(sources, parts), *arguments)
    elif heads:
        _attention_scores(0, sources, *arguments)
    return out


def gat_packed(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, heads: int, channels: int, src: Tensor,
    dst: Tensor, negative_slope: float, output: str, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None, relu: bool,
    post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    n, f, packs = indptr.numel() - 1, heads * channels, output == "rows"
    stride = row_bytes(container, f)
    scratch, (top, total) = np.empty((indices.numel(), heads), np.float32), np.empty((2, n, heads), np.float32)
    floats = torch.empty(0 if packs else n, f, dtype=torch.float32)
    packed = empty_packed(out_counts, f) if packs else torch.empty(0, dtype=torch.uint8)
    if not f:
        return packed if packs else floats
    run(
        _gat_packed, _gat_packed_parallel, indices.numel() * (f + heads), array(indptr.to(torch.int64)),
        array(indices), np.finfo(np.float32).min, array(x)[: sources * stride].reshape(sources, stride), container, array(src), array(dst),
        np.float32(negative_slope),
        scratch, scratch.reshape(-1), top, total, *(optional(t, torch.float32) for t in (col_scale, bias)), optional(addend, torch.float32, 2), relu,
        *(optional(t, torch.float32) for t in (post_scale, post_shift)), packs, optional(out_step, torch.float32), optional(out_bits, torch.uint8),
        optional(out_pos, torch.int32), buckets_of(out_counts, f) if packs else np.empty((4, 0), np.int64), out_signed, floats.numpy(),
        packed.numpy(),
    )  # fmt: skip
    return packed if packs else floats
