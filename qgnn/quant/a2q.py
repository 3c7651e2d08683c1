"""A2Q: a learned step and width per node (A2Q sec. 3; NUMERICS 1 to 3)."""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..features import SparseFeatures
from ..kernels.quantize import largest_code
from ..qtensor import QTensor, rounded_bits
from .base import ColumnQuantizer, InputCodes, LayerQuantizer, row_binary_codes
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


def bits_by_degree(in_degree: Tensor, mean: float) -> Tensor:
    """Widths by in-degree (A2Q app. A.6.1): with a mean of 2.2 the fifth of the nodes with the highest in-degree get 3 bits, the others 2."""
    low = math.floor(mean)
    order = torch.argsort(in_degree, descending=True, stable=True)
    bits = torch.full(in_degree.shape, float(low), device=in_degree.device)
    bits[order[: round((mean - low) * order.numel())]] += 1
    return bits


def drawn_steps(like: Tensor, mean: float) -> Tensor:
    """Steps as A2Q starts them, drawn from N(mean, mean) (app. A.6); their magnitude, since a step is positive."""
    return torch.normal(mean, mean, like.shape, device=like.device).abs().clamp_min(SMALLEST_STEP)


class LearnedQuantizer(LayerQuantizer):
    """What the two A2Q quantizers share: a weight of 4 bits with a learned step per output, and how steps and widths start.

    Steps are kept positive by learning their logarithm. They start from the first batch that is seen while ``enabled``, or, if ``initial_step``
    is not 0, as the paper draws them; the widths have the mean ``initial_bits``, and all are that where they do not learn.
    """

    def __init__(self, in_channels: int, out_channels: int, scheme: Scheme, rows: int) -> None:
        super().__init__(in_channels, out_channels, scheme)
        self.initial_bits, self.initial_step = 4.0, 0.0
        self.bits = nn.Parameter(torch.full((rows,), self.initial_bits), requires_grad=scheme.learn_bits)
        self.log_step = nn.Parameter(torch.zeros(rows), requires_grad=scheme.learn_steps)
        self.log_weight_step = nn.Parameter(torch.zeros(out_channels), requires_grad=scheme.learn_steps)
        self.register_buffer("weight_bits", torch.tensor(float(scheme.bits)), persistent=False)
        self.weight_bits: Tensor

    def linear(self, x: Tensor | SparseFeatures, weight: Tensor) -> Tensor:
        if not self.enabled:
            return x @ weight.t()
        if self.scheme.learn_input and isinstance(x, SparseFeatures):
            x = x.to_dense()
        starts = self.see_input(x)
        if starts:
            self._start_weight(weight)
        weight_q = ops.fake_quantize(weight, self.log_weight_step.exp(), self.weight_bits)
        if self.kind == "binary":
            return x @ weight_q.t()
        assert isinstance(x, Tensor), "what stays sparse is of the binary kind"
        if starts:
            self._start_input(x)
        return self.product(x, weight_q.t())

    @torch.no_grad()
    def _start_weight(self, weight: Tensor) -> None:
        step = self.initial_step
        start = drawn_steps(self.log_weight_step, step) if step else steps_by_error(weight, self.weight_bits, True)
        self.log_weight_step.copy_(start.log())

    @abstractmethod
    def _start_input(self, x: Tensor) -> None:
        """Sets ``bits`` and ``log_step`` from the first batch."""

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The quantized ``x`` ``[N, in]`` times the quantized ``weight`` ``[in, out]``."""

    @abstractmethod
    def width_sum(self) -> tuple[Tensor, int]:
        """Sum of the real widths of the last training batch's nodes, differentiable, and the number of these nodes."""

    @torch.no_grad()
    def weight_codes(self, weight: Tensor) -> QTensor:
        return QTensor.quantize(weight, self.log_weight_step.exp(), self.weight_bits)


class A2QQuantizer(LearnedQuantizer):
    """Node level: a step and a width for every node of one graph. A batch of nodes that knows which they are (``nodes``) takes theirs."""

    def __init__(self, in_channels: int, out_channels: int, scheme: Scheme, num_nodes: int) -> None:
        super().__init__(in_channels, out_channels, scheme, num_nodes)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        log_step: Tensor = self.log_step
        bits: Tensor = self.bits
        if self.nodes is not None:
            log_step, bits = log_step[self.nodes], bits[self.nodes]
        elif x.size(0) != bits.numel():
            raise ValueError(
                f"this layer has steps for {bits.numel()} nodes and got {x.size(0)}; "
                f"node-level A2Q is tied to its graph: convert with num_nodes={x.size(0)}, or use scheme a2q-nns"
            )
        step, signed, ste = log_step.exp(), self.kind == "signed", self.scheme.ste
        if self.scheme.gradient == "global":
            return ops.fake_quantize(x, step, bits, signed=signed, ste=ste) @ weight
        return ops.quantized_linear(x, weight, step, bits, signed=signed, ste=ste)

    @torch.no_grad()
    def _start_input(self, x: Tensor) -> None:
        if self.nodes is not None:
            raise ValueError(
                "steps and widths of all nodes start from a pass over the whole graph; make one before the first sampled batch"
            )
        if x.size(0) != self.bits.numel():
            return  # product says what is wrong
        if self.scheme.manual:
            if self.in_degree is None:
                raise ValueError("widths by in-degree need a graph: -manual is for layers of a convolution")
            self.bits.copy_(bits_by_degree(self.in_degree, self.initial_bits))
        elif self.initial_step or not self.scheme.learn_bits:
            self.bits.fill_(self.initial_bits)
        else:
            self.bits.copy_(bits_for_equal_steps(x, self.initial_bits))
        if self.initial_step:
            self.log_step.copy_(drawn_steps(self.log_step, self.initial_step).log())
        else:
            self.log_step.copy_(steps_from_max(x, self.bits, self.kind == "signed").log())

    @torch.no_grad()
    def input_codes(self, x: Tensor | None) -> InputCodes:
        if self.kind == "binary":
            if x is None:
                raise ValueError("freezing a layer with a 0/1 input needs that input; pass data to freeze")
            return row_binary_codes(x)
        return InputCodes(self.log_step.exp(), rounded_bits(self.bits), self.kind == "signed")

    def width_sum(self) -> tuple[Tensor, int]:
        return self.bits.sum(), self.bits.numel()

    def input_bits(self) -> Tensor | int:
        return rounded_bits(self.bits) if self.enabled else 32


class LearnedColumns(ColumnQuantizer):
    """4 bits and a learned step per column: the operand of an aggregation, quantized as weights are (A2Q sec. 3.1).

    At node level its gradient is the local one, which keeps no copy of the operand; attention vectors, and graph level, take the global one.
    """

    def __init__(self, channels: int, scheme: Scheme, parameters: bool) -> None:
        super().__init__(channels, scheme, parameters)
        self.gradient: Literal["local", "global"] = "global" if parameters else scheme.gradient
        self.initial_step = 0.0
        self.log_operand_step = nn.Parameter(torch.zeros(channels), requires_grad=scheme.learn_steps)
        self.register_buffer("bits", torch.tensor(float(scheme.bits)), persistent=False)
        self.bits: Tensor
        self.ready = False

    def get_extra_state(self) -> dict[str, object]:
        return {"ready": self.ready}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.ready = state["ready"]

    def forward(self, h: Tensor) -> Tensor:
        if not self.enabled:
            return h
        if not self.ready:
            self._start(h)
        return ops.fake_quantize(
            h, self.log_operand_step.exp(), self.bits, axis="col", gradient=self.gradient, ste=self.scheme.ste
        )

    @torch.no_grad()
    def _start(self, h: Tensor) -> None:
        step = self.initial_step
        start = (
            drawn_steps(self.log_operand_step, step)
            if step
            else steps_by_error(h.t().contiguous(), self.bits.expand(self.channels), True)
        )
        self.log_operand_step.copy_(start.log())
        self.ready = True

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Tensor]:
        return self.log_operand_step.exp(), rounded_bits(self.bits.expand(self.channels))


def learned_layers(model: nn.Module) -> Iterable[LearnedQuantizer]:
    """The quantizers with a step and a width per node or group: those of every A2Q layer with a quantized input."""
    return (
        m for m in model.modules() if isinstance(m, LearnedQuantizer) and m.enabled and m.kind in ("signed", "unsigned")
    )


def start_values(model: nn.Module, bits: float, step: float) -> None:
    """How the quantizers of ``model`` start when they see their first batch: mean width, and the mean of the steps that are drawn as in the
    paper (0: steps are taken from the data)."""
    for module in model.modules():
        if isinstance(module, LearnedQuantizer | LearnedColumns):
            module.initial_step = step
        if isinstance(module, LearnedQuantizer):
            module.initial_bits = bits


def average_width(model: nn.Module) -> float:
    """Mean over the layers with learned widths of the mean rounded width over the nodes; 0 without such layers."""
    widths = [float(b.float().mean()) for q in learned_layers(model) if isinstance(b := q.input_bits(), Tensor)]
    return statistics.fmean(widths) if widths else 0.0


def learned_kb(model: nn.Module, bits: float) -> float:
    """KB of the learned feature maps of the last training batch if every width were ``bits``."""
    return sum(q.in_channels * q.width_sum()[1] for q in learned_layers(model)) * bits / (8 * 1024)


def memory_kb(model: nn.Module) -> Tensor:
    """Memory of the learned feature maps in KB, differentiable in the widths (A2Q eq. 5): ``sum_l sum_i dim_l * b_i^l / (8 * 1024)``. With the
    nearest neighbour strategy the nodes are those of the last training batch."""
    sizes = [q.in_channels * q.width_sum()[0] for q in learned_layers(model)]
    return torch.stack(sizes).sum() / (8 * 1024) if sizes else torch.zeros(())


def memory_penalty(model: nn.Module, target_kb: float, penalty: Literal["square", "relu"] = "square") -> Tensor:
    """``(memory - target)^2`` (A2Q eq. 5), in KB^2; with ``penalty="relu"`` only the excess over the target is squared."""
    if penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {PENALTIES}, got {penalty!r}")
    excess = memory_kb(model) - target_kb
    return (excess.clamp_min(0) if penalty == "relu" else excess).square()
