import numpy as np
import pytest
import torch

from qgnn.kernels.fixed_point import fixed_point
from qgnn.kernels.random import NEAREST, philox_reference, round_reference, uniform_reference

from .assertions import assert_bitwise

SEEDS = (0, 1, 2**31 + 5, 2**32 - 1)
STARTS = (0, 2**32 - 50, 2**40 + 3)
"""Counters, also around the carry into their upper word."""


def expected_uniform(seed, start, count):
    element = torch.arange(start, start + count)
    first, second = philox_reference(seed, element // 2)
    return (torch.where(element % 2 == 0, first, second) >> 8).float() * 2.0**-24


@pytest.mark.parametrize(
    ("counter", "seed", "words"),
    [
        ((0, 0), 0, (0xFF1DAE59, 0x6CD10DF2)),
        ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
        ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
    ],
)
def test_known_answers(counter, seed, words):
    """philox2x32-10 in Random123's kat_vectors (https://github.com/DEShawResearch/random123)."""
    index = int(np.array(counter[0] | counter[1] << 32, np.uint64).view(np.int64))
    assert tuple(word.item() for word in philox_reference(seed, torch.tensor([index]))) == words


def test_numba_draws_the_same():
    from qgnn.kernels.cpu.random import uniform_row

    for seed in SEEDS:
        for start in STARTS:
            for begin, count in ((start, 100), (start, 3), (start + 1, 100), (start + 1, 1), (start, 0)):
                u = np.full(count, np.nan, np.float32)
                uniform_row(np.uint64(seed), begin, u)
                assert_bitwise(torch.from_numpy(u), expected_uniform(seed, begin, count))


def test_backends_draw_the_same(backend):
    """A fraction of exactly u is rounded down, and one of the next multiple of 2^-24 up."""
    one, zero = torch.ones(1, device=backend), torch.zeros(1, device=backend)
    for seed in SEEDS:
        u = expected_uniform(seed, 0, 4 * 33).view(4, 33).to(backend)
        assert_bitwise(fixed_point(u, one, zero, 2, True, seed), torch.zeros_like(u))
        assert_bitwise(fixed_point(u + 2.0**-24, one, zero, 2, True, seed), torch.ones_like(u))


def test_uniform_counts_elements_in_order():
    u = uniform_reference(9, (3, 7))
    assert u.dtype == torch.float32
    assert_bitwise(u.flatten(), expected_uniform(9, 0, 21))
    assert uniform_reference(9, (0, 4)).shape == (0, 4)


def test_uniform_is_uniform():
    # 2^16 numbers in 16 bins: the counts differ from 4096 by more than 6 standard deviations, sqrt(2^16 * 15) / 16 = 62, with a chance of 3e-8 in all
    u = uniform_reference(1, (1 << 16,))
    assert u.min() >= 0 and u.max() < 1
    assert ((torch.histc(u, 16, 0, 1) - 4096).abs() < 6 * 62).all()
    # 24 bits: every bit is set in half of them, within 6 standard deviations of 2^16 coins, 6 * 128
    words = (u.double() * 2**24).long()
    assert_bitwise(words.double() / 2**24, u.double())
    ones = ((words[:, None] >> torch.arange(24)) & 1).sum(0)
    assert ((ones - (1 << 15)).abs() < 6 * 128).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounding(dtype):
    v = torch.tensor([0.5, 1.5, -2.5, 2.3, -2.3, 7.0, float("inf"), -float("inf"), float("nan")], dtype=dtype)
    assert_bitwise(round_reference(v, NEAREST), torch.round(v))
    drawn = round_reference(v, 3)
    assert drawn.dtype == dtype
    up = drawn[:5] - v[:5].floor()
    assert_bitwise(up, (uniform_reference(3, (9,))[:5] < v[:5] - v[:5].floor()).to(dtype))
    assert_bitwise(drawn[5:], v[5:])


def test_rounding_near_a_whole_number():
    # floor(v + u) would round 100 + u to 101 for the largest u; -2^-30 has a fraction that rounds to 1, and goes to 0
    v = torch.tensor([100.0, -(2.0**-30)]).repeat(1 << 17)
    rounded = round_reference(v, 1)
    assert rounded[::2].eq(100).all() and rounded[1::2].eq(0).all()
