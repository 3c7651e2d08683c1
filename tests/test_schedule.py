import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn.kernels.schedule import build_schedule, slot_count


def offsets(degrees, dtype=torch.int32):
    return torch.tensor([0, *degrees]).cumsum(0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_worked_example(dtype):
    schedule = build_schedule(offsets([1, 5, 0, 3], dtype), narrow=1, chunk=2)
    assert schedule.order.tolist() == [0, 2]
    assert schedule.segments.tolist() == [[1, 1, 3, 0, 0], [1, 3, 5, 1, 0], [1, 5, 6, 2, 0], [3, 6, 9, -1, -1]]
    assert schedule.hubs.tolist() == [[1, 0, 3]]
    assert schedule.segments.dtype == schedule.hubs.dtype == dtype
    assert schedule.order.dtype == torch.int32
    assert slot_count(schedule) == 3


def test_unsorted():
    schedule = build_schedule(offsets([1, 5, 0, 3]), sort=False)
    assert schedule.order.tolist() == [0, 1, 2, 3]
    assert schedule.segments.shape == (0, 5) and schedule.hubs.shape == (0, 3)
    assert slot_count(schedule) == 0


def test_empty_graph():
    schedule = build_schedule(offsets([]))
    assert [t.numel() for t in schedule] == [0, 0, 0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 30), max_size=30), st.integers(0, 6), st.integers(1, 6))
def test_every_edge_once(degrees, narrow, chunk):
    indptr = offsets(degrees)
    schedule = build_schedule(indptr, narrow=narrow, chunk=chunk)
    covered = [e for i in schedule.order.tolist() for e in range(indptr[i], indptr[i + 1])]
    for row, start, end, slot, hub in schedule.segments.tolist():
        assert indptr[row] <= start < end <= indptr[row + 1]
        assert (slot >= 0) == (hub >= 0) == (degrees[row] > 2 * chunk)
        covered += range(start, end)
    assert sorted(covered) == list(range(sum(degrees)))
    assert sorted({*schedule.order.tolist(), *schedule.segments[:, 0].tolist()}) == list(range(len(degrees)))
    slots = [slot for *_, slot, _ in schedule.segments.tolist() if slot >= 0]
    assert slots == list(range(slot_count(schedule)))
    for hub, (row, first, count) in enumerate(schedule.hubs.tolist()):
        mine = [s for s in schedule.segments.tolist() if s[4] == hub]
        assert [s[0] for s in mine] == [row] * count and mine[0][3] == first
