"""Time of a training step that is quantized in both passes, as a ratio to FP32's on our own kernels, which also skips the zeros of the input; beside
them PyG's FP32 layers, and the same scheme emulated on these by torch's own operations (:mod:`.emulation`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from .. import quant
from ..data import Dataset, load
from ..recipes import Recipe, recipe_for
from ..tasks import NodeTask, prepare
from ..train import Trainer, build
from .bench import Candidate, Case, ready
from .emulation import emulate
from .train_step import finite, pyg_step

MODELS = ("gcn", "gat", "gin")
SCHEMES = ("fixed-8", "fixed-4", "msfp16")
HIDDEN = 128


def quantized_steps(name: str, device: str) -> Iterator[Case]:
    """Every model and scheme with 128 hidden columns, so that maps and not weights dominate. Steps draw dropout: what is checked is that no parameter
    becomes infinite or NaN."""
    dataset = load(name)
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{dataset.name} has many graphs; training steps are timed on one, such as Cora")
    for model, chosen in product(MODELS, SCHEMES):
        scheme = quant.parse(chosen)
        recipe = recipe_for(model, scheme, dataset).changed(hidden=HIDDEN)
        task = NodeTask(prepare(dataset, recipe).to(device))
        plain, theirs = pyg_step(model, task.data, dataset.num_classes, recipe)
        emulated, imitation = pyg_step(model, task.data, dataset.num_classes, recipe)
        emulate(emulated, scheme)
        yield Case(
            f"{dataset.name} {model} {scheme.name} hidden {HIDDEN}",
            [
                _ours("qgnn-fp32", model, quant.parse("fp32"), dataset, task, recipe, device),
                ready("pyg-fp32", theirs, finite(plain)),
                ready("pyg-emulated", imitation, finite(emulated)),
                _ours("qgnn", model, scheme, dataset, task, recipe, device),
            ],
        )


def _ours(
    name: str, model: str, scheme: quant.Scheme, dataset: Dataset, task: NodeTask, recipe: Recipe, device: str
) -> Candidate:
    trainer = Trainer(build(scheme, dataset, recipe, model).to(device), task, recipe)
    trainer.end_warmup()
    return ready(name, partial(trainer.step, trainer.total, task.data), finite(trainer.model))
