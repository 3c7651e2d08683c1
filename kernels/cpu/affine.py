"""Numba kernel of :mod:`qgnn.kernels.affine`."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from .common import (
    array,
    as_computed,
    even_bounds,
    kernel,
    optional,
    pack_flags,
    parallel_kernel,
    parallel_lock,
    parts_for,
)


@kernel
def _fake_quantize_affine(lo, hi, x, scale, zero, top, protect, out, bits):
    f = x.shape[1]
    flags = np.empty(f, np.uint8)
    s, z, nothing = scale[0], zero[0], x.dtype.type(0)
    shift = x.dtype.type(z)
    for i in range(lo, hi):
        if protect.size and protect[i]:
            for k in range(f):
                out[i, k] = x[i, k]
                flags[k] = 0
        else:
            for k in range(f):
                v = x[i, k]
                steps = v / s
                flags[k] = np.uint8(steps < -shift) | np.uint8(steps > top - shift)
                code = np.rint(steps) + shift  # half to even
                code = code if code > nothing else nothing  # a NaN becomes 0 and is overwritten below
                code = top if code > top else code
                value = s * x.dtype.type(np.int32(code) - z)
                out[i, k] = value if v == v else v
        pack_flags(flags, f, bits, i)


@parallel_kernel
def _fake_quantize_affine_parallel(bounds, x, scale, zero, top, protect, out, bits):
    for part in numba.prange(bounds.size - 1):
        _fake_quantize_affine(bounds[part], bounds[part + 1], x, scale, zero, top, protect, out, bits)


def fake_quantize_affine(
    x: Tensor, scale: Tensor, zero: Tensor, bits: int, protect: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Quantized values, and a bit for each value outside the range."""
    wide, (n, f) = as_computed(x), x.shape
    out, outside = torch.empty(x.shape, dtype=wide.dtype), torch.empty(n, (f + 7) // 8, dtype=torch.uint8)
    view = array(wide)
    arguments = (
        view, array(scale.to(wide.dtype)).reshape(1), array(zero.to(torch.int32)).reshape(1), view.dtype.type((1 <<
        bits) - 1), optional(protect, torch.bool), out.numpy(), outside.numpy(),
    )  # fmt: skip
    parts = parts_for(x.numel())
    if parts > 1:
        with parallel_lock:
            _fake_quantize_affine_parallel(even_bounds(n, parts), *arguments)
    else:
        _fake_quantize_affine(0, n, *arguments)
    return out.to(x.dtype), outside
