"""Numba gather-aggregate of packed codes in int32 (contract: :mod:`qgnn.kernels.aggregate`)."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

from ..packing import row_bytes
from .common import (
    NO_BUCKETS,
    NO_HUBS,
    PAST_CACHE_BYTES,
    ROW,
    SUMS,
    array,
    buckets_of,
    inlined,
    kernel,
    largest_code,
    optional,
    output_of,
    parallel_kernel,
    parallel_lock,
    parts_for,
    place,
    ready,
    unpack_row,
)
from .epilogue import epilogue_row, pack_row
from .gather import drain, stream_row, sum_codes_1, sum_codes_2, sum_codes_4, sum_codes_8
from .memory import empty
from .narrow import fits, sum_codes
from .plan import plan_of

ACC, FLOAT, ROWS = range(3)
OUTPUTS = {"acc": ACC, "float": FLOAT, "rows": ROWS}


@inlined
def _sum_edges(first, last, indices, x, container, signed, out, i):
    """``out[i]``, zero on entry, = sums of the codes of the edges ``first`` to ``last``."""
    if container == 8:
        sum_codes_8(indices, first, last, x, signed, out, i)
    elif container == 4:
        sum_codes_4(indices, first, last, x, signed, out, i)
    elif container == 2:
        sum_codes_2(indices, first, last, x, signed, out, i)
    elif container == 1:
        sum_codes_1(indices, first, last, x, signed, out, i)


@kernel
def _sum_codes(
    lo, hi, indptr, indices, hub, hubs, slots, x, container, f, signed, mode, row_scale, self_scale, col_scale, bias,
    addend, relu, post_scale, post_shift, out_step, out_bits, out_pos, out_buckets, out_signed, past_cache, ints,
    floats, data,
):  # fmt: skip
    """Rows ``lo`` to ``hi``, or, if there are ``hubs``, these from their slots."""
    acc = np.zeros((1, slots.shape[1]), np.int32)
    own = np.empty((1, f if self_scale.size else 0), np.int32)
    # As wide as the padded bytes of 1-bit codes, the most that a row of f columns is packed into.
    values, s, q = np.zeros((1, f + 128), np.float32), np.ones(f + 128, np.float32), np.zeros(f + 128, np.float32)
    flat = x.reshape(-1)
    for u in range(lo, hi):
        i = np.int64(hubs[u, 0]) if hubs.shape[0] else u
        first, last = indptr[i], indptr[i + 1]
        if last - first < hub or hubs.shape[0]:
            if hubs.shape[0]:
                for k in range(slots.shape[1]):
                    acc[0, k] = 0
                for slot in range(hubs[u, 1], hubs[u, 1] + hubs[u, 2]):
                    for k in range(slots.shape[1]):
                        acc[0, k] += slots[slot, k]
            else:
                _sum_edges(first, last, indices, x, container, signed, acc, 0)
            if mode == ACC:
                stream_row(acc, 0, ints, i, past_cache)
            else:
                if self_scale.size:
                    unpack_row(flat, i * x.shape[1], container, signed, f, own, 0)
                if mode == FLOAT:
                    epilogue_row(
                        acc, 0, f, row_scale, self_scale, own, col_scale, bias, addend, relu, post_scale, post_shift, i,
                        floats, i, past_cache,
                    )  # fmt: skip
                else:
                    epilogue_row(
                        acc, 0, f, row_scale, self_scale, own, col_scale, bias, addend, relu, post_scale, post_shift, i,
                        values, 0, False,
                    )  # fmt: skip
                    largest = np.float32(largest_code(out_bits[i], out_signed))
                    for k in range(f):
                        s[k] = out_step[i]
                        q[k] = largest
                    width, start, stride = place(out_buckets, out_pos, i)
                    pack_row(width, values, s, q, out_signed, data, start, stride)


@kernel
def _sum_segments(lo, hi, segments, indices, x, container, signed, slots):
    for j in range(lo, hi):
        _sum_edges(segments[j, 1], segments[j, 2], indices, x, container, signed, slots, segments[j, 3])


@kernel
def _run_part(
    part, bounds, cuts, segments, indptr, indices, hub, hubs, slots, x, container, f, signed, mode, row_scale,
    self_scale, col_scale, bias, addend, relu, post_scale, post_shift, out_step, out_bits, out_pos, out_buckets,
    out_signed, past_cache, ints, floats, data,
):  # fmt: skip
    _sum_segments(cuts[part], cuts[part + 1], segments, indices, x, container, signed, slots)
    _sum_codes(
        bounds[part], bounds[part + 1], indptr, indices, hub, hubs, slots, x, container, f, signed, mode, row_scale,
        self_scale, col_scale, bias, addend, relu, post_scale, post_shift, out_step, out_bits, out_pos, out_buckets,
        out_signed, past_cache, ints, floats, data,
    )  # fmt: skip
    drain()


@parallel_kernel
def _run_parallel(
    bounds, cuts, segments, indptr, indices, hub, hubs, slots, x, container, f, signed, mode, row_scale, self_scale,
    col_scale, bias, addend, relu, post_scale, post_shift, out_step, out_bits, out_pos, out_buckets, out_signed,
    past_cache, ints, floats, data,
):  # fmt: skip
    for part in numba.prange(cuts.size - 1):
        _run_part(
            part, bounds, cuts, segments, indptr, indices, hub, hubs, slots, x, container, f, signed, mode, row_scale,
            self_scale, col_scale, bias, addend, relu, post_scale, post_shift, out_step, out_bits, out_pos,
            out_buckets, out_signed, past_cache, ints, floats, data,
        )  # fmt: skip


def aggregate_packed(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, features: int,
    signed: bool, output: str, row_scale: Tensor | None, self_scale: Tensor | None, col_scale: Tensor | None,
    bias: Tensor | None, addend: Tensor | None, relu: bool, post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int],
    out_signed: bool,
) -> Tensor:  # fmt: skip
    """Sums of packed codes, and their epilogue."""
    plan, stride = plan_of(indptr, indices, schedule), row_bytes(container, features)
    if output == "float" and container and fits(plan, sources * stride, features):
        out = empty((plan.n, features), torch.float32)
        scales, addends, post = (row_scale, self_scale, col_scale), (bias, addend), (post_scale, post_shift)
        sum_codes(plan, ready(x, torch.uint8), container, stride, features, signed, scales, addends, relu, post, out)
        return out
    out, views = output_of(output, plan.n, features, out_counts)
    # as many codes as the padded bytes hold
    slots = np.zeros((plan.slots, stride * 8 // container if container else features), np.int32)
    arguments = (
        slots, array(x)[: sources * stride].reshape(sources, stride), container, features, signed, OUTPUTS[output],
        optional(row_scale, torch.float32), optional(self_scale, torch.float32), optional(col_scale, torch.float32),
        optional(bias, torch.float32), optional(addend, torch.float32, 2), relu, optional(post_scale, torch.float32),
        optional(post_shift, torch.float32), optional(out_step, torch.float32), optional(out_bits, torch.uint8),
        optional(out_pos, torch.int32), buckets_of(out_counts, features) if output == "rows" else NO_BUCKETS,
        out_signed, out.numel() * out.itemsize >= PAST_CACHE_BYTES, *views,
    )  # fmt: skip
    parts = parts_for(plan.edges * features // SUMS + plan.n * ROW)
    work, graph = plan.work(parts), (plan.indptr, plan.indices, plan.hub)
    if parts > 1:
        with parallel_lock:
            _run_parallel(*work, plan.segments, *graph, NO_HUBS, *arguments)
    else:
        _run_part(0, *work, plan.segments, *graph, NO_HUBS, *arguments)
    if plan.slots:
        _sum_codes(0, plan.hubs.shape[0], *graph, plan.hubs, *arguments)
    return out
