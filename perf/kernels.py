"""Kernels against their peers: aggregation and matrix product, FP32 and packed integers.

Bytes decide: aggregation reads ``E * F * bits / 8`` bytes of rows (plus 4 bytes an edge) and writes ``4 N F``; so against FP32 the most
that INT8 can gain is 4 x and INT4 8 x where rows come from memory. Peers are cached: torch's CSR product (MKL on a CPU, cuSPARSE on a GPU) keeps
its matrix, PyG its index and its CSR.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import SimpleConv

from .. import ops
from ..qtensor import QTensor
from .bench import UNIT, Candidate, Case, Run, check_messages, equal_to, within
from .peers import compiled, scipy_csr, torch_scatter
from .scene import Scene, scene

FEATURES = 128
SMALL_FEATURES = (16, 64)
"""More widths for graphs of fewer than :data:`SMALL` nodes."""
SMALL = 20_000

ROUNDING = UNIT * 1.01
"""The percent is for terms of second order."""


CHECKED = 2048
"""Rows at either end of a product that are compared: rows have nothing to do with one another, but a kernel's blocks may not fill the last ones."""


def aggregation(name: str, device: str) -> Iterator[Case]:
    """Sum over neighbours, for every width of features."""
    at = scene(name, device)
    for features in (*(SMALL_FEATURES if at.nodes < SMALL else ()), FEATURES):
        yield Case(f"{at.name} F={features}", _aggregations(at, at.features(features)))


def _aggregations(at: Scene, x: Tensor) -> list[Candidate]:
    """A sum of ``d`` terms in FP32 is off by at most ``d 2^-24`` of the sum of magnitudes, to first order; the reference is in FP64. Sums of codes
    are exact, so that a packed operand's result is that sum in floats times the step, to the bit."""
    graph, features = at.graph, x.size(1)
    source, target = at.edge_index

    @cache
    def expected() -> tuple[Tensor, Tensor]:
        magnitudes = at.adjacency @ x.abs()
        return at.adjacency.double() @ x.double(), ROUNDING * graph.in_degree.unsqueeze(1) * magnitudes

    accept = within(expected)

    def messages(run: Callable[[], Run]) -> Callable[[], Run]:
        def build() -> Run:
            check_messages(graph.num_edges, features, at.device)
            return run()

        return build

    def scatter_peer() -> Run:
        module = torch_scatter()
        return lambda: module.scatter(x[source], target, 0, None, at.nodes, "sum")

    def scipy_peer() -> Run:
        matrix, values = scipy_csr(at), x.numpy()
        return lambda: matrix @ values

    fp32: dict[str, Callable[[], Run]] = {
        "torch-csr-fp32": lambda: lambda: at.adjacency @ x,
        "pyg-scatter-fp32": messages(lambda: partial(SimpleConv("sum"), x, at.edge_index)),
        "pyg-edge-index-fp32": lambda: partial(at.pyg_edges.matmul, x, transpose=True),
        "pyg-compiled-fp32": messages(lambda: partial(_compiled_sum(), x, at.edge_index)),
        "torch-scatter-fp32": messages(scatter_peer),
        "scipy-csr-fp32": scipy_peer,
        "qgnn-fp32": lambda: partial(ops.aggregate, graph, x),
    }
    return [
        *(Candidate(label, build, accept) for label, build in fp32.items()),
        *(_packed_aggregation(at, x, bits) for bits in (8, 4, 2)),
    ]


@cache
def _compiled_sum() -> Any:
    return compiled(SimpleConv("sum"))


def _packed_aggregation(at: Scene, x: Tensor, bits: int) -> Candidate:
    @cache
    def packed() -> QTensor:
        return QTensor.quantize(x, x.abs().amax(0) / largest(bits), bits, axis="col")

    def expected() -> Tensor:
        dtype = exact_type(at.graph.max_degree * largest(bits))
        sums = at.adjacency.to(dtype) @ packed().codes().to(dtype)
        return sums.float() * packed().step

    return Candidate(f"qgnn-int{bits}", lambda: partial(ops.aggregate, at.graph, packed()), equal_to(expected))


def exact_type(magnitude: int) -> torch.dtype:
    """A float type in which sums of codes up to ``magnitude`` are exact, in any order."""
    return torch.float32 if magnitude < 2**24 else torch.float64


def largest(bits: int) -> int:
    """The largest signed code."""
    return 2 ** (bits - 1) - 1


def product(shape: tuple[int, int, int], device: str) -> Iterator[Case]:
    """Matrix product ``[n, k] x [k, m]`` of random values. FP32 may be off by ``k 2^-24`` of the sum of magnitudes, to first order, from FP64;
    of the integers the accumulators are compared, which are exact. The first and the last :data:`CHECKED` rows are."""
    n, k, m = shape
    some = torch.cat([torch.arange(n)[:CHECKED], torch.arange(n)[CHECKED:][-CHECKED:]]).to(device)
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, generator=generator).to(device) for size in ((n, k), (k, m)))
    widths = torch.randint(1, 5, (n,), generator=generator).float().to(device)

    @cache
    def weight(bits: int) -> QTensor:
        return QTensor.quantize(w, w.abs().amax(0) / largest(bits), bits, axis="col")

    @cache
    def features(bits: int) -> QTensor:
        return QTensor.quantize(x, x.abs().amax(1) / largest(bits), bits)

    @cache
    def mixed() -> QTensor:
        return QTensor.quantize(x, 0.5, widths)

    def exact(left: Callable[[], QTensor], right: Callable[[], QTensor]) -> Callable[[Any], None]:
        def sums() -> Tensor:
            a, b = left(), right()
            dtype = exact_type(k * largest(int(a.bits.max())) * largest(int(b.bits.max())))
            return (a.codes()[some].to(dtype) @ b.codes().to(dtype)).to(torch.int32)

        check = equal_to(sums)
        return lambda result: check((result.acc if isinstance(result, ops.IntegerProduct) else result)[some])

    def torch_int() -> Run:
        a, b = features(8).codes().to(torch.int8), weight(8).codes().to(torch.int8)
        return lambda: torch._int_mm(a, b)

    def ours(left: Callable[[], QTensor], bits: int) -> Callable[[], Run]:
        return lambda: partial(ops.matmul, left(), weight(bits))

    integers: dict[str, tuple[Callable[[], QTensor], int]] = {
        "qgnn-int8": (partial(features, 8), 8),
        "qgnn-int4": (partial(features, 4), 4),
        "qgnn-mixed-1-to-4": (mixed, 4),
    }

    def reference() -> tuple[Tensor, Tensor]:
        rows = x[some]
        return rows.double() @ w.double(), ROUNDING * k * (rows.abs() @ w.abs())

    close = within(reference)

    yield Case(
        f"[{n},{k}]x[{k},{m}]",
        [
            Candidate("torch-fp32", lambda: lambda: x @ w, lambda result: close(result[some])),
            Candidate("torch-int-mm", torch_int, exact(partial(features, 8), partial(weight, 8))),
            *(
                Candidate(name, ours(left, bits), exact(left, partial(weight, bits)))
                for name, (left, bits) in integers.items()
            ),
        ],
    )
