"""Quantized training: forward operands and gradients in fixed point or Microsoft floating point (Bqain; NUMERICS 6)."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..autograd_training import (
    FixedAggregate,
    FixedProduct,
    FixedSparseProduct,
    MsfpProduct,
    QuantizeGradient,
    Rounding,
    StraightThrough,
    fixed_values,
    mantissa_bits,
    msfp_values,
)
from ..features import SparseFeatures
from ..graph import Graph
from ..kernels.msfp import BLOCK
from ..kernels.random import NEAREST, drawn_seed
from ..kernels.ranges import extremes, largest, scale_of
from ..qtensor import QTensor
from .base import (
    ColumnQuantizer,
    InputCodes,
    LayerQuantizer,
    Quantizer,
    checks_values,
    finished,
    row_binary_codes,
    summed,
)
from .components import FLOAT, Components
from .qat import SLACK
from .scheme import Scheme

LARGEST_SUM = 2**24
"""Codes of magnitude 128 whose sum int32 does not hold."""


def width_of(quantizer: Quantizer, component: str) -> int:
    """The width in use of a component; :data:`FLOAT` while the quantizer is off."""
    components = quantizer.scheme.components or Components()
    return components.at(component, quantizer.width) if quantizer.enabled else FLOAT


def _stored_bits(scheme: Scheme, width: int) -> float:
    """Bits of a packed value: of MSFP its sign and mantissa, and its share of the exponent of the block."""
    return mantissa_bits(width) + 1 + 8 / BLOCK if scheme.method == "msfp" and width != FLOAT else width


def _seed(scheme: Scheme) -> int:
    """Of the rounding of a gradient, drawn from torch's generator, so that ``torch.manual_seed`` fixes it."""
    return drawn_seed() if scheme.rounding == "stochastic" else NEAREST


def _top(quantizer: Quantizer, buffer: str, x: Tensor, top: Tensor) -> Tensor:
    """The magnitude that gets the largest code: in training the batch's own, in evaluation that of the last training batch, kept in ``buffer``; where
    that is NaN, of the first batch. A batch of nothing changes nothing; one with NaN has NaN in evaluation, too. ``top`` is the largest of ``x``."""
    kept: Tensor = getattr(quantizer, buffer)
    if not x.numel():
        return kept.nan_to_num(0)
    if quantizer.training or bool(kept.isnan()):
        kept.copy_(top)
        return top
    return kept.masked_fill(top.isnan(), torch.nan)


def _cut(quantizer: Quantizer, x: Tensor, top: Tensor) -> Tensor:
    """``x`` within the range that evaluation keeps: the integers of a frozen model have no code below that of ``-top``, which fixed point has."""
    return x if quantizer.training else x.clamp(-top, top)


def _scale(top: Tensor, bits: int, signed: bool = True) -> Tensor:
    """The scale of a map, whose values are sums of multiples of one step: without slack, many would lie exactly between two codes (see SLACK)."""
    return scale_of(top * (1 + SLACK), bits, signed)


def _fixed_gradient(bits: int, seed: int, grad: Tensor) -> Tensor:
    return fixed_values(grad, scale_of(largest(grad), bits, True), bits, True, seed)


def _msfp_gradient(width: int, seed: int, along_nodes: bool, grad: Tensor) -> Tensor:
    return msfp_values(grad.t(), width, seed).t().contiguous() if along_nodes else msfp_values(grad, width, seed)


class TrainingColumns(ColumnQuantizer):
    """What an aggregation reads, its result and the output of a layer; or, with ``parameters``, GAT's attention vectors and scores."""

    @abstractmethod
    def values(self, x: Tensor, buffer: str, component: str) -> Tensor:
        """``x`` at the width of a component, with the gradient of ``x``; ``buffer`` keeps a fixed-point range for evaluation."""

    @abstractmethod
    def attended(self, out: Tensor) -> Tensor:
        """``out``, whose gradient is quantized."""

    def forward(self, h: Tensor) -> Tensor:
        return self.values(h, "top", "attention" if self.parameters_only else "messages")

    def aggregate(
        self,
        graph: Graph,
        h: Tensor,
        weight: Tensor | None = None,
        reduce: str = "sum",
        *,
        scale: Tensor | None = None,
        own: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        out = finished(self.attended(summed(graph, self(h), weight, reduce, own)), scale, None)
        return finished(self.values(out, "result_top", "aggregation"), None, bias)

    def operand_bits(self) -> float:
        return _stored_bits(self.scheme, width_of(self, "messages"))

    def scores(self, scores: Tensor) -> Tensor:
        return self.values(scores, "result_top", "attention")

    def update(self, out: Tensor) -> Tensor:
        return self.values(out, "update_top", "update")


def _check_headroom(graph: Graph) -> None:
    """Raises ValueError if sums of codes over the edges into a node, or, in backward, out of one, could overflow int32."""
    ops.check_headroom(graph)
    if graph.num_edges >= LARGEST_SUM:  # only then is there anything to look for, which waits for a GPU
        most = int(graph.transposed[0].diff().max())
        if most >= LARGEST_SUM:
            raise ValueError(f"a node has {most} out-edges: int32 sums of 8-bit codes could overflow; split the node")


class FixedColumns(TrainingColumns):
    """In fixed point. Sums run on codes in both passes; maximum and minimum, and sums with edge weights, run in float32 on quantized values.

    Ranges that evaluation needs: ``top`` of what is summed, ``result_top`` of the result of the sum (of attention: of the scores), and
    ``update_top`` of the output of the layer, the latter two where the scheme quantizes these.
    """

    def __init__(self, channels: int, scheme: Scheme, parameters: bool) -> None:
        super().__init__(channels, scheme, parameters)
        components = scheme.components or Components()
        result = parameters or components.aggregation != FLOAT
        for name in ("top", *["result_top"] * result, *["update_top"] * (components.update != FLOAT)):
            self.register_buffer(name, torch.tensor(torch.nan))
        self.top: Tensor

    def values(self, x: Tensor, buffer: str, component: str) -> Tensor:
        bits = width_of(self, component)
        if bits == FLOAT:
            return x
        top = _top(self, buffer, x, largest(x))
        return StraightThrough.apply(_cut(self, x, top).contiguous(), fixed_values, _scale(top, bits), bits)

    def attended(self, out: Tensor) -> Tensor:
        bits = width_of(self, "gradients")
        return out if bits == FLOAT else QuantizeGradient.apply(out, partial(_fixed_gradient, bits, _seed(self.scheme)))

    def aggregate(
        self,
        graph: Graph,
        h: Tensor,
        weight: Tensor | None = None,
        reduce: str = "sum",
        *,
        scale: Tensor | None = None,
        own: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        messages, gradients, result = (width_of(self, c) for c in ("messages", "gradients", "aggregation"))
        factor = graph.inv_degree if reduce == "mean" else scale
        sums = (reduce == "sum" or (reduce == "mean" and scale is None)) and weight is None
        sums = sums and (factor is None or own is None)
        # Freezing listens to `forward`, which the sum of codes does without, and follows a model in evaluation.
        if not self.training or not sums or FLOAT in (messages, gradients):
            return super().aggregate(graph, h, weight, reduce, scale=scale, own=own, bias=bias)
        _check_headroom(graph)
        rounding = Rounding(messages, FLOAT, gradients, True, _seed(self.scheme))
        h_scale = _scale(_top(self, "top", h, largest(h)), messages)
        if result == FLOAT:
            return FixedAggregate.apply(h, factor, own, bias, h_scale, graph, rounding)
        out = FixedAggregate.apply(h, factor, own, None, h_scale, graph, rounding)
        return finished(self.values(out, "result_top", "aggregation"), None, bias)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        bits = width_of(self, "attention" if self.parameters_only else "messages")
        if bits == FLOAT:
            raise ValueError(f"scheme {self.scheme.name!r} sums in float32: there are no integer codes to freeze")
        step = _scale(self.top, bits).expand(self.channels).contiguous()
        return step, torch.full_like(step, bits, dtype=torch.uint8)


class FixedQuantizer(LayerQuantizer):
    """The product of a layer on the codes of both factors, and its gradients on those of the gradient."""

    def __init__(self, in_channels: int, out_channels: int, scheme: Scheme) -> None:
        super().__init__(in_channels, out_channels, scheme)
        self.register_buffer("top", torch.tensor(torch.nan))
        self.top: Tensor

    def linear(self, x: Tensor | SparseFeatures, weight: Tensor) -> Tensor:
        return self._product(x, weight, None, None)

    def project(
        self, x: Tensor | SparseFeatures, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        # Freezing listens to `linear`, and follows a model in evaluation.
        return self._product(x, weight, scale, bias) if self.training else super().project(x, weight, scale, bias)

    def _product(self, x: Tensor | SparseFeatures, weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        if not self.enabled:
            return finished(x @ weight.t(), scale, bias)
        self.see_input(x)
        exact = self.kind == "binary"
        left, right, gradient = (width_of(self, c) for c in ("inputs", "weights", "gradients"))
        seed = _seed(self.scheme)
        if right == FLOAT or (left == FLOAT and not exact):
            return finished(self._mixed(x, weight, left, right, gradient, seed), scale, bias)
        if isinstance(x, SparseFeatures):
            rounding = Rounding(left, right, gradient, False, seed)
            return FixedSparseProduct.apply(x.values, weight, scale, bias, x.graph, rounding)
        ops.check_product_headroom(self.in_channels)
        x, x_scale = (x, None) if exact else self._ranged(x, left)
        rounding = Rounding(left, right, gradient, self.kind == "signed", seed)
        return FixedProduct.apply(x.contiguous(), weight, scale, bias, x_scale, rounding)

    def _mixed(
        self, x: Tensor | SparseFeatures, weight: Tensor, left: int, right: int, gradient: int, seed: int
    ) -> Tensor:
        """The product where one factor stays in float32, and so must the other."""
        if right != FLOAT:
            scale = scale_of(largest(weight), right, True)
            weight = StraightThrough.apply(weight.contiguous(), fixed_values, scale, right)
        elif left != FLOAT and isinstance(x, Tensor) and self.kind != "binary":
            x, scale = self._ranged(x, left)
            x = StraightThrough.apply(x.contiguous(), fixed_values, scale, left, self.kind == "signed")
        out = x @ weight.t()
        return out if gradient == FLOAT else QuantizeGradient.apply(out, partial(_fixed_gradient, gradient, seed))

    def _ranged(self, x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """``x`` as it is quantized, and its scale. Where features that were never negative are so now, they get a sign; on a GPU, which is not waited
        for, they become NaN instead, but for ``QGNN_DEBUG=1``."""
        low, high = extremes(x)
        top = _top(self, "top", x, torch.maximum(-low, high))
        if self.training and self.kind == "unsigned":
            negative = low < 0
            if not checks_values(x):
                top = top.masked_fill(negative, torch.nan)
            elif bool(negative):
                self.kind = "signed"
        return _cut(self, x, top), self._input_scale(top, bits)

    def _input_scale(self, top: Tensor, bits: int) -> Tensor:
        return _scale(top, bits, self.kind == "signed")

    @torch.no_grad()
    def input_codes(self, x: Tensor | None) -> InputCodes:
        if self.kind == "binary":
            if x is None:
                raise ValueError("freezing a layer with a 0/1 input needs that input; pass data to freeze")
            return row_binary_codes(x)
        bits = self._frozen_width("inputs")
        scale = self._input_scale(self.top, bits)
        return InputCodes(scale, torch.full_like(scale, bits, dtype=torch.uint8), self.kind == "signed")

    @torch.no_grad()
    def weight_codes(self, weight: Tensor) -> QTensor:
        bits = self._frozen_width("weights")
        return QTensor.quantize(weight, scale_of(largest(weight), bits, True), float(bits))

    def _frozen_width(self, component: str) -> int:
        bits = width_of(self, component)
        if bits == FLOAT:
            raise ValueError(
                f"scheme {self.scheme.name!r} keeps {component} in float32: there are no integer codes to freeze"
            )
        return bits

    def input_bits(self) -> float:
        return _stored_bits(self.scheme, width_of(self, "inputs"))


class MsfpColumns(TrainingColumns):
    """In MSFP, with blocks along the features. Sums are of floats."""

    def values(self, x: Tensor, buffer: str, component: str) -> Tensor:
        width = width_of(self, component)
        return x if width == FLOAT else StraightThrough.apply(x, msfp_values, width)

    def attended(self, out: Tensor) -> Tensor:
        width = width_of(self, "gradients")
        if width == FLOAT:
            return out
        return QuantizeGradient.apply(out, partial(_msfp_gradient, width, _seed(self.scheme), False))

    def codes(self) -> tuple[Tensor, Tensor]:
        raise ValueError(_no_codes(self.scheme))


class MsfpQuantizer(LayerQuantizer):
    """The product of a layer on values in MSFP, with float32 sums."""

    def linear(self, x: Tensor | SparseFeatures, weight: Tensor) -> Tensor:
        if not self.enabled:
            return x @ weight.t()
        self.see_input(x)
        left, right, gradient = (width_of(self, c) for c in ("inputs", "weights", "gradients"))
        seed = _seed(self.scheme)
        if isinstance(x, Tensor) and self.kind != "binary":
            return MsfpProduct.apply(x, weight, Rounding(left, right, gradient, True, seed))
        # contiguous, so that the rounded weight is let go before the product
        out = x @ StraightThrough.apply(weight, msfp_values, right).t().contiguous()
        return out if gradient == FLOAT else QuantizeGradient.apply(out, partial(_msfp_gradient, gradient, seed, True))

    def input_codes(self, x: Tensor | None) -> InputCodes:
        raise ValueError(_no_codes(self.scheme))

    def weight_codes(self, weight: Tensor) -> QTensor:
        raise ValueError(_no_codes(self.scheme))

    def input_bits(self) -> float:
        return _stored_bits(self.scheme, width_of(self, "inputs"))


def _no_codes(scheme: Scheme) -> str:
    return (
        f"scheme {scheme.name!r} is a floating-point format: it has no integer codes to freeze; train with fixed-8, say"
    )
