"""The rows and the segments of a graph, cut into ranges of equal work.

Rows run in their natural order, each summed in the order of its edges. Only the hubs of the schedule are taken out:
their segments run apart, each into a slot, and the slots are added in order. So the sums do not depend on the number of
threads.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .common import Array, array, even_bounds, kernel


@kernel
def split_rows(indptr, parts, hub):
    """Bounds of ``parts`` ranges of rows with nearly the same work; rows of ``hub`` edges and more are not in them."""
    n = indptr.size - 1
    cost = 0
    for i in range(n):
        degree = indptr[i + 1] - indptr[i]
        cost += 2 + (degree if degree < hub else 0)
    bounds = np.full(parts + 1, n, np.int64)
    bounds[0] = 0
    done, part = 0, 1
    for i in range(n):
        if part < parts and done * parts >= part * cost:
            bounds[part] = i
            part += 1
        degree = indptr[i + 1] - indptr[i]
        done += 2 + (degree if degree < hub else 0)
    return bounds


class Work(NamedTuple):
    """Of every thread: thread ``t`` runs the segments ``cuts[t]`` to ``cuts[t + 1]``, and the rows ``bounds[t]`` to ``bounds[t + 1]``."""

    bounds: NDArray[np.int64]
    cuts: NDArray[np.int64]


class Plan:
    """What the kernels need to know of a graph.

    Attributes:
        n: rows.
        indptr, indices: as arrays, offsets in int64, for which the kernels are compiled.
        places: addresses of both.
        longest: edges of the longest row.
        hub: edges from which a row is a hub.
        hubs: int64 ``[H, 3]``, row, first slot, slots.
        segments: int64 ``[S, 5]``, those of the hubs.
        slots: partial results of hubs.
    """

    def __init__(self, indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor]) -> None:
        self.n, self.edges = indptr.numel() - 1, indices.numel()
        self.indptr: Array = array(indptr.to(torch.int64))
        self.indices: Array = array(indices)
        self.places = (self.indptr.ctypes.data, self.indices.ctypes.data)
        self.longest = int(np.diff(self.indptr).max(initial=0))
        self.hubs: Array = array(schedule[2].to(torch.int64))
        if self.hubs.shape[0]:
            row = self.hubs[-1, 0]  # the smallest: hubs stand in order of falling degree
            self.hub = int(self.indptr[row + 1] - self.indptr[row])
            segments: Array = array(schedule[1].to(torch.int64))
            self.segments = segments[segments[:, 3] >= 0]
            self.slots = int(self.hubs[-1, 1] + self.hubs[-1, 2])
        else:
            self.hub = self.edges + 1
            self.segments = np.empty((0, 5), np.int64)
            self.slots = 0
        self._work: dict[int, Work] = {}

    def work(self, threads: int) -> Work:
        known = self._work.get(threads)
        if known is None:
            bounds = split_rows(self.indptr, threads, self.hub)
            known = self._work[threads] = Work(bounds, even_bounds(self.segments.shape[0], threads))
        return known


_plans: dict[int, tuple[weakref.ref[Tensor], tuple[int, ...], Plan]] = {}


def plan_of(indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor]) -> Plan:
    """The plan of a graph, remembered until one of its tensors changes, or ``indptr`` dies."""
    _, segments, hubs = schedule
    # tensors of inference mode have no version, so a change in place could not be seen
    if indptr.is_inference() or indices.is_inference() or segments.is_inference() or hubs.is_inference():
        return Plan(indptr, indices, schedule)
    key = (
        indptr.data_ptr(), indices.data_ptr(), segments.data_ptr(), hubs.data_ptr(),
        indptr._version, indices._version, segments._version, hubs._version,
    )  # fmt: skip
    place = id(indptr)
    known = _plans.get(place)
    if known is None or known[0]() is not indptr or known[1] != key:
        known = (weakref.ref(indptr, lambda _: _plans.pop(place, None)), key, Plan(indptr, indices, schedule))
        _plans[place] = known
    return known[2]
