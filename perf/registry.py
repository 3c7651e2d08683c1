"""The benchmarks: one row each, and what runs a suite of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Any

from .bench import Benchmark, Case, Limits, Row, measure, reason
from .gpu_plan import GPU
from .scene import scene
from .table import record
from .targets import Value

GRAPHS = (
    "Cora",
    "CiteSeer",
    "regular:100000,16",  # every row alike
    "rmat:17,16",  # hubs: one of 131,072 nodes has 19,849 of the 2,097,152 edges
    "powerlaw:169343,2332486",  # ogbn-arxiv's size
    "powerlaw:232965,11461588",  # a tenth of Reddit's edges
)

PRODUCTS = ((2708, 1433, 16), (169343, 128, 128), (232965, 602, 128))
"""``(n, k, m)`` of ``[n, k] x [k, m]``: the first layer on Cora, ogbn-arxiv and Reddit."""

TAILS = tuple((n, fraction) for n in (86_656, 1_000_000, 10_000_000) for fraction in (0.001, 0.01))
"""Values and the fraction of them clipped at each end; the first is Cora's hidden map of 32 features."""

NEAREST = ((50_000, 64, 1000), (3_000, 145, 1000))
"""Rows, features and groups: about a batch of 128 graphs of REDDIT-BINARY (430 nodes each on average), and one of ZINC (23)."""

REGISTRY = (
    Benchmark(
        operation="aggregate",
        suites=("cpu", "kernels"),
        shapes=GRAPHS,
        inputs="normal [N, F], F = 128, below 20,000 nodes also 16 and 64; packed with a step per column, the largest magnitude's",
        baseline="torch.sparse CSR with int32 indices, kept: FP32 without a new kernel",
        gate="FP64, element by element within the bound of FP32 sums; packed: the exact sums times the step, to the bit",
        tests="tests/test_aggregate.py",
        cases="kernels.aggregation",
        on_graphs=True,
    ),
    Benchmark(
        operation="matmul",
        suites=("cpu", "kernels"),
        shapes=PRODUCTS,
        inputs="normal [n, k] with a step per row, and [k, m] with a step per column, the largest magnitude's",
        baseline="torch FP32",
        gate="FP64, element by element within the bound of FP32 sums; packed: int32 sums to the bit",
        tests="tests/test_matmul.py",
        cases="kernels.product",
    ),
    Benchmark(
        operation="layer",
        suites=("cpu",),
        shapes=GRAPHS,
        inputs="normal [N, 128]; PyG's GCN, GAT (8 heads of 16), GIN and GraphSAGE with one layer, 128 to 128",
        baseline="the same layer on torch.sparse CSR with int32 indices, kept",
        gate="FP32: the layer on CSR in FP64, in norm; integers: the fake-quantized layer, but for ties",
        tests="tests/test_convs.py",
        cases="networks.layers",
        on_graphs=True,
    ),
    Benchmark(
        operation="model",
        suites=("cpu",),
        shapes=GRAPHS,
        inputs="the data set's features; PyG's GCN, GAT (8 heads), GIN and GraphSAGE with two layers, 128 between them",
        baseline="the same model on torch.sparse CSR with int32 indices, kept",
        gate="FP32: the model on CSR in FP64, in norm; integers: the fake-quantized model, but for ties",
        tests="tests/test_freeze.py",
        cases="networks.models",
        on_graphs=True,
    ),
    Benchmark(
        operation="tails",
        suites=("quantizers",),
        shapes=TAILS,
        inputs="normal [n]",
        baseline="torch.kthvalue, once for each end",
        gate="sorting, to the bit",
        tests="tests/test_percentile.py",
        cases="quantizers.order_statistics",
    ),
    Benchmark(
        operation="fake_quantize_nearest",
        suites=("quantizers",),
        shapes=NEAREST,
        inputs="normal [n, F], every row with a magnitude of its own",
        baseline="fake quantization with the groups given",
        gate="plain torch, to the bit",
        tests="tests/test_nearest.py",
        cases="quantizers.nearest",
    ),
    Benchmark(
        operation="inference",
        suites=("inference",),
        shapes=((128, 430, 995),),
        inputs="random graphs: as many as in a batch of REDDIT-BINARY, with the mean of its nodes and edges",
        baseline="the same model with groups by in-degree",
        gate="plain torch, in norm, but for ties",
        tests="tests/test_nearest.py",
        cases="inference.nearest_share",
    ),
    Benchmark(
        operation="train-step",
        suites=("train-step",),
        shapes=("digits",),
        inputs="the data set, prepared as its recipe says",
        baseline="PyG's FP32 model of the same sizes, cached=True",
        gate="finite parameters: dropout leaves no result to compare; gradients are compared in the tests",
        tests="tests/test_convs.py",
        cases="train_step.train_steps",
        on_graphs=True,
    ),
    Benchmark(
        operation="quantized-step",
        suites=("quantized-step",),
        shapes=("digits",),
        inputs="the data set, prepared as the recipe of quantized training says; 128 hidden columns",
        baseline="our own FP32 model of the same sizes and recipe",
        gate="finite parameters: dropout leaves no result to compare; gradients are compared in the tests",
        tests="tests/test_training.py",
        cases="quantized_step.quantized_steps",
        on_graphs=True,
    ),
)

TIMED = tuple(dict.fromkeys(suite for row in REGISTRY for suite in row.suites))
SUITES = (*TIMED, "gpu", "static")
"""All suites; "gpu" is run by :mod:`qgnn.perf.gpu`, in processes of its own, and "static" compiles (:mod:`qgnn.perf.static`)."""


def select(suite: str) -> list[Benchmark]:
    """The benchmarks of a suite, or of "all", those but the suite "gpu".

    Raises:
        ValueError: there is no such suite.
    """
    if suite not in (*SUITES, "all"):
        raise ValueError(f"there is no suite {suite!r}; choose one of {', '.join(SUITES)}, all")
    return [row for row in (*GPU, *REGISTRY) if suite in row.suites or (suite == "all" and row in REGISTRY)]


def run(
    suite: str,
    graphs: Sequence[str],
    rounds: int,
    device: str,
    show: Callable[[str, float, int], None] = lambda *_: None,
) -> Iterator[list[dict[str, Value]]]:
    """The records of each case (:mod:`qgnn.perf.table`), as soon as it is measured. A shape that fails is a record with the reason.

    Args:
        suite: one of :data:`SUITES` that are timed here, or "all". "cpu" runs on a CPU whatever ``device`` is.
        graphs: data sets instead of the registry's.
        rounds: how often the candidates take turns, at most (:data:`qgnn.perf.bench.BUDGET`).
        show: told what is measured, and how many shapes of how many are done.

    Raises:
        ValueError: there is no such suite, or one of ``graphs`` is no data set with one graph, or cannot be had.
    """
    chosen = select(suite)
    device = "cpu" if suite == "cpu" else device
    for name in graphs:
        scene(name, device)  # bad input shows before the first measurement, not after an hour
    jobs = [(row, shape) for row in chosen for shape in (graphs if graphs and row.on_graphs else row.shapes)]
    # What runs on one graph runs together, so that a graph is made once and only one is held at a time.
    place = {shape: i for i, shape in enumerate(dict.fromkeys(shape for row, shape in jobs if row.on_graphs))}
    jobs.sort(key=lambda job: place[job[1]] if job[0].on_graphs else -1)
    for done, (row, shape) in enumerate(jobs):
        show(f"{row.operation} {shape}", done, len(jobs))
        for rows in _measured(row, shape, rounds, device):
            date = datetime.now()
            yield [record(one, device, date) for one in rows]


def cases_of(benchmark: Benchmark) -> Callable[[Any, str], Iterator[Case]]:
    """The function that gives the cases of a shape on a device."""
    module, function = benchmark.cases.split(".")
    found: Callable[[Any, str], Iterator[Case]] = getattr(importlib.import_module(f".{module}", __package__), function)
    return found


def _measured(benchmark: Benchmark, shape: Any, rounds: int, device: str) -> Iterator[list[Row]]:
    """The rows of each case of a shape; one that says why, where the cases cannot be made."""
    try:
        for case in cases_of(benchmark)(shape, device):
            yield measure(benchmark.operation, case, Limits(rounds), device)
    except Exception as error:  # no data, no memory: the other shapes go on
        yield [Row(benchmark.operation, str(shape), "", "", *reason(error))]
