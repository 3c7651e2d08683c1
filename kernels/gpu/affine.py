"""Triton kernel of :mod:`qgnn.kernels.affine`; symbols, shapes and formulas are stated there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import EXACT, CompileCase, _cast, _pack, check_dtype, launch, tile_blocks


@triton.jit
def _round_half_even(b_x):
    """float32 to the nearest integer, ties to even; a float32 of 2^23 or more is one already.

    Below that, 2^23 + |x| keeps no fraction, and IEEE addition rounds it half to even. The sign of a zero may differ."""
    b_magnitude = tl.abs(b_x)
    b_rounded = (b_magnitude + 8388608.0) - 8388608.0
    return tl.where(b_magnitude < 8388608.0, tl.where(b_x < 0, -b_rounded, b_rounded), b_x)


@triton.jit(do_not_specialize=["N"])
def _fake_quantize_affine_kernel(
    p_value,  # [N, F]
    p_outside,  # [N, ceil(F / 8)]
    p_x,  # [N, F]
    p_scale,  # [1]
    p_zero,  # [1]
    p_protect,  # [N] or None
    N, F,
    BITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """value = scale * (clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero), x in protected rows (DQ sec. 3.2)."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_first = tl.program_id(1) * BLOCK_F
    o_f = o_first + tl.arange(0, BLOCK_F)
    m_r = o_r < N
    # [BLOCK_R, BLOCK_F]
    m = m_r[:, None] & (o_f < F)[None, :]
    o_x = o_r.to(tl.int64)[:, None] * F + o_f[None, :]
    b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    b_scale, b_zero = tl.load(p_scale), tl.load(p_zero)
    TOP: tl.constexpr = (1 << BITS) - 1
    b_steps, b_shift = tl.div_rn(b_x, b_scale), b_zero.to(tl.float32)
    b_shifted = _round_half_even(b_steps) + b_shift
    # NaN becomes 0 here and is put back below.
    b_code = tl.where(b_shifted > 0.0, tl.where(b_shifted < TOP, b_shifted, TOP), 0.0).to(tl.int32)
    b_outside = ((b_steps < -b_shift) | (b_steps > TOP - b_shift)) & m
    b_keep = b_x != b_x
    if p_protect is not None:
        b_protect = tl.load(p_protect + o_r, mask=m_r, other=0)[:, None] != 0
        b_keep = b_keep | b_protect
        b_outside = b_outside & (b_protect == 0)
    b_value = tl.where(b_keep, b_x, b_scale * (b_code - b_zero).to(tl.float32))
    tl.store(p_value + o_x, _cast(b_value, p_value), mask=m)
    # [BLOCK_R, BLOCK_F / 8]
    o_c = o_first // 8 + tl.arange(0, BLOCK_F // 8)
    p_bytes = p_outside + o_r.to(tl.int64)[:, None] * ((F + 7) // 8) + o_c[None, :]
    tl.store(p_bytes, _pack(b_outside.to(tl.int32), 1), mask=m_r[:, None] & (o_c * 8 < F)[None, :])


def fake_quantize_affine(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, protect: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`qgnn.kernels.affine.fake_quantize_affine` in one pass over ``x``."""
    check_dtype("x", x)
    n, features = x.shape
    value = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outside = torch.empty(n, (features + 7) // 8, dtype=torch.uint8, device=x.device)
    if x.numel():
        blocks = tile_blocks(features)
        grid = (triton.cdiv(n, blocks["BLOCK_R"]), triton.cdiv(features, blocks["BLOCK_F"]))
        launch(
            _fake_quantize_affine_kernel, grid,
            p_value=value, p_outside=outside, p_x=x.contiguous(), p_scale=scale, p_zero=zero,
            p_protect=None if protect is None else protect.contiguous(), N=n, F=features, BITS=bits, **blocks, **EXACT,
        )  # fmt: skip
    return value, outside


_SIGNATURE = {"p_outside": "*u8", "p_scale": "*fp32", "p_zero": "*i32", "N": "i32", "F": "i32:16"}

COMPILE_CASES = [
    CompileCase(
        "fake_quantize_affine, protected rows",
        _fake_quantize_affine_kernel,
        {"p_value": "*fp32", "p_x": "*fp32", "p_protect": "*i1", **_SIGNATURE},
        {"BITS": 4, **tile_blocks(128)},
        EXACT,
    ),
    CompileCase(
        "fake_quantize_affine, bf16",
        _fake_quantize_affine_kernel,
        {"p_value": "*bf16", "p_x": "*bf16", **_SIGNATURE},
        {"BITS": 8, "p_protect": None, **tile_blocks(128)},
        EXACT,
    ),
]
