"""Aggregation of the suite "gpu" beside its peers, and the rates of the machine itself.

:class:`qgnn.perf.bench.Work` of an aggregation is that of :mod:`.bounds`, a row in sectors of 32 bytes and an index for every edge, as if nothing
were cached, and the result: a share of the bound above 1 is the L2 cache's doing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import SimpleConv

from .. import ops
from ..qtensor import QTensor
from .bench import HALF_UNIT, Candidate, Case, Run, Work, check_messages, close_in_norm, equal_to, within
from .bounds import aggregation as aggregation_bound
from .gpu_scene import Sizes, gpu_scene
from .kernels import ROUNDING, exact_type, largest
from .peers import compiled, torch_scatter, traced
from .scene import Scene, copies, turns

WIDTHS, SHARES = (4, 2, 1), (0.2, 0.6)
"""Widths of rows of mixed widths, from the nodes with the largest out-degree on, and the shares of the edges at which they change: the mean over the
edges is ``0.2 * 4 + 0.4 * 2 + 0.4 * 1 = 2``."""

TINY_FEATURES = 16
"""Columns on a CPU, whatever the shape says."""

# The machine


def machine(what: str, device: str) -> Iterator[Case]:
    """The rate of a copy in memory, and that of an int8 product on tensor cores: what shares of bounds refer to."""
    gpu = device == "cuda"
    if what == "copy":
        source = torch.arange(2**29 if gpu else 2**10, dtype=torch.int32, device=device)
        target = torch.empty_like(source)
        work = Work(2 * source.numel() * source.element_size(), 0)
        run = partial(target.copy_, source)
        yield Case(f"{work.bytes / 2e9:.3g} GB", [Candidate("copy", lambda: run, equal_to(lambda: source), work)])
        return
    n = 8192 if gpu else 32
    generator = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randint(-127, 128, (n, n), generator=generator, device=device, dtype=torch.int32).to(torch.int8)
        for _ in range(2)
    )
    b = b.t().contiguous().t()  # columns in one piece, as tensor cores read them
    some = slice(min(n, 64))
    exact = equal_to(lambda: (a[some].double() @ b.double()).to(torch.int32))
    work = Work(2 * n * n + 4 * n * n, 2 * n**3)
    run_product = partial(torch._int_mm, a, b)
    yield Case(f"{n} x {n} x {n}", [Candidate("int8-product", lambda: run_product, lambda r: exact(r[some]), work)])


# Aggregation


def aggregation(shape: tuple[str, int], device: str) -> Iterator[Case]:
    """Sum over neighbours of ``F`` columns. What sends messages runs at 128 columns only: it is far behind, and slow."""
    name, features = shape
    at = gpu_scene(name, device)
    sums = _Sums(at, features if device == "cuda" else TINY_FEATURES)
    found = [
        sums.floats("torch-csr-fp32", lambda: turns(partial(torch.matmul, at.adjacency), sums.inputs)),
        sums.halves_of_torch(),
        sums.floats("pyg-edge-index-fp32", lambda: turns(partial(at.pyg_edges.matmul, transpose=True), sums.inputs)),
    ]
    if features == 128:
        found += sums.messages()
    found += [
        sums.floats("qgnn-fp32", lambda: turns(partial(ops.aggregate, at.graph), sums.inputs)),
        sums.halves(),
        *(sums.packed(bits) for bits in (8, 4, 2)),
        sums.mixed(),
    ]
    yield Case(f"{at.name} F={sums.features}", found)


def compiled_aggregation(name: str, device: str) -> Iterator[Case]:
    """PyG's layer under torch.compile, whose compilation takes as long as everything else on the graph."""
    at = gpu_scene(name, device)
    sums = _Sums(at, 128 if device == "cuda" else TINY_FEATURES)
    conv: Any = (compiled if device == "cuda" else traced)(SimpleConv("sum"))
    yield Case(
        f"{at.name} F={sums.features}",
        [
            sums.floats("torch-csr-fp32", lambda: turns(partial(torch.matmul, at.adjacency), sums.inputs)),
            sums.floats("pyg-compiled-fp32", lambda: turns(lambda x: conv(x, at.edge_index), sums.inputs)),
            sums.floats("qgnn-fp32", lambda: turns(partial(ops.aggregate, at.graph), sums.inputs)),
            sums.packed(8),
        ],
    )


class _Sums:
    """Candidates that sum the same ``[N, features]`` values over neighbours."""

    def __init__(self, at: Scene, features: int) -> None:
        self.at, self.features, self.x = at, features, at.features(features)
        self.inputs = copies(self.x, at.device)

    def work(self, reads: str, out_size: int) -> Work:
        """Of rows as :func:`.bounds.row_size` names them, and results of so many bytes a value."""
        edges, nodes = self.at.graph.num_edges, self.at.nodes
        same_out = aggregation_bound(Sizes(nodes, edges, 0, self.features, 0), self.features, reads)
        return Work(same_out.bytes + nodes * (self.features * out_size - same_out.row), edges * self.features)

    def floats(self, name: str, build: Callable[[], Run]) -> Candidate:
        """A sum of ``d`` terms in FP32 is off by at most ``d 2^-24`` of the sum of magnitudes, to first order; the reference is in FP64."""
        return Candidate(name, build, within(lambda: self.expected), self.work("fp32", 4))

    @cached_property
    def expected(self) -> tuple[Tensor, Tensor]:
        return self._of(self.x, 0)

    def _of(self, x: Tensor, more: float) -> tuple[Tensor, Tensor]:
        """Sums of ``x`` in FP64, and their bound in FP32, ``more`` of the sum of magnitudes larger."""
        magnitudes = self.at.adjacency @ x.abs()
        terms = (self.at.graph.in_degree + 1).unsqueeze(1)
        return self.at.adjacency.double() @ x.double(), (ROUNDING * terms + more) * magnitudes

    def halves(self) -> Candidate:
        """Sums in FP32 of FP16 values, rounded to FP16: each of two roundings, of a part and of the whole, is off by ``2^-11`` of the sum of
        magnitudes at most."""
        x = self.x.half()

        def build() -> Run:
            return turns(partial(ops.aggregate, self.at.graph), copies(x, self.at.device))

        return Candidate("qgnn-fp16", build, within(lambda: self._of(x.float(), 2 * HALF_UNIT)), self.work("fp16", 2))

    def halves_of_torch(self) -> Candidate:
        """cuSPARSE does not say in which type it adds the parts of a long row: eight roundings to FP16 of the norm are allowed, as for models."""
        x, at = self.x.to(self.at.half), self.at

        def build() -> Run:
            return turns(partial(torch.matmul, at.adjacency.to(at.half)), copies(x, at.device))

        close = close_in_norm(lambda: at.adjacency.double() @ x.double(), 8 * HALF_UNIT)
        return Candidate("torch-csr-fp16", build, close, self.work("fp16", 2))

    def messages(self) -> Iterator[Candidate]:
        at = self.at

        def checked(make: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[[], Run]:
            def build() -> Run:
                check_messages(at.graph.num_edges, self.features, at.device)
                return turns(make(), self.inputs)

            return build

        def pyg() -> Callable[[Tensor], Tensor]:
            conv = SimpleConv("sum")
            return lambda x: conv(x, at.edge_index)

        def scatter() -> Callable[[Tensor], Tensor]:
            module, (source, target) = torch_scatter(), at.edge_index
            return lambda x: module.scatter(x[source], target, 0, None, at.nodes, "sum")

        yield self.floats("pyg-scatter-fp32", checked(pyg))
        yield self.floats("torch-scatter-fp32", checked(scatter))

    def packed(self, bits: int) -> Candidate:
        """Codes with a step per column. Their sums are exact, so that the result is that sum in floats times the step, to the bit."""

        @cache
        def codes() -> QTensor:
            return QTensor.quantize(self.x, self.x.abs().amax(0) / largest(bits), bits, axis="col")

        def expected() -> Tensor:
            dtype = exact_type(self.at.graph.max_degree * largest(bits))
            return (self.at.adjacency.to(dtype) @ codes().codes().to(dtype)).float() * codes().step

        def build() -> Run:
            several = [replace(codes(), data=data) for data in copies(codes().data, self.at.device)]
            return turns(partial(ops.aggregate, self.at.graph), several)

        return Candidate(f"qgnn-int{bits}", build, equal_to(expected), self.work(str(bits), 4))

    def mixed(self) -> Candidate:
        """Unsigned codes with a step and a width per row (:data:`WIDTHS`), as A2Q's after a ReLU."""
        graph, device = self.at.graph, self.x.device
        out_degree = torch.bincount(graph.indices, minlength=self.at.nodes)
        order = out_degree.argsort(descending=True)
        share = out_degree[order].cumsum(0) / graph.num_edges
        kind = torch.empty_like(order)
        kind[order] = torch.bucketize(share, torch.tensor(SHARES, device=device))
        widths = torch.tensor(WIDTHS, device=device)[kind]

        @cache
        def codes() -> QTensor:
            values = self.x.abs()
            return QTensor.quantize(values, values.amax(1) / (2**widths - 1), widths, signed=False)

        def build() -> Run:
            several = [replace(codes(), data=data) for data in copies(codes().data, self.at.device)]
            return turns(partial(ops.aggregate, graph), several)

        per_edge = [self.work(str(width), 4) for width in WIDTHS]
        edges = torch.zeros(len(WIDTHS), dtype=torch.int64, device=device).index_add_(0, kind, out_degree).tolist()
        moved = sum(work.bytes * count for work, count in zip(per_edge, edges, strict=True)) / graph.num_edges
        return Candidate(
            "qgnn-mixed-2",
            build,
            within(lambda: self._of(codes().dequantize(), 0)),
            Work(moved, per_edge[0].operations),
        )
