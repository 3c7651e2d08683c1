"""Affine per-tensor quantization of Degree-Quant and its QAT baselines (DQ sec. 3.2 and app. A.3; NUMERICS 5).

code = clamp(round_half_even(x / scale) + zero, 0, 2^bits - 1) and value = scale * (code - zero). ``scale`` (float32) and ``zero`` (int32) are
tensors of one element, so that an observer on a GPU needs no synchronisation. Rows whose ``protect`` flag is set pass unquantized.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import implementation, operation
from .packing import pack_bits_reference
from .quantize import compute_dtype


def affine_codes_reference(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (int32, 0 to ``2^bits - 1``) and the mask of values outside the range (bool), shaped like ``x``."""
    x = x.to(compute_dtype(x))
    steps, top = x / scale.to(x.dtype), float((1 << bits) - 1)
    codes = (torch.round(steps) + zero).clamp(0.0, top).to(torch.int32)
    return codes, (steps < -zero) | (steps > top - zero)


def fake_quantize_affine_reference(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, protect: Tensor | None
) -> tuple[Tensor, Tensor]:
    codes, outside = affine_codes_reference(x, scale, zero, bits)
    out = scale.to(compute_dtype(x)) * (codes - zero)
    keep = torch.isnan(x)
    if protect is not None:
        keep = keep | protect.unsqueeze(1)
        outside = outside & ~protect.unsqueeze(1)
    return torch.where(keep, x, out.to(x.dtype)), pack_bits_reference(outside)


@operation("qgnn::fake_quantize_affine")
def fake_quantize_affine(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, protect: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``scale * (code - zero)`` in the dtype of ``x`` ``[N, F]``, and one bit per element (uint8 ``[N, ceil(F / 8)]``) that is set where the
    value lies outside ``scale * (0 - zero)`` to ``scale * (2^bits - 1 - zero)``.
    Rows with ``protect`` (bool ``[N]``) set are copied and count as inside. NaN stays NaN."""
    return implementation("affine", "fake_quantize_affine", fake_quantize_affine_reference, x)(
        x, scale, zero, bits, protect
    )


@fake_quantize_affine.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, bits: int, protect: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((x.shape[0], (x.shape[1] + 7) // 8), dtype=torch.uint8)
