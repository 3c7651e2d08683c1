"""Microsoft floating point: 16 neighbours of a row share one exponent (Rouhani et al. 2020; Bqain's MSFP-n; NUMERICS 6).

``m`` is the number of mantissa bits, ``n - 9`` for MSFP-n: 3 to 7. A block is 16 columns of a row; the last one of a row may be shorter. With
``E`` the exponent field (float32, biased by 127) of the largest magnitude of a block, the unit of the block is ``2^(E - 127 - m + 1)``, and

    q = min(round(|x| / unit), 2^m - 1),    value = sign(x) * q * unit

``round`` is that of :mod:`.random`: half to even, or stochastic, by a seed and the place of the value in x. A block of zeros and subnormals has
E = 0 and is 0. Infinity and NaN take no part in E. float64 is rounded to float32 first, since an exponent has 8 bits.

Packed, a block is the byte E and 16 codes of 1 + m bits, ``q`` below a sign bit that is set where x < 0. They lie in the tight layout of
:mod:`.packing`, 2 (1 + m) bytes a block, the last block of a row filled up with 0. So MSFP16 takes 8.5 bits a value and MSFP12 4.5.

Worked example, m = 3: 1.0, 0.3, -0.1, 1.9 and twelve zeros. The largest has E = 127, so the unit is 1/4; 4, 1.2, 0.4 and 7.6 units round to 4, 1, 0
and 8, which is cut to 7. Values 1, 0.25, -0, 1.75; codes 4, 1, 8, 7, in bytes ``14 78 00 00 00 00 00 00``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import implementation, operation
from .packing import pack_tight_reference, tight_bytes, unpack_tight_reference
from .random import round_reference

BLOCK = 16
"""Values that share an exponent."""


def _blocks(x: Tensor) -> Tensor:
    """``[N, F]`` -> ``[N, ceil(F / 16), 16]``, filled up with 0."""
    n, features = x.shape
    return torch.nn.functional.pad(x, (0, -features % BLOCK)).reshape(n, -(-features // BLOCK), BLOCK)


def _power(field: Tensor) -> Tensor:
    """``2^(field - 127)``, float32, of exponent fields 1 to 254; 0 of 0, infinity of 255."""
    return (field << 23).view(torch.float32).unsqueeze(2)


def rounded_reference(x: Tensor, mantissa_bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """``E``, int32 ``[N, ceil(F / 16)]``, and ``q`` of the values of every block, float32 ``[N, ceil(F / 16), 16]``; 0 for infinity and NaN."""
    wide = x.float()
    magnitude = _blocks(torch.where(torch.isfinite(wide), wide.abs(), 0.0))
    field = magnitude.amax(2).view(torch.int32) >> 23
    # 1 / unit in two factors that are normal numbers: 2^(128 - E), but 0 where E is 0, and 2^(m - 2).
    units = magnitude * _power(torch.where(field > 0, 255 - field, 0)) * 2.0 ** (mantissa_bits - 2)
    rows = units.flatten(1)[:, : x.size(1)]  # u belongs to a value's place in x
    return field, _blocks(round_reference(rows, seed).clamp_max((1 << mantissa_bits) - 1))


def msfp_reference(x: Tensor, mantissa_bits: int, seed: int) -> Tensor:
    field, level = rounded_reference(x, mantissa_bits, seed)
    value = (level * 2.0 ** (1 - mantissa_bits) * _power(field)).flatten(1)[:, : x.size(1)]
    wide = x.float()
    return torch.where(torch.isfinite(wide), torch.where(wide < 0, -value, value), wide).to(x.dtype)


@operation("qgnn::msfp")
def msfp(x: Tensor, mantissa_bits: int, seed: int) -> Tensor:
    """``x`` ``[N, F]`` rounded to MSFP, in its own dtype. Infinity and NaN stay."""
    return implementation("msfp", "msfp", msfp_reference, x)(x, mantissa_bits, seed)


@msfp.register_fake
def _(x: Tensor, mantissa_bits: int, seed: int) -> Tensor:
    return x.new_empty(x.shape)


def msfp_pack_reference(x: Tensor, mantissa_bits: int, seed: int) -> tuple[Tensor, Tensor]:
    field, level = rounded_reference(x, mantissa_bits, seed)
    blocks = _blocks(x.float())
    codes = level.to(torch.uint8) | (blocks < 0).to(torch.uint8) << mantissa_bits
    exponents = torch.where(torch.isfinite(blocks).all(2), field, 255).to(torch.uint8)
    return pack_tight_reference(codes.flatten(1), 1 + mantissa_bits), exponents


@operation("qgnn::msfp_pack")
def msfp_pack(x: Tensor, mantissa_bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """``x`` ``[N, F]`` in MSFP: packed codes, uint8 ``[N, 2 (1 + m) ceil(F / 16)]``, and exponents, uint8 ``[N, ceil(F / 16)]``.

    A block with infinity or NaN has the exponent 255 and is read as infinities and NaN: it cannot pass for numbers."""
    return implementation("msfp", "msfp_pack", msfp_pack_reference, x)(x, mantissa_bits, seed)


@msfp_pack.register_fake
def _(x: Tensor, mantissa_bits: int, seed: int) -> tuple[Tensor, Tensor]:
    n, blocks = x.shape[0], (x.shape[1] + BLOCK - 1) // BLOCK
    size = tight_bytes(blocks * BLOCK, 1 + mantissa_bits)
    return x.new_empty((n, size), dtype=torch.uint8), x.new_empty((n, blocks), dtype=torch.uint8)


def msfp_unpack_reference(mantissas: Tensor, exponents: Tensor, mantissa_bits: int, features: int) -> Tensor:
    codes = _blocks(unpack_tight_reference(mantissas, 1 + mantissa_bits, exponents.size(1) * BLOCK))
    sign, level = codes >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    value = level.float() * 2.0 ** (1 - mantissa_bits) * _power(exponents.to(torch.int32))
    return torch.where(sign > 0, -value, value).flatten(1)[:, :features].contiguous()


@operation("qgnn::msfp_unpack")
def msfp_unpack(mantissas: Tensor, exponents: Tensor, mantissa_bits: int, features: int) -> Tensor:
    """The values that :func:`msfp_pack` has stored, float32 ``[N, features]``: those of :func:`msfp`, to the bit, of finite float32 values."""
    return implementation("msfp", "msfp_unpack", msfp_unpack_reference, mantissas)(
        mantissas, exponents, mantissa_bits, features
    )


@msfp_unpack.register_fake
def _(mantissas: Tensor, exponents: Tensor, mantissa_bits: int, features: int) -> Tensor:
    return mantissas.new_empty((mantissas.shape[0], features), dtype=torch.float32)
