"""Benchmarks: pairing and ratios, and that every suite runs to its end on small inputs and checks what it times."""

from __future__ import annotations

import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from qgnn.perf import inference, kernels, quantizers
from qgnn.perf.__main__ import COLUMNS, main
from qgnn.perf.timing import paired


def test_ratio_is_baseline_over_candidate_and_runs_take_turns() -> None:
    order = []

    def runner(name: str, seconds: float) -> None:
        order.append(name)
        time.sleep(seconds)

    timings = paired({"slow": lambda: runner("slow", 0.02), "fast": lambda: runner("fast", 0.002)}, rounds=3, warmup=1)
    assert order == ["slow", "fast"] * 4
    assert timings["slow"].ratio == (1.0, 1.0, 1.0)
    assert timings["fast"].ratio[1] > 1.5 and timings["fast"].ms[1] < timings["slow"].ms[1]
    assert timings["fast"].ms == tuple(sorted(timings["fast"].ms))


def test_every_suite_runs_and_appends_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PRODUCTS", ((50, 20, 24),))
    monkeypatch.setattr(inference, "GRAPHS", 2)
    monkeypatch.setattr(quantizers, "TAILS", ((500, 0.01),))
    monkeypatch.setattr(quantizers, "NEAREST", ((50, 20, 24),))
    out = tmp_path / "rows.csv"
    arguments = [
        "--graphs",
        "powerlaw:300,2000",
        "--features",
        "16",
        "--rounds",
        "2",
        "--schemes",
        "fp32,a2q",
        "--hidden",
        "8",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    once = pd.read_csv(out)
    assert tuple(once.columns) == COLUMNS
    assert set(once["operation"]) == {
        "aggregate",
        "fake_quantize_nearest",
        "inference",
        "matmul",
        "tails",
        "train-step",
    }
    assert {
        "torch-csr-fp32",
        "pyg-scatter-fp32",
        "qgnn-int4",
        "torch-int-mm",
        "pyg-fp32",
        "a2q",
        "torch-topk",
        "qgnn-tails",
    } <= set(once["candidate"])
    assert (once[["ms_20", "ms_50", "ms_80", "ratio_50"]] > 0).all().all()
    main([*arguments, "--suite", "train-step"])
    assert len(pd.read_csv(out)) == len(once) + 4


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = kernels.ops.aggregate
    monkeypatch.setattr(kernels.ops, "aggregate", lambda graph, x: real(graph, x) + 1)
    with pytest.raises(RuntimeError, match=r"qgnn-fp32 is wrong by .* its time would mean nothing"):
        list(kernels.aggregation("powerlaw:300,2000", 16, "cpu", 1))

    monkeypatch.setattr(quantizers, "tails", lambda x, k: (x[0], x[1]))
    with pytest.raises(RuntimeError, match=r"qgnn-tails differs from torch\.kthvalue"):
        list(quantizers.order_statistics(500, 0.01, "cpu", 1))

    monkeypatch.setattr(quantizers, "fake_quantize_nearest", lambda x, *_: (x,))
    with pytest.raises(RuntimeError, match="qgnn-nearest differs from fake_quantize"):
        list(quantizers.nearest(50, 20, 24, "cpu", 1))

    class Wrong:
        acc = torch.zeros(50, 24, dtype=torch.int32)

    monkeypatch.setattr(kernels.ops, "matmul", lambda x, w: Wrong())
    with pytest.raises(RuntimeError, match=r"differs from torch\._int_mm"):
        list(kernels.product(50, 20, 24, "cpu", 1))
