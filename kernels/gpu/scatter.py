"""Triton segment reductions (contract: :mod:`..scatter`). A program takes one group, of any length, and a block of columns, so no schedule has to be
built, and nothing is read back from the device."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import EXACT, CompileCase, _cast, launch
from .segments import float_tile

COMPUTED = {torch.float16: tl.float32, torch.bfloat16: tl.float32, torch.float32: tl.float32, torch.float64: tl.float64}
COMPUTED |= {torch.int32: tl.int32, torch.int64: tl.int64}


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _group_of(p_indptr, F_VECTORS, VECTOR: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's group, its first and its end position; its columns, which of them exist, and the length of a row."""
    i_row = tl.program_id(0).to(tl.int64)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    F = F_VECTORS * VECTOR  # so the compiler knows what divides a row
    return i_row, tl.load(p_indptr + i_row), tl.load(p_indptr + i_row + 1), o_f, o_f < F, F


@triton.jit
def _load_rows(p_x, p_indices, b_edge, m_edge, o_f, m_f, F, ACC: tl.constexpr):
    """The rows at the positions ``b_edge``, in the type they are computed in ``[E, F]``; 0 where masked."""
    b_source = tl.load(p_indices + b_edge, mask=m_edge, other=0).to(tl.int64)
    m = m_edge[:, None] & m_f[None, :]
    return tl.load(p_x + b_source[:, None] * F + o_f[None, :], mask=m, other=0).to(ACC)


@triton.jit
def _segment_fold_kernel(
    p_out,  # [N, F]
    p_indptr, p_indices,  # [N + 1], [E]
    p_x,  # [E, F]
    F_VECTORS,
    PRODUCT: tl.constexpr, MEAN: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[i] = sum, mean or product of the rows of group i."""
    i_row, i_first, i_end, o_f, m_f, F = _group_of(p_indptr, F_VECTORS, VECTOR, BLOCK_F)
    # [E, F]
    b_parts = tl.full((BLOCK_E, BLOCK_F), 1 if PRODUCT else 0, ACC)
    for i_edge in range(i_first, i_end, BLOCK_E):
        b_edge = i_edge + tl.arange(0, BLOCK_E)
        b_x = _load_rows(p_x, p_indices, b_edge, b_edge < i_end, o_f, m_f, F, ACC)
        if PRODUCT:
            b_parts *= tl.where((b_edge < i_end)[:, None], b_x, 1)
        else:
            b_parts += b_x
    if PRODUCT:
        b_out = tl.reduce(b_parts, 0, _product)
    else:
        b_out = tl.sum(b_parts, axis=0)
    if MEAN:
        n = tl.maximum(i_end - i_first, 1)
        if b_out.dtype == tl.float64:
            b_out *= 1.0 / n.to(tl.float64)  # rounded once, as div_rn of float32
        else:
            b_out *= tl.div_rn(1.0, n.to(tl.float32))
    tl.store(p_out + i_row * F + o_f, _cast(b_out, p_out), mask=m_f)


@triton.jit
def _segment_extreme_kernel(
    p_out, p_arg,  # [N, F]
    p_indptr, p_indices,  # [N + 1], [E]
    p_x,  # [E, F]
    F_VECTORS,
    LARGEST: tl.constexpr, WORST: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[i] = max (or min) of the rows of group i, and the position that was taken. ``WORST`` is what every number beats or equals."""
    i_row, i_first, i_end, o_f, m_f, F = _group_of(p_indptr, F_VECTORS, VECTOR, BLOCK_F)
    # [E, F]
    b_best = tl.full((BLOCK_E, BLOCK_F), WORST, ACC)
    b_arg = tl.full((BLOCK_E, BLOCK_F), -1, p_arg.dtype.element_ty)
    for i_edge in range(i_first, i_end, BLOCK_E):
        b_edge = i_edge + tl.arange(0, BLOCK_E)
        m_edge = b_edge < i_end
        b_x = _load_rows(p_x, p_indices, b_edge, m_edge, o_f, m_f, F, ACC)
        if LARGEST:
            m_beats = b_x > b_best
        else:
            m_beats = b_x < b_best
        # The first NaN stays.
        m_taken = m_edge[:, None] & ((b_arg < 0) | ((m_beats | (b_x != b_x)) & (b_best == b_best)))
        b_best, b_arg = tl.where(m_taken, b_x, b_best), tl.where(m_taken, b_edge[:, None].to(b_arg.dtype), b_arg)
    m_nan = b_best != b_best
    b_numbers = tl.where(m_nan, WORST, b_best).to(ACC)
    if LARGEST:
        b_top = tl.max(b_numbers, axis=0)
    else:
        b_top = tl.min(b_numbers, axis=0)
    m_any_nan = tl.max(m_nan.to(tl.int32), axis=0) > 0
    m_top = (b_arg >= 0) & tl.where(m_any_nan[None, :], m_nan, b_best == b_top[None, :])
    b_first = tl.min(tl.where(m_top, b_arg, i_end), axis=0)
    m_some = m_f & (b_first < i_end)
    b_source = tl.load(p_indices + b_first, mask=m_some, other=0).to(tl.int64)
    tl.store(p_out + i_row * F + o_f, tl.load(p_x + b_source * F + o_f, mask=m_some, other=0), mask=m_f)
    tl.store(p_arg + i_row * F + o_f, tl.where(m_some, b_first, -1), mask=m_f)


@triton.jit
def _segment_mul_bwd_kernel(
    p_dx,  # [E, F], in the type it is computed in
    p_indptr, p_indices,  # [N + 1], [E]
    p_grad, p_x,  # [N, F], [E, F]
    F_VECTORS,
    ACC: tl.constexpr, VECTOR: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dx[e] = grad[i] times the product of the other rows of group i: of those before e, then of those after."""
    i_row, i_first, i_end, o_f, m_f, F = _group_of(p_indptr, F_VECTORS, VECTOR, BLOCK_F)
    # [F]
    b_run = tl.full((BLOCK_F,), 1, ACC)
    for i_edge in range(i_first, i_end):
        o_x = tl.load(p_indices + i_edge).to(tl.int64) * F + o_f
        tl.store(p_dx + o_x, b_run, mask=m_f)
        b_run *= tl.load(p_x + o_x, mask=m_f, other=0).to(ACC)
    # What one thread has stored, another may load.
    tl.debug_barrier()
    b_run = tl.load(p_grad + i_row * F + o_f, mask=m_f, other=0).to(ACC)
    for k in range(0, i_end - i_first):
        o_x = tl.load(p_indices + (i_end - 1 - k)).to(tl.int64) * F + o_f
        tl.store(p_dx + o_x, tl.load(p_dx + o_x, mask=m_f, other=0) * b_run, mask=m_f)
        b_run *= tl.load(p_x + o_x, mask=m_f, other=0).to(ACC)


@triton.jit
def _segment_gather_kernel(
    p_out,  # [E, F]
    p_indptr, p_indices,  # [N + 1], [E]
    p_x,  # [N, F]
    F_VECTORS,
    VECTOR: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """out[e] = x[i] for the rows e of group i."""
    i_row, i_first, i_end, o_f, m_f, F = _group_of(p_indptr, F_VECTORS, VECTOR, BLOCK_F)
    b_x = tl.load(p_x + i_row * F + o_f, mask=m_f, other=0)
    for i_edge in range(i_first, i_end, BLOCK_E):
        b_edge = i_edge + tl.arange(0, BLOCK_E)
        m_edge = b_edge < i_end
        b_target = tl.load(p_indices + b_edge, mask=m_edge, other=0).to(tl.int64)
        b_rows = tl.broadcast_to(b_x[None, :], (BLOCK_E, BLOCK_F))
        tl.store(p_out + b_target[:, None] * F + o_f[None, :], b_rows, mask=m_edge[:, None] & m_f[None, :])


def group(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A sort and a search: neither synchronises, as ``bincount`` does."""
    values, indices = torch.sort(index, stable=True)
    bounds = torch.arange(size + 1, dtype=index.dtype, device=index.device)
    return torch.searchsorted(values, bounds, out_int32=True), indices.to(torch.int32)


def _launch(kernel: Any, indptr: Tensor, indices: Tensor, features: int, **arguments: Any) -> None:
    """A program for every group and block of columns, as many rows at a time as a group has on average."""
    groups, sizes = indptr.numel() - 1, float_tile(features)
    block_e = 1  # of a kernel that takes its rows one by one: more warps would only repeat its loads and stores
    if "BLOCK_E" in kernel.arg_names:
        block_e = min(triton.next_power_of_2(max(triton.cdiv(indices.numel(), groups), 1)), sizes["BLOCK_E"])
        arguments["BLOCK_E"] = block_e
    warps = min(max(block_e * sizes["BLOCK_F"] // 256, 1), 4)
    launch(
        kernel, (groups, triton.cdiv(features, sizes["BLOCK_F"])),
        p_indptr=indptr.contiguous(), p_indices=indices.contiguous(),
        F_VECTORS=sizes["F_VECTORS"], VECTOR=sizes["VECTOR"], BLOCK_F=sizes["BLOCK_F"], **arguments, **{**EXACT, "num_warps": warps},
    )  # fmt: skip


def _worst(dtype: torch.dtype, largest: bool) -> float:
    if dtype.is_floating_point:
        return -math.inf if largest else math.inf
    return torch.iinfo(dtype).min if largest else torch.iinfo(dtype).max


def segment_reduce(indptr: Tensor, indices: Tensor, x: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    x, acc = x.contiguous(), COMPUTED[x.dtype]
    out = x.new_empty(indptr.numel() - 1, x.size(1))
    extreme = reduce in ("max", "min")
    arg = torch.empty_like(out if extreme else out.new_empty(0), dtype=indptr.dtype)
    if not out.numel():
        return out, arg
    if extreme:
        _launch(
            _segment_extreme_kernel, indptr, indices, x.size(1),
            p_out=out, p_arg=arg, p_x=x, LARGEST=reduce == "max", WORST=_worst(x.dtype, reduce == "max"), ACC=acc,
        )  # fmt: skip
    else:
        _launch(
            _segment_fold_kernel, indptr, indices, x.size(1),
            p_out=out, p_x=x, PRODUCT=reduce == "mul", MEAN=reduce == "mean", ACC=acc,
        )  # fmt: skip
    return out, arg


def segment_mul_backward(indptr: Tensor, indices: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(x.shape, dtype=wide, device=x.device)
    if out.numel():
        _launch(
            _segment_mul_bwd_kernel, indptr, indices, x.size(1),
            p_dx=out, p_grad=grad.contiguous(), p_x=x.contiguous(), ACC=COMPUTED[x.dtype],
        )  # fmt: skip
    return out.to(x.dtype)


def segment_gather(indptr: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    out = x.new_empty(indices.numel(), x.size(1))
    if out.numel():
        _launch(_segment_gather_kernel, indptr, indices, x.size(1), p_out=out, p_x=x.contiguous())
    return out


_POINTERS = dict.fromkeys(["p_indptr", "p_indices"], "*i32")
_FLOATS = {"p_out": "*fp32", "p_x": "*fp32", "F_VECTORS": "i32"}
_TILE = {"VECTOR": 16, "BLOCK_E": 16, "BLOCK_F": 128}
_SUM = {**_TILE, "PRODUCT": False, "MEAN": False, "ACC": tl.float32}
_MAX = {**_TILE, "LARGEST": True, "WORST": float("-inf"), "ACC": tl.float32}
_OFFSETS_64 = {"p_indptr": "*i64", "p_indices": "*i32"}
COMPILE_CASES = [
    CompileCase("segment_sum_fp32", _segment_fold_kernel, {**_POINTERS, **_FLOATS}, _SUM, EXACT),
    CompileCase(
        "segment_mean_bf16_offsets64", _segment_fold_kernel, {**_OFFSETS_64, **_FLOATS, "p_out": "*bf16", "p_x": "*bf16"},
        {**_SUM, "MEAN": True}, EXACT,
    ),
    CompileCase(
        "segment_mean_fp64", _segment_fold_kernel, {**_POINTERS, **_FLOATS, "p_out": "*fp64", "p_x": "*fp64"},
        {**_SUM, "MEAN": True, "ACC": tl.float64}, EXACT,
    ),
    CompileCase(
        "segment_mul_int64", _segment_fold_kernel, {**_POINTERS, **_FLOATS, "p_out": "*i64", "p_x": "*i64"},
        {**_SUM, "PRODUCT": True, "ACC": tl.int64}, EXACT,
    ),
    CompileCase("segment_max_fp32", _segment_extreme_kernel, {**_POINTERS, **_FLOATS, "p_arg": "*i32"}, _MAX, EXACT),
    CompileCase(
        "segment_min_int64_offsets64", _segment_extreme_kernel, {**_OFFSETS_64, **_FLOATS, "p_out": "*i64", "p_x": "*i64", "p_arg": "*i64"},
        {**_MAX, "LARGEST": False, "WORST": 2**63 - 1, "ACC": tl.int64}, EXACT,
    ),
    CompileCase(
        "segment_mul_bwd_fp16", _segment_mul_bwd_kernel,
        {**_POINTERS, "p_dx": "*fp32", "p_grad": "*fp16", "p_x": "*fp16", "F_VECTORS": "i32"}, {"VECTOR": 16, "BLOCK_F": 128, "ACC": tl.float32},
        {**EXACT, "num_warps": 1},
    ),
    CompileCase("segment_gather_fp32", _segment_gather_kernel, {**_POINTERS, **_FLOATS}, _TILE, EXACT),
]  # fmt: skip
