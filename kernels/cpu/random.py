"""Numba functions of :mod:`qgnn.kernels.random`."""

from __future__ import annotations

import numpy as np

from ..random import KEY_STEP, MULTIPLIER
from .common import inlined

WORD = np.uint64(0xFFFFFFFF)
M = np.uint64(MULTIPLIER)
W = np.uint64(KEY_STEP)


@inlined
def uniform_row(seed, start, u):
    """``u[k]`` (float32) = the uniform number of element ``start + k`` under ``seed`` (uint64 below 2^32).

    Words lie in 64-bit lanes, where a product of two fits; ten rounds stand in a row, so that the loop runs in vectors."""
    k0 = seed
    k1, k2, k3 = (k0 + W) & WORD, (k0 + np.uint64(2) * W) & WORD, (k0 + np.uint64(3) * W) & WORD
    k4, k5, k6 = (k3 + W) & WORD, (k3 + np.uint64(2) * W) & WORD, (k3 + np.uint64(3) * W) & WORD
    k7, k8, k9 = (k6 + W) & WORD, (k6 + np.uint64(2) * W) & WORD, (k6 + np.uint64(3) * W) & WORD
    for k in range(u.size):
        counter = np.uint64(start + k)
        a, b = counter & WORD, counter >> np.uint64(32)
        for key in (k0, k1, k2, k3, k4, k5, k6, k7, k8, k9):
            product = a * M
            a, b = (product >> np.uint64(32)) ^ key ^ b, product & WORD
        u[k] = np.float32(np.int32(a >> np.uint64(8))) * np.float32(2.0**-24)


@inlined
def rounded_by(v, u):
    """``v`` rounded up where the uniform number ``u`` is below its fraction, else down. NaN and infinity stay."""
    down = np.floor(v)
    return down + np.float32(u < v - down)
