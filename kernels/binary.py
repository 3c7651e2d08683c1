"""Rows of 0 and one positive constant, as bags of words are: 1 bit a value and the constant as the row's step represent them exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import implementation, operation
from .packing import bucket_starts, pack_reference, uniform_counts


def quantize_binary_reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    top = x.amax(1) if x.size(1) else x.new_zeros(x.size(0))
    step = torch.where(top > 0, top, torch.ones_like(top))
    valid = ((x == 0) | (x == top.unsqueeze(1))).all(1) & (top >= 0) & torch.isfinite(top)
    return pack_reference(x == step.unsqueeze(1), None, uniform_counts(x.size(0), 1)), step, valid


@operation("qgnn::quantize_binary")
def quantize_binary(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of 1 bit of ``x``, float32 ``[N, F]``, in one pass: the packed rows (uint8, all in containers of 1 bit), the step of every row
    (float32 ``[N]``; 1 for a row of zeros) and whether the row holds only 0 and that (bool ``[N]``). Codes and step of another row mean nothing."""
    return implementation("binary", "quantize_binary", quantize_binary_reference, x)(x)


@quantize_binary.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, f = x.shape
    data = x.new_empty(bucket_starts(uniform_counts(n, 1), f)[-1], dtype=torch.uint8)
    return data, x.new_empty(n), x.new_empty(n, dtype=torch.bool)
