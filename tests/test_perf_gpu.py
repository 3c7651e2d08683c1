"""The suite "gpu" without a GPU: all of it once on tiny inputs, from a plain tree; what hangs, dies or cannot be measured."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from qgnn.perf import bench, gpu, table
from qgnn.perf.bench import Case, ready
from qgnn.perf.gpu_plan import GPU
from qgnn.perf.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent


def _case(**runs: Callable[[], Any]) -> Case:
    accept = bench.equal_to(lambda: torch.ones(3))
    return Case("shape", [ready(name, run, accept) for name, run in runs.items()])


# The plan


def test_what_must_be_shown_is_measured_first() -> None:
    jobs = [(job.benchmark.operation, job.shape) for job in gpu.plan()]
    assert len(set(jobs)) == len(jobs)
    first = sum(row.first for row in GPU)
    assert {row.operation for row in GPU if row.first} == {operation for operation, _ in jobs[:first]}
    assert {target.operation for target in TARGETS} <= {operation for operation, _ in jobs[:first]}


def test_time_that_is_over_is_rows() -> None:
    jobs = gpu.plan()[:2]
    records = [found for case in gpu.run(True, jobs, seconds=0) for found in case]
    assert [found["status"] for found in records] == ["failed"] * 2
    assert all("not reached within 0 s" in str(found["reason"]) for found in records)


ABSENT = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.split(".")[0] in {names} else found(name, path, target)
)
"""
"""Python runs a file sitecustomize.py when it starts."""


def test_the_whole_small_suite_runs_from_a_plain_tree(tmp_path: Path) -> None:
    """As ``make gpu``, in new processes: torch, Triton, PyG and NumPy are there, the rest is not. Every candidate of every job is built and checked,
    and nothing is timed."""
    names = (
        "typer",
        "rich",
        "pandas",
        "numba",
        "sklearn",
        "scipy",
        "safetensors",
        "matplotlib",
        "hypothesis",
        "pynvml",
    )
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(names=names))
    out = tmp_path / "rows.csv"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "qgnn.perf", "--suite", "gpu", "--small", "--out", str(out)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    records = table.read(out)
    refused = {(found["candidate"], found["reason"]) for found in records if found["status"] != "ok"}
    assert all("torch-scatter is not installed" in str(why) for _, why in refused), refused
    assert not any(found["ms_50"] for found in records)
    jobs = gpu.plan(small=True)
    assert {found["operation"] for found in records} == {row.operation for row in GPU}
    cases = {(found["operation"], found["shape"]) for found in records}
    schemes = 2  # two more cases of the GCN's training step, one for each scheme
    assert len(cases) == len(jobs) + schemes
    assert "### machine" in (tmp_path / "rows.md").read_text()


# Workers


def _benchmark(operation: str) -> bench.Benchmark:
    return bench.Benchmark(operation, ("gpu",), ("shape",), "", "", "", "", "none.none")


def _followed(monkeypatch: pytest.MonkeyPatch, **cases: Callable[[], Case]) -> list[tuple[Any, ...]]:
    """What the suite says of made-up jobs. Workers are forked, so that they know them."""
    monkeypatch.setattr(gpu, "get_context", lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr(gpu, "CASE_SECONDS", 2.0)
    monkeypatch.setattr(gpu, "cases_of", lambda row: lambda shape, device: iter([cases[row.operation]()]))
    jobs = [gpu.Job(_benchmark(operation), "shape") for operation in cases]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, on forks of processes with threads
        records = [found for case in gpu.run(True, jobs) for found in case]
    return [tuple(found[name] for name in ("operation", "candidate", "status", "reason")) for found in records]


def _dies() -> Any:
    os._exit(1)


def _good() -> torch.Tensor:
    return torch.ones(3)


def test_a_hang_or_a_death_costs_one_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _followed(
        monkeypatch,
        first=lambda: _case(good=_good, hangs=lambda: time.sleep(60), dies=_dies, last=_good),
        second=lambda: _case(good=_good),
    )
    assert found == [
        ("first", "good", "ok", ""),
        ("first", "hangs", "failed", "took longer than 2 s"),
        ("first", "dies", "failed", "the process died"),
        ("first", "last", "ok", ""),
        ("second", "good", "ok", ""),
    ]


def test_a_job_that_cannot_be_made_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Case:
        raise ImportError("no such library")

    found = _followed(monkeypatch, dies=_dies, unknown=unknown, good=lambda: _case(good=_good))
    assert found == [
        ("dies", "", "failed", "the process died"),
        ("unknown", "", "failed", "ImportError: no such library"),
        ("good", "good", "ok", ""),
    ]


def test_a_lost_device_costs_one_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    def illegal() -> None:
        raise RuntimeError("illegal access")

    def check(device: str, error: Exception) -> None:
        if "illegal" in str(error):
            raise bench.LostDevice("the GPU does not answer")

    monkeypatch.setattr(bench, "_check_device", check)
    found = _followed(monkeypatch, first=lambda: _case(good=_good, illegal=illegal, last=_good))
    assert found == [
        ("first", "good", "ok", ""),
        ("first", "illegal", "failed", "the GPU does not answer"),
        ("first", "last", "ok", ""),
    ]


# One case


def test_a_candidate_that_fails_in_its_turns_is_a_row() -> None:
    calls = iter(range(2))

    def tires() -> torch.Tensor:
        next(calls)  # then StopIteration
        return torch.ones(3)

    good, tired = bench.measure("test", _case(good=_good, tires=tires), bench.Limits(2), "cpu")
    assert (good.status, tired.status, tired.reason, tired.timing) == ("ok", "failed", "StopIteration: ", None)
    assert good.timing is not None and good.timing.ratio is not None


def test_energy_and_peak_are_measured_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "allocated_peak", lambda run, device: 4096)
    case = dataclasses.replace(_case(good=_good, wrong=lambda: torch.zeros(3)), energy=True, memory=True)
    limits = bench.Limits(2, joules=lambda run, seconds: 0.25)
    good, wrong = bench.measure("test", case, limits, "cpu")
    assert (good.joules, good.peak, wrong.joules, wrong.peak) == (0.25, 4096, None, None)
    found = table.record(good, "cpu", datetime(2026, 1, 1))
    assert (found["millijoules"], found["peak_bytes"]) == (250.0, 4096)
    (plain, _) = bench.measure("test", dataclasses.replace(case, energy=False, memory=False), limits, "cpu")
    assert (plain.joules, plain.peak) == (None, None)


def test_energy_that_cannot_be_measured_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> Any:
        raise ValueError("there is no NVML")

    monkeypatch.setattr(gpu, "Counter", no_library)
    case = dataclasses.replace(_case(good=_good), energy=True)
    (row,) = bench.measure("test", case, bench.Limits(2, joules=gpu._joules()), "cpu")
    assert row.status == "ok" and row.timing is not None and row.joules is None
    assert row.reason == "energy is not measured: there is no NVML"
