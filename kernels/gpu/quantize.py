"""Triton kernels of :mod:`qgnn.kernels.quantize`; symbols, shapes and formulas are stated there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    EXACT,
    LAYOUT_FIRSTS,
    LAYOUT_SIGNATURE,
    CompileCase,
    _cast,
    _clipped,
    _codes,
    _largest_code,
    _pack,
    _store_codes,
    check_dtype,
    empty_packed,
    launch,
    layout_arguments,
    tile_blocks,
)
from .dequantize import dequantize, mask_clipped

__all__ = ["dequantize", "fake_quantize", "fake_quantize_backward", "mask_clipped", "quantize"]

LN2 = tl.constexpr(math.log(2))


@triton.jit
def _load_parameters(p_step, p_bits, o_r, o_f, N, F, ROW: tl.constexpr, SIGNED: tl.constexpr):
    """Step (float32), width (float32) and largest code (int32) of a tile, ``[R, 1]`` or ``[1, F]``."""
    if ROW:
        o_p = o_r[:, None]
        m_p = o_p < N
    else:
        o_p = o_f[None, :]
        m_p = o_p < F
    b_bits = tl.load(p_bits + o_p, mask=m_p, other=0).to(tl.int32)
    return tl.load(p_step + o_p, mask=m_p, other=1.0), b_bits.to(tl.float32), _largest_code(b_bits, SIGNED)


@triton.jit
def _sign(b_x, SIGNED: tl.constexpr):
    """``sign(x)``; for unsigned codes the negative side, which is 0 throughout, has none."""
    if SIGNED:
        return (b_x > 0).to(tl.float32) - (b_x < 0).to(tl.float32)
    else:
        return (b_x > 0).to(tl.float32)


@triton.jit
def _store_sums(
    p_dstep, p_dbits, b_inside, b_outside, b_step, b_bits, b_q, i_r, o_r, o_f, N, F, count,
    ROW: tl.constexpr, SIGNED: tl.constexpr,
):  # fmt: skip
    """Sums of weight * dx_q/dstep and weight * dx_q/dbits (A2Q eq. 10), over ``count``.

    Step and width are constant along a sum, so two sums per element do: ``b_inside`` of weight * (x_q - x) where not clipped,
    ``b_outside`` of weight * sign(x) where clipped. Rows: ``[N]``. Columns: this program's line of the partial sums ``[P, F]``."""
    b_factor = tl.exp2(b_bits - 1 if SIGNED else b_bits) * LN2 * b_step
    AXIS: tl.constexpr = 1 if ROW else 0
    b_out = tl.sum(b_outside, axis=AXIS, keep_dims=True)
    b_dstep = tl.sum(b_inside, axis=AXIS, keep_dims=True) / b_step + b_out * b_q
    if ROW:
        o_out = o_r[:, None]
        m_out = o_out < N
    else:
        o_out = i_r.to(tl.int64) * F + o_f[None, :]
        m_out = o_f[None, :] < F
    tl.store(p_dstep + o_out, b_dstep / count, mask=m_out)
    tl.store(p_dbits + o_out, b_out * b_factor / count, mask=m_out)


@triton.jit(do_not_specialize=["N", *LAYOUT_FIRSTS])
def _quantize_fwd_kernel(
    p_data,  # [bytes] or None
    p_value,  # [N, F] or None
    p_clip,  # [N, ceil(F / 8)]
    p_dstep,  # [N], or partial sums [P, F]; None without local gradients
    p_dbits,
    p_x,  # [N, F]
    p_step,  # [N] or [F]
    p_bits,
    p_pos,  # [N] or None
    N, F, steps,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    ROW: tl.constexpr, SIGNED: tl.constexpr, CONTAINER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """code = sign(x) * min(floor(|x| / step + 0.5), Q), clipped = |x| >= step * Q (A2Q eq. 1, 9), and the local gradients, mean
    of sign(x_q - x) * dx_q/dstep and ... * dx_q/dbits (A2Q eq. 7, 8)."""
    i_r = tl.program_id(0)
    # Rows: one row block, all features. Columns: one feature block, `steps` row blocks.
    o_r = i_r * (BLOCK_R if ROW else BLOCK_R * steps) + tl.arange(0, BLOCK_R)
    o_first = tl.program_id(1) * BLOCK_F
    o_f = o_first + tl.arange(0, BLOCK_F)
    b_step, b_bits, b_q = _load_parameters(p_step, p_bits, o_r, o_f, N, F, ROW, SIGNED)
    b_inside = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    b_outside = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for _ in range(steps):
        m_r = o_r < N
        # [BLOCK_R, BLOCK_F]
        m = m_r[:, None] & (o_f < F)[None, :]
        o_x = o_r.to(tl.int64)[:, None] * F + o_f[None, :]
        b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
        b_code = _codes(b_x, b_step, b_q, SIGNED)
        b_clipped = _clipped(b_x, b_step, b_q, SIGNED) & m
        # [BLOCK_R, BLOCK_F / 8]
        o_c = o_first // 8 + tl.arange(0, BLOCK_F // 8)
        p_bytes = p_clip + o_r.to(tl.int64)[:, None] * ((F + 7) // 8) + o_c[None, :]
        tl.store(p_bytes, _pack(b_clipped.to(tl.int32), 1), mask=m_r[:, None] & (o_c * 8 < F)[None, :])
        if p_value is not None:
            b_value = tl.where(b_x != b_x, b_x, b_step * b_code.to(tl.float32))
            tl.store(p_value + o_x, _cast(b_value, p_value), mask=m)
        if p_data is not None:
            _store_codes(
                p_data, p_pos, b_code, o_r, m_r, o_first // BLOCK_F, first_4, first_2, first_1, first_0,
                start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1, CONTAINER,
            )  # fmt: skip
        if p_dstep is not None:
            b_error = b_step * b_code.to(tl.float32) - b_x
            b_inside += tl.where(b_clipped, 0.0, tl.abs(b_error))
            b_outside += tl.where(b_clipped, _sign(b_error, True) * _sign(b_x, SIGNED), 0.0)
        if ROW:
            o_first += BLOCK_F
            o_f += BLOCK_F
        else:
            o_r += BLOCK_R
    if p_dstep is not None:
        o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
        _store_sums(
            p_dstep, p_dbits, b_inside, b_outside, b_step, b_bits, b_q, i_r, o_r, o_f, N, F, F if ROW else N, ROW, SIGNED
        )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _quantize_bwd_kernel(
    p_dx,  # [N, F]
    p_dstep,  # [N], or partial sums [P, F]
    p_dbits,
    p_grad,  # [N, F]
    p_x,  # [N, F]
    p_step,  # [N] or [F]
    p_bits,
    N, F, steps,
    ROW: tl.constexpr, SIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dx = grad where not clipped, else 0; sums of grad * dx_q/dstep and grad * dx_q/dbits (A2Q eq. 3, 4, 10)."""
    i_r = tl.program_id(0)
    o_r = i_r * (BLOCK_R if ROW else BLOCK_R * steps) + tl.arange(0, BLOCK_R)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    b_step, b_bits, b_q = _load_parameters(p_step, p_bits, o_r, o_f, N, F, ROW, SIGNED)
    b_inside = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    b_outside = tl.zeros((BLOCK_R, BLOCK_F), tl.float32)
    for _ in range(steps):
        # [BLOCK_R, BLOCK_F]
        m = (o_r < N)[:, None] & (o_f < F)[None, :]
        o_x = o_r.to(tl.int64)[:, None] * F + o_f[None, :]
        b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
        b_grad = tl.load(p_grad + o_x, mask=m, other=0.0).to(tl.float32)
        b_clipped = _clipped(b_x, b_step, b_q, SIGNED)
        tl.store(p_dx + o_x, _cast(tl.where(b_clipped, 0.0, b_grad), p_dx), mask=m)
        b_error = b_step * _codes(b_x, b_step, b_q, SIGNED).to(tl.float32) - b_x
        b_inside += tl.where(b_clipped, 0.0, b_grad * b_error)
        b_outside += tl.where(b_clipped, b_grad * _sign(b_x, SIGNED), 0.0)
        if ROW:
            o_f += BLOCK_F
        else:
            o_r += BLOCK_R
    o_r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    _store_sums(p_dstep, p_dbits, b_inside, b_outside, b_step, b_bits, b_q, i_r, o_r, o_f, N, F, 1.0, ROW, SIGNED)


COLUMN_TILES = 8
"""Row blocks that one program sums when steps belong to columns: partial sums are then 1/32 of a float32 x with 128 features."""


def _sweep(n: int, features: int, row: bool) -> tuple[tuple[int, int], dict[str, int]]:
    """The grid of a kernel with sums, and its block arguments."""
    blocks = tile_blocks(features)
    if row:
        return (triton.cdiv(n, blocks["BLOCK_R"]), 1), {**blocks, "steps": triton.cdiv(features, blocks["BLOCK_F"])}
    grid = (triton.cdiv(n, blocks["BLOCK_R"] * COLUMN_TILES), triton.cdiv(features, blocks["BLOCK_F"]))
    return grid, {**blocks, "steps": COLUMN_TILES}


def _pair(make: Callable[..., Tensor], shape: int | tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """For the gradients of step and width: float32, whatever the default dtype."""
    return make(shape, dtype=torch.float32, device=device), make(shape, dtype=torch.float32, device=device)


def _sums(n: int, features: int, row: bool, programs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    shape = (n,) if row else (programs, features)
    return _pair(torch.empty, shape, device)


def _total(partial: Tensor, row: bool) -> Tensor:
    """Partial sums are added in a fixed order, never by atomics: two runs give the same bits."""
    return partial if row else partial.sum(0)


def _quantize(
    data: Tensor | None, value: Tensor | None, x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool,
    pos: Tensor | None, counts: Sequence[int], gradients: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Fills ``data`` or ``value``; returns clip bits and local gradients."""
    n, features = x.shape
    clip = torch.empty(n, (features + 7) // 8, dtype=torch.uint8, device=x.device)
    if not x.numel():
        size = (n if row else features) if gradients else 0
        return clip, *_pair(torch.zeros, size, x.device)
    grid, blocks = _sweep(n, features, row)
    d_step, d_bits = _sums(n, features, row, grid[0], x.device) if gradients else (None, None)
    launch(
        _quantize_fwd_kernel, grid,
        p_data=data, p_value=value, p_clip=clip, p_dstep=d_step, p_dbits=d_bits,
        p_x=x.contiguous(), p_step=step.contiguous(), p_bits=bits.contiguous(), p_pos=pos,
        N=n, F=features, ROW=row, SIGNED=signed, **layout_arguments(counts, features), **blocks, **EXACT,
    )  # fmt: skip
    if d_step is None or d_bits is None:
        return clip, *_pair(torch.empty, 0, x.device)
    return clip, _total(d_step, row), _total(d_bits, row)


def quantize(
    x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool, pos: Tensor | None, counts: Sequence[int],
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`qgnn.kernels.quantize.quantize` in one pass over ``x``."""
    check_dtype("x", x)
    data = empty_packed(counts, x.size(1), x.device)
    return data, *_quantize(data, None, x, step, bits, row, signed, pos, counts, gradients)


def fake_quantize(
    x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`qgnn.kernels.quantize.fake_quantize` in one pass over ``x``."""
    check_dtype("x", x)
    value = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return value, *_quantize(None, value, x, step, bits, row, signed, None, [0, 0, 0, 0, x.size(0)], gradients)


def fake_quantize_backward(
    grad: Tensor, x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`qgnn.kernels.quantize.fake_quantize_backward` in one pass over ``grad`` and ``x``."""
    check_dtype("x", x)
    check_dtype("grad", grad)
    n, features = x.shape
    d_x = torch.empty(x.shape, dtype=grad.dtype, device=x.device)
    if not x.numel():
        size = n if row else features
        return d_x, *_pair(torch.zeros, size, x.device)
    grid, blocks = _sweep(n, features, row)
    d_step, d_bits = _sums(n, features, row, grid[0], x.device)
    launch(
        _quantize_bwd_kernel, grid,
        p_dx=d_x, p_dstep=d_step, p_dbits=d_bits, p_grad=grad.contiguous(), p_x=x.contiguous(),
        p_step=step.contiguous(), p_bits=bits.contiguous(), N=n, F=features, ROW=row, SIGNED=signed, **blocks, **EXACT,
    )  # fmt: skip
    return d_x, _total(d_step, row), _total(d_bits, row)


_N128 = {"N": "i32", "F": "i32:16"}
_STEP = {"p_step": "*fp32", "p_bits": "*u8"}
_SUMS = {"p_dstep": "*fp32", "p_dbits": "*fp32"}
_FWD = {"p_clip": "*u8", **_STEP, **_N128, **LAYOUT_SIGNATURE}
_MIXED = {"CONTAINER": None, "p_value": None}
_INT4 = {"CONTAINER": 4, "p_pos": None}
_FAKE = {"CONTAINER": 0, "p_pos": None, "p_data": None}
_ROWS = {"ROW": True, "SIGNED": True, **tile_blocks(128)}
_COLUMNS = {"ROW": False, "SIGNED": True, **tile_blocks(128)}

# x is [N, 128], but for the long rows, which loop over blocks of features.
_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
    ("quantize, mixed rows, local gradients", _quantize_fwd_kernel,
     {**_FWD, **_SUMS, "p_data": "*u8", "p_x": "*fp32", "p_pos": "*i32"}, {**_ROWS, **_MIXED, "steps": 1}),
    ("quantize, long mixed rows, local gradients", _quantize_fwd_kernel,
     {**_FWD, **_SUMS, "p_data": "*u8", "p_x": "*fp32", "p_pos": "*i32", "steps": "i32"},
     {**_ROWS, **_MIXED, **tile_blocks(1024), "SIGNED": False}),
    ("quantize, int4 columns", _quantize_fwd_kernel,
     {**_FWD, "p_data": "*u8", "p_x": "*bf16", "steps": "i32"},
     {**_COLUMNS, **_INT4, "p_value": None, "p_dstep": None, "p_dbits": None}),
    ("fake_quantize, rows, local gradients", _quantize_fwd_kernel,
     {**_FWD, **_SUMS, "p_x": "*fp32", "p_value": "*fp32"}, {**_ROWS, **_FAKE, "steps": 1}),
    ("fake_quantize, columns, local gradients", _quantize_fwd_kernel,
     {**_FWD, **_SUMS, "p_x": "*bf16", "p_value": "*bf16", "steps": "i32"}, {**_COLUMNS, **_FAKE}),
    ("fake_quantize_backward, rows", _quantize_bwd_kernel,
     {**_SUMS, **_STEP, **_N128, "p_dx": "*fp32", "p_grad": "*fp32", "p_x": "*fp32"}, {**_ROWS, "steps": 1}),
    ("fake_quantize_backward, columns", _quantize_bwd_kernel,
     {**_SUMS, **_STEP, **_N128, "p_dx": "*bf16", "p_grad": "*bf16", "p_x": "*bf16", "steps": "i32"}, _COLUMNS),
]  # fmt: skip

COMPILE_CASES = [CompileCase(*case, EXACT) for case in _CASES]
