"""A2Q: a learned step and width per node (A2Q sec. 3; NUMERICS 1 to 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..features import SparseFeatures
from ..kernels.quantize import largest_code
from ..qtensor import QTensor, rounded_bits
from .base import InputCodes, LayerQuantizer, row_binary_codes
from .scheme import Scheme

SMALLEST_STEP = 1e-8
"""Rows whose step would be smaller count as zero when steps are taken from data."""

PENALTIES = ("square", "relu")


def steps_from_max(values: Tensor, bits: Tensor, signed: bool) -> Tensor:
    """Steps whose largest code reaches the largest magnitude of each row, ``max |x| / Q``. A row of zeros gets the median step of the others."""
    if not values.numel():
        return values.new_ones(values.size(0))
    q = largest_code(rounded_bits(bits), signed).clamp_min(1)
    step = values.abs().amax(1) / q
    used = step > SMALLEST_STEP
    return torch.where(used, step, step[used].median() if bool(used.any()) else torch.ones_like(step))


def steps_by_error(values: Tensor, bits: Tensor, signed: bool, candidates: int = 40) -> Tensor:
    """Steps that minimise each row's squared quantization error, searched between ``1 / candidates`` and 1 of :func:`steps_from_max`."""
    widths = rounded_bits(bits).float()
    full = steps_from_max(values, bits, signed)
    best, best_error = full, torch.full_like(full, torch.inf)
    for k in range(1, candidates + 1):
        step = full * (k / candidates)
        error = (ops.fake_quantize(values, step, widths, signed=signed) - values).square().sum(1)
        best, best_error = torch.where(error < best_error, step, best), torch.minimum(error, best_error)
    return best


def bits_for_equal_steps(values: Tensor, mean: float, lowest: float = 1.0, highest: float = 8.0) -> Tensor:
    """Widths that would give every row the same step: ``b_i = t + log2 max |x_i|``, clamped, with ``t`` such that their mean is ``mean``.

    Rows of larger values, which are those of higher in-degree after an aggregation (A2Q figure 1), start with more bits.
    """
    if not values.numel():
        return values.new_full((values.size(0),), mean)
    size = values.abs().amax(1).clamp_min(SMALLEST_STEP).log2()
    low, high = float(lowest - size.max()), float(highest - size.min())
    for _ in range(50):
        middle = (low + high) / 2
        above = float((size + middle).clamp(lowest, highest).mean()) > mean
        low, high = (low, middle) if above else (middle, high)
    return (size + low).clamp(lowest, highest)


class A2QQuantizer(LayerQuantizer):
    """Input: step and width per node, local gradient. Weight: 4 bits, a step per output. Operand of the aggregation: 4 bits, a step per column.

    Steps are kept positive by learning their logarithm. Steps and widths start from the first batch that is seen while ``enabled``; the widths have
    the mean ``initial_bits``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, scheme: Scheme, num_nodes: int, initial_bits: float = 4.0
    ) -> None:
        super().__init__(in_channels, out_channels, scheme)
        self.initial_bits = initial_bits
        self.bits = nn.Parameter(torch.full((num_nodes,), initial_bits))
        self.log_step = nn.Parameter(torch.zeros(num_nodes))
        self.log_weight_step = nn.Parameter(torch.zeros(out_channels))
        self.log_operand_step = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("fixed_bits", torch.tensor(float(scheme.bits)), persistent=False)
        self.fixed_bits: Tensor
        self.operand_ready = False

    def get_extra_state(self) -> dict[str, object]:
        return {**super().get_extra_state(), "operand_ready": self.operand_ready}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.operand_ready = state["operand_ready"]

    def linear(self, x: Tensor | SparseFeatures, weight: Tensor, protect: Tensor | None) -> Tensor:
        if not self.enabled:
            return x @ weight.t()
        if x.size(0) != self.bits.numel():
            raise ValueError(
                f"this layer has steps for {self.bits.numel()} nodes and got {x.size(0)}; "
                f"node-level A2Q is tied to its graph: convert with num_nodes={x.size(0)}"
            )
        starts = self.see_input(x)
        if starts:
            self._start_weight(weight)
        weight_q = ops.fake_quantize(weight, self.log_weight_step.exp(), self.fixed_bits)
        if self.kind == "binary":
            return x @ weight_q.t()
        assert isinstance(x, Tensor), "sparse features are always of the binary kind"
        if starts:
            self._start_input(x)
        return ops.quantized_linear(
            x, weight_q.t(), self.log_step.exp(), self.bits, signed=self.kind == "signed", ste=self.scheme.ste
        )

    @torch.no_grad()
    def _start_weight(self, weight: Tensor) -> None:
        self.log_weight_step.copy_(steps_by_error(weight, self.fixed_bits, True).log())

    @torch.no_grad()
    def _start_input(self, x: Tensor) -> None:
        self.bits.copy_(bits_for_equal_steps(x, self.initial_bits))
        self.log_step.copy_(steps_from_max(x, self.bits, self.kind == "signed").log())

    def operand(self, h: Tensor, protect: Tensor | None) -> Tensor:
        if not self.enabled:
            return h
        if not self.operand_ready:
            with torch.no_grad():
                self.log_operand_step.copy_(steps_by_error(h.t().contiguous(), self.fixed_bits, True).log())
            self.operand_ready = True
        return ops.fake_quantize(
            h, self.log_operand_step.exp(), self.fixed_bits, axis="col", gradient="local", ste=self.scheme.ste
        )

    @torch.no_grad()
    def input_codes(self, x: Tensor | None) -> InputCodes:
        if self.kind == "binary":
            if x is None:
                raise ValueError("freezing a layer with a 0/1 input needs that input; pass data to freeze")
            return row_binary_codes(x)
        return InputCodes(self.log_step.exp(), rounded_bits(self.bits), self.kind == "signed")

    @torch.no_grad()
    def weight_codes(self, weight: Tensor) -> QTensor:
        return QTensor.quantize(weight, self.log_weight_step.exp(), self.fixed_bits)

    @torch.no_grad()
    def operand_codes(self) -> tuple[Tensor, Tensor]:
        return self.log_operand_step.exp(), rounded_bits(self.fixed_bits.expand(self.out_channels))

    def input_bits(self) -> Tensor | int:
        return rounded_bits(self.bits) if self.enabled else 32


def learned_layers(model: nn.Module) -> Iterable[A2QQuantizer]:
    """The quantizers whose widths are learned: those of every A2Q layer with a quantized input."""
    return (
        m for m in model.modules() if isinstance(m, A2QQuantizer) and m.enabled and m.kind in ("signed", "unsigned")
    )


def memory_kb(model: nn.Module) -> Tensor:
    """Memory of the learned feature maps in KB, differentiable in the widths (A2Q eq. 5): ``sum_l sum_i dim_l * b_i^l / (8 * 1024)``."""
    sizes = [q.in_channels * q.bits.sum() for q in learned_layers(model)]
    return torch.stack(sizes).sum() / (8 * 1024) if sizes else torch.zeros(())


def memory_penalty(model: nn.Module, target_kb: float, penalty: Literal["square", "relu"] = "square") -> Tensor:
    """``(memory - target)^2`` (A2Q eq. 5), in KB^2; with ``penalty="relu"`` only the excess over the target is squared."""
    if penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {PENALTIES}, got {penalty!r}")
    excess = memory_kb(model) - target_kb
    return (excess.clamp_min(0) if penalty == "relu" else excess).square()
