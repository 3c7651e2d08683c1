"""Schedules of widths: when a width is in use, that it follows from the training curve alone, and that training uses it."""

from __future__ import annotations

import dataclasses
import math
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qgnn import data, models, quant, train
from qgnn.quant.schedules import ADQ, SDQ
from qgnn.recipes import Recipe, recipe_for

DIGITS = data.load("digits")


def sdq(widths: tuple[int, ...], total: int) -> list[int]:
    return [SDQ(widths).width(epoch, total, [], 1) for epoch in range(total)]


def adq(widths: tuple[int, int], losses: list[float], patience: int) -> list[int]:
    """The widths of the epochs that gave ``losses``, and of the one after them."""
    return [ADQ(widths).width(epoch, 1000, losses, patience) for epoch in range(len(losses) + 1)]


def test_sdq_divides_the_epochs() -> None:
    assert sdq((8, 6, 4, 2), 8) == [8, 8, 6, 6, 4, 4, 2, 2]
    assert sdq((8, 6, 4, 2), 10) == [8, 8, 8, 6, 6, 4, 4, 4, 2, 2], "shares start with epochs 0, 2.5, 5 and 7.5"
    assert sdq((8, 8, 6, 4), 4) == [8, 8, 6, 4]
    assert sdq((5,), 3) == [5, 5, 5]
    assert sdq((8, 6, 4, 2), 2) == [8, 4], "of more widths than epochs some are left out"


@given(count=st.integers(1, 8), total=st.integers(1, 500))
def test_sdq_is_fair(count: int, total: int) -> None:
    order = tuple(range(count))  # all different, so that shares can be told apart
    shares = [(place, len(list(epochs))) for place, epochs in groupby(sdq(order, total))]
    assert [place for place, _ in shares] == sorted({place for place, _ in shares})
    if total >= count:
        lengths = [length for _, length in shares]
        assert len(lengths) == count and max(lengths) - min(lengths) <= 1


def test_adq_waits_for_the_validation_loss() -> None:
    assert adq((4, 6), [1.0, 0.9, 0.8, 0.7], 1) == [4, 4, 4, 4, 4], "it improves"
    # 0.9 and 0.8 are not below 0.8: the second of them is one epoch too many. 0.7 starts anew.
    assert adq((4, 6), [0.8, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7], 2) == [4, 4, 4, 5, 5, 5, 6, 6, 6, 6]
    assert adq((4, 8), [math.nan] * 5, 2) == [4, 4, 5, 5, 6, 6], "NaN is no improvement"
    assert adq((4, 8), [0.5, math.nan, 0.6, 0.4], 3) == [4, 4, 4, 4, 4]
    assert adq((4, 8), [math.inf] * 2, 1) == [4, 5, 6]
    assert adq((6, 6), [1.0] * 4, 1) == [6] * 5


@given(
    losses=st.lists(st.floats(), max_size=60), patience=st.integers(1, 5), start=st.integers(2, 8), up=st.integers(0, 4)
)
def test_adq_goes_up_bit_by_bit(losses: list[float], patience: int, start: int, up: int) -> None:
    widths = adq((start, start + up), losses, patience)
    steps = [b - a for a, b in pairwise(widths)]
    assert widths[0] == start and set(steps) <= {0, 1} and widths[-1] <= start + up
    assert all(not any(steps[max(0, i - patience + 1) : i]) for i, step in enumerate(steps) if step), "too soon"


def test_a_width_depends_on_earlier_losses_only() -> None:
    """Otherwise the epochs of a resumed run, whose curve ends there, would have other widths."""
    losses = [0.5, 0.6, 0.4, 0.4, 0.5, 0.3, 0.3, 0.3, 0.2, 0.2]
    for schedule in (SDQ((8, 6, 4, 4)), ADQ((2, 8))):
        for epoch in range(len(losses)):
            whole, cut = (schedule.width(epoch, 10, seen, 2) for seen in (losses, losses[:epoch]))
            assert whole == cut


def test_schedules_of_no_sense() -> None:
    with pytest.raises(ValueError, match="sdq needs at least one width"):
        SDQ(())
    with pytest.raises(ValueError, match="adq goes up from one width to another, got 8 to 4"):
        ADQ((8, 4))


def trained(scheme: str, **more: Any) -> train.Run:
    return train.train(DIGITS, "gcn", scheme, 0, recipe=recipe(scheme), **more)


def recipe(scheme: str) -> Recipe:
    chosen = recipe_for("gcn", quant.parse(scheme), DIGITS).changed(10, 8, {"patience": "2", "warmup_lr": "0.05"})
    return dataclasses.replace(chosen, lr=0.05)  # large, so that the validation loss goes up at times


SCHEDULED = ["sdq:8,6,4,4", "adq:2,8", "sdq:16,13/over=msfp", "sdq:8,4,2/over=int", "adq:2,8/over=dq"]


@pytest.mark.parametrize("scheme", SCHEDULED)
def test_training_follows_the_schedule(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[set[int]] = []
    step = train.Trainer.step

    def watched(self: train.Trainer, epoch: int, batch: Any) -> None:
        step(self, epoch, batch)
        used.append({m.width for m in self.model.modules() if isinstance(m, quant.Quantizer | quant.RangeQuantizer)})

    monkeypatch.setattr(train.Trainer, "step", watched)
    run, settings, schedule = trained(scheme), recipe(scheme), quant.parse(scheme).schedule
    assert schedule is not None
    warm, rest = run.curve[: settings.warmup], run.curve[settings.warmup :]
    losses = [row["loss"] for row in rest]
    expected = [schedule.width(epoch, 10, losses, 2) for epoch in range(10)]
    assert len(set(expected)) > 1, "a schedule that stays where it is shows nothing"
    assert used[settings.warmup :] == [{width} for width in expected]
    assert [row["bits"] for row in rest] == expected and {row["bits"] for row in warm} <= {None}
    assert run.record["widths"] == [[width, len(list(epochs))] for width, epochs in groupby(expected)]
    best = expected[run.record["best_epoch"]]
    assert {m.width for m in run.model.modules() if isinstance(m, quant.Quantizer)} == {best}, (
        "the model is that epoch's"
    )
    with torch.no_grad():
        assert run.task.evaluate(run.model).val == run.record["val_acc"]


@pytest.mark.parametrize("scheme", [*SCHEDULED, "sdq:8,6,4/rounding=nearest"])
def test_a_resumed_run_continues_the_schedule(tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "CHECKPOINT_SECONDS", 0.0)
    whole, path = trained(scheme), tmp_path / "c.pt"
    for before_the_end in (6, 2):

        def stop(done: int, total: int, before_the_end: int = before_the_end) -> None:
            if done == total - before_the_end:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            trained(scheme, checkpoint=path, progress=stop)
    resumed = trained(scheme, checkpoint=path)
    assert resumed.curve == whole.curve
    finished = trained(scheme, checkpoint=path)  # nothing is left to train
    for again in (resumed, finished):
        assert {**again.record, "train_step_ms": 0} == {**whole.record, "train_step_ms": 0}
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("scheme", ["sdq:8,6,4,4", "sdq:16,13/over=msfp", "adq:2,8/over=dq"])
def test_a_model_is_loaded_with_the_width_it_was_left_with(scheme: str, tmp_path: Path) -> None:
    def made() -> torch.nn.Module:
        torch.manual_seed(0)
        return models.GCN(64, 8, 10, scheme=scheme).eval()

    def widths(model: torch.nn.Module) -> set[int]:
        return {m.width for m in model.modules() if isinstance(m, quant.Quantizer | quant.RangeQuantizer)}

    ours, inputs = made(), (DIGITS.data.x, DIGITS.data.edge_index)
    (own,), other = widths(ours), {"sdq:8,6,4,4": 4, "sdq:16,13/over=msfp": 13, "adq:2,8/over=dq": 5}[scheme]
    assert own != other
    ours(*inputs)  # the first batch sets the ranges
    first = ours.state_dict()
    assert not any(name.endswith("width") for name in first), "state dicts of one width are as they were"
    quant.set_width(ours, other)
    torch.save(ours.state_dict(), tmp_path / "state.pt")
    theirs = made()
    theirs.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert widths(theirs) == {other}
    torch.testing.assert_close(theirs(*inputs), ours(*inputs), rtol=0, atol=0)
    theirs.load_state_dict(first)
    assert widths(theirs) == {own}, "what has no width in it is of the scheme's own"
