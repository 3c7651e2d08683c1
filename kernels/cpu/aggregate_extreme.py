"""Numba kernels of the largest and the smallest neighbour, and their gradient (contract: :mod:`qgnn.kernels.aggregate`)."""

from __future__ import annotations

from collections.abc import Sequence

import numba
import torch
from torch import Tensor

from .common import Array, array, as_computed, kernel, optional, parallel_kernel, parallel_lock, parts_for, prefetch
from .gather import AHEAD
from .plan import plan_of, split_rows


@kernel
def _extreme(lo, hi, indptr, indices, x, weight, largest, out, arg):
    f = x.shape[1]
    line = 64 // x.itemsize
    one = x.dtype.type(1)
    # Ties and NaN are decided on sign * value: one comparison serves both reductions.
    turn = one if largest else -one
    for i in range(lo, hi):
        first, last = indptr[i], indptr[i + 1]
        if first == last:
            for k in range(f):
                out[i, k] = 0
                arg[i, k] = -1
            continue
        for e in range(first, last):
            if e + AHEAD < last:
                for k in range(0, f, line):
                    prefetch(x, indices[e + AHEAD], k)
            a = indices[e]
            w = weight[e] if weight.size else one
            position = arg.dtype.type(e)
            if e == first:
                for k in range(f):
                    out[i, k] = w * x[a, k]
                    arg[i, k] = position
            else:
                for k in range(f):
                    v, best = w * x[a, k], out[i, k]
                    # `not v <= best` holds for a larger v and for NaN; the second half keeps the first NaN
                    take = (not turn * v <= turn * best) & (best == best)
                    out[i, k] = v if take else best
                    arg[i, k] = position if take else arg[i, k]


@parallel_kernel
def _extreme_parallel(bounds, indptr, indices, x, weight, largest, out, arg):
    for part in numba.prange(bounds.size - 1):
        _extreme(bounds[part], bounds[part + 1], indptr, indices, x, weight, largest, out, arg)


def run_extreme(
    indptr: Tensor,
    indices: Tensor,
    schedule: Sequence[Tensor],
    x: Array,
    weight: Array,
    largest: bool,
    out: Array,
    arg: Array,
) -> None:
    """Writes ``out`` and ``arg`` of max (``largest``) or min."""
    plan = plan_of(indptr, indices, schedule)
    arguments = (plan.indptr, plan.indices, x, weight, largest, out, arg)
    parts = parts_for(plan.edges * x.shape[1])
    if parts > 1:
        # A hub stays with one thread: the first of equals is the same whoever finds it, and no slots are needed.
        bounds = split_rows(plan.indptr, parts, indices.numel() + 1)
        with parallel_lock:
            _extreme_parallel(bounds, *arguments)
    else:
        _extreme(0, plan.n, *arguments)


@kernel
def _arg_backward(lo, hi, indptr, indices, edges, grad, arg, weight, out):
    f = grad.shape[1]
    zero, one = grad.dtype.type(0), grad.dtype.type(1)
    for i in range(lo, hi):
        out[i] = zero
        for t in range(indptr[i], indptr[i + 1]):
            a, edge = indices[t], edges[t]
            w = weight[edge] if weight.size else one
            position = arg.dtype.type(edge)
            for k in range(f):
                out[i, k] += w * grad[a, k] if arg[a, k] == position else zero


@parallel_kernel
def _arg_backward_parallel(bounds, indptr, indices, edges, grad, arg, weight, out):
    for part in numba.prange(bounds.size - 1):
        _arg_backward(bounds[part], bounds[part + 1], indptr, indices, edges, grad, arg, weight, out)


def aggregate_arg_backward(
    indptr: Tensor, indices: Tensor, edges: Tensor, grad: Tensor, arg: Tensor, weight: Tensor | None
) -> Tensor:
    """Gradient of x for max and min."""
    wide = as_computed(grad)
    n, f = indptr.numel() - 1, grad.size(1)
    out = torch.empty(n, f, dtype=wide.dtype)
    start = array(indptr.to(torch.int64))
    arguments = (
        start,
        array(indices),
        array(edges.to(torch.int64)),
        array(wide),
        array(arg),
        optional(weight, wide.dtype),
        out.numpy(),
    )
    parts = parts_for(indices.numel() * f)
    if parts > 1:
        bounds = split_rows(start, parts, indices.numel() + 1)
        with parallel_lock:
            _arg_backward_parallel(bounds, *arguments)
    else:
        _arg_backward(0, n, *arguments)
    return out.to(grad.dtype)
