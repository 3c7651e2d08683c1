"""The values at both tails of a tensor: order statistics for quantization ranges (Degree-Quant app. A.3; NUMERICS 5), without sorting.

The bits of a float32, read as an integer, are ordered like the value once negative values are complemented and positive ones get their sign bit
set. So the value of a rank is found digit by digit (radix selection): a histogram of the leading bits tells which digit the wanted value has and
which rank it has among the values that share it; then the next bits of only those. Integers count, so every backend and every run gives the same
bits.

Worked example with one decimal digit at a time: the value of rank 2 (the third smallest) of 31, 12, 38, 15, 33. Tens: 1 twice, 3 three times; rank 2
is past the two of digit 1, so it is rank 0 of 31, 38, 33. Units: 1, 3, 8; rank 0 is 1. The value is 31.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import implementation, operation

LARGEST = 2**31 - 2**14
"""Values that int32 counts on a GPU can hold; kernels count a little beyond the last one."""


def tails_reference(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ordered = torch.sort(x).values
    return ordered[k].clone(), ordered[-1 - k].clone()


@operation("qgnn::tails")
def tails(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``(k + 1)``-th smallest and the ``(k + 1)``-th largest value of ``x`` (float32 ``[N]``), tensors of one element, exactly.

    NaN counts as larger than infinity, as in ``torch.sort``. On a GPU nothing waits for the device.

    Raises:
        TypeError, ValueError: ``x`` is not float32, not 1-D or too large, or ``k`` is not in ``0 .. N - 1``.
    """
    if x.dtype != torch.float32:
        raise TypeError(f"x must be float32, got {x.dtype}; convert it with .float()")
    if x.dim() != 1 or x.numel() > LARGEST:
        raise ValueError(
            f"x must be 1-D with at most {LARGEST} values, got shape {tuple(x.shape)}; reshape or sample it"
        )
    if not 0 <= k < x.numel():
        raise ValueError(f"k must be in 0 .. {x.numel() - 1} for {x.numel()} values, got {k}")
    return implementation("percentile", "tails", tails_reference, x)(x, k)


@tails.register_fake
def _(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(()), x.new_empty(())
