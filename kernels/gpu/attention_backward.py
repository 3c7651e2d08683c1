"""Triton gradients of fused graph attention (contract: :mod:`..attention`): one pass over the edges, then sums over rows and over columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aggregate import aggregate
from .attention_heads import _heads_of_program, _of_channels, _of_heads, _raw_scores, head_blocks, head_tile
from .common import EXACT, CompileCase, _cast, check_dtype, launch
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
    workspace,
)


@triton.jit(do_not_specialize=["E"])
def _gat_edges_bwd_kernel(
    p_draw, p_weight,  # [E, H]
    p_rows, p_indices,  # [E]
    p_grad, p_x,  # [N, H, C], [M, H, C]
    p_src, p_dst,  # [M, H], [N, H]
    p_edge_score, p_scale,  # [E, H]
    p_inner, p_top, p_total,  # [N, H]
    E, H, C_VECTORS, negative_slope,
    VECTOR: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores before the leaky ReLU, and weight = alpha * scale (:mod:`qgnn.kernels.attention`)."""
    C = C_VECTORS * VECTOR
    b_edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_edge = b_edge < E
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    m_h = o_h < H
    b_row = tl.load(p_rows + b_edge, mask=m_edge, other=0)
    b_source = tl.load(p_indices + b_edge, mask=m_edge, other=0)
    # [E, H, C]
    b_products = tl.zeros((BLOCK_E, BLOCK_H, BLOCK_C), tl.float32)
    for i_c in range(0, C, BLOCK_C):
        o_c = i_c + tl.arange(0, BLOCK_C)
        b_x = _of_channels(p_x, b_source, m_edge, o_h, m_h, o_c, o_c < C, H, C)
        b_products += b_x * _of_channels(p_grad, b_row, m_edge, o_h, m_h, o_c, o_c < C, H, C)
    # [E, H]
    b_product = tl.sum(b_products, axis=2)
    b_dst = _of_heads(p_dst, b_row, m_edge, o_h, m_h, H)
    b_raw = _raw_scores(p_src, p_edge_score, b_dst, b_source, b_edge, m_edge, o_h, m_h, H)
    b_score = tl.where(b_raw > 0, b_raw, negative_slope * b_raw)
    b_p = tl.exp(b_score - _of_heads(p_top, b_row, m_edge, o_h, m_h, H))
    m_tile = m_edge[:, None] & m_h[None, :]
    b_total = tl.where(m_tile, _of_heads(p_total, b_row, m_edge, o_h, m_h, H), 1.0)
    b_alpha = tl.div_rn(b_p, b_total)
    b_weight = b_alpha
    if p_scale is not None:
        b_scale = _of_heads(p_scale, b_edge, m_edge, o_h, m_h, H)
        b_product *= b_scale
        b_weight *= b_scale
    b_draw = b_alpha * (b_product - _of_heads(p_inner, b_row, m_edge, o_h, m_h, H))
    b_draw = tl.where(b_raw > 0, b_draw, negative_slope * b_draw)
    o_tile = b_edge[:, None] * H + o_h[None, :]
    tl.store(p_draw + o_tile, b_draw, mask=m_tile)
    tl.store(p_weight + o_tile, b_weight, mask=m_tile)


@triton.jit
def _messages(p_grad, p_weight, p_indices, p_edges, b_place, m_place, o_h, m_h, o_c, m_c, H, C):
    """``weight * grad[destination]`` at places of the transposed graph, ``[E, H, C]``."""
    b_target = tl.load(p_indices + b_place, mask=m_place, other=0)
    b_edge = tl.load(p_edges + b_place, mask=m_place, other=0)
    b_weight = _of_heads(p_weight, b_edge, m_place, o_h, m_h, H)
    return b_weight[:, :, None] * _of_channels(p_grad, b_target, m_place, o_h, m_h, o_c, m_c, H, C)


@triton.jit
def _store_rows(p_dx, b_sum, b_row, m_row, o_h, m_h, o_c, m_c, H, C):
    o_tile = (b_row[:, None] * H + o_h[None, :])[:, :, None] * C + o_c[None, None, :]
    m_tile = (m_row[:, None] & m_h[None, :])[:, :, None] & m_c[None, None, :]
    tl.store(p_dx + o_tile, _cast(b_sum, p_dx), mask=m_tile)


@triton.jit(do_not_specialize=["R", "S"])
def _gat_sources_bwd_kernel(
    p_dx,  # [M, H, C]
    p_slots,  # [slots, H * C] int32, the bits of float32
    p_arrived,  # [hubs, blocks] int32
    p_indptr, p_indices, p_order, p_segments, p_hubs,  # [M + 1], [E], [R], [S, 5], [hubs, 3], of the transposed graph
    p_edges,  # [E]
    p_grad,  # [N, H, C]
    p_weight,  # [E, H], in CSR order
    R, S, H, C_VECTORS,
    VECTOR: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx[j] = sum over the edges e that leave j of weight[e] * grad[i], i their end, for each head."""
    C = C_VECTORS * VECTOR
    i_tile = tl.program_id(0)
    o_h, m_h, o_c, m_c, _ = _heads_of_program(H, C, BLOCK_H, BLOCK_C)
    if i_tile < S:
        i_row, i_first, i_end, i_slot, i_hub = _segment(p_segments, i_tile)
        b_parts = tl.zeros((BLOCK_E, BLOCK_H, BLOCK_C), tl.float32)
        for i_place in range(i_first, i_end, BLOCK_E):
            b_place = i_place + tl.arange(0, BLOCK_E)
            b_parts += _messages(
                p_grad, p_weight, p_indices, p_edges, b_place, b_place < i_end, o_h, m_h, o_c, m_c, H, C
            )
        # [1, H, C]
        b_sum = tl.sum(b_parts, axis=0)[None, :, :]
        complete = i_slot < 0
        if i_slot >= 0:
            o_f, m_f = o_h[:, None] * C + o_c[None, :], m_h[:, None] & m_c[None, :]
            _store_slot(p_slots, i_slot, b_sum, o_f, m_f, H * C)
            complete, i_from, i_to = _last_to_arrive(p_arrived, p_hubs, i_hub)
            if complete:
                b_zero = tl.zeros((1, BLOCK_H, BLOCK_C), tl.float32)
                b_sum = _sum_of_slots(p_slots, i_from, i_to, b_zero, o_f, m_f, H * C)
        if complete:
            b_own = i_row + tl.zeros((1,), tl.int64)
            _store_rows(p_dx, b_sum, b_own, b_own >= 0, o_h, m_h, o_c, m_c, H, C)
    else:
        b_row, m_row, b_first, b_degree = _narrow_rows(p_order, p_indptr, i_tile - S, R, BLOCK_R)
        b_acc = tl.zeros((BLOCK_R, BLOCK_H, BLOCK_C), tl.float32)
        for k in range(0, tl.max(b_degree, axis=0), UNROLL):
            for u in tl.static_range(UNROLL):
                b_acc += _messages(
                    p_grad, p_weight, p_indices, p_edges, b_first + (k + u), k + u < b_degree, o_h, m_h, o_c, m_c, H, C
                )
        _store_rows(p_dx, b_acc, b_row, m_row, o_h, m_h, o_c, m_c, H, C)


def row_sums(indptr: Tensor, places: Tensor | None, schedule: Sequence[Tensor], values: Tensor) -> Tensor:
    """Sums over the edges of every row of ``values[places]``, or of ``values`` ``[E, H]`` as they stand."""
    if places is None:
        places = torch.arange(values.size(0), dtype=indptr.dtype, device=indptr.device)
    return aggregate(indptr, places, schedule, values, None, "sum")[0]


def gat_backward(
    indptr: Tensor, indices: Tensor, rows: Tensor, schedule: Sequence[Tensor], transposed: Sequence[Tensor], grad: Tensor, x: Tensor, src: Tensor,
    dst: Tensor, edge_score: Tensor | None, scale: Tensor | None, out: Tensor, top: Tensor, total: Tensor, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_dtype("x", x)
    check_dtype("grad", grad)
    (_, heads, channels), edges = x.shape, indices.numel()
    x, grad, src, dst = x.contiguous(), grad.contiguous(), src.contiguous(), dst.contiguous()
    grad_x = torch.empty_like(x)
    draw, weight = (torch.empty(edges, heads, dtype=torch.float32, device=x.device) for _ in range(2))
    tile = head_tile(heads, channels)
    block_r, block_e = tile.pop("BLOCK_R"), tile["BLOCK_E"]
    if draw.numel():
        launch(
            _gat_edges_bwd_kernel, (triton.cdiv(edges, block_e), triton.cdiv(heads, tile["BLOCK_H"])),
            p_draw=draw, p_weight=weight, p_rows=rows, p_indices=indices, p_grad=grad, p_x=x, p_src=src, p_dst=dst, p_edge_score=dense(edge_score),
            p_scale=dense(scale), p_inner=(grad.float() * out.float()).sum(2), p_top=top, p_total=total, E=edges, negative_slope=negative_slope,
            **tile, **EXACT,
        )  # fmt: skip
    by_source, targets, leaving, *order = transposed
    if grad_x.numel():
        blocks = head_blocks(tile)
        arrived, slots = workspace(order, heads * channels, blocks, [torch.int32])
        launch(
            _gat_sources_bwd_kernel, grid(order, block_r, blocks),
            p_dx=grad_x, p_slots=slots, p_arrived=arrived, p_edges=leaving, p_grad=grad, p_weight=weight,
            **schedule_arguments(by_source, targets, order), **tile, BLOCK_R=block_r, UNROLL=4, **EXACT,
        )  # fmt: skip
    return grad_x, row_sums(by_source, leaving, order, draw), row_sums(indptr, None, schedule, draw), draw


_TILE = {"VECTOR": 16, "BLOCK_E": 16, "BLOCK_H": 8, "BLOCK_C": 16}
_EDGES = {
    **dict.fromkeys(["p_rows", "p_indices"], "*i32"),
    **dict.fromkeys(["p_draw", "p_weight", "p_grad", "p_x", "p_src", "p_dst", "p_inner", "p_top", "p_total"], "*fp32"),
    **dict.fromkeys(["E", "H", "C_VECTORS"], "i32"), "negative_slope": "fp32",
}  # fmt: skip
_SOURCES = {
    **SCHEDULE_SIGNATURE, **dict.fromkeys(["p_slots", "p_edges"], "*i32"), **dict.fromkeys(["p_dx", "p_grad", "p_weight"], "*fp32"),
    "H": "i32", "C_VECTORS": "i32",
}  # fmt: skip
COMPILE_CASES = [
    # Triton compiles arguments of 1 as constants: H = 1, and C_VECTORS where there are 16 channels.
    CompileCase(
        "gat_edges_bwd_fp32_16", _gat_edges_bwd_kernel, {name: kind for name, kind in _EDGES.items() if name != "C_VECTORS"},
        {**_TILE, "C_VECTORS": 1, "p_edge_score": None, "p_scale": None}, EXACT,
    ),
    CompileCase(
        "gat_edges_bwd_bf16_7_scores_dropout", _gat_edges_bwd_kernel,
        {**_EDGES, "p_edge_score": "*bf16", "p_scale": "*fp32", "p_grad": "*bf16", "p_x": "*bf16"},
        {"VECTOR": 1, "BLOCK_E": 16, "BLOCK_H": 8, "BLOCK_C": 8}, EXACT,
    ),
    CompileCase("gat_sources_bwd_fp32", _gat_sources_bwd_kernel, _SOURCES, {**_TILE, "BLOCK_R": 16, "UNROLL": 4}, EXACT),
    CompileCase(
        "gat_sources_bwd_bf16_1_head_int64", _gat_sources_bwd_kernel,
        {
            **{name: kind for name, kind in _SOURCES.items() if name != "H"},
            **dict.fromkeys(["p_indptr", "p_segments", "p_hubs", "p_edges"], "*i64"), "p_dx": "*bf16", "p_grad": "*bf16",
        },
        {"VECTOR": 16, "H": 1, "BLOCK_R": 16, "BLOCK_E": 16, "BLOCK_H": 1, "BLOCK_C": 128, "UNROLL": 4}, EXACT,
    ),
]  # fmt: skip
