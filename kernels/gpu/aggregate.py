"""Triton gather-aggregate over CSR in float32, and its gradients (contract: :mod:`..aggregate`; one launch: :mod:`.segments`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aggregate_extreme import aggregate_arg_backward, aggregate_extreme
from .aggregate_packed import aggregate_packed
from .common import EXACT, LAYOUT_FIRSTS, LAYOUT_SIGNATURE, CompileCase, _cast, check_dtype, launch, layout_arguments
from .rows import _row_codes
from .segments import (
    SCHEDULE_SIGNATURE,
    _last_to_arrive,
    _narrow_rows,
    _segment,
    _store_slot,
    _sum_of_slots,
    dense,
    float_tile,
    grid,
    schedule_arguments,
    workspace,
)  # fmt: skip

__all__ = ["aggregate", "aggregate_arg_backward", "aggregate_packed", "aggregate_rows", "edge_dot"]


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
        b_code = _row_codes(
            p_x, p_pos, b_source, m_edge, o_f, m_f, first_4, first_2, first_1, first_0, start_4, start_2, start_1,
            stride_8, stride_4, stride_2, stride_1, SIGNED, CONTAINER,
        )  # fmt: skip
        b_x = tl.load(p_step + b_source, mask=m_edge, other=0)[:, None] * b_code.to(tl.float32)
    if p_weight is not None:
        b_x *= tl.load(p_weight + b_edge, mask=m_edge, other=0).to(tl.float32)[:, None]
    return b_x


@triton.jit
def _store_sum(
    p_out, p_indptr, p_row_scale, p_bias, b_sum, b_row, m_row, o_f, m_f, F, MEAN: tl.constexpr, RELU: tl.constexpr
):
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
    tl.store(p_tile, _cast(b_sum, p_out), mask=m_row[:, None] & m_f[None, :])


@triton.jit(do_not_specialize=["R", "S", *LAYOUT_FIRSTS])
def _aggregate_sum_kernel(
    p_out,  # [N, F]
    p_slots,  # [slots, F] int32, the bits of float32
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


def _launch_sum(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], out: Tensor, x: Tensor, weight: Tensor | None, mean: bool = False,
    pos: Tensor | None = None, step: Tensor | None = None, row_scale: Tensor | None = None, bias: Tensor | None = None, relu: bool = False,
    signed: bool = False, counts: Sequence[int] = (0, 0, 0, 0, 0),
) -> None:  # fmt: skip
    if not out.numel():
        return
    sizes = float_tile(out.size(1))
    blocks = triton.cdiv(out.size(1), sizes["BLOCK_F"])
    arrived, slots = workspace(schedule, out.size(1), blocks, [torch.int32])
    launch(
        _aggregate_sum_kernel, grid(schedule, sizes["BLOCK_R"], blocks),
        p_out=out, p_slots=slots, p_arrived=arrived, p_x=x, p_pos=pos, p_step=dense(step), p_weight=dense(weight),
        p_row_scale=dense(row_scale), p_bias=dense(bias),
        **schedule_arguments(indptr, indices, schedule), **layout_arguments(counts, out.size(1)), SIGNED=signed, MEAN=mean, RELU=relu, **sizes,
        UNROLL=4, **EXACT,
    )  # fmt: skip


def aggregate(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    check_dtype("x", x)
    x = x.contiguous()
    if reduce in ("max", "min"):
        return aggregate_extreme(indptr, indices, schedule, x, weight, reduce == "max")
    out = x.new_empty(indptr.numel() - 1, x.size(1))
    _launch_sum(indptr, indices, schedule, out, x, weight, mean=reduce == "mean")
    return out, indptr.new_empty(0)


def aggregate_rows(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, pos: Tensor | None, counts: Sequence[int], features: int, signed: bool,
    step: Tensor, weight: Tensor | None, row_scale: Tensor | None, bias: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    out = step.new_empty(indptr.numel() - 1, features)
    _launch_sum(
        indptr, indices, schedule, out, x, weight,
        pos=pos, step=step, row_scale=row_scale, bias=bias, relu=relu, signed=signed, counts=counts,
    )  # fmt: skip
    return out


def edge_dot(rows: Tensor, indices: Tensor, x: Tensor, grad: Tensor, arg: Tensor | None) -> Tensor:
    check_dtype("x", x)
    check_dtype("grad", grad)
    x, grad = x.contiguous(), grad.contiguous()
    edges = rows.numel()
    out = x.new_zeros(edges, dtype=torch.float32) if not x.size(1) else x.new_empty(edges, dtype=torch.float32)
    if edges and x.size(1):
        sizes = float_tile(x.size(1))
        launch(
            _edge_dot_kernel, (triton.cdiv(edges, 16),),
            p_out=out, p_rows=rows, p_indices=indices, p_x=x, p_grad=grad, p_arg=dense(arg), E=edges,
            F_VECTORS=sizes["F_VECTORS"], VECTOR=sizes["VECTOR"], BLOCK_E=16, BLOCK_F=sizes["BLOCK_F"], **EXACT,
        )  # fmt: skip
    return out


_SUM = {
    **SCHEDULE_SIGNATURE, "F_VECTORS": "i32", **LAYOUT_SIGNATURE, "p_pos": "*i32",
    "p_slots": "*i32", **dict.fromkeys(["p_out", "p_x", "p_step", "p_weight", "p_row_scale", "p_bias"], "*fp32"),
}  # fmt: skip
_TILE = {"VECTOR": 16, "BLOCK_R": 16, "BLOCK_E": 16, "BLOCK_F": 128, "UNROLL": 4}
_FLOAT_X = {
    "p_pos": None,
    "p_step": None,
    "p_row_scale": None,
    "p_bias": None,
    "SIGNED": False,
    "CONTAINER": None,
    "RELU": False,
}


def _sum_case(name: str, constexprs: dict[str, object], **types: str) -> CompileCase:
    signature = {argument: kind for argument, kind in {**_SUM, **types}.items() if argument not in constexprs}
    return CompileCase(name, _aggregate_sum_kernel, signature, {**_TILE, **constexprs}, EXACT)


COMPILE_CASES = [
    _sum_case("aggregate_sum_fp32", {**_FLOAT_X, "p_weight": None, "MEAN": False}),
    _sum_case("aggregate_mean_bf16_weighted", {**_FLOAT_X, "MEAN": True}, p_out="*bf16", p_x="*bf16"),
    _sum_case(
        "aggregate_mean_7_int64", {**_FLOAT_X, "p_weight": None, "MEAN": True, "VECTOR": 1, "BLOCK_R": 32, "BLOCK_E": 128, "BLOCK_F": 8},
        **dict.fromkeys(["p_indptr", "p_segments", "p_hubs"], "*i64"),
    ),
    _sum_case("aggregate_rows_mixed", {"SIGNED": True, "CONTAINER": None, "MEAN": False, "RELU": True}, p_x="*u8"),
    CompileCase(
        "edge_dot_fp32", _edge_dot_kernel,
        {
            **dict.fromkeys(["p_rows", "p_indices", "p_arg"], "*i32"), **dict.fromkeys(["p_out", "p_x", "p_grad"], "*fp32"),
            "E": "i32", "F_VECTORS": "i32",
        },
        {"VECTOR": 16, "BLOCK_E": 16, "BLOCK_F": 128}, EXACT,
    ),
]  # fmt: skip
