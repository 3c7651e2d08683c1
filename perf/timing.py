"""Paired timing: what is compared runs in turns in one process, so that a busy machine slows both alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

QUANTILES = (0.2, 0.5, 0.8)


@dataclass(frozen=True)
class Timing:
    """Times of one candidate: quantiles 20, 50 and 80 % in milliseconds, and of its ratio to the baseline, round by round."""

    ms: tuple[float, float, float]
    ratio: tuple[float, float, float]


def paired(
    candidates: Mapping[str, Callable[[], object]], rounds: int = 30, warmup: int = 3, device: str = "cpu"
) -> dict[str, Timing]:
    """Times every candidate once a round, in turn. The first one is the baseline; ratios are baseline over candidate, so above 1 is faster.

    On a GPU every call is followed by a synchronisation, which the time includes.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name, run in candidates.items():
            _wait(device)
            started = time.perf_counter()
            run()
            _wait(device)
            if i >= warmup:
                times[name].append((time.perf_counter() - started) * 1e3)
    baseline = next(iter(times.values()))
    return {
        name: Timing(_quantiles(ms), _quantiles([b / t for b, t in zip(baseline, ms, strict=True)]))
        for name, ms in times.items()
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    low, middle, high = np.quantile(values, QUANTILES)
    return float(low), float(middle), float(high)
