"""The autograd Functions of quantized training (Bqain; NUMERICS 6): both passes run on codes, and packed codes are what forward keeps for backward.

A tensor in fixed point has one scale, that of its largest magnitude, and offset 0, so that products and sums are those of plain integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .graph import Graph
from .kernels.aggregate import aggregate, aggregate_packed, aggregate_rows
from .kernels.binary import quantize_binary
from .kernels.fixed_point import (
    fixed_point,
    fixed_point_codes,
    loosen,
    own_range_codes,
    tighten,
    transpose_codes,
)
from .kernels.matmul import matmul_packed, matmul_transposed
from .kernels.msfp import msfp, msfp_pack, msfp_unpack
from .kernels.packing import uniform_counts
from .kernels.quantize import dequantize
from .kernels.random import NEAREST

FLOAT = 32
"""The width of what stays in float32."""

LONGEST = 65_793
"""Terms of a sum of products of 8-bit codes that int32 holds: ``LONGEST * 255 * 128 < 2^31``. Longer ones are summed in float32."""


@dataclass(frozen=True)
class Rounding:
    """The widths of one product or aggregation: ``left``, of what has rows of nodes; ``weight``, of the other factor of a product; and ``gradient``,
    of that of the result. :data:`FLOAT` is float32. ``signed``: whether ``left`` has negative values. ``seed``: of the rounding of the gradient
    (:mod:`.kernels.random`)."""

    left: int
    weight: int
    gradient: int
    signed: bool = True
    seed: int = NEAREST


def fixed_values(x: Tensor, scale: Tensor, bits: int, signed: bool = True, seed: int = NEAREST) -> Tensor:
    """``x`` ``[N, F]`` in fixed point, as floats."""
    return fixed_point(x, scale, scale.new_zeros(1), bits, signed, seed)


@dataclass(frozen=True)
class Codes:
    """A map ``[rows, features]`` in fixed point: a buffer of rows in containers of 8 bits (:mod:`.kernels.packing`) and the scale."""

    data: Tensor
    scale: Tensor
    bits: int
    signed: bool
    rows: int
    features: int

    @classmethod
    def of(cls, x: Tensor, scale: Tensor, bits: int, signed: bool = True, seed: int = NEAREST) -> Codes:
        data = fixed_point_codes(x, scale, scale.new_zeros(1), bits, signed, seed)
        return cls(data, scale, bits, signed, x.size(0), x.size(1))

    @classmethod
    def own_range(cls, x: Tensor, bits: int, seed: int = NEAREST, factor: Tensor | None = None) -> Codes:
        """The signed codes of ``x``, or of ``factor[i] * x[i]``, in its own range."""
        data, scale = own_range_codes(x, factor, bits, seed)
        return cls(data, scale, bits, True, x.size(0), x.size(1))

    @property
    def counts(self) -> list[int]:
        return uniform_counts(self.rows, 8)

    def row_scale(self, factor: Tensor | None = None) -> Tensor:
        """The scale once a row, times ``factor``, of one element or a number a row."""
        scale = self.scale if factor is None else self.scale * factor
        return scale.expand(self.rows).contiguous()

    def column_scale(self) -> Tensor:
        """The scale once a column."""
        return self.scale.expand(self.features).contiguous()

    def values(self) -> Tensor:
        return dequantize(self.data, self.row_scale(), True, self.signed, 0, None, self.counts, self.features)

    def kept(self) -> Tensor:
        """The codes at their own width, to be kept for backward."""
        return self.data if self.bits == 8 else tighten(self.data, self.rows, self.features, self.bits, self.signed)

    def transposed(self) -> Tensor:
        """The buffer of the transposed map."""
        return transpose_codes(self.data, self.rows, self.features)


def _again(kept: Tensor, scale: Tensor, bits: int, signed: bool, rows: int, features: int) -> Codes:
    """The codes that :meth:`Codes.kept` left."""
    data = kept if bits == 8 else loosen(kept, bits, signed, features)
    return Codes(data, scale, bits, signed, rows, features)


def _rounded(grad: Tensor, rounding: Rounding, row_scale: Tensor | None) -> Codes | None:
    """The codes of ``row_scale[i] * grad[i]``; None where it stays in float32."""
    return None if rounding.gradient == FLOAT else Codes.own_range(grad, rounding.gradient, rounding.seed, row_scale)


def _scaled(grad: Tensor, row_scale: Tensor | None) -> Tensor:
    return grad.contiguous() if row_scale is None else grad * row_scale.unsqueeze(1)


def _times(factor: Tensor, row_scale: Tensor | None) -> Tensor:
    return factor if row_scale is None else factor * row_scale


def _product(
    left: Tensor, counts: list[int], signed: bool, weight: Tensor, features: int, columns: int, row_scale: Tensor,
    col_scale: Tensor | None, bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Packed rows ``[N, features]`` times a weight ``[columns, features]`` in containers of 8 bits."""
    return matmul_packed(
        left, None, counts, signed, 0, weight, 8, features, columns, "float", row_scale, col_scale, bias, None, False,
        None, None, None, None, None, [0] * 5, False,
    )  # fmt: skip


class FixedProduct(torch.autograd.Function):
    """``row_scale[i] * (q(x) q(weight)^T)[i] + bias``: ``x`` ``[N, K]``, ``weight`` ``[M, K]`` -> ``[N, M]``, with the gradients of ``x``, ``weight``
    and ``bias``.

    Without an ``x_scale`` the rows of ``x`` hold 0 and one constant, and are exact in 1 bit; a row that does not gives NaN. Backward quantizes the
    gradient of the product once, for both factors. Kept are the codes of ``x``, at their own width, where the weight needs a gradient, and those of
    the weight where ``x`` does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        row_scale: Tensor | None,
        bias: Tensor | None,
        x_scale: Tensor | None,
        rounding: Rounding,
    ) -> Tensor:
        (n, k), m = x.shape, weight.size(0)
        w = Codes.own_range(weight, rounding.weight)
        ctx.rounding, ctx.features, ctx.binary = rounding, k, x_scale is None
        if x_scale is None:
            data, step, valid = quantize_binary(x)
            kept, kept_scale = data if ctx.needs_input_grad[1] else None, step.masked_fill(~valid, torch.nan)
            rows = (data, uniform_counts(n, 1), False)
        else:
            codes = Codes.of(x, x_scale, rounding.left, rounding.signed)
            kept, kept_scale = codes.kept() if ctx.needs_input_grad[1] else None, x_scale
            rows = (codes.data, codes.counts, codes.signed)
        ctx.save_for_backward(kept, kept_scale, row_scale, w.data if ctx.needs_input_grad[0] else None, w.scale)
        scale = _times(kept_scale, row_scale).expand(n).contiguous()
        return _product(*rows, w.data, k, m, scale, w.scale.expand(m).contiguous(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, kept_scale, row_scale, w_data, w_scale = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        n, m, k = *grad.shape, ctx.features
        grad_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        g = _rounded(grad, rounding, row_scale)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            w = Codes(w_data, w_scale, rounding.weight, True, m, k)
            grad_x = (
                (_scaled(grad, row_scale) if g is None else g.values()) @ w.values()
                if g is None or m > LONGEST
                else _product(g.data, g.counts, True, w.transposed(), m, k, g.row_scale(), w.column_scale())
            )
        if ctx.needs_input_grad[1]:
            x = None if ctx.binary else _again(kept, kept_scale, rounding.left, rounding.signed, n, k)
            if x is not None and g is not None and n <= LONGEST:
                left, scales = x.transposed(), (x.column_scale(), g.column_scale())
                grad_weight = _product(left, uniform_counts(k, 8), x.signed, g.transposed(), n, m, *scales)
            else:
                data, counts, signed = (
                    (kept, uniform_counts(n, 1), False) if x is None else (x.data, x.counts, x.signed)
                )
                scale = kept_scale.expand(n).contiguous()
                values = _scaled(grad, row_scale) if g is None else g.values()
                grad_weight = matmul_transposed(data, None, counts, signed, 0, k, scale, values)
            grad_weight = grad_weight.t()
        return grad_x, grad_weight, None, grad_bias, None, None


class FixedSparseProduct(torch.autograd.Function):
    """:class:`FixedProduct` of sparse features, which are exact: ``values`` ``[E]`` on the edges of ``graph``, from features to nodes."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor,
        row_scale: Tensor | None,
        bias: Tensor | None,
        graph: Graph,
        rounding: Rounding,
    ) -> Tensor:
        ctx.graph, ctx.rounding = graph, rounding
        ctx.save_for_backward(values, row_scale)
        m, k = weight.shape
        w = Codes.own_range(weight, rounding.weight)
        return aggregate_rows(
            graph.indptr, graph.indices, list(graph.schedule), w.transposed(), None, uniform_counts(k, 8), m, True,
            w.column_scale(), values, row_scale, bias, False,
        )  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, row_scale = ctx.saved_tensors
        indptr, indices, edges, schedule = ctx.graph.transposed
        grad_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        grad_weight = None
        if ctx.needs_input_grad[1]:
            g = _rounded(grad, ctx.rounding, row_scale)
            values = values.index_select(0, edges)
            if g is None:
                grad = _scaled(grad, row_scale)
                grad_weight = aggregate(indptr, indices, list(schedule), grad, values, "sum")[0].t()
            else:
                grad_weight = aggregate_rows(
                    indptr, indices, list(schedule), g.data, None, g.counts, g.features, True, g.row_scale(), values,
                    None, None, False,
                ).t()  # fmt: skip
        return None, grad_weight, None, grad_bias, None, None


class FixedAggregate(torch.autograd.Function):
    """``row_scale[i] * sum_j q(h)[j] + own * q(h)[i] + bias`` over the in-edges of every node, with the gradients of ``h``, ``own`` and ``bias``;
    ``own`` (one element) only without a ``row_scale``. The gradient is summed as codes, over the transposed graph. Of ``h`` nothing is kept, but the
    codes where ``own`` is learned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        row_scale: Tensor | None,
        own: Tensor | None,
        bias: Tensor | None,
        h_scale: Tensor,
        graph: Graph,
        rounding: Rounding,
    ) -> Tensor:
        ctx.graph, ctx.rounding, ctx.shape = graph, rounding, h.shape
        codes = Codes.of(h.contiguous(), h_scale, rounding.left)
        kept = (codes.kept(), h_scale) if ctx.needs_input_grad[2] else (None, None)
        ctx.save_for_backward(row_scale, own, *kept)
        return _sum(graph.indptr, graph.indices, list(graph.schedule), codes, row_scale, own, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        row_scale, own, kept, h_scale = ctx.saved_tensors
        grad_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        indptr, indices, _, schedule = ctx.graph.transposed
        grad_h = grad_own = None
        if ctx.needs_input_grad[2]:
            values = _again(kept, h_scale, ctx.rounding.left, True, *ctx.shape).values()
            grad_own = (grad * values).sum().view(own.shape)
        if ctx.needs_input_grad[0]:
            g = Codes.own_range(grad, ctx.rounding.gradient, ctx.rounding.seed, row_scale)
            grad_h = _sum(indptr, indices, list(schedule), g, None, own, None)
        return grad_h, None, grad_own, grad_bias, None, None, None


def _sum(
    indptr: Tensor, indices: Tensor, schedule: list[Tensor], codes: Codes, row_scale: Tensor | None, own: Tensor | None,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    return aggregate_packed(
        indptr, indices, schedule, codes.data, 8, codes.rows, codes.features, True, "float", row_scale, own,
        codes.column_scale(), bias, None, False, None, None, None, None, None, [0] * 5, False,
    )  # fmt: skip


def msfp_values(x: Tensor, width: int, seed: int = NEAREST) -> Tensor:
    """``x`` ``[N, F]`` in MSFP-``width``, with blocks along the features; ``x`` itself at :data:`FLOAT`."""
    return x if width == FLOAT else msfp(x.contiguous(), mantissa_bits(width), seed)


def mantissa_bits(width: int) -> int:
    """Those of MSFP-``width``: 8 bits are the exponent that a block shares, one is the sign."""
    return width - 9


class MsfpProduct(torch.autograd.Function):
    """``q(x) q(weight)^T``: ``x`` ``[N, K]``, ``weight`` ``[M, K]`` -> ``[N, M]``, in MSFP with blocks along K.

    The gradient is rounded with blocks along M for ``x`` and along N for the weight: along what is summed over. Kept are the packed ``x`` and the
    weight itself, which is rounded again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rounding: Rounding) -> Tensor:
        ctx.rounding, ctx.features = rounding, x.size(1)
        if rounding.left == FLOAT:
            left, kept = x, (x, None)
        else:
            mantissas, exponents = kept = msfp_pack(x, mantissa_bits(rounding.left), NEAREST)
            left = msfp_unpack(mantissas, exponents, mantissa_bits(rounding.left), x.size(1))
        ctx.save_for_backward(*kept, weight)
        return left @ msfp_values(weight, rounding.weight).t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, exponents, weight = ctx.saved_tensors
        rounding: Rounding = ctx.rounding
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = msfp_values(grad, rounding.gradient, rounding.seed) @ msfp_values(weight, rounding.weight)
        if ctx.needs_input_grad[1]:
            x = kept if exponents is None else msfp_unpack(kept, exponents, mantissa_bits(rounding.left), ctx.features)
            grad_weight = msfp_values(grad.t(), rounding.gradient, rounding.seed) @ x
        return grad_x, grad_weight, None


class StraightThrough(torch.autograd.Function):
    """``quantize(x, *arguments)``, with the gradient of ``x`` itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantize: Callable[..., Tensor], *arguments: Any) -> Tensor:
        ctx.others = 1 + len(arguments)
        return quantize(x, *arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, *[None] * ctx.others


class QuantizeGradient(torch.autograd.Function):
    """``x``, whose gradient is ``quantize(gradient)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.quantize = quantize
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.quantize(grad.contiguous()), None
