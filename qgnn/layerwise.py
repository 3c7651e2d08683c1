"""Inference on a whole graph, layer by layer and a chunk of nodes at a time: of all maps, only one layer's input and its output exist."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.sampler import NodeSamplerInput

from . import models
from .graph import Graph
from .sampler import NeighborSampler, block
from .store import QuantizedFeatureStore
from .store.sources import Source

CHUNK = 1 << 16
"""Nodes whose outputs are computed at once. With their neighbours they have rows in memory, no others."""

NodeModel = models.GCN | models.GAT | models.GIN | models.GraphSAGE

Map = Tensor | QuantizedFeatureStore
"""A feature map: float32 ``[N, F]``, or a store that holds it as ``x``."""


@torch.no_grad()
def layerwise(model: NodeModel, graph: Graph | Data, features: Map, *, bits: int = 0, chunk: int = CHUNK) -> Tensor:
    """What ``model(x, graph)`` gives in evaluation, up to the rounding of float32 sums. Every layer reads all neighbours of ``chunk`` nodes, and
    computes the outputs of no node twice (GraphSAGE's inference, which sampled training goes with).

    Args:
        model: one of :mod:`qgnn.models` for nodes, in eval mode. Its quantizers have their steps and ranges already: from training, or one pass.
        graph: the graph, without self loops that were added.
        features: ``x`` ``[N, in_channels]``, or a store that holds it under this name.
        bits: 1 to 8 keeps the maps between layers at this width, a step per node; 0 keeps them in float32.
        chunk: nodes at a time.

    Returns:
        ``[N, out_channels]``, on the CPU.

    Raises:
        ValueError: the model is in training mode, or the features are not those of the graph's nodes.
    """
    if model.training:
        raise ValueError("layerwise is for inference; call model.eval() first")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    whole = (graph if isinstance(graph, Graph) else Graph.from_data(graph)).to("cpu")
    size = _size(features)
    if size is None or size[0] != whole.num_nodes:
        raise ValueError(
            f"the features are {size}, and the graph has {whole.num_nodes} nodes: a row is wanted for each"
        )
    read = features
    for number, conv in enumerate(model.convs):
        last = number == len(model.convs) - 1
        layer = _Layer(model, number, conv, whole, read, chunk)
        if bits and not last:
            store = QuantizedFeatureStore(bits, signed=model.activation != "relu")
            store[None, "x", None] = layer
            read = store
        else:
            out = torch.empty(layer.rows, layer.features)
            for first, block_ in zip(range(0, layer.rows, chunk), layer.blocks(), strict=True):
                out[first : first + chunk] = block_
            read = out
    assert isinstance(read, Tensor)
    return read


def _size(features: Map) -> tuple[int, ...] | None:
    return tuple(features.shape) if isinstance(features, Tensor) else features.get_tensor_size(None, "x", None)


class _Layer(Source):
    """The outputs of a layer, computed as they are read."""

    def __init__(self, model: NodeModel, number: int, conv: nn.Module, graph: Graph, read: Map, chunk: int) -> None:
        self.model, self.number, self.conv, self.graph, self.read, self.chunk = model, number, conv, graph, read, chunk
        self.device = next(model.parameters()).device
        self.sampler = NeighborSampler(graph, [-1])
        x, part = self._neighbourhood(torch.arange(min(1, graph.num_nodes)))
        out = conv(x, part).size(1)
        super().__init__(f"the output of layer {number}", graph.num_nodes, out)

    def blocks(self) -> Iterator[Tensor]:
        last = self.number == len(self.model.convs) - 1
        for nodes in torch.arange(self.rows).split(self.chunk):
            x, part = self._neighbourhood(nodes)
            h = self.conv(x, part)[: nodes.numel()]
            if not last:
                h = self.model.activate(h)
                h = h + x[: nodes.numel()] if self.model.skip and self.number else h
            yield h.cpu()

    def _neighbourhood(self, nodes: Tensor) -> tuple[Tensor, Graph]:
        """What the layer reads for ``nodes``: rows of its input, those of ``nodes`` first, and the graph of all edges into ``nodes``."""
        out = self.sampler.sample_from_nodes(NodeSamplerInput(None, nodes))
        batch = Data(edge_index=torch.stack([out.row, out.col]), n_id=out.node, num_nodes=out.node.numel())
        part = block(batch.to(self.device))
        # A neighbour has the degree of the whole graph; its own edges are not here.
        for there, here in ((self.graph, part), (self.graph.with_self_loops, part.with_self_loops)):
            here.inv_sqrt_degree = there.inv_sqrt_degree[out.node].to(self.device)
        read = self.read
        x = read[out.node.to(read.device)] if isinstance(read, Tensor) else read[None, "x", out.node]
        return x.to(self.device), part
