"""Triton kernels of :mod:`qgnn.kernels.msfp`; symbols, shapes and formulas are stated there.

A program takes BLOCK_B blocks of x in their order. A block's codes are whole bytes, so packed ones follow each other without regard to rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import tight_bytes
from .common import EXACT, TILE, CompileCase, _cast, check_dtype, launch
from .random import _rounded, seed_arguments
from .tight import _load_tight, _store_tight

BLOCK = 16
"""Values that share an exponent (:data:`qgnn.kernels.msfp.BLOCK`); kernels write it as 16."""

RUN_TIME = ["N", "mantissa_bits", "seed"]
"""Arguments that no kernel is compiled anew for: batches and schedules change them."""


@triton.jit
def _blocks(N, F, BLOCK_B: tl.constexpr):
    """The blocks of a program, int32 ``[BLOCK_B]``, and which exist; the places in x of their values, ``[BLOCK_B, 16]``, and which exist."""
    K = tl.cdiv(F, 16)
    i_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # int32: 2^31 blocks are 64 GiB of bfloat16
    i_r = i_b // K
    o_f = (i_b % K)[:, None] * 16 + tl.arange(0, 16)[None, :]
    return i_b, i_r < N, i_r.to(tl.int64)[:, None] * F + o_f, (i_r < N)[:, None] & (o_f < F)


@triton.jit
def _power(b_field):
    """``2^(field - 127)`` of exponent fields (int32) 1 to 254; 0 of 0, infinity of 255."""
    return (b_field << 23).to(tl.float32, bitcast=True)


@triton.jit
def _round_blocks(b_x, o_x, mantissa_bits, seed, STOCHASTIC: tl.constexpr):
    """E, int32 ``[BLOCK_B]``; ``q``, float32 ``[BLOCK_B, 16]``; which values are finite."""
    m_finite = tl.abs(b_x) < float("inf")
    b_magnitude = tl.where(m_finite, tl.abs(b_x), 0.0)
    b_field = tl.max(b_magnitude.to(tl.int32, bitcast=True), axis=1) >> 23
    # 1 / unit in two factors that are normal numbers: 2^(128 - E), but 0 where E is 0, and 2^(m - 2).
    b_up = _power(tl.where(b_field > 0, 255 - b_field, 0))[:, None]
    b_level = _rounded(b_magnitude * b_up * _power(125 + mantissa_bits), seed, o_x, STOCHASTIC)
    return b_field, tl.minimum(b_level, ((1 << mantissa_bits) - 1).to(tl.float32)), m_finite


@triton.jit(do_not_specialize=RUN_TIME)
def _msfp_kernel(
    p_value,  # [N, F]
    p_x,  # [N, F]
    N, F, mantissa_bits, seed,
    STOCHASTIC: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """value = sign(x) * min(round(|x| / unit), 2^m - 1) * unit, unit = 2^(E - 127 - m + 1); x where it is not finite."""
    _, _, o_x, m_x = _blocks(N, F, BLOCK_B)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_field, b_level, m_finite = _round_blocks(b_x, o_x, mantissa_bits, seed, STOCHASTIC)
    b_value = b_level * _power(128 - mantissa_bits) * _power(b_field)[:, None]
    b_value = tl.where(m_finite, tl.where(b_x < 0, -b_value, b_value), b_x)
    tl.store(p_value + o_x, _cast(b_value, p_value), mask=m_x)


@triton.jit(do_not_specialize=RUN_TIME)
def _msfp_pack_kernel(
    p_mantissas,  # [N, ceil(F / 16) * 2 (1 + m)]
    p_exponents,  # [N, ceil(F / 16)]
    p_x,  # [N, F]
    N, F, mantissa_bits, seed,
    STOCHASTIC: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """code = q below the sign bit of x; 255 is the exponent of a block with infinity or NaN."""
    i_b, m_b, o_x, m_x = _blocks(N, F, BLOCK_B)
    b_x = tl.load(p_x + o_x, mask=m_x, other=0.0).to(tl.float32)
    b_field, b_level, m_finite = _round_blocks(b_x, o_x, mantissa_bits, seed, STOCHASTIC)
    b_field = tl.maximum(b_field, tl.max(tl.where(m_finite, 0, 255), axis=1))
    tl.store(p_exponents + i_b, b_field.to(tl.uint8), mask=m_b)
    b_codes = b_level.to(tl.int32) | tl.where(b_x < 0, 1 << mantissa_bits, 0)
    _store_tight(p_mantissas, b_codes, 1 + mantissa_bits, i_b, m_b, tl.program_id(1), 2 * (1 + mantissa_bits))


@triton.jit(do_not_specialize=RUN_TIME[:2])
def _msfp_unpack_kernel(
    p_value,  # [N, F]
    p_mantissas,  # [N, ceil(F / 16) * 2 (1 + m)]
    p_exponents,  # [N, ceil(F / 16)]
    N, F, mantissa_bits,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """value = sign * q * unit, unit = 2^(E - 127 - m + 1)."""
    i_b, m_b, o_x, m_x = _blocks(N, F, BLOCK_B)
    b_field = tl.load(p_exponents + i_b, mask=m_b, other=0).to(tl.int32)
    b_codes = _load_tight(p_mantissas, i_b, tl.arange(0, 16), m_x, 1 + mantissa_bits, 2 * (1 + mantissa_bits))
    b_level = (b_codes & ((1 << mantissa_bits) - 1)).to(tl.float32)
    b_value = b_level * _power(128 - mantissa_bits) * _power(b_field)[:, None]
    tl.store(p_value + o_x, tl.where((b_codes >> mantissa_bits) > 0, -b_value, b_value), mask=m_x)


BLOCKS = {"BLOCK_B": TILE // BLOCK}


def _grid(rows: int, features: int) -> tuple[int]:
    return (triton.cdiv(rows * triton.cdiv(features, BLOCK), BLOCKS["BLOCK_B"]),)


def msfp(x: Tensor, mantissa_bits: int, seed: int) -> Tensor:
    """:func:`qgnn.kernels.msfp.msfp`."""
    check_dtype("x", x)
    n, features = x.shape
    value = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        launch(
            _msfp_kernel, _grid(n, features),
            p_value=value, p_x=x.contiguous(), N=n, F=features, mantissa_bits=mantissa_bits, **seed_arguments(seed),
            **BLOCKS, **EXACT,
        )  # fmt: skip
    return value


def msfp_pack(x: Tensor, mantissa_bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """:func:`qgnn.kernels.msfp.msfp_pack`."""
    check_dtype("x", x)
    n, features = x.shape
    blocks = triton.cdiv(features, BLOCK)
    mantissas = torch.empty(n, tight_bytes(blocks * BLOCK, 1 + mantissa_bits), dtype=torch.uint8, device=x.device)
    exponents = torch.empty(n, blocks, dtype=torch.uint8, device=x.device)
    if x.numel():
        launch(
            _msfp_pack_kernel, _grid(n, features),
            p_mantissas=mantissas, p_exponents=exponents, p_x=x.contiguous(), N=n, F=features,
            mantissa_bits=mantissa_bits, **seed_arguments(seed), **BLOCKS, **EXACT,
        )  # fmt: skip
    return mantissas, exponents


def msfp_unpack(mantissas: Tensor, exponents: Tensor, mantissa_bits: int, features: int) -> Tensor:
    """:func:`qgnn.kernels.msfp.msfp_unpack`."""
    n = exponents.size(0)
    value = torch.empty(n, features, dtype=torch.float32, device=exponents.device)
    if value.numel():
        launch(
            _msfp_unpack_kernel, _grid(n, features),
            p_value=value, p_mantissas=mantissas.contiguous(), p_exponents=exponents.contiguous(), N=n, F=features,
            mantissa_bits=mantissa_bits, **BLOCKS, **EXACT,
        )  # fmt: skip
    return value


_SIZES = {"N": "i32", "F": "i32:16", "mantissa_bits": "i32"}
_PACKED = {"p_mantissas": "*u8", "p_exponents": "*u8", **_SIZES}

COMPILE_CASES = [
    CompileCase(
        "msfp, fp32, nearest",
        _msfp_kernel,
        {"p_value": "*fp32", "p_x": "*fp32", **_SIZES, "seed": "i32"},
        {"STOCHASTIC": False, **BLOCKS},
        EXACT,
    ),
    CompileCase(
        "msfp, bf16, stochastic",
        _msfp_kernel,
        {"p_value": "*bf16", "p_x": "*bf16", **_SIZES, "seed": "i32"},
        {"STOCHASTIC": True, **BLOCKS},
        EXACT,
    ),
    CompileCase(
        "msfp_pack, stochastic",
        _msfp_pack_kernel,
        {"p_x": "*fp32", **_PACKED, "seed": "i32"},
        {"STOCHASTIC": True, **BLOCKS},
        EXACT,
    ),
    CompileCase("msfp_unpack", _msfp_unpack_kernel, {"p_value": "*fp32", **_PACKED}, BLOCKS, EXACT),
]
