"""The autograd Functions of the differentiable operations. Each keeps for backward only what its gradient needs, packed where it can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .graph import Graph
from .kernels.affine import fake_quantize_affine
from .kernels.aggregate import aggregate, aggregate_arg_backward, edge_dot
from .kernels.attention import edge_softmax, edge_softmax_backward, gat_aggregate, gat_backward
from .kernels.dropout import dropout, dropout_backward
from .kernels.fixed_point import fixed_point
from .kernels.matmul import matmul_transposed
from .kernels.msfp import msfp
from .kernels.nearest import fake_quantize_nearest, group_sums, group_table
from .kernels.packing import pack_bits_reference, uniform_counts
from .kernels.quantize import (
    compute_dtype,
    dequantize,
    fake_quantize,
    fake_quantize_backward,
    largest_code,
    mask_clipped,
    quantize,
)
from .kernels.random import drawn_word
from .kernels.ranges import range_parameters
from .kernels.scatter import segment_gather, segment_mul_backward, segment_reduce

TRAINING_CONTAINER = 8
"""Container of the codes that training keeps: widths change at every step, and asking a GPU for them would cost a synchronisation."""


def records(tensor: Tensor) -> bool:
    """Whether the gradient of ``tensor`` is asked for, backwards or forwards, or a compiler has to find out. Where it is not, a kernel is called
    without a Function, which costs 7 µs, as much as the sums of a small graph."""
    if torch.compiler.is_compiling():
        return True
    return (tensor.requires_grad and torch.is_grad_enabled()) or forward_ad._current_level >= 0


class FakeQuantize(torch.autograd.Function):
    """``step * code`` with the gradients of NUMERICS 2. Keeps ``x`` for global gradients; for local ones the clip bits, if gradients are masked."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        step: Tensor,
        bits: Tensor,
        widths: Tensor,
        row: bool,
        signed: bool,
        local: bool,
        masked: bool,
    ) -> Tensor:
        ctx.row, ctx.signed, ctx.local, ctx.masked, ctx.dtypes = row, signed, local, masked, (step.dtype, bits.dtype)
        wanted = local and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        out, clip, grad_step, grad_bits = fake_quantize(x, step, widths, row, signed, wanted)
        ctx.save_for_backward(*((clip if masked else None, grad_step, grad_bits) if local else (x, step, widths)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.local:
            clip, grad_step, grad_bits = ctx.saved_tensors
            grad_x = (mask_clipped(grad, clip) if ctx.masked else grad) if ctx.needs_input_grad[0] else None
        else:
            x, step, widths = ctx.saved_tensors
            grad_x, grad_step, grad_bits = fake_quantize_backward(grad, x, step, widths, ctx.row, ctx.signed)
            grad_x = grad_x if ctx.masked else grad
        return (
            grad_x,
            grad_step.to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None,
            grad_bits.to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None,
            *[None] * 5,
        )


class FakeQuantizeNearest(torch.autograd.Function):
    """A2Q's Nearest Neighbor Strategy (NUMERICS 4): every row is quantized by the nearest of ``m`` groups, and a group gets the global gradients
    (A2Q eq. 3, 4) of the rows that used it. Keeps ``x`` for them; where no group learns, the clip bits, if gradients are masked."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, bits: Tensor, widths: Tensor, signed: bool, masked: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.signed, ctx.masked, ctx.dtypes = signed, masked, (step.dtype, bits.dtype)
        ctx.learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        q_max = step * largest_code(widths, signed)
        out, clip, group = fake_quantize_nearest(x, *group_table(q_max), step, widths, signed)
        ctx.mark_non_differentiable(group)
        ctx.save_for_backward(*((x, step, widths, group) if ctx.learns else (clip,) if masked else ()))
        return out, group

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.learns:
            return mask_clipped(grad, *ctx.saved_tensors) if ctx.masked else grad, *[None] * 5
        x, step, widths, group = ctx.saved_tensors
        grad_x, *of_rows = fake_quantize_backward(grad, x, step[group], widths[group], True, ctx.signed)
        grad_step, grad_bits = group_sums(group, *of_rows, step.numel())
        return (
            (grad_x if ctx.masked else grad) if ctx.needs_input_grad[0] else None,
            grad_step.to(ctx.dtypes[0]) if ctx.needs_input_grad[1] else None,
            grad_bits.to(ctx.dtypes[1]) if ctx.needs_input_grad[2] else None,
            *[None] * 3,
        )


class FakeQuantizeAffine(torch.autograd.Function):
    """Degree-Quant's per-tensor quantizer (NUMERICS 5). With ``masked`` gradients ("clip") one bit per element is kept, otherwise nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, bits: int, protect: Tensor | None, masked: bool
    ) -> Tensor:
        out, outside = fake_quantize_affine(x, scale, zero, bits, protect)
        ctx.masked = masked
        if masked:
            ctx.save_for_backward(outside)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return mask_clipped(grad, *ctx.saved_tensors) if ctx.masked else grad, *[None] * 5


class FixedPoint(torch.autograd.Function):
    """Fixed point (NUMERICS 6) of the range ``low .. high``, ``[1]`` or ``[N]``; straight-through. With ``masked`` gradients, zero outside the range,
    one bit per element is kept, otherwise nothing."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, low: Tensor, high: Tensor, bits: int, signed: bool, seed: int, masked: bool
    ) -> Tensor:
        ctx.masked = masked
        if masked and ctx.needs_input_grad[0]:
            ctx.save_for_backward(pack_bits_reference((x < low.unsqueeze(1)) | (x > high.unsqueeze(1))))
        return fixed_point(x, *range_parameters(low, high, bits, signed), bits, signed, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return mask_clipped(grad, *ctx.saved_tensors) if ctx.masked else grad, *[None] * 6


class Msfp(torch.autograd.Function):
    """Rounding to Microsoft floating point (NUMERICS 6). The gradient passes unchanged, and nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mantissa_bits: int, seed: int) -> Tensor:
        return msfp(x, mantissa_bits, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


class QuantizedLinear(torch.autograd.Function):
    """``fake_quantize(x, step, bits) @ weight`` with steps per row and local gradients.

    Keeps the 8-bit codes of x and one clip bit per element instead of x: 9 bits where FP32 keeps 32. ``weight`` is ``[K, M]``, already quantized.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, bits: Tensor, widths: Tensor, weight: Tensor, signed: bool, masked: bool
    ) -> Tensor:
        ctx.signed, ctx.masked, ctx.features, ctx.dtype = signed, masked, x.size(1), bits.dtype
        ctx.counts = uniform_counts(x.size(0), TRAINING_CONTAINER)
        data, clip, grad_step, grad_bits = quantize(x, step, widths, True, signed, None, ctx.counts, True)
        ctx.save_for_backward(data, clip if masked else None, step, weight, grad_step, grad_bits)
        # A row with NaN has no code for it, but a NaN gradient of its step: through the step, NaN reaches the output, as in float arithmetic.
        return dequantize(data, step + 0 * grad_step, True, signed, 0, None, ctx.counts, ctx.features) @ weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        data, clip, step, weight, grad_step, grad_bits = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight.t()
            grad_x = mask_clipped(grad_x, clip) if ctx.masked else grad_x
        if ctx.needs_input_grad[4]:
            grad_weight = matmul_transposed(
                data, None, ctx.counts, ctx.signed, 0, ctx.features, step, grad.contiguous()
            )
        return grad_x, grad_step, grad_bits.to(ctx.dtype), None, grad_weight, None, None


class Dropout(torch.autograd.Function):
    """``dropout(x)`` or, with ``relu``, ``dropout(relu(x))``, and the bits that say where its gradient is 0 (:mod:`.kernels.dropout`). Keeps these,
    where torch keeps the output of the one and the mask of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, relu: bool) -> tuple[Tensor, Tensor]:
        out, bits = dropout(x, p, drawn_word() if p else None, relu)
        ctx.p = p
        ctx.save_for_backward(bits.view(1, -1))  # in rows, as :mod:`.memory` tells masks from other bytes
        ctx.mark_non_differentiable(bits)
        return out, bits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return dropout_backward(grad, ctx.saved_tensors[0].view(-1), ctx.p), None, None


class Sign(torch.autograd.Function):
    """1 for ``x >= 0``, else -1; the gradient passes where ``|x| <= 1`` (Bi-GCN's straight-through estimator). One bit per element is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(pack_bits_reference(x.abs() > 1))
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return mask_clipped(grad.contiguous(), *ctx.saved_tensors)


class Aggregate(torch.autograd.Function):
    """Gather-aggregate; the gradient of x runs over the transposed graph. ``weight`` is in CSR order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, graph: Graph, reduce: str) -> Tensor:
        out, arg = aggregate(graph.indptr, graph.indices, list(graph.schedule), x, weight, reduce)
        ctx.graph, ctx.reduce = graph, reduce
        needs_weight = weight is not None and ctx.needs_input_grad[1]
        ctx.save_for_backward(x if needs_weight else None, weight, arg if reduce in ("max", "min") else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, arg = ctx.saved_tensors
        graph: Graph = ctx.graph
        grad = grad.contiguous()
        if ctx.reduce == "mean":
            # in float32: float16 counts only to 65,504
            grad = (grad / graph.in_degree.clamp_min(1).unsqueeze(1).to(compute_dtype(grad))).to(grad.dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            indptr, indices, edges, schedule = graph.transposed
            if arg is not None:
                grad_x = aggregate_arg_backward(indptr, indices, edges, grad, arg, weight)
            else:
                ordered = None if weight is None else weight.index_select(0, edges)
                grad_x, _ = aggregate(indptr, indices, list(schedule), grad, ordered, "sum")
        if ctx.needs_input_grad[1] and weight is not None:
            grad_weight = edge_dot(graph.rows, graph.indices, x, grad, arg).to(weight.dtype)
        return grad_x, grad_weight, None, None


class EdgeSoftmax(torch.autograd.Function):
    """Softmax over the in-edges of every node; ``scores`` ``[E, H]`` in CSR order. Keeps its result."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, graph: Graph) -> Tensor:
        alpha = edge_softmax(graph.indptr, graph.rows, list(graph.schedule), scores)
        ctx.graph = graph
        ctx.save_for_backward(alpha)
        return alpha

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph: Graph = ctx.graph
        (alpha,) = ctx.saved_tensors
        return edge_softmax_backward(graph.indptr, graph.rows, list(graph.schedule), alpha, grad.contiguous()), None


class GatAggregate(torch.autograd.Function):
    """Graph attention and its aggregation (:mod:`qgnn.kernels.attention`); edge tensors ``[E, H]`` in CSR order. Keeps its operands, its result and
    two numbers for each node and head; ``scale`` takes no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        src: Tensor,
        dst: Tensor,
        edge_score: Tensor | None,
        scale: Tensor | None,
        graph: Graph,
        negative_slope: float,
    ) -> Tensor:
        structure = (graph.indptr, graph.indices, graph.rows, list(graph.schedule))
        out, top, total = gat_aggregate(*structure, x, src, dst, edge_score, scale, negative_slope)
        ctx.graph, ctx.negative_slope = graph, negative_slope
        ctx.save_for_backward(x, src, dst, edge_score, scale, out, top, total)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph: Graph = ctx.graph
        indptr, indices, edges, schedule = graph.transposed
        structure = (graph.indptr, graph.indices, graph.rows, list(graph.schedule), [indptr, indices, edges, *schedule])
        gradients = gat_backward(*structure, grad.contiguous(), *ctx.saved_tensors, ctx.negative_slope)
        operands = ctx.saved_tensors[:4]
        wanted = [
            g.to(t.dtype) if needed else None
            for g, t, needed in zip(gradients, operands, ctx.needs_input_grad, strict=False)
        ]
        return *wanted, None, None, None


class SegmentReduce(torch.autograd.Function):
    """Reduces groups of rows (:mod:`.kernels.scatter`). max and min give the gradient to the first row among equals."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indptr: Tensor, indices: Tensor, reduce: str) -> Tensor:
        out, arg = segment_reduce(indptr, indices, x, reduce)
        ctx.reduce = reduce
        ctx.save_for_backward(indptr, indices, x if reduce == "mul" else arg)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indptr, indices, kept = ctx.saved_tensors
        if ctx.reduce == "mul":
            grad_x = segment_mul_backward(indptr, indices, grad, kept)
        elif ctx.reduce in ("max", "min"):
            # A row belongs to one group, so nothing is written twice, but for the gradients of empty groups, behind the last row.
            rows = indices.numel()
            taken = torch.cat([indices, indices.new_full((1,), rows)])[kept.long()].long()
            grad_x = grad.new_zeros(rows + 1, grad.size(1)).scatter_(0, taken, grad)[:-1]
        else:
            if ctx.reduce == "mean":
                wide = compute_dtype(grad)  # a count may be more than float16 holds
                count = (indptr[1:] - indptr[:-1]).clamp_min(1).to(wide).unsqueeze(1)
                grad = (grad.to(wide) / count).to(grad.dtype)
            grad_x = segment_gather(indptr, indices, grad)
        return grad_x, None, None, None


class SegmentGather(torch.autograd.Function):
    """Gives every member its group's row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, indptr: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indptr, indices)
        return segment_gather(indptr, indices, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indptr, indices = ctx.saved_tensors
        return segment_reduce(indptr, indices, grad, "sum")[0], None, None
