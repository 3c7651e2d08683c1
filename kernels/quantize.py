"""Symmetric uniform quantization with a step and a width per row or per column (A2Q eq. 1, 9 and 10; NUMERICS 1 and 2).

Symbols: ``x`` is ``[N, F]``; ``step`` (float32) and ``bits`` (uint8, 0 to 8) are ``[N]`` when ``row`` is true and ``[F]`` otherwise.
``Q = max(0, 2^(b-1) - 1)`` for signed codes and ``2^b - 1`` for unsigned ones.

- code = sign(x) * min(floor(|x| / step + 0.5), Q); unsigned codes of negative values are 0. IEEE division.
- clipped = |x| >= step * Q (for unsigned codes also x < 0), kept as one bit per element (``packing.pack_bits_reference``).
- local gradients (A2Q eq. 7, 8), the mean over each row (or column) of ``sign(x_q - x) * dx_q/dstep`` and ``... * dx_q/dbits``, where
  ``dx_q/dstep`` is ``(x_q - x) / step`` inside and ``sign(x) * Q`` where clipped, and ``dx_q/dbits`` is 0 inside and
  ``sign(x) * 2^(b-1) * ln2 * step`` where clipped (``2^b`` for unsigned codes).

All functions here take 2-D tensors on one device; shapes and dtypes are checked by :mod:`qgnn.ops`, which states the errors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import implementation, operation
from .packing import bucket_starts, pack_bits_reference, pack_reference, unpack_bits_reference, unpack_reference


def largest_code(bits: Tensor, signed: bool) -> Tensor:
    """``Q`` of NUMERICS 1, int32."""
    exponent = bits.to(torch.int32) - (1 if signed else 0)
    return torch.clamp_min(torch.bitwise_left_shift(torch.ones_like(exponent), exponent.clamp_min(0)) - 1, 0)


def _spread(values: Tensor, row: bool) -> Tensor:
    return values.unsqueeze(1) if row else values.unsqueeze(0)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Half precision is computed in float32; float64 (the reference only) stays."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def codes_reference(x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (int32) and the clip mask (bool), both ``[N, F]``."""
    x = x.to(compute_dtype(x))
    s, q = _spread(step.to(x.dtype), row), _spread(largest_code(bits, signed), row)
    magnitude = x.abs()
    codes = torch.minimum(torch.floor(magnitude / s + 0.5), q.to(x.dtype))
    codes = torch.where(x < 0, -codes if signed else torch.zeros_like(codes), codes)
    clipped = magnitude >= s * q
    return codes.to(torch.int32), clipped if signed else clipped | (x < 0)


def derivatives_reference(
    x: Tensor, codes: Tensor, clipped: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool
) -> tuple[Tensor, Tensor]:
    """``dx_q/dstep`` and ``dx_q/dbits`` element by element (A2Q eq. 10)."""
    x = x.to(compute_dtype(x))
    s, b = _spread(step.to(x.dtype), row), _spread(bits.to(x.dtype), row)
    sign = torch.sign(x) if signed else (x > 0).to(x.dtype)
    d_step = torch.where(clipped, sign * _spread(largest_code(bits, signed), row), (s * codes - x) / s)
    d_bits = torch.where(clipped, sign * torch.exp2(b - 1 if signed else b) * math.log(2) * s, torch.zeros_like(x))
    return d_step, d_bits


def local_gradients_reference(
    x: Tensor, codes: Tensor, clipped: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool
) -> tuple[Tensor, Tensor]:
    x = x.to(compute_dtype(x))
    error = torch.sign(_spread(step.to(x.dtype), row) * codes - x)
    d_step, d_bits = derivatives_reference(x, codes, clipped, step, bits, row, signed)
    dim, count = (1, x.size(1)) if row else (0, x.size(0))
    return (error * d_step).sum(dim) / max(count, 1), (error * d_bits).sum(dim) / max(count, 1)


def _no_gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=compute_dtype(x)), x.new_empty(0, dtype=compute_dtype(x))


def quantize_reference(
    x: Tensor,
    step: Tensor,
    bits: Tensor,
    row: bool,
    signed: bool,
    pos: Tensor | None,
    counts: Sequence[int],
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, clipped = codes_reference(x, step, bits, row, signed)
    g = local_gradients_reference(x, codes, clipped, step, bits, row, signed) if gradients else _no_gradients(x)
    return pack_reference(codes, pos, counts), pack_bits_reference(clipped), *g


@operation("qgnn::quantize")
def quantize(
    x: Tensor,
    step: Tensor,
    bits: Tensor,
    row: bool,
    signed: bool,
    pos: Tensor | None,
    counts: Sequence[int],
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, clip bits and, on request, local gradients in one pass over ``x``.

    ``pos`` and ``counts`` say where each row's codes go (:mod:`.packing`). Returns the packed codes (uint8), the clip bits
    (uint8 ``[N, ceil(F / 8)]``) and the local gradients of step and width (float32 ``[N]`` or ``[F]``; empty unless ``gradients``).
    """
    return implementation("quantize", "quantize", quantize_reference, x)(
        x, step, bits, row, signed, pos, counts, gradients
    )


@quantize.register_fake
def _(
    x: Tensor,
    step: Tensor,
    bits: Tensor,
    row: bool,
    signed: bool,
    pos: Tensor | None,
    counts: Sequence[int],
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, f = x.shape
    data = x.new_empty(bucket_starts(counts, f)[-1], dtype=torch.uint8)
    clip = x.new_empty((n, (f + 7) // 8), dtype=torch.uint8)
    g = x.new_empty((n if row else f) if gradients else 0, dtype=compute_dtype(x))
    return data, clip, g, torch.empty_like(g)


def fake_quantize_reference(
    x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    codes, clipped = codes_reference(x, step, bits, row, signed)
    out = _spread(step.to(compute_dtype(x)), row) * codes
    out = torch.where(torch.isnan(x), x.to(out.dtype), out)
    g = local_gradients_reference(x, codes, clipped, step, bits, row, signed) if gradients else _no_gradients(x)
    return out.to(x.dtype), pack_bits_reference(clipped), *g


@operation("qgnn::fake_quantize")
def fake_quantize(
    x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``step * code`` in the dtype of ``x`` (NaN stays NaN), the clip bits, and on request the local gradients (as :func:`quantize`)."""
    return implementation("quantize", "fake_quantize", fake_quantize_reference, x)(
        x, step, bits, row, signed, gradients
    )


@fake_quantize.register_fake
def _(
    x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool, gradients: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, f = x.shape
    g = x.new_empty((n if row else f) if gradients else 0, dtype=compute_dtype(x))
    return x.new_empty((n, f)), x.new_empty((n, (f + 7) // 8), dtype=torch.uint8), g, torch.empty_like(g)


def fake_quantize_backward_reference(
    grad: Tensor, x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    codes, clipped = codes_reference(x, step, bits, row, signed)
    d_step, d_bits = derivatives_reference(x, codes, clipped, step, bits, row, signed)
    g, dim = grad.to(d_step.dtype), 1 if row else 0
    return torch.where(clipped, torch.zeros_like(grad), grad), (g * d_step).sum(dim), (g * d_bits).sum(dim)


@operation("qgnn::fake_quantize_backward")
def fake_quantize_backward(
    grad: Tensor, x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Global gradients (A2Q eq. 3, 4): ``grad`` masked where clipped, and the sums over each row (or column) of ``grad * dx_q/dstep`` and
    ``grad * dx_q/dbits``; float32 (float64 for float64 ``x``), ``[N]`` or ``[F]``."""
    return implementation("quantize", "fake_quantize_backward", fake_quantize_backward_reference, x)(
        grad, x, step, bits, row, signed
    )


@fake_quantize_backward.register_fake
def _(grad: Tensor, x: Tensor, step: Tensor, bits: Tensor, row: bool, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    g = x.new_empty(x.shape[0] if row else x.shape[1], dtype=compute_dtype(x))
    return grad.new_empty(grad.shape), g, torch.empty_like(g)


def mask_clipped_reference(grad: Tensor, clip: Tensor) -> Tensor:
    return torch.where(unpack_bits_reference(clip, grad.size(1)), torch.zeros_like(grad), grad)


@operation("qgnn::mask_clipped")
def mask_clipped(grad: Tensor, clip: Tensor) -> Tensor:
    """``grad`` ``[N, F]`` with zeros where the clip bit is set: the straight-through gradient of x (A2Q eq. 10)."""
    return implementation("quantize", "mask_clipped", mask_clipped_reference, grad)(grad, clip)


@mask_clipped.register_fake
def _(grad: Tensor, clip: Tensor) -> Tensor:
    return grad.new_empty(grad.shape)


def dequantize_reference(
    data: Tensor,
    step: Tensor,
    row: bool,
    signed: bool,
    zero: int,
    pos: Tensor | None,
    counts: Sequence[int],
    features: int,
) -> Tensor:
    codes = unpack_reference(data, pos, counts, features, signed) - zero
    return _spread(step, row) * codes


@operation("qgnn::dequantize")
def dequantize(
    data: Tensor,
    step: Tensor,
    row: bool,
    signed: bool,
    zero: int,
    pos: Tensor | None,
    counts: Sequence[int],
    features: int,
) -> Tensor:
    """``step * (code - zero)``, float32 ``[N, F]``; ``zero`` is the zero point of an affine quantizer, 0 for a symmetric one."""
    return implementation("quantize", "dequantize", dequantize_reference, data)(
        data, step, row, signed, zero, pos, counts, features
    )


@dequantize.register_fake
def _(
    data: Tensor,
    step: Tensor,
    row: bool,
    signed: bool,
    zero: int,
    pos: Tensor | None,
    counts: Sequence[int],
    features: int,
) -> Tensor:
    return step.new_empty((sum(counts), features))
