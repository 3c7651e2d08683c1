"""Numba kernels of :mod:`qgnn.kernels.aggregate`.

Rows run in their natural order, in ranges of equal work; each row is summed in the order of its edges. Only the hubs of
the schedule are taken out: their segments run apart, each into a slot, and the slots are added in order. So the sums do
not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..packing import row_bytes, uniform_counts
from .common import (
    Array,
    array,
    as_computed,
    buckets_of,
    codes_row,
    empty_packed,
    epilogue_row,
    even_bounds,
    inlined,
    kernel,
    largest_code,
    optional,
    pack_row,
    parallel_kernel,
    parallel_lock,
    parts_for,
    place,
    prefetch,
    sum_kernel,
    unpack_row,
)
from .gather import (
    AHEAD,
    codes1_1,
    codes1_4,
    codes1_16,
    codes1_64,
    codes2_1,
    codes2_4,
    codes2_16,
    codes2_64,
    codes4_1,
    codes4_4,
    codes4_16,
    codes4_64,
    codes8_1,
    codes8_4,
    codes8_16,
    codes8_64,
    sum_1,
    sum_2,
    sum_4,
    sum_8,
    sum_16,
    sum_32,
    sum_64,
    sum_128,
)

ROWS = 32
"""Rows of sums that are finished together; at F = 128 they fill half of a first-level cache."""

OUTPUTS = {"acc": 0, "float": 1, "packed": 2}


@kernel
def _split(indptr, parts, hub):
    """Bounds of ``parts`` ranges of rows with nearly the same work; rows of ``hub`` edges and more are not in them."""
    n = indptr.size - 1
    cost = 0
    for i in range(n):
        degree = indptr[i + 1] - indptr[i]
        cost += 2 + (degree if degree < hub else 0)
    bounds = np.full(parts + 1, n, np.int64)
    bounds[0] = 0
    done, part = 0, 1
    for i in range(n):
        if part < parts and done * parts >= part * cost:
            bounds[part] = i
            part += 1
        degree = indptr[i + 1] - indptr[i]
        done += 2 + (degree if degree < hub else 0)
    return bounds


class _Plan:
    """The rows and the segments of one call, cut into ranges."""

    def __init__(self, indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], features: int) -> None:
        self.indptr: Array = array(indptr.to(torch.int64))  # kernels are compiled for one type of offset
        self.indices: Array = array(indices)
        self.n = indptr.numel() - 1
        self.hubs: Array = array(schedule[2].to(torch.int64))
        if self.hubs.shape[0]:
            row = self.hubs[-1, 0]  # the smallest: hubs stand in order of falling degree
            self.hub = int(self.indptr[row + 1] - self.indptr[row])
            segments: Array = array(schedule[1].to(torch.int64))
            self.segments = segments[segments[:, 3] >= 0]
            self.slots = int(self.hubs[-1, 1] + self.hubs[-1, 2])
        else:
            self.hub = indices.numel() + 1
            self.segments = np.empty((0, 5), np.int64)
            self.slots = 0
        self.parts = parts_for(indices.numel() * features)

    def row_bounds(self) -> NDArray[np.int64]:
        return _split(self.indptr, self.parts, self.hub)


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
    plan = _Plan(indptr, indices, schedule, x.shape[1])
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


@kernel
def _extreme(lo, hi, indptr, indices, x, weight, largest, out, arg):
    f = x.shape[1]
    line = 64 // x.itemsize
    one = x.dtype.type(1)
    # Ties and NaN are decided on sign * value: one comparison serves both reductions.
    turn = one if largest else -one
    for i in range(lo, hi):
        first, last = indptr[i], indptr[i + 1]
        if first == last:
            for k in range(f):
                out[i, k] = 0
                arg[i, k] = -1
            continue
        for e in range(first, last):
            if e + AHEAD < last:
                for k in range(0, f, line):
                    prefetch(x, indices[e + AHEAD], k)
            a = indices[e]
            w = weight[e] if weight.size else one
            position = arg.dtype.type(e)
            if e == first:
                for k in range(f):
                    out[i, k] = w * x[a, k]
                    arg[i, k] = position
            else:
                for k in range(f):
                    v, best = w * x[a, k], out[i, k]
                    # `not v <= best` holds for a larger v and for NaN; the second half keeps the first NaN
                    take = (not turn * v <= turn * best) & (best == best)
                    out[i, k] = v if take else best
                    arg[i, k] = position if take else arg[i, k]


@parallel_kernel
def _extreme_parallel(bounds, indptr, indices, x, weight, largest, out, arg):
    for part in numba.prange(bounds.size - 1):
        _extreme(bounds[part], bounds[part + 1], indptr, indices, x, weight, largest, out, arg)


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
    # A hub stays with one thread: the first of equals is the same whoever finds it, and no slots are needed.
    plan = _Plan(indptr, indices, schedule, x.size(1))
    arguments = (plan.indptr, plan.indices, source, scale, reduce == "max", out.numpy(), arg.numpy())
    if plan.parts > 1:
        bounds = _split(plan.indptr, plan.parts, indices.numel() + 1)
        with parallel_lock:
            _extreme_parallel(bounds, *arguments)
    else:
        _extreme(0, plan.n, *arguments)
    return out.to(x.dtype), arg


@kernel
def _arg_backward(lo, hi, indptr, indices, edges, grad, arg, weight, out):
    f = grad.shape[1]
    zero, one = grad.dtype.type(0), grad.dtype.type(1)
    for i in range(lo, hi):
        out[i] = zero
        for t in range(indptr[i], indptr[i + 1]):
            a, edge = indices[t], edges[t]
            w = weight[edge] if weight.size else one
            position = arg.dtype.type(edge)
            for k in range(f):
                out[i, k] += w * grad[a, k] if arg[a, k] == position else zero


@parallel_kernel
def _arg_backward_parallel(bounds, indptr, indices, edges, grad, arg, weight, out):
    for part in numba.prange(bounds.size - 1):
        _arg_backward(bounds[part], bounds[part + 1], indptr, indices, edges, grad, arg, weight, out)


def aggregate_arg_backward(
    indptr: Tensor, indices: Tensor, edges: Tensor, grad: Tensor, arg: Tensor, weight: Tensor | None
) -> Tensor:
    """Gradient of x for max and min."""
    wide = as_computed(grad)
    n, f = indptr.numel() - 1, grad.size(1)
    out = torch.empty(n, f, dtype=wide.dtype)
    start = array(indptr.to(torch.int64))
    arguments = (
        start,
        array(indices),
        array(edges.to(torch.int64)),
        array(wide),
        array(arg),
        optional(weight, wide.dtype),
        out.numpy(),
    )
    parts = parts_for(indices.numel() * f)
    if parts > 1:
        bounds = _split(start, parts, indices.numel() + 1)
        with parallel_lock:
            _arg_backward_parallel(bounds, *arguments)
    else:
        _arg_backward(0, n, *arguments)
    return out.to(grad.dtype)


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


@inlined
def _add_codes_8(first, last, indices, x, flip, planes):
    size, k = x.shape[1], 0
    while k + 64 <= size:
        codes8_64(indices, first, last, x, k, flip, planes)
        k += 64
    while k + 16 <= size:
        codes8_16(indices, first, last, x, k, flip, planes)
        k += 16
    while k + 4 <= size:
        codes8_4(indices, first, last, x, k, flip, planes)
        k += 4
    while k < size:
        codes8_1(indices, first, last, x, k, flip, planes)
        k += 1


@inlined
def _add_codes_4(first, last, indices, x, flip, planes):
    size, k = x.shape[1], 0
    while k + 64 <= size:
        codes4_64(indices, first, last, x, k, flip, planes)
        k += 64
    while k + 16 <= size:
        codes4_16(indices, first, last, x, k, flip, planes)
        k += 16
    while k + 4 <= size:
        codes4_4(indices, first, last, x, k, flip, planes)
        k += 4
    while k < size:
        codes4_1(indices, first, last, x, k, flip, planes)
        k += 1


@inlined
def _add_codes_2(first, last, indices, x, flip, planes):
    size, k = x.shape[1], 0
    while k + 64 <= size:
        codes2_64(indices, first, last, x, k, flip, planes)
        k += 64
    while k + 16 <= size:
        codes2_16(indices, first, last, x, k, flip, planes)
        k += 16
    while k + 4 <= size:
        codes2_4(indices, first, last, x, k, flip, planes)
        k += 4
    while k < size:
        codes2_1(indices, first, last, x, k, flip, planes)
        k += 1


@inlined
def _add_codes_1(first, last, indices, x, flip, planes):
    size, k = x.shape[1], 0
    while k + 64 <= size:
        codes1_64(indices, first, last, x, k, flip, planes)
        k += 64
    while k + 16 <= size:
        codes1_16(indices, first, last, x, k, flip, planes)
        k += 16
    while k + 4 <= size:
        codes1_4(indices, first, last, x, k, flip, planes)
        k += 4
    while k < size:
        codes1_1(indices, first, last, x, k, flip, planes)
        k += 1


@kernel
def _add_codes(first, last, indices, x, container, flip, reach, planes):
    """Adds the codes of the edges ``first`` to ``last`` to ``planes`` (int32, one plane for each of the codes of a
    byte), ``reach`` edges at a time.

    ``flip`` turns two's complement into code + 2^(container-1), so that all summands are non-negative.
    """
    for begin in range(first, last, reach):
        end = min(begin + reach, last)
        if container == 8:
            _add_codes_8(begin, end, indices, x, flip, planes)
        elif container == 4:
            _add_codes_4(begin, end, indices, x, flip, planes)
        elif container == 2:
            _add_codes_2(begin, end, indices, x, flip, planes)
        else:
            _add_codes_1(begin, end, indices, x, flip, planes)


@inlined
def _order_planes(planes, lanes, off, acc, r):
    """Codes of one row in their order, less what ``flip`` added to them."""
    f = acc.shape[1]
    if lanes == 1:
        for k in range(f):
            acc[r, k] = planes[0, k] - off
    elif lanes == 2:
        for j in range(f // 2):
            acc[r, 2 * j] = planes[0, j] - off
            acc[r, 2 * j + 1] = planes[1, j] - off
        if f & 1:
            acc[r, f - 1] = planes[0, f // 2] - off
    else:
        for lane in range(lanes):
            for j in range((f - lane + lanes - 1) // lanes):
                acc[r, j * lanes + lane] = planes[lane, j] - off


@kernel
def _finish_codes(
    rows, count, acc, mode, row_scale, col_scale, bias, relu, out_step, out_bits, out_pos, out_buckets, out_signed,
    ints, floats, data,
):  # fmt: skip
    """Writes the output of ``count`` rows. Apart from the sums, and many rows at once: a call with so many arrays is
    dear."""
    f = acc.shape[1]
    values = np.empty((1, f), np.float32)
    s, q = np.empty(f, np.float32), np.empty(f, np.float32)
    codes, clipped = np.empty(f, np.int32), np.empty(f, np.uint8)
    for r in range(count):
        i = rows[r]
        if mode == 0:
            for k in range(f):
                ints[i, k] = acc[r, k]
        else:
            for k in range(f):
                values[0, k] = np.float32(acc[r, k])
            epilogue_row(row_scale, col_scale, bias, relu, i, values)
            if mode == 1:
                for k in range(f):
                    floats[i, k] = values[0, k]
            else:
                largest = np.float32(largest_code(out_bits[i], out_signed))
                for k in range(f):
                    s[k] = out_step[i]
                    q[k] = largest
                codes_row(values, 0, s, q, out_signed, codes, clipped)
                container, start, stride = place(out_buckets, out_pos, i)
                pack_row(codes, f, container, data, start, stride)


@kernel
def _sum_codes(
    lo, hi, indptr, indices, hub, segments, hubs, slots, x, container, f, flip, half, reach, stage, mode, row_scale,
    col_scale, bias, relu, out_step, out_bits, out_pos, out_buckets, out_signed, ints, floats, data,
):  # fmt: skip
    """``stage`` 0: rows ``lo`` to ``hi``; 1: segments of hubs; 2: hubs, from their slots."""
    lanes = 8 // container if container else 1
    size = max(x.shape[1], (f + lanes - 1) // lanes)  # padding included
    planes = np.empty((lanes, size), np.int32)
    rows, acc = np.empty(ROWS, np.int64), np.empty((ROWS, f), np.int32)
    count = 0
    for u in range(lo, hi):
        i = np.int64(hubs[u, 0]) if stage == 2 else u
        if stage == 1:
            first, last = segments[u, 1], segments[u, 2]
        else:
            first, last = indptr[i], indptr[i + 1]
        if stage != 0 or last - first < hub:
            for lane in range(lanes):
                for j in range(size):
                    planes[lane, j] = 0
            if stage == 2:
                for slot in range(hubs[u, 1], hubs[u, 1] + hubs[u, 2]):
                    for lane in range(lanes):
                        for j in range(size):
                            planes[lane, j] += slots[slot, lane, j]
            elif container:
                _add_codes(first, last, indices, x, container, flip, reach, planes)
            if stage == 1:
                for lane in range(lanes):
                    for j in range(size):
                        slots[segments[u, 3], lane, j] = planes[lane, j]
            else:
                _order_planes(planes, lanes, np.int32(half * (last - first)), acc, count)
                rows[count] = i
                count += 1
        if count == ROWS or (count and u == hi - 1):
            _finish_codes(
                rows, count, acc, mode, row_scale, col_scale, bias, relu, out_step, out_bits, out_pos, out_buckets,
                out_signed, ints, floats, data,
            )  # fmt: skip
            count = 0


@parallel_kernel
def _sum_codes_parallel(
    bounds, indptr, indices, hub, segments, hubs, slots, x, container, f, flip, half, reach, stage, mode, row_scale,
    col_scale, bias, relu, out_step, out_bits, out_pos, out_buckets, out_signed, ints, floats, data,
):  # fmt: skip
    for part in numba.prange(bounds.size - 1):
        _sum_codes(
            bounds[part], bounds[part + 1], indptr, indices, hub, segments, hubs, slots, x, container, f, flip, half,
            reach, stage, mode, row_scale, col_scale, bias, relu, out_step, out_bits, out_pos, out_buckets, out_signed,
            ints, floats, data,
        )  # fmt: skip


def aggregate_packed(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, features: int,
    signed: bool, output: str, row_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, relu: bool,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed:
    bool,
) -> Tensor:  # fmt: skip
    """Sums of packed codes, and their epilogue."""
    plan = _Plan(indptr, indices, schedule, features)
    stride = row_bytes(container, features)
    table = array(x)[: sources * stride].reshape(sources, stride)
    half = 1 << (container - 1) if signed and container else 0
    flip = half * (0xFF // ((1 << container) - 1)) if half else 0
    # Sums of `reach` codes fit 8 bits, or 16 for codes of 8 bits.
    reach = {8: 65535 // 255, 4: 255 // 15, 2: 255 // 3, 1: 255, 0: 1}[container]
    if output != "acc" and (out_step is None or out_bits is None):
        output = "float"
    integers = torch.empty(plan.n if output == "acc" else 0, features, dtype=torch.int32)
    floats = torch.empty(plan.n if output == "float" else 0, features, dtype=torch.float32)
    data = empty_packed(out_counts, features) if output == "packed" else torch.empty(0, dtype=torch.uint8)
    buckets = buckets_of(out_counts, features) if output == "packed" else np.empty((4, 0), np.int64)
    lanes = 8 // container if container else 1
    slots = np.empty((plan.slots, lanes, max(stride, -(-features // lanes))), np.int32)
    head = (
        plan.indptr, plan.indices, plan.hub, plan.segments, plan.hubs, slots, table, container, features,
        np.uint8(flip), half, reach,
    )  # fmt: skip
    tail = (
        OUTPUTS[output], optional(row_scale, torch.float32), optional(col_scale, torch.float32), optional(bias,
        torch.float32), relu, optional(out_step, torch.float32), optional(out_bits, torch.uint8), optional(out_pos,
        torch.int32), buckets, out_signed, integers.numpy(), floats.numpy(), data.numpy(),
    )  # fmt: skip
    if plan.parts > 1:
        with parallel_lock:
            if plan.slots:
                _sum_codes_parallel(even_bounds(plan.segments.shape[0], plan.parts), *head, 1, *tail)
            _sum_codes_parallel(plan.row_bounds(), *head, 0, *tail)
    else:
        if plan.slots:
            _sum_codes(0, plan.segments.shape[0], *head, 1, *tail)
        _sum_codes(0, plan.n, *head, 0, *tail)
    if plan.slots:
        _sum_codes(0, plan.hubs.shape[0], *head, 2, *tail)
    return {"acc": integers, "float": floats, "packed": data}[output]


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
