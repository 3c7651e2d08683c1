"""Triton graph attention on packed codes, for inference (contract: :mod:`..attention`; one launch: :mod:`.segments`).

A code becomes a float without a conversion, of which a GPU does few: its bits, biased to be positive, are the low bits of the float 2^23 + code, from
which 2^23 and the bias are taken off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import empty_output, row_bytes
from .attention_heads import (
    _fold_scores,
    _heads_of_program,
    _merge_lanes,
    _merge_slots,
    _no_edges,
    _of_heads,
    head_blocks,
    head_tile,
)
from .common import EXACT, OUT_FIRSTS, CompileCase, _unpack, launch
from .epilogue import (
    OUTPUT_SIGNATURE,
    _clear_tails,
    _epilogue,
    _store_output,
    output_arguments,
)
from .quantize import quantize
from .segments import (
    SCHEDULE_SIGNATURE,
    _last_to_arrive,
    _narrow_rows,
    _segment,
    _store_slot,
    dense,
    grid,
    schedule_arguments,
    without_edges,
    workspace,
)


@triton.jit
def _codes_of_channels(
    p_x, b_row, m_row, o_h, m_h, i_c, C, stride_x, CONTAINER: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Signed codes of the rows ``b_row``, float32 ``[R, H, C]``; ``VECTOR`` divides C."""
    LANES: tl.constexpr = 8 // CONTAINER
    p_row = (p_x + b_row.to(tl.int64) * stride_x)[:, None, None]
    m_head = (m_row[:, None] & m_h[None, :])[:, :, None]
    if VECTOR % LANES == 0:  # every head starts at a byte
        o_b = i_c * (BLOCK_C // LANES) + tl.arange(0, BLOCK_C // LANES)
        p_byte = p_row + (o_h * (C // LANES))[None, :, None] + o_b[None, None, :]
        b_low = _unpack(tl.load(p_byte, mask=m_head & (o_b < C // LANES)[None, None, :], other=0), CONTAINER, False)
    else:
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        o_bit = ((o_h * C)[:, None] + o_c[None, :]) * CONTAINER
        b_byte = tl.load(p_row + (o_bit >> 3)[None, :, :], mask=m_head & (o_c < C)[None, None, :], other=0)
        b_low = (b_byte.to(tl.int32) >> (o_bit & 7)[None, :, :]) & ((1 << CONTAINER) - 1)
    BIAS: tl.constexpr = 1 << (CONTAINER - 1)
    b_float = (b_low ^ (0x4B000000 | BIAS)).to(tl.float32, bitcast=True)
    return b_float - (8388608.0 + BIAS)


@triton.jit(do_not_specialize=["M"])
def _attention_scores_kernel(
    p_out,  # [M, 2 H]
    p_x,  # packed [M, H * C]
    p_vectors,  # [2, H * C]
    M, H, C_VECTORS, stride_x,
    CONTAINER: tl.constexpr, VECTOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[i, s * H + h] = sum_c code[i, h, c] * vectors[s, h, c]."""
    C = C_VECTORS * VECTOR
    b_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_row, m_h = b_row < M, o_h < H
    b_src = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    b_dst = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for i_c in range(0, tl.cdiv(C, BLOCK_C)):
        b_x = _codes_of_channels(p_x, b_row, m_row, o_h, m_h, i_c, C, stride_x, CONTAINER, VECTOR, BLOCK_C)
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        p_vector = p_vectors + (o_h * C)[:, None] + o_c[None, :]
        m_vector = m_h[:, None] & (o_c < C)[None, :]
        b_src += tl.sum(b_x * tl.load(p_vector, mask=m_vector, other=0)[None, :, :], axis=2)
        b_dst += tl.sum(b_x * tl.load(p_vector + H * C, mask=m_vector, other=0)[None, :, :], axis=2)
    p_tile = p_out + b_row[:, None] * 2 * H + o_h[None, :]
    m_tile = m_row[:, None] & m_h[None, :]
    tl.store(p_tile, b_src, mask=m_tile)
    tl.store(p_tile + H, b_dst, mask=m_tile)


@triton.jit
def _fold_codes(
    b_top, b_total, b_acc, b_dst, p_x, p_src, p_indices, b_edge, m_edge, o_h, m_h, i_c, C, stride_x, stride_src, negative_slope,
    CONTAINER: tl.constexpr, VECTOR: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Takes one more edge into each lane of ``b_top``, ``b_total`` ``[E, H]`` and ``b_acc`` ``[E, H, C]``."""
    b_source = tl.load(p_indices + b_edge, mask=m_edge, other=0)
    b_raw = _of_heads(p_src, b_source, m_edge, o_h, m_h, stride_src) + b_dst
    b_top, b_total, b_keep, b_p = _fold_scores(b_top, b_total, b_raw, m_edge, negative_slope)
    b_x = _codes_of_channels(p_x, b_source, m_edge, o_h, m_h, i_c, C, stride_x, CONTAINER, VECTOR, BLOCK_C)
    return b_top, b_total, b_acc * b_keep[:, :, None] + b_p[:, :, None] * b_x


@triton.jit
def _store_heads(
    p_out, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift, p_step, p_bits, p_pos, b_total, b_acc, b_row, m_row, o_h, m_h, o_c, m_c, H, C,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    OUTPUT: tl.constexpr, OUT_CONTAINER: tl.constexpr, OUT_SIGNED: tl.constexpr, RELU: tl.constexpr,
):  # fmt: skip
    """The sums ``[R, H, C]`` over their totals, after the epilogue, as they are or quantized by row and packed."""
    R: tl.constexpr = b_acc.shape[0]
    F: tl.constexpr = b_acc.shape[1] * b_acc.shape[2]
    b_v = tl.reshape(tl.div_rn(b_acc, tl.where(b_total == 0, 1.0, b_total)[:, :, None]), (R, F))
    o_f = tl.reshape((o_h * C)[:, None] + o_c[None, :], (F,))
    m_f = tl.reshape(m_h[:, None] & m_c[None, :], (F,))
    b_v = _epilogue(
        b_v,
        b_v,
        None,
        None,
        p_col_scale,
        p_bias,
        p_addend,
        p_post_scale,
        p_post_shift,
        b_row,
        m_row,
        o_f,
        m_f,
        H * C,
        RELU,
    )
    _store_output(
        p_out, p_step, p_bits, p_pos, b_v, b_row, m_row, tl.program_id(1), o_f, m_f, H * C,
        first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1, OUTPUT, OUT_CONTAINER, OUT_SIGNED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["R", "S", "size", *OUT_FIRSTS])
def _gat_packed_kernel(
    p_out,  # float32 [N, H * C], or packed rows
    p_slots,  # [slots, H * C] int32, the bits of float32
    p_top_slots, p_total_slots,  # [slots, H], likewise
    p_arrived,  # [hubs, blocks] int32
    p_indptr, p_indices, p_order, p_segments, p_hubs,  # [N + 1], [E], [R], [S, 5], [hubs, 3]
    p_x,  # packed [M, H * C]
    p_src, p_dst,  # [M, H], [N, H]
    p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift,  # [H * C], but [N, H * C] the addend
    p_step, p_bits, p_pos,  # [N], of the packed output
    R, S, H, C_VECTORS, size, stride_x, stride_src, stride_dst, negative_slope,
    out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1, out_stride_8, out_stride_4, out_stride_2, out_stride_1,
    CONTAINER: tl.constexpr, VECTOR: tl.constexpr, OUTPUT: tl.constexpr, OUT_CONTAINER: tl.constexpr, OUT_SIGNED: tl.constexpr, TAILS: tl.constexpr,
    RELU: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[i] = epilogue(sum over the edges e of row i of softmax(leaky_relu(src + dst))[e] * code[indices[e]]) for each head."""
    C = C_VECTORS * VECTOR  # so the compiler knows what divides a head
    i_tile = tl.program_id(0)
    o_h, m_h, o_c, m_c, i_c = _heads_of_program(H, C, BLOCK_H, BLOCK_C)
    if TAILS:
        if (i_tile == 0) & (tl.program_id(1) == 0):
            _clear_tails(
                p_out, size, out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1,
                out_stride_8, out_stride_4, out_stride_2, out_stride_1,
            )  # fmt: skip
    if i_tile < S:
        i_row, i_first, i_end, i_slot, i_hub = _segment(p_segments, i_tile)
        b_own = i_row + tl.zeros((1,), tl.int64)
        b_dst = _of_heads(p_dst, b_own, b_own >= 0, o_h, m_h, stride_dst)
        b_tops, b_totals, b_accs = _no_edges(BLOCK_E, BLOCK_H, BLOCK_C)
        for i_edge in range(i_first, i_end, BLOCK_E):
            b_edge = i_edge + tl.arange(0, BLOCK_E)
            b_tops, b_totals, b_accs = _fold_codes(
                b_tops, b_totals, b_accs, b_dst, p_x, p_src, p_indices, b_edge, b_edge < i_end, o_h, m_h, i_c, C, stride_x, stride_src,
                negative_slope, CONTAINER, VECTOR, BLOCK_C,
            )  # fmt: skip
        b_top, b_total, b_acc = _merge_lanes(b_tops, b_totals, b_accs)
        complete = i_slot < 0
        if i_slot >= 0:
            # Blocks of channels of the same heads write the same bits to these two.
            _store_slot(p_top_slots, i_slot, b_top, o_h, m_h, H)
            _store_slot(p_total_slots, i_slot, b_total, o_h, m_h, H)
            o_f, m_f = o_h[:, None] * C + o_c[None, :], m_h[:, None] & m_c[None, :]
            _store_slot(p_slots, i_slot, b_acc, o_f, m_f, H * C)
            complete, i_from, i_to = _last_to_arrive(p_arrived, p_hubs, i_hub)
            if complete:
                b_top, b_total, b_acc = _merge_slots(
                    p_top_slots, p_total_slots, p_slots, i_from, i_to, b_acc, o_h, m_h, o_f, m_f, H, H * C
                )
        if complete:
            _store_heads(
                p_out, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift, p_step, p_bits, p_pos, b_total, b_acc, b_own, b_own >= 0,
                o_h, m_h, o_c, m_c, H, C, out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1,
                out_stride_8, out_stride_4, out_stride_2, out_stride_1, OUTPUT, OUT_CONTAINER, OUT_SIGNED, RELU,
            )  # fmt: skip
    else:
        b_row, m_row, b_first, b_degree = _narrow_rows(p_order, p_indptr, i_tile - S, R, BLOCK_R)
        b_row_dst = _of_heads(p_dst, b_row, m_row, o_h, m_h, stride_dst)
        b_row_tops, b_row_totals, b_row_accs = _no_edges(BLOCK_R, BLOCK_H, BLOCK_C)
        for k in range(0, tl.max(b_degree, axis=0), UNROLL):
            for u in tl.static_range(UNROLL):
                b_row_tops, b_row_totals, b_row_accs = _fold_codes(
                    b_row_tops, b_row_totals, b_row_accs, b_row_dst, p_x, p_src, p_indices, b_first + (k + u), k + u < b_degree, o_h, m_h, i_c, C,
                    stride_x, stride_src, negative_slope, CONTAINER, VECTOR, BLOCK_C,
                )  # fmt: skip
        _store_heads(
            p_out, p_col_scale, p_bias, p_addend, p_post_scale, p_post_shift, p_step, p_bits, p_pos, b_row_totals, b_row_accs, b_row, m_row,
            o_h, m_h, o_c, m_c, H, C, out_first_4, out_first_2, out_first_1, out_first_0, out_start_4, out_start_2, out_start_1,
            out_stride_8, out_stride_4, out_stride_2, out_stride_1, OUTPUT, OUT_CONTAINER, OUT_SIGNED, RELU,
        )  # fmt: skip


def attention_scores(x: Tensor, container: int, sources: int, heads: int, channels: int, vectors: Tensor) -> Tensor:
    features = heads * channels
    if not container or not features:
        return vectors.new_zeros(sources, 2 * heads)
    out = vectors.new_empty(sources, 2 * heads)
    if sources:
        tile = head_tile(heads, channels)
        del tile["BLOCK_E"]
        launch(
            _attention_scores_kernel, (triton.cdiv(sources, tile["BLOCK_R"]), triton.cdiv(heads, tile["BLOCK_H"])),
            p_out=out, p_x=x, p_vectors=dense(vectors), M=sources, stride_x=row_bytes(container, features), CONTAINER=container, **tile, **EXACT,
        )  # fmt: skip
    return out


def _rows_of_heads(values: Tensor) -> Tensor:
    """As the kernel reads it: the heads of a row lie side by side, whatever lies between two rows."""
    return values if values.stride(1) == 1 else values.contiguous()


def _packs_in_place(tile: dict[str, int]) -> bool:
    """Whether the tiles of heads and channels are blocks of features, one after the other, without gaps, and large enough to be packed."""
    heads, channels = tile["H"], tile["C_VECTORS"] * tile["VECTOR"]
    whole = channels == tile["BLOCK_C"] or (tile["BLOCK_H"] == 1 and (heads == 1 or channels % tile["BLOCK_C"] == 0))
    return whole and tile["BLOCK_H"] * tile["BLOCK_C"] >= 8


def gat_packed(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, heads: int, channels: int, src: Tensor,
    dst: Tensor, negative_slope: float, output: str, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None, relu: bool,
    post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    """One launch; two where codes are wanted of heads that fill no tile (say, 8 heads of 6 channels): the second one packs."""
    features, tile = heads * channels, head_tile(heads, channels)
    if output == "rows" and out_step is not None and out_bits is not None and not _packs_in_place(tile):
        v = gat_packed(
            indptr, indices, schedule, x, container, sources, heads, channels, src, dst, negative_slope, "float", col_scale, bias, addend, relu,
            post_scale, post_shift, None, None, None, out_counts, out_signed,
        )  # fmt: skip
        return quantize(v, out_step, out_bits, True, out_signed, out_pos, out_counts, False)[0]
    out = empty_output(x, output, indptr.numel() - 1, features, out_counts)
    if not out.numel():
        return out
    if container == 0:  # nothing is stored and every code is 0, which a row of no edges also gives
        (indptr, schedule), container = without_edges(indptr), 8
    blocks = head_blocks(tile)
    arrived, slots = workspace(schedule, features, blocks, [torch.int32])
    _, top_slots, total_slots = workspace(schedule, heads, blocks, [torch.int32, torch.int32])
    src, dst = _rows_of_heads(src), _rows_of_heads(dst)
    launch(
        _gat_packed_kernel, grid(schedule, tile["BLOCK_R"], blocks),
        p_slots=slots, p_top_slots=top_slots, p_total_slots=total_slots, p_arrived=arrived, **schedule_arguments(indptr, indices, schedule),
        p_x=x, p_src=src, p_dst=dst, p_col_scale=dense(col_scale), p_bias=dense(bias), p_addend=dense(addend), p_post_scale=dense(post_scale),
        p_post_shift=dense(post_shift), stride_x=row_bytes(container, features), stride_src=src.stride(0), stride_dst=dst.stride(0),
        negative_slope=negative_slope, CONTAINER=container,
        **output_arguments(out, output, out_counts, features, out_step, out_bits, out_pos, out_signed),
        RELU=relu, UNROLL=2 if tile["VECTOR"] >= 4 else 1, **tile, **EXACT,
    )  # fmt: skip
    return out


_TILE = {"VECTOR": 16, "BLOCK_R": 16, "BLOCK_E": 16, "BLOCK_H": 8, "BLOCK_C": 16}
_WHOLE = ["p_addend", "p_post_scale", "p_post_shift"]


def _case(name: str, container: int, output: str, out: str, **changed: object) -> CompileCase:
    constexprs: dict[str, object] = {
        **_TILE, "C_VECTORS": 1, "CONTAINER": container, "OUTPUT": output, "OUT_CONTAINER": None, "OUT_SIGNED": True, "TAILS": False, "RELU": False,
        "UNROLL": 2, **changed,
    }  # fmt: skip
    signature = {
        **SCHEDULE_SIGNATURE, **dict.fromkeys(["p_slots", "p_top_slots", "p_total_slots"], "*i32"), **OUTPUT_SIGNATURE,
        "p_out": out, "p_x": "*u8", "p_src": "*fp32", "p_dst": "*fp32", "H": "i32", "C_VECTORS": "i32", "stride_x": "i32:16",
        "stride_src": "i32", "stride_dst": "i32", "negative_slope": "fp32",
    }  # fmt: skip
    names = set(_gat_packed_kernel.arg_names) - set(constexprs)
    signature = {argument: kind for argument, kind in signature.items() if argument in names}
    return CompileCase(name, _gat_packed_kernel, signature, constexprs, EXACT)


def _scores_case(name: str, container: int, **changed: object) -> CompileCase:
    constexprs = {
        name: value for name, value in {**_TILE, "CONTAINER": container, **changed}.items() if name != "BLOCK_E"
    }
    signature = {
        "p_out": "*fp32",
        "p_x": "*u8",
        "p_vectors": "*fp32",
        "M": "i32",
        "H": "i32",
        "C_VECTORS": "i32",
        "stride_x": "i32:16",
    }
    signature = {argument: kind for argument, kind in signature.items() if argument not in constexprs}
    return CompileCase(name, _attention_scores_kernel, signature, constexprs, EXACT)


_PLAIN = dict.fromkeys(_WHOLE)
_SEVEN = {"VECTOR": 1, "BLOCK_H": 8, "BLOCK_C": 8, "UNROLL": 1}
COMPILE_CASES = [
    # Triton compiles arguments of 1 as constants: H = 1, and C_VECTORS where there are 16 channels.
    _case("gat_packed_8_float", 8, "float", "*fp32", **_PLAIN),
    _case("gat_packed_4_rows", 4, "rows", "*u8", **_PLAIN, RELU=True),
    _case("gat_packed_8_whole_epilogue_rows", 8, "rows", "*u8", RELU=True),
    _case(
        "gat_packed_4_1_head_128",
        4,
        "rows",
        "*u8",
        **_PLAIN,
        H=1,
        C_VECTORS=8,
        BLOCK_H=1,
        BLOCK_C=128,
        OUT_CONTAINER=4,
        p_pos=None,
    ),
    _case("gat_packed_4_8_heads_of_7", 4, "float", "*fp32", **_PLAIN, **_SEVEN, C_VECTORS=7),
    _scores_case("attention_scores_8", 8, C_VECTORS=1),
    _scores_case("attention_scores_4", 4, C_VECTORS=1),
    _scores_case("attention_scores_4_8_heads_of_7", 4, VECTOR=1, BLOCK_C=8, C_VECTORS=7),
]
