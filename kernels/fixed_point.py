"""Fixed point (Bqain; NUMERICS 6): affine quantization whose offset is a real number, to ``k`` bits, nearest or stochastic.

Symbols: ``x`` is ``[N, F]``; the scale ``c`` and the offset ``d`` are float32, of one element or ``[N]``, one a row. Codes lie in ``lo .. hi``:
``-2^(k-1) .. 2^(k-1) - 1`` where signed, ``0 .. 2^k - 1`` otherwise.

- code = clamp(round(x / c - d), lo, hi), value = c * (code + d); IEEE division, no fused multiply-add.
- round is half to even for the seed :data:`.random.NEAREST`; any other seed, 0 to 2^32 - 1, rounds stochastically (:mod:`.random`).
- NaN stays NaN in values; it has no code, and takes ``lo``.

Worked example, ``k = 2`` and the range -0.5 to 1, signed: c = 1/2 and d = 1, so the codes -2, -1, 0, 1 stand for -0.5, 0, 0.5, 1, and 0.3 has the
code round(0.6 - 1) = 0; unsigned, d = -1, and it has the code 2.

A tensor in its own range is symmetric: its largest magnitude gets the code ``2^(k-1) - 1``, and the offset is 0.

Width and seed are run-time arguments: neither compiles anything anew. Float64 on a CPU is computed in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import implementation, operation
from .packing import (
    bucket_starts,
    code_range,
    pack_reference,
    pack_tight_reference,
    tight_bytes,
    uniform_counts,
    unpack_reference,
    unpack_tight_reference,
)
from .quantize import compute_dtype
from .random import round_reference
from .ranges import largest, scale_of


def _column(parameter: Tensor, x: Tensor) -> Tensor:
    return parameter.to(compute_dtype(x)).reshape(-1, 1)


def codes_reference(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    """int32 ``[N, F]``."""
    lo, hi = code_range(bits, signed)
    code = round_reference(x.to(compute_dtype(x)) / _column(scale, x) - _column(offset, x), seed)
    return torch.where(code > lo, code, float(lo)).clamp_max(hi).to(torch.int32)


def fixed_point_reference(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    value = _column(scale, x) * (codes_reference(x, scale, offset, bits, signed, seed) + _column(offset, x))
    return torch.where(torch.isnan(x), x, value.to(x.dtype))


@operation("qgnn::fixed_point")
def fixed_point(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    """``c * (code + d)`` in the dtype of ``x`` ``[N, F]``, in one pass; ``bits`` 1 to 8. NaN stays NaN."""
    return implementation("fixed_point", "fixed_point", fixed_point_reference, x)(x, scale, offset, bits, signed, seed)


@fixed_point.register_fake
def _(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    return x.new_empty(x.shape)


def fixed_point_codes_reference(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    return pack_reference(codes_reference(x, scale, offset, bits, signed, seed), None, uniform_counts(x.size(0), 8))


@operation("qgnn::fixed_point_codes")
def fixed_point_codes(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    """The codes of ``x`` ``[N, F]`` as the packed product and the packed aggregation read them: a buffer (uint8) of rows in containers of 8 bits
    (:mod:`.packing`), two's complement where signed."""
    return implementation("fixed_point", "fixed_point_codes", fixed_point_codes_reference, x)(
        x, scale, offset, bits, signed, seed
    )


@fixed_point_codes.register_fake
def _(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    return x.new_empty(bucket_starts(uniform_counts(x.shape[0], 8), x.shape[1])[-1], dtype=torch.uint8)


def own_range_codes_reference(x: Tensor, factor: Tensor | None, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    x = x.to(compute_dtype(x))
    x = x if factor is None else x * _column(factor, x)
    scale = scale_of(largest(x), bits, True)
    return fixed_point_codes_reference(x, scale, scale.new_zeros(1), bits, True, seed), scale


@operation("qgnn::own_range_codes")
def own_range_codes(x: Tensor, factor: Tensor | None, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    """The signed codes, as :func:`fixed_point_codes` lays them, of ``factor[i] * x[i]`` in its own range, and its scale ``[1]``; ``bits`` 2 to 8, and
    ``factor`` ``[N]`` or None, which is 1."""
    return implementation("fixed_point", "own_range_codes", own_range_codes_reference, x)(x, factor, bits, seed)


@own_range_codes.register_fake
def _(x: Tensor, factor: Tensor | None, bits: int, seed: int) -> tuple[Tensor, Tensor]:
    size = bucket_starts(uniform_counts(x.shape[0], 8), x.shape[1])[-1]
    return x.new_empty(size, dtype=torch.uint8), x.new_empty(1, dtype=compute_dtype(x))


def transpose_codes_reference(data: Tensor, rows: int, features: int) -> Tensor:
    codes = unpack_reference(data, None, uniform_counts(rows, 8), features, False)
    return pack_reference(codes.t(), None, uniform_counts(features, 8))


@operation("qgnn::transpose_codes")
def transpose_codes(data: Tensor, rows: int, features: int) -> Tensor:
    """The buffer of the transposed map ``[features, rows]`` of what :func:`fixed_point_codes` left."""
    return implementation("fixed_point", "transpose_codes", transpose_codes_reference, data)(data, rows, features)


@transpose_codes.register_fake
def _(data: Tensor, rows: int, features: int) -> Tensor:
    return data.new_empty(bucket_starts(uniform_counts(features, 8), rows)[-1])


def fixed_point_pack_reference(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    codes = codes_reference(x, scale, offset, bits, signed, seed) - code_range(bits, signed)[0]
    return pack_tight_reference(codes.to(torch.uint8), bits)


@operation("qgnn::fixed_point_pack")
def fixed_point_pack(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    """``code - lo`` of ``x`` ``[N, F]`` in the tight layout of :mod:`.packing`, to be kept: uint8 ``[N, ceil(F / 8) * bits]``."""
    return implementation("fixed_point", "fixed_point_pack", fixed_point_pack_reference, x)(
        x, scale, offset, bits, signed, seed
    )


@fixed_point_pack.register_fake
def _(x: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, seed: int) -> Tensor:
    return x.new_empty((x.shape[0], tight_bytes(x.shape[1], bits)), dtype=torch.uint8)


def fixed_point_unpack_reference(
    data: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, features: int
) -> Tensor:
    codes = unpack_tight_reference(data, bits, features).to(torch.int32) + code_range(bits, signed)[0]
    return scale.reshape(-1, 1) * (codes + offset.reshape(-1, 1))


@operation("qgnn::fixed_point_unpack")
def fixed_point_unpack(data: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, features: int) -> Tensor:
    """The values (float32 ``[N, features]``) of what :func:`fixed_point_pack` left."""
    return implementation("fixed_point", "fixed_point_unpack", fixed_point_unpack_reference, data)(
        data, scale, offset, bits, signed, features
    )


@fixed_point_unpack.register_fake
def _(data: Tensor, scale: Tensor, offset: Tensor, bits: int, signed: bool, features: int) -> Tensor:
    return data.new_empty((data.shape[0], features), dtype=torch.float32)


def tighten_reference(data: Tensor, rows: int, features: int, bits: int, signed: bool) -> Tensor:
    codes = unpack_reference(data, None, uniform_counts(rows, 8), features, signed) - code_range(bits, signed)[0]
    return pack_tight_reference(codes.to(torch.uint8), bits)


@operation("qgnn::tighten")
def tighten(data: Tensor, rows: int, features: int, bits: int, signed: bool) -> Tensor:
    """What :func:`fixed_point_codes` left, in the tight layout of :func:`fixed_point_pack`: uint8 ``[rows, ceil(features / 8) * bits]``."""
    return implementation("fixed_point", "tighten", tighten_reference, data)(data, rows, features, bits, signed)


@tighten.register_fake
def _(data: Tensor, rows: int, features: int, bits: int, signed: bool) -> Tensor:
    return data.new_empty((rows, tight_bytes(features, bits)))


def loosen_reference(data: Tensor, bits: int, signed: bool, features: int) -> Tensor:
    codes = unpack_tight_reference(data, bits, features).to(torch.int32) + code_range(bits, signed)[0]
    return pack_reference(codes, None, uniform_counts(data.size(0), 8))


@operation("qgnn::loosen")
def loosen(data: Tensor, bits: int, signed: bool, features: int) -> Tensor:
    """The inverse of :func:`tighten`: the buffer that :func:`fixed_point_codes` would have left."""
    return implementation("fixed_point", "loosen", loosen_reference, data)(data, bits, signed, features)


@loosen.register_fake
def _(data: Tensor, bits: int, signed: bool, features: int) -> Tensor:
    return data.new_empty(bucket_starts(uniform_counts(data.shape[0], 8), features)[-1])
