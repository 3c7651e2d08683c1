"""Numba kernels of :mod:`qgnn.kernels.attention`.

Rows are taken in tiles: their scores go to a scratch ``[E, H]``, which is contiguous over a tile, so that one long loop takes the exponentials of
all of them. A row is summed by one thread, in the order of its edges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from .attention_packed import attention_scores, gat_packed
from .attention_rows import (
    TILE,
    dot_head,
    exponentials,
    row_scores,
    row_shift,
    row_top,
    row_total,
    run,
    score,
    sum_heads,
)
from .common import Array, array, as_computed, kernel, parallel_kernel

__all__ = [
    "attention_scores",
    "edge_softmax",
    "edge_softmax_backward",
    "gat_aggregate",
    "gat_backward",
    "gat_packed",
]


@kernel
def _softmax(lo, hi, indptr, lowest, scores, flat, top, total):
    """Turns ``scores``, of which ``flat`` is a flat view, into alpha."""
    heads = scores.shape[1]
    for start in range(lo, hi, TILE):
        stop = min(start + TILE, hi)
        for i in range(start, stop):
            row_top(indptr[i], indptr[i + 1], i, lowest, scores, top)
            row_shift(indptr[i], indptr[i + 1], i, scores, top)
        exponentials(flat, indptr[start] * heads, indptr[stop] * heads)
        for i in range(start, stop):
            row_total(indptr[i], indptr[i + 1], i, scores, total)
            for e in range(indptr[i], indptr[i + 1]):
                for h in range(heads):
                    scores[e, h] /= total[i, h]


@parallel_kernel
def _softmax_parallel(bounds, indptr, lowest, scores, flat, top, total):
    for part in numba.prange(bounds.size - 1):
        _softmax(bounds[part], bounds[part + 1], indptr, lowest, scores, flat, top, total)


@kernel
def _softmax_bwd(lo, hi, indptr, alpha, grad, inner, out):
    heads = alpha.shape[1]
    for i in range(lo, hi):
        for h in range(heads):
            inner[i, h] = 0
        for e in range(indptr[i], indptr[i + 1]):
            for h in range(heads):
                out[e, h] = alpha[e, h] * grad[e, h]
                inner[i, h] += out[e, h]
        for e in range(indptr[i], indptr[i + 1]):
            for h in range(heads):
                out[e, h] -= alpha[e, h] * inner[i, h]


@parallel_kernel
def _softmax_bwd_parallel(bounds, indptr, alpha, grad, inner, out):
    for part in numba.prange(bounds.size - 1):
        _softmax_bwd(bounds[part], bounds[part + 1], indptr, alpha, grad, inner, out)


@kernel
def _gat(lo, hi, indptr, indices, lowest, x, src, dst, edge_score, scale, slope, scratch, flat, out, top, total):
    heads = src.shape[1]
    channels = x.shape[1] // heads
    for start in range(lo, hi, TILE):
        stop = min(start + TILE, hi)
        for i in range(start, stop):
            row_scores(indptr[i], indptr[i + 1], i, indices, src, dst, edge_score, slope, scratch)
            row_top(indptr[i], indptr[i + 1], i, lowest, scratch, top)
            row_shift(indptr[i], indptr[i + 1], i, scratch, top)
        exponentials(flat, indptr[start] * heads, indptr[stop] * heads)
        for i in range(start, stop):
            first, last = indptr[i], indptr[i + 1]
            row_total(first, last, i, scratch, total)
            if scale.size:
                for e in range(first, last):
                    for h in range(heads):
                        scratch[e, h] *= scale[e, h]
            sum_heads(first, last, indices, x, scratch, None, channels, out, i)
            for h in range(heads):
                for k in range(h * channels, (h + 1) * channels):
                    out[i, k] /= total[i, h]


@parallel_kernel
def _gat_parallel(
    bounds, indptr, indices, lowest, x, src, dst, edge_score, scale, slope, scratch, flat, out, top, total
):  # fmt: skip
    for part in numba.prange(bounds.size - 1):
        _gat(
            bounds[part], bounds[part + 1], indptr, indices, lowest, x, src, dst, edge_score, scale, slope, scratch, flat, out, top, total
        )  # fmt: skip


@kernel
def _gat_edges_bwd(
    lo, hi, indptr, indices, x, grad, src, dst, edge_score, scale, slope, out, top, total, scratch, flat, draw, grad_dst
):  # fmt: skip
    """``draw``, its row sums ``grad_dst``, and ``alpha * scale`` in ``scratch``."""
    heads = src.shape[1]
    channels = x.shape[1] // heads
    zero, one = x.dtype.type(0), x.dtype.type(1)
    inner = np.empty(heads, x.dtype)
    share = np.empty(heads, x.dtype)
    for start in range(lo, hi, TILE):
        stop = min(start + TILE, hi)
        for i in range(start, stop):
            row_scores(indptr[i], indptr[i + 1], i, indices, src, dst, edge_score, slope, scratch)
            row_shift(indptr[i], indptr[i + 1], i, scratch, top)
        exponentials(flat, indptr[start] * heads, indptr[stop] * heads)
        for i in range(start, stop):
            for h in range(heads):
                inner[h] = dot_head(grad, i, out, i, h, channels)
                share[h] = one / total[i, h]
                grad_dst[i, h] = 0
            for e in range(indptr[i], indptr[i + 1]):
                j = indices[e]
                for h in range(heads):
                    alpha = scratch[e, h] * share[h]
                    factor = scale[e, h] if scale.size else one
                    d = alpha * (factor * dot_head(x, j, grad, i, h, channels) - inner[h])
                    d = d if score(e, h, i, j, src, dst, edge_score) > zero else slope * d
                    draw[e, h] = d
                    grad_dst[i, h] += d
                    scratch[e, h] = alpha * factor


@parallel_kernel
def _gat_edges_bwd_parallel(
    bounds, indptr, indices, x, grad, src, dst, edge_score, scale, slope, out, top, total, scratch, flat, draw, grad_dst
):  # fmt: skip
    for part in numba.prange(bounds.size - 1):
        _gat_edges_bwd(
            bounds[part], bounds[part + 1], indptr, indices, x, grad, src, dst, edge_score, scale, slope, out, top, total, scratch, flat, draw,
            grad_dst,
        )  # fmt: skip


@kernel
def _gat_sources_bwd(lo, hi, indptr, targets, edges, grad, weight, draw, grad_x, grad_src):
    heads = weight.shape[1]
    channels = grad.shape[1] // heads
    for j in range(lo, hi):
        first, last = indptr[j], indptr[j + 1]
        sum_heads(first, last, targets, grad, weight, edges, channels, grad_x, j)
        for h in range(heads):
            grad_src[j, h] = 0
        for t in range(first, last):
            for h in range(heads):
                grad_src[j, h] += draw[edges[t], h]


@parallel_kernel
def _gat_sources_bwd_parallel(bounds, indptr, targets, edges, grad, weight, draw, grad_x, grad_src):
    for part in numba.prange(bounds.size - 1):
        _gat_sources_bwd(bounds[part], bounds[part + 1], indptr, targets, edges, grad, weight, draw, grad_x, grad_src)


def _offsets(indptr: Tensor) -> Array:
    return array(indptr.to(torch.int64))


def _matrix(tensor: Tensor, dtype: torch.dtype) -> Array:
    """``[., H, C]`` as ``[., H * C]``."""
    return array(tensor.to(dtype)).reshape(tensor.size(0), tensor.size(1) * tensor.size(2))


def _edge_operand(tensor: Tensor | None, dtype: torch.dtype) -> Array:
    """``[E, H]``; nothing becomes an array without elements."""
    return array(torch.empty(0, 0, dtype=dtype) if tensor is None else tensor.to(dtype))


def edge_softmax(indptr: Tensor, rows: Tensor, schedule: Sequence[Tensor], scores: Tensor) -> Tensor:
    alpha = array(as_computed(scores)).copy()
    top, total = np.empty((2, indptr.numel() - 1, scores.size(1)), alpha.dtype)
    lowest = np.finfo(alpha.dtype).min
    run(_softmax, _softmax_parallel, alpha.size, _offsets(indptr), lowest, alpha, alpha.reshape(-1), top, total)
    return torch.from_numpy(alpha).to(scores.dtype)


def edge_softmax_backward(
    indptr: Tensor, rows: Tensor, schedule: Sequence[Tensor], alpha: Tensor, grad: Tensor
) -> Tensor:
    wide = as_computed(alpha)
    out = torch.empty(wide.shape, dtype=wide.dtype)
    inner = np.empty((indptr.numel() - 1, alpha.size(1)), out.numpy().dtype)
    arguments = (array(wide), array(grad.to(wide.dtype)), inner, out.numpy())
    run(_softmax_bwd, _softmax_bwd_parallel, alpha.numel(), _offsets(indptr), *arguments)
    return out.to(alpha.dtype)


def gat_aggregate(
    indptr: Tensor, indices: Tensor, rows: Tensor, schedule: Sequence[Tensor], x: Tensor, src: Tensor, dst: Tensor, edge_score: Tensor | None,
    scale: Tensor | None, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = as_computed(x[:0]).dtype
    table, n, heads = _matrix(x, dtype), indptr.numel() - 1, x.size(1)
    out = torch.empty(n, heads, x.size(2), dtype=dtype)
    top, total = (torch.empty(n, heads, dtype=dtype) for _ in range(2))
    scratch = np.empty((indices.numel(), heads), table.dtype)
    run(
        _gat, _gat_parallel, indices.numel() * heads * (x.size(2) + 1), _offsets(indptr),
        array(indices), np.finfo(table.dtype).min, table, array(src.to(dtype)), array(dst.to(dtype)), _edge_operand(edge_score, dtype),
        _edge_operand(scale, dtype), table.dtype.type(negative_slope), scratch, scratch.reshape(-1), out.numpy().reshape(n, table.shape[1]),
        top.numpy(), total.numpy(),
    )  # fmt: skip
    return out.to(x.dtype), top, total


def gat_backward(
    indptr: Tensor, indices: Tensor, rows: Tensor, schedule: Sequence[Tensor], transposed: Sequence[Tensor], grad: Tensor, x: Tensor, src: Tensor,
    dst: Tensor, edge_score: Tensor | None, scale: Tensor | None, out: Tensor, top: Tensor, total: Tensor, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype, heads, work = total.dtype, x.size(1), indices.numel() * x.size(1) * (x.size(2) + 1)
    upstream = _matrix(grad, dtype)
    draw = torch.empty(indices.numel(), heads, dtype=dtype)
    grad_src, grad_dst = (torch.empty(size, heads, dtype=dtype) for size in (x.size(0), indptr.numel() - 1))
    scratch = np.empty(draw.shape, upstream.dtype)
    run(
        _gat_edges_bwd, _gat_edges_bwd_parallel, work, _offsets(indptr),
        array(indices), _matrix(x, dtype), upstream, array(src.to(dtype)), array(dst.to(dtype)), _edge_operand(edge_score, dtype),
        _edge_operand(scale, dtype), upstream.dtype.type(negative_slope), _matrix(out, dtype), array(top), array(total), scratch,
        scratch.reshape(-1), draw.numpy(), grad_dst.numpy(),
    )  # fmt: skip
    grad_x = torch.empty(x.shape, dtype=dtype)
    by_source, targets, edges = transposed[:3]
    run(
        _gat_sources_bwd, _gat_sources_bwd_parallel, work, _offsets(by_source),
        array(targets), array(edges), upstream, scratch, draw.numpy(), grad_x.numpy().reshape(x.size(0), upstream.shape[1]), grad_src.numpy(),
    )  # fmt: skip
    return grad_x.to(x.dtype), grad_src, grad_dst, draw
