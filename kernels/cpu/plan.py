"""The rows and the segments of one aggregation, cut into ranges of equal work.

Rows run in their natural order, each summed in the order of its edges. Only the hubs of the schedule are taken out:
their segments run apart, each into a slot, and the slots are added in order. So the sums do not depend on the number of
threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .common import Array, array, kernel, parts_for


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


class Plan:
    """The rows and the segments of one call, cut into ranges."""

    def __init__(self, indptr: Tensor, indices: Tensor, schedule: Sequence[Tensor], features: int) -> None:
        self.indptr: Array = array(indptr.to(torch.int64))  # kernels are compiled for one type of offset
        self.indices: Array = array(indices)
        self.n = indptr.numel() - 1
        self.hubs: Array = array(schedule[2].to(torch.int64))
        if self.hubs.shape[0]:
            row = self.hubs[-1, 0]  # the smallest: hubs stand in order of falling degree
            self.hub = int(self.indptr[row + 1] - self.indptr[row])
            segments: Array = array(schedule[1].to(torch.int64))
            self.segments = segments[segments[:, 3] >= 0]
            self.slots = int(self.hubs[-1, 1] + self.hubs[-1, 2])
        else:
            self.hub = indices.numel() + 1
            self.segments = np.empty((0, 5), np.int64)
            self.slots = 0
        self.parts = parts_for(indices.numel() * features)

    def row_bounds(self) -> NDArray[np.int64]:
        return split_rows(self.indptr, self.parts, self.hub)
