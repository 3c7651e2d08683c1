"""Numba kernels of :mod:`qgnn.kernels.aggregate`: float sums, and what the other files of the operation hold."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from ..packing import row_bytes, uniform_counts
from .aggregate_extreme import aggregate_arg_backward, run_extreme
from .aggregate_packed import aggregate_packed
from .common import (
    Array,
    array,
    as_computed,
    buckets_of,
    even_bounds,
    inlined,
    kernel,
    optional,
    parallel_kernel,
    parallel_lock,
    parts_for,
    place,
    prefetch,
    sum_kernel,
    unpack_row,
)
from .gather import AHEAD, sum_1, sum_2, sum_4, sum_8, sum_16, sum_32, sum_64, sum_128
from .plan import Plan

__all__ = ["aggregate", "aggregate_arg_backward", "aggregate_packed", "aggregate_rows", "edge_dot"]


@inlined
def _sum_row(first, last, indices, x, step, weight, out, i):
    """``out[i]`` = sum of ``weight[e] * step[source] * x[source]`` over the edges ``first`` to ``last``, in their
    order."""
    f = x.shape[1]
    k = 0
    while k + 128 <= f:
        sum_128(indices, first, last, x, k, step, weight, out, i)
        k += 128
    if f & 64:
        sum_64(indices, first, last, x, k, step, weight, out, i)
        k += 64
    if f & 32:
        sum_32(indices, first, last, x, k, step, weight, out, i)
        k += 32
    if f & 16:
        sum_16(indices, first, last, x, k, step, weight, out, i)
        k += 16
    if f & 8:
        sum_8(indices, first, last, x, k, step, weight, out, i)
        k += 8
    if f & 4:
        sum_4(indices, first, last, x, k, step, weight, out, i)
        k += 4
    if f & 2:
        sum_2(indices, first, last, x, k, step, weight, out, i)
        k += 2
    if f & 1:
        sum_1(indices, first, last, x, k, step, weight, out, i)


@inlined
def _finish_sum(i, degree, mean, row_scale, bias, relu, out):
    f = out.shape[1]
    if mean:
        scale = out.dtype.type(1) / out.dtype.type(max(degree, 1))
        for k in range(f):
            out[i, k] *= scale
    if row_scale.size:
        for k in range(f):
            out[i, k] *= row_scale[i]
    if bias.size:
        for k in range(f):
            out[i, k] += bias[k]
    if relu:
        for k in range(f):
            out[i, k] = out.dtype.type(0) if out[i, k] < 0 else out[i, k]


@kernel
def _sum(lo, hi, indptr, indices, hub, x, step, weight, mean, row_scale, bias, relu, out):
    for i in range(lo, hi):
        first, last = indptr[i], indptr[i + 1]
        if last - first < hub:
            _sum_row(first, last, indices, x, step, weight, out, i)
            _finish_sum(i, last - first, mean, row_scale, bias, relu, out)


@kernel
def _sum_segments(lo, hi, segments, indices, x, step, weight, slots):
    for j in range(lo, hi):
        slot = segments[j, 3]
        _sum_row(segments[j, 1], segments[j, 2], indices, x, step, weight, slots, slot)


@kernel
def _add_slots(hubs, indptr, slots, mean, row_scale, bias, relu, out):
    for h in range(hubs.shape[0]):
        i = hubs[h, 0]
        out[i] = 0
        for slot in range(hubs[h, 1], hubs[h, 1] + hubs[h, 2]):
            for k in range(out.shape[1]):
                out[i, k] += slots[slot, k]
        _finish_sum(i, indptr[i + 1] - indptr[i], mean, row_scale, bias, relu, out)


@parallel_kernel
def _sum_parallel(
    bounds, cuts, indptr, indices, hub, segments, x, step, weight, mean, row_scale, bias, relu, out, slots
):  # fmt: skip
    for part in numba.prange(bounds.size - 1):
        _sum_segments(cuts[part], cuts[part + 1], segments, indices, x, step, weight, slots)
        _sum(bounds[part], bounds[part + 1], indptr, indices, hub, x, step, weight, mean, row_scale, bias, relu, out)


def _run_sum(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Array, step: Array | None, weight: Array | None,
    mean: bool, row_scale: Array, bias: Array, relu: bool, out: Array,
) -> None:  # fmt: skip
    plan = Plan(indptr, indices, schedule, x.shape[1])
    slots = np.empty((plan.slots, x.shape[1]), out.dtype)
    if plan.parts > 1:
        cuts = even_bounds(plan.segments.shape[0], plan.parts)
        with parallel_lock:
            _sum_parallel(
                plan.row_bounds(), cuts, plan.indptr, plan.indices, plan.hub, plan.segments, x, step, weight, mean,
                row_scale, bias, relu, out, slots,
            )  # fmt: skip
    else:
        if plan.slots:
            _sum_segments(0, plan.segments.shape[0], plan.segments, plan.indices, x, step, weight, slots)
        _sum(0, plan.n, plan.indptr, plan.indices, plan.hub, x, step, weight, mean, row_scale, bias, relu, out)
    if plan.slots:
        _add_slots(plan.hubs, plan.indptr, slots, mean, row_scale, bias, relu, out)


def aggregate(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    """Sum, mean, max or min of the neighbours' rows."""
    wide = as_computed(x)
    source, scale = array(wide), optional(weight, wide.dtype)
    out = torch.empty(indptr.numel() - 1, x.size(1), dtype=wide.dtype)
    if reduce in ("sum", "mean"):
        nothing = np.empty(0, source.dtype)
        factor = None if weight is None else scale
        _run_sum(
            indptr, indices, schedule, source, None, factor, reduce == "mean", nothing, nothing, False, out.numpy()
        )
        return out.to(x.dtype), indptr.new_empty(0)
    arg = torch.empty(out.shape, dtype=indptr.dtype)
    run_extreme(indptr, indices, schedule, source, scale, reduce == "max", out.numpy(), arg.numpy())
    return out.to(x.dtype), arg


@sum_kernel
def _edge_dot(lo, hi, rows, indices, x, grad, arg, out):
    f = x.shape[1]
    line = 64 // x.itemsize
    zero = x.dtype.type(0)
    for e in range(lo, hi):
        if e + AHEAD < hi:
            for k in range(0, f, line):
                prefetch(x, indices[e + AHEAD], k)
        a, b = indices[e], rows[e]
        acc = zero
        if arg.shape[0]:
            position = arg.dtype.type(e)
            for k in range(f):
                acc += x[a, k] * grad[b, k] if arg[b, k] == position else zero
        else:
            for k in range(f):
                acc += x[a, k] * grad[b, k]
        out[e] = acc


@parallel_kernel
def _edge_dot_parallel(bounds, rows, indices, x, grad, arg, out):
    for part in numba.prange(bounds.size - 1):
        _edge_dot(bounds[part], bounds[part + 1], rows, indices, x, grad, arg, out)


def edge_dot(rows: Tensor, indices: Tensor, x: Tensor, grad: Tensor, arg: Tensor | None) -> Tensor:
    """Dot product of the two ends of every edge."""
    wide, edges = as_computed(x), rows.numel()
    out = torch.empty(edges, dtype=wide.dtype)
    taken = torch.empty(0, 0, dtype=torch.int32) if arg is None else arg
    arguments = (array(rows), array(indices), array(wide), array(grad.to(wide.dtype)), array(taken), out.numpy())
    parts = parts_for(edges * x.size(1))
    if parts > 1:
        with parallel_lock:
            _edge_dot_parallel(even_bounds(edges, parts), *arguments)
    else:
        _edge_dot(0, edges, *arguments)
    return out


@kernel
def _unpack(lo, hi, data, signed, pos, buckets, out):
    for i in range(lo, hi):
        container, start, _ = place(buckets, pos, i)
        unpack_row(data, start, container, signed, out.shape[1], out, i)


@parallel_kernel
def _unpack_parallel(bounds, data, signed, pos, buckets, out):
    for part in numba.prange(bounds.size - 1):
        _unpack(bounds[part], bounds[part + 1], data, signed, pos, buckets, out)


def aggregate_rows(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, pos: Tensor | None, counts: Sequence[int],
    features: int, signed: bool, step: Tensor, weight: Tensor | None, row_scale: Tensor | None, bias: Tensor | None,
    relu: bool,
) -> Tensor:  # fmt: skip
    """Float sums of rows that are packed with a step each."""
    sources = sum(counts)
    kind = np.int8 if signed else np.uint8
    if list(counts) == uniform_counts(sources, 8) and row_bytes(8, features) == features:
        codes: Array = array(x)[: sources * features].reshape(sources, features).view(kind)
    else:
        # Unpacked once to a byte a code: every row is read once per edge, most of them many times.
        codes = np.empty((sources, features), kind)
        arguments = (array(x), signed, optional(pos, torch.int32), buckets_of(counts, features), codes)
        parts = parts_for(sources * features)
        if parts > 1:
            with parallel_lock:
                _unpack_parallel(even_bounds(sources, parts), *arguments)
        else:
            _unpack(0, sources, *arguments)
    out = torch.empty(indptr.numel() - 1, features, dtype=torch.float32)
    _run_sum(
        indptr, indices, schedule, codes, array(step), None if weight is None else array(weight), False,
        optional(row_scale, torch.float32), optional(bias, torch.float32), relu, out.numpy(),
    )  # fmt: skip
    return out
