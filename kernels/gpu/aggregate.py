"""Triton gather-aggregate over CSR in float32, and its gradients (contract: :mod:`..aggregate`; one launch: :mod:`.segments`)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aggregate_packed import aggregate_packed
from .common import LAYOUT_FIRSTS, LAYOUT_SIGNATURE, CompileCase, _places, _row_address, layout_arguments
from .segments import _last_to_arrive, _load_slot, _narrow_rows, _segment, _store_slot, _sum_of_slots, workspace

__all__ = ["aggregate", "aggregate_arg_backward", "aggregate_packed", "aggregate_rows", "edge_dot"]

LOWEST = tl.constexpr(-(2**31))
"""Below the key of every float: no edge yet."""


@triton.jit
def _mixed_rows(
    p_x, p_pos, p_step, b_source, m_edge, o_f, m_f, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
    stride_8, stride_4, stride_2, stride_1, SIGNED: tl.constexpr, CONTAINER: tl.constexpr,
):  # fmt: skip
    """``step * code`` of packed rows whose containers may differ, ``[E, F]``. Neighbouring codes share a byte, which the L1 cache serves."""
    b_container, b_start = _row_address(
        _places(p_pos, b_source, m_edge), first_4, first_2, first_1, first_0, start_4, start_2, start_1,
        stride_8, stride_4, stride_2, stride_1, CONTAINER,
    )  # fmt: skip
    b_step = tl.load(p_step + b_source, mask=m_edge, other=0)
    b_top = 1 << b_container
    # [E, F]
    b_bit = o_f[None, :] * b_container[:, None]
    m_x = (m_edge & (b_container > 0))[:, None] & m_f[None, :]
    b_byte = tl.load(p_x + b_start[:, None] + (b_bit >> 3), mask=m_x, other=0).to(tl.int32)
    b_code = (b_byte >> (b_bit & 7)) & (b_top - 1)[:, None]
    if SIGNED:
        b_half = (b_top >> 1)[:, None]
        b_code = (b_code ^ b_half) - b_half
    return b_step[:, None] * b_code.to(tl.float32)


@triton.jit
def _messages(
    p_x, p_pos, p_step, p_weight, p_indices, b_edge, m_edge, o_f, m_f, F,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    SIGNED: tl.constexpr, CONTAINER: tl.constexpr,
):  # fmt: skip
    """``weight * x[source]`` of the edges ``b_edge``, float32 ``[E, F]``; 0 where masked. ``p_step`` is None where x is a float tensor."""
    b_source = tl.load(p_indices + b_edge, mask=m_edge, other=0).to(tl.int64)
    if p_step is None:
        m_x = m_edge[:, None] & m_f[None, :]
        b_x = tl.load(p_x + b_source[:, None] * F + o_f[None, :], mask=m_x, other=0).to(tl.float32)
    else:
        b_x = _mixed_rows(
            p_x, p_pos, p_step, b_source, m_edge, o_f, m_f, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
            stride_8, stride_4, stride_2, stride_1, SIGNED, CONTAINER,
        )  # fmt: skip
    if p_weight is not None:
        b_x *= tl.load(p_weight + b_edge, mask=m_edge, other=0).to(tl.float32)[:, None]
    return b_x


@triton.jit
def _store_sum(p_out, p_indptr, p_row_scale, p_bias, b_sum, b_row, m_row, o_f, m_f, F, MEAN: tl.constexpr, RELU: tl.constexpr):
    """The sums ``[R, F]`` of the rows ``b_row``, after ``mean`` or the epilogue of :mod:`..matmul`."""
    if MEAN:
        b_degree = tl.load(p_indptr + b_row + 1, mask=m_row, other=1) - tl.load(p_indptr + b_row, mask=m_row, other=0)
        b_sum *= tl.div_rn(1.0, tl.maximum(b_degree, 1).to(tl.float32))[:, None]
    if p_row_scale is not None:
        b_sum *= tl.load(p_row_scale + b_row, mask=m_row, other=0)[:, None]
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_f, mask=m_f, other=0)[None, :]
    if RELU:
        b_sum = tl.where(b_sum < 0, 0.0, b_sum)  # NaN stays
    p_tile = p_out + b_row[:, None] * F + o_f[None, :]
    tl.store(p_tile, b_sum.to(p_out.dtype.element_ty), mask=m_row[:, None] & m_f[None, :])


@triton.jit(do_not_specialize=["R", "S", *LAYOUT_FIRSTS])
def _aggregate_sum_kernel(
    p_out,  # [N, F]
    p_slots,  # [slots, F] float32
    p_arrived,  # [H, blocks] int32
    p_indptr, p_indices, p_order, p_segments, p_hubs,  # [N + 1], [E], [R], [S, 5], [H, 3]
    p_x,  # [M, F], or packed rows
    p_pos, p_step,  # [M], for packed rows
    p_weight,  # [E]
    p_row_scale, p_bias,  # [N], [F]
    R, S, F_VECTORS,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    SIGNED: tl.constexpr, CONTAINER: tl.constexpr, MEAN: tl.constexpr, RELU: tl.constexpr, VECTOR: tl.constexpr,
    UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[i] = sum over the edges e of row i of weight[e] * x[indices[e]] (:mod:`qgnn.kernels.aggregate`)."""
    F = F_VECTORS * VECTOR  # so the compiler knows what divides a row
    i_tile = tl.program_id(0)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    if i_tile < S:
        i_row, i_first, i_end, i_slot, i_hub = _segment(p_segments, i_tile)
        b_parts = tl.zeros((BLOCK_E, BLOCK_F), tl.float32)
        for i_edge in range(i_first, i_end, BLOCK_E):
            b_edge = i_edge + tl.arange(0, BLOCK_E)
            b_parts += _messages(
                p_x, p_pos, p_step, p_weight, p_indices, b_edge, b_edge < i_end, o_f, m_f, F, first_4, first_2, first_1, first_0,
                start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1, SIGNED, CONTAINER,
            )  # fmt: skip
        b_sum = tl.sum(b_parts, axis=0)[None, :]
        complete = i_slot < 0
        if i_slot >= 0:
            _store_slot(p_slots, i_slot, b_sum, o_f, m_f, F)
            complete, i_from, i_to = _last_to_arrive(p_arrived, p_hubs, i_hub)
            if complete:
                b_sum = _sum_of_slots(p_slots, i_from, i_to, tl.zeros((1, BLOCK_F), tl.float32), o_f, m_f, F)
        if complete:
            b_own = i_row + tl.zeros((1,), tl.int64)
            _store_sum(p_out, p_indptr, p_row_scale, p_bias, b_sum, b_own, b_own >= 0, o_f, m_f, F, MEAN, RELU)
    else:
        b_row, m_row, b_first, b_degree = _narrow_rows(p_order, p_indptr, i_tile - S, R, BLOCK_R)
        b_acc = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
        for k in range(0, tl.max(b_degree, axis=0), UNROLL):
            for u in tl.static_range(UNROLL):
                b_acc += _messages(
                    p_x, p_pos, p_step, p_weight, p_indices, b_first + (k + u), k + u < b_degree, o_f, m_f, F, first_4, first_2, first_1, first_0,
                    start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1, SIGNED, CONTAINER,
                )  # fmt: skip
        _store_sum(p_out, p_indptr, p_row_scale, p_bias, b_acc, b_row, m_row, o_f, m_f, F, MEAN, RELU)


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
    b_message = _messages(
        p_x, None, None, p_weight, p_indices, b_edge, m_edge, o_f, m_f, F, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, False, None
    )
    b_key = tl.where(m_edge[:, None], _key(b_message, LARGEST), LOWEST)
    m_taken = b_key > b_best
    return tl.where(m_taken, b_key, b_best), tl.where(m_taken, b_edge[:, None], b_arg)


@triton.jit
def _store_extreme(p_out, p_arg, b_best, b_arg, b_row, m_row, o_f, m_f, F, LARGEST: tl.constexpr):
    o_tile = b_row[:, None] * F + o_f[None, :]
    m_tile = m_row[:, None] & m_f[None, :]
    tl.store(p_out + o_tile, _value(b_best, LARGEST).to(p_out.dtype.element_ty), mask=m_tile)
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
            b_bests, b_args = _fold(b_bests, b_args, p_x, p_weight, p_indices, b_edge, b_edge < i_end, o_f, m_f, F, LARGEST)
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
                b_best, b_arg = _fold(b_best, b_arg, p_x, p_weight, p_indices, b_first + (k + u), k + u < b_degree, o_f, m_f, F, LARGEST)
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
    tl.store(p_dx + i_row * F + o_f, tl.sum(b_acc, axis=0).to(p_dx.dtype.element_ty), mask=m_f)


@triton.jit(do_not_specialize=["E"])
def _edge_dot_kernel(
    p_out,  # [E]
    p_rows, p_indices,  # [E]
    p_x, p_grad, p_arg,  # [M, F], [N, F], [N, F]
    E, F_VECTORS,
    VECTOR: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over k of x[indices[e], k] * grad[rows[e], k], where arg[rows[e], k] = e if arg is given."""
    F = F_VECTORS * VECTOR
    b_edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    m_e = b_edge < E
    b_source = tl.load(p_indices + b_edge, mask=m_e, other=0).to(tl.int64)
    b_row = tl.load(p_rows + b_edge, mask=m_e, other=0).to(tl.int64)
    # [E, F]
    b_acc = tl.zeros((BLOCK_E, BLOCK_F), tl.float32)
    for i_f in range(0, F, BLOCK_F):
        o_f = i_f + tl.arange(0, BLOCK_F)
        m_tile = m_e[:, None] & (o_f < F)[None, :]
        o_row = b_row[:, None] * F + o_f[None, :]
        if p_arg is not None:
            m_tile = m_tile & (tl.load(p_arg + o_row, mask=m_tile, other=-1) == b_edge[:, None])
        b_grad = tl.load(p_grad + o_row, mask=m_tile, other=0).to(tl.float32)
        b_x = tl.load(p_x + b_source[:, None] * F + o_f[None, :], mask=m_tile, other=0).to(tl.float32)
        b_acc += b_x * b_grad
    tl.store(p_out + b_edge, tl.sum(b_acc, axis=1), mask=m_e)


def _checked(name: str, x: Tensor) -> Tensor:
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the Triton {name} takes float16, bfloat16 and float32, got {x.dtype}; convert, or use backend 'reference'")
    return x.contiguous()


def _blocks(features: int) -> dict[str, int]:
    """Sizes by the row alone: a row of 128 float32 is one 16-byte load of each thread of a warp."""
    block_f = min(triton.next_power_of_2(features), 128)
    vector = math.gcd(features, 16)
    return {"F_VECTORS": features // vector, "VECTOR": vector, "BLOCK_F": block_f}


def _launch_sum(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], out: Tensor, x: Tensor, weight: Tensor | None, mean: bool = False,
    pos: Tensor | None = None, step: Tensor | None = None, row_scale: Tensor | None = None, bias: Tensor | None = None, relu: bool = False,
    signed: bool = False, counts: Sequence[int] = (0, 0, 0, 0, 0),
) -> None:  # fmt: skip
    features = out.size(1)
    order, segments, hubs = schedule
    sizes = _blocks(features)
    block_r, block_e = _tile_rows(sizes["BLOCK_F"])
    blocks = triton.cdiv(features, sizes["BLOCK_F"])
    arrived, slots = workspace(schedule, features, blocks, [torch.float32])
    _aggregate_sum_kernel[(segments.size(0) + triton.cdiv(order.numel(), block_r), blocks)](
        p_out=out, p_slots=slots, p_arrived=arrived, p_indptr=indptr, p_indices=indices, p_order=order, p_segments=segments, p_hubs=hubs,
        p_x=x, p_pos=pos, p_step=step, p_weight=weight, p_row_scale=row_scale, p_bias=bias, R=order.numel(), S=segments.size(0),
        **layout_arguments(counts, features), SIGNED=signed, MEAN=mean, RELU=relu, **sizes, UNROLL=4, BLOCK_R=block_r, BLOCK_E=block_e,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def _tile_rows(block_f: int) -> tuple[int, int]:
    """``BLOCK_R``, ``BLOCK_E``: at most 16 values a thread of four warps; few rows a tile, since it runs as long as its longest."""
    return min(32, 2048 // block_f), min(128, 2048 // block_f)


def aggregate(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    x = _checked("aggregation", x)
    n, features = indptr.numel() - 1, x.size(1)
    out = x.new_empty(n, features)
    extreme = reduce in ("max", "min")
    arg = indptr.new_empty((n, features) if extreme else 0)
    if not out.numel():
        return out, arg
    if not extreme:
        _launch_sum(indptr, indices, schedule, out, x, weight, mean=reduce == "mean")
        return out, arg
    order, segments, hubs = schedule
    sizes = _blocks(features)
    block_r, block_e = _tile_rows(sizes["BLOCK_F"])
    blocks = triton.cdiv(features, sizes["BLOCK_F"])
    arrived, best_slots, arg_slots = workspace(schedule, features, blocks, [torch.int32, indptr.dtype])
    _aggregate_extreme_kernel[(segments.size(0) + triton.cdiv(order.numel(), block_r), blocks)](
        p_out=out, p_arg=arg, p_best_slots=best_slots, p_arg_slots=arg_slots, p_arrived=arrived, p_indptr=indptr, p_indices=indices,
        p_order=order, p_segments=segments, p_hubs=hubs, p_x=x, p_weight=weight, R=order.numel(), S=segments.size(0),
        LARGEST=reduce == "max", **sizes, UNROLL=2, BLOCK_R=block_r, BLOCK_E=block_e, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out, arg


def aggregate_arg_backward(indptr: Tensor, indices: Tensor, edges: Tensor, grad: Tensor, arg: Tensor, weight: Tensor | None) -> Tensor:
    grad, arg = _checked("aggregation", grad), arg.contiguous()
    m, features = indptr.numel() - 1, grad.size(1)
    out = grad.new_empty(m, features)
    if out.numel():
        sizes = _blocks(features)
        _aggregate_arg_bwd_kernel[(m, triton.cdiv(features, sizes["BLOCK_F"]))](
            p_dx=out, p_indptr=indptr, p_indices=indices, p_edges=edges, p_grad=grad, p_arg=arg, p_weight=weight,
            **sizes, BLOCK_E=16, num_warps=2, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def edge_dot(rows: Tensor, indices: Tensor, x: Tensor, grad: Tensor, arg: Tensor | None) -> Tensor:
    x, grad = _checked("edge_dot", x), _checked("edge_dot", grad)
    edges, features = rows.numel(), x.size(1)
    if not edges or not features:
        return x.new_zeros(edges, dtype=torch.float32)
    sizes = _blocks(features)
    _edge_dot_kernel[(triton.cdiv(edges, 16),)](
        p_out=(out := x.new_empty(edges, dtype=torch.float32)), p_rows=rows, p_indices=indices, p_x=x, p_grad=grad,
        p_arg=arg.contiguous() if arg is not None else None, E=edges, **sizes, BLOCK_E=16, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def aggregate_rows(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, pos: Tensor | None, counts: Sequence[int], features: int, signed: bool,
    step: Tensor, weight: Tensor | None, row_scale: Tensor | None, bias: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    out = step.new_empty(indptr.numel() - 1, features)
    if out.numel():
        _launch_sum(
            indptr, indices, schedule, out, x, weight, pos=pos, step=step, row_scale=row_scale, bias=bias, relu=relu, signed=signed, counts=counts
        )
    return out


_GRAPH = {"p_indptr": "*i32", "p_indices": "*i32", "p_order": "*i32", "p_segments": "*i32", "p_hubs": "*i32", "p_arrived": "*i32"}
_SUM = {
    **_GRAPH, "p_out": "*fp32", "p_slots": "*fp32", "p_x": "*fp32", "p_pos": "*i32", "p_step": "*fp32", "p_weight": "*fp32",
    "p_row_scale": "*fp32", "p_bias": "*fp32", "R": "i32", "S": "i32", "F_VECTORS": "i32", **LAYOUT_SIGNATURE,
}  # fmt: skip
_TILE_128 = {"VECTOR": 16, "BLOCK_R": 16, "BLOCK_E": 16, "BLOCK_F": 128}
_FLOAT_X = {"p_pos": None, "p_step": None, "p_row_scale": None, "p_bias": None, "SIGNED": False, "CONTAINER": None, "RELU": False}
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


def _case(name: str, kernel: object, signature: dict[str, str], constexprs: dict[str, object], warps: int = 4) -> CompileCase:
    signature = {argument: kind for argument, kind in signature.items() if argument not in constexprs}
    return CompileCase(name, kernel, signature, constexprs, {**_OPTIONS, "num_warps": warps})


_EXTREME = {
    **_GRAPH, "p_out": "*fp32", "p_arg": "*i32", "p_best_slots": "*i32", "p_arg_slots": "*i32", "p_x": "*fp32", "p_weight": "*fp32",
    "R": "i32", "S": "i32", "F_VECTORS": "i32",
}  # fmt: skip
COMPILE_CASES = [
    _case("aggregate_sum_fp32", _aggregate_sum_kernel, _SUM, {"p_weight": None, **_FLOAT_X, "MEAN": False, "UNROLL": 4, **_TILE_128}),
    _case(
        "aggregate_mean_bf16_weighted", _aggregate_sum_kernel, {**_SUM, "p_out": "*bf16", "p_x": "*bf16"},
        {**_FLOAT_X, "MEAN": True, "UNROLL": 4, **_TILE_128},
    ),
    _case(
        "aggregate_rows_mixed", _aggregate_sum_kernel, {**_SUM, "p_x": "*u8"},
        {"SIGNED": True, "CONTAINER": None, "MEAN": False, "RELU": True, "UNROLL": 4, **_TILE_128},
    ),
    _case("aggregate_max_fp32_weighted", _aggregate_extreme_kernel, _EXTREME, {"LARGEST": True, "UNROLL": 2, **_TILE_128}),
    _case("aggregate_min_fp16", _aggregate_extreme_kernel, {**_EXTREME, "p_out": "*fp16", "p_x": "*fp16"}, {"p_weight": None, "LARGEST": False, "UNROLL": 2, **_TILE_128}),
    _case(
        "aggregate_arg_bwd_fp32", _aggregate_arg_bwd_kernel,
        {**dict.fromkeys(["p_indptr", "p_indices", "p_edges", "p_arg"], "*i32"), **dict.fromkeys(["p_dx", "p_grad", "p_weight"], "*fp32"), "F_VECTORS": "i32"},
        {"VECTOR": 16, "BLOCK_E": 16, "BLOCK_F": 128}, warps=2,
    ),
    _case(
        "edge_dot_fp32", _edge_dot_kernel,
        {**dict.fromkeys(["p_rows", "p_indices", "p_arg"], "*i32"), **dict.fromkeys(["p_out", "p_x", "p_grad"], "*fp32"), "E": "i32", "F_VECTORS": "i32"},
        {"VECTOR": 16, "BLOCK_E": 16, "BLOCK_F": 128},
    ),
]  # fmt: skip
