"""Tasks: which batches a training step sees, what their loss is, and how good predictions are."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.loader import DataLoader, NodeLoader

from .data import GraphDataset
from .features import SparseFeatures
from .graph import Graph
from .objectives import Classification, Objective, objective_of
from .quant.base import is_row_binary
from .recipes import Recipe

if TYPE_CHECKING:
    from .data import Dataset
    from .layerwise import NodeModel
    from .store import QuantizedFeatureStore

SPARSE_BELOW = 0.1
"""Share of nonzeros below which features are multiplied as a sparse matrix."""

EVALUATED_GRAPHS = 512
"""Graphs in a batch of evaluation. These batches are put together once."""


def row_normalized(x: Tensor) -> Tensor:
    """Each row divided by the sum of its magnitudes."""
    return x / x.abs().sum(1, keepdim=True).clamp_min(1e-12)


def prepare(dataset: Dataset, recipe: Recipe) -> Data:
    """The data of a data set with the recipe's feature normalisation (:func:`row_normalized`)."""
    if not recipe.normalize_features:
        return dataset.data
    data = copy.copy(dataset.data)
    assert isinstance(data.x, Tensor)
    data.x = row_normalized(data.x)
    return data


def training_features(x: Tensor | None) -> Tensor | SparseFeatures:
    """Features as training multiplies them: sparse where few are nonzero and 1 bit represents them exactly, so that nothing has to quantize them."""
    assert isinstance(x, Tensor)
    sparse = int(x.count_nonzero()) < SPARSE_BELOW * x.numel() and is_row_binary(x)
    return SparseFeatures.from_dense(x) if sparse else x


@dataclass(frozen=True)
class Scores:
    """Metric on the validation and the test part, and loss on the validation part."""

    val: float
    test: float
    loss: float


class Task(ABC):
    """What the trainer asks for. :meth:`teach`, :meth:`start` and :meth:`evaluate` are called in eval mode and without gradients.

    Attributes:
        objective: compares outputs with labels.
        nodes: nodes that :meth:`evaluate` runs the model on.
    """

    objective: Objective
    nodes: int

    @abstractmethod
    def batches(self) -> Iterable[Any]:
        """The batches of an epoch, one for each training step; all chance comes from torch's default generator, so that its state resumes a run."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any, teacher: Tensor | None, weight: float) -> Tensor:
        """Loss of a batch; with a teacher also ``weight`` times the loss against what :meth:`teach` gave."""

    @abstractmethod
    def features(self, batch: Any) -> Tensor:
        """The features in a batch, to look for what is not finite."""

    @abstractmethod
    def teach(self, model: nn.Module) -> Tensor:
        """What the model predicts for the training data, softened."""

    @abstractmethod
    def start(self, model: nn.Module) -> None:
        """One pass over training data, which quantizers take their steps and ranges from."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> Scores:
        """The scores of a model."""

    @abstractmethod
    def example(self) -> Data:
        """What a model is frozen on: the graph, or test graphs. Without edge weights, which training does not read."""

    @abstractmethod
    def evaluate_frozen(self, frozen: nn.Module) -> Scores:
        """The scores of an integer model that is bound to the example."""


class NodeTask(Task):
    """Nodes of one graph; every step computes on the whole graph. The teacher teaches all nodes.

    Args:
        data: ``x``, ``edge_index``, ``y`` and the masks of a split.
        objective: by default classification.
    """

    def __init__(self, data: Data, objective: Objective | None = None) -> None:
        self.data, self.objective = data, objective or Classification()
        self.x = training_features(data.x)
        self.nodes = self.x.size(0)

    def batches(self) -> Iterable[Any]:
        return [self.data]

    def loss(self, model: nn.Module, batch: Any, teacher: Tensor | None, weight: float) -> Tensor:
        out = model(self.x, batch.edge_index)
        loss = self.objective.loss(out[batch.train_mask], batch.y[batch.train_mask])
        return loss if teacher is None else loss + weight * self.objective.distill(out, teacher)

    def features(self, batch: Any) -> Tensor:
        return self.x if isinstance(self.x, Tensor) else self.x.values

    def teach(self, model: nn.Module) -> Tensor:
        return self.objective.soften(self.outputs(model))

    def start(self, model: nn.Module) -> None:
        model(self.x, self.data.edge_index)

    def evaluate(self, model: nn.Module) -> Scores:
        return self.scores(self.outputs(model))

    def outputs(self, model: nn.Module) -> Tensor:
        """What the model gives for all nodes, ``[N, C]``."""
        out: Tensor = model(self.x, self.data.edge_index)
        return out

    def example(self) -> Data:
        return Data(x=self.data.x, edge_index=self.data.edge_index)

    def evaluate_frozen(self, frozen: nn.Module) -> Scores:
        return self.scores(frozen())

    def scores(self, out: Tensor) -> Scores:
        """The scores of outputs ``[N, C]``."""
        y, val, test = self.data.y, self.data.val_mask, self.data.test_mask
        assert isinstance(y, Tensor)
        return Scores(
            self.objective.score(out[val], y[val]),
            self.objective.score(out[test], y[test]),
            float(self.objective.loss(out[val], y[val])),
        )


class SampledNodeTask(NodeTask):
    """Nodes of one graph; every step computes on ``recipe.batch`` training nodes and, for each layer, ``recipe.fanout`` neighbours of every node,
    drawn anew (GraphSAGE). Evaluation and the teacher use all neighbours. With ``recipe.feature_bits``, all of them read the rows of a
    :class:`qgnn.QuantizedFeatureStore`; quantizers start from, and models are frozen on, its values of all nodes.

    What it imports when it is used loads Numba and safetensors, which training on whole graphs on a GPU does without."""

    def __init__(self, data: Data, objective: Objective, recipe: Recipe) -> None:
        from .sampler import NeighborSampler
        from .store import QuantizedFeatureStore

        super().__init__(data, objective)
        assert isinstance(data.x, Tensor)
        self.x = data.x  # batches take rows of it
        host = copy.copy(data).to("cpu")
        self.graph = Graph.from_data(host)
        self.sampler = NeighborSampler(self.graph, [recipe.fanout] * recipe.layers)
        size = recipe.batch or int(host.train_mask.sum())
        self.store: QuantizedFeatureStore | None = None
        source: Data | tuple[QuantizedFeatureStore, Data] = host
        if recipe.feature_bits:
            self.store = QuantizedFeatureStore(recipe.feature_bits)
            self.store[None, "x", None], self.store[None, "y", None] = host.x, host.y
            source = self.store, host
        self.loader = NodeLoader(source, self.sampler, host.train_mask, batch_size=size, shuffle=True)

    def batches(self) -> Iterable[Data]:
        self.sampler.calls = int(torch.randint(2**62, ()))
        return (batch.to(self.data.x.device) for batch in self.loader)

    def loss(self, model: nn.Module, batch: Data, teacher: Tensor | None, weight: float) -> Tensor:
        from .sampler import block

        seeds = batch.batch_size
        out = model(batch.x, block(batch))[:seeds]
        loss = self.objective.loss(out, batch.y[:seeds])
        return loss if teacher is None else loss + weight * self.objective.distill(out, teacher[batch.n_id[:seeds]])

    def features(self, batch: Data) -> Tensor:
        return batch.x

    def start(self, model: nn.Module) -> None:
        example = self.example()
        model(example.x, example.edge_index)

    def outputs(self, model: nn.Module) -> Tensor:
        if self.store is None:
            return super().outputs(model)
        from .layerwise import layerwise

        return layerwise(cast("NodeModel", model), self.graph, self.store).to(self.data.x.device)

    def example(self) -> Data:
        x = self.x if self.store is None else self.store[None, "x", None].to(self.data.x.device)
        return Data(x=x, edge_index=self.data.edge_index)


@dataclass(frozen=True, eq=False)
class GraphBatch:
    """Graphs put together.

    Attributes:
        inputs: what the model is called with: ``x`` ``[N, F]``, the graph, the graph of every node int64 ``[N]``, and the number of graphs ``G``.
        y: labels, int64 ``[G]`` or float32 ``[G, C]``.
        place: places among the training graphs, int64 ``[G]``.
    """

    inputs: tuple[Tensor, Graph, Tensor, int]
    y: Tensor
    place: Tensor


class GraphTask(Task):
    """Whole graphs, in mini-batches of ``recipe.batch`` by PyG's DataLoader.

    Args:
        dataset: the graphs and their splits.
        fold: which of the splits.
        recipe: batch size (0: all graphs) and feature normalisation.
        device: where to compute.
    """

    def __init__(self, dataset: GraphDataset, fold: int, recipe: Recipe, device: str) -> None:
        split, self.device = dataset.splits[fold], device
        self.train, val, test = (_graphs(dataset, part, recipe) for part in (split.train, split.val, split.test))
        size = recipe.batch or len(self.train)
        # A last batch of one graph has no variance for a BatchNorm.
        alone = len(self.train) > 1 and len(self.train) % size == 1
        self.loader = DataLoader(self.train, size, shuffle=True, drop_last=alone)
        self.val, self.test = list(self._collated(val)), list(self._collated(test))
        self.nodes = sum(batch.inputs[0].size(0) for batch in (*self.val, *self.test))
        self.objective = objective_of(dataset.task, torch.cat([cast(Tensor, g.y) for g in self.train]).to(device))

    def _on_device(self, batch: Batch) -> GraphBatch:
        batch = batch.to(self.device)
        return GraphBatch((batch.x, Graph.from_data(batch), batch.batch, batch.num_graphs), batch.y, batch.place)

    def _collated(self, graphs: list[Data]) -> Iterator[GraphBatch]:
        """Large batches in the order of the graphs. Not by a DataLoader, which draws a random number whenever it starts."""
        for start in range(0, len(graphs), EVALUATED_GRAPHS):
            yield self._on_device(Batch.from_data_list(graphs[start : start + EVALUATED_GRAPHS]))

    def batches(self) -> Iterable[GraphBatch]:
        return map(self._on_device, self.loader)

    def loss(self, model: nn.Module, batch: GraphBatch, teacher: Tensor | None, weight: float) -> Tensor:
        out = model(*batch.inputs)
        loss = self.objective.loss(out, batch.y)
        return loss if teacher is None else loss + weight * self.objective.distill(out, teacher[batch.place])

    def features(self, batch: GraphBatch) -> Tensor:
        return batch.inputs[0]

    def teach(self, model: nn.Module) -> Tensor:
        return self.objective.soften(torch.cat([model(*batch.inputs) for batch in self._collated(self.train)]))

    def start(self, model: nn.Module) -> None:
        spread = self.train[:: -(-len(self.train) // EVALUATED_GRAPHS)]
        for batch in self._collated(spread):
            model(*batch.inputs)

    def example(self) -> Data:
        x, graph, batch, _ = self.test[0].inputs
        return Data(x=x, edge_index=graph, batch=batch)

    def evaluate_frozen(self, frozen: nn.Module) -> Scores:
        return self._scores(lambda x, graph, batch, graphs: frozen(x, graph, batch))

    def evaluate(self, model: nn.Module) -> Scores:
        return self._scores(model)

    def _scores(self, model: Callable[..., Tensor]) -> Scores:
        (val, val_y), (test, test_y) = (
            (torch.cat([model(*batch.inputs) for batch in part]), torch.cat([batch.y for batch in part]))
            for part in (self.val, self.test)
        )
        measure = self.objective
        return Scores(measure.score(val, val_y), measure.score(test, test_y), float(measure.loss(val, val_y)))


def _graphs(dataset: GraphDataset, part: Tensor, recipe: Recipe) -> list[Data]:
    """The graphs of a part, with what a batch needs and nothing else: collating more takes time."""
    graphs = []
    for place, index in enumerate(part.tolist()):
        graph = dataset.graphs[index]
        x = row_normalized(graph.x) if recipe.normalize_features else graph.x
        y = graph.y.reshape(-1) if dataset.task == "graph" else graph.y.reshape(1, -1).float()
        graphs.append(Data(x=x, edge_index=graph.edge_index, y=y, place=place))
    return graphs


class LinkTask(NodeTask):
    """Links of one graph (ogbl-collab): a link's score is the inner product of the outputs of its ends. Every step takes ``batch`` training links as
    positives and as many pairs of nodes, drawn uniformly, as negatives. Messages pass along the training edges only.

    Args:
        data: ``x``, ``edge_index``, and ``split_edges`` as OGB gives them.
        batch: links in a step; 0 takes all.
    """

    def __init__(self, data: Data, batch: int) -> None:
        super().__init__(data, objective_of("link"))
        parts = data.split_edges
        self.links = parts["train"]["edge"].t()
        self.batch = batch or self.links.size(1)
        self.held_out = [
            (torch.cat([part["edge"], part["edge_neg"]]).t(), _labels(len(part["edge"]), len(part["edge_neg"])))
            for part in (parts["valid"], parts["test"])
        ]

    def batches(self) -> Iterator[Tensor]:
        """Pairs of nodes, int64 ``[2, 2 B]``: the links and then the negatives."""
        for chosen in torch.randperm(self.links.size(1)).split(self.batch):
            drawn = torch.randint(self.nodes, (2, chosen.numel()))
            yield torch.cat([self.links[:, chosen.to(self.links.device)], drawn.to(self.links.device)], 1)

    def loss(self, model: nn.Module, batch: Tensor, teacher: Tensor | None, weight: float) -> Tensor:
        scores, half = _link_scores(model(self.x, self.data.edge_index), batch), batch.size(1) // 2
        loss = self.objective.loss(scores, _labels(half, half).to(scores.device))
        if teacher is None:
            return loss
        return loss + weight * self.objective.distill(scores, self.objective.soften(_link_scores(teacher, batch)))

    def teach(self, model: nn.Module) -> Tensor:
        """The nodes' outputs: pairs are not known before they are drawn."""
        return model(self.x, self.data.edge_index)

    def scores(self, out: Tensor) -> Scores:
        (val, val_y), (test, test_y) = ((_link_scores(out, pairs), y.to(out.device)) for pairs, y in self.held_out)
        measure = self.objective
        return Scores(measure.score(val, val_y), measure.score(test, test_y), float(measure.loss(val, val_y)))


def _labels(positives: int, negatives: int) -> Tensor:
    return torch.cat([torch.ones(positives), torch.zeros(negatives)])


def _link_scores(out: Tensor, pairs: Tensor) -> Tensor:
    return (out[pairs[0]] * out[pairs[1]]).sum(1)


def fold_count(dataset: Dataset | GraphDataset) -> int:
    """Number of splits of a data set."""
    return len(dataset.splits) if isinstance(dataset, GraphDataset) else 1


def task_of(dataset: Dataset | GraphDataset, recipe: Recipe, fold: int = 0, device: str = "cpu") -> Task:
    """The task of a data set.

    Raises:
        ValueError: there is no such fold, or the recipe has a setting that the task does not.
    """
    if not 0 <= fold < fold_count(dataset):
        raise ValueError(f"fold {fold} was asked for, but {dataset.name} has {fold_count(dataset)}, numbered from 0")
    if recipe.fanout and not dataset.task.startswith("node"):
        raise ValueError(
            f"fanout samples neighbours for tasks on nodes; {dataset.name} has task {dataset.task!r}, so set fanout to 0"
        )
    if recipe.feature_bits and not recipe.fanout:
        raise ValueError("feature_bits is of the features that sampled batches read; set fanout, or feature_bits to 0")
    if recipe.batch and not recipe.fanout and dataset.task.startswith("node"):
        raise ValueError(
            "batch needs a fanout on one graph: without one, every step computes on all nodes; set fanout, or batch to 0"
        )
    if isinstance(dataset, GraphDataset):
        return GraphTask(dataset, fold, recipe, device)
    data = copy.copy(prepare(dataset, recipe)).to(device)
    if dataset.task == "link":
        return LinkTask(data, recipe.batch)
    if recipe.fanout:
        return SampledNodeTask(data, objective_of(dataset.task), recipe)
    return NodeTask(data, objective_of(dataset.task))
