"""A2Q's nearest neighbour strategy: groups of steps and widths for graphs that training never saw (A2Q sec. 3.3, algorithm 1; NUMERICS 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..kernels.nearest import fake_quantize_nearest, group_table
from ..kernels.quantize import largest_code
from ..qtensor import rounded_bits
from .a2q import SMALLEST_STEP, LearnedQuantizer, bits_for_equal_steps, drawn_steps
from .base import InputCodes
from .scheme import Scheme


class GroupQuantizer(LearnedQuantizer):
    """Graph level: ``groups`` pairs of a step and a width. A node takes the pair whose largest value is nearest to its own largest magnitude.

    ``usage`` ``[groups]`` counts the nodes that took each pair in evaluation, from :func:`reset_usage` on: the average width is theirs.
    """

    def __init__(self, in_channels: int, out_channels: int, scheme: Scheme) -> None:
        super().__init__(in_channels, out_channels, scheme, scheme.groups)
        self.register_buffer("usage", torch.zeros(scheme.groups, dtype=torch.int64))
        self.usage: Tensor
        self.counting = False
        self.rows, self.counts = 0, torch.zeros(scheme.groups, dtype=torch.int64)
        self._known: tuple[tuple[object, ...], tuple[Tensor, ...]] | None = None

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        signed = self.kind == "signed"
        if torch.is_grad_enabled():
            step, ste = self.log_step.exp(), self.scheme.ste
            x_q, group = ops.fake_quantize_nearest(x, step, self.bits, signed=signed, ste=ste)
        else:
            bounds, order, step, widths = self._table(signed)
            x_q, _, group = fake_quantize_nearest(x, bounds, order, step, widths, signed)
        if self.training:
            self.rows, self.counts = (
                x.size(0),
                torch.zeros_like(self.usage).index_add_(0, group, torch.ones_like(group)),
            )
        elif self.counting:
            self.usage.index_add_(0, group, torch.ones_like(group))
        return x_q @ weight

    def _table(self, signed: bool) -> tuple[Tensor, ...]:
        """Sorted bounds of the groups, their steps and widths: made once, as long as no parameter changes (A2Q sec. 3.3)."""
        parameters = (self.bits, self.log_step)
        version = (*((p._version, p.data_ptr()) for p in parameters), signed)
        if self._known is None or self._known[0] != version:
            step, widths = self.log_step.exp(), rounded_bits(self.bits)
            self._known = (version, (*group_table(step * largest_code(widths, signed)), step, widths))
        return self._known[1]

    @torch.no_grad()
    def _start_input(self, x: Tensor) -> None:
        """The groups' largest values are spread over the rows' largest magnitudes, so that each group serves equally many nodes at first."""
        if not x.size(0):
            return
        place = torch.linspace(0, max(x.size(0) - 1, 0), self.bits.numel(), device=x.device).round().long()
        largest = torch.sort(x.abs().amax(1)).values[place].clamp_min(SMALLEST_STEP)
        if self.initial_step or not self.scheme.learn_bits:
            self.bits.fill_(self.initial_bits)
        else:
            self.bits.copy_(bits_for_equal_steps(largest.unsqueeze(1), self.initial_bits, lowest=2.0))
        if self.initial_step:
            self.log_step.copy_(drawn_steps(self.log_step, self.initial_step).log())
            return
        self.log_step.copy_((largest / largest_code(rounded_bits(self.bits), self.kind == "signed").clamp_min(1)).log())

    def input_codes(self, x: Tensor | None) -> InputCodes:
        raise ValueError("the nearest neighbour strategy chooses steps as values come: it has no fixed codes to freeze")

    def width_sum(self) -> tuple[Tensor, int]:
        return (self.counts.to(self.bits) * self.bits).sum(), self.rows

    def input_bits(self) -> Tensor | int:
        """Width of every node that was counted.

        Raises:
            ValueError: none was.
        """
        if not self.enabled:
            return 32
        if not bool(self.usage.any()):
            raise ValueError(
                "no node was counted yet: call qgnn.quant.reset_usage(model), evaluate the model, and ask again"
            )
        return rounded_bits(self.bits).repeat_interleave(self.usage)

    def reset_usage(self) -> None:
        """Counts anew."""
        self.usage.zero_()
        self.counting = True


def reset_usage(model: nn.Module) -> None:
    """Counts anew which groups are used, and how many nodes and graphs are seen, for a pass over the data that widths and bytes are to be counted on.
    Inference alone counts no groups."""
    for module in model.modules():
        reset = getattr(module, "reset_usage", None)
        if callable(reset):
            reset()
