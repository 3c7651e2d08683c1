"""Scale and offset of fixed point (:mod:`.fixed_point`) from the range of what is quantized."""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import code_range

SMALLEST = 2.0**-100
"""The magnitude below which a map counts as 0, so that its scale is a normal number."""


def range_parameters(low: Tensor, high: Tensor, bits: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Scale and offset (float32, the shape of ``low``) of the range ``low .. high``, whose ends get the codes ``lo`` and ``hi``. A range that is one
    value, or narrower than float32 can divide, has the scale 1 and the offset ``low``: code 0 is that value, exactly. NaN and infinity make NaN."""
    lo, hi = code_range(bits, signed)
    low, high = low.double(), high.double()
    width = high - low
    scale = (width / (hi - lo)).float()
    offset = ((low * hi - high * lo) / width).float()
    single = scale == 0
    return torch.where(single, 1.0, scale), torch.where(single, low.float(), offset)


def extremes(x: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value, of no dimension; 0 of nothing, NaN where there is one."""
    return torch.aminmax(x.detach()) if x.numel() else (x.new_zeros(()), x.new_zeros(()))


def largest(x: Tensor) -> Tensor:
    """The largest magnitude, of no dimension; 0 of nothing, NaN where there is one."""
    low, high = extremes(x)
    return torch.maximum(-low, high)


def scale_of(top: Tensor, bits: int, signed: bool) -> Tensor:
    """The scale (float32 ``[1]``) that gives the magnitude ``top`` the largest code; where all is 0, one that leaves it 0. NaN stays, and reaches
    every value."""
    return (top.clamp_min(SMALLEST) / code_range(bits, signed)[1]).view(1)
