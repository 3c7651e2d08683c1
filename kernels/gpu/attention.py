"""Triton edge softmax and fused graph attention (contract: :mod:`..attention`; one launch: :mod:`.segments`).

The forward pass reads every edge once, with the running maximum and sum of the online softmax in each lane. A lane is a row on the narrow path
and an edge position of a segment on the other; the lanes of a segment, and the slots of a hub, are merged in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_backward import gat_backward, row_sums
from .attention_heads import (
    _fold_scores,
    _heads_of_program,
    _merge_lanes,
    _merge_slots,
    _no_edges,
    _of_channels,
    _of_heads,
    _raw_scores,
    head_blocks,
    head_tile,
)
from .attention_packed import attention_scores, gat_packed
from .common import EXACT, CompileCase, _cast, check_dtype, launch
from .segments import (
    SCHEDULE_SIGNATURE,
    _last_to_arrive,
    _narrow_rows,
    _segment,
    _store_slot,
    dense,
    grid,
    schedule_arguments,
    workspace,
)

__all__ = [
    "attention_scores",
    "edge_softmax",
    "edge_softmax_backward",
    "gat_aggregate",
    "gat_backward",
    "gat_packed",
]


@triton.jit
def _fold(
    b_top, b_total, b_acc, b_dst, p_x, p_src, p_edge_score, p_scale, p_indices, b_edge, m_edge, o_h, m_h, o_c, m_c, H, C, negative_slope
):  # fmt: skip
    """Takes one more edge into each lane of ``b_top``, ``b_total`` ``[E, H]`` and ``b_acc`` ``[E, H, C]``."""
    b_source = tl.load(p_indices + b_edge, mask=m_edge, other=0)
    b_raw = _raw_scores(p_src, p_edge_score, b_dst, b_source, b_edge, m_edge, o_h, m_h, H)
    b_top, b_total, b_keep, b_p = _fold_scores(b_top, b_total, b_raw, m_edge, negative_slope)
    if p_x is not None:
        if p_scale is not None:
            b_p *= _of_heads(p_scale, b_edge, m_edge, o_h, m_h, H)
        b_x = _of_channels(p_x, b_source, m_edge, o_h, m_h, o_c, m_c, H, C)
        b_acc = b_acc * b_keep[:, :, None] + b_p[:, :, None] * b_x
    return b_top, b_total, b_acc


@triton.jit
def _store_rows(p_out, p_top, p_total, b_top, b_total, b_acc, b_row, m_row, o_h, m_h, o_c, m_c, i_c, H, C):
    b_total = tl.where(b_total == 0, 1.0, b_total)
    o_tile = b_row[:, None] * H + o_h[None, :]
    m_tile = m_row[:, None] & m_h[None, :]
    if i_c == 0:
        tl.store(p_top + o_tile, b_top, mask=m_tile)
        tl.store(p_total + o_tile, b_total, mask=m_tile)
    if p_out is not None:
        p_tile = p_out + o_tile[:, :, None] * C + o_c[None, None, :]
        tl.store(
            p_tile, _cast(tl.div_rn(b_acc, b_total[:, :, None]), p_out), mask=m_tile[:, :, None] & m_c[None, None, :]
        )


@triton.jit(do_not_specialize=["R", "S"])
def _gat_fwd_kernel(
    p_out,  # [N, H, C]
    p_top, p_total,  # [N, H]
    p_slots,  # [slots, H * C] int32, the bits of float32
    p_top_slots, p_total_slots,  # [slots, H], likewise
    p_arrived,  # [hubs, blocks] int32
    p_indptr, p_indices, p_order, p_segments, p_hubs,  # [N + 1], [E], [R], [S, 5], [hubs, 3]
    p_x,  # [M, H, C]; without it and p_out, the statistics alone
    p_src, p_dst,  # [M, H], [N, H]
    p_edge_score, p_scale,  # [E, H]
    R, S, H, C_VECTORS, negative_slope,
    VECTOR: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[i] = sum over the edges e of row i of softmax(leaky_relu(src + dst + edge_score))[e] * scale[e] * x[indices[e]] for each head, and the
    softmax's statistics (:mod:`qgnn.kernels.attention`)."""
    C = C_VECTORS * VECTOR  # so the compiler knows what divides a head
    i_tile = tl.program_id(0)
    o_h, m_h, o_c, m_c, i_c = _heads_of_program(H, C, BLOCK_H, BLOCK_C)
    if i_tile < S:
        i_row, i_first, i_end, i_slot, i_hub = _segment(p_segments, i_tile)
        b_own = i_row + tl.zeros((1,), tl.int64)
        b_dst = tl.zeros((1, BLOCK_H), tl.float32)
        if p_dst is not None:
            b_dst = _of_heads(p_dst, b_own, b_own >= 0, o_h, m_h, H)
        b_tops, b_totals, b_accs = _no_edges(BLOCK_E, BLOCK_H, BLOCK_C)
        for i_edge in range(i_first, i_end, BLOCK_E):
            b_edge = i_edge + tl.arange(0, BLOCK_E)
            b_tops, b_totals, b_accs = _fold(
                b_tops, b_totals, b_accs, b_dst, p_x, p_src, p_edge_score, p_scale, p_indices, b_edge, b_edge < i_end, o_h, m_h, o_c, m_c, H, C,
                negative_slope,
            )  # fmt: skip
        b_top, b_total, b_acc = _merge_lanes(b_tops, b_totals, b_accs)
        complete = i_slot < 0
        if i_slot >= 0:
            # Blocks of channels of the same heads write the same bits to these two.
            _store_slot(p_top_slots, i_slot, b_top, o_h, m_h, H)
            _store_slot(p_total_slots, i_slot, b_total, o_h, m_h, H)
            o_f, m_f = o_h[:, None] * C + o_c[None, :], m_h[:, None] & m_c[None, :]
            if p_x is not None:
                _store_slot(p_slots, i_slot, b_acc, o_f, m_f, H * C)
            complete, i_from, i_to = _last_to_arrive(p_arrived, p_hubs, i_hub)
            if complete:
                b_top, b_total, b_acc = _merge_slots(
                    p_top_slots, p_total_slots, p_slots if p_x is not None else None, i_from, i_to, b_acc, o_h, m_h, o_f, m_f, H, H * C
                )  # fmt: skip
        if complete:
            _store_rows(p_out, p_top, p_total, b_top, b_total, b_acc, b_own, b_own >= 0, o_h, m_h, o_c, m_c, i_c, H, C)
    else:
        b_row, m_row, b_first, b_degree = _narrow_rows(p_order, p_indptr, i_tile - S, R, BLOCK_R)
        b_row_dst = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
        if p_dst is not None:
            b_row_dst = _of_heads(p_dst, b_row, m_row, o_h, m_h, H)
        b_row_tops, b_row_totals, b_row_accs = _no_edges(BLOCK_R, BLOCK_H, BLOCK_C)
        for k in range(0, tl.max(b_degree, axis=0), UNROLL):
            for u in tl.static_range(UNROLL):
                b_row_tops, b_row_totals, b_row_accs = _fold(
                    b_row_tops, b_row_totals, b_row_accs, b_row_dst, p_x, p_src, p_edge_score, p_scale, p_indices, b_first + (k + u),
                    k + u < b_degree, o_h, m_h, o_c, m_c, H, C, negative_slope,
                )  # fmt: skip
        _store_rows(
            p_out, p_top, p_total, b_row_tops, b_row_totals, b_row_accs, b_row, m_row, o_h, m_h, o_c, m_c, i_c, H, C
        )


@triton.jit(do_not_specialize=["E"])
def _edge_softmax_fwd_kernel(
    p_alpha, p_rows, p_scores, p_top, p_total,  # [E, H], [E], [E, H], [N, H], [N, H]
    E, H, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """alpha[e] = exp(score[e] - top[i]) / total[i] of the row i of e."""
    b_edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_edge = b_edge < E
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_tile = m_edge[:, None] & (o_h < H)[None, :]
    b_row = tl.load(p_rows + b_edge, mask=m_edge, other=0)
    b_score = _of_heads(p_scores, b_edge, m_edge, o_h, o_h < H, H)
    b_p = tl.exp(b_score - _of_heads(p_top, b_row, m_edge, o_h, o_h < H, H))
    b_alpha = tl.div_rn(b_p, tl.where(m_tile, _of_heads(p_total, b_row, m_edge, o_h, o_h < H, H), 1.0))
    tl.store(p_alpha + b_edge[:, None] * H + o_h[None, :], _cast(b_alpha, p_alpha), mask=m_tile)


@triton.jit(do_not_specialize=["E"])
def _edge_softmax_bwd_kernel(
    p_dscore, p_rows, p_alpha, p_grad, p_inner,  # [E, H], [E], [E, H], [E, H], [N, H]
    E, H, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dscore[e] = alpha[e] * (grad[e] - inner[i]) of the row i of e."""
    b_edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_edge = b_edge < E
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_tile = m_edge[:, None] & (o_h < H)[None, :]
    b_row = tl.load(p_rows + b_edge, mask=m_edge, other=0)
    b_grad = _of_heads(p_grad, b_edge, m_edge, o_h, o_h < H, H)
    b_inner = _of_heads(p_inner, b_row, m_edge, o_h, o_h < H, H)
    b_dscore = _of_heads(p_alpha, b_edge, m_edge, o_h, o_h < H, H) * (b_grad - b_inner)
    tl.store(p_dscore + b_edge[:, None] * H + o_h[None, :], _cast(b_dscore, p_dscore), mask=m_tile)


def _forward(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], heads: int, channels: int, operands: dict[str, Tensor | None],
    out: Tensor | None, negative_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the forward kernel, and returns ``top`` and ``total``."""
    top, total = (torch.empty(indptr.numel() - 1, heads, dtype=torch.float32, device=indptr.device) for _ in range(2))
    if top.numel():
        tile = head_tile(heads, channels)
        blocks = head_blocks(tile)
        arrived, slots = workspace(schedule, heads * channels, blocks, [torch.int32])
        _, top_slots, total_slots = workspace(schedule, heads, blocks, [torch.int32, torch.int32])
        launch(
            _gat_fwd_kernel, grid(schedule, tile["BLOCK_R"], blocks),
            p_out=out, p_top=top, p_total=total, p_slots=slots, p_top_slots=top_slots, p_total_slots=total_slots, p_arrived=arrived,
            **schedule_arguments(indptr, indices, schedule), **{name: dense(tensor) for name, tensor in operands.items()},
            negative_slope=negative_slope, **tile, UNROLL=2 if tile["VECTOR"] >= 4 else 1, **EXACT,
        )  # fmt: skip
    return top, total


def gat_aggregate(
    indptr: Tensor, indices: Tensor, rows: Tensor, schedule: Sequence[Tensor], x: Tensor, src: Tensor, dst: Tensor, edge_score: Tensor | None,
    scale: Tensor | None, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    check_dtype("x", x)
    out = x.new_empty(indptr.numel() - 1, x.size(1), x.size(2))
    operands = {"p_x": x, "p_src": src, "p_dst": dst, "p_edge_score": edge_score, "p_scale": scale}
    return out, *_forward(indptr, indices, schedule, x.size(1), x.size(2), operands, out, negative_slope)


def _edge_launch(kernel: Any, edges: int, heads: int, **arguments: Tensor) -> None:
    """1024 elements a program, 8 a thread."""
    block_h = min(triton.next_power_of_2(max(heads, 1)), 64)
    if edges and heads:
        launch(
            kernel, (triton.cdiv(edges, 1024 // block_h), triton.cdiv(heads, block_h)),
            **arguments, E=edges, H=heads, BLOCK_E=1024 // block_h, BLOCK_H=block_h, **EXACT,
        )  # fmt: skip


def edge_softmax(indptr: Tensor, rows: Tensor, schedule: Sequence[Tensor], scores: Tensor) -> Tensor:
    check_dtype("scores", scores)
    scores = scores.contiguous()
    operands = {"p_x": None, "p_src": None, "p_dst": None, "p_edge_score": scores, "p_scale": None}
    top, total = _forward(indptr, rows, schedule, scores.size(1), 0, operands, None, 1.0)
    alpha = torch.empty_like(scores)
    _edge_launch(
        _edge_softmax_fwd_kernel, *scores.shape, p_alpha=alpha, p_rows=rows, p_scores=scores, p_top=top, p_total=total
    )
    return alpha


def edge_softmax_backward(
    indptr: Tensor, rows: Tensor, schedule: Sequence[Tensor], alpha: Tensor, grad: Tensor
) -> Tensor:
    check_dtype("alpha", alpha)
    alpha, grad = alpha.contiguous(), grad.contiguous()
    inner = row_sums(indptr, None, schedule, alpha.float() * grad.float())
    dscore = torch.empty_like(alpha)
    _edge_launch(
        _edge_softmax_bwd_kernel, *alpha.shape, p_dscore=dscore, p_rows=rows, p_alpha=alpha, p_grad=grad, p_inner=inner
    )
    return dscore


_FWD = {
    **SCHEDULE_SIGNATURE, **dict.fromkeys(["p_slots", "p_top_slots", "p_total_slots"], "*i32"),
    **dict.fromkeys(["p_out", "p_top", "p_total", "p_x", "p_src", "p_dst", "p_edge_score", "p_scale"], "*fp32"),
    "H": "i32", "C_VECTORS": "i32", "negative_slope": "fp32",
}  # fmt: skip
_TILE = {"VECTOR": 16, "BLOCK_R": 16, "BLOCK_E": 16, "BLOCK_H": 8, "BLOCK_C": 16, "UNROLL": 2}


def _forward_case(name: str, constexprs: dict[str, object], **types: str) -> CompileCase:
    signature = {argument: kind for argument, kind in {**_FWD, **types}.items() if argument not in constexprs}
    return CompileCase(name, _gat_fwd_kernel, signature, {**_TILE, **constexprs}, EXACT)


_STATISTICS = dict.fromkeys(["p_out", "p_x", "p_src", "p_dst", "p_scale"])
_EDGE = {"p_rows": "*i32", "E": "i32", "H": "i32"}
COMPILE_CASES = [
    # Triton compiles arguments of 1 as constants: H = 1, and C_VECTORS where there are 16 channels.
    _forward_case("gat_fwd_fp32_16", {"p_edge_score": None, "p_scale": None, "C_VECTORS": 1}),
    _forward_case(
        "gat_fwd_fp32_1_head_16", {"p_edge_score": None, "p_scale": None, "H": 1, "C_VECTORS": 1, "BLOCK_R": 32, "BLOCK_E": 128, "BLOCK_H": 1}
    ),
    _forward_case("gat_fwd_bf16_scores_dropout", {}, p_out="*bf16", p_x="*bf16"),
    _forward_case(
        "gat_fwd_7_int64", {"p_edge_score": None, "p_scale": None, "VECTOR": 1, "BLOCK_C": 8, "UNROLL": 1},
        **dict.fromkeys(["p_indptr", "p_segments", "p_hubs"], "*i64"),
    ),
    _forward_case("edge_softmax_statistics", {**_STATISTICS, "BLOCK_R": 32, "BLOCK_E": 128, "BLOCK_C": 1}),
    CompileCase(
        "edge_softmax_fwd_fp32", _edge_softmax_fwd_kernel,
        {**_EDGE, **dict.fromkeys(["p_alpha", "p_scores", "p_top", "p_total"], "*fp32")}, {"BLOCK_E": 128, "BLOCK_H": 8}, EXACT,
    ),
    CompileCase(
        "edge_softmax_bwd_fp32", _edge_softmax_bwd_kernel,
        {**_EDGE, **dict.fromkeys(["p_dscore", "p_alpha", "p_grad", "p_inner"], "*fp32")}, {"BLOCK_E": 128, "BLOCK_H": 8}, EXACT,
    ),
]  # fmt: skip
