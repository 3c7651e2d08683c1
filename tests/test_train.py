"""Training: learns, finds the best epoch under the width limit, stops at NaN, resumes exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch_geometric.data import Data

from qgnn import data, freeze, quant, tasks, train, use_backend
from qgnn.models import GCN
from qgnn.recipes import RECIPES, Recipe, recipe_for

DIGITS = data.load("digits")


def small(scheme: str, **changes: object) -> tuple[Recipe, quant.Scheme]:
    parsed = quant.parse(scheme)
    recipe = dataclasses.replace(recipe_for("gcn", parsed, DIGITS), epochs=6, warmup=4, hidden=8)
    return dataclasses.replace(recipe, **changes), parsed


def sized(scheme: str, epochs: int, hidden: int, settings: dict[str, str] | None = None) -> Recipe:
    return recipe_for("gcn", quant.parse(scheme), DIGITS).changed(epochs, hidden, settings)


def trainer(scheme: str, seed: int = 0, **changes: object) -> train.Trainer:
    recipe, parsed = small(scheme, **changes)
    torch.manual_seed(seed)
    return train.Trainer(train.build(parsed, DIGITS, recipe), tasks.task_of(DIGITS, recipe), recipe)


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4", "dq-int8", "dq-int4", "a2q"])
def test_every_scheme_learns_and_reports(scheme: str) -> None:
    calls: list[tuple[int, int]] = []
    run = train.train(
        DIGITS, "gcn", scheme, 0, recipe=sized(scheme, 30, 16), progress=lambda done, total: calls.append((done, total))
    )
    record = run.record
    assert record["test_acc"] > 60, "ten classes: chance is 10 %"
    assert record["test_acc_best_over_epochs"] >= record["test_acc"]
    assert calls[-1][0] == calls[-1][1] == len(calls)
    width = {"fp32": 32, "int8": 8, "int4": 4, "dq-int8": 8, "dq-int4": 4}.get(scheme)
    limit = recipe_for("gcn", quant.parse(scheme), DIGITS).bits_limit
    assert record["average_bits"] == width if width else 0 < record["average_bits"] <= limit
    assert record["fp32_bytes"] == 4 * 1797 * (64 + 16 + 16 + 10)
    assert (record["packed_bytes"] < record["fp32_bytes"]) == (scheme != "fp32")
    assert record["train_step_ms"] > 0 and record["peak_memory_bytes"] > 0
    if scheme != "fp32":
        report = freeze(run.model, run.data).report
        assert report.mismatched_predictions <= report.ties
        assert report.packed_bytes == record["packed_bytes"]


@pytest.mark.parametrize("scheme", ["fixed-8", "fixed-8/rounding=nearest", "msfp13"])
def test_quantized_training_needs_no_warm_up(scheme: str) -> None:
    run = train.train(DIGITS, "gcn", scheme, 0, recipe=sized(scheme, 60, 16))
    bits = quant.parse(scheme).bits
    assert {row["phase"] for row in run.curve} == {"quantized"} and {row["bits"] for row in run.curve} == {bits}
    assert run.record["widths"] == [[bits, 60]]
    assert run.record["test_acc"] > 60, "ten classes: chance is 10 %"
    assert run.record["packed_bytes"] < run.record["fp32_bytes"]
    assert (run.frozen is None) == scheme.startswith("msfp"), "a floating-point format has no integers"
    if run.frozen is not None:
        assert run.record["integer_mismatches"] <= run.record["integer_ties"]
        assert run.record["integer_test_acc"] == pytest.approx(run.record["test_acc"], abs=0.2)


@pytest.mark.parametrize("options", ["weights=fp32", "messages=fp32", "aggregation=8", "update=6"])
def test_what_is_not_integers_alone_is_not_frozen(options: str) -> None:
    run = train.train(DIGITS, "gcn", f"fixed-8/{options}", 0, recipe=sized("fixed-8", 2, 8))
    assert run.frozen is None and run.record["integer_test_acc"] is None


def test_ranges_of_a_trained_model_are_those_without_dropout() -> None:
    """What dropout of one half keeps it doubles: a range of training would waste one of the 4 bits."""
    run = train.train(DIGITS, "gcn", "fixed-4", 0, recipe=sized("fixed-4", 5, 16, {"dropout": "0.5"}))
    first, second = run.model.convs
    with torch.no_grad():
        hidden = torch.relu(first(run.data.x, run.data.edge_index))
    assert first.quantizer.top == run.data.x.max() and second.quantizer.top == hidden.max()


def test_fp32_runs_the_recipe_of_quantized_training() -> None:
    """With --set, so that a comparison is of the quantization alone."""
    rows = [key for key in RECIPES if key[1] == "fp32"]
    assert rows
    for model, _, place in rows:
        fp32, fixed, msfp = (RECIPES[model, method, place] for method in ("fp32", "fixed", "msfp"))
        assert fixed == msfp and (fixed.warmup, fixed.distill) == (0, 0)
        names = ("warmup", "epochs", "dropout", "lr", "distill", "halve_every")
        assert fp32.changed(settings={name: str(getattr(fixed, name)) for name in names}) == fixed


def test_record_is_of_the_best_epoch() -> None:
    """The model that is returned has the validation accuracy that the record states."""
    run = train.train(DIGITS, "gcn", "a2q", 1, recipe=sized("a2q", 10, 8))
    out = run.model(run.data.x, run.data.edge_index)
    right = (out.argmax(1) == run.data.y).float() * 100
    assert float(right[run.data.val_mask].mean()) == pytest.approx(run.record["val_acc"])
    assert float(right[run.data.test_mask].mean()) == pytest.approx(run.record["test_acc"])


def test_same_seed_same_run_and_other_seed_another() -> None:
    first, second, other = (
        train.train(DIGITS, "gcn", "dq-int4", seed, recipe=sized("dq-int4", 4, 8)) for seed in (0, 0, 1)
    )
    a, b, c = (run.model(run.data.x, run.data.edge_index) for run in (first, second, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("scheme", ["a2q", "dq-int4"])
@pytest.mark.parametrize("stop_after", [2, 7], ids=["in the warm-up", "quantized"])
def test_resumed_training_is_the_same_training(
    tmp_path: Path, scheme: str, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)

    def stop(done: int, total: int) -> None:
        if done > stop_after:
            raise KeyboardInterrupt

    whole = trainer(scheme)
    whole.run()
    interrupted = trainer(scheme)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(tmp_path / "c.pt", stop)
    torch.manual_seed(99)
    resumed = trainer(scheme, seed=99)
    resumed.run(tmp_path / "c.pt")
    assert resumed.progress.best.key == whole.progress.best.key
    assert list(tmp_path.iterdir()) == [tmp_path / "c.pt"], "no temporary file stays"
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert a == b if isinstance(a, dict) else torch.equal(a, b), name


@pytest.fixture(scope="module")
def superpixels() -> data.GraphDataset:
    """60 of the digits' graphs of superpixels, in two folds."""
    dataset = data.load("digits-superpixels")
    assert isinstance(dataset, data.GraphDataset)
    order = torch.arange(60)
    splits = tuple(data.Split(part[:40], part[40:50], part[50:]) for part in (order, order.flip(0)))
    return dataclasses.replace(dataset, splits=splits)


def graph_recipe(scheme: str, dataset: data.GraphDataset, **changes: object) -> Recipe:
    recipe = recipe_for("gin", quant.parse(scheme), dataset)
    return dataclasses.replace(recipe, **{"warmup": 2, "epochs": 2, "hidden": 8, "layers": 2, "batch": 16, **changes})


@pytest.mark.parametrize("scheme", ["fp32", "dq-int8", "a2q-nns", "fixed-8"])
def test_graphs_are_classified_in_folds(scheme: str, superpixels: data.GraphDataset) -> None:
    recipe = graph_recipe(scheme, superpixels)
    runs = [train.train(superpixels, "gin", scheme, 0, fold=fold, recipe=recipe) for fold in (0, 0, 1)]
    first, again, other = (torch.cat([p.flatten() for p in run.model.parameters()]) for run in runs)
    assert torch.equal(first, again) and not torch.equal(first, other)
    record = runs[2].record
    assert (record["task"], record["metric"], record["fold"]) == ("graph", "accuracy", 1)
    if scheme == "fp32":
        assert record["integer_test_acc"] is None and runs[2].frozen is None
    else:
        assert runs[2].frozen is not None
        assert (record["integer_test_acc"], record["integer_mismatches"]) == (record["test_acc"], 0)
    with torch.no_grad():
        scores = runs[2].task.evaluate(runs[2].model)
    assert (scores.val, scores.test) == (record["val_acc"], record["test_acc"]), "the record is of the best epoch"
    curve = runs[2].curve
    assert [row["epoch"] for row in curve] == [0, 1, 2, 3]
    best = curve[recipe.warmup + record["best_epoch"]]
    assert (best["val"], best["test"]) == (record["val_acc"], record["test_acc"])
    assert record["average_bits"] == {"fp32": 32, "dq-int8": 8}.get(scheme) or 0 < record["average_bits"] <= 8
    with pytest.raises(ValueError, match="many graphs has no single data"):
        _ = runs[2].data
    with pytest.raises(ValueError, match=r"fold 2 was asked for, but digits-superpixels has 2"):
        train.train(superpixels, "gin", scheme, 0, fold=2, recipe=recipe)


@pytest.mark.parametrize("scheme", ["int8", "a2q-nns"])
def test_graph_classification_learns(scheme: str) -> None:
    """Rings of three nodes whose features tell the class, half of the graphs each."""
    generator = torch.Generator().manual_seed(0)
    ring = torch.tensor([[0, 1, 2], [1, 2, 0]])
    graphs = []
    for i in range(60):
        x = torch.randn(3, 2, generator=generator) + 3 * torch.eye(2)[i % 2]
        graphs.append(Data(x=x, edge_index=ring, y=torch.tensor([i % 2])))
    order = torch.arange(60)
    split = data.Split(order[:40], order[40:50], order[50:])
    dataset = data.GraphDataset("rings", graphs, 2, 2, "tu", "graph", (split,))
    recipe = graph_recipe(scheme, dataset, warmup=8, epochs=8, bits_limit=8.0)
    assert train.train(dataset, "gin", scheme, 0, recipe=recipe).record["test_acc"] >= 80, "chance is 50 %"


@pytest.mark.parametrize("scheme", ["dq-int4", "a2q-nns", "sdq:8,4/rounding=nearest"])
@pytest.mark.parametrize("stop_after", [1, 3], ids=["in the warm-up", "quantized"])
def test_resumed_training_on_graphs_is_the_same_training(
    tmp_path: Path, scheme: str, stop_after: int, superpixels: data.GraphDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of the graphs is that of the uninterrupted run, and so is the schedule of the learning rate."""
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    recipe = graph_recipe(scheme, superpixels, halve_every=1, dropout=0.5)

    def trained(seed: int, **more: object) -> train.Trainer:
        torch.manual_seed(seed)
        model = train.build(quant.parse(scheme), superpixels, recipe, "gin")
        t = train.Trainer(model, tasks.task_of(superpixels, recipe), recipe)
        t.run(**more)
        return t

    def stop(done: int, total: int) -> None:
        if done > stop_after:
            raise KeyboardInterrupt

    whole = trained(0)
    with pytest.raises(KeyboardInterrupt):
        trained(0, checkpoint=tmp_path / "c.pt", progress=stop)
    resumed = trained(99, checkpoint=tmp_path / "c.pt")
    assert resumed.progress.curve == whole.progress.curve
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert a == b if isinstance(a, dict) else torch.equal(a, b), name


def test_rates_are_halved_in_both_phases() -> None:
    t = trainer("a2q", halve_every=2, bits_share=0.5)
    rates = []
    for epoch in range(t.total):
        if epoch == t.warmup:
            t.end_warmup()
        t._set_rates(epoch)
        rates.append({group["kind"]: group["lr"] for group in t.optimizer.param_groups})
    recipe = t.recipe
    assert [r["weights"] for r in rates[: t.warmup]] == [recipe.warmup_lr / 2 ** (e // 2) for e in range(4)]
    assert [r["weights"] for r in rates[t.warmup :]] == [recipe.lr / 2 ** (e // 2) for e in range(6)]
    assert [r["bits"] for r in rates[t.warmup :]] == [recipe.lr_bits, recipe.lr_bits, recipe.lr_bits / 2, 0, 0, 0]


def test_regression_prefers_the_lowest_error(superpixels: data.GraphDataset) -> None:
    """The best epoch is that of the lowest validation error, and the best over epochs the lowest on the test part."""
    graphs = [
        Data(x=g.x, edge_index=g.edge_index, y=g.x[:, 0].mean().reshape(1, 1) * 100)
        for g in (superpixels.graphs[i] for i in range(60))
    ]
    dataset = dataclasses.replace(superpixels, graphs=graphs, num_classes=1, task="graph-regression")
    recipe = graph_recipe("int8", dataset, epochs=4, distill=0.5)
    run = train.train(dataset, "gin", "int8", 0, recipe=recipe)
    quantized = run.curve[recipe.warmup :]
    assert run.record["metric"] == "mae"
    assert run.record["val_acc"] == min(row["val"] for row in quantized)
    assert run.record["test_acc_best_over_epochs"] == min(row["test"] for row in quantized)


def test_sampled_nodes_and_links_train(tmp_path: Path) -> None:
    recipe = dataclasses.replace(small("a2q-nns")[0], batch=64, fanout=4, warmup=1, epochs=1)
    run = train.train(DIGITS, "sage", "a2q-nns", 0, recipe=recipe)
    assert isinstance(run.task, tasks.SampledNodeTask) and run.record["test_acc"] > 15, "chance is 10 %"
    edges = DIGITS.data.edge_index.t()
    parts = {"train": {"edge": edges[:500]}}
    for name, start in (("valid", 500), ("test", 600)):
        away = torch.randint(DIGITS.data.num_nodes, (100, 2), generator=torch.Generator().manual_seed(start))
        parts[name] = {"edge": edges[start : start + 100], "edge_neg": away}
    linked = Data(x=DIGITS.data.x, edge_index=DIGITS.data.edge_index, split_edges=parts)
    linked.edge_weight = torch.full(
        (DIGITS.data.num_edges,), 2.0
    )  # ogbl-collab has them; training reads none, nor does the integer model
    dataset = data.Dataset("links", linked, 1, "ogb", "link")
    recipe = dataclasses.replace(small("dq-int8")[0], batch=200, warmup=2, epochs=2, distill=1.0)
    run = train.train(dataset, "gcn", "dq-int8", 0, recipe=recipe)
    record = run.record
    assert run.frozen is not None and record["integer_test_acc"] == pytest.approx(record["test_acc"], abs=2)
    assert (record["task"], record["metric"]) == ("link", "hits@50")
    assert record["test_acc"] > 60, "neighbours in the graph have similar digits; chance is 50 %"


def test_node_level_a2q_trains_on_sampled_batches_of_a_feature_store() -> None:
    recipe = dataclasses.replace(small("a2q")[0], batch=64, fanout=4, feature_bits=4, epochs=1)
    assert train.train(DIGITS, "sage", "a2q", 0, recipe=recipe).record["test_acc"] > 20, "chance is 10 %"
    with pytest.raises(ValueError, match="set fanout"):
        train.train(DIGITS, "sage", "fp32", 0, recipe=dataclasses.replace(recipe, fanout=0, batch=0))


@pytest.mark.parametrize(("scheme", "bits"), [("fp16", 16), ("bi", 1)])
def test_float_baselines_train_and_report(scheme: str, bits: int) -> None:
    run = train.train(DIGITS, "gcn", scheme, 0, recipe=small(scheme)[0])
    operands = 16 if scheme == "fp16" else 32
    assert run.frozen is None and run.record["average_bits"] == bits
    columns = 64 * bits + 8 * bits + 8 * operands + 10 * operands
    assert run.record["packed_bytes"] == pytest.approx(1797 * columns / 8, rel=0.01)


def test_checkpoint_errors(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"cannot be read, it is damaged .* delete it"):
        trainer("a2q").run(path)
    path.unlink()
    trainer("a2q").run(path)
    with pytest.raises(ValueError, match="belongs to other settings"):
        trainer("a2q", epochs=7).run(path)
    other = tmp_path / "seed.pt"
    recipe = small("int8")[0]
    train.train(DIGITS, "gcn", "int8", 0, recipe=recipe, checkpoint=other)
    with pytest.raises(ValueError, match="belongs to other settings"):
        train.train(DIGITS, "gcn", "int8", 1, recipe=recipe, checkpoint=other)


def test_nan_stops_with_the_epoch_and_the_tensor() -> None:
    t = trainer("fp32")
    assert isinstance(t.model, GCN)
    with torch.no_grad():
        t.model.convs[1].lin.weight[0, 0] = torch.nan
    with pytest.raises(
        train.TrainingError, match=r"loss is nan in warm-up epoch 0; .* parameter convs\.1\.lin\.weight"
    ):
        t.run()
    t = trainer("fp32")
    assert isinstance(t.task, tasks.NodeTask)
    t.task.x = torch.full_like(t.task.data.x, torch.inf)
    with pytest.raises(train.TrainingError, match="epoch 0; it began in the features"):
        t.run()


def test_without_an_epoch_within_the_limit_the_narrowest_is_taken() -> None:
    t = trainer("a2q", bits_limit=0.5, penalty=100.0, lr_bits=0.1, bits_share=1.0)
    t.run()
    assert t.progress.best.key is not None and t.progress.best.key[0] == pytest.approx(
        0.5 - quant.average_width(t.model)
    )


def test_penalty_lowers_the_widths() -> None:
    free, pressed = (
        trainer("a2q", epochs=12, penalty=p, target_bits=1.0, bits_share=1.0, lr_bits=0.1, bits_limit=8.0)
        for p in (0.0, 100.0)
    )
    widths = []
    for t in (free, pressed):
        t.run()
        widths.append(quant.average_width(t.model))
    assert widths[1] < widths[0]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"there is no model 'mlp' for digits; choose one of .*gcn"):
        train.train(DIGITS, "mlp", "fp32", 0)
    with pytest.raises(ValueError, match="there is no scheme 'int3'"):
        train.train(DIGITS, "gcn", "int3", 0)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        sized("fp32", 0, 8)
    with pytest.raises(ValueError, match=r"no setting 'lrr'; there are warmup, epochs,"):
        sized("fp32", 1, 8, {"lrr": "1"})
    with pytest.raises(ValueError, match=r"distill must be a number \(float\), got 'much'"):
        sized("fp32", 1, 8, {"distill": "much"})
    assert sized("fp32", 10, 8, {"distill": "0.5"}).distill == 0.5


def test_every_scheme_has_a_recipe_for_every_family() -> None:
    for scheme in quant.SCHEMES.values():
        assert recipe_for("gcn", scheme, DIGITS).epochs > 0


@pytest.mark.parametrize("scheme", ["fp32", "int8", "int4", "a2q"])
def test_training_runs_on_every_backend(backend: str, scheme: str) -> None:
    """The first losses, before rounding can move a code, agree with those of the reference."""
    dataset = data.load("powerlaw:60,400")

    def losses(device: str) -> list[float]:
        recipe = dataclasses.replace(
            recipe_for("gcn", quant.parse(scheme), dataset),
            hidden=8,
            input_dropout=0.0,
            warmup_dropout=0.0,
            dropout=0.0,
        )
        recipe = dataclasses.replace(recipe, warmup=0, distill=0.0)
        torch.manual_seed(0)
        model = train.build(quant.parse(scheme), dataset, recipe).to(device)
        t = train.Trainer(model, tasks.task_of(dataset, recipe, device=device), recipe)
        t.end_warmup()
        values = []
        for epoch in range(2):
            (batch,) = t.task.batches()
            values.append(float(t.loss(epoch, batch).detach()))
            t.step(epoch, batch)
        return values

    with use_backend("reference"):
        expected = losses("cpu")
    assert losses(backend) == pytest.approx(expected, rel=1e-4)


def test_no_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        train.train(DIGITS, "gcn", "fp32", 0, device="cuda")
