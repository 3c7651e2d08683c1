"""Triton aggregation by max and min, and its gradient (contract: :mod:`..aggregate`; one launch: :mod:`.segments`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import EXACT, CompileCase, _cast, check_dtype, launch
from .segments import (
    SCHEDULE_SIGNATURE,
    _last_to_arrive,
    _load_slot,
    _narrow_rows,
    _segment,
    _store_slot,
    dense,
    float_tile,
    grid,
    schedule_arguments,
    workspace,
)

LOWEST = tl.constexpr(-(2**31))
"""Below the key of every float: no edge yet."""


@triton.jit
def _key(b_value, LARGEST: tl.constexpr):
    """int32 that orders float32 as ``max`` (or ``min``, turned round) does: NaN above all, -0 equal to 0."""
    if LARGEST:
        b_bits = (b_value + 0.0).to(tl.int32, bitcast=True)
    else:
        b_bits = (0.0 - b_value).to(tl.int32, bitcast=True)
    b_key = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    return tl.where(b_value != b_value, 0x7FFFFFFF, b_key)


@triton.jit
def _value(b_key, LARGEST: tl.constexpr):
    """The inverse of :func:`_key`; 0 where there was no edge."""
    b_value = tl.where(b_key < 0, b_key ^ 0x7FFFFFFF, b_key).to(tl.float32, bitcast=True)
    if not LARGEST:
        b_value = 0.0 - b_value
    return tl.where(b_key == LOWEST, 0.0, b_value)


@triton.jit
def _fold(b_best, b_arg, p_x, p_weight, p_indices, b_edge, m_edge, o_f, m_f, F, LARGEST: tl.constexpr):
    """Takes one more edge of each row into ``b_best`` (keys) and ``b_arg`` ``[E, F]``; the earlier of equals stays."""
    b_source = tl.load(p_indices + b_edge, mask=m_edge, other=0).to(tl.int64)
    m_x = m_edge[:, None] & m_f[None, :]
    b_x = tl.load(p_x + b_source[:, None] * F + o_f[None, :], mask=m_x, other=0).to(tl.float32)
    if p_weight is not None:
        b_x *= tl.load(p_weight + b_edge, mask=m_edge, other=0).to(tl.float32)[:, None]
    b_key = tl.where(m_edge[:, None], _key(b_x, LARGEST), LOWEST)
    m_taken = b_key > b_best
    return tl.where(m_taken, b_key, b_best), tl.where(m_taken, b_edge[:, None], b_arg)


@triton.jit
def _store_extreme(p_out, p_arg, b_best, b_arg, b_row, m_row, o_f, m_f, F, LARGEST: tl.constexpr):
    o_tile = b_row[:, None] * F + o_f[None, :]
    m_tile = m_row[:, None] & m_f[None, :]
    tl.store(p_out + o_tile, _cast(_value(b_best, LARGEST), p_out), mask=m_tile)
    tl.store(p_arg + o_tile, b_arg, mask=m_tile)


@triton.jit(do_not_specialize=["R", "S"])
def _aggregate_extreme_kernel(
    p_out, p_arg,  # [N, F]
    p_best_slots, p_arg_slots,  # [slots, F]
    p_arrived,  # [H, blocks] int32
    p_indptr, p_indices, p_order, p_segments, p_hubs,  # [N + 1], [E], [R], [S, 5], [H, 3]
    p_x,  # [M, F]
    p_weight,  # [E]
    R, S, F_VECTORS,
    LARGEST: tl.constexpr, VECTOR: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[i] = max (or min) over the edges e of row i of weight[e] * x[indices[e]], and the e that was taken (:mod:`qgnn.kernels.aggregate`)."""
    F = F_VECTORS * VECTOR
    i_tile = tl.program_id(0)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    if i_tile < S:
        i_row, i_first, i_end, i_slot, i_hub = _segment(p_segments, i_tile)
        b_bests = tl.full((BLOCK_E, BLOCK_F), LOWEST, tl.int32)
        b_args = tl.full((BLOCK_E, BLOCK_F), -1, p_arg.dtype.element_ty)
        for i_edge in range(i_first, i_end, BLOCK_E):
            b_edge = i_edge + tl.arange(0, BLOCK_E)
            b_bests, b_args = _fold(
                b_bests, b_args, p_x, p_weight, p_indices, b_edge, b_edge < i_end, o_f, m_f, F, LARGEST
            )
        b_top = tl.max(b_bests, axis=0)[None, :]
        # A segment has an edge, so among equals there is no -1.
        b_top_arg = tl.min(tl.where(b_bests == b_top, b_args, i_end), axis=0)[None, :]
        complete = i_slot < 0
        if i_slot >= 0:
            _store_slot(p_best_slots, i_slot, b_top, o_f, m_f, F)
            _store_slot(p_arg_slots, i_slot, b_top_arg, o_f, m_f, F)
            complete, i_from, i_to = _last_to_arrive(p_arrived, p_hubs, i_hub)
            if complete:
                for i_other in range(i_from, i_to):
                    b_key = _load_slot(p_best_slots, i_other, o_f, m_f, F)
                    b_edges = _load_slot(p_arg_slots, i_other, o_f, m_f, F)
                    # Neither loop order nor the own slot, seen twice, matters: of equals the first edge stays.
                    m_taken = (b_key > b_top) | ((b_key == b_top) & (b_edges < b_top_arg))
                    b_top, b_top_arg = tl.where(m_taken, b_key, b_top), tl.where(m_taken, b_edges, b_top_arg)
        if complete:
            b_own = i_row + tl.zeros((1,), tl.int64)
            _store_extreme(p_out, p_arg, b_top, b_top_arg, b_own, b_own >= 0, o_f, m_f, F, LARGEST)
    else:
        b_row, m_row, b_first, b_degree = _narrow_rows(p_order, p_indptr, i_tile - S, R, BLOCK_R)
        b_best = tl.full((BLOCK_R, BLOCK_F), LOWEST, tl.int32)
        b_arg = tl.full((BLOCK_R, BLOCK_F), -1, p_arg.dtype.element_ty)
        for k in range(0, tl.max(b_degree, axis=0), UNROLL):
            for u in tl.static_range(UNROLL):
                b_best, b_arg = _fold(
                    b_best, b_arg, p_x, p_weight, p_indices, b_first + (k + u), k + u < b_degree, o_f, m_f, F, LARGEST
                )
        _store_extreme(p_out, p_arg, b_best, b_arg, b_row, m_row, o_f, m_f, F, LARGEST)


@triton.jit
def _aggregate_arg_bwd_kernel(
    p_dx,  # [M, F]
    p_indptr, p_indices, p_edges,  # [M + 1], [E], [E], of the transposed graph
    p_grad, p_arg,  # [N, F]
    p_weight,  # [E], in CSR order
    F_VECTORS,
    VECTOR: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dx[j] = sum over the edges e that leave j, where arg[i] = e at their end i, of weight[e] * grad[i]; one row a program."""
    F = F_VECTORS * VECTOR
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    i_first, i_end = tl.load(p_indptr + i_row), tl.load(p_indptr + i_row + 1)
    # [E, F]
    b_acc = tl.zeros((BLOCK_E, BLOCK_F), tl.float32)
    for i_edge in range(i_first, i_end, BLOCK_E):
        o_e = i_edge + tl.arange(0, BLOCK_E)
        m_e = o_e < i_end
        b_target = tl.load(p_indices + o_e, mask=m_e, other=0).to(tl.int64)
        b_edge = tl.load(p_edges + o_e, mask=m_e, other=0).to(tl.int64)
        o_tile = b_target[:, None] * F + o_f[None, :]
        m_tile = m_e[:, None] & m_f[None, :]
        m_taken = m_tile & (tl.load(p_arg + o_tile, mask=m_tile, other=-1) == b_edge[:, None])
        b_grad = tl.load(p_grad + o_tile, mask=m_taken, other=0).to(tl.float32)
        if p_weight is not None:
            b_grad *= tl.load(p_weight + b_edge, mask=m_e, other=0).to(tl.float32)[:, None]
        b_acc += tl.where(m_taken, b_grad, 0.0)
    tl.store(p_dx + i_row * F + o_f, _cast(tl.sum(b_acc, axis=0), p_dx), mask=m_f)


def aggregate_extreme(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, weight: Tensor | None, largest: bool
) -> tuple[Tensor, Tensor]:
    """``out`` and ``arg`` of ``reduce="max"``, or ``"min"``; x is contiguous."""
    out = x.new_empty(indptr.numel() - 1, x.size(1))
    arg = torch.empty_like(out, dtype=indptr.dtype)
    if not out.numel():
        return out, arg
    sizes = float_tile(x.size(1))
    blocks = triton.cdiv(x.size(1), sizes["BLOCK_F"])
    arrived, best_slots, arg_slots = workspace(schedule, x.size(1), blocks, [torch.int32, indptr.dtype])
    launch(
        _aggregate_extreme_kernel, grid(schedule, sizes["BLOCK_R"], blocks),
        p_out=out, p_arg=arg, p_best_slots=best_slots, p_arg_slots=arg_slots, p_arrived=arrived, p_x=x, p_weight=dense(weight),
        **schedule_arguments(indptr, indices, schedule), LARGEST=largest, **sizes, UNROLL=2, **EXACT,
    )  # fmt: skip
    return out, arg


def aggregate_arg_backward(
    indptr: Tensor, indices: Tensor, edges: Tensor, grad: Tensor, arg: Tensor, weight: Tensor | None
) -> Tensor:
    check_dtype("grad", grad)
    grad, arg = grad.contiguous(), arg.contiguous()
    out = grad.new_empty(indptr.numel() - 1, grad.size(1))
    if out.numel():
        sizes = float_tile(grad.size(1))
        launch(
            _aggregate_arg_bwd_kernel, (out.size(0), triton.cdiv(grad.size(1), sizes["BLOCK_F"])),
            p_dx=out, p_indptr=indptr, p_indices=indices, p_edges=edges, p_grad=grad, p_arg=arg, p_weight=dense(weight),
            F_VECTORS=sizes["F_VECTORS"], VECTOR=sizes["VECTOR"], BLOCK_E=16, BLOCK_F=sizes["BLOCK_F"], **{**EXACT, "num_warps": 2},
        )  # fmt: skip
    return out


_EXTREME = {
    **SCHEDULE_SIGNATURE, "F_VECTORS": "i32", **dict.fromkeys(["p_arg", "p_best_slots", "p_arg_slots"], "*i32"),
    **dict.fromkeys(["p_out", "p_x", "p_weight"], "*fp32"),
}  # fmt: skip
_TILE = {"VECTOR": 16, "BLOCK_R": 16, "BLOCK_E": 16, "BLOCK_F": 128, "UNROLL": 2}
COMPILE_CASES = [
    CompileCase("aggregate_max_fp32_weighted", _aggregate_extreme_kernel, _EXTREME, {**_TILE, "LARGEST": True}, EXACT),
    CompileCase(
        "aggregate_min_fp16", _aggregate_extreme_kernel,
        {**{name: kind for name, kind in _EXTREME.items() if name != "p_weight"}, "p_out": "*fp16", "p_x": "*fp16"},
        {**_TILE, "LARGEST": False, "p_weight": None}, EXACT,
    ),
    CompileCase(
        "aggregate_arg_bwd_fp32", _aggregate_arg_bwd_kernel,
        {
            **dict.fromkeys(["p_indptr", "p_indices", "p_edges", "p_arg"], "*i32"), **dict.fromkeys(["p_dx", "p_grad", "p_weight"], "*fp32"),
            "F_VECTORS": "i32",
        },
        {"VECTOR": 16, "BLOCK_E": 16, "BLOCK_F": 128}, {**EXACT, "num_warps": 2},
    ),
]  # fmt: skip
