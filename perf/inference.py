"""What the nearest neighbour strategy adds to the time of inference on graphs that training never saw (A2Q section 5).

The other model, as in the paper's appendix A.6.1, takes its steps and widths by in-degree: they are known as soon as the graph is, and the largest
magnitude of a row is neither looked for nor compared with anything. All else is the same. A search of ``m`` groups is ``log2 m`` comparisons a
row, where a layer of the model multiplies and adds ``2 * 64 * 64`` times a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from .. import ops
from ..graph import Graph
from ..kernels.backend import use_backend
from ..models import PooledGIN
from ..quant import GroupQuantizer, begin, parse
from .bench import UNIT, Case, close_in_norm, ready


def _by_in_degree(quantizer: GroupQuantizer, x: Tensor, weight: Tensor) -> Tensor:
    """What :meth:`GroupQuantizer.product` does, with the group of a row given by its in-degree."""
    assert quantizer.in_degree is not None
    group = quantizer.in_degree[: x.size(0)].clamp_max(quantizer.bits.numel() - 1)
    step, bits = quantizer.log_step.exp()[group], quantizer.bits[group]
    return ops.fake_quantize(x, step, bits, signed=quantizer.kind == "signed") @ weight


@contextmanager
def _in_degrees(model: torch.nn.Module, graph: Graph) -> Iterator[None]:
    begin(model, graph)
    for module in model.modules():
        if isinstance(module, GroupQuantizer):
            module.in_degree = graph.in_degree
    with patch.object(GroupQuantizer, "product", _by_in_degree), patch("qgnn.nn.gin_conv.begin", lambda *_: None):
        yield


def nearest_share(batch_of: tuple[int, int, int], device: str) -> Iterator[Case]:
    """A batch of so many graphs, each of so many nodes and edges: inference of a five-layer GIN of 64 features, with 1,000 groups. Each model must
    compute what it computes in plain torch."""
    generator = torch.Generator().manual_seed(0)
    graphs, per_graph, edges = batch_of
    nodes = graphs * per_graph
    batch = torch.arange(graphs).repeat_interleave(per_graph)
    start = torch.arange(graphs).repeat_interleave(2 * edges) * per_graph
    # a few users of a thread are answered by most: squares of uniform numbers gather near 0
    ends = (torch.rand(2, start.numel(), generator=generator).square() * per_graph).long() + start
    x = torch.rand(nodes, 1, generator=generator).to(device)
    batch = batch.to(device)
    graph = Graph.from_edge_index(ends.to(device), nodes)
    model = PooledGIN(1, 64, 2, num_layers=5, scheme=parse("a2q-nns")).to(device)
    model(x, graph, batch, graphs)
    model.eval()

    @torch.no_grad()
    def infer() -> Tensor:
        return model(x, graph, batch, graphs)

    def without() -> Tensor:
        with _in_degrees(model, graph):
            return infer()

    def on_reference(run: Callable[[], Tensor]) -> Tensor:
        with use_backend("reference"):
            return run()

    yield Case(
        f"gin 5 x 64, {nodes} nodes, m=1000",
        [
            ready(name, run, close_in_norm(partial(on_reference, run), _ties(graph.max_degree + 64)))
            for name, run in {"qgnn-by-in-degree": without, "qgnn-nns": infer}.items()
        ],
    )


def _ties(terms: int) -> float:
    """How far, of its norm, a quantized result may be from the same computed otherwise: rounding decides ties.

    FP32 sums of ``n`` terms are off by about ``sqrt(n) u`` of the result, rounding errors being independent. A value of up to 127 steps is that near
    to a tie with a chance of ``127 sqrt(n) u``; its code then moves by a step, energy ``s^2``, where quantization makes ``s^2 / 12`` of every value.
    So where the signal has at least the energy of that noise, ``sqrt(12 * 127 sqrt(n) u)`` of its norm may differ.
    """
    return float((12 * 127 * terms**0.5 * UNIT) ** 0.5)
