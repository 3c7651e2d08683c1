"""Numba functions of :mod:`qgnn.kernels.random`."""

from __future__ import annotations

import numpy as np

from ..random import KEY_STEP, MULTIPLIER
from .common import inlined

WORD = np.uint64(0xFFFFFFFF)
M = np.uint64(MULTIPLIER)
W = np.uint64(KEY_STEP)


@inlined
def _keys(seed):
    """Those of the ten rounds."""
    k0 = seed
    k1, k2, k3 = (k0 + W) & WORD, (k0 + np.uint64(2) * W) & WORD, (k0 + np.uint64(3) * W) & WORD
    k4, k5, k6 = (k3 + W) & WORD, (k3 + np.uint64(2) * W) & WORD, (k3 + np.uint64(3) * W) & WORD
    k7, k8, k9 = (k6 + W) & WORD, (k6 + np.uint64(2) * W) & WORD, (k6 + np.uint64(3) * W) & WORD
    return k0, k1, k2, k3, k4, k5, k6, k7, k8, k9


@inlined
def _words(keys, counter):
    """Both words of a counter. They lie in 64-bit lanes, where a product of two fits; ten rounds stand in a row, so that a loop around them runs in
    vectors."""
    a, b = counter & WORD, counter >> np.uint64(32)
    for key in keys:
        product = a * M
        a, b = (product >> np.uint64(32)) ^ key ^ b, product & WORD
    return a, b


@inlined
def _number(word):
    return np.float32(np.int32(word >> np.uint64(8))) * np.float32(2.0**-24)


@inlined
def uniform_row(seed, start, u):
    """``u[k]`` (float32) = the uniform number of element ``start + k`` under ``seed`` (uint64 below 2^32)."""
    keys, odd = _keys(seed), min(start & 1, u.size)
    pairs, first = u[odd:], start // 2 + odd
    if odd:
        u[0] = _number(_words(keys, np.uint64(start // 2))[1])
    for c in range(pairs.size // 2):
        a, b = _words(keys, np.uint64(first + c))
        pairs[2 * c] = _number(a)
        pairs[2 * c + 1] = _number(b)
    if pairs.size & 1:
        pairs[pairs.size - 1] = _number(_words(keys, np.uint64(first + pairs.size // 2))[0])


@inlined
def words_row(seed, start, words):
    """``words`` (uint32, an even number) = both words of the counters from ``start`` on, one after the other."""
    keys = _keys(seed)
    for c in range(words.size // 2):
        a, b = _words(keys, np.uint64(start + c))
        words[2 * c] = np.uint32(a)
        words[2 * c + 1] = np.uint32(b)


@inlined
def rounded_by(v, u):
    """``v`` rounded up where the uniform number ``u`` is below its fraction, else down. NaN and infinity stay."""
    down = np.floor(v)
    return down + np.float32(u < v - down)
