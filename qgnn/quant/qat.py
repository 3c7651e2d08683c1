"""Quantization-aware training with per-tensor ranges: Degree-Quant's baselines and the base of Degree-Quant itself (DQ app. A.3; NUMERICS 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..features import SparseFeatures
from ..kernels.percentile import tails
from ..qtensor import QTensor, rounded_bits
from .base import ColumnQuantizer, InputCodes, LayerQuantizer, Scheduled, row_binary_codes
from .scheme import Scheme

MOMENTUM = 0.01
"""``c`` of Degree-Quant's eq. 2."""

SLACK = 2.0**-13
"""How much wider than its range a feature map is quantized, relatively. What an aggregation or a product gives, and its extremes, are multiples of
one step: without slack the two steps have a ratio of small integers, and sums lie exactly between two codes, where float rounding decides, and
decides otherwise on integers. Without slack 5 to 6 % of the codes of the first Linear of an untrained INT4 GIN layer differed (2,000 nodes of degree
16, 128 normal features, ranges of one batch), and ties decided 20,612 codes of an untrained INT4 GCN of two layers (20,000 nodes of degree 16, 128
features); with it none."""


def value_range(x: Tensor, percentile: float, sample: float) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of ``x`` after ``percentile`` of the values are clipped at each end (0: the extremes), both tensors of one
    element. Percentiles look at a random ``sample`` (0 to 1] of the values."""
    flat = x.detach().reshape(-1)
    if percentile <= 0:
        return flat.amin(), flat.amax()
    if sample < 1:
        flat = flat[torch.randint(flat.numel(), (max(1, int(flat.numel() * sample)),), device=flat.device)]
    low, high = tails(flat.float(), int(flat.numel() * percentile))
    return low, high


class RangeQuantizer(Scheduled):
    """Tracks the range of one tensor and quantizes the tensor with it. The range is widened to hold 0.

    - affine (``symmetric=False``, NUMERICS 5): ``value = scale * (code - zero)``, codes 0 to ``2^bits - 1``, rounding half to even.
    - symmetric (NUMERICS 1): the range ``[-m, m]``, ``step = m / Q``, codes ``-Q`` to ``Q``: what weights and the operand of an
    aggregation need to be multiplied and summed as plain integers.

    With ``slack`` the step is that much larger, relatively (:data:`SLACK`).
    """

    def __init__(self, scheme: Scheme, symmetric: bool, slack: float = 0.0) -> None:
        super().__init__(scheme)
        self.symmetric, self.slack = symmetric, slack
        self.register_buffer("low", torch.tensor(torch.nan))
        self.register_buffer("high", torch.tensor(torch.nan))
        self.low: Tensor
        self.high: Tensor

    @torch.no_grad()
    def observe(self, x: Tensor, protect: Tensor | None = None) -> None:
        """Updates the range with the rows of ``x`` that are not protected (they count as 0, which every range holds)."""
        if x.numel() == 0:
            return
        seen = x if protect is None else x.masked_fill(protect.unsqueeze(1), 0)
        new_low, new_high = value_range(seen, self.scheme.percentile, self.scheme.sample)
        for buffer, new, extreme in ((self.low, new_low, torch.minimum), (self.high, new_high, torch.maximum)):
            old = torch.where(buffer.isnan(), new, buffer)
            buffer.copy_(extreme(old, new) if self.scheme.observer == "minmax" else old + MOMENTUM * (new - old))

    def step(self) -> Tensor:
        """The step (float32, one element) of a symmetric quantizer, the scale of an affine one; 1 while the range is empty."""
        low, high = self._range()
        bits = self.width
        step = torch.maximum(-low, high) / (2 ** (bits - 1) - 1) if self.symmetric else (high - low) / (2**bits - 1)
        step = step * (1 + self.slack)
        return torch.where(step > 0, step, torch.ones_like(step)).reshape(1)

    def zero(self) -> Tensor:
        """The zero point (int32, one element) of an affine quantizer."""
        return torch.round(-self._range()[0] / self.step()).clamp(0, 2**self.width - 1).to(torch.int32)

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.low.nan_to_num(0).clamp_max(0), self.high.nan_to_num(0).clamp_min(0)

    def forward(self, x: Tensor, protect: Tensor | None = None) -> Tensor:
        if self.training or bool(self.low.isnan()):
            self.observe(x, protect)
        if not self.symmetric:
            return ops.fake_quantize_affine(
                x, self.step(), self.zero(), self.width, protect=protect, ste=self.scheme.ste
            )
        out = ops.fake_quantize(x, self.step(), float(self.width), gradient="local", ste=self.scheme.ste)
        return out if protect is None else torch.where(protect.unsqueeze(1), x, out)


class QATQuantizer(LayerQuantizer):
    """One range each for the input and the weight. Under Degree-Quant rows that ``protect`` marks keep their float input; weights are always
    quantized.

    Every tensor that moves through memory is quantized once: the operand of the aggregation carries the right factor of the normalisation, the
    left one is applied after the sum, and the output is quantized when the next layer reads it. So the trained model is the integer model. The
    last layer's output stays in float, as Degree-Quant's app. A.5.1 advises.
    """

    def __init__(self, in_channels: int, out_channels: int, scheme: Scheme) -> None:
        super().__init__(in_channels, out_channels, scheme)
        self.input = RangeQuantizer(scheme, symmetric=False, slack=SLACK)
        self.weight = RangeQuantizer(scheme, symmetric=True)

    def linear(self, x: Tensor | SparseFeatures, weight: Tensor) -> Tensor:
        if not self.enabled:
            return x @ weight.t()
        if self.see_input(x):
            # No zero point: the layer before then writes these codes in its epilogue, like non-negative ones, whose zero point is 0.
            self.input.symmetric = self.kind == "signed"
        weight_q = self._weight(weight).t()
        return x @ weight_q if self.kind == "binary" else self.input(x, self.protect) @ weight_q

    def _weight(self, weight: Tensor) -> Tensor:
        """The quantized weight; with noise, each element stays as it is with that probability, drawn anew in every training step (DQ app. A.3)."""
        quantized: Tensor = self.weight(weight)
        if not (self.training and self.scheme.noise):
            return quantized
        return torch.where(torch.rand_like(weight) < self.scheme.noise, weight, quantized)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.input.symmetric = self.kind == "signed"

    @torch.no_grad()
    def input_codes(self, x: Tensor | None) -> InputCodes:
        if self.kind == "binary":
            if x is None:
                raise ValueError("freezing a layer with a 0/1 input needs that input; pass data to freeze")
            return row_binary_codes(x)
        if self.kind == "unsigned" and int(self.input.zero()):
            raise ValueError(
                "the input of this layer was non-negative at first and was negative later; convert the model anew for such data"
            )
        scale = self.input.step()
        return InputCodes(scale, _width(self.width, scale), self.kind == "signed")

    @torch.no_grad()
    def weight_codes(self, weight: Tensor) -> QTensor:
        return QTensor.quantize(weight, self.weight.step(), float(self.width))

    def input_bits(self) -> Tensor | int:
        return self.width if self.enabled else 32


class RangeColumns(ColumnQuantizer):
    """One symmetric range for all columns: the messages of QAT and Degree-Quant."""

    def __init__(self, channels: int, scheme: Scheme, parameters: bool) -> None:
        super().__init__(channels, scheme, parameters)
        self.message = RangeQuantizer(scheme, symmetric=True, slack=SLACK)

    def forward(self, h: Tensor) -> Tensor:
        return self.message(h, self.protect) if self.enabled else h

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        step = self.message.step().expand(self.channels).contiguous()
        return step, _width(self.width, step)


def _width(width: int, step: Tensor) -> Tensor:
    return rounded_bits(torch.full_like(step, float(width)))
