"""Layers, frozen models and training steps of the suite "gpu"."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import quant
from ..recipes import recipe_for
from ..tasks import NodeTask, prepare
from .bench import Candidate, Case, equal_to
from .gpu_scene import gpu_dataset, gpu_scene
from .networks import WIDTH, layer, model
from .peers import traced
from .train_step import steps_of, trainer_of

FLOATS = ("torch-csr-fp32", "torch-csr-fp16", "pyg-scatter-fp32", "qgnn-fp32")
INTEGERS = ("qgnn-int8", "qgnn-int8-bound", "qgnn-int4", "qgnn-int4-bound")
SCHEMES = ("fp32", "dq-int8", "a2q")
TINY_WIDTH = 8


def layers(shape: tuple[str, str], device: str) -> Iterator[Case]:
    """One convolution of a kind on a graph."""
    name, kind = shape
    at = gpu_scene(name, device)
    adjacency = ("pyg-adjacency-fp32",) if kind == "gcn" else ()
    yield layer(at, kind, (*FLOATS[:2], *adjacency, *FLOATS[2:], *INTEGERS), _width(device))


def models(shape: tuple[str, str], device: str) -> Iterator[Case]:
    """Two layers of a kind on a graph, with the energy of an inference; a small one also as a CUDA graph, beside PyG as it is."""
    name, kind = shape
    at = gpu_scene(name, device)
    adjacency = ("pyg-adjacency-fp32",) if kind == "gcn" else ()
    if name == "cora-size":
        graphs = ("qgnn-int8-graph", "qgnn-int4-graph")
        yield model(at, kind, ("pyg-scatter-fp32", *FLOATS[:1], *adjacency, *INTEGERS, *graphs), _width(device), True)
    else:
        yield model(at, kind, (*FLOATS[:2], *adjacency, *FLOATS[2:], *INTEGERS), _width(device), True)


def compiled_models(shape: tuple[str, str], device: str) -> Iterator[Case]:
    """PyG's model under torch.compile, whose compilation takes as long as all else."""
    name, kind = shape
    paths = ("torch-csr-fp32", "pyg-compiled-fp32", "qgnn-int8")
    yield model(gpu_scene(name, device), kind, paths, _width(device), compiler=None if device == "cuda" else traced)


def train_steps(shape: tuple[str, str], device: str) -> Iterator[Case]:
    """Our step beside PyG's in FP32, and the peaks of memory; a GCN of 128 hidden columns, a GAT of the recipe's 8 heads of 8."""
    name, kind = shape
    dataset = gpu_dataset(name, device)
    for scheme in SCHEMES if kind == "gcn" else ("a2q",):
        yield steps_of(dataset, kind, quant.parse(scheme), device, hidden=_hidden(kind, device))


def _hidden(kind: str, device: str) -> int | None:
    """Columns of a training step; a GAT's are the recipe's."""
    return _width(device) if kind == "gcn" or device == "cpu" else None


def _width(device: str) -> int:
    """Features between layers; tiny on a CPU, as its graph."""
    return WIDTH if device == "cuda" else TINY_WIDTH


def repeated_training(shape: tuple[str, str], device: str) -> Iterator[Case]:
    """Two steps from the same seed (one on a CPU), twice: the parameters have to be the same to the bit. Nothing is timed."""
    name, kind = shape
    dataset = gpu_dataset(name, device)
    steps = 2 if device == "cuda" else 1

    def candidate(scheme: quant.Scheme) -> Candidate:
        recipe = recipe_for(kind, scheme, dataset).changed(hidden=_hidden(kind, device))
        task = NodeTask(prepare(dataset, recipe).to(device))

        def run() -> Tensor:
            torch.manual_seed(0)
            trainer = trainer_of(dataset, kind, scheme, recipe, task, device)
            for _ in range(steps):
                trainer.step(trainer.total, task.data)
            return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])

        return Candidate(f"qgnn-{scheme.name}", lambda: run, equal_to(run))

    yield Case(f"{dataset.name} {kind}, {steps} steps", [candidate(quant.parse(name)) for name in SCHEMES], timed=False)
