"""What one process has of a model and its optimizer, and what a checkpoint holds: the same, but for A2Q's steps and widths of the part's nodes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..quant import A2QQuantizer
from . import group
from .partition import Plan


class Nodes:
    """Takes what belongs to nodes together, in the order of the whole graph, and apart again."""

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self.plan = plan
        self.order = group.all_rows(plan.inner, plan.counts)
        self.names = {
            f"{name}.{kind}"
            for name, part in model.named_modules()
            if isinstance(part, A2QQuantizer)
            for kind in ("bits", "log_step")
        }
        self.parameters = {id(p) for name, p in model.named_parameters() if name in self.names}

    def whole(self, rows: Tensor) -> Tensor:
        """Rows of the part's nodes ``[n, ...]`` -> of all nodes ``[N, ...]``."""
        parts = group.all_rows(rows, self.plan.counts)
        return torch.zeros_like(parts).index_copy_(0, self.order, parts)

    def own(self, rows: Tensor) -> Tensor:
        """Rows of all nodes -> of the part's."""
        return rows.to(self.plan.inner.device)[self.plan.inner]

    def model(self, state: dict[str, Any], gather: bool) -> dict[str, Any]:
        """A model's state dict, of the whole graph or, without ``gather``, of the part."""
        change = self.whole if gather else self.own
        return {name: change(value) if name in self.names else value for name, value in state.items()}

    def optimizer(self, state: dict[str, Any], optimizer: torch.optim.Optimizer, gather: bool) -> dict[str, Any]:
        """An optimizer's state dict, likewise; moments are shaped like their parameter."""
        change = self.whole if gather else self.own
        parameters = [p for kind in optimizer.param_groups for p in kind["params"]]

        def changed(place: int, values: dict[str, Any]) -> dict[str, Any]:
            if id(parameters[place]) not in self.parameters:
                return values
            return {name: change(v) if isinstance(v, Tensor) and v.dim() else v for name, v in values.items()}

        return {**state, "state": {place: changed(place, values) for place, values in state["state"].items()}}
