"""Kernels against their peers on synthetic graphs: aggregation and matrix product, FP32 and packed integers.

Bytes decide: aggregation reads ``E * F * bits / 8`` bytes of rows (plus 4 bytes an edge) and writes ``4 N F``; so against FP32 the most
that INT8 can gain is 4 x and INT4 8 x where rows come from memory. Peers are cached: torch's CSR product (MKL on a CPU, cuSPARSE on a GPU) keeps
its matrix, and PyG's scatter its index. Each candidate's result is compared with the FP32 reference of the same values before it is timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch_geometric.utils import scatter

from .. import ops
from ..data import Dataset, load
from ..graph import Graph
from ..qtensor import QTensor
from .timing import Timing, paired

PRODUCTS = ((2708, 1433, 16), (169343, 128, 128))
"""Shapes ``(n, k, m)`` of the products: Cora's first layer, and ogbn-arxiv's."""


@dataclass(frozen=True)
class Row:
    """One measured row: the operation, its shape, the candidate, and its paired time."""

    operation: str
    shape: str
    candidate: str
    timing: Timing


def _check(name: str, result: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.abs().max()) or 1.0
    error = float((result - expected).abs().max()) / scale
    if not error <= tolerance:
        raise RuntimeError(
            f"{name} is wrong by {error:.2e} of the largest value (tolerance {tolerance:.0e}); its time would mean nothing"
        )


def aggregation(graph_name: str, features: int, device: str, rounds: int) -> Iterator[Row]:
    """Sum over neighbours. FP32 sums in another order may differ by rounding: ``max degree * 2^-24`` relative; integers are exact, their values
    are compared with the dequantized operand's FP32 sum at the same tolerance."""
    dataset = load(graph_name)
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{dataset.name} has many graphs; an aggregation is timed on one")
    data = dataset.data
    assert isinstance(data.edge_index, Tensor)
    graph = Graph.from_edge_index(data.edge_index, int(data.num_nodes or 0)).to(device)
    n, x = (
        graph.num_nodes,
        torch.randn(graph.num_nodes, features, generator=torch.Generator().manual_seed(0)).to(device),
    )
    edge_index = torch.stack([graph.indices.long(), graph.rows.long()])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support beta
        csr = torch.sparse_csr_tensor(graph.indptr, graph.indices, torch.ones(graph.num_edges, device=device), (n, n))
    packed = {
        f"qgnn-int{bits}": QTensor.quantize(x, x.abs().amax(0) / (2 ** (bits - 1) - 1), bits, axis="col")
        for bits in (8, 4, 2)
    }
    candidates: dict[str, Callable[[], Tensor]] = {"torch-csr-fp32": lambda: csr @ x}
    if graph.num_edges * features * 4 < 4e9:
        candidates["pyg-scatter-fp32"] = lambda: scatter(x[edge_index[0]], edge_index[1], 0, n, "sum")
    candidates["qgnn-fp32"] = lambda: ops.aggregate(graph, x)
    for name, q in packed.items():
        candidates[name] = partial(ops.aggregate, graph, q)
    tolerance = max(graph.max_degree, 1) * 2.0**-24 * 4
    expected = csr @ x
    for name, run in candidates.items():
        _check(name, run(), csr @ packed[name].dequantize() if name in packed else expected, tolerance)
    for name, timing in paired(candidates, rounds, device=device).items():
        yield Row("aggregate", f"{graph_name} F={features}", name, timing)


def product(n: int, k: int, m: int, device: str, rounds: int) -> Iterator[Row]:
    """Matrix product ``[n, k] x [k, m]``; the integer accumulators are compared bitwise with those of ``torch._int_mm``."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=generator).to(device) for shape in ((n, k), (k, m)))
    xs = {f"qgnn-int{b}": QTensor.quantize(x, x.abs().amax(1) / (2 ** (b - 1) - 1), b) for b in (8, 4)}
    widths = torch.randint(1, 5, (n,), generator=generator).to(device)
    xs["qgnn-mixed-1-to-4"] = QTensor.quantize(x, 0.5, widths.float())
    wq = QTensor.quantize(w, w.abs().amax(0) / 7, 4, axis="col")
    x8, w8 = xs["qgnn-int8"].codes().to(torch.int8), wq.codes().to(torch.int8)
    candidates: dict[str, Callable[[], Tensor]] = {
        "torch-fp32": lambda: x @ w,
        "torch-int-mm": lambda: torch._int_mm(x8, w8),
    }
    for name, q in xs.items():
        candidates[name] = partial(ops.matmul, q, wq)
    if not torch.equal(ops.matmul(xs["qgnn-int8"], wq).acc, torch._int_mm(x8, w8)):
        raise RuntimeError("the packed product differs from torch._int_mm; its time would mean nothing")
    for name, timing in paired(candidates, rounds, device=device).items():
        yield Row("matmul", f"[{n},{k}]x[{k},{m}]", name, timing)
