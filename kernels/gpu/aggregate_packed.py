"""Triton gather-aggregate of packed codes in int32, with the fused epilogue (contract: :mod:`..aggregate`; one launch: :mod:`.segments`).

A row of at least 16 bytes is read in words of 32 bits, a shorter one in bytes. The codes of a word are added where they stand: shifted by lane and
masked, several to a word, so that one addition counts for two codes of 8 bits or four narrower ones; before a field could overflow, the fields
are added to int32. Signed codes get their bias (128 for 8 bits) by one exclusive or, and it is taken off once per row.

Worked example, 4-bit codes: the word 0x000000F1 holds the codes 1, -1, 0 ... With the bias it is 0x88888879: 9, 7, 8 ... in the lanes 0 (even codes,
0x08080809) and 1 (odd codes, 0x08080807). Sixteen edges reach at most 16 * 15 = 240 in a field of 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import empty_output, row_bytes
from .common import EXACT, OUT_FIRSTS, CompileCase, _load_codes, launch
from .epilogue import (
    OUTPUT_SIGNATURE,
    PLAIN,
    _clear_tails,
    _epilogue,
    _store_output,
    output_arguments,
    padded_features,
)
from .segments import (
    SCHEDULE_SIGNATURE,
    _last_to_arrive,
    _narrow_rows,
    _segment,
    _store_slot,
    _sum_of_slots,
    dense,
    grid,
    schedule_arguments,
    without_edges,
    workspace,
)


def lane_constants(container: int, signed: bool, unit: int) -> dict[str, int]:
    """How the codes of one unit of ``unit`` bits are added: code ``h * LANES + j`` stands in field ``h`` of lane ``j``.

    ``FLUSH`` edges, a power of two, can be added before a field of ``FIELD`` bits overflows. Numbers of 32 bits are given as int32.
    """
    field = 16 if container == 8 else 8
    lanes, fields = min(field, unit) // container, max(unit // field, 1)
    bias = 1 << (container - 1) if signed else 0
    flip = sum(bias << shift for shift in range(0, unit, container))
    return {
        "CONTAINER": container, "LANES": lanes, "FIELDS": fields, "FIELD": field, "BIAS": bias,
        "FLIP": flip - (1 << 32) if flip >= 1 << 31 else flip,
        "MASK": sum(((1 << container) - 1) << (h * field) for h in range(fields)),
        "FLUSH": {8: 256, 4: 16, 2: 64, 1: 128}[container],
    }  # fmt: skip


@triton.jit
def _split(b_unit, SHIFT: tl.constexpr, PARTS: tl.constexpr, MASK: tl.constexpr):
    """``[R, U]`` -> ``[R, U * PARTS]``: part ``j`` of a unit is ``(unit >> j * SHIFT) & MASK``. All parts stay in the thread of their unit."""
    if PARTS == 1:
        return b_unit & MASK
    elif PARTS == 2:
        return tl.interleave(b_unit & MASK, (b_unit >> SHIFT) & MASK)
    else:
        # Part j of PARTS is part j // 2 of the units shifted by (j % 2) * SHIFT.
        b_even = _split(b_unit, 2 * SHIFT, PARTS // 2, MASK)
        b_odd = _split(b_unit >> SHIFT, 2 * SHIFT, PARTS // 2, MASK)
        return tl.interleave(b_even, b_odd)


@triton.jit
def _lanes(
    p_x, p_indices, b_edge, m_edge, o_u, m_u, stride_x,
    CONTAINER: tl.constexpr, LANES: tl.constexpr, MASK: tl.constexpr, FLIP: tl.constexpr,
):  # fmt: skip
    """The codes of the sources of some edges by lane, biased, int32 ``[E, U * LANES]``; 0 where masked."""
    b_source = tl.load(p_indices + b_edge, mask=m_edge, other=0).to(tl.int64)
    p_unit = p_x + b_source[:, None] * stride_x + o_u[None, :]
    b_unit = tl.load(p_unit, mask=m_edge[:, None] & m_u[None, :], other=FLIP).to(tl.int32)
    return _split(b_unit ^ FLIP, CONTAINER, LANES, MASK)


@triton.jit
def _ordered(b_fields, LANES: tl.constexpr, FIELDS: tl.constexpr):
    """``[R, U * LANES * FIELDS]`` -> ``[R, F]``: from lane by lane to the order of the codes."""
    if LANES == 1 or FIELDS == 1:
        return b_fields
    else:
        R: tl.constexpr = b_fields.shape[0]
        F: tl.constexpr = b_fields.shape[1]
        b_split = tl.reshape(b_fields, (R, F // (LANES * FIELDS), LANES, FIELDS))
        return tl.reshape(tl.permute(b_split, (0, 1, 3, 2)), (R, F))


@triton.jit
def _store_tile(
    p_out, p_own, p_row_scale, p_self_scale, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift, p_step, p_bits, p_pos,
    b_acc, b_row, m_row, o_f, m_f, F, stride_own,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    CONTAINER: tl.constexpr, SIGNED: tl.constexpr, OUTPUT: tl.constexpr, OUT_CONTAINER: tl.constexpr, OUT_SIGNED: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The sums ``[R, BLOCK_F]`` of the rows ``b_row`` as they are, after the epilogue, or quantized by row and packed."""
    m_tile = m_row[:, None] & m_f[None, :]
    if OUTPUT == "acc":
        tl.store(p_out + b_row[:, None] * F + o_f[None, :], b_acc, mask=m_tile)
    else:
        b_own = b_acc
        if p_self_scale is not None:
            b_container = b_row.to(tl.int32) * 0 + CONTAINER
            b_own = _load_codes(p_own, b_container, b_row * stride_own, m_tile, o_f, SIGNED)
        b_v = _epilogue(
            b_acc, b_own, p_row_scale, p_self_scale, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift, b_row, m_row, o_f, m_f, F, RELU
        )  # fmt: skip
        _store_output(
            p_out, p_step, p_bits, p_pos, b_v, b_row, m_row, tl.program_id(1), o_f, m_f, F,
            first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
            OUTPUT, OUT_CONTAINER, OUT_SIGNED,
        )  # fmt: skip


@triton.jit
def _sum_segment(
    p_x, p_indices, i_first, i_end, o_u, m_u, stride_x, CONTAINER: tl.constexpr, LANES: tl.constexpr, FIELDS: tl.constexpr,
    FIELD: tl.constexpr, MASK: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, FLUSH: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Sum of the codes over the edges of a segment, int32 ``[1, BLOCK_F]``."""
    b_sums = tl.zeros((BLOCK_E, BLOCK_F), tl.int32)
    for i_part in range(i_first, i_end, BLOCK_E * FLUSH):
        b_lanes = tl.zeros((BLOCK_E, BLOCK_F // FIELDS), tl.int32)
        for i_edge in range(i_part, tl.minimum(i_part + BLOCK_E * FLUSH, i_end), BLOCK_E):
            b_edge = i_edge + tl.arange(0, BLOCK_E)
            b_lanes += _lanes(p_x, p_indices, b_edge, b_edge < i_end, o_u, m_u, stride_x, CONTAINER, LANES, MASK, FLIP)
        b_sums += _split(b_lanes, FIELD, FIELDS, (1 << FIELD) - 1)
    return _ordered(tl.sum(b_sums, axis=0)[None, :], LANES, FIELDS) - BIAS * (i_end - i_first).to(tl.int32)


@triton.jit
def _sum_narrow(
    p_x, p_indices, b_first, b_degree, o_u, m_u, stride_x, CONTAINER: tl.constexpr, LANES: tl.constexpr, FIELDS: tl.constexpr, FIELD: tl.constexpr,
    MASK: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, FLUSH: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Sums of the codes over the edges of each row of a narrow tile, int32 ``[BLOCK_R, BLOCK_F]``."""
    tl.static_assert(FLUSH % UNROLL == 0, "an edge would be counted in two parts")
    b_sums = tl.zeros((BLOCK_R, BLOCK_F), tl.int32)
    longest = tl.max(b_degree, axis=0)
    for i_part in range(0, longest, FLUSH):
        b_lanes = tl.zeros((BLOCK_R, BLOCK_F // FIELDS), tl.int32)
        for k in range(i_part, tl.minimum(i_part + FLUSH, longest), UNROLL):
            for u in tl.static_range(UNROLL):
                b_lanes += _lanes(
                    p_x,
                    p_indices,
                    b_first + (k + u),
                    k + u < b_degree,
                    o_u,
                    m_u,
                    stride_x,
                    CONTAINER,
                    LANES,
                    MASK,
                    FLIP,
                )
        b_sums += _split(b_lanes, FIELD, FIELDS, (1 << FIELD) - 1)
    return _ordered(b_sums, LANES, FIELDS) - BIAS * b_degree[:, None]


@triton.jit(do_not_specialize=["R", "S", "size", *OUT_FIRSTS])
def _aggregate_packed_kernel(
    p_out,  # int32 or float32 [N, F], or packed rows
    p_slots,  # [slots, F] int32
    p_arrived,  # [H, blocks] int32
    p_indptr, p_indices, p_order, p_segments, p_hubs,  # [N + 1], [E], [R], [S, 5], [H, 3]
    p_x,  # packed [M, F], bytes or words
    p_own,  # the same in bytes
    p_row_scale, p_self_scale, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift,  # [N], [1], [F], [F], [N, F], [F], [F]
    p_step, p_bits, p_pos,  # [N], of the packed output
    R, S, F, size, stride_own, X_VECTORS,
    out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1, out_stride_8, out_stride_4, out_stride_2, out_stride_1,
    VECTOR: tl.constexpr, CONTAINER: tl.constexpr, LANES: tl.constexpr, FIELDS: tl.constexpr, FIELD: tl.constexpr, MASK: tl.constexpr,
    FLIP: tl.constexpr, BIAS: tl.constexpr, FLUSH: tl.constexpr, OUTPUT: tl.constexpr, OUT_CONTAINER: tl.constexpr, OUT_SIGNED: tl.constexpr,
    TAILS: tl.constexpr, RELU: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[i] = epilogue(sum over the edges e of row i of code[indices[e]]) (A2Q proofs 2 and 3)."""
    stride_x = X_VECTORS * VECTOR  # so the compiler knows that 16 bytes divide a row of words
    i_tile, i_f = tl.program_id(0), tl.program_id(1)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    BLOCK_U: tl.constexpr = BLOCK_F // (LANES * FIELDS)
    o_u = i_f * BLOCK_U + tl.arange(0, BLOCK_U)
    m_u = o_u < stride_x
    if TAILS:
        if (i_tile == 0) & (i_f == 0):
            _clear_tails(
                p_out, size, out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1,
                out_stride_8, out_stride_4, out_stride_2, out_stride_1,
            )  # fmt: skip
    if i_tile < S:
        i_row, i_first, i_end, i_slot, i_hub = _segment(p_segments, i_tile)
        b_sum = _sum_segment(
            p_x, p_indices, i_first, i_end, o_u, m_u, stride_x, CONTAINER, LANES, FIELDS, FIELD, MASK, FLIP, BIAS, FLUSH, BLOCK_E, BLOCK_F,
        )  # fmt: skip
        complete = i_slot < 0
        if i_slot >= 0:
            _store_slot(p_slots, i_slot, b_sum, o_f, m_f, F)
            complete, i_from, i_to = _last_to_arrive(p_arrived, p_hubs, i_hub)
            if complete:
                b_sum = _sum_of_slots(p_slots, i_from, i_to, tl.zeros((1, BLOCK_F), tl.int32), o_f, m_f, F)
        if complete:
            b_one = i_row + tl.zeros((1,), tl.int64)
            _store_tile(
                p_out, p_own, p_row_scale, p_self_scale, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift, p_step, p_bits, p_pos,
                b_sum, b_one, b_one >= 0, o_f, m_f, F, stride_own, out_first_4, out_first_2, out_first_1, out_first_0,
                out_start_4, out_start_2, out_start_1, out_stride_8, out_stride_4, out_stride_2, out_stride_1,
                CONTAINER, BIAS > 0, OUTPUT, OUT_CONTAINER, OUT_SIGNED, RELU,
            )  # fmt: skip
    else:
        b_row, m_row, b_first, b_degree = _narrow_rows(p_order, p_indptr, i_tile - S, R, BLOCK_R)
        b_acc = _sum_narrow(
            p_x, p_indices, b_first, b_degree, o_u, m_u, stride_x, CONTAINER, LANES, FIELDS, FIELD, MASK, FLIP, BIAS, FLUSH, UNROLL,
            BLOCK_R, BLOCK_F,
        )  # fmt: skip
        _store_tile(
            p_out, p_own, p_row_scale, p_self_scale, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift, p_step, p_bits, p_pos,
            b_acc, b_row, m_row, o_f, m_f, F, stride_own, out_first_4, out_first_2, out_first_1, out_first_0,
            out_start_4, out_start_2, out_start_1, out_stride_8, out_stride_4, out_stride_2, out_stride_1,
            CONTAINER, BIAS > 0, OUTPUT, OUT_CONTAINER, OUT_SIGNED, RELU,
        )  # fmt: skip


def aggregate_packed(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, features: int, signed: bool,
    output: str, row_scale: Tensor | None, self_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None,
    relu: bool, post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    out = empty_output(x, output, indptr.numel() - 1, features, out_counts)
    if not out.numel():
        return out
    if container == 0:  # nothing is stored and every code is 0, which a row of no edges also gives
        (indptr, schedule), container, self_scale = without_edges(indptr), 8, None
    stride = row_bytes(container, features)
    words = stride % 16 == 0
    block_f = min(max(triton.next_power_of_2(features), 16), 128)
    block_r, block_e = min(32, 4096 // block_f), min(128, 4096 // block_f)
    blocks = triton.cdiv(padded_features(out_counts, features) if output == "rows" else features, block_f)
    arrived, slots = workspace(schedule, features, blocks, [torch.int32])
    launch(
        _aggregate_packed_kernel, grid(schedule, block_r, blocks),
        p_slots=slots, p_arrived=arrived, **schedule_arguments(indptr, indices, schedule),
        p_x=x.view(torch.int32) if words else x, p_own=None if self_scale is None else x, p_row_scale=dense(row_scale),
        p_self_scale=dense(self_scale), p_col_scale=dense(col_scale), p_bias=dense(bias), p_addend=dense(addend),
        p_post_scale=dense(post_scale), p_post_shift=dense(post_shift), F=features, stride_own=stride,
        X_VECTORS=stride // 16 if words else stride, VECTOR=4 if words else 1, **lane_constants(container, signed, 32 if words else 8),
        **output_arguments(out, output, out_counts, features, out_step, out_bits, out_pos, out_signed),
        RELU=relu, UNROLL=4, BLOCK_R=block_r, BLOCK_E=block_e, BLOCK_F=block_f, **EXACT,
    )  # fmt: skip
    return out


def _case(
    name: str, x: str, container: int, unit: int, output: str, out: str, index: str = "*i32", **changed: object
) -> CompileCase:
    constexprs: dict[str, object] = {
        **lane_constants(container, True, unit), "VECTOR": 4 if unit == 32 else 1, "OUTPUT": output,
        "OUT_CONTAINER": None, "OUT_SIGNED": True, "TAILS": False, "RELU": True,
        "UNROLL": 4, "BLOCK_R": 32, "BLOCK_E": 32, "BLOCK_F": 128, **changed,
    }  # fmt: skip
    signature = {
        **SCHEDULE_SIGNATURE, "p_slots": "*i32", **OUTPUT_SIGNATURE, "p_out": out, "p_x": x, "p_own": "*u8",
        **dict.fromkeys(["p_indptr", "p_segments", "p_hubs"], index), "F": "i32:16", "stride_own": "i32", "X_VECTORS": "i32",
    }  # fmt: skip
    if unit == 8:  # 16 features: only rows of 8-bit codes have 16 bytes
        signature |= dict.fromkeys(["out_stride_4", "out_stride_2", "out_stride_1"], "i32")
    signature = {argument: kind for argument, kind in signature.items() if argument not in constexprs}
    return CompileCase(name, _aggregate_packed_kernel, signature, constexprs, EXACT)


_GCN: dict[str, Any] = {**PLAIN, "p_own": None}
COMPILE_CASES = [
    _case("aggregate_packed_8_acc", "*i32", 8, 32, "acc", "*i32", **_GCN),
    _case("aggregate_packed_4_float", "*i32", 4, 32, "float", "*fp32", **_GCN),
    _case("aggregate_packed_2_float", "*i32", 2, 32, "float", "*fp32", **_GCN),
    _case("aggregate_packed_1_float", "*i32", 1, 32, "float", "*fp32", **_GCN),
    _case("aggregate_packed_8_rows", "*i32", 8, 32, "rows", "*u8", **_GCN),
    _case("aggregate_packed_4_rows", "*i32", 4, 32, "rows", "*u8", **_GCN),
    _case("aggregate_packed_4_rows_uniform", "*i32", 4, 32, "rows", "*u8", OUT_CONTAINER=4, p_pos=None, **_GCN),
    _case("aggregate_packed_4_rows_int64", "*i32", 4, 32, "rows", "*u8", index="*i64", **_GCN),
    _case("aggregate_packed_4_bytes_rows", "*u8", 4, 8, "rows", "*u8", BLOCK_F=16, BLOCK_E=128, TAILS=True, **_GCN),
    # GIN's own codes, SAGE's addend, a batch normalisation after the ReLU.
    _case("aggregate_packed_8_whole_epilogue_rows", "*i32", 8, 32, "rows", "*u8"),
    _case("aggregate_packed_4_whole_epilogue_float", "*i32", 4, 32, "float", "*fp32"),
]
