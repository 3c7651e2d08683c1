"""Tasks: metrics and losses against scikit-learn and by hand, batches that cover the data once, what teachers teach."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torch import Tensor, nn
from torch_geometric.data import Data

from qgnn import objectives, tasks
from qgnn.data import Dataset, GraphDataset, Split
from qgnn.recipes import Recipe

NAN = math.nan
RECIPE = Recipe(
    warmup=1, epochs=1, hidden=4, normalize_features=False, input_dropout=0.0, warmup_dropout=0.0, dropout=0.0, warmup_lr=0.1, lr=0.1,
    weight_decay=0.0,
)  # fmt: skip


def labels(rows: int, columns: int, missing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Logits that know a little about the labels, 0 and 1 and, in a share of the entries, NaN."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(rows, columns, generator=generator) < 0.3).float()
    out = torch.randn(rows, columns, generator=generator) + y
    y[torch.rand(rows, columns, generator=generator) < missing] = NAN
    return out, y


# Metrics


def test_micro_f1_is_that_of_scikit_learn() -> None:
    out, y = labels(50, 7)
    assert objectives.micro_f1(out, y) == pytest.approx(f1_score(y.numpy(), (out > 0).numpy(), average="micro"))
    assert objectives.micro_f1(-torch.ones(3, 2), torch.zeros(3, 2)) == 0


def test_average_precision_is_the_mean_over_classes_with_both_labels() -> None:
    out, y = labels(60, 5, missing=0.4)
    y[:, 1] = torch.where(y[:, 1].isnan(), y[:, 1], 1.0)  # no negative: left out
    y[:, 3] = NAN
    expected = []
    for c in (0, 2, 4):
        known = ~y[:, c].isnan()
        expected.append(average_precision_score(y[known, c].numpy(), out[known, c].numpy()))
    assert objectives.average_precision(out, y) == pytest.approx(np.mean(expected))
    assert math.isnan(objectives.average_precision(out[:, 1:2], y[:, 1:2]))


@pytest.mark.parametrize("negatives", [49, 50, 51, 400])
def test_hits_at_50_is_that_of_a_plain_loop(negatives: int) -> None:
    generator = torch.Generator().manual_seed(negatives)
    positive = torch.randint(0, 40, (90,), generator=generator).float()  # few values, so that many are equal
    negative = torch.randint(0, 40, (negatives,), generator=generator).float()
    out, y = torch.cat([positive, negative]), torch.cat([torch.ones(90), torch.zeros(negatives)])
    found = 0
    for score in positive.tolist():
        # as a rank among the negatives, those that are equal counted before it, within the first 50
        found += sum(other >= score for other in negative.tolist()) < 50
    assert objectives.hits_at_50(out, y) == pytest.approx(found / 90)


# Objectives


def test_classification() -> None:
    measure = objectives.Classification()
    out = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    y = torch.tensor([0, 1, 1])
    assert measure.score(out, y) == pytest.approx(200 / 3)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1)) + math.log(1 + math.exp(3))) / 3
    assert float(measure.loss(out, y)) == pytest.approx(expected)
    taught = measure.soften(out)
    assert torch.allclose(taught.sum(1), torch.ones(3))
    assert measure.distill(out, taught) < measure.distill(out.flip(1), taught)


def test_binary_loss_counts_labelled_entries_only() -> None:
    measure = objectives.Binary("ap")
    out = torch.tensor([[2.0, -1.0], [0.5, 9.0]], requires_grad=True)
    y = torch.tensor([[1.0, 0.0], [0.0, NAN]])
    loss = measure.loss(out, y)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1)) + math.log(1 + math.exp(0.5))) / 3
    assert float(loss.detach()) == pytest.approx(expected)
    loss.backward()
    assert out.grad is not None and out.grad[1, 1] == 0 and bool(out.grad.isfinite().all())
    assert float(measure.loss(out, torch.full((2, 2), NAN)).detach()) == 0
    # the teacher has an opinion about every entry
    taught = measure.soften(out.detach())
    assert taught[1, 1] > 0.99
    assert measure.distill(out, taught) < measure.distill(-out, taught)


def test_regression_learns_standardised_targets_and_reports_their_units() -> None:
    y = torch.tensor([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0]])
    measure = objectives.Regression(y)
    standard = torch.tensor(
        [[-(1.5**0.5), 0.0], [0.0, 0.0], [1.5**0.5, 0.0]]
    )  # deviation sqrt(8 / 3); of a constant, 1
    assert float(measure.loss(standard, y)) == pytest.approx(0, abs=1e-6)
    assert measure.score(standard, y) == pytest.approx(0, abs=1e-6)
    assert measure.score(torch.zeros(3, 2), y) == pytest.approx(4 / 6), "off by 2, 0 and 2 in one of two targets"
    assert measure.sign == -1
    assert float(measure.distill(standard, measure.soften(standard + 0.5))) == pytest.approx(0.5)


# Tasks


class Total(nn.Module):
    """Outputs, for every graph, the sum of its features and its number of edges; for nodes the features. It counts what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.sizes: list[int] = []

    def forward(self, x: Tensor, graph: Any, batch: Tensor | None = None, num_graphs: int | None = None) -> Tensor:
        self.sizes.append(x.size(0))
        if batch is None:
            return x * self.scale
        sums = torch.zeros(num_graphs or 0, x.size(1)).index_add(0, batch, x)
        edges = torch.zeros(num_graphs or 0).index_add(0, batch, graph.in_degree.float())
        return torch.cat([sums, edges[:, None]], 1) * self.scale


def graphs(task: str, count: int = 10) -> GraphDataset:
    """Graph ``i`` has ``i % 3 + 1`` nodes of feature ``i`` and a self loop at its first node; the target is ``i`` (a class: 0 or 1)."""
    made = []
    for i in range(count):
        y = torch.tensor([i % 2]) if task == "graph" else torch.tensor([[float(i)]])
        made.append(Data(x=torch.full((i % 3 + 1, 1), float(i)), edge_index=torch.zeros(2, 1, dtype=torch.int64), y=y))
    order = torch.arange(count)
    splits = tuple(
        Split(order[(order - k) % count >= 4], (order[:2] + k) % count, (order[2:4] + k) % count) for k in range(3)
    )
    return GraphDataset("made", made, 1, 2 if task == "graph" else 1, "tu", task, splits)


def test_an_epoch_sees_every_training_graph_once_in_an_order_of_its_own() -> None:
    task = tasks.task_of(graphs("graph"), dataclasses.replace(RECIPE, batch=4))
    torch.manual_seed(0)
    first, second = ([b.place.tolist() for b in task.batches()] for _ in range(2))
    assert [len(places) for places in first] == [4, 2]
    assert [sorted(p for places in order for p in places) for order in (first, second)] == [list(range(6))] * 2
    assert first != second
    torch.manual_seed(0)
    assert [b.place.tolist() for b in task.batches()] == first, "the default generator decides"
    task = tasks.task_of(graphs("graph", 9), dataclasses.replace(RECIPE, batch=4))
    assert [len(b.place) for b in task.batches()] == [4], "a batch of one graph has no variance"


@pytest.mark.parametrize("fold", [0, 2])
def test_graphs_are_batched_with_their_own_labels_and_edges(fold: int) -> None:
    dataset = graphs("graph")
    task = tasks.task_of(dataset, dataclasses.replace(RECIPE, batch=4), fold)
    model = Total()
    for batch in task.batches():
        out = model(*batch.inputs)
        index = dataset.splits[fold].train[batch.place]
        assert torch.equal(out[:, 0], (index * (index % 3 + 1)).float())
        assert torch.equal(out[:, 1], torch.ones(len(index)))
        assert torch.equal(batch.y, index % 2)
    split = dataset.splits[fold]
    assert task.nodes == sum(dataset.graphs[int(i)].num_nodes for part in (split.val, split.test) for i in part)


def test_scores_and_teacher_are_those_of_the_right_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "EVALUATED_GRAPHS", 4)
    dataset = graphs("graph-regression")
    task = tasks.task_of(dataset, dataclasses.replace(RECIPE, batch=4), 1)
    split, train = dataset.splits[1], dataset.splits[1].train.float()

    class First(Total):
        def forward(self, x: Tensor, graph: Any, batch: Tensor | None = None, num_graphs: int | None = None) -> Tensor:
            return super().forward(x, graph, batch, num_graphs)[:, :1]

    model, mean, deviation = First(), train.mean(), train.std(correction=0)

    def expected(part: Tensor) -> float:
        return float(((part * (part % 3 + 1)) * deviation + mean - part).abs().mean())

    with torch.no_grad():
        scores, taught = task.evaluate(model), task.teach(model)
    assert (scores.val, scores.test) == pytest.approx((expected(split.val), expected(split.test)))
    assert torch.equal(taught[:, 0], train * (train % 3 + 1)), "in the order of the places"
    (whole,) = tasks.task_of(dataset, RECIPE, 1).batches()
    loss = task.loss(model, whole, None, 3.0)
    assert float(task.loss(model, whole, taught + 0.5, 3.0).detach()) == pytest.approx(float(loss.detach()) + 1.5)


def test_unknown_fold() -> None:
    with pytest.raises(ValueError, match="fold 3 was asked for, but made has 3, numbered from 0"):
        tasks.task_of(graphs("graph"), RECIPE, 3)


def one_graph(**more: Any) -> Data:
    generator = torch.Generator().manual_seed(0)
    masks = {f"{part}_mask": torch.arange(30) % 3 == k for k, part in enumerate(("train", "val", "test"))}
    return Data(
        x=torch.randn(30, 4, generator=generator),
        edge_index=torch.randint(0, 30, (2, 90), generator=generator),
        **masks,
        **more,
    )


def test_nodes_with_many_labels() -> None:
    _, y = labels(30, 4)
    data = one_graph(y=y)
    task = tasks.task_of(Dataset("made", data, 4, "inductive", "node-multilabel"), RECIPE)
    with torch.no_grad():
        scores = task.evaluate(Total())
    for value, mask in ((scores.val, data.val_mask), (scores.test, data.test_mask)):
        assert value == pytest.approx(100 * f1_score(y[mask].numpy(), (data.x[mask] > 0).numpy(), average="micro"))


def test_sampled_training_nodes_come_first_and_every_node_has_at_most_fanout_neighbours() -> None:
    data = one_graph(y=torch.arange(30) % 4)
    recipe = dataclasses.replace(RECIPE, batch=4, fanout=2, layers=2)
    task = tasks.task_of(Dataset("made", data, 4, "inductive"), recipe)
    torch.manual_seed(0)
    first, second = (list(task.batches()) for _ in range(2))
    assert sorted(int(i) for b in first for i in b.n_id[: b.batch_size]) == data.train_mask.nonzero()[:, 0].tolist()
    for batch in first:
        assert torch.equal(batch.x, data.x[batch.n_id])
        assert int(batch.edge_index[1].bincount().max()) <= 2
    torch.manual_seed(0)
    again = [b.edge_index for b in task.batches()]
    assert all(torch.equal(a, b.edge_index) for a, b in zip(again, first, strict=True))
    assert not all(torch.equal(a.n_id, b.n_id) for a, b in zip(first, second, strict=True))
    # loss and teaching are those of the seeds
    model, batch = Total(), first[0]
    expected = nn.functional.cross_entropy(data.x[batch.n_id[:4]], data.y[batch.n_id[:4]])
    assert float(task.loss(model, batch, None, 1.0).detach()) == pytest.approx(float(expected))
    taught = task.teach(model).detach()
    distilled = nn.functional.cross_entropy(data.x[batch.n_id[:4]], data.x[batch.n_id[:4]].softmax(1))
    both = task.loss(model, batch, taught, 2.0)
    assert float(both.detach()) == pytest.approx(float(expected + 2 * distilled), rel=1e-5)
    assert model.sizes[-2] == 30, "the teacher sees the whole graph"


def test_links_and_their_negatives() -> None:
    generator = torch.Generator().manual_seed(1)

    def pairs(count: int) -> Tensor:
        return torch.randint(0, 30, (count, 2), generator=generator)

    split = {
        "train": {"edge": pairs(10), "weight": torch.ones(10)},
        "valid": {"edge": pairs(8), "edge_neg": pairs(60)},
        "test": {"edge": pairs(9), "edge_neg": pairs(70)},
    }
    data = one_graph(split_edges=split)
    task = tasks.task_of(Dataset("made", data, 1, "ogb", "link"), dataclasses.replace(RECIPE, batch=4))
    torch.manual_seed(0)
    batches = list(task.batches())
    assert [b.size(1) for b in batches] == [8, 8, 4]
    positives = torch.cat([b[:, : b.size(1) // 2] for b in batches], 1).t().tolist()
    assert sorted(positives) == sorted(split["train"]["edge"].tolist())
    assert all(0 <= int(b.min()) <= int(b.max()) < 30 for b in batches)
    with torch.no_grad():
        scores = task.evaluate(Total())

    def score(edges: Tensor) -> Tensor:
        return (data.x[edges[:, 0]] * data.x[edges[:, 1]]).sum(1)

    for value, part in ((scores.val, split["valid"]), (scores.test, split["test"])):
        threshold = score(part["edge_neg"]).sort(descending=True).values[49]
        assert value == pytest.approx(100 * float((score(part["edge"]) > threshold).float().mean()))
    batch = batches[0]
    out = score(batch.t())
    expected = (nn.functional.softplus(-out[:4]).sum() + nn.functional.softplus(out[4:]).sum()) / 8
    assert float(task.loss(Total(), batch, None, 1.0).detach()) == pytest.approx(float(expected), rel=1e-5)
    same = nn.functional.binary_cross_entropy_with_logits(out, out.sigmoid())
    with_teacher = task.loss(Total(), batch, task.teach(Total()).detach(), 2.0)
    assert float(with_teacher.detach()) == pytest.approx(float(expected + 2 * same), rel=1e-5)


@pytest.mark.parametrize("setting", [{"batch": 4}, {"fanout": 2, "batch": 4}])
def test_settings_that_a_task_does_not_have_are_refused(setting: dict[str, int]) -> None:
    dataset = (
        graphs("graph") if "fanout" in setting else Dataset("made", one_graph(y=torch.arange(30) % 4), 4, "citation")
    )
    with pytest.raises(ValueError, match="set fanout"):
        tasks.task_of(dataset, dataclasses.replace(RECIPE, **setting))


def test_rows_with_negative_values_are_normalised_by_their_magnitudes() -> None:
    x = torch.tensor([[1.0, -3.0], [-2.0, 0.0], [0.0, 0.0]])
    assert tasks.row_normalized(x).tolist() == [[0.25, -0.75], [-1.0, 0.0], [0.0, 0.0]]


def test_features_are_row_normalised_where_the_recipe_says_so() -> None:
    recipe = dataclasses.replace(RECIPE, normalize_features=True)
    (batch,) = tasks.task_of(graphs("graph"), recipe).batches()
    x = batch.inputs[0]
    assert torch.equal(x[x > 0], torch.ones_like(x[x > 0]))
