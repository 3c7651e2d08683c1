"""Degree-sorted schedule of an aggregation: which rows run together, and how hubs are split.

A row (destination) with at most ``NARROW`` edges goes to the *narrow* path: many rows side by side, one edge of each at a time, in order of
falling degree, so that rows which run together have nearly the same length. A longer row becomes one *segment*: many of its edges side by side.
A row of more than ``2 * chunk`` edges, a *hub*, is split into segments of ``chunk`` edges; each leaves a partial result in a slot of its own, and
the slots are added in their order, so the result does not depend on which finished first.

Worked example, ``narrow=1, chunk=2``, degrees 1, 5, 0, 3:
``order = [0, 2]`` (degrees 1, 0); ``segments`` (row, first edge, end, slot, hub) = ``[1, 1, 3, 0, 0], [1, 3, 5, 1, 0], [1, 5, 6, 2, 0],
[3, 6, 9, -1, -1]``; ``hubs`` (row, first slot, slots) = ``[1, 0, 3]``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

NARROW = 64
CHUNK = 2048
"""Edges of a segment of a hub, at most; :func:`chunk_of` a graph may be less."""


class Schedule(NamedTuple):
    """``order`` int32 ``[R]``, ``segments`` ``[S, 5]`` and ``hubs`` ``[H, 3]``, both in the dtype of ``indptr``; all on the device of the graph."""

    order: Tensor
    segments: Tensor
    hubs: Tensor


def rows_of_edges(indptr: Tensor) -> Tensor:
    """Destination of every CSR edge, int32 ``[E]``."""
    rows = torch.arange(indptr.numel() - 1, dtype=torch.int32, device=indptr.device)
    return torch.repeat_interleave(rows, (indptr[1:] - indptr[:-1]).long())


def chunk_of(edges: int) -> int:
    """Edges of a segment: short enough that the longest one, ``2 * chunk`` edges by one warp of a GPU, takes less time than the rest of the graph
    takes all warps. 16 edges of 128 bytes take a warp about 1 us: at ogbn-arxiv's 2.3 M edges, whose bytes take 60 us, 512 edges take 32 us and
    4096 would take 256 us. From 2^24 edges on, it is :data:`CHUNK`."""
    return min(max(1 << (edges // 8192).bit_length() >> 1, 256), CHUNK)


def build_schedule(
    indptr: Tensor, sort: bool = True, narrow: int = NARROW, chunk: int | None = None, local: bool = False
) -> Schedule:
    """Schedule of the rows of ``indptr`` (``[N + 1]``). With ``sort=False`` every row takes the narrow path in its natural order. ``chunk`` is by
    default that of a graph of so many edges (:func:`chunk_of`), read from ``indptr``. With ``local=True`` rows are sorted by the power of two below
    their degree only, and keep their order within one: where neighbours have near numbers, rows that run together then find each other's sources in
    the L2 cache."""
    n, device, dtype = indptr.numel() - 1, indptr.device, indptr.dtype
    if not sort:
        return Schedule(
            torch.arange(n, dtype=torch.int32, device=device),
            torch.empty(0, 5, dtype=dtype, device=device),
            torch.empty(0, 3, dtype=dtype, device=device),
        )
    degree = indptr[1:] - indptr[:-1]
    if chunk is None:
        chunk = chunk_of(int(indptr[-1]) if n else 0)
    # Wide rows stand first in either order, and a degree of 0 last.
    rank = torch.frexp(degree.double()).exponent + 64 * (degree > narrow) if local else degree
    by_degree = torch.argsort(rank, descending=True, stable=True)
    wide = int((degree > narrow).sum())
    rows, order = by_degree[:wide], by_degree[wide:].to(torch.int32)
    pieces = torch.where(
        degree[rows] > 2 * chunk, (degree[rows] + chunk - 1) // chunk, torch.ones_like(rows, dtype=dtype)
    ).long()
    is_hub = pieces > 1
    row = torch.repeat_interleave(rows, pieces)
    first_piece = torch.cumsum(pieces, 0) - pieces
    piece = torch.arange(row.numel(), device=device) - torch.repeat_interleave(first_piece, pieces)
    split = torch.repeat_interleave(is_hub, pieces)
    start = indptr[row] + piece * chunk
    end = torch.where(split, torch.minimum(start + chunk, indptr[row + 1]), indptr[row + 1])
    slot = torch.where(split, torch.cumsum(split.long(), 0) - 1, -1)
    hub = torch.where(split, torch.repeat_interleave(torch.cumsum(is_hub.long(), 0) - 1, pieces), -1)
    slots = pieces[is_hub]
    hubs = torch.stack([rows[is_hub], torch.cumsum(slots, 0) - slots, slots], 1)
    return Schedule(order, torch.stack([row, start, end, slot, hub], 1).to(dtype), hubs.to(dtype))


def slot_count(schedule: list[Tensor] | Schedule) -> int:
    """Partial results that the hubs of a schedule need. Reads one number from the device."""
    hubs = schedule[2]
    return int(hubs[-1, 1] + hubs[-1, 2]) if hubs.size(0) else 0
