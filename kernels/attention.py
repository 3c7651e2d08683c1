"""Softmax over the in-edges of every node, and graph attention fused with its aggregation (Velickovic et al., "Graph Attention Networks", ICLR
2018, eq. 3 and 4; the passes follow Dao et al., "FlashAttention", NeurIPS 2022).

Graphs as in :mod:`.aggregate`: ``indptr`` ``[N + 1]``, ``indices`` and ``rows`` ``[E]`` (sources and destinations, int32), ``schedule``; edge
tensors are in CSR order. ``H`` heads of ``C`` channels. For an edge e from j to i, and each head:

    raw_e = src[j] + dst[i] + edge_score[e]
    score_e = raw_e if raw_e > 0 else negative_slope * raw_e
    p_e = exp(score_e - top[i]), top[i] = max over the edges of i of score_e
    alpha_e = p_e / total[i], total[i] = sum over the edges of i of p_e
    out[i] = sum over the edges of i of alpha_e * scale_e * x[j]

Nothing of size ``E * H * C`` is made. Backward computes alpha again from ``top`` and ``total``; with ``g`` the gradient of out:

    dscore_e = alpha_e * (scale_e * <g[i], x[j]> - <g[i], out[i]>)
    draw_e = dscore_e if raw_e > 0 else negative_slope * dscore_e
    dedge_score[e] = draw_e,  ddst[i] and dsrc[j] = sums of draw_e,  dx[j] = sum over the edges of j of alpha_e * scale_e * g[i]

All of it is float32 (float64 for float64), summed in a fixed order, so two runs give the same bits. Rows without edges are 0. An edge of score
-inf counts as no edge; a score of NaN or +inf makes its row NaN.

Inference runs on packed operands: codes ``[M, H * C]``, signed, all rows in one container, with a step for each column. :func:`attention_scores`
gives ``src`` and ``dst`` with the steps inside its vectors; :func:`gat_packed` sums ``alpha_e * code`` and applies the epilogue of :mod:`.matmul`,
whose ``col_scale`` then holds the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backend import implementation, operation
from .matmul import epilogue_reference, output_reference
from .packing import empty_output, uniform_counts, unpack_reference
from .quantize import compute_dtype


def _row_sum(rows: Tensor, n: int, values: Tensor) -> Tensor:
    return values.new_zeros(n, *values.shape[1:]).index_add_(0, rows.long(), values)


def _statistics_reference(rows: Tensor, n: int, scores: Tensor) -> tuple[Tensor, Tensor]:
    """``top`` (the lowest float for an empty row) and ``total`` (1 for an empty row), ``[N, H]``."""
    lowest = scores.new_full((n, scores.size(1)), torch.finfo(scores.dtype).min)
    top = lowest.scatter_reduce(0, rows.long().unsqueeze(1).expand_as(scores), scores, "amax")
    total = _row_sum(rows, n, torch.exp(scores - top[rows.long()]))
    return top, torch.where(total == 0, 1, total)


def edge_softmax_reference(indptr: Tensor, rows: Tensor, schedule: Sequence[Tensor], scores: Tensor) -> Tensor:
    wide, place = scores.to(compute_dtype(scores)), rows.long()
    top, total = _statistics_reference(rows, indptr.numel() - 1, wide)
    return (torch.exp(wide - top[place]) / total[place]).to(scores.dtype)


@operation("qgnn::edge_softmax")
def edge_softmax(indptr: Tensor, rows: Tensor, schedule: Sequence[Tensor], scores: Tensor) -> Tensor:
    """``scores`` ``[E, H]`` -> ``alpha`` ``[E, H]`` in their dtype (float16, bfloat16, float32; float64 on a CPU)."""
    return implementation("attention", "edge_softmax", edge_softmax_reference, scores)(indptr, rows, schedule, scores)


@edge_softmax.register_fake
def _(indptr: Tensor, rows: Tensor, schedule: Sequence[Tensor], scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


def edge_softmax_backward_reference(
    indptr: Tensor, rows: Tensor, schedule: Sequence[Tensor], alpha: Tensor, grad: Tensor
) -> Tensor:
    wide = alpha.to(compute_dtype(alpha))
    product = wide * grad.to(wide.dtype)
    return (product - wide * _row_sum(rows, indptr.numel() - 1, product)[rows.long()]).to(alpha.dtype)


@operation("qgnn::edge_softmax_backward")
def edge_softmax_backward(
    indptr: Tensor, rows: Tensor, schedule: Sequence[Tensor], alpha: Tensor, grad: Tensor
) -> Tensor:
    """Gradient of the scores, ``alpha_e * (grad_e - sum over the edges of the row of alpha * grad)``; all ``[E, H]``, in the dtype of ``alpha``."""
    return implementation("attention", "edge_softmax_backward", edge_softmax_backward_reference, alpha)(
        indptr, rows, schedule, alpha, grad
    )


@edge_softmax_backward.register_fake
def _(indptr: Tensor, rows: Tensor, schedule: Sequence[Tensor], alpha: Tensor, grad: Tensor) -> Tensor:
    return alpha.new_empty(alpha.shape)


def _raw_reference(rows: Tensor, indices: Tensor, src: Tensor, dst: Tensor, edge_score: Tensor | None) -> Tensor:
    raw = src[indices.long()] + dst[rows.long()]
    return raw if edge_score is None else raw + edge_score.to(raw.dtype)


def gat_aggregate_reference(
    indptr: Tensor, indices: Tensor, rows: Tensor, schedule: Sequence[Tensor], x: Tensor, src: Tensor, dst: Tensor, edge_score: Tensor | None,
    scale: Tensor | None, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, dtype, place = indptr.numel() - 1, compute_dtype(x), rows.long()
    raw = _raw_reference(rows, indices, src.to(dtype), dst.to(dtype), edge_score)
    scores = torch.where(raw > 0, raw, negative_slope * raw)
    top, total = _statistics_reference(rows, n, scores)
    weight = torch.exp(scores - top[place]) / total[place]
    weight = weight if scale is None else weight * scale.to(dtype)
    wide = x.to(dtype)
    out = wide.new_empty(n, x.size(1), x.size(2))
    for head in range(x.size(1)):
        out[:, head] = _row_sum(rows, n, weight[:, head, None] * wide[:, head][indices.long()])
    return out.to(x.dtype), top, total


@operation("qgnn::gat_aggregate")
def gat_aggregate(
    indptr: Tensor, indices: Tensor, rows: Tensor, schedule: Sequence[Tensor], x: Tensor, src: Tensor, dst: Tensor, edge_score: Tensor | None,
    scale: Tensor | None, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``x`` ``[M, H, C]`` (float16, bfloat16, float32; float64 on a CPU), ``src`` ``[M, H]``, ``dst`` ``[N, H]``, ``edge_score`` and ``scale``
    ``[E, H]`` or none, of any of these dtypes -> ``out`` ``[N, H, C]`` in the dtype of ``x``; ``top`` and ``total`` ``[N, H]`` in float32 (float64),
    the lowest float and 1 for an empty row."""
    return implementation("attention", "gat_aggregate", gat_aggregate_reference, x)(
        indptr, indices, rows, schedule, x, src, dst, edge_score, scale, negative_slope
    )


@gat_aggregate.register_fake
def _(
    indptr: Tensor, indices: Tensor, rows: Tensor, schedule: Sequence[Tensor], x: Tensor, src: Tensor, dst: Tensor, edge_score: Tensor | None,
    scale: Tensor | None, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n = indptr.shape[0] - 1
    out = x.new_empty((n, x.shape[1], x.shape[2]))
    top, total = (x.new_empty((n, x.shape[1]), dtype=compute_dtype(x)) for _ in range(2))
    return out, top, total


def gat_backward_reference(
    indptr: Tensor, indices: Tensor, rows: Tensor, schedule: Sequence[Tensor], transposed: Sequence[Tensor], grad: Tensor, x: Tensor, src: Tensor,
    dst: Tensor, edge_score: Tensor | None, scale: Tensor | None, out: Tensor, top: Tensor, total: Tensor, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, m, dtype, place, source = indptr.numel() - 1, x.size(0), compute_dtype(x), rows.long(), indices.long()
    wide, upstream = x.to(dtype), grad.to(dtype)
    raw = _raw_reference(rows, indices, src.to(dtype), dst.to(dtype), edge_score)
    alpha = torch.exp(torch.where(raw > 0, raw, negative_slope * raw) - top[place]) / total[place]
    factor = torch.ones_like(alpha) if scale is None else scale.to(dtype)
    product, grad_x = torch.empty_like(alpha), torch.empty_like(wide)
    for head in range(x.size(1)):
        product[:, head] = (upstream[:, head][place] * wide[:, head][source]).sum(1)
        messages = (alpha * factor)[:, head, None] * upstream[:, head][place]
        grad_x[:, head] = _row_sum(indices, m, messages)
    inner = (upstream * out.to(dtype)).sum(2)
    dscore = alpha * (factor * product - inner[place])
    draw = torch.where(raw > 0, dscore, negative_slope * dscore)
    return grad_x.to(x.dtype), _row_sum(indices, m, draw), _row_sum(rows, n, draw), draw


@operation("qgnn::gat_backward")
def gat_backward(
    indptr: Tensor, indices: Tensor, rows: Tensor, schedule: Sequence[Tensor], transposed: Sequence[Tensor], grad: Tensor, x: Tensor, src: Tensor,
    dst: Tensor, edge_score: Tensor | None, scale: Tensor | None, out: Tensor, top: Tensor, total: Tensor, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x ``[M, H, C]`` in its dtype, and, in float32 (float64), of src ``[M, H]``, dst ``[N, H]`` and edge_score ``[E, H]``.
    ``transposed`` is the graph by source: ``indptr`` ``[M + 1]``, ``indices`` (destinations), ``edges`` (CSR place of each) and its schedule;
    ``grad`` ``[N, H, C]``; ``out``, ``top`` and ``total`` are those of :func:`gat_aggregate`."""
    return implementation("attention", "gat_backward", gat_backward_reference, x)(
        indptr, indices, rows, schedule, transposed, grad, x, src, dst, edge_score, scale, out, top, total, negative_slope
    )  # fmt: skip


@gat_backward.register_fake
def _(
    indptr: Tensor, indices: Tensor, rows: Tensor, schedule: Sequence[Tensor], transposed: Sequence[Tensor], grad: Tensor, x: Tensor, src: Tensor,
    dst: Tensor, edge_score: Tensor | None, scale: Tensor | None, out: Tensor, top: Tensor, total: Tensor, negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = src.shape, dst.shape, (indices.shape[0], x.shape[1])
    grad_src, grad_dst, draw = (x.new_empty(shape, dtype=compute_dtype(x)) for shape in shapes)
    return x.new_empty(x.shape), grad_src, grad_dst, draw


def attention_scores_reference(
    x: Tensor, container: int, sources: int, heads: int, channels: int, vectors: Tensor
) -> Tensor:
    codes = unpack_reference(x, None, uniform_counts(sources, container), heads * channels, True)
    products = codes.unsqueeze(1) * vectors
    return products.view(sources, 2, heads, channels).sum(3).view(sources, 2 * heads)


@operation("qgnn::attention_scores")
def attention_scores(x: Tensor, container: int, sources: int, heads: int, channels: int, vectors: Tensor) -> Tensor:
    """Codes ``x`` (packed ``[M, H * C]``, ``M = sources``, signed, in one ``container``) and ``vectors`` ``[2, H * C]`` (float32: step times
    ``att_src``, step times ``att_dst``) -> float32 ``[M, 2 * H]``: the sums over each head's channels of ``code * vectors[0]``, then those of
    ``code * vectors[1]``, in a fixed order."""
    return implementation("attention", "attention_scores", attention_scores_reference, x)(
        x, container, sources, heads, channels, vectors
    )


@attention_scores.register_fake
def _(x: Tensor, container: int, sources: int, heads: int, channels: int, vectors: Tensor) -> Tensor:
    return vectors.new_empty((sources, 2 * heads))


def gat_packed_reference(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, heads: int, channels: int, src: Tensor,
    dst: Tensor, negative_slope: float, output: str, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None, relu: bool,
    post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    codes = unpack_reference(x, None, uniform_counts(sources, container), heads * channels, True).float()
    rows = torch.repeat_interleave((indptr[1:] - indptr[:-1]).long())
    acc, *_ = gat_aggregate_reference(
        indptr, indices, rows, schedule, codes.view(sources, heads, channels), src, dst, None, None, negative_slope
    )
    v = epilogue_reference(acc.flatten(1), None, None, col_scale, bias, addend, relu, post_scale, post_shift)
    return output_reference(v, output, out_step, out_bits, out_pos, out_counts, out_signed)


@operation("qgnn::gat_packed")
def gat_packed(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, heads: int, channels: int, src: Tensor,
    dst: Tensor, negative_slope: float, output: str, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None, relu: bool,
    post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    """:func:`gat_aggregate` of the codes ``x`` (packed ``[M, H * C]``, ``M = sources``, signed, in one ``container``) with ``src`` ``[M, H]`` and
    ``dst`` ``[N, H]`` (float32; columns of :func:`attention_scores`' result do), then the epilogue. ``output``: ``"float"`` float32
    ``[N, H * C]``, or ``"rows"`` (:mod:`.matmul`)."""
    return implementation("attention", "gat_packed", gat_packed_reference, x)(
        indptr, indices, schedule, x, container, sources, heads, channels, src, dst, negative_slope, output, col_scale, bias, addend, relu,
        post_scale, post_shift, out_step, out_bits, out_pos, out_counts, out_signed,
    )  # fmt: skip


@gat_packed.register_fake
def _(
    indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], x: Tensor, container: int, sources: int, heads: int, channels: int, src: Tensor,
    dst: Tensor, negative_slope: float, output: str, col_scale: Tensor | None, bias: Tensor | None, addend: Tensor | None, relu: bool,
    post_scale: Tensor | None, post_shift: Tensor | None,
    out_step: Tensor | None, out_bits: Tensor | None, out_pos: Tensor | None, out_counts: Sequence[int], out_signed: bool,
) -> Tensor:  # fmt: skip
    return empty_output(x, output, indptr.shape[0] - 1, heads * channels, out_counts)
