"""Triton gather-aggregate over CSR in float32, and its gradients (contract: :mod:`..aggregate`; one launch: :mod:`.segments`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aggregate_extreme import aggregate_arg_backward, aggregate_extreme
from .aggregate_packed import aggregate_packed
from .aggregate_rows import aggregate_rows
from .common import EXACT, CompileCase, _cast, check_dtype, launch
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
def _messages(p_x, p_weight, b_source, b_edge, m_edge, o_f, m_f, F: tl.constexpr):
    """``weight * x[source]`` of the edges ``b_edge``, float32 ``[E, F]``; 0 where masked. ``m_f`` is None where every column belongs to a row."""
    m_x = m_edge[:, None] if m_f is None else m_edge[:, None] & m_f[None, :]
    b_x = tl.load(p_x + b_source.to(tl.int64)[:, None] * F + o_f[None, :], mask=m_x, other=0).to(tl.float32)
    if p_weight is not None:
        b_x *= tl.load(p_weight + b_edge, mask=m_edge, other=0).to(tl.float32)[:, None]
    return b_x


@triton.jit
def _store_sum(p_out, p_indptr, b_sum, b_row, m_row, o_f, m_f, F, MEAN: tl.constexpr):
    """The sums, or means, ``[R, F]`` of the rows ``b_row``."""
    if MEAN:
        b_degree = tl.load(p_indptr + b_row + 1, mask=m_row, other=1) - tl.load(p_indptr + b_row, mask=m_row, other=0)
        b_sum *= tl.div_rn(1.0, tl.maximum(b_degree, 1).to(tl.float32))[:, None]
    p_tile = p_out + b_row[:, None] * F + o_f[None, :]
    tl.store(p_tile, _cast(b_sum, p_out), mask=m_row[:, None] & m_f[None, :])


@triton.jit(do_not_specialize=["R", "S"])
def _aggregate_sum_kernel(
    p_out,  # [N, F]
    p_slots,  # [slots, F] int32, the bits of float32
    p_arrived,  # [H, blocks] int32
    p_indptr, p_indices, p_order, p_segments, p_hubs,  # [N + 1], [E], [R], [S, 5], [H, 3]
    p_x,  # [M, F]
    p_weight,  # [E]
    R, S,
    F: tl.constexpr, MEAN: tl.constexpr, UNROLL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[i] = sum over the edges e of row i of weight[e] * x[indices[e]] (:mod:`qgnn.kernels.aggregate`)."""
    i_tile = tl.program_id(0)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_f = o_f < F
    m_x = None if F % BLOCK_F == 0 else m_f
    if i_tile < S:
        i_row, i_first, i_end, i_slot, i_hub = _segment(p_segments, i_tile)
        b_parts = tl.zeros((BLOCK_E, BLOCK_F), tl.float32)
        o_e = tl.arange(0, BLOCK_E)
        b_source = tl.load(p_indices + i_first + o_e, mask=i_first + o_e < i_end, other=0)
        for i_edge in range(i_first, i_end, BLOCK_E):
            # The sources of the next edges are on their way while the rows of these are read.
            b_edge = i_edge + o_e
            b_next = tl.load(p_indices + b_edge + BLOCK_E, mask=b_edge + BLOCK_E < i_end, other=0)
            b_parts += _messages(p_x, p_weight, b_source, b_edge, b_edge < i_end, o_f, m_x, F)
            b_source = b_next
        b_sum = tl.sum(b_parts, axis=0)[None, :]
        complete = i_slot < 0
        if i_slot >= 0:
            _store_slot(p_slots, i_slot, b_sum, o_f, m_f, F)
            complete, i_from, i_to = _last_to_arrive(p_arrived, p_hubs, i_hub)
            if complete:
                b_sum = _sum_of_slots(p_slots, i_from, i_to, tl.zeros((1, BLOCK_F), tl.float32), o_f, m_f, F)
        if complete:
            b_own = i_row + tl.zeros((1,), tl.int64)
            _store_sum(p_out, p_indptr, b_sum, b_own, b_own >= 0, o_f, m_f, F, MEAN)
    else:
        b_row, m_row, b_first, b_degree = _narrow_rows(p_order, p_indptr, i_tile - S, R, BLOCK_R)
        b_acc = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
        for k in range(0, tl.max(b_degree, axis=0), UNROLL):
            for u in tl.static_range(UNROLL):
                b_edge, m_edge = b_first + (k + u), k + u < b_degree
                b_source = tl.load(p_indices + b_edge, mask=m_edge, other=0)
                b_acc += _messages(p_x, p_weight, b_source, b_edge, m_edge, o_f, m_x, F)
        _store_sum(p_out, p_indptr, b_acc, b_row, m_row, o_f, m_f, F, MEAN)


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


def aggregate(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    check_dtype("x", x)
    x = x.contiguous()
    if reduce in ("max", "min"):
        return aggregate_extreme(indptr, indices, schedule, x, weight, reduce == "max")
    out = x.new_empty(indptr.numel() - 1, x.size(1))
    if out.numel():
        sizes = {name: size for name, size in float_tile(x.size(1)).items() if name.startswith("BLOCK")}
        blocks = triton.cdiv(x.size(1), sizes["BLOCK_F"])
        arrived, slots = workspace(schedule, x.size(1), blocks, [torch.int32])
        launch(
            _aggregate_sum_kernel, grid(schedule, sizes["BLOCK_R"], blocks),
            p_out=out, p_slots=slots, p_arrived=arrived, p_x=x, p_weight=dense(weight), **schedule_arguments(indptr, indices, schedule),
            F=x.size(1), MEAN=reduce == "mean", UNROLL=4, **sizes, **EXACT,
        )  # fmt: skip
    return out, indptr.new_empty(0)


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


def _sum_case(
    name: str, features: int, weighted: bool, mean: bool, dtype: str = "*fp32", index: str = "*i32"
) -> CompileCase:
    signature = {
        **SCHEDULE_SIGNATURE, **dict.fromkeys(["p_indptr", "p_segments", "p_hubs"], index), "p_slots": "*i32", "p_out": dtype, "p_x": dtype,
        **({"p_weight": "*fp32"} if weighted else {}),
    }  # fmt: skip
    sizes = {name: size for name, size in float_tile(features).items() if name.startswith("BLOCK")}
    constexprs = {**sizes, "F": features, "MEAN": mean, "UNROLL": 4, **({} if weighted else {"p_weight": None})}
    return CompileCase(name, _aggregate_sum_kernel, signature, constexprs, EXACT)


COMPILE_CASES = [
    _sum_case("aggregate_sum_fp32", 128, weighted=False, mean=False),
    _sum_case("aggregate_sum_fp32_602", 602, weighted=False, mean=False),
    _sum_case("aggregate_sum_fp16", 128, weighted=False, mean=False, dtype="*fp16"),
    _sum_case("aggregate_mean_bf16_weighted", 128, weighted=True, mean=True, dtype="*bf16"),
    _sum_case("aggregate_mean_7_int64", 7, weighted=False, mean=True, index="*i64"),
    CompileCase(
        "edge_dot_fp32", _edge_dot_kernel,
        {
            **dict.fromkeys(["p_rows", "p_indices", "p_arg"], "*i32"), **dict.fromkeys(["p_out", "p_x", "p_grad"], "*fp32"),
            "E": "i32", "F_VECTORS": "i32",
        },
        {"VECTOR": 16, "BLOCK_E": 16, "BLOCK_F": 128}, EXACT,
    ),
]  # fmt: skip
