"""The suite "gpu": everything that needs a GPU, measured in a given time by a process that may die.

A worker process measures the plan (:mod:`.gpu_plan`), what targets need first. An illegal access leaves a process without its GPU, and a kernel may
hang: then the candidate that ran is a failed row, and a new worker goes on with the others. A case that has taken :data:`CASE_SECONDS` is given up.

Without a GPU, or on request, the same runs on tiny inputs on a CPU, our kernels in Triton's interpreter: every candidate is built and checked, and
nothing is timed.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ..kernels.backend import use_backend
from .bench import Benchmark, Limits, LostDevice, Refused, Row, make_room, measure, reason
from .gpu_plan import GPU
from .meter import Counter, Meter
from .networks import NETWORKS
from .registry import cases_of
from .table import record
from .targets import Record, Value

SECONDS = 380.0
"""Time for all of it; ``make gpu`` tests before, and both together are to end within 9 minutes."""
CASE_SECONDS = 75.0
"""Time that a candidate may take before its first result, which includes compiling, and that the turns of a case may take."""
END_SECONDS = 5.0
"""Time that a worker that is done may take to end by itself, and to clear up."""
BUDGET = 0.5
"""Seconds that a candidate is timed for, three rounds at least: the plan has about 200 candidates."""
ROUNDS = 50

Records = list[dict[str, Value]]
Joules = Callable[[Callable[[], object], float], float]


@dataclass(frozen=True)
class Job:
    """A benchmark on a shape."""

    benchmark: Benchmark
    shape: Any

    def failed(self, why: str, device: str) -> Records:
        """One row for all of its cases."""
        row = Row(self.benchmark.operation, _name(self.shape), "", "", "failed", why)
        return [record(row, device, datetime.now())]


@dataclass
class _Progress:
    """What a new worker has to know: where to go on, which cases of that job are done, and which candidates are not to be run again."""

    job: int = 0
    done: list[str] = field(default_factory=list)
    refused: dict[str, Refused] = field(default_factory=dict)


def plan(benchmarks: Sequence[Benchmark] = GPU, small: bool = False) -> list[Job]:
    """All jobs, the first shapes of every benchmark before the others; where all are tiny, one of those that differ in their sizes alone."""
    jobs = [Job(row, shape) for row in benchmarks for shape in row.shapes[: row.first]]
    jobs += [Job(row, shape) for row in benchmarks for shape in row.shapes[row.first :]]
    if not small:
        return jobs
    chosen: dict[Any, Job] = {}
    for job in jobs:
        chosen.setdefault((job.benchmark.operation, _kind(job.shape)), job)
    return list(chosen.values())


def _kind(shape: Any) -> Any:
    """What decides which candidates there are: names, but for a graph's without a network."""
    return shape if isinstance(shape, str) or any(part in NETWORKS for part in shape) else None


def run(
    small: bool,
    jobs: Sequence[Job] | None = None,
    seconds: float | None = None,
    show: Callable[[str, float, int], None] = lambda *_: None,
) -> Iterator[Records]:
    """The records of each case, as soon as it is done.

    Args:
        small: check everything on tiny inputs on a CPU, and time nothing.
        jobs: instead of the whole plan.
        seconds: time for all of it, :data:`SECONDS` where something is timed; what is not reached is a failed row.
        show: told what runs, and how many jobs of how many are done.
    """
    jobs = plan(small=small) if jobs is None else jobs
    device = "cpu" if small else "cuda"
    seconds = (math.inf if small else SECONDS) if seconds is None else seconds
    rates: dict[str, float] = {}
    progress, end = _Progress(), time.monotonic() + seconds
    while progress.job < len(jobs) and time.monotonic() < end:
        with _worker(jobs, device, progress) as messages:
            for records in _followed(messages, jobs, device, progress, end, show):
                yield [_bounded(one, rates) for one in records]
    for job in jobs[progress.job :]:
        yield job.failed(f"not reached within {seconds:.0f} s", device)


@contextmanager
def _worker(jobs: Sequence[Job], device: str, progress: _Progress) -> Iterator[Connection]:
    """A process that works on the jobs from where ``progress`` stands; what it tells. It ends with the block."""
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    # Triton reads it when the kernels are decorated
    with patch.dict(os.environ, {"TRITON_INTERPRET": "1"} if device == "cpu" else {}):
        process = context.Process(target=_work, args=(theirs, jobs, device, progress), daemon=True)
        process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()
        if progress.job >= len(jobs):
            process.join(END_SECONDS)
        process.kill()
        process.join()


def _followed(
    messages: Connection,
    jobs: Sequence[Job],
    device: str,
    progress: _Progress,
    end: float,
    show: Callable[[str, float, int], None],
) -> Iterator[Records]:
    """The records that a worker sends; returns when it has ended, died, lost its GPU or hung. ``progress`` then says where to go on."""
    shape, running, why = "", "", "the process died"
    while progress.job < len(jobs):
        job = jobs[progress.job]
        show(f"{job.benchmark.operation} {_name(job.shape)}", progress.job, len(jobs))
        try:
            limit = min(CASE_SECONDS, end - time.monotonic())
            if not messages.poll(max(0.0, limit)):
                if limit < CASE_SECONDS:
                    return  # the time for all is over
                why = f"took longer than {CASE_SECONDS:.0f} s"
                break
            kind, *said = messages.recv()
        except EOFError:
            break
        if kind == "running":
            shape, running = said
        elif kind == "records":
            shape, running = "", ""
            progress.done.append(said[0])
            yield said[1]
        elif kind == "next":
            progress.job, progress.done, progress.refused = progress.job + 1, [], {}
            yield said[0]
        else:
            why = said[0]
            break
    else:
        return
    known = progress.refused.setdefault(shape, {})
    if running and running not in known:
        known[running] = ("failed", why)
    else:  # the turns, or what no candidate does: the whole job is given up
        yield job.failed(f"{shape}: {why}" if shape else why, device)
        progress.job, progress.done, progress.refused = progress.job + 1, [], {}


def _work(messages: Connection, jobs: Sequence[Job], device: str, progress: _Progress) -> None:
    """The worker. It sends ("running", shape, candidate), ("records", shape, records), ("next", records of a job that failed), ("lost", why)."""
    joules = _joules() if device == "cuda" else None
    try:
        with nullcontext() if device == "cuda" else use_backend("triton"):
            for number, job in enumerate(jobs[progress.job :]):
                known = progress if number == 0 else _Progress()
                messages.send(("next", _job(messages, job, device, known, joules)))
    except LostDevice as lost:
        messages.send(("lost", str(lost)))
    finally:
        messages.close()


def _job(messages: Connection, job: Job, device: str, known: _Progress, joules: Joules | None) -> Records:
    """Sends the records of every case; returns those of a job whose cases cannot be made."""
    try:
        for case in cases_of(job.benchmark)(job.shape, device):
            if case.shape in known.done:
                continue
            limits = Limits(
                ROUNDS if device == "cuda" else 0,
                BUDGET,
                joules,
                known.refused.get(case.shape, {}),
                partial(_tell, messages, case.shape),
            )
            rows = measure(job.benchmark.operation, case, limits, device)
            date = datetime.now()
            messages.send(("records", case.shape, [record(row, device, date) for row in rows]))
            del case, limits, rows
            make_room(device)
    except LostDevice:
        raise
    except Exception as error:  # no memory, a library that is missing: the other jobs go on
        if device == "cuda":
            _check(error)
        return job.failed(reason(error)[1], device)
    return []


def _tell(messages: Connection, shape: str, candidate: str) -> None:
    messages.send(("running", shape, candidate))


def _check(error: Exception) -> None:
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise LostDevice(reason(error)[1]) from error


def _joules() -> Joules:
    """Joules of a call by NVML; where the counter cannot be read, what says why."""
    try:
        return Meter(Counter()).joules
    except ValueError as error:
        return partial(_no_joules, str(error))


def _no_joules(why: str, *_: object) -> float:
    raise ValueError(why)


def _bounded(found: dict[str, Value], rates: dict[str, float]) -> dict[str, Value]:
    """A record with its share of the bound that the machine's own rates give: bytes over the copy's, operations over the int8 product's, the larger.
    The machine's rows set the rates."""
    time_ms, work = found["ms_50"], {name: float(found[name] or 0) for name in ("bytes", "operations")}
    if not time_ms:
        return found
    if found["operation"] == "machine":
        kind = "bytes" if found["candidate"] == "copy" else "operations"
        rates[kind] = work[kind] / float(time_ms)
    elif len(rates) == 2 and found["bytes"]:
        # additions of an aggregation run elsewhere than on tensor cores
        tensor_cores = work["operations"] if str(found["operation"]).startswith("matmul") else 0.0
        least = max(work["bytes"] / rates["bytes"], tensor_cores / rates["operations"])
        return found | {"bound": float(f"{least / float(time_ms):.4g}")}
    return found


def amiss(found: Record, small: bool) -> bool:
    """Whether a row is the suite's failure: a wrong result, and where nothing is timed one that failed, but for a peer that is not installed."""
    absent = str(found["reason"]).startswith(("ImportError", "ModuleNotFoundError"))
    ours = str(found["candidate"]).startswith("qgnn")
    return found["status"] == "wrong" or (small and found["status"] == "failed" and (ours or not absent))


def results() -> Path:
    """Where rows of this GPU go: perf/results of a source tree, else the current folder."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    folder = Path("perf/results")
    return (folder if folder.is_dir() else Path()) / f"{name}.csv"


def _name(shape: Any) -> str:
    return " ".join(map(str, shape)) if isinstance(shape, tuple) else str(shape)
