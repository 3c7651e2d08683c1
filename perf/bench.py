"""What a benchmark is: candidates that compute the same, each checked before any is timed, and one row for each, failed ones too."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..memory import allocated_peak
from .targets import TWICE
from .timing import Timing, paired

Run = Callable[[], Any]
Status = Literal["ok", "wrong", "does not fit", "failed"]

BUDGET = 4.0
"""Seconds that a candidate is timed for: the whole CPU suite takes about ten minutes on two cores (:func:`qgnn.perf.timing.paired`)."""
JOULES_SECONDS = 1.0
"""Window of a measurement of energy; the counter is renewed every 20 to 100 ms."""


class WrongResult(Exception):
    """A candidate computes something else than the reference."""


class DoesNotFit(Exception):
    """A candidate would need more memory than there is for it."""


class LostDevice(Exception):
    """The GPU takes no more work from this process, as after an illegal access: only a new process can go on."""


@dataclass(frozen=True)
class Work:
    """Bytes that a call reads from and writes to memory if nothing is cached, and its operations, an addition and a multiplication each one."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class Candidate:
    """One of those compared.

    Attributes:
        name: who computes, by what path, at which precision: "torch-csr-fp32", "qgnn-int8".
        build: makes whatever is kept between calls, and returns what is timed. What it raises is the reason of a failed row.
        accept: raises :class:`WrongResult` unless it is given the right result.
        work: what a call has to move and to compute at least.
    """

    name: str
    build: Callable[[], Run]
    accept: Callable[[Any], None]
    work: Work | None = None


def ready(name: str, run: Run, accept: Callable[[Any], None]) -> Candidate:
    """A candidate that has nothing to make beforehand."""
    return Candidate(name, lambda: run, accept)


@dataclass(frozen=True)
class Case:
    """Candidates that take turns on one shape; the first is the baseline of the ratios.

    Attributes:
        timed: False for a check alone.
        memory: whether the peak of allocated memory is measured, too.
        energy: whether energy is measured, too, where there is a meter.
    """

    shape: str
    candidates: list[Candidate]
    timed: bool = True
    memory: bool = False
    energy: bool = False


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
        first: how many of the shapes the suite "gpu" measures before any others of all benchmarks.
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
    first: int = 0


@dataclass(frozen=True)
class Row:
    """What became of a candidate: its paired time, or the reason why there is none; ``peak`` bytes and joules a call where they were measured."""

    operation: str
    shape: str
    candidate: str
    baseline: str
    status: Status
    reason: str = ""
    timing: Timing | None = None
    work: Work | None = None
    peak: int | None = None
    joules: float | None = None


Refused = dict[str, tuple[Status, str]]


@dataclass(frozen=True)
class Limits:
    """How long and how a case is measured.

    Attributes:
        rounds, budget: rounds at most; seconds that a candidate is timed for (:func:`qgnn.perf.timing.paired`). No round is a check alone.
        joules: joules of a call, measured over so many seconds; raises ValueError where they cannot be. None: nobody asks.
        refused: candidates that are not to be run again, and why.
        show: told the name of each candidate before it runs, and "" before the turns.
    """

    rounds: int
    budget: float = BUDGET
    joules: Callable[[Run, float], float] | None = None
    refused: Mapping[str, tuple[Status, str]] = field(default_factory=dict)
    show: Callable[[str], None] = lambda _: None


def measure(operation: str, case: Case, limits: Limits, device: str) -> list[Row]:
    """One row for each candidate: checked, then timed in turns with the others that passed. Without a baseline there are times and no ratios.

    Raises:
        LostDevice: no candidate can be run any more in this process.
    """
    runs: dict[str, Run] = {}
    refused: Refused = dict(limits.refused)
    for candidate in case.candidates:
        if candidate.name in refused:
            continue
        limits.show(candidate.name)
        try:
            run = _checked(candidate, twice=limits.rounds > 0)
        except Exception as error:  # a candidate that fails is a row, and the others go on
            refused[candidate.name] = reason(error)
            _check_device(device, error)
            error.__traceback__ = None  # its frames hold what the candidate made
            make_room(device)
        else:
            runs[candidate.name] = partial(_guarded, candidate.name, run, refused, device)
    limits.show("")
    baseline = case.candidates[0].name
    timings: dict[str, Timing] = {}
    if runs and case.timed and limits.rounds:
        timings = paired(runs, limits.rounds, warmup=1, device=device, budget=limits.budget)
        if baseline in refused:
            timings = {name: replace(timing, ratio=None) for name, timing in timings.items()}
    rows = []
    for candidate in case.candidates:
        name = candidate.name
        found = {} if name in refused else _consumption(runs[name], case, limits, device)
        row = Row(operation, case.shape, name, baseline, *refused.get(name, ("ok", "")))
        if row.status == "ok":
            row = replace(row, timing=timings.get(name), work=candidate.work, **found)
        rows.append(row)
    return rows


def _checked(candidate: Candidate, twice: bool) -> Run:
    """What is timed, after its result was accepted; ``twice``: ours runs a second time, and the results have to be the same to the bit."""
    run = candidate.build()
    result = run()  # the first call, which compiles and fills caches: it is the warm-up, too
    candidate.accept(result)
    if twice and candidate.name.startswith("qgnn") and not _same(result, run()):
        raise WrongResult(TWICE)
    return run


def _guarded(name: str, run: Run, refused: Refused, device: str) -> Any:
    """Runs a candidate among the others: once it fails, as for want of memory that others hold, it is refused, and does nothing any more."""
    if name in refused:
        return None
    try:
        return run()
    except Exception as error:
        refused[name] = reason(error)
        _check_device(device, error)


def _same(one: Any, other: Any) -> bool:
    a, b = tree_leaves(one), tree_leaves(other)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if isinstance(x, Tensor))


def _consumption(run: Run, case: Case, limits: Limits, device: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if case.memory and limits.rounds:
        found["peak"] = allocated_peak(run, torch.device(device))
    if case.energy and limits.joules is not None:
        try:
            found["joules"] = limits.joules(run, JOULES_SECONDS)
        except ValueError as error:  # its time stands
            found["reason"] = f"energy is not measured: {error}"
    return found


def make_room(device: str) -> None:
    """Gives back what nobody holds any more, most of all after a candidate that ran out of memory."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _check_device(device: str, error: Exception) -> None:
    """Raises LostDevice where the GPU does not answer after an error."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise LostDevice(reason(error)[1]) from error


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
    """Bytes of messages, ``edges * features * 4``, that a candidate may make, since a layer holds them twice, before and after they are weighted:
    half of a GPU's memory, which refuses what does not fit, and of a computer's, which would swap, a third."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[1]) // 2
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
HALF_UNIT = 2.0**-11
"""The same in FP16."""


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
