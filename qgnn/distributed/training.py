"""Training by many processes: batches shared among them (DistributedDataParallel), or one graph in parts, with halo exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .. import quant
from ..data import Dataset, GraphDataset
from ..graph import Graph
from ..models import _NodeModel
from ..nn import GINConv, SAGEConv
from ..objectives import objective_of
from ..quant.degree_quant import protection_probability
from ..recipes import Recipe
from ..tasks import Scores, prepare, task_of
from ..train import Run, Trainer, build, finished, identity_of, settings
from . import group
from .halo import Exchange
from .layers import check_scheme, local_gradients, reach_over, share_ranges
from .nodes import Nodes
from .partition import PartitionedGraph, assign, fingerprint, part_of, read_part, write_part
from .tasks import PartTask, SharedGraphTask, SharedNodeTask
from .wire import WIDTHS, Width

Parallel = Literal["data", "partition"]


def train(
    dataset: Dataset | GraphDataset,
    model: str,
    scheme: str,
    seed: int,
    *,
    fold: int = 0,
    recipe: Recipe | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    parallel: Parallel | None = None,
    halo: Width = "fp32",
) -> Run | None:
    """:func:`qgnn.train.train` by all processes of a job, in :func:`.group.joined`; the first process gets the run, the others None.

    Args:
        dataset, model, scheme, seed, fold, recipe, device, checkpoint, progress: as there. The checkpoint is one process's, too; every process has to
            see its folder, in which the parts of the graph are kept.
        parallel: "data" shares every batch among the processes; "partition" gives each a part of the graph. By default the one that fits the task.
        halo: how rows of other parts travel, "fp32", "int8" or "int4".

    Raises:
        ValueError: settings that do not fit, a checkpoint of other settings, a part that is missing, damaged or of another job.
        TrainingError: the loss became NaN or infinite.
    """
    parsed, recipe = settings(dataset, model, scheme, recipe, device)
    sampled = isinstance(dataset, GraphDataset) or recipe.fanout > 0
    parallel = parallel or ("data" if sampled else "partition")
    _check(dataset, parsed, recipe, parallel, halo, sampled)
    group.check_same("what to train", [dataset.name, model, parsed.name, seed, fold, asdict(recipe), parallel, halo])
    identity = identity_of(dataset, model, parsed, seed, fold)
    trainer: SharedTrainer | PartTrainer
    if parallel == "data":
        task = _shared(dataset, recipe, fold, device, seed)
        torch.manual_seed(seed)
        trainer = SharedTrainer(build(parsed, dataset, recipe, model).to(device), task, recipe, identity)
    else:
        assert isinstance(dataset, Dataset)
        part = _part(dataset, None if checkpoint is None else checkpoint.parent / "parts").to(device)
        torch.manual_seed(seed)
        network = build(parsed, dataset, recipe, model).to(device)
        trainer = _part_trainer(network, dataset, part, Exchange(part.plan, halo, seed), recipe, identity)
    trainer.resume_from(checkpoint)
    trainer.run(checkpoint, progress)
    facts = {"processes": group.size(), "parallel": parallel, **trainer.facts()}
    state = trainer.whole_model()
    if group.rank():
        return None
    # What is recorded and frozen is the model of one process.
    whole = build(parsed, dataset, recipe, model).to(device)
    whole.load_state_dict(state)
    single = Trainer(whole, task_of(dataset, recipe, fold, device), recipe, identity)
    quant.set_enabled(whole, True)
    single.progress = trainer.progress
    single.model.eval()
    single._set_width(trainer.progress.best.epoch)
    run = finished(single, dataset)
    run.record.update(facts)
    return run


def _check(
    dataset: Dataset | GraphDataset,
    scheme: quant.Scheme,
    recipe: Recipe,
    parallel: Parallel,
    halo: Width,
    sampled: bool,
) -> None:
    if halo not in WIDTHS:
        raise ValueError(f"--halo must be one of {', '.join(WIDTHS)}, got {halo!r}")
    if dataset.task == "link":
        raise ValueError("links are trained by one process; start without torchrun")
    if parallel == "partition" and sampled:
        raise ValueError("--parallel partition trains on one whole graph: set fanout to 0, or choose --parallel data")
    if parallel == "data" and not sampled:
        raise ValueError("--parallel data shares batches: set a fanout and a batch, or choose --parallel partition")
    if parallel == "data" and halo != "fp32":
        raise ValueError("--halo is for --parallel partition: batches have no halo; leave it out")
    if parallel == "partition" and recipe.initial_step:
        raise ValueError("initial_step draws steps for nodes, which every process has others of; set it to 0")
    check_scheme(scheme, parallel == "partition")


def _shared(
    dataset: Dataset | GraphDataset, recipe: Recipe, fold: int, device: str, seed: int
) -> SharedNodeTask | SharedGraphTask:
    task_of(dataset, recipe, fold, device)  # says what is wrong with the settings
    if isinstance(dataset, GraphDataset):
        return SharedGraphTask(dataset, fold, recipe, device, seed)
    return SharedNodeTask(prepare(dataset, recipe).to(device), objective_of(dataset.task), recipe, seed)


def _part(dataset: Dataset, folder: Path | None) -> PartitionedGraph:
    """This process's part; read from ``folder``, where it was kept, else made there."""
    graph, parts, rank = Graph.from_data(dataset.data).to("cpu"), group.size(), group.rank()
    if folder is None:
        return part_of(graph, *_assigned(graph, parts))
    whole = fingerprint(graph)
    place = folder / f"{whole[:16]}-{parts}"
    path, ready = place / f"part-{rank}.safetensors", place / "complete"
    if not group.same(ready.exists()):
        write_part(path, part_of(graph, *_assigned(graph, parts)), whole)
        group.check_same("the parts", whole)  # all are written
        if rank == 0:
            ready.touch()
    try:
        part, fault = read_part(path, rank, parts, whole), ""
    except ValueError as error:
        part, fault = None, str(error)
    faults = group.every(fault)
    if part is None or any(faults):
        raise ValueError(next(filter(None, faults)))
    return part


def _assigned(graph: Graph, parts: int) -> tuple[torch.Tensor, int, str]:
    """The owners of all nodes, as the first process has them, this process's number, and how they were found."""
    found: Any = None
    if group.rank() == 0:
        try:
            found = assign(graph, parts)
        except ValueError as error:
            found = error
    found = group.same(found)
    if isinstance(found, ValueError):
        raise found
    owner, method = found
    return owner, group.rank(), method


def _part_trainer(
    network: nn.Module, dataset: Dataset, part: PartitionedGraph, exchange: Exchange, recipe: Recipe, identity: Any
) -> PartTrainer:
    assert isinstance(network, _NodeModel)
    for conv in network.convs:
        if isinstance(conv, GINConv | SAGEConv) and conv.reduce not in ("sum", "mean"):
            raise ValueError(
                f"--parallel partition adds sums of parts, and aggr={conv.reduce!r} is none; choose sum or mean"
            )
    data = prepare(dataset, recipe).to(part.device)
    task = PartTask(data, objective_of(dataset.task), part, network.input_dropout)
    reach_over(network, part, exchange)
    scheme = next(m.scheme for m in network.modules() if isinstance(m, quant.Quantizer))
    if scheme.method == "dq":
        degrees = group.all_rows(part.in_degree, part.plan.counts)
        chances = protection_probability(degrees, scheme.p_min, scheme.p_max)
        first = sum(part.plan.counts[: part.plan.rank])
        part.notes["protection", scheme.p_min, scheme.p_max] = chances[first : first + part.num_nodes]
    return PartTrainer(network, task, recipe, identity, exchange)


class GroupTrainer(Trainer):
    """What both kinds share: a checkpoint after every epoch, written by the first process, and read by all."""

    def resume_from(self, checkpoint: Path | None) -> None:
        """Checks that all processes see the same folder."""
        group.check_same(
            "whether there is a checkpoint (every process has to see the folder)",
            bool(checkpoint and checkpoint.exists()),
        )

    def due(self, written: float) -> bool:
        return True

    def _write(self, path: Path) -> None:
        state = self.state()
        if group.rank() == 0:
            self.write_state(path, state)

    def whole_model(self) -> dict[str, Any]:
        """The state dict of the model as one process has it."""
        return self.model.state_dict()

    def facts(self) -> dict[str, Any]:
        """What the record says besides."""
        return {}


class SharedTrainer(GroupTrainer):
    """Every process trains on its share of a batch, and gradients are averaged. Evaluation is the same everywhere; the first process's counts."""

    task: SharedNodeTask | SharedGraphTask

    def __init__(self, model: nn.Module, task: SharedNodeTask | SharedGraphTask, recipe: Recipe, identity: Any) -> None:
        share_ranges(model)
        super().__init__(model, task, recipe, identity)
        # Steps and widths have no gradient in the warm-up. Buffers are common: see share_ranges.
        self.trained = DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)

    def _epoch(self, epoch: int) -> None:
        self.task.order.set_epoch(epoch)
        entropy = [self.identity["seed"], epoch, group.rank()]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        super()._epoch(epoch)

    def evaluate(self) -> Scores:
        return group.same(super().evaluate())


class PartTrainer(GroupTrainer):
    """Every process trains on its part of the graph; gradients of weights are summed."""

    task: PartTask

    def __init__(self, model: nn.Module, task: PartTask, recipe: Recipe, identity: Any, exchange: Exchange) -> None:
        super().__init__(model, task, recipe, identity)
        self.exchange, self.nodes = exchange, Nodes(task.graph.plan, model)
        self.averaged = {id(p) for p in local_gradients(model)}

    def _epoch(self, epoch: int) -> None:
        self.exchange.begin(epoch)
        super()._epoch(epoch)

    def step(self, epoch: int, batch: Any) -> None:
        self.exchange.training = True
        super().step(epoch, batch)
        self.exchange.training = False

    def reduce(self) -> None:
        common = [p for p in self.model.parameters() if p.requires_grad and id(p) not in self.nodes.parameters]
        for parameter in common:
            if parameter.grad is not None and id(parameter) in self.averaged:
                parameter.grad *= self.task.share
        vector = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in common])
        total = group.all_sum(vector)
        self.exchange.traffic.reduced += 4 * vector.numel()
        for parameter, part in zip(common, total.split([p.numel() for p in common]), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part.view_as(parameter))

    def state(self) -> dict[str, Any]:
        return self._changed(super().state(), True)

    def load_state(self, state: dict[str, Any]) -> None:
        if state["warm"]:
            self._begin_main()  # the optimizer that the state is of
        super().load_state(self._changed(state, False))

    def _changed(self, state: dict[str, Any], gather: bool) -> dict[str, Any]:
        nodes, progress = self.nodes, dict(state["progress"])
        for name in ("best", "warm"):
            progress[name] = {**progress[name], "state": nodes.model(progress[name]["state"], gather)}
        teacher = state["teacher"]
        if teacher is not None:
            teacher = nodes.whole(teacher) if gather else nodes.own(teacher)
        return {
            **state,
            "model": nodes.model(state["model"], gather),
            "optimizer": nodes.optimizer(state["optimizer"], self.optimizer, gather),
            "progress": progress,
            "teacher": teacher,
        }

    def whole_model(self) -> dict[str, Any]:
        return self.nodes.model(self.model.state_dict(), True)

    def facts(self) -> dict[str, Any]:
        traffic = self.exchange.traffic
        total = group.all_sum(traffic.vector().to(self.device)).tolist()
        plan = self.task.graph.plan
        halo = int(group.all_sum(torch.tensor(plan.halo.numel(), device=self.device)))
        sent = dict(zip((f"sent_{name}_bytes" for name in asdict(traffic)), total, strict=True))
        return {"halo": self.exchange.width, "partition": plan.method, "halo_nodes": halo, **sent}
