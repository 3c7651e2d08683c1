"""Triton aggregation of packed rows with a step each, of one width or mixed (contract: :mod:`..aggregate`; one launch: :mod:`.segments`).

The edges of a row are grouped by the container of their source, once for a graph and a layout (:func:`by_container`), so that each group is summed
by a loop that is compiled for its width. A code becomes a float without a conversion: its bits, biased to be positive and left where they stand at
bit ``p``, are put into the float ``2^23``; ``2^23`` and bias are taken off, and the ``2^p`` that is left is divided out of the factor of the edge.

A code takes 3 instructions (and-or, add, multiply-add), with all else 3.6 at 2 bits and 4.4 at 8 on sm_90. So Reddit's 114.6 M edges of 256 codes
of 2 bits are 3.6 ms on 132 multiprocessors that issue 4 warps a clock at 1.7 GHz, where the bytes take 1.7 ms at 4.8 TB/s: instructions are the
bound. A byte load and a conversion for each code took 31.

Worked example: a word of 2-bit unsigned codes 3, 0, 2 ... ends in the bits 100011. Code 2 stands at bit 4: ``word & 0x30 | 0x4B000000`` is the float
``2^23 + 32``, less ``2^23`` it is 32, and times ``2^-4 * factor`` it is 2 factors, rounded once in the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import ALIGN, CONTAINERS, bucket_starts, row_bytes, rows_of
from ..schedule import rows_of_edges
from .common import EXACT, CompileCase, launch, uniform_container
from .epilogue import _epilogue
from .segments import (
    SCHEDULE_SIGNATURE,
    _last_to_arrive,
    _narrow_rows,
    _segment,
    _store_slot,
    _sum_of_slots,
    dense,
    grid,
    kept,
    schedule_arguments,
    without_edges,
    workspace,
)

MAGIC = 0x4B000000
"""The float ``2^23``. A kernel takes it as an argument: of two constants, mask and magic, an and-or has room for one, and as long as the compiler
knows both, it loads the masks again and again (574 instructions for two 2-bit rows of a thread on sm_90, and 456 without)."""


ONE_WARP = {**EXACT, "num_warps": 1}


@triton.jit
def _values(
    b_unit, b_high, magic, PART: tl.constexpr, STEP: tl.constexpr, CONTAINER: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr
):  # fmt: skip
    """``[R, U]`` -> float32 ``[R, U * PARTS / STEP]``: codes ``PART``, ``PART + STEP`` ... of each unit, less ``BIAS``, times ``2^p``; ``b_high`` is
    the unit shifted by 16, since 23 bits of a float are free. All stay in the thread of their unit."""
    if STEP < PARTS:
        b_even = _values(b_unit, b_high, magic, PART, 2 * STEP, CONTAINER, PARTS, BIAS)
        b_odd = _values(b_unit, b_high, magic, PART + STEP, 2 * STEP, CONTAINER, PARTS, BIAS)
        return tl.interleave(b_even, b_odd)
    else:
        P: tl.constexpr = PART * CONTAINER % 16
        b_half = b_unit if PART * CONTAINER < 16 else b_high
        b_code = (b_half & (((1 << CONTAINER) - 1) << P)) | magic
        return b_code.to(tl.float32, bitcast=True) - (8388608.0 + BIAS * (1 << P))


@triton.jit
def _factors(b_factor, PART: tl.constexpr, STEP: tl.constexpr, CONTAINER: tl.constexpr, PARTS: tl.constexpr):
    """``[R, U]`` -> ``[R, U * PARTS / STEP]``: ``b_factor * 2^-p`` beside each of :func:`_values`; equal ones are one register of a thread."""
    if STEP < PARTS:
        b_even = _factors(b_factor, PART, 2 * STEP, CONTAINER, PARTS)
        b_odd = _factors(b_factor, PART + STEP, 2 * STEP, CONTAINER, PARTS)
        return tl.interleave(b_even, b_odd)
    else:
        return b_factor * (1.0 / (1 << (PART * CONTAINER % 16)))


@triton.jit
def _add_edges(
    b_acc, p_x, p_words, p_step, p_weight, p_edges, p_places, b_first, b_count, o_next, first, start, i_f, magic,
    CONTAINER: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, SIGNED: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """``b_acc`` ``[R, F]`` plus ``weight * step * code`` of edges of one container: lane ``r`` takes ``b_count[r]`` edges, every ``o_next``-th from
    ``b_first[r]`` on. The row at place ``first``, the first of its bucket, begins ``start`` times 16 bytes into ``p_x``."""
    SIZE: tl.constexpr = 4 if STRIDE % 4 == 0 else 1
    PARTS: tl.constexpr = 8 * SIZE // CONTAINER
    UNITS: tl.constexpr = b_acc.shape[1] // PARTS
    WHOLE: tl.constexpr = STRIDE == BLOCKS * UNITS * SIZE
    BIAS: tl.constexpr = (1 << (CONTAINER - 1)) if SIGNED else 0
    FLIP: tl.constexpr = BIAS * (((1 << (8 * SIZE)) - 1) // ((1 << CONTAINER) - 1))
    o_u = i_f * UNITS + tl.arange(0, UNITS)
    i_base = tl.cast(start, tl.int64) * (16 // SIZE) - tl.cast(first, tl.int64) * (STRIDE // SIZE)
    if SIZE == 4:
        p_block = p_words + i_base + o_u[None, :]
    else:
        p_block = p_x + i_base + o_u[None, :]
    for k in range(0, tl.max(b_count, axis=0), UNROLL):
        for u in tl.static_range(UNROLL):
            # A lane that has no edge left adds the row at ``first``, times 0.
            m_edge = k + u < b_count
            b_edge = b_first + (k + u) * o_next
            b_place = tl.load(p_places + b_edge, mask=m_edge, other=first)
            b_factor = tl.load(p_step + b_place, mask=m_edge, other=0)
            if p_weight is not None:
                if p_edges is not None:
                    b_edge = tl.load(p_edges + b_edge, mask=m_edge, other=0)
                b_factor *= tl.load(p_weight + b_edge, mask=m_edge, other=0)
            p_unit = p_block + b_place.to(tl.int64)[:, None] * (STRIDE // SIZE)
            if WHOLE:
                b_unit = tl.load(p_unit).to(tl.int32)
            else:
                b_unit = tl.load(p_unit, mask=(o_u < STRIDE // SIZE)[None, :], other=0).to(tl.int32)
            b_unit = b_unit ^ (FLIP - (1 << 32) if FLIP >= 1 << 31 else FLIP)
            b_value = _values(b_unit, b_unit >> 16, magic, 0, 1, CONTAINER, PARTS, BIAS)
            b_factors = _factors(tl.broadcast_to(b_factor[:, None], b_unit.shape), 0, 1, CONTAINER, PARTS)
            b_acc = tl.fma(b_factors, b_value, b_acc)
    return b_acc


@triton.jit
def _lanes_between(b_from, b_to, o_lane, o_next):
    """First edge and number of edges of each lane, where the lanes of a row share its edges ``b_from`` to ``b_to``: every ``o_next``-th."""
    b_first = b_from + o_lane
    return b_first, tl.maximum(b_to - b_first + o_next - 1, 0) // o_next


@triton.jit
def _store_rows(p_out, p_row_scale, p_bias, b_sum, b_row, m_row, o_f, m_f, F, RELU: tl.constexpr):
    b_v = _epilogue(b_sum, b_sum, p_row_scale, None, None, p_bias, None, None, None, b_row, m_row, o_f, m_f, F, RELU)
    tl.store(p_out + b_row[:, None] * F + o_f[None, :], b_v, mask=m_row[:, None] & m_f[None, :])


@triton.jit(do_not_specialize=["R", "S", "first_4", "first_2", "first_1", "start_4", "start_2", "start_1", "magic"])
def _aggregate_rows_kernel(
    p_out,  # [N, F]
    p_slots,  # [slots, F] int32, the bits of float32
    p_arrived,  # [H, blocks] int32
    p_indptr, p_indices, p_order, p_segments, p_hubs,  # [N + 1], [E], [R], [S, 5], [H, 3]; the indices are places
    p_ends,  # [N, 4]: where a row's edges of 8, of 4, of 2 and of 1 bit end
    p_edges,  # [E]: CSR position of each edge
    p_x, p_words,  # packed rows, as bytes and as words
    p_step, p_weight,  # [M] by place, [E] in CSR order
    p_row_scale, p_bias,  # [N], [F]
    R, S, first_4, first_2, first_1, start_4, start_2, start_1, magic,
    F: tl.constexpr, STRIDE_8: tl.constexpr, STRIDE_4: tl.constexpr, STRIDE_2: tl.constexpr, STRIDE_1: tl.constexpr, BLOCKS: tl.constexpr,
    CONTAINER: tl.constexpr, SIGNED: tl.constexpr, RELU: tl.constexpr, UNROLL: tl.constexpr, SIDE: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[i] = epilogue(sum over the edges e of row i of weight[e] * step[j] * code[j], j = indices[e]) (:mod:`qgnn.kernels.aggregate`)."""
    i_tile, i_f = tl.program_id(0), tl.program_id(1)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    is_segment = i_tile < S
    # Of a segment, the lanes share the edges; of narrow rows, each has its own.
    o_lane = tl.where(is_segment, tl.arange(0, SIDE), 0)
    o_next = tl.where(is_segment, SIDE, 1)
    if is_segment:
        i_row, i_from, i_to, i_slot, i_hub = _segment(p_segments, i_tile)
        b_row, b_from = i_row + tl.zeros((SIDE,), tl.int64), i_from + tl.zeros((SIDE,), i_from.dtype)
        b_to = b_from + (i_to - i_from).to(tl.int32)
    else:
        b_row, m_row, b_from, b_degree = _narrow_rows(p_order, p_indptr, i_tile - S, R, SIDE)
        b_to = b_from + b_degree
    b_acc = tl.zeros((SIDE, BLOCK_F), tl.float32)
    if CONTAINER is None:
        # From narrow to wide, so that the last layout has the most lanes of a row in a thread, and the sum over lanes takes few exchanges.
        p_end = p_ends + b_row * 4
        b_8, b_4, b_2, b_1 = tl.load(p_end), tl.load(p_end + 1), tl.load(p_end + 2), tl.load(p_end + 3)
        b_first, b_count = _lanes_between(tl.maximum(b_2, b_from), tl.minimum(b_1, b_to), o_lane, o_next)
        b_acc = _add_edges(
            b_acc, p_x, p_words, p_step, p_weight, p_edges, p_indices, b_first, b_count, o_next, first_1, start_1, i_f, magic,
            1, STRIDE_1, BLOCKS, SIGNED, UNROLL,
        )  # fmt: skip
        b_first, b_count = _lanes_between(tl.maximum(b_4, b_from), tl.minimum(b_2, b_to), o_lane, o_next)
        b_acc = _add_edges(
            b_acc, p_x, p_words, p_step, p_weight, p_edges, p_indices, b_first, b_count, o_next, first_2, start_2, i_f, magic,
            2, STRIDE_2, BLOCKS, SIGNED, UNROLL,
        )  # fmt: skip
        b_first, b_count = _lanes_between(tl.maximum(b_8, b_from), tl.minimum(b_4, b_to), o_lane, o_next)
        b_acc = _add_edges(
            b_acc, p_x, p_words, p_step, p_weight, p_edges, p_indices, b_first, b_count, o_next, first_4, start_4, i_f, magic,
            4, STRIDE_4, BLOCKS, SIGNED, UNROLL,
        )  # fmt: skip
        b_first, b_count = _lanes_between(b_from, tl.minimum(b_8, b_to), o_lane, o_next)
        b_acc = _add_edges(
            b_acc, p_x, p_words, p_step, p_weight, p_edges, p_indices, b_first, b_count, o_next, 0, 0, i_f, magic,
            8, STRIDE_8, BLOCKS, SIGNED, UNROLL,
        )  # fmt: skip
    else:
        STRIDE: tl.constexpr = (
            STRIDE_8 if CONTAINER == 8 else STRIDE_4 if CONTAINER == 4 else STRIDE_2 if CONTAINER == 2 else STRIDE_1
        )
        b_first, b_count = _lanes_between(b_from, b_to, o_lane, o_next)
        b_acc = _add_edges(
            b_acc, p_x, p_words, p_step, p_weight, p_edges, p_indices, b_first, b_count, o_next, 0, 0, i_f, magic,
            CONTAINER, STRIDE, BLOCKS, SIGNED, UNROLL,
        )  # fmt: skip
    if is_segment:
        i_own, _, _, i_slot, i_hub = _segment(p_segments, i_tile)
        b_sum = tl.sum(b_acc, axis=0)[None, :]
        complete = i_slot < 0
        if i_slot >= 0:
            _store_slot(p_slots, i_slot, b_sum, o_f, m_f, F)
            complete, i_first, i_end = _last_to_arrive(p_arrived, p_hubs, i_hub)
            if complete:
                b_sum = _sum_of_slots(p_slots, i_first, i_end, tl.zeros((1, BLOCK_F), tl.float32), o_f, m_f, F)
        if complete:
            b_own = i_own + tl.zeros((1,), tl.int64)
            _store_rows(p_out, p_row_scale, p_bias, b_sum, b_own, b_own >= 0, o_f, m_f, F, RELU)
    else:
        m_row = (i_tile - S) * SIDE + tl.arange(0, SIDE) < R
        _store_rows(p_out, p_row_scale, p_bias, b_acc, b_row, m_row, o_f, m_f, F, RELU)


def by_container(
    pos: Tensor, indptr: Tensor, indices: Tensor, counts: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The edges of every row grouped by the container of their source, in the order of the buckets: the place of each edge's source, int32 ``[E]``;
    ``ends`` ``[N, 4]``, behind the edges of 8, 4, 2 and 1 bit; each edge's position in CSR order ``[E]``; and the source at each place, ``[M]``.

    Edges keep their order within a group. In ``O(E)``: a count of the edges of each group before an edge is all that is needed."""
    place = pos.index_select(0, indices)
    rows, dtype = rows_of_edges(indptr), indptr.dtype
    edges = torch.empty_like(place, dtype=dtype)
    start, first, ends = indptr[:-1], 0, []
    for count in counts:
        chosen = ((place >= first) & (place < first + count)).nonzero().view(-1)
        row = rows[chosen]
        offsets = torch.zeros_like(indptr)
        torch.cumsum(torch.bincount(row, minlength=start.numel()), 0, out=offsets[1:])
        order = torch.arange(chosen.numel(), dtype=dtype, device=place.device)
        edges[((start - offsets[:-1])[row.long()] + order).long()] = chosen.to(dtype)
        start, first = start + (offsets[1:] - offsets[:-1]), first + count
        ends.append(start)
    return place[edges.long()], torch.stack(ends[:4], 1).contiguous(), edges, rows_of(pos)


def rows_tile(features: int) -> dict[str, int]:
    """Sizes of a tile: 64 codes a thread of a warp, which are one load of 16 bytes at 2 bits, and four at 8 bits. The order of additions depends on
    them, so they are not tuned. A block costs 3 instructions for each of its features, needed or not, and about 64 for an edge: 602 features are 5
    blocks of 128, not 3 of 256."""
    most = max(min(triton.next_power_of_2(features), 256), 32)
    blocks = [1 << k for k in range(5, most.bit_length())]
    block_f = min(blocks, key=lambda block: triton.cdiv(features, block) * (3 * block + 64))
    # Rows that are read in bytes need most registers: with two at a time, 7 features spill on sm_100.
    unroll = 2 if features >= 32 else 1
    return {"BLOCKS": triton.cdiv(features, block_f), "SIDE": 2048 // block_f, "BLOCK_F": block_f, "UNROLL": unroll}


def _layout(counts: Sequence[int], features: int) -> dict[str, int | None]:
    first_4, first_2, first_1 = counts[0], sum(counts[:2]), sum(counts[:3])
    start_4, start_2, start_1 = (start // ALIGN for start in bucket_starts(counts, features)[1:4])
    return {
        "first_4": first_4, "first_2": first_2, "first_1": first_1, "start_4": start_4, "start_2": start_2, "start_1": start_1,
        **{f"STRIDE_{c}": row_bytes(c, features) for c in CONTAINERS if c}, "CONTAINER": uniform_container(counts),
    }  # fmt: skip


def aggregate_rows(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, pos: Tensor | None, counts: Sequence[int], features: int, signed: bool,
    step: Tensor, weight: Tensor | None, row_scale: Tensor | None, bias: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    rows = indptr.numel() - 1
    out = step.new_empty(rows, features)
    if not out.numel():
        return out
    ends = edges = None
    if uniform_container(counts) == 0:  # every code is 0, which a row of no edges also gives
        (indptr, schedule), counts = without_edges(indptr), (1, 0, 0, 0, 0)
    elif pos is not None:
        indices, ends, edges, sources = kept(pos, by_container, indptr, indices, tuple(counts))
        step = step.index_select(0, sources)

    sizes = rows_tile(features)
    arrived, slots = workspace(schedule, features, sizes["BLOCKS"], [torch.int32])
    launch(
        _aggregate_rows_kernel, grid(schedule, sizes["SIDE"], sizes["BLOCKS"]),
        p_out=out, p_slots=slots, p_arrived=arrived, **schedule_arguments(indptr, indices, schedule), p_ends=ends,
        p_edges=None if weight is None else edges, p_x=x, p_words=x.view(torch.int32), p_step=dense(step), p_weight=dense(weight),
        p_row_scale=dense(row_scale), p_bias=dense(bias), F=features, **_layout(counts, features), magic=MAGIC, SIGNED=signed, RELU=relu, **sizes,
        **ONE_WARP,
    )  # fmt: skip
    return out


def _case(name: str, features: int, container: int | None, index: str = "*i32", **changed: object) -> CompileCase:
    layout = _layout([0] * 5, features) | {"CONTAINER": container}
    constexprs: dict[str, object] = {
        **{key: value for key, value in layout.items() if key.isupper()}, **rows_tile(features), "F": features, "SIGNED": True, "RELU": True,
        **({} if container is None else {"p_ends": None, "p_edges": None}), **changed,
    }  # fmt: skip
    signature = {
        **SCHEDULE_SIGNATURE, **dict.fromkeys(["p_indptr", "p_segments", "p_hubs", "p_ends", "p_edges"], index),
        "p_slots": "*i32", "magic": "i32", "p_x": "*u8", "p_words": "*i32",
        **dict.fromkeys(["p_out", "p_step", "p_weight", "p_row_scale", "p_bias"], "*fp32"),
        **dict.fromkeys([key for key in layout if not key.isupper()], "i32"),
    }  # fmt: skip
    signature = {argument: kind for argument, kind in signature.items() if argument not in constexprs}
    return CompileCase(name, _aggregate_rows_kernel, signature, constexprs, ONE_WARP)


_PLAIN: dict[str, Any] = {
    "p_weight": None,
    "p_edges": None,
    "p_row_scale": None,
    "p_bias": None,
    "SIGNED": False,
    "RELU": False,
}
COMPILE_CASES = [
    _case("aggregate_rows_mixed_256", 256, None, **_PLAIN),
    _case("aggregate_rows_mixed_signed_weighted_602_int64", 602, None, index="*i64"),
    _case("aggregate_rows_mixed_bytes_7", 7, None),
    _case("aggregate_rows_8_weighted_128", 128, 8),
]
