"""Numba gather-aggregate of packed codes in int32 (contract: :mod:`qgnn.kernels.aggregate`)."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from ..packing import row_bytes
from .common import (
    array,
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
    place,
)
from .gather import (
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
)
from .plan import Plan

ROWS = 32
"""Rows of sums that are finished together; at F = 128 they fill half of a first-level cache."""


OUTPUTS = {"acc": 0, "float": 1, "packed": 2}


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
    plan = Plan(indptr, indices, schedule, features)
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
