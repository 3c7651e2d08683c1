"""Numba kernels of :mod:`qgnn.kernels.scatter`. Sums, means, maxima and minima of floats are those of :mod:`.aggregate`."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..schedule import CHUNK, build_schedule
from .aggregate import aggregate
from .aggregate_extreme import run_extreme
from .common import Array, array, as_computed, kernel, parallel_kernel, parallel_lock, parts_for, prefetch
from .gather import AHEAD
from .plan import split_rows

AS_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of as many bytes: what is only copied need not be understood, and NumPy knows no bfloat16."""


@kernel
def _group(index, indptr, indices):
    """Counting sort; ``indptr`` is zero on entry."""
    rising = True
    last = index.dtype.type(0)
    for e in range(index.size):
        i = index[e]
        rising &= i >= last
        last = i
        indptr[i + 1] += 1
    for i in range(1, indptr.size):
        indptr[i] += indptr[i - 1]
    if rising:
        for e in range(index.size):
            indices[e] = e
    else:
        free = indptr[:-1].copy()
        for e in range(index.size):
            i = index[e]
            indices[free[i]] = e
            free[i] += 1


def group(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    indptr = torch.zeros(size + 1, dtype=torch.int32)
    indices = torch.empty(index.numel(), dtype=torch.int32)
    _group(array(index), indptr.numpy(), indices.numpy())
    return indptr, indices


@kernel
def _fold(lo, hi, indptr, indices, x, product, out):
    start = x.dtype.type(1 if product else 0)
    for i in range(lo, hi):
        out[i] = start
        for e in range(indptr[i], indptr[i + 1]):
            a = indices[e]
            if product:
                for k in range(x.shape[1]):
                    out[i, k] *= x[a, k]
            else:
                for k in range(x.shape[1]):
                    out[i, k] += x[a, k]


@parallel_kernel
def _fold_parallel(bounds, indptr, indices, x, product, out):
    for part in numba.prange(bounds.size - 1):
        _fold(bounds[part], bounds[part + 1], indptr, indices, x, product, out)


@kernel
def _mul_backward(lo, hi, indptr, indices, grad, x, out):
    # The product of the others, without a division that a zero would forbid: of those before, then times that of those after.
    run = np.empty(x.shape[1], x.dtype)
    for i in range(lo, hi):
        run[:] = 1
        for e in range(indptr[i], indptr[i + 1]):
            a = indices[e]
            for k in range(run.size):
                out[a, k] = run[k]
                run[k] *= x[a, k]
        run[:] = grad[i]
        for e in range(indptr[i + 1] - 1, indptr[i] - 1, -1):
            a = indices[e]
            for k in range(run.size):
                out[a, k] *= run[k]
                run[k] *= x[a, k]


@parallel_kernel
def _mul_backward_parallel(bounds, indptr, indices, grad, x, out):
    for part in numba.prange(bounds.size - 1):
        _mul_backward(bounds[part], bounds[part + 1], indptr, indices, grad, x, out)


@kernel
def _gather(lo, hi, indptr, indices, x, out):
    # Rows are written out of order, not read: 13 ms, torch's index_select 30 (1.2 million rows of 16 floats from 169,343, one thread of Zen 5).
    for i in range(lo, hi):
        for e in range(indptr[i], indptr[i + 1]):
            if e + AHEAD < indices.size:
                prefetch(out, indices[e + AHEAD], 0)
            a = indices[e]
            for k in range(x.shape[1]):
                out[a, k] = x[i, k]


@parallel_kernel
def _gather_parallel(bounds, indptr, indices, x, out):
    for part in numba.prange(bounds.size - 1):
        _gather(bounds[part], bounds[part + 1], indptr, indices, x, out)


def _run(serial: Any, parallel: Any, elements: int, indptr: Tensor, *arguments: Any) -> None:
    """A kernel over the groups, in ranges of equal work."""
    start: Array = array(indptr.to(torch.int64))
    parts = parts_for(elements)
    if parts > 1:
        with parallel_lock:
            parallel(split_rows(start, parts, elements + 1), start, *arguments)
    else:
        serial(0, start.size - 1, start, *arguments)


def segment_reduce(indptr: Tensor, indices: Tensor, x: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    exact = not x.is_floating_point()
    shape = (indptr.numel() - 1, x.size(1))
    if reduce == "mul" or (reduce == "sum" and exact):
        wide = x if exact else as_computed(x)
        out = torch.empty(shape, dtype=wide.dtype)
        _run(_fold, _fold_parallel, x.numel(), indptr, array(indices), array(wide), reduce == "mul", out.numpy())
        return out.to(x.dtype), indptr.new_empty(0)
    # Here a schedule matters for hubs only.
    schedule = build_schedule(indptr, sort=bool((np.diff(array(indptr)) > 2 * CHUNK).any()))
    if not exact:
        return aggregate(indptr, indices, schedule, x, None, reduce)
    # ~x falls where x rises, at the ends of the range too, where -x would not.
    out, arg = torch.empty(shape, dtype=x.dtype), torch.empty(shape, dtype=indptr.dtype)
    source = array(x if reduce == "max" else ~x)
    run_extreme(indptr, indices, schedule, source, np.empty(0, source.dtype), True, out.numpy(), arg.numpy())
    return out if reduce == "max" else torch.where(arg < 0, 0, ~out), arg


def segment_mul_backward(indptr: Tensor, indices: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    wide = as_computed(x)
    out = torch.empty(x.shape, dtype=wide.dtype)
    arguments = (array(indices), array(grad.to(wide.dtype)), array(wide), out.numpy())
    _run(_mul_backward, _mul_backward_parallel, x.numel(), indptr, *arguments)
    return out.to(x.dtype)


def segment_gather(indptr: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    bits = AS_BITS[x.element_size()]
    out = torch.empty(indices.numel(), x.size(1), dtype=bits)
    _run(_gather, _gather_parallel, out.numel(), indptr, array(indices), array(x.view(bits)), out.numpy())
    return out.view(x.dtype)
