"""What a kernel needs at least on a GPU: the time for its bytes, or for the instructions of its inner loop (:mod:`.static`), whichever is longer.

Bytes are those of tensors that are read or written once, and of the rows that an aggregation gathers: one for every edge, as if none were cached.
Rows are read in sectors of 32 bytes. How much of that the L2 cache can save at best, by holding the rows that are read most, is a number beside it
(:class:`Bound`), by the degree law of :mod:`.gpu_scene`. Instructions are those of the fastest inner loop of the machine code, which most edges
of large graphs go through, at four warps a clock and multiprocessor, and integer ones at two (CUDA C++ Programming Guide, "Throughput of Native
Arithmetic Instructions": 64 a clock for 32-bit additions, shifts and logic, of compute capability 8.0, 9.0 and 10.0).

Bounds are predictions, not measurements: latencies, the ends of rows and launches come on top.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..kernels.packing import row_bytes
from .gpu_scene import SIZES, Sizes
from .static.compiler import Compiled

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECTOR = 32
"""Bytes that a GPU's memory gives at least (CUDA C++ Best Practices Guide, "Coalesced Access to Global Memory")."""
LANES, INTEGER_LANES = 128, 64
"""Instructions of threads that a multiprocessor starts in a clock: of all kinds, and of integers."""
HEADS = 8
COLUMNS = 128
"""Columns of the product, and of the tile that reads ``x`` once."""
FLOATS = {"fp32": 4, "fp16": 2}


@dataclass(frozen=True)
class Rates:
    """A GPU of ``gpus.toml``, where the units stand."""

    name: str
    target: str
    bandwidth: float
    l2: float
    sms: int
    clock: float
    int8: float
    source: str


@cache
def gpus() -> tuple[Rates, ...]:
    """The GPUs of ``gpus.toml``."""
    content = tomllib.loads(Path(__file__).with_name("gpus.toml").read_text(encoding="utf-8"))
    return tuple(Rates(name, **values) for name, values in content.items())


@dataclass(frozen=True)
class Kernel:
    """A kernel on tensors of given sizes.

    Attributes:
        name, reads: of the machine code that runs it (:class:`.static.compiler.Compiled`).
        row: bytes of a gathered row, 0 where none are gathered.
        bytes: to be read and written, gathered rows among them.
        elements: that the inner loop reads.
        products: operations of matrix instructions.
    """

    name: str
    reads: str
    row: int
    bytes: float
    elements: float
    products: float = 0.0


@dataclass(frozen=True)
class Bound:
    """Least times in ms. ``instruction_ms`` is None where there is no inner loop, or none that was compiled. ``cached``: share of the edges whose row
    lies in the L2 cache, if that holds the rows that are read most."""

    kernel: Kernel
    gpu: Rates
    byte_ms: float
    instruction_ms: float | None
    product_ms: float
    cached: float

    @property
    def ms(self) -> float:
        return max(self.byte_ms, self.instruction_ms or 0.0, self.product_ms)

    @property
    def limit(self) -> str:
        """What takes that long."""
        if self.ms == self.byte_ms:
            return "bytes"
        return "tensor cores" if self.ms == self.product_ms else "instructions"


def row_size(reads: str, features: int) -> int:
    """Bytes of a row of ``reads``: "fp32", "fp16", or the bits of a container, packed."""
    return FLOATS[reads] * features if reads in FLOATS else int(row_bytes(int(reads), features))


def aggregation(sizes: Sizes, features: int, reads: str) -> Kernel:
    """Sum over neighbours, its result as wide as its input."""
    row = row_size(reads, features)
    gathered = -(-row // SECTOR) * SECTOR
    moved = sizes.edges * (gathered + 4) + sizes.nodes * (4 + row)
    name = "_aggregate_sum_kernel" if reads in FLOATS else "_aggregate_packed_kernel"
    return Kernel(name, reads, row, moved, sizes.edges * features)


def attention(sizes: Sizes, features: int, reads: str) -> Kernel:
    """GAT with 8 heads on packed codes, float32 out; with every row comes its score of each head."""
    row = row_size(reads, features)
    gathered = -(-row // SECTOR) * SECTOR + 4 * HEADS
    moved = sizes.edges * (gathered + 4) + sizes.nodes * (4 + 4 * HEADS + 4 * features)
    return Kernel("_gat_packed_kernel", reads, row, moved, sizes.edges * features)


def product(sizes: Sizes, features: int, reads: str) -> Kernel:
    """Packed ``[N, F] x [F, 128]``, float32 out; weights of any width are multiplied, and read, as int8."""
    moved = sizes.nodes * (row_size(reads, features) + 4 + 4 * COLUMNS) + COLUMNS * features
    elements = sizes.nodes * features
    return Kernel("_matmul_packed_kernel", reads, 0, moved, elements, 2.0 * elements * COLUMNS)


def quantization(sizes: Sizes, features: int, reads: str) -> Kernel:
    """FP32 to packed rows, with a step and a width each, and a bit for every value that was clipped."""
    moved = sizes.nodes * (4 * features + row_size(reads, features) + 8 + features / 8)
    return Kernel("_quantize_fwd_kernel", reads, 0, moved, sizes.nodes * features)


def kernels(sizes: Sizes, features: int) -> Iterator[tuple[str, Kernel]]:
    """What is predicted for a graph, by name."""
    for reads in ("fp32", "fp16", "8", "4", "2"):
        yield f"aggregate {reads if reads in FLOATS else f'int{reads}'}", aggregation(sizes, features, reads)
    for reads in ("8", "4"):
        yield f"gat int{reads}", attention(sizes, features, reads)
    for reads in ("8", "4"):
        yield f"matmul int{reads}", product(sizes, features, reads)
    yield "quantize int8", quantization(sizes, features, "8")


def instruction_clocks(kernel: Kernel, rows: Sequence[Compiled], target: str) -> float | None:
    """Clocks of a multiprocessor per element, in the fastest inner loop of the code that was compiled for ``kernel``; None where there is none."""
    same = ("fp16", "bf16") if kernel.reads == "fp16" else (kernel.reads,)
    found = [
        max(loop.instructions / LANES, loop.integer / INTEGER_LANES) * row.element_bits / loop.row_bits
        for row in rows
        if row.kernel == kernel.name and row.reads in same and row.target == target and row.element_bits
        for loop in row.loops
        if loop.row_bits
    ]
    return min(found, default=None)


def cached_share(sizes: Sizes, row: int, l2: float) -> float:
    """Share of the edges whose source is one of the rows that fill the L2 cache, the most read first.

    The node of rank ``r`` is drawn with a chance in proportion to ``r^(1/k - 1)`` (:mod:`.gpu_scene`): the first ``n`` of ``N`` have a share of
    ``(n / N)^(1/k)``.
    """
    exponent = math.log(sizes.edges / sizes.largest) / math.log(sizes.nodes)
    return float(min(l2 / row / sizes.nodes, 1.0) ** exponent)


def predict(kernel: Kernel, sizes: Sizes, gpu: Rates, rows: Sequence[Compiled]) -> Bound:
    """The bound of a kernel on a GPU, by the static rows of its target."""
    clocks = instruction_clocks(kernel, rows, gpu.target)
    return Bound(
        kernel,
        gpu,
        byte_ms=1e3 * kernel.bytes / gpu.bandwidth,
        instruction_ms=None if clocks is None else 1e3 * kernel.elements * clocks / (gpu.sms * gpu.clock),
        product_ms=1e3 * kernel.products / gpu.int8,
        cached=cached_share(sizes, kernel.row, gpu.l2) if kernel.row else 0.0,
    )


def graphs() -> Iterator[tuple[str, Sizes, int]]:
    """Graphs and columns that bounds are printed for: a graph's own, and 128."""
    for name, sizes in SIZES.items():
        for features in sorted({sizes.features, 128}, reverse=True):
            yield name, sizes, features


def table(rows: Sequence[Compiled]) -> str:
    """A Markdown table of every graph, kernel and GPU whose target was compiled: ms by bytes, by instructions (and tensor cores), and the limit."""
    shown = [gpu for gpu in gpus() if any(row.target == gpu.target for row in rows)]
    head = ["graph", "F", "kernel", *(f"{gpu.name}, ms" for gpu in shown), "limit", "instructions, share", "rows in L2"]
    lines = [
        f"| {' | '.join(head)} |",
        f"| {' | '.join(['---', '---:', '---', *['---:'] * len(shown), '---', '---:', '---:'])} |",
    ]
    for name, sizes, features in graphs():
        for label, kernel in kernels(sizes, features):
            found = [predict(kernel, sizes, gpu, rows) for gpu in shown]
            limits = list(dict.fromkeys(bound.limit for bound in found))
            shares = ["" if b.instruction_ms is None else f"{b.instruction_ms / b.ms:.0%}" for b in found]
            cached = [f"{bound.cached:.0%}" if kernel.row else "" for bound in found]
            cells = [name, str(features), label, *(f"{bound.ms:.3g}" for bound in found), " / ".join(limits)]
            lines.append(f"| {' | '.join([*cells, _same(shares), _same(cached)])} |")
    return "\n".join(lines)


def _same(cells: Sequence[str]) -> str:
    """Cells of the GPUs in one; one cell where all are the same."""
    return cells[0] if len(set(cells)) == 1 else " / ".join(cell or "-" for cell in cells)
