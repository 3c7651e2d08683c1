"""Segment reductions: rows in groups, each group reduced to one row (torch-scatter's ``scatter``, ``segment_csr`` and ``gather_csr``).

``E`` rows of ``K`` values stand in ``N`` groups: ``indices`` ``[E]`` (int32, a permutation) lists the rows group by group, and ``indptr`` ``[N + 1]``
(int32 or int64), which runs from 0 to ``E`` and does not fall, says where a group starts: group ``i`` is ``x[indices[indptr[i]:indptr[i + 1]]]``.
That is the aggregation of :mod:`.aggregate` without weights and without a schedule, for structures that are used once; with products and integers.

Floats are reduced in float32 (float64 for float64), integers in their own type, in which they wrap. The order is fixed: two runs give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .aggregate import aggregate_reference
from .backend import implementation, operation
from .quantize import compute_dtype
from .schedule import rows_of_edges

REDUCTIONS = ("sum", "mean", "max", "min", "mul")


def group_reference(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    indptr = torch.zeros(size + 1, dtype=torch.int32, device=index.device)
    indptr[1:] = torch.bincount(index, minlength=size).cumsum(0)
    return indptr, torch.argsort(index, stable=True).to(torch.int32)


@operation("qgnn::group")
def group(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``indptr`` ``[size + 1]`` and ``indices`` ``[E]``, int32, of the groups that ``index`` ``[E]`` names: int32 or int64, 0 to ``size - 1``, which
    is not checked here; ``E < 2^31``. The rows of a group keep their order."""
    return implementation("scatter", "group", group_reference, index)(index, size)


@group.register_fake
def _(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    return index.new_empty(size + 1, dtype=torch.int32), index.new_empty(index.shape, dtype=torch.int32)


def segment_reduce_reference(indptr: Tensor, indices: Tensor, x: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    if x.is_floating_point() and reduce != "mul":
        return aggregate_reference(indptr, indices, (), x, None, reduce)
    wide = x.to(compute_dtype(x)) if x.is_floating_point() else x
    edges, shape = x.size(0), (indptr.numel() - 1, x.size(1))
    ordered, rows = wide[indices.long()], rows_of_edges(indptr).long().unsqueeze(1).expand(x.shape)
    if reduce == "sum":
        return wide.new_zeros(shape).scatter_add(0, rows, ordered), indptr.new_empty(0)
    if reduce == "mul":
        return wide.new_ones(shape).scatter_reduce(0, rows, ordered, "prod").to(x.dtype), indptr.new_empty(0)
    out = x.new_zeros(shape).scatter_reduce(0, rows, ordered, f"a{reduce}", include_self=False)
    position = torch.arange(edges, dtype=indptr.dtype, device=x.device).unsqueeze(1)
    taken = torch.where(ordered == out.gather(0, rows), position, edges)
    arg = torch.full(shape, edges, dtype=indptr.dtype, device=x.device).scatter_reduce(0, rows, taken, "amin")
    return out, torch.where(arg == edges, -1, arg)


@operation("qgnn::segment_reduce")
def segment_reduce(indptr: Tensor, indices: Tensor, x: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    """``x`` ``[E, K]`` (float16, bfloat16, float32, float64; int32 and int64, which have no mean) -> ``out`` ``[N, K]`` in the dtype of ``x``, and
    for max and min ``arg`` ``[N, K]`` in the dtype of ``indptr``: the position in ``indices`` of the row that was taken, the first of equals, NaN
    before all, -1 for an empty group; otherwise empty. Empty groups are 0, and 1 for mul."""
    return implementation("scatter", "segment_reduce", segment_reduce_reference, x)(indptr, indices, x, reduce)


@segment_reduce.register_fake
def _(indptr: Tensor, indices: Tensor, x: Tensor, reduce: str) -> tuple[Tensor, Tensor]:
    out = x.new_empty((indptr.shape[0] - 1, x.shape[1]))
    return out, out.new_empty(out.shape if reduce in ("max", "min") else 0, dtype=indptr.dtype)


def segment_mul_backward_reference(indptr: Tensor, indices: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    wide, rows = x.to(compute_dtype(x)), torch.empty_like(indices, dtype=torch.int64)
    rows[indices.long()] = rows_of_edges(indptr).long()
    index, zero = rows.unsqueeze(1).expand(x.shape), wide == 0
    product = torch.ones(grad.shape, dtype=wide.dtype, device=x.device)
    product = product.scatter_reduce(0, index, wide.masked_fill(zero, 1), "prod")[rows]
    zeros = torch.zeros(grad.shape, dtype=torch.float32, device=x.device).scatter_add(0, index, zero.float())[rows]
    others = torch.where(zeros == zero, torch.where(zero, product, product / wide), 0)
    return (grad.to(wide.dtype)[rows] * others).to(x.dtype)


@operation("qgnn::segment_mul_backward")
def segment_mul_backward(indptr: Tensor, indices: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x for mul: ``grad`` ``[N, K]`` of its group times the product of the group's other rows, zeros among them or not -> ``[E, K]``."""
    return implementation("scatter", "segment_mul_backward", segment_mul_backward_reference, x)(
        indptr, indices, grad, x
    )


@segment_mul_backward.register_fake
def _(indptr: Tensor, indices: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def segment_gather_reference(indptr: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    out = x.new_empty(indices.numel(), x.size(1))
    out[indices.long()] = x[rows_of_edges(indptr).long()]
    return out


@operation("qgnn::segment_gather")
def segment_gather(indptr: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    """Its group's row of ``x`` ``[N, K]`` (any dtype of :func:`segment_reduce`) for each of the ``E`` members -> ``[E, K]``."""
    return implementation("scatter", "segment_gather", segment_gather_reference, x)(indptr, indices, x)


@segment_gather.register_fake
def _(indptr: Tensor, indices: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((indices.shape[0], x.shape[1]))
