"""Time of a training step, as a ratio to PyG's FP32 model in the same run: forward, backward and optimizer on the whole graph.

At Cora's size PyG's step is the dropout of the dense 2,708 x 1,433 input (15.5 MB written and read) and the two products with it. Ours multiplies the
1.3 % that are not zero (:mod:`qgnn.features`); what is left are passes over ``[N, hidden]`` maps and the cost of a few dozen calls. A GIN of PyG's
sums the 1,433 features of every edge's source as well, 75 MB of messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
import torch_geometric.nn as pyg
from torch import Tensor, nn
from torch_geometric.data import Data

from .. import quant
from ..data import Dataset, load
from ..recipes import Recipe, recipe_for
from ..tasks import NodeTask, prepare
from ..train import Trainer, build
from .bench import Candidate, Case, Run, WrongResult

MODELS = ("gcn", "gat", "gin")
SCHEMES = ("fp32", "int8", "int4", "dq-int8", "dq-int4", "a2q")


def pyg_layers(model: str, in_channels: int, out_channels: int, recipe: Recipe) -> list[nn.Module]:
    """The two convolutions of a model with a recipe's sizes, made of PyG's layers in their fastest setting (``cached=True``).

    Raises:
        ValueError: there is no such model here.
    """
    hidden, heads, drop = recipe.hidden, recipe.heads, recipe.attention_dropout
    if model == "gcn":
        return [pyg.GCNConv(in_channels, hidden, cached=True), pyg.GCNConv(hidden, out_channels, cached=True)]
    if model == "gat":
        first = pyg.GATConv(in_channels, hidden, heads, dropout=drop)
        return [first, pyg.GATConv(heads * hidden, out_channels, dropout=drop)]
    if model == "gin":
        return [pyg.GINConv(nn.Linear(in_channels, hidden)), pyg.GINConv(nn.Linear(hidden, out_channels))]
    raise ValueError(f"there is no model {model!r} to time; choose gcn, gat or gin")


class PyGModel(nn.Module):
    """Dropout, convolution, ReLU, dropout, convolution: PyG's FP32 baseline."""

    def __init__(self, convs: list[nn.Module], input_dropout: float, dropout: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.input_dropout, self.dropout = input_dropout, dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x = F.dropout(x, self.input_dropout, self.training)
        x = F.relu(self.convs[0](x, edge_index))
        x = F.dropout(x, self.dropout, self.training)
        return self.convs[1](x, edge_index)


def pyg_step(model: str, data: Data, classes: int, recipe: Recipe) -> tuple[nn.Module, Callable[[], None]]:
    """PyG's model with the sizes and the optimizer of a recipe, and one FP32 training step of it."""
    assert isinstance(data.x, Tensor) and isinstance(data.y, Tensor)
    layers = pyg_layers(model, data.x.size(1), classes, recipe)
    network = PyGModel(layers, recipe.input_dropout, recipe.dropout).to(data.x.device).train()
    return network, step_of(network, data, recipe)


def step_of(network: nn.Module, data: Data, recipe: Recipe) -> Callable[[], None]:
    """A training step of a network that takes ``x`` and ``edge_index``, with a recipe's optimizer."""
    assert isinstance(data.y, Tensor)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        out = network(data.x, data.edge_index)
        F.cross_entropy(out[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()

    return step


def train_steps(name: str, device: str) -> Iterator[Case]:
    """The quantized step of every model and scheme beside PyG's FP32 step at the same sizes. A step draws dropout, so that no two have the same
    result: what is checked is that no parameter becomes infinite or NaN."""
    dataset = load(name)
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{dataset.name} has many graphs; training steps are timed on one, such as Cora")
    for model, chosen in product(MODELS, SCHEMES):
        yield steps_of(dataset, model, quant.parse(chosen), device)


def steps_of(dataset: Dataset, model: str, scheme: quant.Scheme, device: str, hidden: int | None = None) -> Case:
    """Our step and PyG's, with the recipe's hidden columns or others. Nothing is made before its turn."""
    recipe = recipe_for(model, scheme, dataset).changed(hidden=hidden)
    task = NodeTask(prepare(dataset, recipe).to(device))
    made: dict[str, nn.Module] = {}

    def theirs() -> Run:
        made["pyg-fp32"], step = pyg_step(model, task.data, dataset.num_classes, recipe)
        return step

    def ours() -> Run:
        trainer = trainer_of(dataset, model, scheme, recipe, task, device)
        made["qgnn"] = trainer.model
        return partial(trainer.step, trainer.total, task.data)

    paths: dict[str, Callable[[], Run]] = {"pyg-fp32": theirs, "qgnn": ours}
    return Case(
        f"{dataset.name} {model} {scheme.name}" + (f" hidden {hidden}" if hidden else ""),
        [Candidate(name, build_one, partial(_still_finite, made, name)) for name, build_one in paths.items()],
        memory=device == "cuda",
    )


def _still_finite(made: dict[str, nn.Module], name: str, _: object) -> None:
    finite(made[name])(_)


def trainer_of(
    dataset: Dataset, model: str, scheme: quant.Scheme, recipe: Recipe, task: NodeTask, device: str
) -> Trainer:
    """A trainer whose quantizers are on."""
    trainer = Trainer(build(scheme, dataset, recipe, model).to(device), task, recipe)
    trainer.end_warmup()
    return trainer


def finite(model: nn.Module) -> Callable[[object], None]:
    """Accepts a step that leaves the parameters of ``model`` finite.

    Raises:
        WrongResult: when called, where they are not.
    """

    def accept(_: object) -> None:
        bad = [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]
        if bad:
            raise WrongResult(f"{', '.join(bad)} became infinite or NaN")

    return accept
