"""Training: learns, finds the best epoch under the width limit, stops at NaN, resumes exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from qgnn import data, freeze, quant, train, use_backend
from qgnn.models import GCN
from qgnn.recipes import Recipe, recipe_for

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
    return train.Trainer(train.build(parsed, DIGITS, recipe), train.prepare(DIGITS, recipe), recipe)


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


def test_checkpoint_errors(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"cannot be read, it is damaged .* delete it"):
        trainer("a2q").run(path)
    path.unlink()
    trainer("a2q").run(path)
    with pytest.raises(ValueError, match="belongs to other settings"):
        trainer("a2q", epochs=7).run(path)


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
    t.x = torch.full_like(t.data.x, torch.inf)
    with pytest.raises(train.TrainingError, match="epoch 0; it began in the features"):
        t.run()


def test_without_an_epoch_within_the_limit_the_narrowest_is_taken() -> None:
    t = trainer("a2q", bits_limit=0.5, penalty=100.0, lr_bits=0.1, bits_share=1.0)
    t.run()
    assert t.progress.best.key is not None and t.progress.best.key[0] == pytest.approx(0.5 - t.average_bits())


def test_penalty_lowers_the_widths() -> None:
    free, pressed = (
        trainer("a2q", epochs=12, penalty=p, target_bits=1.0, bits_share=1.0, lr_bits=0.1, bits_limit=8.0)
        for p in (0.0, 100.0)
    )
    widths = []
    for t in (free, pressed):
        t.run()
        widths.append(t.average_bits())
    assert widths[1] < widths[0]


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="there is no model 'gat'; choose one of gcn"):
        train.train(DIGITS, "gat", "fp32", 0)
    with pytest.raises(ValueError, match="there is no scheme 'int3'"):
        train.train(DIGITS, "gcn", "int3", 0)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        sized("fp32", 0, 8)
    with pytest.raises(ValueError, match=r"no setting 'lrr' that is a number; there are warmup, epochs,"):
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
        t = train.Trainer(model, train.prepare(dataset, recipe).to(device), recipe)
        t.end_warmup()
        values = []
        for epoch in range(2):
            values.append(float(t._loss(epoch).detach()))
            t.step(epoch)
        return values

    with use_backend("reference"):
        expected = losses("cpu")
    assert losses(backend) == pytest.approx(expected, rel=1e-4)


def test_no_gpu_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        train.train(DIGITS, "gcn", "fp32", 0, device="cuda")
