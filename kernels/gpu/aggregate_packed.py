"""Triton gather-aggregate of packed codes in int32, with the fused epilogue (contract: :mod:`..aggregate`; one launch: :mod:`.segments`).

A row whose bytes 4 divides is read in words of 32 bits, 16 bytes a load where they are that many, any other in bytes. The codes of a word are added
where they stand: shifted by lane and masked, several to a word, so that one addition counts for two codes of 8 bits or four narrower ones; before a
field could overflow, the fields are added to int32. Signed codes get their bias (128 for 8 bits) by one exclusive or, and it is taken off once per
row.

Worked example, 4-bit codes: the word 0x000000F1 holds the codes 1, -1, 0 ... With the bias it is 0x88888879: 9, 7, 8 ... in the lanes 0 (even codes,
0x08080809) and 1 (odd codes, 0x08080807). Sixteen edges reach at most 16 * 15 = 240 in a field of 8 bits.

A program is one warp: rows of 128 bytes are 4 side by side, and a thread reads the 16 bytes of 4 edges before it adds the first, while the sources
of the next 16 edges are read. Compiled for sm_90 (8 bits): 64 registers, so 32 warps with 64 KB of rows on the way to a multiprocessor, where 4.8
TB/s over 132 of them at 0.8 us ask for 29 KB; 1.7 instructions a code, 0.9 ms of issue at Reddit's size and 128 features, where the bytes take 3.2
ms. Four warps that masked every load took 96 registers and 2.8 instructions, and read the sources of an edge before its row. No GPU was at hand:
this is chosen by the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import empty_output, row_bytes
from . import tuning
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
    _narrow_edges,
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
    else:
        # Part j of PARTS is part j // 2 of the units shifted by (j % 2) * SHIFT.
        b_even = _split(b_unit, 2 * SHIFT, PARTS // 2, MASK)
        b_odd = _split(b_unit >> SHIFT, 2 * SHIFT, PARTS // 2, MASK)
        return tl.interleave(b_even, b_odd)


@triton.jit
def _lanes(
    p_x, b_source, m_edge, o_u, m_u, STRIDE: tl.constexpr,
    CONTAINER: tl.constexpr, LANES: tl.constexpr, MASK: tl.constexpr, FLIP: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The codes of the sources ``[UNROLL * SIDE]`` by lane, biased, and summed over the ``UNROLL`` that one thread reads: int32
    ``[SIDE, U * LANES]``. ``m_edge`` is None where every edge counts, ``m_u`` where every unit belongs to the row."""
    p_unit = p_x + b_source.to(tl.int64)[:, None] * STRIDE + o_u[None, :]
    if m_edge is not None and m_u is not None:
        b_unit = tl.load(p_unit, mask=m_edge[:, None] & m_u[None, :], other=FLIP)
    elif m_edge is not None:
        b_unit = tl.load(p_unit, mask=m_edge[:, None], other=FLIP)
    elif m_u is not None:
        b_unit = tl.load(p_unit, mask=m_u[None, :], other=FLIP)
    else:
        b_unit = tl.load(p_unit)
    b_lanes = _split(b_unit.to(tl.int32) ^ FLIP, CONTAINER, LANES, MASK)
    return tl.sum(tl.reshape(b_lanes, (UNROLL, b_lanes.shape[0] // UNROLL, b_lanes.shape[1])), axis=0)


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
    p_x, p_indices, i_first, i_end, o_u, m_u, STRIDE: tl.constexpr, CONTAINER: tl.constexpr, LANES: tl.constexpr, FIELDS: tl.constexpr,
    FIELD: tl.constexpr, MASK: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, FLUSH: tl.constexpr,
    UNROLL: tl.constexpr, SIDE: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Sum of the codes over the edges of a segment, int32 ``[1, BLOCK_F]``."""
    BLOCK_E: tl.constexpr = UNROLL * SIDE
    PART: tl.constexpr = FLUSH // UNROLL * BLOCK_E
    o_e = tl.arange(0, BLOCK_E)
    i_whole = i_first + (i_end - i_first) // BLOCK_E * BLOCK_E
    b_sums = tl.zeros((SIDE, BLOCK_F), tl.int32)
    b_source = tl.load(p_indices + i_first + o_e, mask=i_first + o_e < i_end, other=0)
    for i_part in range(i_first, i_whole, PART):
        b_lanes = tl.zeros((SIDE, BLOCK_F // FIELDS), tl.int32)
        for i_edge in range(i_part, tl.minimum(i_part + PART, i_whole), BLOCK_E):
            # The sources of the next edges are on their way while the rows of these are read.
            b_edge = i_edge + BLOCK_E + o_e
            b_next = tl.load(p_indices + b_edge, mask=b_edge < i_end, other=0)
            b_lanes += _lanes(p_x, b_source, None, o_u, m_u, STRIDE, CONTAINER, LANES, MASK, FLIP, UNROLL)
            b_source = b_next
        b_sums += _split(b_lanes, FIELD, FIELDS, (1 << FIELD) - 1)
    if i_whole < i_end:
        b_lanes = _lanes(p_x, b_source, i_whole + o_e < i_end, o_u, m_u, STRIDE, CONTAINER, LANES, MASK, FLIP, UNROLL)
        b_sums += _split(b_lanes, FIELD, FIELDS, (1 << FIELD) - 1)
    return _ordered(tl.sum(b_sums, axis=0)[None, :], LANES, FIELDS) - BIAS * (i_end - i_first).to(tl.int32)


@triton.jit
def _sum_narrow(
    p_x, p_indices, p_order, p_indptr, i_tile, R, b_degree, o_u, m_u, STRIDE: tl.constexpr, CONTAINER: tl.constexpr, LANES: tl.constexpr,
    FIELDS: tl.constexpr, FIELD: tl.constexpr, MASK: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, FLUSH: tl.constexpr,
    UNROLL: tl.constexpr, SIDE: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Sums of the codes over the edges of each row of a narrow tile, int32 ``[SIDE, BLOCK_F]``."""
    # Edge k of every row, then edge k + 1 of every row ...: [UNROLL * SIDE]
    o_e = tl.arange(0, UNROLL * SIDE)
    b_edge, b_end = _narrow_edges(p_order, p_indptr, i_tile * SIDE + o_e % SIDE, R)
    b_edge += o_e // SIDE
    longest = tl.max(b_degree, axis=0)
    b_sums = tl.zeros((SIDE, BLOCK_F), tl.int32)
    b_source = tl.load(p_indices + b_edge, mask=b_edge < b_end, other=0)
    for i_part in range(0, longest, FLUSH):
        b_lanes = tl.zeros((SIDE, BLOCK_F // FIELDS), tl.int32)
        for k in range(i_part, tl.minimum(i_part + FLUSH, longest), UNROLL):
            m_edge = b_edge + k < b_end
            b_next = tl.load(p_indices + b_edge + (k + UNROLL), mask=b_edge + (k + UNROLL) < b_end, other=0)
            b_lanes += _lanes(p_x, b_source, m_edge, o_u, m_u, STRIDE, CONTAINER, LANES, MASK, FLIP, UNROLL)
            b_source = b_next
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
    R, S, F, size, stride_own,
    out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1, out_stride_8, out_stride_4, out_stride_2, out_stride_1,
    STRIDE: tl.constexpr, WHOLE: tl.constexpr, CONTAINER: tl.constexpr, LANES: tl.constexpr, FIELDS: tl.constexpr, FIELD: tl.constexpr,
    MASK: tl.constexpr, FLIP: tl.constexpr, BIAS: tl.constexpr, FLUSH: tl.constexpr, OUTPUT: tl.constexpr, OUT_CONTAINER: tl.constexpr,
    OUT_SIGNED: tl.constexpr, TAILS: tl.constexpr, RELU: tl.constexpr, UNROLL: tl.constexpr, SIDE: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[i] = epilogue(sum over the edges e of row i of code[indices[e]]) (A2Q proofs 2 and 3)."""
    i_tile, i_f = tl.program_id(0), tl.program_id(1)
    o_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    BLOCK_U: tl.constexpr = BLOCK_F // (LANES * FIELDS)
    o_u = i_f * BLOCK_U + tl.arange(0, BLOCK_U)
    m_u = None if WHOLE else o_u < STRIDE
    if TAILS:
        if (i_tile == 0) & (i_f == 0):
            _clear_tails(
                p_out, size, out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1,
                out_stride_8, out_stride_4, out_stride_2, out_stride_1,
            )  # fmt: skip
    if i_tile < S:
        i_row, i_first, i_end, i_slot, i_hub = _segment(p_segments, i_tile)
        b_sum = _sum_segment(
            p_x, p_indices, i_first, i_end, o_u, m_u, STRIDE, CONTAINER, LANES, FIELDS, FIELD, MASK, FLIP, BIAS, FLUSH, UNROLL, SIDE, BLOCK_F,
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
        b_row, m_row, _, b_degree = _narrow_rows(p_order, p_indptr, i_tile - S, R, SIDE)
        b_acc = _sum_narrow(
            p_x, p_indices, p_order, p_indptr, i_tile - S, R, b_degree, o_u, m_u, STRIDE, CONTAINER, LANES, FIELDS, FIELD, MASK, FLIP, BIAS,
            FLUSH, UNROLL, SIDE, BLOCK_F,
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
    rows, stride = indptr.numel() - 1, row_bytes(container, features)
    words = stride % 4 == 0
    columns = padded_features(out_counts, features) if output == "rows" else features

    def run(use: dict[str, int]) -> None:
        sizes = packed_tile(container, features, columns, use["UNROLL"], use["num_warps"])
        blocks = triton.cdiv(columns, sizes["BLOCK_F"])
        arrived, slots = workspace(schedule, features, blocks, [torch.int32])
        launch(
            _aggregate_packed_kernel, grid(schedule, sizes["SIDE"], blocks),
            p_slots=slots, p_arrived=arrived, **schedule_arguments(indptr, indices, schedule),
            p_x=x.view(torch.int32) if words else x, p_own=None if self_scale is None else x, p_row_scale=dense(row_scale),
            p_self_scale=dense(self_scale), p_col_scale=dense(col_scale), p_bias=dense(bias), p_addend=dense(addend),
            p_post_scale=dense(post_scale), p_post_shift=dense(post_shift), F=features, stride_own=stride,
            **lane_constants(container, signed, 32 if words else 8), **sizes,
            **output_arguments(out, output, out_counts, features, out_step, out_bits, out_pos, out_signed),
            RELU=relu, **{**EXACT, "num_warps": use["num_warps"]},
        )  # fmt: skip

    tuning.run("aggregate_packed", out.device, features, container, run, indices.numel() / rows)
    return out


def packed_tile(container: int, features: int, columns: int, unroll: int, num_warps: int) -> dict[str, int | bool]:
    """Sizes of a tile: a thread reads ``UNROLL`` rows 16 bytes at a time, ``SIDE`` rows lie side by side over the threads.

    A block of features is up to 128 bytes of a row. What a block costs is its bytes, needed or not, and about 16 bytes' worth for the index and the
    address: so 602 codes of 4 bits are 5 blocks of 128, the last of which is used to 70 %, and not 3 of 256.
    """
    stride = row_bytes(container, features)
    size = 4 if stride % 4 == 0 else 1
    least = max(16, 32 // container)
    most = max(min(triton.next_power_of_2(columns), 1024 // container), least)
    sizes = [1 << k for k in range(least.bit_length() - 1, most.bit_length())]
    block_f = min(sizes, key=lambda block: (triton.cdiv(columns, block) * (block * container // 8 + 16), -block))
    units = block_f * container // (8 * size)
    vector = math.gcd(stride, 16) // size
    return {
        "STRIDE": stride // size, "WHOLE": stride // size == triton.cdiv(columns, block_f) * units,
        "UNROLL": unroll, "SIDE": max(32 * num_warps * vector // units, 1), "BLOCK_F": block_f,
    }  # fmt: skip


def _case(
    name: str, container: int, output: str, out: str, features: int = 128, index: str = "*i32", **changed: object
) -> CompileCase:  # fmt: skip
    use = tuning.shipped("aggregate_packed")[0]
    words = row_bytes(container, features) % 4 == 0
    constexprs: dict[str, object] = {
        **lane_constants(container, True, 32 if words else 8), **packed_tile(container, features, features, use["UNROLL"], use["num_warps"]),
        "OUTPUT": output, "OUT_CONTAINER": None, "OUT_SIGNED": True, "TAILS": False, "RELU": True, **changed,
    }  # fmt: skip
    signature = {
        **SCHEDULE_SIGNATURE, "p_slots": "*i32", **OUTPUT_SIGNATURE, "p_out": out, "p_x": "*i32" if words else "*u8", "p_own": "*u8",
        **dict.fromkeys(["p_indptr", "p_segments", "p_hubs"], index), "F": "i32:16" if features % 16 == 0 else "i32", "stride_own": "i32",
    }  # fmt: skip
    for narrow in (c for c in (8, 4, 2, 1) if row_bytes(c, features) % 16):
        signature[f"out_stride_{narrow}"] = "i32"
    signature = {argument: kind for argument, kind in signature.items() if argument not in constexprs}
    return CompileCase(name, _aggregate_packed_kernel, signature, constexprs, {**EXACT, "num_warps": use["num_warps"]})


_GCN: dict[str, Any] = {**PLAIN, "p_own": None}
COMPILE_CASES = [
    _case("aggregate_packed_8_acc", 8, "acc", "*i32", **_GCN),
    _case("aggregate_packed_4_float", 4, "float", "*fp32", **_GCN),
    _case("aggregate_packed_2_float", 2, "float", "*fp32", **_GCN),
    _case("aggregate_packed_1_float", 1, "float", "*fp32", **_GCN),
    _case("aggregate_packed_4_rows_uniform", 4, "rows", "*u8", OUT_CONTAINER=4, p_pos=None, **_GCN),
    _case("aggregate_packed_4_rows_int64", 4, "rows", "*u8", index="*i64", **_GCN),
    _case("aggregate_packed_4_words_rows", 4, "rows", "*u8", features=16, TAILS=True, **_GCN),
    _case("aggregate_packed_8_bytes_rows", 8, "rows", "*u8", features=7, TAILS=True, **_GCN),
    _case("aggregate_packed_8_float_602", 8, "float", "*fp32", features=602, **_GCN),
    # GIN's own codes, SAGE's addend, a batch normalisation after the ReLU.
    _case("aggregate_packed_8_whole_epilogue_rows", 8, "rows", "*u8"),
]
