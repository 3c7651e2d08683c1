"""What a benchmark is: candidates that compute the same, each checked before any is timed, and one row for each, failed ones too."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .timing import Timing, paired

Run = Callable[[], Any]
Status = Literal["ok", "wrong", "does not fit", "failed"]

BUDGET = 4.0
"""Seconds that a candidate is timed for: the whole CPU suite takes about ten minutes on two cores (:func:`qgnn.perf.timing.paired`)."""


class WrongResult(Exception):
    """A candidate computes something else than the reference."""


class DoesNotFit(Exception):
    """A candidate would need more memory than there is for it."""


@dataclass(frozen=True)
class Candidate:
    """One of those compared.

    Attributes:
        name: who computes, by what path, at which precision: "torch-csr-fp32", "qgnn-int8".
        build: makes whatever is kept between calls, and returns what is timed. What it raises is the reason of a failed row.
        accept: raises :class:`WrongResult` unless it is given the right result.
    """

    name: str
    build: Callable[[], Run]
    accept: Callable[[Any], None]


def ready(name: str, run: Run, accept: Callable[[Any], None]) -> Candidate:
    """A candidate that has nothing to make beforehand."""
    return Candidate(name, lambda: run, accept)


@dataclass(frozen=True)
class Case:
    """Candidates that take turns on one shape; the first is the baseline of the ratios."""

    shape: str
    candidates: list[Candidate]


@dataclass(frozen=True)
class Benchmark:
    """A row of the registry.

    Attributes:
        operation: its name in the results.
        suites: the suites it belongs to.
        shapes: what :attr:`cases` is called with: names of data sets where :attr:`on_graphs` is true, else sizes.
        inputs: which operands, made how.
        baseline: the first candidate, with the reason.
        gate: what every result is compared with before it is timed.
        tests: the test file that has to pass before a number is printed; ``make bench`` runs it.
        cases: module and function of this package that give the :class:`Case` s of a shape on a device, "cpu" or "cuda". Imported when they run: a
            library that is missing fails the benchmarks that need it only.
    """

    operation: str
    suites: tuple[str, ...]
    shapes: tuple[Any, ...]
    inputs: str
    baseline: str
    gate: str
    tests: str
    cases: str
    on_graphs: bool = False


@dataclass(frozen=True)
class Row:
    """What became of a candidate: its paired time, or the reason why there is none."""

    operation: str
    shape: str
    candidate: str
    baseline: str
    status: Status
    reason: str = ""
    timing: Timing | None = None


def measure(operation: str, case: Case, rounds: int, device: str) -> list[Row]:
    """One row for each candidate: checked, then timed in turns with the others that passed."""
    runs: dict[str, Run] = {}
    refused: dict[str, tuple[Status, str]] = {}
    for candidate in case.candidates:
        try:
            run = candidate.build()
            candidate.accept(run())  # the first call, which compiles and fills caches: it is the warm-up, too
            runs[candidate.name] = run
        except Exception as error:  # a candidate that fails is a row, and the others go on
            refused[candidate.name] = reason(error)
    baseline = case.candidates[0].name
    timings: dict[str, Timing] = {}
    if baseline in runs:
        timings = paired(runs, rounds, warmup=1, device=device, budget=BUDGET)
    else:
        refused |= dict.fromkeys(runs, ("failed", f"there is no baseline: {baseline} failed"))
    return [
        Row(operation, case.shape, c.name, baseline, "ok", timing=timings[c.name])
        if c.name in timings
        else Row(operation, case.shape, c.name, baseline, *refused[c.name])
        for c in case.candidates
    ]


def reason(error: Exception) -> tuple[Status, str]:
    """Status and one line for a candidate that raised."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, WrongResult):
        return "wrong", text
    if isinstance(error, DoesNotFit):
        return "does not fit", text
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return "does not fit", f"{type(error).__name__}: {text}"
    return "failed", f"{type(error).__name__}: {text}"


def message_limit(device: str) -> int:
    """Bytes of messages, ``edges * features * 4``, that a candidate may make: a third of the memory, since a layer holds them twice, before and
    after they are weighted, beside everything else."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1]) // 3
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 3


def check_messages(edges: int, features: int, device: str) -> None:
    """Raises :class:`DoesNotFit` if the messages along all edges are more than :func:`message_limit`."""
    needed, limit = edges * features * 4, message_limit(device)
    if needed > limit:
        raise DoesNotFit(
            f"{edges:,} messages of {features} features are {needed / 1e9:.1f} GB; the limit is {limit / 1e9:.1f} GB"
        )


UNIT = 2.0**-24
"""Largest relative error of one operation in FP32."""


def within(expected: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[Any], None]:
    """Accepts a result that differs from the expected one by at most a bound, both element by element."""

    def accept(result: Any) -> None:
        wanted, bound = expected()
        excess = (torch.as_tensor(result) - wanted).abs() > bound
        excess |= torch.as_tensor(result).isnan()
        if bool(excess.any()):
            raise WrongResult(f"{int(excess.sum()):,} of {wanted.numel():,} values are wrong by more than rounding")

    return accept


def close_in_norm(expected: Callable[[], Tensor], tolerance: float) -> Callable[[Any], None]:
    """Accepts a result whose difference has a norm of at most ``tolerance`` times the norm of the expected one."""

    def accept(result: Any) -> None:
        wanted = expected().double()
        error = float((result.double() - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny))
        if not error <= tolerance:  # NaN is no better
            raise WrongResult(f"wrong by {error:.1e} of the norm (tolerance {tolerance:.1e})")

    return accept


def equal_to(expected: Callable[[], Tensor]) -> Callable[[Any], None]:
    """Accepts a result that is the same to the bit; of several tensors, stacked."""

    def accept(result: Any) -> None:
        found = torch.stack(result) if isinstance(result, tuple) else result
        if not torch.equal(found, expected()):
            raise WrongResult("differs from the reference, which it must equal to the bit")

    return accept
