"""Triton functions of :mod:`qgnn.kernels.random`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..random import KEY_STEP, MULTIPLIER, ROUNDS
from .affine import _round_half_even

M = tl.constexpr(MULTIPLIER)
W = tl.constexpr(KEY_STEP)
N_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def _words(seed, o_counter):
    """Both words (uint32) of each counter (int64 block); ``seed`` is int32, read as 32 bits without a sign."""
    b_key = tl.zeros_like(o_counter).to(tl.uint32) + seed.to(tl.uint32, bitcast=True)
    b_first, b_second = o_counter.to(tl.uint32), (o_counter >> 32).to(tl.uint32)
    for _ in tl.static_range(N_ROUNDS):
        b_high = tl.umulhi(b_first, M)
        b_second, b_first = tl.mul(b_first, M, sanitize_overflow=False), b_high ^ b_key ^ b_second
        b_key = tl.add(b_key, W, sanitize_overflow=False)
    return b_first, b_second


@triton.jit
def _uniform(seed, o_element):
    """float32 in [0, 1) for each element's linear index (int64 block); ``seed`` as in :func:`_words`."""
    b_first, b_second = _words(seed, o_element >> 1)
    b_word = tl.where((o_element & 1) == 0, b_first, b_second)
    return (b_word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _rounded(b_v, seed, o_element, STOCHASTIC: tl.constexpr):
    """``b_v`` (float32) as whole numbers: stochastically, or half to even. Finite values: cut infinity off before."""
    if STOCHASTIC:
        b_down = tl.floor(b_v)
        return b_down + (_uniform(seed, o_element) < b_v - b_down).to(tl.float32)
    else:
        return _round_half_even(b_v)


def seed_arguments(seed: int) -> dict[str, int | bool]:
    """The arguments ``seed`` (its 32 bits as an int32, so that the type does not change with it) and ``STOCHASTIC`` of a kernel."""
    return {"seed": seed - (1 << 32) if seed >= 1 << 31 else seed, "STOCHASTIC": seed >= 0}
