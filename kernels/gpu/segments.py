"""How one launch runs the whole :class:`..schedule.Schedule` of an aggregation, and what its kernels share.

Programs ``0 .. S - 1`` of grid axis 0 take one segment each, ``BLOCK_E`` of its edges at a time; the programs after them take ``BLOCK_R`` narrow
rows each, one edge of each row at a time. Segments come first because they take longest. Grid axis 1 runs over blocks of features.

A segment of a hub leaves its part in a slot and counts itself in; the program that counts the last one in adds the slots in their order and
writes the row. Which program that is varies, what it adds and in which order does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..schedule import slot_count

_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()


def kept(tensor: Tensor, function: Callable[..., Any], *others: Any) -> Any:
    """``function(tensor, *others)``, computed once for as long as ``tensor`` lives, nobody writes to it or to a tensor among the others, and these
    stay the same objects, or equal ones if they are no tensors.

    For what follows from the graph alone (the inverse of a permutation, a count that must be read from the device): a layer then needs no further
    launch and no synchronisation, and can be captured in a CUDA graph after its first call.
    """
    if any(isinstance(t, Tensor) and t.is_inference() for t in (tensor, *others)):  # has no version counter
        return function(tensor, *others)
    key = (tensor._version, function, *((id(t), t._version) if isinstance(t, Tensor) else t for t in others))
    entry = _kept.get(tensor)
    if entry is None or entry[0] != key:
        # With the others themselves, so that none of them dies and leaves its id to another.
        entry = (key, function(tensor, *others), others)
        _kept[tensor] = entry
    return entry[1]


def _slots_of(hubs: Tensor) -> int:
    return slot_count([hubs, hubs, hubs])


def workspace(schedule: Sequence[Tensor], features: int, blocks: int, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Zeroed counters ``[H, blocks]`` and, for each dtype, slots ``[slots, F]``.

    Without hubs they are empty, but never None: the branch of the hubs is compiled all the same, and needs a pointer."""
    hubs = schedule[2]
    slots = kept(hubs, _slots_of) if hubs.size(0) else 0
    new = torch.zeros if hubs.size(0) else torch.empty
    arrived = new(hubs.size(0), blocks, dtype=torch.int32, device=hubs.device)
    return [arrived, *(torch.empty(slots, features, dtype=dtype, device=hubs.device) for dtype in dtypes)]


def dense(tensor: Tensor | None) -> Tensor | None:
    """An optional operand as the kernels read it: a step or scale that is expanded, say, has no memory of its own."""
    return None if tensor is None else tensor.contiguous()


def float_tile(features: int) -> dict[str, int]:
    """Sizes of a float aggregation. A row of 128 float32 is one 16-byte load of each thread of a warp; a thread of four warps takes 16 values of
    a tile at most; a narrow tile has few rows, since it runs as long as its longest. Of the blocks that leave the least of the last one unused, the
    largest: 192 features are 3 blocks of 64, and 602 are 5 of 128."""
    most = min(triton.next_power_of_2(features), 128)
    block_f = min((most, max(most // 2, 1)), key=lambda block: triton.cdiv(features, block) * (block + 16))
    vector = math.gcd(features, 16)
    return {
        "F_VECTORS": features // vector, "VECTOR": vector,
        "BLOCK_R": min(32, 2048 // block_f), "BLOCK_E": min(128, 2048 // block_f), "BLOCK_F": block_f,
    }  # fmt: skip


def grid(schedule: Sequence[Tensor], block_r: int, blocks: int) -> tuple[int, int]:
    """Programs: a segment each, then ``block_r`` narrow rows each; times the blocks of features."""
    return schedule[1].size(0) + triton.cdiv(schedule[0].numel(), block_r), blocks


def schedule_arguments(indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor]) -> dict[str, Tensor | int]:
    order, segments, hubs = schedule
    return {
        "p_indptr": indptr.contiguous(), "p_indices": indices.contiguous(), "p_order": order, "p_segments": segments, "p_hubs": hubs,
        "R": order.numel(), "S": segments.size(0),
    }  # fmt: skip


def without_edges(indptr: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``indptr`` and schedule of a graph of as many rows and no edges."""
    rows = torch.arange(indptr.numel() - 1, dtype=torch.int32, device=indptr.device)
    return torch.zeros_like(indptr), [rows, indptr.new_empty(0, 5), indptr.new_empty(0, 3)]


SCHEDULE_SIGNATURE = {
    **dict.fromkeys(["p_arrived", "p_indptr", "p_indices", "p_order", "p_segments", "p_hubs"], "*i32"), "R": "i32", "S": "i32",
}  # fmt: skip
"""Their types, and that of the counters, in a :class:`.common.CompileCase`."""


@triton.jit
def _segment(p_segments, i_segment):
    """Row, first edge, end, slot and hub of a segment; scalars."""
    p_segment = p_segments + i_segment.to(tl.int64) * 5
    return (
        tl.load(p_segment).to(tl.int64),
        tl.load(p_segment + 1),
        tl.load(p_segment + 2),
        tl.load(p_segment + 3).to(tl.int64),
        tl.load(p_segment + 4).to(tl.int64),
    )


@triton.jit
def _narrow_rows(p_order, p_indptr, i_tile, R, BLOCK_R: tl.constexpr):
    """Rows of one narrow tile, which of them exist, their first edges and degrees; ``[BLOCK_R]``."""
    o_r = i_tile * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    b_row = tl.load(p_order + o_r, mask=m_r, other=0).to(tl.int64)
    b_first = tl.load(p_indptr + b_row, mask=m_r, other=0)
    b_degree = (tl.load(p_indptr + b_row + 1, mask=m_r, other=0) - b_first).to(tl.int32)
    return b_row, m_r, b_first, b_degree


@triton.jit
def _narrow_edges(p_order, p_indptr, o_r, R):
    """First edge of the narrow rows ``o_r`` of the order, and the end of their edges."""
    b_row = tl.load(p_order + o_r, mask=o_r < R, other=0).to(tl.int64)
    b_first = tl.load(p_indptr + b_row, mask=o_r < R, other=0)
    return b_first, tl.load(p_indptr + b_row + 1, mask=o_r < R, other=0)


@triton.jit
def _last_to_arrive(p_arrived, p_hubs, i_hub):
    """Counts this program in at its hub (and block of features): whether it is the last, the hub's first slot, and the end of its slots."""
    i_first = tl.load(p_hubs + i_hub * 3 + 1).to(tl.int64)
    slots = tl.load(p_hubs + i_hub * 3 + 2).to(tl.int32)
    # Every thread has exchanged its part of the slot before one of them counts.
    tl.debug_barrier()
    p_count = p_arrived + i_hub * tl.num_programs(1) + tl.program_id(1)
    b_before = tl.atomic_add(p_count, 1, sem="acq_rel", scope="gpu")
    tl.debug_barrier()
    return b_before == slots - 1, i_first, i_first + slots


@triton.jit
def _store_slot(p_slots, i_slot, b_part, o_f, m_f, F):
    """Each thread makes its part visible to the whole GPU itself. A plain store, released by the thread that counts, would do on NVIDIA; but the
    barrier of gfx942 compiles to one that does not wait for the stores of other warps (no ``s_waitcnt vmcnt(0)`` before ``s_barrier``)."""
    if b_part.dtype == tl.float32:  # slots are integers: the interpreter exchanges no floats
        b_part = b_part.to(tl.int32, bitcast=True)
    tl.atomic_xchg(p_slots + i_slot * F + o_f[None, :], b_part, mask=m_f[None, :], sem="acq_rel", scope="gpu")


@triton.jit
def _load_slot(p_slots, i_slot, o_f, m_f, F):
    """``[1, BLOCK_F]``; past the L1 cache, which does not see what other programs write."""
    return tl.load(p_slots + i_slot * F + o_f[None, :], mask=m_f[None, :], other=0, cache_modifier=".cg")


@triton.jit
def _sum_of_slots(p_slots, i_first, i_end, b_zero, o_f, m_f, F):
    """``[1, BLOCK_F]``, in the order of the slots."""
    b_sum = b_zero
    for i_slot in range(i_first, i_end):
        b_part = _load_slot(p_slots, i_slot, o_f, m_f, F)
        if b_zero.dtype == tl.float32:
            b_part = b_part.to(tl.float32, bitcast=True)
        b_sum += b_part
    return b_sum
