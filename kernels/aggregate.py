"""Gather-aggregate over CSR (A2Q sec. 3.1, proofs 2 and 3; NUMERICS 7).

A graph is given by its CSR by destination: ``indptr`` ``[N + 1]`` and ``indices`` ``[E]`` (sources, int32), and the ``schedule`` of its rows
(:mod:`.schedule`: order, segments, hubs). Sources number ``M`` (``M = N`` unless bipartite). Edge tensors are in CSR order.

Float aggregation, out[i] = reduce over edges e of row i of weight[e] * x[indices[e]]:
float32 accumulation in a fixed order (float64 for float64), so two runs give the same bits. Empty rows are 0. ``max`` and ``min`` also give ``arg``,
the CSR position of the edge that was taken (the first of equals, NaN before all; -1 for an empty row).

Packed aggregation sums the codes in int32, exactly, whatever the order, and then applies the epilogue of :mod:`.matmul`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import implementation, operation
from .matmul import epilogue_reference, output_reference
from .packing import empty_output, uniform_counts, unpack_reference
from .quantize import compute_dtype
from .schedule import rows_of_edges

REDUCTIONS = ("sum", "mean", "max", "min")


def _mean_factor(indptr: Tensor, dtype: torch.dtype) -> Tensor:
    return 1 / (indptr[1:] - indptr[:-1]).clamp_min(1).to(dtype)


def _extreme_reference(rows: Tensor, messages: Tensor, n: int, largest: bool) -> tuple[Tensor, Tensor]:
    edges, features = messages.shape
    index = rows.long().unsqueeze(1).expand(edges, features)
    nan = messages.isnan()
    rank = (messages if largest else -messages).masked_fill(nan, -torch.inf)
    best = torch.full((n, features), -torch.inf, dtype=messages.dtype, device=messages.device).scatter_reduce(
        0, index, rank, "amax"
    )
    has_nan = (
        torch.zeros(n, features, dtype=torch.int32, device=messages.device)
        .scatter_reduce(0, index, nan.int(), "amax")
        .bool()
    )
    position = torch.arange(edges, device=rows.device).unsqueeze(1).expand(edges, features)
    taken = torch.where(torch.where(has_nan[rows.long()], nan, rank == best[rows.long()]), position, edges)
    arg = torch.full((n, features), edges, device=rows.device).scatter_reduce(0, index, taken, "amin")
    padded = torch.cat([messages, messages.new_zeros(1, features)])
    return padded.gather(0, arg), torch.where(arg == edges, -1, arg)


def aggregate_reference(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    n, dtype, rows = indptr.numel() - 1, compute_dtype(x), rows_of_edges(indptr)
    messages = x.to(dtype)[indices.long()]
    if weight is not None:
        messages = messages * weight.to(dtype).unsqueeze(1)
    if reduce in ("max", "min"):
        out, arg = _extreme_reference(rows, messages, n, reduce == "max")
        return out.to(x.dtype), arg.to(indptr.dtype)
    out = torch.zeros(n, x.size(1), dtype=dtype, device=x.device).index_add_(0, rows.long(), messages)
    if reduce == "mean":
        out = out * _mean_factor(indptr, dtype).unsqueeze(1)
    return out.to(x.dtype), indptr.new_empty(0)


@operation("qgnn::aggregate")
def aggregate(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    """``x`` ``[M, F]`` (float16, bfloat16, float32; float64 on the reference), ``weight`` ``[E]`` or none -> ``out`` ``[N, F]`` in the dtype of
    ``x``, and ``arg`` ``[N, F]`` in the dtype of ``indptr`` (empty for sum and mean)."""
    return implementation("aggregate", "aggregate", aggregate_reference, x)(
        indptr, indices, schedule, x, weight, reduce
    )


@aggregate.register_fake
def _(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, weight: Tensor | None, reduce: str
) -> tuple[Tensor, Tensor]:
    out = x.new_empty((indptr.shape[0] - 1, x.shape[1]))
    return out, out.new_empty(out.shape if reduce in ("max", "min") else 0, dtype=indptr.dtype)


def aggregate_arg_backward_reference(
    indptr: Tensor, indices: Tensor, edges: Tensor, grad: Tensor, arg: Tensor, weight: Tensor | None
) -> Tensor:
    sources, dtype = rows_of_edges(indptr).long(), compute_dtype(grad)
    chosen = arg[indices.long()] == edges.unsqueeze(1)
    messages = torch.where(chosen, grad.to(dtype)[indices.long()], 0)
    if weight is not None:
        messages = messages * weight.to(dtype)[edges.long()].unsqueeze(1)
    out = torch.zeros(indptr.numel() - 1, grad.size(1), dtype=dtype, device=grad.device)
    return out.index_add_(0, sources, messages).to(grad.dtype)


@operation("qgnn::aggregate_arg_backward")
def aggregate_arg_backward(
    indptr: Tensor, indices: Tensor, edges: Tensor, grad: Tensor, arg: Tensor, weight: Tensor | None
) -> Tensor:
    """Gradient of x for max and min, gathered over the transposed graph: ``indptr`` ``[M + 1]``, ``indices`` (destinations) and ``edges`` (CSR
    position of each transposed edge) ``[E]``; ``grad`` and ``arg`` ``[N, F]``; ``weight`` in CSR order -> ``[M, F]`` in the dtype of ``grad``."""
    return implementation("aggregate", "aggregate_arg_backward", aggregate_arg_backward_reference, grad)(
        indptr, indices, edges, grad, arg, weight
    )


@aggregate_arg_backward.register_fake
def _(indptr: Tensor, indices: Tensor, edges: Tensor, grad: Tensor, arg: Tensor, weight: Tensor | None) -> Tensor:
    return grad.new_empty((indptr.shape[0] - 1, grad.shape[1]))


def edge_dot_reference(rows: Tensor, indices: Tensor, x: Tensor, grad: Tensor, arg: Tensor | None) -> Tensor:
    dtype = compute_dtype(x)
    product = x.to(dtype)[indices.long()] * grad.to(dtype)[rows.long()]
    if arg is not None:
        position = torch.arange(rows.numel(), device=rows.device).unsqueeze(1)
        product = torch.where(arg[rows.long()] == position, product, 0)
    return product.sum(1)


@operation("qgnn::edge_dot")
def edge_dot(rows: Tensor, indices: Tensor, x: Tensor, grad: Tensor, arg: Tensor | None) -> Tensor:
    """Gradient of the edge weights: the dot product of ``x[indices[e]]`` and ``grad[rows[e]]``, over the features where ``arg`` is ``e`` if it is
    given; ``x`` ``[M, F]``, ``grad`` ``[N, F]`` -> float32 (float64 for float64) ``[E]`` in CSR order."""
    return implementation("aggregate", "edge_dot", edge_dot_reference, x)(rows, indices, x, grad, arg)


@edge_dot.register_fake
def _(rows: Tensor, indices: Tensor, x: Tensor, grad: Tensor, arg: Tensor | None) -> Tensor:
    return x.new_empty(rows.shape[0], dtype=compute_dtype(x))


def aggregate_packed_reference(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, features: int, signed: bool,
    output: str, row_scale: Tensor | None, self_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None,
    relu: bool, post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    codes = unpack_reference(x, None, uniform_counts(sources, container), features, signed)
    acc = torch.zeros(indptr.numel() - 1, features, dtype=torch.int32, device=x.device)
    acc.index_add_(0, rows_of_edges(indptr).long(), codes[indices.long()])
    if output == "acc":
        return acc
    own = None if self_scale is None else self_scale * codes
    v = epilogue_reference(acc, row_scale, own, col_scale, bias, addend, relu, post_scale, post_shift)
    return output_reference(v, output, out_step, out_bits, out_pos, out_counts, out_signed)


@operation("qgnn::aggregate_packed")
def aggregate_packed(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, features: int, signed: bool,
    output: str, row_scale: Tensor | None, self_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None,
    relu: bool, post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    """Sums the codes of ``x`` (packed ``[M, F]``, all rows in one ``container``, ``M = sources``) in int32; the caller has checked that
    ``largest code * largest in-degree`` fits. ``self_scale`` (float32 ``[1]``; it needs ``M = N``) adds each row's own codes. ``output``: ``"acc"``
    int32 ``[N, F]``, ``"float"`` float32 ``[N, F]``, or ``"rows"`` (:mod:`.matmul`)."""
    return implementation("aggregate", "aggregate_packed", aggregate_packed_reference, x)(
        indptr, indices, schedule, x, container, sources, features, signed, output, row_scale, self_scale, col_scale, bias, addend, relu, post_scale,
        post_shift, out_step, out_bits, out_pos, out_counts, out_signed,
    )  # fmt: skip


@aggregate_packed.register_fake
def _(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, features: int, signed: bool,
    output: str, row_scale: Tensor | None, self_scale: Tensor | None, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None,
    relu: bool, post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    return empty_output(x, output, indptr.shape[0] - 1, features, out_counts)


def aggregate_rows_reference(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, pos: Tensor | None, counts: Sequence[int], features: int, signed: bool,
    step: Tensor, weight: Tensor | None, row_scale: Tensor | None, bias: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    values = step.unsqueeze(1) * unpack_reference(x, pos, counts, features, signed)
    messages = values[indices.long()]
    if weight is not None:
        messages = messages * weight.unsqueeze(1)
    acc = torch.zeros(indptr.numel() - 1, features, dtype=torch.float32, device=x.device)
    acc.index_add_(0, rows_of_edges(indptr).long(), messages)
    return epilogue_reference(acc, row_scale, bias=bias, relu=relu)


@operation("qgnn::aggregate_rows")
def aggregate_rows(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, pos: Tensor | None, counts: Sequence[int], features: int, signed: bool,
    step: Tensor, weight: Tensor | None, row_scale: Tensor | None, bias: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    """Sums ``weight[e] * step[source] * code`` in float32 in a fixed order: packed ``x`` ``[M, F]`` with a step per row and rows of mixed widths,
    ``weight`` ``[E]`` (float32) or none; then the epilogue without a column factor -> float32 ``[N, F]``."""
    return implementation("aggregate", "aggregate_rows", aggregate_rows_reference, x)(
        indptr, indices, schedule, x, pos, counts, features, signed, step, weight, row_scale, bias, relu
    )


@aggregate_rows.register_fake
def _(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, pos: Tensor | None, counts: Sequence[int], features: int, signed: bool,
    step: Tensor, weight: Tensor | None, row_scale: Tensor | None, bias: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    return step.new_empty((indptr.shape[0] - 1, features))
