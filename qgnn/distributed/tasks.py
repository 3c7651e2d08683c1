"""Tasks of one process of many: its nodes of a graph that is in parts, or its share of a batch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torch.utils.data.distributed import DistributedSampler
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader, NodeLoader

from ..data import GraphDataset
from ..features import SparseFeatures
from ..graph import Graph
from ..objectives import Classification, Objective
from ..recipes import Recipe
from ..tasks import GraphTask, NodeTask, SampledNodeTask, Scores, training_features
from . import group
from .layers import kept
from .partition import PartitionedGraph


class PartTask(NodeTask):
    """The nodes of a part; every step computes on the whole graph, and a process's loss is its share of the whole loss.

    Args:
        data: the whole graph's, of which the part's rows are kept.
        objective: classification of nodes.
        graph: the part.
        input_dropout: chance that a feature is dropped in training; of sparse features the same that one process drops.
    """

    def __init__(self, data: Data, objective: Objective, graph: PartitionedGraph, input_dropout: float) -> None:
        if not isinstance(objective, Classification):
            raise ValueError(
                "--parallel partition measures accuracy only; train this data set with --parallel data and a fanout"
            )
        inner = graph.plan.inner
        own = {name: data[name][inner] for name in ("y", "train_mask", "val_mask", "test_mask")}
        self.data, self.objective, self.graph = Data(edge_index=graph, **own), objective, graph
        self.x, self.places = _rows(training_features(data.x), inner)
        self.nodes, self.input_dropout = graph.plan.nodes, input_dropout
        counts = torch.stack([own[name].sum() for name in ("train_mask", "val_mask", "test_mask")])
        self.counted = group.all_sum(counts)
        self.train_share = float(counts[0] / self.counted[0])
        self.share = inner.numel() / self.nodes

    def _dropped(self, training: bool) -> Tensor | SparseFeatures:
        if not (training and self.input_dropout):
            return self.x
        factors = kept(self.places, self.input_dropout)
        if isinstance(self.x, Tensor):
            return self.x * factors
        return replace(self.x, values=self.x.values * factors)

    def loss(self, model: nn.Module, batch: Data, teacher: Tensor | None, weight: float) -> Tensor:
        out = model(self._dropped(model.training), self.graph)
        train = batch.train_mask
        # A part without training nodes has the mean over nothing, which is NaN.
        loss = out.sum() * 0 if not self.train_share else self.objective.loss(out[train], batch.y[train])
        loss = loss * self.train_share
        return loss if teacher is None else loss + weight * self.share * self.objective.distill(out, teacher)

    def scores(self, out: Tensor) -> Scores:
        """The scores of all processes' outputs."""
        sums = []
        for mask in (self.data.val_mask, self.data.test_mask):
            right = (out[mask].argmax(1) == self.data.y[mask]).sum()
            sums.append(right.double())
        val = self.data.val_mask
        loss = self.objective.loss(out[val], self.data.y[val]) * val.sum() if bool(val.any()) else out.new_zeros(())
        total = group.all_sum(torch.stack([*sums, loss.double()]))
        _, vals, tests = self.counted.tolist()
        return Scores(float(total[0]) / vals * 100, float(total[1]) / tests * 100, float(total[2]) / vals)


def _rows(x: Tensor | SparseFeatures, inner: Tensor) -> tuple[Tensor | SparseFeatures, Tensor]:
    """The rows of the part, and the places of their elements, or nonzeros, in the whole matrix."""
    if isinstance(x, Tensor):
        return x[inner], inner.unsqueeze(1) * x.size(1) + torch.arange(x.size(1), device=x.device)
    indptr = x.graph.indptr.long()
    first, count = indptr[inner], indptr[inner + 1] - indptr[inner]
    own = torch.zeros(inner.numel() + 1, dtype=torch.int64, device=inner.device)
    torch.cumsum(count, 0, out=own[1:])
    places = torch.arange(int(own[-1]), device=inner.device) + (first - own[:-1]).repeat_interleave(count)
    graph = Graph.from_csr(own, x.graph.indices[places], x.size(1))
    return SparseFeatures(graph, x.values[places]), places


def _sampler(items: int, seed: int) -> DistributedSampler[tuple[Tensor, ...]]:
    """Which of ``items`` a process takes in an epoch. Some are taken twice where they cannot be shared equally."""
    places = TensorDataset(torch.arange(items))
    return DistributedSampler(places, group.size(), group.rank(), shuffle=True, seed=seed)


def _share(batch: int, items: int) -> int:
    """Items of a batch that a process takes."""
    return -(-min(batch or items, items) // group.size())


class SharedNodeTask(SampledNodeTask):
    """A process's share of the training nodes; the batch of ``recipe`` is that of all processes."""

    def __init__(self, data: Data, objective: Objective, recipe: Recipe, seed: int) -> None:
        super().__init__(data, objective, recipe)
        train = data.train_mask.cpu()
        seeds = int(train.sum())
        self.order, size = _sampler(seeds, seed), _share(recipe.batch, seeds)
        self.loader = NodeLoader(self.loader.data, self.sampler, train, batch_size=size, sampler=self.order)


class SharedGraphTask(GraphTask):
    """A process's share of the training graphs; the batch of ``recipe`` is that of all processes."""

    def __init__(self, dataset: GraphDataset, fold: int, recipe: Recipe, device: str, seed: int) -> None:
        super().__init__(dataset, fold, recipe, device)
        self.order, size = _sampler(len(self.train), seed), _share(recipe.batch, len(self.train))
        self.loader = DataLoader(self.train, size, sampler=self.order)
