"""Objectives: how outputs compare with labels, as a loss, as the metric of a record, and against a teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


class Objective(ABC):
    """How outputs ``[R, C]`` compare with labels.

    Attributes:
        metric: the name in records; a share of 1 is given in percent.
        sign: 1 where a higher metric is better, -1 where a lower one is.
    """

    metric: str
    sign = 1

    @abstractmethod
    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        """Mean loss."""

    @abstractmethod
    def score(self, out: Tensor, y: Tensor) -> float:
        """The metric."""

    @abstractmethod
    def soften(self, out: Tensor) -> Tensor:
        """What a teacher's outputs teach."""

    @abstractmethod
    def distill(self, out: Tensor, taught: Tensor) -> Tensor:
        """Mean loss against :meth:`soften` of the teacher's outputs."""


class Classification(Objective):
    """One of C classes, labels int64 ``[R]``: cross entropy, accuracy."""

    metric = "accuracy"

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y)

    def score(self, out: Tensor, y: Tensor) -> float:
        return float((out.argmax(1) == y).double().mean()) * 100

    def soften(self, out: Tensor) -> Tensor:
        return F.softmax(out, 1)

    def distill(self, out: Tensor, taught: Tensor) -> Tensor:
        return F.cross_entropy(out, taught)


class Binary(Objective):
    """Labels 0 and 1 of any shape, NaN where there is none: binary cross entropy over the labelled entries. ``metric``: one of :data:`METRICS`."""

    def __init__(self, metric: str) -> None:
        self.metric = metric

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        labelled = ~y.isnan()
        loss = F.binary_cross_entropy_with_logits(out[labelled], y[labelled], reduction="sum")
        return loss / labelled.sum().clamp_min(1)

    def score(self, out: Tensor, y: Tensor) -> float:
        return METRICS[self.metric](out, y) * 100

    def soften(self, out: Tensor) -> Tensor:
        return out.sigmoid()

    def distill(self, out: Tensor, taught: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out, taught)


class Regression(Objective):
    """C targets, labels float32 ``[R, C]``: mean absolute error. The model learns targets of mean 0 and deviation 1 over the training set; the metric
    is in the targets' own units."""

    metric = "mae"
    sign = -1

    def __init__(self, y: Tensor) -> None:
        self.mean, deviation = y.mean(0), y.std(0, correction=0)
        self.deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return F.l1_loss(out, (y - self.mean) / self.deviation)

    def score(self, out: Tensor, y: Tensor) -> float:
        return float((out * self.deviation + self.mean - y).abs().double().mean())

    def soften(self, out: Tensor) -> Tensor:
        return out

    def distill(self, out: Tensor, taught: Tensor) -> Tensor:
        return F.l1_loss(out, taught)


def micro_f1(out: Tensor, y: Tensor) -> float:
    """F1 of the predictions ``out > 0`` over all entries at once, ``2 TP / (2 TP + FP + FN)``; 0 where nothing is predicted or true."""
    predicted, true = out > 0, y == 1
    return float(2 * (predicted & true).sum() / (predicted.sum() + true.sum()).clamp_min(1))


def average_precision(out: Tensor, y: Tensor) -> float:
    """scikit-learn's average precision over the labelled entries of each column ``[R, C]``, averaged over the columns that have both labels, as
    OGB's evaluator of ogbg-molpcba does; NaN without such a column."""
    from sklearn.metrics import average_precision_score

    found = []
    for scores, labels in zip(out.t().cpu(), y.t().cpu(), strict=True):
        labelled = ~labels.isnan()
        if bool((labels == 1).any()) and bool((labels == 0).any()):
            found.append(average_precision_score(labels[labelled].numpy(), scores[labelled].numpy()))
    return float(torch.tensor(found, dtype=torch.float64).mean())


def hits_at_50(out: Tensor, y: Tensor) -> float:
    """Share of the scores ``[R]`` of positives that are above the 50th highest of the negatives; 1 with fewer negatives. As OGB's evaluator of
    ogbl-collab defines it."""
    positive, negative = out[y == 1], out[y == 0]
    if negative.numel() < 50:
        return 1.0
    return float((positive > negative.topk(50).values[-1]).double().mean())


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "f1": micro_f1,
    "ap": average_precision,
    "hits@50": hits_at_50,
}
"""What measures logits ``[R, C]`` or ``[R]`` of binary labels, as a share of 1."""


def objective_of(task: str, y: Tensor | None = None) -> Objective:
    """The objective of a task (:data:`qgnn.data.Task`); a regression needs the training targets ``y`` ``[G, C]``."""
    if task == "graph-regression":
        assert y is not None
        return Regression(y)
    metric = {"node-multilabel": "f1", "graph-multilabel": "ap", "link": "hits@50"}.get(task)
    return Classification() if metric is None else Binary(metric)
