"""What the nearest neighbour strategy adds to the time of inference on graphs that training never saw (A2Q section 5).

The other model, as in the paper's appendix A.6.1, takes its steps and widths by in-degree: they are known as soon as the graph is, and the largest
magnitude of a row is neither looked for nor compared with anything. All else is the same. A search of ``m`` groups is ``log2 m`` comparisons a
row, where a layer of the model multiplies and adds ``2 * 64 * 64`` times a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from .. import ops
from ..graph import Graph
from ..models import PooledGIN
from ..quant import GroupQuantizer, begin, parse
from .kernels import Row
from .timing import paired

GRAPHS, NODES, EDGES = 128, 430, 995
"""A batch of REDDIT-BINARY: graphs, and the mean of their nodes and edges."""


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


def nearest_share(device: str, rounds: int) -> Iterator[Row]:
    """Inference of a five-layer GIN of 64 features, with 1,000 groups."""
    generator = torch.Generator().manual_seed(0)
    nodes = GRAPHS * NODES
    batch = torch.arange(GRAPHS).repeat_interleave(NODES)
    start = torch.arange(GRAPHS).repeat_interleave(2 * EDGES) * NODES
    # a few users of a thread are answered by most: squares of uniform numbers gather near 0
    ends = (torch.rand(2, start.numel(), generator=generator).square() * NODES).long() + start
    x = torch.rand(nodes, 1, generator=generator).to(device)
    batch = batch.to(device)
    graph = Graph.from_edge_index(ends.to(device), nodes)
    model = PooledGIN(1, 64, 2, num_layers=5, scheme=parse("a2q-nns")).to(device)
    model(x, graph, batch, GRAPHS)
    model.eval()

    @torch.no_grad()
    def infer() -> Tensor:
        return model(x, graph, batch, GRAPHS)

    def without() -> Tensor:
        with _in_degrees(model, graph):
            return infer()

    shape = f"gin 5 x 64, {nodes} nodes, m=1000"
    for name, timing in paired({"qgnn-by-in-degree": without, "qgnn-nns": infer}, rounds, device=device).items():
        yield Row("inference", shape, name, timing)
