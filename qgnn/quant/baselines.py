"""Baselines of A2Q's tables 10 and 16 that do not run on integers of several bits: half precision, and binary features and weights."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .. import autograd
from ..features import SparseFeatures
from ..qtensor import QTensor
from .base import ColumnQuantizer, InputCodes, LayerQuantizer


def _half(x: Tensor) -> Tensor:
    """``x`` rounded to float16 and back; so is its gradient."""
    return x.half().float()


class _FloatQuantizer(LayerQuantizer):
    """A baseline without integer codes."""

    def input_codes(self, x: Tensor | None) -> InputCodes:
        raise ValueError(f"scheme {self.scheme.name} is a float baseline: it has no integer codes to freeze")

    def weight_codes(self, weight: Tensor) -> QTensor:
        raise ValueError(f"scheme {self.scheme.name} is a float baseline: it has no integer codes to freeze")

    def input_bits(self) -> Tensor | int:
        return self.scheme.bits if self.enabled else 32


class HalfQuantizer(_FloatQuantizer):
    """float16 inputs, weights, products and gradients, with float32 sums, as tensor cores compute (Brennan et al. 2020)."""

    def linear(self, x: Tensor | SparseFeatures, weight: Tensor) -> Tensor:
        if not self.enabled:
            return x @ weight.t()
        rounded = _half(x) if isinstance(x, Tensor) else replace(x, values=_half(x.values))
        return _half(rounded @ _half(weight).t())


class HalfColumns(ColumnQuantizer):
    """The operand of the aggregation in float16."""

    def forward(self, h: Tensor) -> Tensor:
        return _half(h) if self.enabled else h

    def codes(self) -> tuple[Tensor, Tensor]:
        raise ValueError("scheme fp16 is a float baseline: it has no integer codes to freeze")


class BinaryQuantizer(_FloatQuantizer):
    """Bi-GCN (Wang et al. 2021b): 1-bit features, standardised column by column and scaled by the mean magnitude of their row, times 1-bit weights,
    scaled by the mean magnitude of their output. Aggregation stays in float."""

    def linear(self, x: Tensor | SparseFeatures, weight: Tensor) -> Tensor:
        if not self.enabled:
            return x @ weight.t()
        self.see_input(x)
        weight_b = autograd.Sign.apply(weight) * weight.abs().mean(1, keepdim=True)
        if self.kind == "binary" or not isinstance(x, Tensor):
            return x @ weight_b.t()
        centred = (x - x.mean(0)) / (x.std(0, correction=0) + 1e-4)
        return (autograd.Sign.apply(centred) * centred.abs().mean(1, keepdim=True)) @ weight_b.t()
