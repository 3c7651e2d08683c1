"""Triton kernels of :mod:`qgnn.kernels.quantize` that read what the others wrote: packed codes and clip bits."""

from __future__ import annotations

from collections.abc import Sequence
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
    _load_codes,
    _places,
    _row_address,
    launch,
    layout_arguments,
    tile_blocks,
)


@triton.jit(do_not_specialize=["N"])
def _mask_clipped_kernel(p_out, p_grad, p_clip, N, F, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """out = grad where the clip bit is 0, else 0 (A2Q eq. 10)."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    # [BLOCK_R, BLOCK_F]
    m = (o_r < N)[:, None] & (o_f < F)[None, :]
    b_row = o_r.to(tl.int64)[:, None]
    b_byte = tl.load(p_clip + b_row * ((F + 7) // 8) + (o_f >> 3)[None, :], mask=m, other=0).to(tl.int32)
    b_grad = tl.load(p_grad + b_row * F + o_f[None, :], mask=m, other=0.0)
    b_clipped = ((b_byte >> (o_f & 7)[None, :]) & 1) != 0
    tl.store(p_out + b_row * F + o_f[None, :], tl.where(b_clipped, tl.zeros_like(b_grad), b_grad), mask=m)


@triton.jit(do_not_specialize=["N", "zero", *LAYOUT_FIRSTS])
def _dequantize_kernel(
    p_value,  # [N, F]
    p_data,  # [bytes]
    p_step,  # [N] or [F]
    p_pos,  # [N] or None
    zero, N, F,
    first_4, first_2, first_1, first_0, start_4, start_2, start_1, stride_8, stride_4, stride_2, stride_1,
    ROW: tl.constexpr, SIGNED: tl.constexpr, CONTAINER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """value = step * (code - zero) (NUMERICS 1, 5)."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_r = o_r < N
    # [BLOCK_R, BLOCK_F]
    m = m_r[:, None] & (o_f < F)[None, :]
    b_container, b_address = _row_address(
        _places(p_pos, o_r, m_r), first_4, first_2, first_1, first_0, start_4, start_2, start_1,
        stride_8, stride_4, stride_2, stride_1, CONTAINER,
    )  # fmt: skip
    b_code = _load_codes(p_data, b_container, b_address, m, o_f, SIGNED)
    if ROW:
        b_step = tl.load(p_step + o_r, mask=m_r, other=0.0)[:, None]
    else:
        b_step = tl.load(p_step + o_f, mask=o_f < F, other=0.0)[None, :]
    tl.store(p_value + o_r.to(tl.int64)[:, None] * F + o_f[None, :], b_step * (b_code - zero).to(tl.float32), mask=m)


def mask_clipped(grad: Tensor, clip: Tensor) -> Tensor:
    """:func:`qgnn.kernels.quantize.mask_clipped`."""
    n, features = grad.shape
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    if grad.numel():
        blocks = tile_blocks(features)
        grid = (triton.cdiv(n, blocks["BLOCK_R"]), triton.cdiv(features, blocks["BLOCK_F"]))
        launch(
            _mask_clipped_kernel, grid,
            p_out=out, p_grad=grad.contiguous(), p_clip=clip.contiguous(), N=n, F=features, **blocks, **EXACT,
        )  # fmt: skip
    return out


def dequantize(
    data: Tensor, step: Tensor, row: bool, signed: bool, zero: int, pos: Tensor | None, counts: Sequence[int],
    features: int,
) -> Tensor:  # fmt: skip
    """:func:`qgnn.kernels.quantize.dequantize`."""
    n = sum(counts)
    value = torch.empty(n, features, dtype=step.dtype, device=data.device)
    if value.numel():
        blocks = tile_blocks(features)
        grid = (triton.cdiv(n, blocks["BLOCK_R"]), triton.cdiv(features, blocks["BLOCK_F"]))
        launch(
            _dequantize_kernel, grid,
            p_value=value, p_data=data, p_step=step.contiguous(), p_pos=pos, zero=zero, N=n, F=features,
            ROW=row, SIGNED=signed, **layout_arguments(counts, features), **blocks, **EXACT,
        )  # fmt: skip
    return value


_N128 = {"N": "i32", "F": "i32:16"}
_BLOCKS = {"SIGNED": True, **tile_blocks(128)}
_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
    ("mask_clipped", _mask_clipped_kernel,
     {"p_out": "*fp32", "p_grad": "*fp32", "p_clip": "*u8", **_N128}, tile_blocks(128)),
    ("dequantize, mixed rows", _dequantize_kernel,
     {"p_value": "*fp32", "p_data": "*u8", "p_step": "*fp32", "p_pos": "*i32", "zero": "i32", **_N128, **LAYOUT_SIGNATURE},
     {**_BLOCKS, "ROW": True, "CONTAINER": None}),
    ("dequantize, int4 columns", _dequantize_kernel,
     {"p_value": "*fp32", "p_data": "*u8", "p_step": "*fp32", "zero": "i32", **_N128, **LAYOUT_SIGNATURE},
     {**_BLOCKS, "ROW": False, "CONTAINER": 4, "p_pos": None}),
]  # fmt: skip

COMPILE_CASES = [CompileCase(*case, EXACT) for case in _CASES]
