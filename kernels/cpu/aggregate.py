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
    NO_HUBS,
    PAST_CACHE_BYTES,
    SUMS,
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
    ready,
    sum_kernel,
    unpack_row,
)
from .gather import AHEAD, drain, stream_row, sum_row
from .memory import empty
from .narrow import fits, sum_values
from .plan import plan_of

__all__ = ["aggregate", "aggregate_arg_backward", "aggregate_packed", "aggregate_rows", "edge_dot"]


@inlined
def _finish_sum(i, degree, mean, row_scale, bias, relu, values):
    f, number = values.shape[1], values.dtype.type
    if mean:
        scale = number(1) / number(max(degree, 1))
        for k in range(f):
            values[0, k] *= scale
    if row_scale.size:
        for k in range(f):
            values[0, k] *= row_scale[i]
    if bias.size:
        for k in range(f):
            values[0, k] += bias[k]
    if relu:
        for k in range(f):
            values[0, k] = number(0) if values[0, k] < 0 else values[0, k]


@kernel
def _sum(lo, hi, indptr, indices, hub, hubs, slots, x, step, weight, mean, row_scale, bias, relu, past_cache, out):
    """Rows ``lo`` to ``hi``, or, if there are ``hubs``, these from their slots."""
    values = np.empty((1, out.shape[1]), out.dtype)
    for u in range(lo, hi):
        i = np.int64(hubs[u, 0]) if hubs.shape[0] else u
        first, last = indptr[i], indptr[i + 1]
        if last - first < hub or hubs.shape[0]:
            if hubs.shape[0]:
                for k in range(out.shape[1]):
                    values[0, k] = 0
                for slot in range(hubs[u, 1], hubs[u, 1] + hubs[u, 2]):
                    for k in range(out.shape[1]):
                        values[0, k] += slots[slot, k]
            else:
                sum_row(indices, first, last, x, step, weight, values, 0)
            _finish_sum(i, last - first, mean, row_scale, bias, relu, values)
            stream_row(values, 0, out, i, past_cache)


@kernel
def _run_part(
    part, bounds, cuts, segments, indptr, indices, hub, hubs, slots, x, step, weight, mean, row_scale, bias, relu,
    past_cache, out,
):  # fmt: skip
    for j in range(cuts[part], cuts[part + 1]):
        sum_row(indices, segments[j, 1], segments[j, 2], x, step, weight, slots, segments[j, 3])
    _sum(
        bounds[part], bounds[part + 1], indptr, indices, hub, hubs, slots, x, step, weight, mean, row_scale, bias, relu,
        past_cache, out,
    )  # fmt: skip
    drain()


@parallel_kernel
def _run_parallel(
    bounds, cuts, segments, indptr, indices, hub, hubs, slots, x, step, weight, mean, row_scale, bias, relu,
    past_cache, out,
):  # fmt: skip
    for part in numba.prange(cuts.size - 1):
        _run_part(
            part, bounds, cuts, segments, indptr, indices, hub, hubs, slots, x, step, weight, mean, row_scale, bias,
            relu, past_cache, out,
        )  # fmt: skip


def _run_sum(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Array, step: Array | None, weight: Array | None,
    mean: bool, row_scale: Array, bias: Array, relu: bool, out: Array,
) -> None:  # fmt: skip
    plan = plan_of(indptr, indices, schedule)
    slots = np.empty((plan.slots, x.shape[1]), out.dtype)
    tail = (slots, x, step, weight, mean, row_scale, bias, relu, out.nbytes >= PAST_CACHE_BYTES, out)
    parts = parts_for(plan.edges * x.shape[1] // SUMS)
    work, common = plan.work(parts), (plan.indptr, plan.indices, plan.hub)
    if parts > 1:
        with parallel_lock:
            _run_parallel(*work, plan.segments, *common, NO_HUBS, *tail)
    else:
        _run_part(0, *work, plan.segments, *common, NO_HUBS, *tail)
    if plan.slots:
        _sum(0, plan.hubs.shape[0], *common, plan.hubs, *tail)


KEPT = 4096
"""Edges that are gathered before they are summed: their sources and factors lie in the first cache."""


@kernel
def _sum_kept(lo, hi, longest, indptr, indices, x, step, weight, row_scale, bias, relu, past_cache, out):
    """Sums of codes in rows ``lo`` to ``hi`` without the edges whose factor is 0. Leaving them out takes no branch, which could not be foreseen."""
    sources, factors = np.zeros(longest + KEPT, indices.dtype), np.empty(longest + KEPT, np.float32)
    pointers, values = np.zeros(KEPT + 1, np.int64), np.empty((1, out.shape[1]), np.float32)
    row = lo
    while row < hi:
        # Places without a sign: Numba counts negative ones from the end, and asks for it at every access.
        first, count = row, np.uint64(0)
        while row < hi and row - first < KEPT and count < np.uint64(KEPT):
            for e in range(np.uint64(indptr[row]), np.uint64(indptr[row + 1])):
                factor = step[np.uint64(indices[e])] * weight[e]
                sources[count], factors[count] = indices[e], factor
                count += np.uint64(factor != 0)
            row += 1
            pointers[row - first] = count
        for i in range(first, row):
            sum_row(
                sources[: np.int64(count)], pointers[i - first], pointers[i - first + 1], x, None, factors, values, 0
            )
            _finish_sum(i, 0, False, row_scale, bias, relu, values)
            stream_row(values, 0, out, i, past_cache)
    drain()


@parallel_kernel
def _sum_kept_parallel(bounds, longest, indptr, indices, x, step, weight, row_scale, bias, relu, past_cache, out):
    for part in numba.prange(bounds.size - 1):
        _sum_kept(
            bounds[part], bounds[part + 1], longest, indptr, indices, x, step, weight, row_scale, bias, relu,
            past_cache, out,
        )  # fmt: skip


@kernel
def _often_zero(values):
    """Whether so many are 0 that leaving their edges out is faster. 105,165 edges, rows of 128 bytes, one thread of Zen 4: with 0, 25, 50 and 90 % of
    zeros 571, 451, 340 and 173 µs; all edges 480."""
    zeros = 0
    for e in range(values.size):
        zeros += np.int64(values[e] == 0)
    return 4 * zeros > values.size


@kernel
def _without_zero_rows(codes, step):
    """``step``, but 0 for rows whose codes are all 0. NaN and infinity stay: they make NaN of a 0."""
    left = step.copy()
    for i in range(step.size):
        some = np.uint8(0)
        for k in range(codes.shape[1]):
            some = codes[i, k] if codes[i, k] > some else some
        if not some and step[i] - step[i] == 0:
            left[i] = 0
    return left


def _run_kept(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Array, step: Array, weight: Array,
    row_scale: Array, bias: Array, relu: bool, out: Array,
) -> None:  # fmt: skip
    plan = plan_of(indptr, indices, schedule)
    tail = (
        plan.longest, plan.indptr, plan.indices, x, step, weight, row_scale, bias, relu, out.nbytes >= PAST_CACHE_BYTES, out,
    )  # fmt: skip
    parts = parts_for(plan.edges * x.shape[1] // SUMS)
    if parts > 1:
        bounds = np.searchsorted(plan.indptr, even_bounds(plan.edges, parts))
        bounds[0], bounds[-1] = 0, plan.n
        with parallel_lock:
            _sum_kept_parallel(bounds, *tail)
    else:
        _sum_kept(0, plan.n, *tail)


def aggregate(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    """Sum, mean, max or min of the neighbours' rows."""
    wide, features, plan = as_computed(x), x.size(1), plan_of(indptr, indices, schedule)
    out = empty((plan.n, features), wide.dtype)
    if reduce in ("sum", "mean") and wide.dtype == torch.float32 and fits(plan, wide.nbytes, features):
        factor = None if weight is None else ready(weight, torch.float32)
        sum_values(plan, ready(wide, torch.float32), factor, reduce == "mean", out)
        return out if wide is x else out.to(x.dtype), indptr.new_empty(0)
    source, scale = array(wide), optional(weight, wide.dtype)
    if reduce in ("sum", "mean"):
        nothing = np.empty(0, source.dtype)
        _run_sum(
            indptr, indices, schedule, source, None, None if weight is None else scale, reduce == "mean", nothing,
            nothing, False, out.numpy(),
        )  # fmt: skip
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
    out = empty((indptr.numel() - 1, features), torch.float32)
    graph, finish = (
        (indptr, indices, schedule),
        (optional(row_scale, torch.float32), optional(bias, torch.float32), relu),
    )
    factors, steps = None if weight is None else array(weight), array(step)
    if factors is not None:
        left = _without_zero_rows(codes.view(np.uint8), steps)  # of gradients, say; and weights after dropout
        if _often_zero(factors) or _often_zero(left):
            _run_kept(*graph, codes, left, factors, *finish, out.numpy())
            return out
    _run_sum(*graph, codes, steps, factors, False, *finish, out.numpy())
    return out
