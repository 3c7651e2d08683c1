"""The energy of FP32 inference on a GPU, modelled: what PyG's layers launch, each kernel's bytes and operations, and the power while they run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from .workload import Layer, Workload

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BASELINE = "2080ti"
"""The GPU that A2Q's figure 22 compares with."""

LAUNCH_SECONDS = 5e-6
"""What every kernel costs on top of its work (ACCELERATOR.md)."""

_FLOAT, _INDEX = 4, 8  # bytes: float32, and PyG's int64 indices


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as :func:`gpus` lists it.
        flops: FP32 peak, flop/s; bandwidth: of its memory, bytes/s.
        tdp_w, idle_w: board power at most and at rest, W.
        source: where the figures are from, and which are assumed.
    """

    name: str
    flops: float
    bandwidth: float
    tdp_w: float
    idle_w: float
    source: str


class Kernel(NamedTuple):
    """One kernel of a layer: what it does, its floating-point operations, and the bytes that it reads and writes."""

    layer: str
    name: str
    flops: int
    bytes: int

    def busy_seconds(self, gpu: Gpu) -> float:
        """Time of its work, by the roofline; :data:`LAUNCH_SECONDS` come on top."""
        return max(self.flops / gpu.flops, self.bytes / gpu.bandwidth)


@dataclass(frozen=True)
class GpuEnergy:
    """Modelled energy and time of one inference.

    Attributes:
        seconds: of all kernels, one after another.
        joules: ``seconds (P_idle + (TDP - P_idle) busy)``, busy being the share of the time in which kernels work, not launch.
        low_joules, high_joules: the bounds ``P_idle seconds`` and ``TDP seconds``.
        kernels: in the order in which they run.
    """

    seconds: float
    joules: float
    low_joules: float
    high_joules: float
    kernels: tuple[Kernel, ...]


@cache
def gpus() -> MappingProxyType[str, Gpu]:
    """The GPUs of ``gpus.toml`` by name."""
    content = tomllib.loads(Path(__file__).with_name("gpus.toml").read_text(encoding="utf-8"))
    return MappingProxyType({name: Gpu(name, **values) for name, values in content.items()})


def find_gpu(name: str = BASELINE) -> Gpu:
    """The GPU of a name.

    Raises:
        ValueError: it is not in ``gpus.toml``.
    """
    try:
        return gpus()[name]
    except KeyError:
        raise ValueError(f"there is no GPU {name!r}; choose one of {', '.join(gpus())}") from None


def model_fp32(workload: Workload, gpu: Gpu) -> GpuEnergy:
    """One FP32 inference of the workload's layers in PyG on a GPU: a time and an energy for orientation, with bounds, not a measurement."""
    kernels = tuple(fp32_kernels(workload))
    busy = sum(kernel.busy_seconds(gpu) for kernel in kernels)
    seconds = busy + LAUNCH_SECONDS * len(kernels)
    joules = gpu.idle_w * seconds + (gpu.tdp_w - gpu.idle_w) * busy
    return GpuEnergy(seconds, joules, gpu.idle_w * seconds, gpu.tdp_w * seconds, kernels)


def fp32_kernels(workload: Workload) -> Iterator[Kernel]:
    """What PyG's layers launch in eval mode on an ``edge_index`` of int64: messages are gathered, one row an edge, and added up by ``scatter_add_``.

    Bytes are those of the tensors that a kernel reads and writes, each once, as the CSR's edges are known: self loops are in it, and a GCN's
    edge weights are computed before (``cached=True``). Between two layers stands a ReLU. Pooling, BatchNorm and additions of skip connections
    are left out, as they are on the accelerator. The kind of a layer decides: a GIN or SAGE that was exported as "gcn", its product first, is a
    GCNConv here, which moves less than PyG's own order.
    """
    nodes, edges = workload.num_nodes, workload.num_edges
    for index, layer in enumerate(workload.layers):
        name = layer.name or f"layer {index}"
        for what, flops, floats, indices in _LAYERS[layer.kind](layer, nodes, edges):
            yield Kernel(name, what, flops, _FLOAT * floats + _INDEX * indices)
        if index + 1 < len(workload.layers):
            yield Kernel(name, "ReLU", nodes * layer.f_out, _FLOAT * 2 * nodes * layer.f_out)


# name, floating-point operations, floats and indices read and written
_Work = tuple[str, int, int, int]


def _product(layer: Layer, nodes: int, bias: bool) -> _Work:
    """``X W``, with the bias that cuBLAS adds on the way out."""
    size = nodes * layer.f_in + layer.f_in * layer.f_out + nodes * layer.f_out
    extra = layer.f_out if bias else 0
    return "product", 2 * nodes * layer.f_in * layer.f_out + nodes * extra, size + extra, 0


def _bias(layer: Layer, nodes: int) -> _Work:
    return "bias", nodes * layer.f_out, 2 * nodes * layer.f_out + layer.f_out, 0


def _gather(what: str, edges: int, columns: int) -> _Work:
    return f"gather {what}", 0, 2 * edges * columns, edges


def _scatter_add(what: str, nodes: int, edges: int, columns: int) -> _Work:
    return f"scatter_add of {what}", edges * columns, (edges + 2 * nodes) * columns, edges


def _sum(what: str, nodes: int, edges: int, columns: int) -> Iterator[_Work]:
    """PyG's ``scatter(reduce="sum")``: zeros, and messages added to them."""
    yield f"zeros of {what}", 0, nodes * columns, 0
    yield _scatter_add(what, nodes, edges, columns)


def _pointwise(what: str, size: int, reads: int) -> _Work:
    """One operation on each of ``size`` elements, ``reads`` floats read in all."""
    return what, size, size + reads, 0


def _gcn(layer: Layer, nodes: int, edges: int) -> Iterator[_Work]:
    size = edges * layer.f_out
    yield _product(layer, nodes, bias=False)
    yield _gather("messages", edges, layer.f_out)
    yield _pointwise("edge weights", size, size + edges)
    yield from _sum("messages", nodes, edges, layer.f_out)
    yield _bias(layer, nodes)


def _gat(layer: Layer, nodes: int, edges: int) -> Iterator[_Work]:
    """Scores of both ends, softmax over the edges into a node, and the weighted sum."""
    heads, size, scores = layer.heads, edges * layer.f_out, edges * layer.heads
    yield _product(layer, nodes, bias=False)
    for end in ("sources", "destinations"):
        yield _pointwise(f"attention of {end}", nodes * layer.f_out, nodes * layer.f_out + layer.f_out)
        yield f"scores of {end}", nodes * layer.f_out, nodes * (layer.f_out + heads), 0
    for end in ("sources", "destinations"):
        yield _gather(f"scores of {end}", edges, heads)
    yield _pointwise("scores of edges", scores, 2 * scores)
    yield _pointwise("leaky ReLU", scores, scores)
    yield "zeros of maxima", 0, nodes * heads, 0
    yield "scatter_reduce of maxima", scores, scores + 2 * nodes * heads, edges
    yield _gather("maxima", edges, heads)
    yield _pointwise("difference", scores, 2 * scores)
    yield _pointwise("exponential", scores, scores)
    yield from _sum("exponentials", nodes, edges, heads)
    yield _pointwise("epsilon", nodes * heads, nodes * heads)
    yield _gather("sums", edges, heads)
    yield _pointwise("quotient", scores, 2 * scores)
    yield _gather("messages", edges, layer.f_out)
    yield _pointwise("attention", size, size + scores)
    yield from _sum("messages", nodes, edges, layer.f_out)
    yield _bias(layer, nodes)


def _gin(layer: Layer, nodes: int, edges: int) -> Iterator[_Work]:
    size = nodes * layer.f_in
    yield _gather("messages", edges, layer.f_in)
    yield from _sum("messages", nodes, edges, layer.f_in)
    yield _pointwise("1 + epsilon", 1, 1)
    yield _pointwise("times 1 + epsilon", size, size + 1)
    yield _pointwise("own features", size, 2 * size)
    yield _product(layer, nodes, bias=True)


def _sage(layer: Layer, nodes: int, edges: int) -> Iterator[_Work]:
    """With the mean over neighbours; the product of a node's own features is a linear layer of the workload."""
    yield _gather("messages", edges, layer.f_in)
    yield "zeros of degrees", 0, nodes, 0
    yield "ones of edges", 0, edges, 0
    yield _scatter_add("degrees", nodes, edges, 1)
    yield _pointwise("degrees, at least 1", nodes, nodes)
    yield from _sum("messages", nodes, edges, layer.f_in)
    yield _pointwise("mean", nodes * layer.f_in, nodes * layer.f_in + nodes)
    yield _product(layer, nodes, bias=True)


def _linear(layer: Layer, nodes: int, edges: int) -> Iterator[_Work]:
    yield _product(layer, nodes, bias=True)


_LAYERS = {"gcn": _gcn, "gat": _gat, "gin": _gin, "sage": _sage, "linear": _linear}
