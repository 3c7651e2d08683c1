"""Products, quantization and attention of the suite "gpu" beside their peers.

:class:`qgnn.perf.bench.Work` of a product counts operands and result, and multiplications and additions of int8 tensor cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.utils import scatter, softmax

from .. import ops
from ..kernels.matmul import epilogue_reference, matmul_packed, output_reference
from ..kernels.packing import uniform_counts
from ..kernels.quantize import codes_reference, quantize
from ..qtensor import QTensor
from .bench import HALF_UNIT, UNIT, Candidate, Case, Run, Work, check_messages, close_in_norm, equal_to
from .bounds import row_size
from .gpu_scene import TINY, gpu_scene
from .kernels import CHECKED, exact_type, largest
from .peers import attention_on_csr
from .quantizers import nearest as nearest_group
from .scene import copies, turns

HEADS, CHANNELS = 8, 16
SLOPE = 0.2


class _Operands:
    """``[n, k] x [k, m]`` with a step per row and a step per column, the largest magnitude's; on a CPU tiny. The first and the last
    :data:`qgnn.perf.kernels.CHECKED` rows of results are compared."""

    def __init__(self, name: str, sizes: tuple[int, int, int], device: str) -> None:
        n, k, m = sizes if device == "cuda" else (TINY.nodes, 20, 32)
        self.shape = f"{name if device == 'cuda' else f'{name}, tiny'} [{n},{k}]x[{k},{m}]"
        self.n, self.k, self.m, self.device = n, k, m, device
        generator = torch.Generator(device).manual_seed(0)
        self.x, self.w = (torch.randn(size, generator=generator, device=device) for size in ((n, k), (k, m)))
        self.widths = torch.randint(1, 5, (n,), generator=generator, device=device).float()
        self.bias = torch.randn(m, generator=generator, device=device)
        self.some = torch.arange(n, device=device)
        if n > 2 * CHECKED:
            self.some = torch.cat([self.some[:CHECKED], self.some[-CHECKED:]])
        self.features, self.weight = cache(self._features), cache(self._weight)

    def _features(self, bits: int) -> QTensor:
        """0 bits stand for widths of 1 to 4, drawn row by row."""
        if not bits:
            return QTensor.quantize(self.x, 0.5, self.widths)
        return QTensor.quantize(self.x, self.x.abs().amax(1) / largest(bits), bits)

    def _weight(self, bits: int) -> QTensor:
        return QTensor.quantize(self.w, self.w.abs().amax(0) / largest(bits), bits, axis="col")

    def sums(self, bits: int) -> Tensor:
        """Of the rows that are compared, int32."""
        a, b = self.features(bits), self.weight(bits or 4)
        dtype = exact_type(self.k * largest(bits or 4) * largest(bits or 4))
        return (a.codes()[self.some].to(dtype) @ b.codes().to(dtype)).to(torch.int32)

    def padded(self) -> tuple[Tensor, Tensor]:
        """int8 codes for ``torch._int_mm``, which takes multiples of eight; the weight with its columns in one piece."""
        a, b = (q.codes().to(torch.int8) for q in (self.features(8), self.weight(8)))
        more = -self.k % 8
        return F.pad(a, (0, more)), F.pad(b, (0, 0, 0, more)).t().contiguous().t()

    def work(self, containers: Sequence[str], out_bytes: int) -> Work:
        """Of features whose rows lie in these containers, each as many, with a step a row, and a result with so many bytes a value."""
        row = mean(row_size(container, self.k) for container in containers)
        weight = self.m * row_size(max(containers), self.k)
        return Work(self.n * (row + 4 + self.m * out_bytes) + weight, 2 * self.n * self.k * self.m)

    def several(self, bits: int) -> list[QTensor]:
        codes = self.features(bits)
        return [replace(codes, data=data) for data in copies(codes.data, self.device)]


PRECISIONS = {"qgnn-int8": (8, "8"), "qgnn-int4": (4, "4"), "qgnn-mixed-1-to-4": (0, "0244")}
"""Bits of features and weight, 0 for widths of 1 to 4 and a weight of 4; and the containers of a digit each that rows lie in: signed codes of 1 bit
are all 0, and nothing is stored."""


def product(shape: tuple[str, int, int, int], device: str) -> Iterator[Case]:
    """The packed product with its scales, FP32 out, beside torch's int8 product, which gives int32. Of ours the sums are compared to the bit."""
    at = _Operands(shape[0], shape[1:], device)

    def exact(bits: int) -> Callable[[Any], None]:
        check = equal_to(cache(lambda: at.sums(bits)))
        return lambda result: check((result.acc if isinstance(result, ops.IntegerProduct) else result)[at.some])

    def torch_int() -> Run:
        a, b = at.padded()
        return turns(lambda one: torch._int_mm(one, b), copies(a, device))

    def ours(bits: int) -> Callable[[], Run]:
        return lambda: turns(lambda one: ops.matmul(one, at.weight(bits or 4)), at.several(bits))

    close = close_in_norm(lambda: at.x[at.some].double() @ at.w.double(), at.k * UNIT)
    yield Case(
        at.shape,
        [
            Candidate("torch-int-mm", torch_int, exact(8), at.work("8", 4)),
            Candidate(
                "torch-fp32", lambda: turns(lambda x: x @ at.w, copies(at.x, device)), lambda r: close(r[at.some])
            ),
            *(Candidate(name, ours(bits), exact(bits), at.work(size, 4)) for name, (bits, size) in PRECISIONS.items()),
        ],
    )


def product_quantized(shape: tuple[str, int, int, int], device: str) -> Iterator[Case]:
    """Product, scales, bias, ReLU and 8-bit codes with a step per row: our one launch, and torch's int8 product followed by its operations on floats.
    Codes are compared to the bit."""
    at = _Operands(shape[0], shape[1:], device)
    counts = uniform_counts(at.n, 8)
    out_bits = torch.full((at.n,), 8, dtype=torch.uint8, device=device)

    @cache
    def out_step() -> Tensor:
        return torch.full((at.n,), float(ops.matmul(at.features(8), at.weight(8), at.bias).amax()) / 255, device=device)

    def epilogue(acc: Tensor, bits: int) -> Tensor:
        v = epilogue_reference(acc, at.features(bits).step, None, at.weight(bits or 4).step, at.bias, relu=True)
        return output_reference(v, "rows", out_step(), out_bits, None, counts, False)

    def codes_of_torch() -> Run:
        a, b = at.padded()
        row, column, step = at.features(8).step.unsqueeze(1), at.weight(8).step, out_step().unsqueeze(1)

        def run(one: Tensor) -> Tensor:
            v = torch.relu(torch._int_mm(one, b).float() * row * column + at.bias)
            return torch.floor(v / step + 0.5).clamp_(max=255).to(torch.uint8)

        return turns(run, copies(a, device))

    def ours(bits: int) -> Callable[[], Run]:
        columns, container = at.weight(bits or 4).columns

        def run(x: QTensor) -> Tensor:
            return matmul_packed(
                x.data, x.pos, list(x.counts), x.signed, 0, columns, container, at.k, at.m, "rows", x.step, at.weight(bits or 4).step,
                at.bias, None, True, None, None, out_step(), out_bits, None, counts, False,
            )  # fmt: skip

        return lambda: turns(run, at.several(bits))

    def exact(bits: int) -> Callable[[Any], None]:
        @cache
        def wanted() -> Tensor:
            dtype = exact_type(at.k * largest(bits or 4) ** 2)
            acc = at.features(bits).codes().to(dtype) @ at.weight(bits or 4).codes().to(dtype)
            return epilogue(acc, bits)

        check = equal_to(wanted)
        # rows of 128 codes need no padding: packed rows and a matrix of bytes are the same
        return lambda result: check(result.flatten())

    names = {"torch-int-mm": (8, codes_of_torch, "8")} | {n: (b, ours(b), s) for n, (b, s) in PRECISIONS.items()}
    yield Case(
        at.shape, [Candidate(name, build, exact(bits), at.work(size, 1)) for name, (bits, build, size) in names.items()]
    )


def quantization(shape: tuple[str, int, int], device: str) -> Iterator[Case]:
    """Packed codes of FP32 rows with a step each, beside torch's operations, whose int8 codes are not packed."""
    at = _Operands(shape[0], (*shape[1:], 1), device)
    inputs = copies(at.x, device)

    def torch_codes() -> Run:
        step = at.features(8).step.unsqueeze(1)

        def run(x: Tensor) -> Tensor:
            return (torch.floor(x.abs() / step + 0.5).clamp_(max=127) * x.sign()).to(torch.int8)

        return turns(run, inputs)

    def ours(bits: int) -> Callable[[], Run]:
        q = at.features(bits)
        return lambda: turns(lambda x: quantize(x, q.step, q.bits, True, True, q.pos, list(q.counts), False)[0], inputs)

    def exact(bits: int) -> Callable[[Any], None]:
        def accept(result: Tensor) -> None:
            q = at.features(bits)
            wanted, _ = codes_reference(at.x[at.some], q.step[at.some], q.bits[at.some], True, True)
            packed = result.dtype == torch.uint8
            found = replace(q, data=result).codes() if packed else result.to(torch.int32)
            equal_to(lambda: wanted.to(torch.int32))(found[at.some].to(torch.int32))

        return accept

    def work(containers: str) -> Work:
        return Work(at.n * (4 * at.k + 4 + mean(row_size(container, at.k) for container in containers)), at.n * at.k)

    yield Case(
        f"{at.shape.split(']')[0]}]",
        [
            Candidate("torch-int8", torch_codes, exact(8), work("8")),
            *(Candidate(name, ours(bits), exact(bits), work(size)) for name, (bits, size) in PRECISIONS.items()),
        ],
    )


def attention(name: str, device: str) -> Iterator[Case]:
    """Scores, softmax and aggregation of a GAT with 8 heads of 16, self loops added. FP32 sums and exponentials are off by the terms' number of
    roundings at most, FP16 by two roundings of the norm; the reference is in FP64."""
    at = gpu_scene(name, device)
    graph = at.graph.with_self_loops
    generator = torch.Generator(device).manual_seed(0)
    x, source, target = (
        torch.randn(size, generator=generator, device=device)
        for size in ((at.nodes, HEADS, CHANNELS), (at.nodes, HEADS), (at.nodes, HEADS))
    )

    def on(dtype: torch.dtype) -> Callable[[], Run]:
        return lambda: turns(lambda one: run(one.view_as(x)), copies(x.to(dtype), device))

    def run(one: Tensor) -> Tensor:
        return ops.gat_aggregate(graph, one, source, target, SLOPE)

    def messages() -> Run:
        check_messages(graph.num_edges, HEADS * CHANNELS, device)
        i, j = graph.rows.long(), graph.indices.long()

        def pyg(one: Tensor) -> Tensor:
            alpha = softmax(F.leaky_relu(source[j] + target[i], SLOPE), i, num_nodes=at.nodes)
            return scatter(alpha.unsqueeze(-1) * one[j], i, 0, at.nodes, "sum")

        return turns(pyg, copies(x, device))

    @cache
    def expected() -> Tensor:
        return attention_on_csr(graph, x.double(), source.double(), target.double(), SLOPE)

    def on_csr() -> Run:
        return turns(lambda one: attention_on_csr(graph, one, source, target, SLOPE), copies(x, device))

    fp32 = close_in_norm(expected, (graph.max_degree + 10) * UNIT)
    work = Work(graph.num_edges * (4 * HEADS * (CHANNELS + 1) + 4), graph.num_edges * HEADS * CHANNELS)
    yield Case(
        f"{at.name} {HEADS} heads of {CHANNELS}",
        [
            Candidate("torch-csr-fp32", on_csr, fp32),
            Candidate("pyg-scatter-fp32", messages, fp32),
            Candidate("qgnn-fp32", on(torch.float32), fp32, work),
            Candidate("qgnn-fp16", on(torch.float16), close_in_norm(expected, 2 * HALF_UNIT)),
        ],
    )


def nearest(shape: tuple[int, int, int], device: str) -> Iterator[Case]:
    """The Nearest Neighbor Strategy of :func:`qgnn.perf.quantizers.nearest`; on a CPU tiny."""
    return nearest_group(shape if device == "cuda" else (TINY.nodes, 20, 24), device)
