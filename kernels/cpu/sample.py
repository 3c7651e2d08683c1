"""Numba kernel of :mod:`qgnn.sampler`: one hop of neighbour sampling."""

from __future__ import annotations

import numpy as np

from .common import inlined, kernel

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@inlined
def mixed(state):
    """SplitMix64's output function (Steele, Lea and Flood, 2014): uint64 -> uint64, every bit depends on every bit."""
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@kernel
def sample_hop(
    indptr, indices, perm, nodes, first, starts, key, local, known, row, col, edge, found
):  # fmt: skip
    """Draws ``starts[i + 1] - starts[i]`` edges of every ``nodes[i]`` without replacement, all subsets equally likely (Floyd's algorithm).

    ``local`` [N] holds the place of every sampled node in the output, -1 for others; ``known`` nodes have one. Nodes that are met for the first time
    get the next places and stand in ``found``; returns their number. What a node draws depends on ``key`` and its place ``first + i`` only.

    On one thread: a loader's workers are the threads, and Numba's parallel kernels do not survive a fork.
    """
    fresh = 0
    for i in range(nodes.size):
        begin, degree = indptr[nodes[i]], indptr[nodes[i] + 1] - indptr[nodes[i]]
        start, count = starts[i], starts[i + 1] - starts[i]
        state = mixed(key + np.uint64(first + i) * GOLDEN)
        for k in range(count):
            pick = np.int64(k)
            if count < degree:
                last = degree - count + k
                state += GOLDEN
                pick = np.int64(np.float64(mixed(state) >> np.uint64(11)) * 2.0**-53 * (last + 1))
                taken = False
                for j in range(start, start + k):
                    taken |= edge[j] == pick
                pick = last if taken else pick
            edge[start + k] = pick
        for j in range(start, start + count):
            e = begin + edge[j]
            source = indices[e]
            if local[source] < 0:
                local[source] = known + fresh
                found[fresh] = source
                fresh += 1
            row[j], col[j], edge[j] = local[source], first + i, perm[e]
    return fresh
