"""How the width of quantized training changes while it runs: SDQ and ADQ (NUMERICS 6). Both are pure functions of what the training curve holds, so
that a resumed run goes on with the widths of the uninterrupted one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class SDQ:
    """Static dynamic quantization (Bqain): each of ``widths`` for an equal share of the training, in their order.

    Raises:
        ValueError: no widths.
    """

    widths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.widths:
            raise ValueError("sdq needs at least one width, as in sdq:8,6,4,4")

    def width(self, epoch: int, total: int, losses: Sequence[float], patience: int) -> int:
        """The width of ``epoch`` (from 0) of ``total``. Share ``i`` of ``n`` starts with epoch ``ceil(i * total / n)``, so that shares differ by at
        most one epoch; of more widths than epochs some are left out. ``losses`` and ``patience`` are for ADQ."""
        return self.widths[epoch * len(self.widths) // total]


@dataclass(frozen=True)
class ADQ:
    """Active dynamic quantization (Bqain): from the first of ``widths`` up to the last, one more whenever the validation loss stops improving.

    Raises:
        ValueError: the last width is smaller than the first.
    """

    widths: tuple[int, int]

    def __post_init__(self) -> None:
        if self.widths[0] > self.widths[1]:
            raise ValueError(f"adq goes up from one width to another, got {self.widths[0]} to {self.widths[1]}")

    def width(self, epoch: int, total: int, losses: Sequence[float], patience: int) -> int:
        """The width of ``epoch`` (from 0), after validation losses ``losses`` (one for each epoch; those from ``epoch`` on are not looked at): one
        more after every ``patience`` epochs in a row without a loss below all earlier ones. NaN is no such loss. ``total`` is for SDQ."""
        width, best, waited = self.widths[0], float("inf"), 0
        for loss in losses[:epoch]:
            if loss < best:
                best, waited = loss, 0
                continue
            waited += 1
            if waited == patience:
                width, waited = min(width + 1, self.widths[1]), 0
        return width


Schedule = SDQ | ADQ
