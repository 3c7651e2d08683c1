"""What the processes of tests/test_distributed.py run: ``torchrun … tests/distributed_worker.py FOLDER``. The first one writes what it found to
FOLDER/found.pt; what all have to find is asserted here."""

import copy
import faulthandler
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from qgnn import data, train
from qgnn.autograd import Aggregate, GatAggregate
from qgnn.data import Dataset
from qgnn.distributed import joined, layers, training
from qgnn.distributed.halo import Exchange, HaloRows, HaloSum
from qgnn.distributed.partition import assign, part_of
from qgnn.graph import Graph
from qgnn.quant import parse
from qgnn.quant.qat import value_range
from qgnn.recipes import recipe_for
from qgnn.tasks import task_of

PARTITIONED = ("gcn fp32", "sage fp32", "gat fp32", "gcn a2q", "gin int8")
SHARED = {"sage": 0, "graphs": 1}
"""And the fold, one whose 150 graphs can be shared equally."""
RECOVERED_EPOCHS = 24


class Stopped(Exception):
    """A training that is broken off."""


def recipe_of(dataset: Dataset, name: str, epochs: int = 3):
    """Dropout stays where masks are one process's: of sparse features and of ReLU."""
    model, scheme = name.split()
    recipe = recipe_for(model, parse(scheme), dataset).changed(epochs)
    return replace(recipe, attention_dropout=0.0)


def shared_case(name: str):
    """Data, model and recipe of a training without chance, so that shares of a batch are worth the batch: all neighbours, one batch, no dropout."""
    dataset = data.load("Cora" if name == "sage" else "MUTAG")
    model = "sage" if name == "sage" else "gin"
    fanout = 1000 if name == "sage" else 0
    recipe = recipe_for(model, parse("fp32"), dataset).changed(3)
    plain = {"input_dropout": 0.0, "warmup_dropout": 0.0, "dropout": 0.0, "distill": 0.0, "fanout": fanout, "batch": 0}
    return dataset, model, replace(recipe, **plain)


def interrupted(epochs: int):
    def progress(done: int, total: int) -> None:
        if done == epochs:
            raise Stopped

    return progress


def run_of(run):
    record = {key: value for key, value in run.record.items() if key != "recipe"}
    return {"record": record, "curve": run.curve, "state": run.model.state_dict()}


def check_sums() -> None:
    """Sums over two parts, forward and backward, of whole numbers, which floats add exactly in any order; attention, whose sums round."""
    generator = torch.Generator().manual_seed(0)
    graph = Graph.from_edge_index(torch.randint(60, (2, 400), generator=generator), 60)
    x = torch.randint(-7, 8, (60, 5), generator=generator).float()
    upstream = torch.randint(-7, 8, (60, 5), generator=generator).float()
    owner, _ = assign(graph, dist.get_world_size())
    part = part_of(graph, owner, dist.get_rank(), "")
    inner = part.plan.inner
    whole = x.clone().requires_grad_()
    Aggregate.apply(whole, None, graph, "sum").backward(upstream)
    for width, step in (("fp32", None), ("int8", torch.ones(5)), ("int4", torch.ones(5))):
        exchange = Exchange(part.plan, width, 0)
        own = x[inner].clone().requires_grad_()
        out = HaloSum.apply(own, step, part, exchange)
        assert out.equal(Aggregate.apply(x, None, graph, "sum")[inner]), width
        if width == "fp32":
            out.backward(upstream[inner])
            assert own.grad is not None and own.grad.equal(whole.grad[inner])
            assert exchange.traffic.vector().tolist() == [20 * len(part.plan.send), 0, 20 * len(part.plan.halo), 0, 0]
    # Gradients that are rounded on the way back: off by less than one step of the row, 1/127 of its largest, for each part.
    exchange = Exchange(part.plan, "int8", 0)
    own = x[inner].clone().requires_grad_()
    HaloSum.apply(own, torch.ones(5), part, exchange).backward(upstream[inner])
    assert own.grad is not None
    assert (own.grad - whole.grad[inner]).abs().max() <= graph.max_degree * 7 / 127 * (dist.get_world_size() - 1) * 7
    check_attention(graph, part, x, upstream)


def check_attention(graph, part, x, upstream) -> None:
    inner = part.plan.inner
    score = x[:, :1] / 8
    whole = x.clone().requires_grad_()
    out = GatAggregate.apply(whole.view(60, 1, 5), score, -score, None, None, graph, 0.2).flatten(1)
    out.backward(upstream)
    own = x[inner].clone().requires_grad_()
    exchange = Exchange(part.plan, "fp32", 0)
    rows = HaloRows.apply(own, None, exchange)
    mine = GatAggregate.apply(
        rows.view(-1, 1, 5), rows.detach()[:, :1] / 8, -score[inner], None, None, part.joint, 0.2
    ).flatten(1)
    mine.backward(upstream[inner])
    assert own.grad is not None
    torch.testing.assert_close(mine, out[inner])
    torch.testing.assert_close(own.grad, whole.grad[inner])


def check_common_statistics() -> None:
    """Ranges and BatchNorm of rows that the processes share, one with few."""
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    share = [480, *[20 // (size - 1)] * (size - 1)]
    mine = x.split(share)[rank]
    for clipped in (0.0, 0.001, 0.01, 0.2):
        found = layers.common_tails(mine.flatten(), clipped)
        assert [float(end) for end in found] == [float(end) for end in value_range(x, clipped, 1.0)], clipped
    upstream = torch.randn(500, 6, generator=torch.Generator().manual_seed(2))
    plain, common = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    layers.share_ranges(common)
    assert type(common) is not nn.BatchNorm1d
    whole, own = x.clone().requires_grad_(), mine.clone().requires_grad_()
    expected = plain(whole)
    expected.backward(upstream)
    out = common(own)
    out.backward(upstream.split(share)[rank])
    assert own.grad is not None and whole.grad is not None
    torch.testing.assert_close(out, expected.split(share)[rank])
    torch.testing.assert_close(own.grad, whole.grad.split(share)[rank], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(common.running_mean, plain.running_mean)
    torch.testing.assert_close(common.running_var, plain.running_var)


def check_shares(name: str) -> None:
    """The gradient of a batch whose shares are equal, 140 nodes and 150 graphs, is that of one process. In float64: three layers of BatchNorm make
    1e-5 of float32's rounding."""
    dataset, model, recipe = shared_case(name)
    for graph in [dataset.data] if isinstance(dataset, Dataset) else dataset.graphs:
        graph.x = graph.x.double()
    fold = SHARED[name]
    torch.manual_seed(0)
    alone = train.build(parse("fp32"), dataset, recipe, model).double()
    tasks = task_of(dataset, recipe, fold), training._shared(dataset, recipe, fold, "cpu", 0)
    shared = training.SharedTrainer(copy.deepcopy(alone), tasks[1], recipe, {"seed": 0})
    for trainer in (train.Trainer(alone, tasks[0], recipe), shared):
        (batch,) = trainer.task.batches()
        trainer.model.train()
        trainer.loss(0, batch).backward()
    for expected, found in zip(alone.parameters(), shared.model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)


def refusals() -> list[str]:
    """What is said of settings that many processes do not train."""
    cora, graphs = data.load("Cora"), data.load("MUTAG")
    cases = [
        (cora, "gcn", "fixed-8", {"parallel": "partition"}),
        (cora, "gcn", "a2q-nns", {}),
        (cora, "gcn", "fp32", {"parallel": "data"}),
        (graphs, "gin", "fp32", {"parallel": "partition"}),
        (graphs, "gin", "fp32", {"halo": "int8"}),
        (cora, "gin", "fp32", {"recipe": replace(recipe_of(cora, "gin fp32"), aggr="max")}),
    ]
    said = []
    for dataset, model, scheme, options in cases:
        try:
            training.train(dataset, model, scheme, 0, **options)
        except ValueError as error:
            said.append(str(error))
    return said


def check_alike(state) -> None:
    """The processes have the same weights, to the bit."""
    for value in state.values():
        if isinstance(value, torch.Tensor):
            first = value.clone()
            dist.broadcast(first, 0)
            torch.testing.assert_close(value, first, rtol=0, atol=0, equal_nan=True)


def main(folder: Path) -> None:
    faulthandler.dump_traceback_later(100)  # a job that hangs says where before it is killed
    found = {}
    with joined():
        check_sums()
        check_common_statistics()
        found["refused"] = refusals()
        cora = data.load("Cora")
        for name in PARTITIONED:
            run = training.train(cora, *name.split(), 0, recipe=recipe_of(cora, name))
            found[name] = None if run is None else run_of(run)
        for width in ("int8", "int4"):
            run = training.train(cora, "gcn", "fp32", 0, recipe=recipe_of(cora, "gcn fp32"), halo=width)
            found[width] = None if run is None else run_of(run)
        run = training.train(cora, "gcn", "fp32", 0, recipe=recipe_of(cora, "gcn fp32", RECOVERED_EPOCHS), halo="int8")
        found["undisturbed"] = None if run is None else run_of(run)
        for name in SHARED:
            check_shares(name)
        # Each with samples, dropout and masks of its own.
        recipe = replace(shared_case("sage")[2], fanout=5, batch=32, dropout=0.5, warmup=1, epochs=1)
        network = train.build(parse("dq-int8"), cora, recipe, "sage")
        training.SharedTrainer(network, training._shared(cora, recipe, 0, "cpu", 0), recipe, {"seed": 0}).run()
        check_alike(network.state_dict())
        # Broken off after 4 epochs, as a checkpoint of two processes for one, and gone on with, from one of one process for two.
        recipe = recipe_of(cora, "gcn a2q", 10)
        try:
            checkpoint = folder / "two" / "run.pt"
            training.train(cora, "gcn", "a2q", 0, recipe=recipe, checkpoint=checkpoint, progress=interrupted(4))
        except Stopped:
            pass
        run = training.train(cora, "gcn", "a2q", 0, recipe=recipe, checkpoint=folder / "one" / "run.pt")
        found["went on"] = None if run is None else run_of(run)
        if dist.get_rank() == 0:
            torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
