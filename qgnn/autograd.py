"""The autograd Functions of the differentiable operations. Each keeps for backward only what its gradient needs, packed where it can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .graph import Graph
from .kernels.affine import fake_quantize_affine
from .kernels.aggregate import aggregate, aggregate_arg_backward, edge_dot
from .kernels.matmul import matmul_transposed
from .kernels.packing import pack_bits_reference, uniform_counts
from .kernels.quantize import dequantize, fake_quantize, fake_quantize_backward, mask_clipped, quantize

TRAINING_CONTAINER = 8
"""Container of the codes that training keeps: widths change at every step, and asking a GPU for them would cost a synchronisation."""


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


class ReluDropout(torch.autograd.Function):
    """``dropout(relu(x))``; keeps one bit per element, where torch keeps the output of the one and the mask of the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        factor = torch.ones_like(x) if p == 0 else torch.empty_like(x).bernoulli_(1 - p).div_(1 - p)
        out = torch.relu(x) * factor
        ctx.scale = 1 / (1 - p)
        ctx.save_for_backward(pack_bits_reference(~((x > 0) & (factor > 0))))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return mask_clipped(grad.contiguous(), *ctx.saved_tensors) * ctx.scale, None


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
            grad = grad / graph.in_degree.clamp_min(1).to(grad.dtype).unsqueeze(1)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            indptr, indices, edges, schedule = graph.transposed
            if arg is not None:
                grad_x = aggregate_arg_backward(indptr, indices, edges, grad, arg, weight)
            else:
                ordered = None if weight is None else weight[edges.long()]
                grad_x, _ = aggregate(indptr, indices, list(schedule), grad, ordered, "sum")
        if ctx.needs_input_grad[1] and weight is not None:
            grad_weight = edge_dot(graph.rows, graph.indices, x, grad, arg).to(weight.dtype)
        return grad_x, grad_weight, None, None
