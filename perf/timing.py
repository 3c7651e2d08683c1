"""Paired timing: what is compared runs in turns in one process, so that a busy machine slows both alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

QUANTILES = (0.2, 0.5, 0.8)
TURN = 1e-3
"""Seconds that a turn should take: a faster candidate runs several times in it, so that neither the timer nor the caches that the candidate before it
left behind decide."""
LEAST_MS = 1e-6
"""A time that is shorter is the clock's resolution."""
LEAST_ROUNDS = 3
"""Rounds that a candidate takes part in, however slow it is: fewer have no quantiles."""


@dataclass(frozen=True)
class Timing:
    """Times of one candidate: quantiles 20, 50 and 80 % in milliseconds, and of its ratio to the baseline, round by round; None where there is
    no baseline."""

    ms: tuple[float, float, float]
    ratio: tuple[float, float, float] | None
    rounds: int


def paired(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    warmup: int = 3,
    device: str = "cpu",
    budget: float = math.inf,
) -> dict[str, Timing]:
    """Times every candidate once a round, in turn. The first one is the baseline; ratios are baseline over candidate, so above 1 is faster.

    On a GPU the clock is that of its events, one before a turn and one after it: what the processor takes to launch counts where the GPU waits for
    it. A candidate that has spent ``budget`` seconds sits out the rounds that are left, after :data:`LEAST_ROUNDS`; when the baseline has, all
    are done. Ratios are of the rounds that both took part in.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    first = next(iter(candidates))

    def spent(name: str) -> bool:
        return len(times[name]) >= LEAST_ROUNDS and sum(times[name]) * calls[name] > budget * 1e3

    calls = dict.fromkeys(candidates, 1)
    for i in range(warmup + rounds):
        if spent(first):
            break
        for name, run in candidates.items():
            if name != first and spent(name):
                continue
            seconds = _turn(run, calls[name], device)
            if i >= warmup:
                times[name].append(seconds * 1e3)
            else:
                calls[name] = max(1, int(TURN / max(seconds, 1e-9)))
    return {
        name: Timing(
            _quantiles(ms), _quantiles([b / max(t, LEAST_MS) for b, t in zip(times[first], ms, strict=False)]), len(ms)
        )
        for name, ms in times.items()
    }


def _turn(run: Callable[[], object], calls: int, device: str) -> float:
    """Seconds of one of ``calls`` calls."""
    if device == "cuda":
        torch.cuda.synchronize()
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        for _ in range(calls):
            run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3 / calls
    started = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - started) / calls


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, QUANTILES)
    return float(low), float(middle), float(high)
