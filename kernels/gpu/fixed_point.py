"""Triton kernels of :mod:`qgnn.kernels.fixed_point`; symbols, shapes and formulas are stated there."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import bucket_starts, code_range, row_bytes, tight_bytes, uniform_counts
from ..ranges import largest, scale_of
from .common import EXACT, CompileCase, _cast, check_dtype, empty_packed, launch, tile_blocks
from .random import _rounded, seed_arguments
from .tight import _load_tight, _store_tight, _tight_bytes

VALUES, CODES, TIGHT = (tl.constexpr(form) for form in range(3))
"""What a kernel makes of codes: floats, rows in containers of 8 bits, tight rows."""


@triton.jit
def _parameter(p_parameter, o_r, m_r, PER_ROW: tl.constexpr):
    """``[R, 1]`` or a scalar. Rows past the end are not used; 1 keeps them from dividing by zero."""
    if PER_ROW:
        return tl.load(p_parameter + o_r, mask=m_r, other=1.0)[:, None]
    else:
        return tl.load(p_parameter)


@triton.jit
def _store_container(p_out, b_codes, o_r, m_r, o_f, F, stride):
    """Stores codes (int32 ``[R, F]``) in rows of ``stride`` bytes, with the zeros behind a row."""
    b_bytes = tl.where((o_f < F)[None, :], b_codes, 0).to(tl.uint8)
    p_byte = p_out + o_r.to(tl.int64)[:, None] * stride + o_f[None, :]
    tl.store(p_byte, b_bytes, mask=m_r[:, None] & (o_f < stride)[None, :])


@triton.jit(do_not_specialize=["N", "bits", "lowest", "highest", "seed"])
def _fixed_point_kernel(
    p_out,  # [N, F] values, [N, stride] bytes, or tight rows
    p_x,  # [N, F]
    p_scale,  # [N] or [1]
    p_offset,  # [N] or [1]
    N, F, stride, bits, lowest, highest, seed,
    SCALES: tl.constexpr, OFFSETS: tl.constexpr, STOCHASTIC: tl.constexpr, FORM: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """code = clamp(round(x / c - d), lo, hi) and value = c * (code + d) (NUMERICS 6)."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_r = o_r < N
    # [BLOCK_R, BLOCK_F]
    m = m_r[:, None] & (o_f < F)[None, :]
    o_x = o_r.to(tl.int64)[:, None] * F + o_f[None, :]
    b_x = tl.load(p_x + o_x, mask=m, other=0.0).to(tl.float32)
    b_c, b_d = _parameter(p_scale, o_r, m_r, SCALES), _parameter(p_offset, o_r, m_r, OFFSETS)
    # NaN becomes the lowest code. Whole bounds may come before the rounding, which infinity would not survive in the interpreter.
    b_steps, low, high = tl.div_rn(b_x, b_c) - b_d, lowest.to(tl.float32), highest.to(tl.float32)
    b_steps = tl.where(b_steps > low, tl.where(b_steps < high, b_steps, high), low)
    b_code = _rounded(b_steps, seed, o_x, STOCHASTIC)
    if FORM == VALUES:
        b_value = tl.where(b_x == b_x, b_c * (b_code + b_d), b_x)
        tl.store(p_out + o_x, _cast(b_value, p_out), mask=m)
    elif FORM == CODES:
        _store_container(p_out, b_code.to(tl.int32), o_r, m_r, o_f, F, stride)
    else:
        b_code = tl.where(m, b_code - low, 0.0).to(tl.int32)
        _store_tight(p_out, b_code, bits, o_r, m_r, tl.program_id(1), _tight_bytes(F, bits))


@triton.jit(do_not_specialize=["N", "bits", "lowest"])
def _fixed_point_unpack_kernel(
    p_out,  # [N, F] values, or [N, stride] bytes
    p_data,  # tight rows
    p_scale,  # [N] or [1]; None but for values
    p_offset,  # [N] or [1]; None but for values
    N, F, stride, bits, lowest,
    SCALES: tl.constexpr, OFFSETS: tl.constexpr, FORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Tight rows as values, or in containers of 8 bits."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_r = o_r < N
    # [BLOCK_R, BLOCK_F]
    m = m_r[:, None] & (o_f < F)[None, :]
    b_code = _load_tight(p_data, o_r, o_f, m, bits, _tight_bytes(F, bits)) + lowest
    if FORM == VALUES:
        b_c, b_d = _parameter(p_scale, o_r, m_r, SCALES), _parameter(p_offset, o_r, m_r, OFFSETS)
        p_row = p_out + o_r.to(tl.int64)[:, None] * F + o_f[None, :]
        tl.store(p_row, b_c * (b_code.to(tl.float32) + b_d), mask=m)
    else:
        _store_container(p_out, b_code, o_r, m_r, o_f, F, stride)


@triton.jit(do_not_specialize=["N", "bits", "lowest"])
def _tighten_kernel(p_out, p_data, N, F, stride, bits, lowest, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """Rows of ``stride`` bytes in containers of 8 bits to tight rows."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    m_r = o_r < N
    # [BLOCK_R, BLOCK_F]
    m = m_r[:, None] & (o_f < F)[None, :]
    b_byte = tl.load(p_data + o_r.to(tl.int64)[:, None] * stride + o_f[None, :], mask=m, other=0).to(tl.int32)
    b_code = tl.where(m, (b_byte - lowest) & 255, 0)  # two's complement: what is above a byte is not the code's
    _store_tight(p_out, b_code, bits, o_r, m_r, tl.program_id(1), _tight_bytes(F, bits))


def _grid(rows: int, features: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile. Tiles that cover all features cover the bytes behind them too: they are as wide as the rows' alignment."""
    blocks = tile_blocks(features)
    return (triton.cdiv(rows, blocks["BLOCK_R"]), triton.cdiv(features, blocks["BLOCK_F"])), blocks


def _parameters(scale: Tensor, offset: Tensor) -> dict[str, Any]:
    return {
        "p_scale": scale.contiguous(), "p_offset": offset.contiguous(),
        "SCALES": scale.numel() > 1, "OFFSETS": offset.numel() > 1,
    }  # fmt: skip


def _quantize(
    out: Tensor, form: tl.constexpr, x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int
) -> Tensor:  # fmt: skip
    check_dtype("x", x)
    lowest, highest = code_range(bits, signed)
    if x.numel():
        grid, blocks = _grid(*x.shape)
        launch(
            _fixed_point_kernel, grid,
            p_out=out, p_x=x.contiguous(), N=x.size(0), F=x.size(1), stride=row_bytes(8, x.size(1)), bits=bits, lowest=lowest, highest=highest,
            FORM=form, **_parameters(scale, offset), **seed_arguments(seed), **blocks, **EXACT,
        )  # fmt: skip
    return out


def fixed_point(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    """:func:`qgnn.kernels.fixed_point.fixed_point` in one pass over ``x``."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _quantize(out, VALUES, x, scale, offset, bits, signed, seed)


def fixed_point_codes(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    """:func:`qgnn.kernels.fixed_point.fixed_point_codes` in one pass over ``x``."""
    out = empty_packed(uniform_counts(x.size(0), 8), x.size(1), x.device)
    return _quantize(out, CODES, x, scale, offset, bits, signed, seed)


def own_range_codes(x: Tensor, factor: Tensor | None, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """:func:`qgnn.kernels.fixed_point.own_range_codes`."""
    check_dtype("x", x)
    values = x.float() if factor is None else x.float() * factor.float().reshape(-1, 1)
    scale = scale_of(largest(values), bits, True)
    return fixed_point_codes(values, scale, scale.new_zeros(1), bits, True, seed), scale


def transpose_codes(data: Tensor, rows: int, features: int) -> Tensor:
    """:func:`qgnn.kernels.fixed_point.transpose_codes`: a copy, which torch does in tiles."""
    stride = row_bytes(8, features)
    out = torch.zeros(bucket_starts(uniform_counts(features, 8), rows)[-1], dtype=torch.uint8, device=data.device)
    turned = out[: features * row_bytes(8, rows)].view(features, row_bytes(8, rows))
    turned[:, :rows] = data[: rows * stride].view(rows, stride)[:, :features].t()
    return out


def fixed_point_pack(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    """:func:`qgnn.kernels.fixed_point.fixed_point_pack` in one pass over ``x``."""
    out = torch.empty(x.size(0), tight_bytes(x.size(1), bits), dtype=torch.uint8, device=x.device)
    return _quantize(out, TIGHT, x, scale, offset, bits, signed, seed)


def fixed_point_unpack(data: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, features: int) -> Tensor:
    """:func:`qgnn.kernels.fixed_point.fixed_point_unpack`."""
    out = torch.empty(data.size(0), features, dtype=torch.float32, device=data.device)
    if out.numel():
        grid, blocks = _grid(*out.shape)
        launch(
            _fixed_point_unpack_kernel, grid,
            p_out=out, p_data=data.contiguous(), N=data.size(0), F=features, stride=row_bytes(8, features), bits=bits,
            lowest=code_range(bits, signed)[0], FORM=VALUES, **_parameters(scale, offset), **blocks, **EXACT,
        )  # fmt: skip
    return out


def tighten(data: Tensor, rows: int, features: int, bits: int, signed: bool) -> Tensor:
    """:func:`qgnn.kernels.fixed_point.tighten`."""
    out = torch.empty(rows, tight_bytes(features, bits), dtype=torch.uint8, device=data.device)
    if out.numel():
        grid, blocks = _grid(rows, features)
        launch(
            _tighten_kernel, grid,
            p_out=out, p_data=data.contiguous(), N=rows, F=features, stride=row_bytes(8, features), bits=bits,
            lowest=code_range(bits, signed)[0], **blocks, **EXACT,
        )  # fmt: skip
    return out


def loosen(data: Tensor, bits: int, signed: bool, features: int) -> Tensor:
    """:func:`qgnn.kernels.fixed_point.loosen`."""
    rows = data.size(0)
    out = empty_packed(uniform_counts(rows, 8), features, data.device)
    if out.numel():
        grid, blocks = _grid(rows, features)
        launch(
            _fixed_point_unpack_kernel, grid,
            p_out=out, p_data=data.contiguous(), p_scale=None, p_offset=None, N=rows, F=features, stride=row_bytes(8, features),
            bits=bits, lowest=code_range(bits, signed)[0], SCALES=False, OFFSETS=False, FORM=CODES,
            **blocks, **EXACT,
        )  # fmt: skip
    return out


_SIZES = {"N": "i32", "F": "i32:16", "stride": "i32:16", "bits": "i32", "lowest": "i32"}
_FLOATS, _BYTES = {**_SIZES, "p_out": "*fp32"}, {**_SIZES, "p_out": "*u8"}
_PARAMETERS = {"p_scale": "*fp32", "p_offset": "*fp32"}
_INPUT = {**_PARAMETERS, "p_x": "*fp32", "highest": "i32", "seed": "i32"}
_TENSOR = {"SCALES": False, "OFFSETS": False, **tile_blocks(128)}
_ROWS = {"SCALES": True, "OFFSETS": True, **tile_blocks(128)}
_CASES: list[tuple[str, Any, dict[str, str], dict[str, Any]]] = [
    ("fixed_point", _fixed_point_kernel,
     {**_FLOATS, **_INPUT}, {**_TENSOR, "FORM": VALUES.value, "STOCHASTIC": False}),
    ("fixed_point, bf16, stochastic", _fixed_point_kernel,
     {**_FLOATS, **_INPUT, "p_out": "*bf16", "p_x": "*bf16"}, {**_ROWS, "FORM": VALUES.value, "STOCHASTIC": True}),
    ("fixed_point_codes", _fixed_point_kernel,
     {**_BYTES, **_INPUT}, {**_TENSOR, "FORM": CODES.value, "STOCHASTIC": False}),
    ("fixed_point_pack, stochastic", _fixed_point_kernel,
     {**_BYTES, **_INPUT}, {**_ROWS, "FORM": TIGHT.value, "STOCHASTIC": True}),
    ("fixed_point_unpack", _fixed_point_unpack_kernel,
     {**_FLOATS, **_PARAMETERS, "p_data": "*u8"}, {**_ROWS, "FORM": VALUES.value}),
    ("loosen", _fixed_point_unpack_kernel,
     {**_BYTES, "p_data": "*u8"}, {**_TENSOR, "FORM": CODES.value, "p_scale": None, "p_offset": None}),
    ("tighten", _tighten_kernel, {**_BYTES, "p_data": "*u8"}, tile_blocks(128)),
]  # fmt: skip

COMPILE_CASES = [CompileCase(*case, EXACT) for case in _CASES]
