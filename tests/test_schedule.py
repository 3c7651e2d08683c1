import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qgnn.kernels.schedule import CHUNK, build_schedule, chunk_of, slot_count


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


def test_local_order():
    # powers of two below: 8 (rows 1 and 4), 4 (row 3), 1 (rows 0 and 5), none (row 2)
    indptr = offsets([1, 9, 0, 5, 15, 1])
    assert build_schedule(indptr, local=True).order.tolist() == [1, 4, 3, 0, 5, 2]
    assert build_schedule(indptr).order.tolist() == [4, 1, 3, 0, 5, 2]
    # rows beyond the narrow ones come first, though row 1 has no more bits than row 3
    schedule = build_schedule(offsets([1, 7, 0, 5]), local=True, narrow=6)
    assert schedule.segments[:, 0].tolist() == [1] and schedule.order.tolist() == [3, 0, 2]


def test_segments_of_a_small_graph_are_short():
    # Cora, ogbn-arxiv made symmetric, ogbn-products, Reddit
    assert [chunk_of(edges) for edges in (10_556, 2_315_598, 123_718_280, 114_615_892)] == [256, 256, CHUNK, CHUNK]
    assert chunk_of(8 * 2**20) == 1024
    degrees = [700, 512, 513]
    assert build_schedule(offsets(degrees)).hubs[:, 0].tolist() == [0, 2]


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
