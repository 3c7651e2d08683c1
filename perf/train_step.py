"""Time of a training step, as a ratio to PyG's FP32 GCN in the same run: forward, backward and optimizer on the whole graph.

At Cora's size PyG's step is the dropout of the dense 2,708 x 1,433 input (15.5 MB written and read) and the two products with it. Ours multiplies the
1.3 % that are not zero (:mod:`qgnn.features`); what is left are passes over ``[N, hidden]`` maps and the cost of a few dozen calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import GCNConv

from .. import quant
from ..data import Dataset
from ..recipes import Recipe, recipe_for
from ..train import Trainer, build, prepare
from .timing import Timing, paired


class PyGGCN(nn.Module):
    """The same two-layer GCN made of PyG's GCNConv, which is its FP32 baseline (``cached=True``: PyG's fastest setting)."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int, input_dropout: float, dropout: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [GCNConv(in_channels, hidden, cached=True), GCNConv(hidden, out_channels, cached=True)]
        )
        self.input_dropout, self.dropout = input_dropout, dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.dropout(x, self.input_dropout, self.training)
        x = F.relu(self.convs[0](x, edge_index))
        x = F.dropout(x, self.dropout, self.training)
        return self.convs[1](x, edge_index)


def pyg_step(data: Data, classes: int, recipe: Recipe) -> Callable[[], object]:
    """One FP32 training step of PyG's GCN with the sizes and the optimizer of a recipe."""
    assert isinstance(data.x, Tensor) and isinstance(data.y, Tensor)
    model = (
        PyGGCN(data.x.size(1), recipe.hidden, classes, recipe.input_dropout, recipe.dropout).to(data.x.device).train()
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        out = model(data.x, data.edge_index)
        F.cross_entropy(out[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()

    return step


def train_steps(
    dataset: Dataset, schemes: list[str], hidden: int | None = None, rounds: int = 30, device: str = "cpu"
) -> dict[str, dict[str, Timing]]:
    """By scheme: the paired times of PyG's FP32 step and of the scheme's quantized step at the same hidden size."""
    results = {}
    for name in schemes:
        scheme = quant.parse(name)
        recipe = recipe_for("gcn", scheme, dataset).changed(hidden=hidden)
        data = prepare(dataset, recipe).to(device)
        trainer = Trainer(build(scheme, dataset, recipe).to(device), data, recipe)
        trainer.end_warmup()
        candidates: dict[str, Callable[[], object]] = {
            "pyg-fp32": pyg_step(data, dataset.num_classes, recipe),
            name: partial(trainer.step, trainer.total),
        }
        results[name] = paired(candidates, rounds, device=device)
    return results
